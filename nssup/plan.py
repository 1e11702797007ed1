"""From a pool's spec to the launch plan of one life. Pure: accounts and environment of the host come in as values.

What does not change from life to life is worked out once, in `prepare`; `Prepared.plan` fills in the fields.
"""

import fnmatch
from collections.abc import Mapping
from typing import NamedTuple

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
        env |= {name: inherited[name] for name in sorted(inherited) if fnmatch.fnmatchcase(name, pattern)}
    return env | spec.env


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
    said = {"nofile": descriptors} if descriptors is not None else {}
    limits = tuple(
        (RLIMITS[name], UNLIMITED if soft is None else soft, UNLIMITED if hard is None else hard)
        for name, (soft, hard) in (said | spec.rlimits).items()
    )
    return Prepared(spec, env, namespaces_for(spec, privileged), account.identity, limits, notify)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # os.fsencode, for the encoding that Linux programs expect


class Prepared(NamedTuple):
    spec: PoolSpec
    env: dict[str, str]
    namespaces: frozenset[str]
    identity: Identity | None
    rlimits: tuple[tuple[int, int, int], ...]
    notify: Notify | None = None

    def plan(self, index: int, generation: int) -> Plan:
        """The launch of life `generation` of worker `index`."""
        spec = self.spec

        def fill(text: str) -> str:
            return expand(text, spec.name, index, generation)

        env = self.env | {name: fill(value) for name, value in spec.env.items()}  # the inherited may hold braces
        env["NSSUP_POOL"] = spec.name
        env["NSSUP_INDEX"] = str(index)
        env["NSSUP_ID"] = f"{spec.name}/{index}"
        env["NSSUP_GENERATION"] = str(generation)
        if self.notify is not None and self.notify.socket is not None:
            env["NOTIFY_SOCKET"] = self.notify.socket.decode("utf-8", "surrogateescape")
        argv = [fill(word) for word in spec.command]
        return Plan(
            generation=generation,
            argv=tuple(map(_bytes, argv)),
            env=tuple(_bytes(f"{name}={value}") for name, value in env.items()),
            candidates=tuple(map(_bytes, candidates(argv[0], env["PATH"]))),
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
        )
