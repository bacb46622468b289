"""`X.unlink(name)` and `x.unlink()`: removing the name of an object, with the object at hand or without it.

Used by the classes whose objects have names in the system. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload


class Unlink:
    """A descriptor: of the class, a function of the name; of an object, one without arguments."""

    def __init__(self, remove: Callable[[str], None]) -> None:
        self._remove = remove
        self.__doc__ = remove.__doc__

    @overload
    def __get__(self, thing: None, owner: type) -> Callable[[str], None]: ...
    @overload
    def __get__(self, thing: Any, owner: type) -> Callable[[], None]: ...
    def __get__(self, thing: Any, owner: type) -> Callable[..., None]:
        if thing is None:
            return self._remove

        def unlink() -> None:
            if thing.name is None:
                raise ValueError(f"this {owner.__name__} has no name that could be removed")
            self._remove(thing.name)

        unlink.__doc__ = self.__doc__
        return unlink
