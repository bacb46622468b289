"""Where `anywire` and `python -m anywire` start.

Owns: finding out whether click and rich, which only the command line needs, are installed. Without them it says in one
line what to install, and ends with status 1. First of all, standard descriptors that are closed are taken, so that no
socket gets their number. Until a command takes over, Ctrl-C ends the process as it ends a C program: nothing has begun
yet, and a traceback out of an import would help nobody.
"""

from __future__ import annotations

import importlib
import signal
import sys

from anywire.cli.standard import reserve

NEEDED = ("click", "rich")


def main() -> None:
    """Run the command line on sys.argv; ends the process."""
    reserve()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    missing = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        sys.exit(f"anywire: the command line needs {' and '.join(missing)}: pip install 'anywire[cli]'")
    importlib.import_module("anywire.cli.group").run()


if __name__ == "__main__":
    main()
