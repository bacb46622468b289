"""`python -m anywire`: the command line, as the `anywire` script starts it."""

from __future__ import annotations

from anywire.cli.__main__ import main

if __name__ == "__main__":
    main()
