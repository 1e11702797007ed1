"""What the supervisor knows, as people read it: the status table, the outcome of a command, an event. Pure.

Takes the documents of the API (interface.md) and gives text; the client of a hot verb only copies it out.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict

COLUMNS = ("NAME", "STATE", "READY", "HOST-PID", "NS-PID", "UPTIME", "RESTARTS", "CPU", "MEM", "LAST-EXIT")
_NUMBERS = frozenset({"HOST-PID", "NS-PID", "UPTIME", "RESTARTS", "CPU", "MEM"})  # to the right
NONE = "-"
# Of a pool whose workers are in several states, the first of these that one of them is in.
PRECEDENCE = ("running", "starting", "stopping", "backoff", "waiting", "lost", "failed", "stopped", "done")

_RESET = "\x1b[0m"
COLORS = {
    "running": "\x1b[32m",
    "done": "\x1b[32m",
    "starting": "\x1b[36m",
    "waiting": "\x1b[36m",
    "stopping": "\x1b[36m",
    "backoff": "\x1b[33m",
    "failed": "\x1b[31m",
    "lost": "\x1b[31m",
    "stopped": "\x1b[2m",
}
HEAD = "\x1b[1m"
_PARTLY = "\x1b[33m"


class ExitDocument(TypedDict):
    """How a life ended. signal: its name. at: RFC 3339."""

    code: int | None
    signal: str | None
    core: bool
    oom: bool
    timed_out: bool
    reason: str
    at: str | None
    cpu_seconds: float | None
    max_rss_bytes: int | None


class NotifiedDocument(TypedDict):
    """What a worker said of itself by sd_notify. reloading: RELOADING=1 and no READY=1 since. stopping: STOPPING=1.
    main_ns_pid: MAINPID= as it said, which nobody has looked at. errno: ERRNO=."""

    reloading: bool
    stopping: bool
    main_ns_pid: int | None
    errno: int | None


class WorkerDocument(TypedDict):
    """One worker in `status`. status_text: what it said of itself by sd_notify's STATUS=. probes: how the last try of
    each went: why it failed, "" when it did not."""

    id: str
    pool: str
    index: int
    state: str
    reason: str | None
    ready: bool
    desired: str
    enabled: bool
    paused: bool
    draining: bool
    adopted: bool
    host_pid: int | None
    ns_pid: int | None
    init_host_pid: int | None
    namespaces: dict[str, int]
    generation: int
    restarts: int
    started_at: str | None
    uptime_seconds: float | None
    next_at: str | None
    spec_hash: str
    cpu_seconds: float | None
    memory_bytes: int | None
    log_dropped_bytes: int
    status_text: str | None
    notified: NotifiedDocument
    probes: dict[str, str]
    last_exit: ExitDocument | None


class SocketDocument(TypedDict):
    """A socket that is held for a pool. address: as it is bound. worker: whose alone it is, None if it is shared."""

    name: str
    address: str
    worker: str | None


class PoolDocument(TypedDict):
    """One pool in `status`, counted over all its workers. wanted: how many the config or `scale` asked for."""

    name: str
    wanted: int
    running: int
    ready: int
    state: str
    rollout: None
    sockets: list[SocketDocument]


class SupervisorDocument(TypedDict):
    host_pid: int
    version: str
    started_at: str
    epoch: int


class StatusDocument(TypedDict):
    """What `GET /v1/status` answers."""

    api: int
    supervisor: SupervisorDocument
    pools: list[PoolDocument]
    workers: list[WorkerDocument]


class Result(TypedDict):
    """What became of one worker by a command. last_lines: of its output, on failure, a few workers' only."""

    id: str
    state: str
    reason: str | None
    ok: bool
    timed_out: bool
    generation: int
    host_pid: int | None
    ns_pid: int | None
    last_lines: list[str]


class Texts(NamedTuple):
    """For stdout and for stderr; each empty or ending in a newline."""

    out: str
    err: str


# --- quantities ----------------------------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """`0.12s` `12s` `3m12s` `4h02m` `3d04h`: the two largest units."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{max(seconds, 0.0):.2f}s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole // 60 % 60:02}m"
    return f"{whole // 86400}d{whole // 3600 % 24:02}h"


def size(count: int | None) -> str:
    """Bytes as `999B` `1.2M` `300M` `1.5G`: powers of 1024, three digits."""
    if count is None:
        return NONE
    if count < 1024:
        return f"{count}B"
    value = float(count)
    for unit in "KMGTP":
        value /= 1024
        if value < 1023.5 or unit == "P":
            break
    return f"{value:.1f}{unit}" if value < 99.95 else f"{value:.0f}{unit}"


