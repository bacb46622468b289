"""What holds for each test of the engine."""

from tests.leftovers import nothing_is_left  # noqa: F401
