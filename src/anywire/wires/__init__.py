"""The wires: one module for each, found by the scheme of an address."""