def visible(text: str) -> str:
    """text with what a terminal would obey made visible: C0 but the tab, DEL and C1, as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c == "\t" or not (c < " " or "\x7f" <= c <= "\x9f") else f"\\x{ord(c):02x}" for c in text)


# --- the status table ----------------------------------------------------------------------------------------------


def exit_code(workers: Iterable[WorkerDocument], oneshots: frozenset[str] | set[str]) -> int:
    """What `status` exits with: 3 when one is not running (a oneshot that is done is as good), else 0."""
    fine = all(w["state"] == "running" or (w["state"] == "done" and w["pool"] in oneshots) for w in workers)
    return 0 if fine else 3


def pool_state(states: Iterable[str]) -> str:
    """The one word for a pool whose workers are in these states; `stopped` for one without workers."""
    there = set(states)
    return next((state for state in PRECEDENCE if state in there), "stopped")


class Fold(NamedTuple):
    """Many workers of a pool in one line: sums, the youngest uptime, the newest exit."""

    uptime_seconds: float | None
    restarts: int
    cpu_seconds: float | None
    memory_bytes: int | None
    last_exit: str


def table(
    document: StatusDocument,
    *,
    unfold: bool = False,
    color: bool = False,
    width: int | None = None,
    folds: Mapping[str, Fold] | None = None,
) -> str:
    """The status table. unfold: a line for each worker also of pools of many. width: longer lines are cut there.
    folds: pools whose one line is worked out already; their workers need not be in the document."""
    folds = folds or {}
    by_pool: dict[str, list[WorkerDocument]] = {pool["name"]: [] for pool in document["pools"]}
    for worker in document["workers"]:
        by_pool.setdefault(worker["pool"], []).append(worker)
    rows = [list(COLUMNS)]
    paints = [HEAD]
    for pool in document["pools"]:
        workers = by_pool[pool["name"]]
        if pool["name"] not in folds and workers and (unfold or (len(workers) == 1 and pool["wanted"] <= 1)):
            rows += [worker_row(worker) for worker in workers]
            paints += [COLORS.get(worker["state"], "") for worker in workers]
        else:
            rows.append(_pool_row(pool, folds.get(pool["name"]) or fold(workers)))
            partly = pool["state"] == "running" and pool["ready"] < pool["wanted"]
            paints.append(_PARTLY if partly else COLORS.get(pool["state"], ""))
    return aligned(rows, paints if color else None, width)


def worker_row(w: WorkerDocument) -> list[str]:
    alive = w["host_pid"] is not None
    return [
        w["id"],
        w["state"],
        ("yes" if w["ready"] else "no") if alive else NONE,
        NONE if w["host_pid"] is None else str(w["host_pid"]),
        NONE if w["ns_pid"] is None else str(w["ns_pid"]),
        duration(w["uptime_seconds"]),
        str(w["restarts"]),
        duration(w["cpu_seconds"]),
        size(w["memory_bytes"]),
        _last_exit(w),
    ]


def _last_exit(w: WorkerDocument) -> str:
    """How the last life ended; what it waits for, when that says more."""
    last = w["last_exit"]
    if last is None:
        return w["reason"] or NONE if w["state"] in ("waiting", "failed", "lost") else NONE
    return ended(last["reason"], core=last["core"], timed_out=last["timed_out"])


def ended(reason: str, *, core: bool, timed_out: bool) -> str:
    """How a life ended, in a cell."""
    return reason + (" (core)" if core else "") + (" (timed out)" if timed_out else "")


def fold(workers: Sequence[WorkerDocument]) -> Fold:
    uptimes = [w["uptime_seconds"] for w in workers if w["uptime_seconds"] is not None]
    cpu = [w["cpu_seconds"] for w in workers if w["cpu_seconds"] is not None]
    memory = [w["memory_bytes"] for w in workers if w["memory_bytes"] is not None]
    over = [w for w in workers if w["last_exit"] is not None]
    return Fold(
        min(uptimes, default=None),
        sum(w["restarts"] for w in workers),
        sum(cpu) if cpu else None,
        sum(memory) if memory else None,
        _last_exit(max(over, key=_ended_at)) if over else NONE,
    )


def _pool_row(pool: PoolDocument, of: Fold) -> list[str]:
    count = f"{pool['ready']}/{pool['wanted']}"
    used = [duration(of.cpu_seconds), size(of.memory_bytes)]
    row = [pool["name"], pool["state"], count, NONE, NONE, duration(of.uptime_seconds), str(of.restarts)]
    return [*row, *used, of.last_exit]


def _ended_at(w: WorkerDocument) -> str:
    last = w["last_exit"]
    return (last["at"] or "") if last else ""


def aligned(
    rows: list[list[str]], paints: list[str] | None, width: int | None, numbers: frozenset[str] = _NUMBERS
) -> str:
    """Aligned columns, two spaces between; the colour goes on the STATE cell, on the whole first line. The first row
    has the names; those of numbers are to the right."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [name in numbers for name in rows[0]]
    out = []
    for number, row in enumerate(rows):
        cells = [c.rjust(s) if r else c.ljust(s) for c, s, r in zip(row, sizes, right, strict=True)]
        line = "  ".join(cells).rstrip()
        line = _cut(line, width)
        if paints and paints[number]:
            start = 0 if number == 0 else sizes[0] + 2
            end = len(line) if number == 0 else start + len(row[1])
            line = line[:start] + paints[number] + line[start:end] + _RESET + line[end:]
        out.append(line)
    return "\n".join(out) + "\n"


