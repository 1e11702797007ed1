"""What is so at this moment, as documents of the API (interface.md): workers, pools, exits, and events as they happen.

Reads a supervisor, changes nothing. A document is made of plain values, ready for msgspec.json.
"""

import hashlib
import signal
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from nssup import render
from nssup.events import Event, Exit, State
from nssup.lines import stamp
from nssup.machine import Worker
from nssup.spec import PoolSpec
from nssup.wire import Flag, Notified
from nssup.workers import WorkerSet

API = 1
_NOTHING_SAID = Notified()
STATS_ROWS = 64  # beyond that many workers, cpu and memory cost too much to be read unasked


class Stats(Protocol):
    """What a worker's tree has used."""

    @property
    def cpu_seconds(self) -> float | None: ...
    @property
    def memory_bytes(self) -> int | None: ...


class Dropped(Protocol):
    def dropped_bytes(self, log: str, worker_id: str | None = None) -> int:
        """Raises KeyError when there is no such log."""


class Listed(Protocol):
    """A socket that is held. worker: whose alone it is, "" if it is shared."""

    @property
    def name(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def worker(self) -> str: ...


class Held(Protocol):
    def listed(self, pool: str) -> Sequence[Listed]: ...


class Source(Protocol):
    """What of a supervisor is looked at. Times as in WorkerSet: `now` is CLOCK_BOOTTIME, and `wall` makes wall clock
    seconds of such a time; started_at is wall clock."""

    @property
    def workers(self) -> WorkerSet: ...
    @property
    def host_pid(self) -> int: ...
    @property
    def version(self) -> str: ...
    @property
    def started_at(self) -> float: ...
    @property
    def epoch(self) -> int: ...
    def now(self) -> float: ...
    def wall(self, at: float) -> float: ...
    def stats(self, worker_id: str) -> Stats | None: ...
    def is_adopted(self, worker_id: str) -> bool: ...
    def notified(self, worker_id: str) -> Notified: ...
    def probes(self, worker_id: str) -> dict[str, str]: ...
    def namespaces(self, worker_id: str) -> dict[str, int]: ...
    @property
    def logs(self) -> Dropped: ...
    @property
    def sockets(self) -> Held: ...


def signal_name(number: int) -> str:
    """`SIGSEGV` for 11; `SIG37` where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def _printable(text: bytes) -> str | None:
    """What steers a terminal is taken out; None for nothing."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text.decode(errors="replace")) or None


def _notified_document(notified: Notified) -> render.NotifiedDocument:
    return {
        "reloading": bool(notified.flags & Flag.RELOADING),
        "stopping": bool(notified.flags & Flag.STOPPING),
        "main_ns_pid": notified.main_ns_pid or None,
        "errno": notified.error or None,
    }


def exit_document(ended: Exit) -> render.ExitDocument:
    return {
        "code": ended.code,
        "signal": None if ended.signal is None else signal_name(ended.signal),
        "core": ended.core,
        "oom": ended.oom,
        "timed_out": ended.timed_out,
        "reason": ended.reason,
        "at": stamp(ended.at) if ended.at else None,
        "cpu_seconds": ended.cpu_seconds,
        "max_rss_bytes": ended.max_rss_bytes,
    }


def event_document(event: Event) -> dict[str, Any]:
    """As in nssup.jsonl and `ctl events`: what is None is left out."""
    said = {
        "ts": stamp(event.ts),
        "v": event.v,
        "epoch": event.epoch,
        "seq": event.seq,
        "event": event.event,
        "worker": event.worker,
        "pool": event.pool,
        "from": event.from_,
        "to": event.to,
        "reason": event.reason,
        "generation": event.generation,
        "host_pid": event.host_pid,
        "ns_pid": event.ns_pid,
        "exit": exit_document(event.exit) if event.exit else None,
        "detail": event.detail,
    }
    return {key: value for key, value in said.items() if value is not None}


def event_line(event: Event) -> bytes:
    return msgspec.json.encode(event_document(event)) + b"\n"


def spec_hash(spec: PoolSpec) -> str:
    """The same for specs that make the same lives: how many workers, and whether they are started, is no part of it."""
    same = replace(spec, workers=0, enabled=True)
    return hashlib.sha256(msgspec.json.encode(same, order="sorted")).hexdigest()[:16]


def members(workers: WorkerSet) -> dict[str, list[str]]:
    """pool -> ids of its workers, by index; those being removed as well."""
    return {name: [w.id for w in sorted(there, key=_index)] for name, there in by_pool(workers).items()}


def by_pool(workers: WorkerSet) -> dict[str, list[Worker]]:
    found: dict[str, list[Worker]] = {name: [] for name in workers.pools}
    for worker in workers.workers.values():
        found[worker.pool].append(worker)
    return found


def _index(worker: Worker) -> int:
    return worker.index


def _at(ended: Exit) -> float:
    return ended.at


class Snapshot:
    """Documents of one moment: the clock is read once, a spec is hashed once. Not kept beyond the request."""

    def __init__(self, source: Source, *, stats: bool, detailed: bool = True) -> None:
        """stats: with cpu and memory. detailed: with what no table shows and that takes time to find out."""
        self._source = source
        self._now = source.now()
        self._stats = stats
        self._detailed = detailed
        self._hashes: dict[str, str] = {}

    def status(self, pools: Iterable[str], workers: Collection[str]) -> render.StatusDocument:
        return {
            "api": API,
            "supervisor": self.supervisor(),
            "pools": self.pools(pools),
            "workers": [self.worker(worker_id) for worker_id in workers],
        }

    def supervisor(self) -> render.SupervisorDocument:
        source = self._source
        return {
            "host_pid": source.host_pid,
            "version": source.version,
            "started_at": stamp(source.started_at),
            "epoch": source.epoch,
        }

    def pools(self, names: Iterable[str]) -> list[render.PoolDocument]:
        """Each pool counted over all its workers; the ones on their way out do not count as running."""
        there: dict[str, list[Worker]] = {name: [] for name in names}
        for worker in self._source.workers.workers.values():
            if worker.pool in there:
                there[worker.pool].append(worker)
        return [self._pool(name, workers) for name, workers in there.items()]

    def _pool(self, name: str, workers: list[Worker]) -> render.PoolDocument:
        others = [w.state for w in workers if w.state is not State.RUNNING]
        running = len(workers) - len(others)
        return {
            "name": name,
            "wanted": self._source.workers.pools[name].workers,
            "running": running,
            "ready": sum([w.ready for w in workers]),
            "state": render.pool_state([*(["running"] if running else []), *(state.value for state in {*others})]),
            "rollout": None,
            "sockets": [
                {"name": each.name, "address": each.address, "worker": each.worker or None}
                for each in self._source.sockets.listed(name)
            ],
        }

    def fold(self, workers: list[Worker]) -> render.Fold:
        """Workers of one pool in one line, without a document of each. CPU and memory are not in it."""
        last = max((w.last_exit for w in workers if w.last_exit), key=_at, default=None)
        youngest = max([w.running_since for w in workers if w.running_since is not None], default=None)
        return render.Fold(
            None if youngest is None else max(self._now - youngest, 0.0),
            sum([w.restarts for w in workers]),
            None,
            None,
            render.ended(last.reason, core=last.core, timed_out=last.timed_out) if last else render.NONE,
        )

    def worker(self, worker_id: str) -> render.WorkerDocument:
        source = self._source
        w = source.workers.workers[worker_id]
        if w.state is State.LOST:  # whose the numbers are is not known: `orphans` tells them
            w = replace(w, host_pid=None, ns_pid=None, init_host_pid=None, running_since=None)
        spec = source.workers.pools[w.pool]
        stats = source.stats(worker_id) if self._stats and w.alive else None
        running_since = w.running_since
        detailed = self._detailed
        notified = source.notified(worker_id) if detailed else _NOTHING_SAID
        return {
            "id": worker_id,
            "pool": w.pool,
            "index": w.index,
            "state": w.state.value,
            "reason": w.reason,
            "ready": w.ready,
            "desired": "up" if w.want_up else "down",
            "enabled": spec.enabled,
            "paused": False,
            "draining": False,
            "adopted": source.is_adopted(worker_id),
            "host_pid": w.host_pid,
            "ns_pid": w.ns_pid,
            "init_host_pid": w.init_host_pid,
            "namespaces": source.namespaces(worker_id) if detailed and w.alive else {},
            "generation": w.generation,
            "restarts": w.restarts,
            "started_at": self._stamp(w.launched_at) if detailed and w.alive else None,
            "uptime_seconds": None if running_since is None else round(max(self._now - running_since, 0.0), 6),
            "next_at": self._stamp(w.deadline) if detailed and w.state is State.BACKOFF else None,
            "spec_hash": self._hash(spec) if detailed else "",
            "cpu_seconds": stats.cpu_seconds if stats else None,
            "memory_bytes": stats.memory_bytes if stats else None,
            "log_dropped_bytes": self._dropped(w) if detailed else 0,
            "status_text": _printable(notified.status),
            "notified": _notified_document(notified),
            "probes": source.probes(worker_id) if detailed else {},
            "last_exit": exit_document(w.last_exit) if w.last_exit else None,
        }

    def _stamp(self, at: float | None) -> str | None:
        return None if at is None else stamp(self._source.wall(at))

    def _dropped(self, w: Worker) -> int:
        try:
            return self._source.logs.dropped_bytes(w.pool, w.id)
        except KeyError:
            return 0

    def _hash(self, spec: PoolSpec) -> str:
        known = self._hashes.get(spec.name)
        if known is None:
            known = self._hashes[spec.name] = spec_hash(spec)
        return known
