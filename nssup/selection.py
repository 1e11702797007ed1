"""Which workers and pools the words of an operator mean (interface.md, SEL). Pure.

web       every worker of the pool        web/3  web@3  web:3   one worker
web/*  w* globs, over pools and workers   host:5151             the worker whose tree holds this host PID
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import msgspec

from nssup.errors import ControlError, ExitCode

_HOST = re.compile(r"host:(\d+)")
_WORKER = re.compile(r"([^/@:]+)[/@:]([^/@:]+)")
_GLOB = re.compile(r"[*?\[]")


class Selected(msgspec.Struct, frozen=True):
    """Pool names and worker ids, in the order of the supervisor's own list. A pool is in it when it, or a worker of it,
    was meant. whole: the pools that were meant as such, with workers that they have no more or not yet."""

    pools: tuple[str, ...]
    workers: tuple[str, ...]
    whole: frozenset[str] = frozenset()


class Meant:
    """The ids of the workers that were meant, also of such as are no more or not yet."""

    def __init__(self, selected: Selected) -> None:
        self._workers = frozenset(selected.workers)
        self._whole = selected.whole

    def __contains__(self, worker_id: object) -> bool:
        return worker_id in self._workers or (isinstance(worker_id, str) and pool_of(worker_id) in self._whole)


Owner = Callable[[int], str | None]
Members = Mapping[str, Sequence[str]]  # pool -> the ids of its workers, both in order


def select(selectors: Iterable[str], members: Members, owner: Owner) -> Selected:
    """What the selectors mean together; each worker once. None at all: everything.

    owner: worker id of a host PID, or None. Raises ControlError (exit 4) for the first that means nothing.
    """
    selectors = list(selectors)
    if not selectors:
        return Selected(tuple(members), tuple(worker for ids in members.values() for worker in ids), frozenset(members))
    pools: set[str] = set()
    workers: set[str] = set()
    for text in selectors:
        found_pools, found_workers = _one(text, members, owner)
        pools.update(found_pools)
        workers.update(found_workers)
        workers.update(worker for name in found_pools for worker in members[name])
    ordered = tuple(worker for ids in members.values() for worker in ids if worker in workers)
    whole = frozenset(pools)
    pools.update(pool_of(worker) for worker in workers)
    return Selected(tuple(name for name in members if name in pools), ordered, whole)


def select_pools(selectors: Iterable[str], members: Members) -> tuple[str, ...]:
    """The pools that the selectors name. Raises ControlError: exit 4 for an unknown one, 2 for a worker."""
    named: set[str] = set()
    for text in selectors:
        if text in members:
            named.add(text)
            continue
        globbed = [name for name in members if _matches(text, name)]
        if not globbed:
            raise _no_pool(text, members)
        named.update(globbed)
    return tuple(name for name in members if name in named)


def pool_of(worker_id: str) -> str:
    return worker_id.partition("/")[0]


def _one(text: str, members: Members, owner: Owner) -> tuple[list[str], list[str]]:
    """(pools, workers) that one selector means."""
    if text in members:
        return [text], []
    if host := _HOST.fullmatch(text):
        return [], [_owned(int(host[1]), owner)]
    name = canonical(text)
    if name in members.get(pool_of(name), ()):
        return [], [name]
    pools = [pool for pool in members if _matches(name, pool)]
    if name.endswith("/*"):
        pools += [pool for pool, ids in members.items() if ids and (name[:-2] == pool or _matches(name[:-2], pool))]
    workers = [worker for ids in members.values() for worker in ids if _matches(name, worker)]
    if not pools and not workers:
        raise _unknown(text, members)
    return pools, workers


def canonical(text: str) -> str:
    """`web/3` for `web@3` and `web:3`, `web/3` for `web/03`; anything else as it is."""
    parts = _WORKER.fullmatch(text)
    if parts is None:
        return text
    index = parts[2]
    return f"{parts[1]}/{int(index) if index.isascii() and index.isdigit() else index}"


def _matches(pattern: str, name: str) -> bool:
    """Whether pattern is a glob that means name. `*` stops at the slash, so that `w*` are pools and `w*/0` workers."""
    if not _GLOB.search(pattern):
        return False
    wanted, has = pattern.split("/"), name.split("/")
    return len(wanted) == len(has) and all(map(fnmatchcase, has, wanted))


def _owned(host_pid: int, owner: Owner) -> str:
    worker = owner(host_pid)
    if worker is None:
        raise ControlError(
            "no-such-process",
            f"host PID {host_pid} belongs to no worker",
            http_status=404,
            exit_code=ExitCode.NO_SUCH,
        )
    return worker


def _unknown(text: str, members: Members) -> ControlError:
    known = [*members, *(worker for ids in members.values() for worker in ids)]
    what = "matches no pool or worker" if _GLOB.search(text) else "is no pool or worker"
    return _no_such("no-such-worker", f"{text!r} {what}", _hint(canonical(text), known, members))


def _no_pool(text: str, members: Members) -> ControlError:
    pool = pool_of(canonical(text))
    if pool in members:
        return ControlError("usage", f"{text!r} is a worker: name its pool, {pool}", exit_code=ExitCode.USAGE)
    return _no_such("no-such-pool", f"{text!r} is no pool", _hint(text, list(members), members))


def _no_such(code: str, message: str, hint: str) -> ControlError:
    return ControlError(code, message, hint=hint, http_status=404, exit_code=ExitCode.NO_SUCH)


def _hint(text: str, known: Sequence[str], members: Members) -> str:
    pool = pool_of(text)
    if pool in members and text != pool:
        ids = members[pool]
        return f"{pool} has {ids[0]} to {ids[-1]}" if ids else f"{pool} has no workers"
    near = difflib.get_close_matches(text, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"there are: {', '.join(list(members)[:8])}" if members else "there are no pools"
