"""Addresses to listen at, as a config has them: tcp://127.0.0.1:8080, udp://[::1]:53, unix:///run/app.sock. Pure."""

import re
from typing import NamedTuple

PATH_BYTES = 107  # sun_path of unix(7) is 108 with its NUL
FORMS = "tcp://127.0.0.1:8080, tcp://[::1]:8080, udp://... or unix:///run/app.sock"
_SCHEME = re.compile(r"([A-Za-z]+)://(.*)", re.DOTALL)
_PLACE = re.compile(r"(\[[^\]]*\]|[^:\[\]]*):([0-9]+)")


class Address(NamedTuple):
    """kind: tcp, udp or unix. place: an IP address in its usual form, or an absolute path. port: 0 lets the kernel
    choose one; always 0 with a path."""

    kind: str
    place: str
    port: int = 0

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix://{self.place}"
        return f"{self.kind}://{f'[{self.place}]' if self.is_v6 else self.place}:{self.port}"

    @property
    def is_v6(self) -> bool:
        return self.kind != "unix" and ":" in self.place


def parse(text: str) -> Address:
    """The address that text means. Raises ValueError, which says what is wrong with it and what to write."""
    found = _SCHEME.fullmatch(text)
    if found is None:
        raise ValueError(f"is no address to listen at: write {_meant(text)}")
    kind, rest = found[1].lower(), found[2]
    if kind == "unix":
        return Address(kind, _path(rest))
    if kind not in ("tcp", "udp"):
        raise ValueError(f"has an unknown kind, {kind}: write {FORMS}")
    place = _PLACE.fullmatch(rest)
    if place is None:
        raise ValueError(f"needs a host and a port: write {kind}://127.0.0.1:8080 or {kind}://[::1]:8080")
    return Address(kind, _host(place[1]), _port(place[2]))


def _meant(text: str) -> str:
    if text.startswith("/"):
        return f"unix://{text}"
    host, colon, port = text.rpartition(":")
    if port.isascii() and port.isdigit():
        return f"tcp://{host if colon and host else '127.0.0.1'}:{port}"
    return FORMS


def _path(path: str) -> str:
    if not path.startswith("/") or path.endswith("/"):
        raise ValueError("needs the absolute path of a file: write unix:///run/app.sock")
    length = len(path.encode("utf-8", "surrogateescape"))
    if length > PATH_BYTES:
        raise ValueError(f"has a path of {length} bytes, {PATH_BYTES} are possible: give a shorter one")
    return path


def _host(text: str) -> str:
    from ipaddress import IPv4Address, IPv6Address  # only configs with sockets pay for it

    if text in ("", "*"):
        raise ValueError("needs an IP address: write 0.0.0.0 for all of IPv4, [::] for all of IPv6")
    try:
        return str(IPv6Address(text[1:-1]) if text.startswith("[") else IPv4Address(text))
    except ValueError:
        raise ValueError(
            f"{text} is no IP address, and names are not looked up: write one, such as 127.0.0.1 or [::1]"
        ) from None


def _port(digits: str) -> int:
    if len(digits) > 5 or int(digits) > 65535:
        raise ValueError(f"has port {digits}: they go from 0 to 65535")
    return int(digits)
