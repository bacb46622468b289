"""The kernel's ways to wait for many descriptors at once, one small module each behind one contract.

>>> from anywire.engine.demultiplexers import by_name, default, names
>>> default().name
'epoll'
>>> names()
('epoll', 'poll', 'select')
>>> by_name("kqueue")
Traceback (most recent call last):
    ...
ValueError: no demultiplexer is called 'kqueue' here; there are epoll, poll, select
"""

from importlib import import_module

from ._base import Demultiplexer

# The best comes first.
_CLASSES = {"epoll": "Epoll", "poll": "Poll", "select": "Select"}


def names() -> tuple[str, ...]:
    """The demultiplexers that this platform has, the best one first."""
    found = []
    for name in _CLASSES:
        try:
            import_module(f"{__name__}.{name}")
        except ImportError:  # not built: this platform hasn't got it
            continue
        found.append(name)
    return tuple(found)


def by_name(name: str) -> Demultiplexer:
    """A new, empty demultiplexer.

    Args:
        name: one of `names()`.

    Raises:
        ValueError: the platform has none of that name.
        OSError: the kernel refused (EMFILE and ENFILE: too many descriptors are open).
    """
    if name not in names():
        raise ValueError(f"no demultiplexer is called {name!r} here; there are {', '.join(names())}")
    made: Demultiplexer = getattr(import_module(f"{__name__}.{name}"), _CLASSES[name])()
    return made


def default() -> Demultiplexer:
    """A new one of the best kind that the platform has."""
    return by_name(names()[0])


__all__ = ["Demultiplexer", "by_name", "default", "names"]
