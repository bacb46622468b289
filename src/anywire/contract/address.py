"""Addresses: text that says which wire and where.

Owns: the structure of an address and nothing of its meaning; what a scheme may hold is its wire's business, and the
helpers at the end are for wires to say so. Pure values, used from any thread, no I/O and no look-ups.
What can go wrong: `AddressError`, always with the offsets of the bad part in the text that was given.

The structure is that of a URI (RFC 3986) with three deviations: there is no user name and no fragment; `scheme:@name`
is an abstract Unix name (unix(7)); an IPv6 zone is `%25zone` (RFC 6874) or, as tools print it, a bare `%zone`.
Percent-encoding stands for bytes; bytes that are not UTF-8 become surrogate escapes (PEP 383), as in file names.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from anywire.contract.errors import AddressError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_NUL = re.compile(r"%00")
_ENCODED = re.compile(rb"%([0-9A-Fa-f]{2})")
_NO_PARAMS: Mapping[str, str] = MappingProxyType({})

# What stands unencoded in the canonical form (RFC 3986 section 2.3 and 3).
_SAFE_ZONE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_SAFE_HOST = _SAFE_ZONE | frozenset(b"!$&'()*+,;=")
_SAFE_PATH = _SAFE_ZONE | frozenset(b"/:@!$&'()*+,;=")
_SAFE_VALUE = _SAFE_ZONE | frozenset(b"/:@!$'()*,;")


class _Parts(NamedTuple):
    scheme: str
    host: str
    port: int | None
    zone: str
    path: str
    abstract: bool
    params: dict[str, str]


_Spans = dict[str, tuple[int, int]]


class Address:
    """Where a wire leads. Frozen, hashable, comparable; `str()` gives the canonical form, which parses to an equal one.

    Fields: `scheme` (lower case); `host` (a name, IPv4 or IPv6 address without brackets; lower case if a port is
    given, since it is then a network host); `port` or None; `zone` of an IPv6 address; `path` (with its leading
    slash, or the abstract name when `abstract`); `params`: a read-only mapping sorted by key.

    Raises AddressError for fields that no text could give. Safe from any thread.

    >>> a = Address.parse("TCP://[::0001]:9000")
    >>> str(a), a.host, a.port
    ('tcp://[::1]:9000', '::1', 9000)
    """

    __slots__ = ("_text", "abstract", "host", "params", "path", "port", "scheme", "zone")

    scheme: str
    host: str
    port: int | None
    zone: str
    path: str
    abstract: bool
    params: Mapping[str, str]
    _text: str

    def __init__(
        self,
        scheme: str,
        *,
        host: str = "",
        port: int | None = None,
        zone: str = "",
        path: str = "",
        abstract: bool = False,
        params: Mapping[str, str] = _NO_PARAMS,
    ) -> None:
        parts = _normal(_Parts(scheme, host, port, zone, path, abstract, dict(params)))
        text = _compose(parts)
        if _normal(_scan(text)[0]) != parts:
            raise AddressError(text, 0, len(text), f"these fields make no address: {parts}")
        self._fill(parts, text)

    @classmethod
    def parse(cls, text: str | Address) -> Address:
        """Read an address from text; an Address is returned as it is. Raises AddressError; TypeError for no text."""
        if isinstance(text, Address):
            return text
        if not isinstance(text, str):
            raise TypeError(f"an address is text or an Address, not {type(text).__name__}")
        address = cls.__new__(cls)
        address._fill(_normal(_scan(text)[0]), text)
        return address

    def _fill(self, parts: _Parts, text: str) -> None:
        put = object.__setattr__
        for name, value in zip(_Parts._fields[:-1], parts[:-1], strict=True):
            put(self, name, value)
        put(self, "params", MappingProxyType(dict(sorted(parts.params.items()))) if parts.params else _NO_PARAMS)
        put(self, "_text", text)  # as given: errors found later point into what the user wrote

    def _parts(self) -> _Parts:
        return _Parts(self.scheme, self.host, self.port, self.zone, self.path, self.abstract, dict(self.params))

    @property
    def path_bytes(self) -> bytes:
        """The path, or the abstract name, as the bytes that the kernel is given."""
        return self.path.encode("utf-8", "surrogateescape")

    def with_port(self, port: int | None) -> Address:
        """The same address with this port: what a listener on port 0 reports."""
        return self._replace(port=port)

    def with_params(self, params: Mapping[str, str]) -> Address:
        """The same address with exactly these parameters; `{}` removes all."""
        return self._replace(params=dict(params))

    def _replace(self, **changes: Any) -> Address:
        return Address(**self._parts()._replace(**changes)._asdict())

    def error(self, part: str, reason: str) -> AddressError:
        """An AddressError that points at a part of the text this address was parsed from.

        `part`: "scheme", "host", "port", "zone", "path", "params", or "?key" for one parameter. A part that is missing
        is pointed at where it should stand.
        """
        spans = _scan(self._text)[1]
        start, end = spans.get(part) or spans["params"]
        return AddressError(self._text, start, end, reason)

    def __str__(self) -> str:
        return _compose(self._parts())

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return self._parts() == other._parts() if isinstance(other, Address) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return Address.parse, (str(self),)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"an Address is frozen: {name} cannot be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"an Address is frozen: {name} cannot be deleted")


# --- text to parts ---------------------------------------------------------------------------------------------------


def _scan(text: str) -> tuple[_Parts, _Spans]:
    """Take an address apart: its parts, decoded, and where each stands in the text."""
    if not text:
        raise AddressError(text, 0, 0, "the address is empty; write one like tcp://host:port")
    for at, char in enumerate(text):
        if (not char.isprintable() and not "\udc80" <= char <= "\udcff") or char.isspace():
            raise AddressError(text, at, at + 1, "spaces and unprintable characters are written as %20 and so on")
        if char == "#":
            raise AddressError(text, at, at + 1, "an address has no fragment; write # as %23")
    match = _SCHEME.match(text)
    at = match.end() if match else 0
    if not match or text[at : at + 1] != ":":
        if ":" in text and ("/" not in text or text.index(":") < text.index("/")):
            raise AddressError(text, at, at + 1, "a scheme is a letter, then letters, digits, '+', '-' and '.'")
        raise AddressError(text, 0, len(text), "the scheme is missing; write one like tcp://host:port or unix:///path")
    spans: _Spans = {"scheme": (0, at)}
    start = at + 1
    end = text.find("?", start)
    end = end if end >= 0 else len(text)
    host = zone = path = ""
    port = None
    abstract = False
    spans["host"] = spans["port"] = spans["zone"] = (start, start)
    spans["path"] = (end, end)
    if text.startswith("//", start, end):
        slash = text.find("/", start + 2, end)
        slash = slash if slash >= 0 else end
        host, port, zone = _scan_authority(text, start + 2, slash, spans)
        path = _decode(text, slash, end)
        spans["path"] = (slash, end)
    elif text.startswith("/", start, end):
        path = _decode(text, start, end)
        spans["path"] = (start, end)
    elif text.startswith("@", start, end):
        abstract = True
        if start + 1 == end:
            raise AddressError(text, start, end, "an abstract name must follow '@'")
        path = _decode(text, start + 1, end, nul=True)
        spans["path"] = (start, end)
    elif start < end:
        advice = ""
        if text[start:end].isdigit():
            advice = f"; for host and port write tcp://{text[:end]}"
        elif "/" in text[start:end] or "." in text[start:end]:
            advice = f"; a path is absolute: {text[:at]}:///..."
        raise AddressError(text, start, end, f"after the scheme comes //host, /path, @name or ?key=value{advice}")
    params = _scan_params(text, end, spans)
    return _Parts(text[:at], host, port, zone, path, abstract, params), spans


def _scan_authority(text: str, start: int, end: int, spans: _Spans) -> tuple[str, int | None, str]:
    at = text.find("@", start, end)
    if at == start:
        raise AddressError(text, start, end, "an abstract name stands right after the scheme, as in unix:@name")
    if at > start:
        raise AddressError(text, start, at + 1, "an address holds no user name; write '@' in a name as %40")
    zone = ""
    if text.startswith("[", start, end):
        close = text.find("]", start, end)
        if close < 0:
            raise AddressError(text, start, end, "the bracket is not closed")
        percent = text.find("%", start, close)
        v6_end = percent if percent >= 0 else close
        host = text[start + 1 : v6_end]
        if _ipv6(host) is None:
            raise AddressError(text, start + 1, v6_end, "brackets hold an IPv6 address; this is none")
        spans["host"] = (start + 1, v6_end)
        spans["zone"] = (v6_end, close)
        if percent >= 0:
            # "%25" and more is RFC 6874. Anything else is a bare zone as tools print it; "%25" alone is zone 25.
            after = percent + 3 if text.startswith("%25", percent, close) and percent + 3 < close else percent + 1
            zone = _decode(text, after, close)
            if not zone:
                raise AddressError(text, percent, close, "a zone (an interface's name or number) must follow '%'")
        colon = close + 1
        if colon < end and text[colon] != ":":
            raise AddressError(text, colon, end, "only :port may follow the bracket")
    else:
        colon = text.find(":", start, end)
        colon = colon if colon >= 0 else end
        for at in range(start, end):
            if text[at] in "[]":
                raise AddressError(text, at, at + 1, "brackets enclose a whole IPv6 address, as in [::1]")
        if text.find(":", colon + 1, end) >= 0:
            raise AddressError(text, start, end, "too many colons; an IPv6 address stands in brackets, as in [::1]:80")
        host = _decode(text, start, colon)
        spans["host"] = (start, colon)
        spans["zone"] = (colon, colon)
    spans["port"] = (min(colon + 1, end), end)
    return host, _scan_port(text, colon + 1, end) if colon < end else None, zone


def _scan_port(text: str, start: int, end: int) -> int:
    digits = text[start:end]
    if not digits:
        raise AddressError(text, start - 1, end, "a port number must follow ':'")
    if not (digits.isascii() and digits.isdigit()):
        raise AddressError(text, start, end, "a port is a number")
    digits = digits.lstrip("0") or "0"
    if len(digits) > 5 or int(digits) > 65535:
        raise AddressError(text, start, end, "a port is 0 to 65535")
    return int(digits)


def _scan_params(text: str, start: int, spans: _Spans) -> dict[str, str]:
    params: dict[str, str] = {}
    spans["params"] = (start, len(text))
    if start < len(text) and start + 1 == len(text):
        raise AddressError(text, start, start + 1, "key=value must follow '?'")
    at = start + 1
    while at <= len(text) and start < len(text):
        end = text.find("&", at)
        end = end if end >= 0 else len(text)
        equals = text.find("=", at, end)
        if equals < 0:
            raise AddressError(text, at, end, "a parameter is written key=value")
        key = text[at:equals]
        if not (key.isidentifier() and key.isascii()):
            raise AddressError(text, at, equals, "a parameter's key is letters, digits and '_'")
        if key in params:
            raise AddressError(text, at, end, f"{key} is given twice")
        params[key] = _decode(text, equals + 1, end)
        spans["?" + key] = (at, end)
        at = end + 1
    return params


def _decode(text: str, start: int, end: int, *, nul: bool = False) -> str:
    part = text[start:end]
    if "%" not in part:
        return part
    bad = _BAD_PERCENT.search(part)
    if bad:
        raise AddressError(
            text, start + bad.start(), min(end, start + bad.start() + 3), "two hexadecimal digits must follow '%'"
        )
    zero = None if nul else _NUL.search(part)
    if zero:
        raise AddressError(text, start + zero.start(), start + zero.end(), "only an abstract name may hold a NUL")
    raw = _ENCODED.sub(lambda match: bytes((int(match[1], 16),)), part.encode("utf-8", "surrogateescape"))
    return raw.decode("utf-8", "surrogateescape")


# --- parts to text ---------------------------------------------------------------------------------------------------


def _ipv6(host: str) -> str | None:
    """The canonical text (RFC 5952) of an IPv6 address, or None. `inet_pton` is stricter than most parsers."""
    if ":" not in host or not host.isascii():
        return None
    try:
        return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, host))
    except (OSError, ValueError):
        return None


def _normal(parts: _Parts) -> _Parts:
    host = _ipv6(parts.host) or parts.host
    if parts.port is not None and host.isascii():
        host = host.lower()  # only ASCII letters fold in host names (RFC 4343)
    return parts._replace(scheme=parts.scheme.lower(), host=host)


def _compose(parts: _Parts) -> str:
    if parts.abstract:
        place = "@" + _quote(parts.path, _SAFE_PATH)
    elif parts.host or parts.port is not None or parts.path:
        v6 = _ipv6(parts.host) is not None
        zone = "%25" + _quote(parts.zone, _SAFE_ZONE) if parts.zone else ""
        host = f"[{parts.host}{zone}]" if v6 else _quote(parts.host, _SAFE_HOST) + zone
        port = "" if parts.port is None else f":{parts.port}"
        place = f"//{host}{port}{_quote(parts.path, _SAFE_PATH)}"
    else:
        place = ""
    query = "&".join(f"{key}={_quote(value, _SAFE_VALUE)}" for key, value in sorted(parts.params.items()))
    return f"{parts.scheme}:{place}{'?' + query if query else ''}"


def _quote(text: str, safe: frozenset[int]) -> str:
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise AddressError(text, error.start, error.end, "half a surrogate pair is no character") from None
    return "".join(chr(byte) if byte in safe else f"%{byte:02X}" for byte in raw)


# --- for wires -------------------------------------------------------------------------------------------------------


def forbid(address: Address, *parts: str) -> None:
    """Refuse an address that has one of these parts: "host", "port", "path", "abstract", "params"."""
    for part in parts:
        if part == "path" and address.path and not address.abstract:
            raise address.error("path", f"{address.scheme}: addresses have no path")
        if part == "abstract" and address.abstract:
            raise address.error("path", f"{address.scheme}: addresses have no abstract name")
        if part == "host" and address.host:
            raise address.error("host", f"{address.scheme}: addresses have no host; a path has three slashes before it")
        if part == "port" and address.port is not None:
            raise address.error("port", f"{address.scheme}: addresses have no port")
        if part == "params" and address.params:
            raise address.error("params", f"{address.scheme}: addresses have no parameters")


def require_host_port(address: Address, *, port_zero: bool = True) -> tuple[str, int]:
    """The host and port of `scheme://host:port`.

    For listening, port 0 asks for any free port, and an empty host is all of this machine's. With `port_zero=False`
    both are refused: nobody can connect to them.
    """
    forbid(address, "abstract", "path")
    if not address.host and (not port_zero or address.port is None):
        raise address.error("host", f"the host is missing; write {address.scheme}://host:port")
    if address.host and not _ipv6(address.host):
        try:
            # getaddrinfo would fail on these with a UnicodeError that names no address.
            good = address.host.encode("idna")
        except UnicodeError:
            good = b""
        if not good or not address.host.isprintable() or any(char.isspace() for char in address.host):
            raise address.error("host", "this is no host name or IP address")
    if address.port is None:
        raise address.error("port", f"the port is missing; write {address.scheme}://host:port")
    if address.port == 0 and not port_zero:
        raise address.error("port", "port 0 is for listening only; connect to the port the listener reports")
    return address.host, address.port


def require_path(address: Address) -> str:
    """The path of `scheme:///path`."""
    forbid(address, "host", "port", "abstract")
    if address.path in ("", "/"):
        raise address.error("path", f"the path is missing; write {address.scheme}:///path")
    if address.path.endswith("/"):
        raise address.error("path", "this path names a directory")
    return address.path


def require_name(address: Address) -> str:
    """The name of `scheme://name`."""
    forbid(address, "abstract", "port", "path")
    if not address.host:
        raise address.error("host", f"the name is missing; write {address.scheme}://name")
    return address.host
