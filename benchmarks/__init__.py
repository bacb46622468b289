"""Each file answers one question, with the peer in the same run: `python -m benchmarks.NAME --help`."""
