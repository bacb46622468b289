"""The blocking front: the same names as ``anywire``, with calls that wait."""
