"""Which listening sockets a pool's workers are to have, and what they are told of them. Pure.

A socket whose `listen` holds a field, or that has `reuse_port`, is made once for each worker; else all workers of all
pools that name it share it. Source: sd_listen_fds(3).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nssup import address
from nssup.address import Address
from nssup.errors import Problem, SpecError
from nssup.record import main_ns_pid
from nssup.spec import POOL_NAME, PoolSpec, SocketSpec, expand, unknown_fields
from nssup.wire import SOCKETS_MAX

FIRST_FD = 3
_ASKED = 65536  # workers that are looked at when addresses are compared: more cannot have ports of their own


class Key(NamedTuple):
    """What makes a socket the same one. listen: as it is written. worker: whose alone it is, "" if it is shared."""

    name: str
    listen: str
    worker: str


class Wanted(NamedTuple):
    key: Key
    spec: SocketSpec
    address: Address


class Spare(NamedTuple):
    """A descriptor that may be one that is wanted, ours. name: of the socket. worker: whose alone it is. listen: as it
    was written, None where only its own address can tell; any_address: that does not matter. made: its file is ours to
    remove."""

    fd: int
    name: str
    worker: str = ""
    listen: str | None = None
    any_address: bool = False
    made: bool = True

    def may_be(self, wanted: Wanted) -> bool:
        key = wanted.key
        if self.name != key.name or not (self.any_address or self.worker == key.worker):
            return False
        return self.any_address or self.listen in (None, key.listen)


def is_per_worker(spec: SocketSpec) -> bool:
    return spec.reuse_port or any(expand(text, "", 0, 0) != text for text in spec.listen)


def of_worker(pool: PoolSpec, index: int) -> list[Wanted]:
    """In the order in which the program gets them. Raises ValueError for an address that is none."""
    return [_wanted(pool, spec, text, index) for spec in pool.sockets for text in spec.listen]


def of_workers(pool: PoolSpec, indexes: Iterable[int]) -> dict[Key, Wanted]:
    """All that these workers want, each once. Raises ValueError for an address that is none."""
    found: dict[Key, Wanted] = {}
    if not pool.sockets:
        return found
    for index in indexes:
        found |= {wanted.key: wanted for wanted in of_worker(pool, index)}
        if not any(map(is_per_worker, pool.sockets)):
            break
    return found


def _wanted(pool: PoolSpec, spec: SocketSpec, text: str, index: int) -> Wanted:
    worker = f"{pool.name}/{index}" if is_per_worker(spec) else ""
    return Wanted(Key(spec.name, text, worker), spec, address.parse(expand(text, pool.name, index, 0)))


def environment(pool: PoolSpec) -> dict[str, str]:
    """What a worker's program is told of its sockets; nothing when it has none."""
    names = [spec.name for spec in pool.sockets for _ in spec.listen]
    if not names:
        return {}
    return {
        "LISTEN_FDS": str(len(names)),
        "LISTEN_FDNAMES": ":".join(names),
        "LISTEN_PID": str(main_ns_pid(pool.init)),
    }


def count(pool: PoolSpec) -> int:
    """How many descriptors a worker gets."""
    return sum(len(spec.listen) for spec in pool.sockets)


# --- what is wrong ---------------------------------------------------------------------------------------------------


def problems(spec: SocketSpec) -> list[tuple[str, str]]:
    """(key, why) for every rule that a socket breaks by itself."""
    found = []
    if not POOL_NAME.fullmatch(spec.name):
        found.append(("name", f"{spec.name!r} is no name of a socket: use [a-z0-9][a-z0-9_-]{{0,47}}"))
    if not spec.listen:
        found.append(("listen", 'is empty: name an address, such as "tcp://127.0.0.1:8080"'))
    found_at: list[Address] = []
    for number, text in enumerate(spec.listen):
        key = f"listen.{number}"
        if why := _field_problem(text):
            found.append((key, why))
            continue
        try:
            found_at.append(address.parse(expand(text, "pool", 0, 0)))
        except ValueError as error:
            found.append((key, str(error)))
    if len(set(spec.listen)) < len(spec.listen):
        found.append(("listen", "has the same address twice: leave one out"))
    if spec.reuse_port and any(at.kind != "unix" and at.port == 0 for at in found_at):
        found.append(("reuse_port", "needs a port that is the same for all: give one instead of 0"))
    return found + _kind_problems(spec, {at.kind for at in found_at})


