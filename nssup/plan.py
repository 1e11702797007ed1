"""From a pool's spec to the launch plan of one life. Pure: accounts and environment of the host come in as values.

What does not change from life to life is worked out once, in `prepare`; `Prepared.plan` fills in the fields.
"""

import fnmatch
import functools
from collections.abc import Mapping
from typing import NamedTuple

from nssup import sockets
from nssup.record import DEFAULT_PATH, UNLIMITED, Identity, Notify, Plan, candidates
from nssup.spec import PoolSpec, User, expand

RLIMITS = {
    "cpu": 0,
    "fsize": 1,
    "data": 2,
    "stack": 3,
    "core": 4,
    "rss": 5,
    "nproc": 6,
    "nofile": 7,
    "memlock": 8,
    "as": 9,
    "locks": 10,
    "sigpending": 11,
    "msgqueue": 12,
    "nice": 13,
    "rtprio": 14,
}
_BASE = {"PATH": DEFAULT_PATH, "LANG": "C.UTF-8"}
_PASSED_ON = ("PATH", "LANG", "TZ")
# What the supervisor's own manager told it, and is a lie to anybody else.
_NOT_PASSED_ON = ("NOTIFY_SOCKET", "WATCHDOG_*", "LISTEN_*")
OWN_VARIABLES = ("NSSUP_POOL", "NSSUP_INDEX", "NSSUP_ID", "NSSUP_GENERATION")  # whatever the pool says of them


class Account(NamedTuple):
    """Who a worker runs as. identity None: as the supervisor itself, nothing to change. user: for HOME, USER, ..."""

    identity: Identity | None
    user: User | None


def environment(spec: PoolSpec, user: User | None, inherited: Mapping[str, str]) -> dict[str, str]:
    """A worker's variables before fields are filled in: pools start clean (interface.md, env)."""
    env = dict(_BASE)
    env |= {name: inherited[name] for name in _PASSED_ON if name in inherited}
    if user is not None:
        env |= {"HOME": user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": user.shell}
    for pattern in spec.env_inherit:
        env |= {name: inherited[name] for name in sorted(inherited) if _matches(name, pattern)}
    return env | spec.env


def _matches(name: str, pattern: str) -> bool:
    hidden = any(fnmatch.fnmatchcase(name, own) for own in _NOT_PASSED_ON)
    return fnmatch.fnmatchcase(name, pattern) and not hidden


def namespaces_for(spec: PoolSpec, privileged: bool) -> frozenset[str]:
    """The namespaces to clone. Without the right to make them, a user namespace of one's own gives it."""
    return frozenset(spec.namespaces) if privileged else frozenset(spec.namespaces) | {"user"}


def prepare(
    spec: PoolSpec,
    account: Account,
    inherited: Mapping[str, str],
    privileged: bool,
    notify: Notify | None = None,
    descriptors: tuple[int, int] | None = None,
) -> "Prepared":
    """What all lives of the pool share. inherited: the supervisor's environment. privileged: it has CAP_SYS_ADMIN.

    notify: how its programs say that they are ready; NOTIFY_SOCKET is in their environment where that is a socket.
    descriptors: soft and hard limit on them where the pool says nothing; None: as they are.
    """
    env = environment(spec, account.user, inherited)
    if notify is not None and notify.socket is not None:
        env["NOTIFY_SOCKET"] = notify.socket.decode("utf-8", "surrogateescape")
    if spec.watchdog is not None:
        env["WATCHDOG_USEC"] = str(round(spec.watchdog * 1e6))
    listen = sockets.environment(spec)
    env |= listen
    varying = {name: value for name, value in spec.env.items() if "{" in value and name not in listen}
    fixed = tuple(_bytes(f"{name}={value}") for name, value in env.items() if name not in {*varying, *OWN_VARIABLES})
    said = {"nofile": descriptors} if descriptors is not None else {}
    limits = tuple(
        (RLIMITS[name], UNLIMITED if soft is None else soft, UNLIMITED if hard is None else hard)
        for name, (soft, hard) in (said | spec.rlimits).items()
    )
    namespaces = namespaces_for(spec, privileged)
    return Prepared(spec, fixed, varying, env["PATH"], namespaces, account.identity, limits, notify)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # os.fsencode, for the encoding that Linux programs expect


@functools.lru_cache(maxsize=64)
def _candidates(program: str, path: str) -> tuple[bytes, ...]:
    return tuple(map(_bytes, candidates(program, path)))


class Prepared(NamedTuple):
    """env: `NAME=value`, the same for all lives. varying: texts of its other variables. path: PATH, its text."""

    spec: PoolSpec
    env: tuple[bytes, ...]
    varying: dict[str, str]
    path: str
    namespaces: frozenset[str]
    identity: Identity | None
    rlimits: tuple[tuple[int, int, int], ...]
    notify: Notify | None = None

    def command(
        self, words: tuple[str, ...], index: int, generation: int
    ) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """A command to be run beside the program: its words with their fields filled in, and the paths to try."""
        name = self.spec.name
        argv = [expand(word, name, index, generation) for word in words]
        path = self.varying.get("PATH")
        found = _candidates(argv[0], self.path if path is None else expand(path, name, index, generation))
        return tuple(map(_bytes, argv)), found

    def plan(self, index: int, generation: int) -> Plan:
        """The launch of life `generation` of worker `index`."""
        spec = self.spec

        def fill(text: str) -> str:
            return expand(text, spec.name, index, generation)

        own = (spec.name, index, f"{spec.name}/{index}", generation)
        varying = {name: fill(value) for name, value in self.varying.items()}
        said = [f"{name}={value}" for name, value in varying.items() if name not in OWN_VARIABLES]
        said += [f"{name}={value}" for name, value in zip(OWN_VARIABLES, own, strict=True)]
        argv = [fill(word) for word in spec.command]
        return Plan(
            generation=generation,
            argv=tuple(map(_bytes, argv)),
            env=(*self.env, *map(_bytes, said)),
            candidates=_candidates(argv[0], varying.get("PATH", self.path)),
            namespaces=self.namespaces,
            directory=_bytes(fill(spec.directory)),
            hostname=None if spec.hostname is None else _bytes(fill(spec.hostname)),
            proc=spec.proc,
            init=spec.init,
            # Without init nobody would keep its output and its end for the next supervisor.
            die=spec.on_supervisor_death == "die" or not spec.init,
            identity=self.identity,
            umask=spec.umask,
            rlimits=self.rlimits,
            notify=self.notify,
            sockets=sockets.count(spec),
        )