# --- processes and what they use -------------------------------------------------------------------------------------


class ProcessLike(Protocol):
    @property
    def host_pid(self) -> int: ...
    @property
    def ns_pid(self) -> int: ...
    @property
    def parent_host_pid(self) -> int: ...
    @property
    def command(self) -> str: ...


class StatsDocument(TypedDict):
    """What a whole worker uses; cpu and memory are null when it is down."""

    id: str
    state: str
    processes: int
    threads: int
    cpu_seconds: float | None
    memory_bytes: int | None
    restarts: int
    log_dropped_bytes: int


def tree(worker_id: str, processes: Sequence[ProcessLike], *, width: int | None = None) -> str:
    """Host PID and namespace PID of each process, children under their parents."""
    if not processes:
        return f"{worker_id}: no processes\n"
    depth: dict[int, int] = {}
    lines = [worker_id]
    for each in processes:
        depth[each.host_pid] = depth.get(each.parent_host_pid, -1) + 1
        branch = "  " * depth[each.host_pid]
        lines.append(_cut(f"{each.host_pid:>9} {each.ns_pid:>7}  {branch}{visible(each.command)}", width))
    return "\n".join(lines) + "\n"


_STATS_COLUMNS = ("NAME", "STATE", "PROCS", "THREADS", "CPU", "MEM", "RESTARTS", "LOG-LOST")


def stats(found: Sequence[StatsDocument], *, color: bool = False, width: int | None = None) -> str:
    rows = [list(_STATS_COLUMNS)]
    for s in found:
        used = [duration(s["cpu_seconds"]), size(s["memory_bytes"])]
        counts = [str(s["processes"]), str(s["threads"])]
        rows.append([s["id"], s["state"], *counts, *used, str(s["restarts"]), size(s["log_dropped_bytes"])])
    paints = [HEAD, *(COLORS.get(s["state"], "") for s in found)]
    return aligned(rows, paints if color else None, width, frozenset(_STATS_COLUMNS[2:]))


def _cut(line: str, width: int | None) -> str:
    return line[: width - 1] + "…" if width is not None and len(line) > width > 0 else line


# --- the outcome of a command --------------------------------------------------------------------------------------

FOLD_BEYOND = 64  # results; more are counted by pool and state


def results(verb: str, found: Sequence[Result]) -> Texts:
    """What a changing verb says: who is how now; on stderr what went wrong, why, and what was printed last."""
    good = [r for r in found if r["ok"]]
    bad = [r for r in found if not r["ok"]]
    if verb == "kill":  # silent, as kill(1) is
        lines = []
    elif len(good) > FOLD_BEYOND:
        lines = _folded(good)
    else:
        lines = [f"{r['id']}: {r['state']}" for r in good]
    return Texts(_joined(lines), _joined(_complaint(verb, r) for r in bad))


def _folded(found: Sequence[Result]) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for r in found:
        key = (r["id"].partition("/")[0], r["state"])
        counts[key] = counts.get(key, 0) + 1
    return [f"{pool}: {count} {state}" for (pool, state), count in counts.items()]


def _complaint(verb: str, r: Result) -> str:
    if r["timed_out"]:
        what = f"still {r['state']} when the time was up"
    else:
        what = r["state"] + (f": {r['reason']}" if r["reason"] else "")
    return "\n".join([f"{r['id']}: {verb}: {what}", *(f"  | {visible(line)}" for line in r["last_lines"])])


def _joined(lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    return text + "\n" if text else ""


# --- streams -------------------------------------------------------------------------------------------------------

_HUES = ("\x1b[36m", "\x1b[33m", "\x1b[32m", "\x1b[35m", "\x1b[34m", "\x1b[31m")


def event(document: Mapping[str, Any]) -> str:
    """One event in a line: `TS event worker from -> to (reason)`; a snapshot as the number of its workers."""
    if document["event"] == "snapshot":
        workers = document["status"]["workers"]
        return f"{document['epoch']}:{document['seq']} snapshot of {len(workers)} workers"
    words = [document.get("ts", NONE), document["event"]]
    words += [str(document[key]) for key in ("worker", "pool") if key in document]
    if "to" in document:
        words.append(f"{document['from']} -> {document['to']}")
    words += [f"host PID {document['host_pid']}"] if "host_pid" in document else []
    words += [f"({document['reason']})"] if "reason" in document else []
    if not {"to", "reason"} & document.keys():
        words += [f"{key}={value}" for key, value in document.get("detail", {}).items()]
    return visible(" ".join(words))


def record(ts: str, worker: str | None, stream: str, text: str, *, color: bool) -> str:
    """One log record in a line: `TS worker stream | text`."""
    name = worker or NONE
    if color:
        name = f"{_HUES[sum(name.encode()) % len(_HUES)]}{name}{_RESET}"
    return f"{ts} {name} {stream} | {text}"
