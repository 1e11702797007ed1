"""What holds for a pool, each setting with where it was said: as `ctl show` and `ctl env` tell it. Pure.

A setting is one key of the config with the value that holds, written as the config would have it.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from nssup import keys
from nssup.keys import Key
from nssup.locate import Path, dotted
from nssup.plan import OWN_VARIABLES
from nssup.spec import PoolSpec, SocketSpec
from nssup.units import SECONDS

DEFAULT = "default"
MASK = "******"
Origins = Mapping[Path, str]  # ("pool", "web", "workers") -> "file:line"

_SECRET = re.compile(
    r"PASS|SECRET|TOKEN|CREDENTIAL|PRIVATE|APIKEY|API_KEY|ACCESS_KEY|AUTH|COOKIE|SESSION|DSN|(^|_)(KEY|PWD|PW|PIN|SALT)($|_)",
    re.IGNORECASE,
)
_PASSWORD_IN_URL = re.compile(r"([a-z][a-z0-9+.-]*://[^/?#\s:@]*:)[^/?#\s@]+(?=@)", re.IGNORECASE)
_OF_THE_USER = frozenset({"HOME", "USER", "LOGNAME", "SHELL"})
_PASSED_ON = frozenset({"PATH", "LANG", "TZ"})
_BY_NSSUP = (*OWN_VARIABLES, "NOTIFY_SOCKET", "WATCHDOG_*", "LISTEN_*", "CREDENTIALS_DIRECTORY")


class Setting(NamedTuple):
    """key: dotted, as in the config. value: plain. text: as the config would have it. origin: `file:line`, `default`
    or who said it."""

    key: str
    value: Any
    text: str
    origin: str


class Variable(NamedTuple):
    """One variable of a worker's environment. value: MASK when it is a secret by its name."""

    name: str
    value: str
    origin: str


def masked(name: str, value: str) -> str:
    """value, without what its name or its form (a password in a URL) says is a secret."""
    return MASK if _SECRET.search(name) and value else _PASSWORD_IN_URL.sub(rf"\1{MASK}", value)


# --- settings --------------------------------------------------------------------------------------------------------


def settings(spec: PoolSpec, origins: Origins, configured_workers: int | None = None) -> list[Setting]:
    """configured_workers: how many the config says, where `scale` said something else since."""
    found = []
    for path, value in _leaves(msgspec.to_builtins(spec)):
        where = origins.get(("pool", spec.name, *path), DEFAULT)
        if path == ("workers",) and configured_workers not in (None, value):
            where = f"scale (the config says {configured_workers}: {where})"
        if path[0] == "env":
            value = masked(str(path[1]), value)
        if path == ("sockets",):
            value = [each.name for each in spec.sockets]
        found.append(Setting(dotted(path), value, literal(path, value), where))
    return found + [setting for each in spec.sockets for setting in _socket_settings(each, origins)]


def _socket_settings(spec: SocketSpec, origins: Origins) -> Iterator[Setting]:
    for name, value in msgspec.to_builtins(spec).items():
        if name in keys.SOCKET and value is not None:
            path = ("socket", spec.name, name)
            yield Setting(dotted(path), value, literal((name,), value), origins.get(path, DEFAULT))


