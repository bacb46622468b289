"""Wire options: what an address's `?key=value` and the keyword arguments of connect and serve may say.

Owns: reading them from text, checking them, defaults, and refusing unknown ones by name. Called by the facade before a
wire is touched, on the caller's thread. What can go wrong: AddressError for what stands in the address (pointing at
it), TypeError for an unknown keyword and ValueError for a keyword's bad value, as for any Python function.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from anywire.contract.address import Address
    from anywire.contract.wire import Wire

Side = Literal["connect", "listen"]
BOTH: frozenset[Side] = frozenset(("connect", "listen"))

_SIZE = re.compile(r"(\d+)\s*(?:([kKMGT])(i)?)?B?")
_SECONDS = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|h)?")
_SECONDS_IN = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a wire.

    `name`: the key in an address and the keyword. `type`: bool, int (0 or more), float (seconds) or str, or a
    converter: a function that takes what was given, text from an address or a Python value from a keyword, and returns
    the value or raises ValueError with what would be right. This module has some: `octal_mode`, `seconds`, `size`,
    `integer`, `one_of`, `path`, `words`, `any_value`. `default` is not converted. `doc`: one line. `sides`: where it
    means something. In an address, which both sides may share, an option of the other side is passed over; as a keyword
    it is refused. `shapes`: it changes what the wire promises; given as a keyword it becomes part of the address.
    """

    name: str
    type: type[bool | int | float | str] | Callable[[Any], Any]
    default: Any = None
    doc: str = ""
    sides: frozenset[Side] = BOTH
    shapes: bool = False

    def convert(self, value: Any) -> Any:
        """The value of what was given. Raises ValueError."""
        return _OF_TYPE.get(self.type, self.type)(value)


def resolve_options(
    wire: Wire | type[Wire], address: Address, keywords: Mapping[str, Any], *, side: Side
) -> dict[str, Any]:
    """The value of each option that the wire has on this side: from the address, from the keywords, or its default.

    A keyword of None counts as not given. Given in both places, they must agree.
    """
    given: dict[str, Any] = {}
    for key, text in address.params.items():
        option = wire.options.get(key)
        if option is None:
            raise address.error("?" + key, _unknown(wire, key, wire.options))
        try:
            value = option.convert(text)
        except ValueError as error:
            raise address.error("?" + key, f"{key}: {error}") from None
        if side in option.sides:
            given[key] = value
    here = {key: option for key, option in wire.options.items() if side in option.sides}
    for key, raw in keywords.items():
        if raw is None:
            continue
        option = here.get(key)
        if option is None:
            raise TypeError(f"{address}: {_unknown(wire, key, here, side)}")
        try:
            value = option.convert(raw)
        except ValueError as error:
            raise ValueError(f"{address}: {key}={raw!r}: {error}") from None
        if key in given and given[key] != value:
            raise address.error("?" + key, f"{key} is given twice: here and as the argument {key}={raw!r}")
        given[key] = value
    return {key: given.get(key, option.default) for key, option in here.items()}


def shaped(wire: Wire, address: Address, values: Mapping[str, Any]) -> Address:
    """The address with the options in it that change what the wire promises there, and are not at their default."""
    extra = {
        name: str(values[name]).lower() if isinstance(values[name], bool) else str(values[name])
        for name, option in wire.options.items()
        if option.shapes and values.get(name, option.default) != option.default and name not in address.params
    }
    return address.with_params({**address.params, **extra}) if extra else address


def _unknown(wire: Wire | type[Wire], key: str, known: Iterable[str], side: Side | None = None) -> str:
    scheme = "/".join(wire.schemes)
    if side is not None and key in wire.options:
        return f"the option {key!r} of {scheme} is for the other side; it means nothing to {side}"
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1)
    advice = f"did you mean {near[0]!r}? " if near else ""
    return f"{scheme} has no option {key!r}; {advice}{'known: ' + ', '.join(known) if known else 'it has none'}"


# --- converters ------------------------------------------------------------------------------------------------------


def boolean(value: Any) -> bool:
    """true/false, yes/no, on/off, 1/0."""
    if isinstance(value, str):
        value = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }.get(value.lower(), value)
    if not isinstance(value, bool):
        raise ValueError("write true or false")
    return value


def octal_mode(value: Any) -> int:
    """A file mode: octal digits in text (0600), or an integer (0o600).

    >>> octal_mode("0640") == octal_mode(0o640) == 416
    True
    """
    if isinstance(value, str):
        digits = value.removeprefix("0o")
        if not re.fullmatch("[0-7]{1,5}", digits):
            raise ValueError("a file mode is octal digits, as in 0600")
        value = int(digits, 8)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 0o777:
        raise ValueError("a file mode is 0 to 0777, octal")
    return value


def seconds(value: Any) -> float:
    """A time in seconds: 1.5, or text with a unit (250ms, 2s, 1m, 1h)."""
    if isinstance(value, str):
        match = _SECONDS.fullmatch(value) if value.isascii() else None
        if not match:
            raise ValueError("a time is a number of seconds, or has a unit: 250ms, 2s, 1m, 1h")
        value = float(match[1]) * _SECONDS_IN[match[2]]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError("a time is a number of seconds, 0 or more")
    return float(value)


def size(value: Any) -> int:
    """A number of bytes: 65536, or text with a unit (64KiB, 16MiB, 1GiB; kB, MB and GB are powers of ten).

    >>> size("16MiB"), size("16 MB"), size("1K")
    (16777216, 16000000, 1000)
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value) if value.isascii() else None
        if not match or len(match[1]) > 18:
            raise ValueError("a size is a number of bytes, or has a unit: 64KiB, 16MiB, 1GiB")
        power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
        value = int(match[1]) * (1024 if match[3] else 1000) ** power
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a size is a number of bytes, 0 or more")
    return value


def integer(least: int, most: int) -> Callable[[Any], int]:
    """A converter for whole numbers from `least` to `most`, both included."""

    def convert(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch("-?[0-9]{1,18}", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return value

    return convert


def one_of(*choices: str) -> Callable[[Any], str]:
    """A converter for one of a few words."""

    def convert(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return value

    return convert


def text(value: Any) -> str:
    """Any text but none at all."""
    if not isinstance(value, str) or not value:
        raise ValueError("some text")
    return value


def path(value: Any) -> str:
    """A file's path: text or an `os.PathLike`."""
    found = os.fsdecode(value) if isinstance(value, (str, bytes, os.PathLike)) else ""
    if not found or "\0" in found:
        raise ValueError("the path of a file")
    return found


def words(value: Any) -> tuple[str, ...]:
    """Words separated by commas in text, or an iterable of them."""
    found = tuple(value.split(",")) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
    if not found or not all(isinstance(word, str) and word for word in found):
        raise ValueError("words separated by commas")
    return found


def count(value: Any) -> int:
    """A whole number, 0 or more."""
    return integer(0, 1 << 62)(value)


def any_value(value: Any) -> Any:
    """Whatever is given: for keyword options that no text can say (an `ssl.SSLContext`)."""
    return value


_OF_TYPE: dict[Any, Callable[[Any], Any]] = {bool: boolean, int: count, float: seconds, str: text}