def _field_problem(text: str) -> str:
    if words := unknown_fields(text):
        return f"unknown field {{{words[0]}}}: for a literal brace write {{{{{words[0]}}}}}"
    if expand(text, "", 0, 0) != expand(text, "", 0, 1):
        return "cannot hold {generation}: a socket outlives the lives of a worker"
    return ""


def _kind_problems(spec: SocketSpec, kinds: set[str]) -> list[tuple[str, str]]:
    found = []
    if not 1 <= spec.backlog < 1 << 31:
        found.append(("backlog", f"must be from 1 to {(1 << 31) - 1}"))
    if not 0 <= spec.mode <= 0o777:
        found.append(("mode", "must be from 0 to 0o777"))
    if spec.reuse_port and "unix" in kinds:
        found.append(("reuse_port", "is for tcp and udp only: leave it out, or put {index} into the path"))
    if kinds and "unix" not in kinds:
        given = [("mode", spec.mode != SocketSpec(name="", listen=()).mode), ("user", spec.user), ("group", spec.group)]
        found += [(key, "is for unix sockets only: leave it out") for key, is_given in given if is_given]
    return found


def pool_problems(pool: PoolSpec) -> list[tuple[str, str]]:
    """(key, why) for every rule that a pool breaks with its sockets, each of which is right by itself."""
    found = []
    names = [spec.name for spec in pool.sockets]
    for number, name in enumerate(names):
        if name in names[:number]:
            found.append((f"sockets.{number}", f"{name} is there already: leave one out"))
    if count(pool) > SOCKETS_MAX:
        found.append(("sockets", f"would be {count(pool)} descriptors: {SOCKETS_MAX} are possible"))
    for key, probe in (("startup", pool.startup), ("ready", pool.ready)):
        if probe is not None and probe.notify == "fd" and probe.fd < FIRST_FD + count(pool):
            found.append((f"{key}.fd", f"{probe.fd} is a socket's: give fd = {FIRST_FD + count(pool)}"))
    for number, spec in enumerate(pool.sockets):
        if why := _last_problem(pool, spec):
            found.append((f"sockets.{number}", why))
    return found


def _last_problem(pool: PoolSpec, spec: SocketSpec) -> str:
    """What is wrong for the last worker, though not for the first."""
    last = max(pool.workers - 1, 0)
    for text in spec.listen:
        try:
            here = _wanted(pool, spec, text, last)
            before = _wanted(pool, spec, text, last - 1) if last else None
        except ValueError as error:
            return f"socket {spec.name} of worker {pool.name}/{last} {error}"
        if before and here.key != before.key and here.address == before.address and not _may_share(here, before):
            return f"all workers would have {here.address} for themselves: put {{index}} into the address"
    return ""


def _may_share(one: Wanted, other: Wanted) -> bool:
    """Whether two sockets can have the same address."""
    chosen_by_kernel = one.address.port == 0 and one.address.kind != "unix"
    return chosen_by_kernel or (one.spec.reuse_port and other.spec.reuse_port)


def validate(pool: PoolSpec) -> None:
    """Raises SpecError with every rule that the pool breaks with its sockets."""
    alone = [
        (f"sockets.{number}.{key}", why) for number, spec in enumerate(pool.sockets) for key, why in problems(spec)
    ]
    if found := alone or pool_problems(pool):
        raise SpecError(*(Problem("", 0, 0, f"pool.{pool.name}.{key}", why) for key, why in found))


class Clash(NamedTuple):
    """Two sockets of one address. pool: who wants it, having `number` in its list."""

    pool: str
    number: int
    why: str


def clashes(pools: Iterable[PoolSpec]) -> Iterator[Clash]:
    """Addresses that two sockets would have; of each socket in a pool the first only."""
    taken: dict[Address, tuple[Wanted, str]] = {}
    for pool in pools:
        blamed: set[str] = set()
        for wanted in of_workers(pool, range(min(pool.workers, _ASKED))).values():
            there, whose = taken.setdefault(wanted.address, (wanted, pool.name))
            if there.key == wanted.key or _may_share(wanted, there) or wanted.spec.name in blamed:
                continue
            blamed.add(wanted.spec.name)
            number = [spec.name for spec in pool.sockets].index(wanted.spec.name)
            other = f"socket {there.spec.name} of {there.key.worker or whose}"
            yield Clash(pool.name, number, f"{wanted.address} is the address of {other} too: give it another")