def _leaves(table: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The keys of the config that hold a value."""
    for name, value in table.items():
        here = ("limits", "rlimits") if not path and name == "rlimits" else (*path, name)
        key = keys.POOL.get(str(here[0]))
        if key is None or key.kind is None or value is None:  # no setting of this version, or not set
            continue
        if isinstance(value, dict):
            yield from _leaves(value, here)
        else:
            yield here, value


def _kinds(table: dict[str, Key], path: Path = ()) -> Iterator[tuple[Path, str]]:
    for name, key in table.items():
        if key.kind is not None:
            yield (*path, name), key.kind.name
            yield from _kinds(key.kind.keys or {}, (*path, name))


_KIND = dict(_kinds(keys.POOL))
_DURATIONS = {path[-1] for path, kind in _KIND.items() if kind.startswith("duration")} | {"wait"}


def literal(path: Path, value: object) -> str:
    """value as TOML, in the units that the config takes for that key."""
    kind = _KIND.get(path, "")
    if kind.startswith(("duration", "size")) and isinstance(value, list | tuple):  # rlimits: soft and hard
        soft, hard = (_limit(kind, each) for each in value)
        return soft if soft == hard else f"{{ soft = {soft}, hard = {hard} }}"
    if path[:2] == ("limits", "rlimits") and isinstance(value, list | tuple):
        soft, hard = ('"unlimited"' if each is None else str(each) for each in value)
        return soft if soft == hard else f"{{ soft = {soft}, hard = {hard} }}"
    if path in (("umask",), ("mode",)):
        return f'"{value:03o}"' if path == ("umask",) else f'"{value:04o}"'
    if isinstance(value, int | float) and not isinstance(value, bool) and path[-1] in _DURATIONS:
        return f'"{seconds(value)}"'
    return _toml(path, value)


def _limit(kind: str, value: int | None) -> str:
    if value is None:
        return '"unlimited"'
    return f'"{seconds(value)}"' if kind.startswith("duration") else f'"{value}B"'


def _toml(path: Path, value: object) -> str:
    if isinstance(value, dict):
        if path[-1] == "stop" and value.get("signal") is None and value.get("command") is None:
            return '"kill"'
        inner = [f"{name} = {literal((*path, name), each)}" for name, each in value.items() if each is not None]
        return "{ " + ", ".join(inner) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(path, each) for each in value) + "]"
    if path[-1] == "signal" and isinstance(value, int):
        return f'"{_signal_name(value)}"'
    return msgspec.json.encode(value).decode()


def _signal_name(number: int) -> str:
    import signal

    return next((s.name.removeprefix("SIG") for s in signal.Signals if s == number), str(number))


def seconds(value: float) -> str:
    """`10s`, `1h30m`, `250ms`: as units.duration reads it."""
    if value == 0:
        return "0s"
    text, left = "", round(value * 1e6)
    for unit, size in SECONDS.items():
        count, left = divmod(left, round(size * 1e6))
        if count:
            text += f"{count}{unit}"
    return text or "0s"


# --- the environment -------------------------------------------------------------------------------------------------


def variables(spec: PoolSpec, env: Iterable[str], origins: Origins) -> list[Variable]:
    """env: `NAME=value`, what a life of the pool gets; sorted by name."""
    pairs = sorted(text.partition("=")[::2] for text in env)
    return [Variable(name, masked(name, value), variable_origin(spec, name, origins)) for name, value in pairs]


def variable_origin(spec: PoolSpec, name: str, origins: Origins) -> str:
    """`file:line` of the env or env_file line, or who else gave it."""
    if name in OWN_VARIABLES:
        return "nssup"
    if name in spec.env:
        return origins.get(("pool", spec.name, "env", name), "env")
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in spec.env_inherit):
        where = origins.get(("pool", spec.name, "env_inherit"))
        return f"inherited ({where})" if where else "inherited"
    if name in _OF_THE_USER:
        return "user"
    if name in _PASSED_ON:
        return "supervisor"
    return "nssup" if any(fnmatch.fnmatchcase(name, pattern) for pattern in _BY_NSSUP) else "supervisor"


# --- as text ---------------------------------------------------------------------------------------------------------


def show(name: str, found: list[Setting]) -> str:
    """TOML that says what holds, each line with its origin as a comment."""
    lines = [(f"{setting.key} = {setting.text}", setting.origin) for setting in found]
    width = min(max((len(text) for text, _ in lines), default=0), 60)
    return "".join([f"[pool.{name}]\n", *(f"{text:<{width}}  # {origin}\n" for text, origin in lines)])


def show_env(worker_id: str, found: list[Variable]) -> str:
    lines = [(f"{each.name}={each.value}", each.origin) for each in found]
    width = min(max((len(text) for text, _ in lines), default=0), 60)
    return "".join([f"# {worker_id}\n", *(f"{text:<{width}}  # {origin}\n" for text, origin in lines)])
