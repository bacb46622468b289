"""anywire: one connection API over any wire; the address decides."""

__version__ = "0.1.0"
