"""The command line: demo, cat and bench."""
