"""Numbers of a supervisor in the Prometheus text format 0.0.4. Pure: what is known in, text out.

Names end in their unit; what only grows within one supervisor's run ends in _total. A worker has a series of its own
only for what cannot be told by its pool.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from nssup import render

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = (*render.PRECEDENCE,)


class Counts(NamedTuple):
    """Since this supervisor began. events: by name. exits: by pool and reason."""

    events: Mapping[str, int]
    exits: Mapping[tuple[str, str], int]
    log_dropped_bytes: Mapping[str, int]


class Sample(NamedTuple):
    labels: tuple[tuple[str, str], ...]
    value: float


def text(document: render.StatusDocument, counts: Counts, started_at: float) -> str:
    """document: of all workers; cpu and memory may be missing. started_at: of the supervisor, wall clock seconds."""
    supervisor, workers = document["supervisor"], document["workers"]
    info = (("version", supervisor["version"]), ("epoch", str(supervisor["epoch"])))
    pools = [((("pool", pool["name"]),), pool) for pool in document["pools"]]
    by_state: dict[tuple[str, str], int] = {(pool["name"], state): 0 for pool in document["pools"] for state in STATES}
    for w in workers:
        by_state[w["pool"], w["state"]] = by_state.get((w["pool"], w["state"]), 0) + 1
    each = [((("pool", w["pool"]), ("worker", w["id"])), w) for w in workers]
    lines: list[str] = []

    def family(name: str, kind: str, meaning: str, samples: Iterable[Sample]) -> None:
        lines.extend(_family(name, kind, meaning, samples))

    family("info", "gauge", "The supervisor that answers.", [Sample(info, 1)])
    family("start_time_seconds", "gauge", "When it began, since 1970.", [Sample((), started_at)])
    family("pool_wanted_workers", "gauge", "Asked for.", [Sample(labels, pool["wanted"]) for labels, pool in pools])
    family("pool_ready_workers", "gauge", "Ready.", [Sample(labels, pool["ready"]) for labels, pool in pools])
    family(
        "pool_workers",
        "gauge",
        "In each state.",
        [Sample((("pool", pool), ("state", state)), n) for (pool, state), n in by_state.items()],
    )
    family("worker_up", "gauge", "1 while it runs.", [Sample(labels, w["state"] == "running") for labels, w in each])
    family(
        "worker_restarts_total",
        "counter",
        "Automatic restarts since an operator's start.",
        [Sample(labels, w["restarts"]) for labels, w in each],
    )
    family(
        "worker_cpu_seconds_total",
        "counter",
        "Of its main program.",
        [Sample(labels, w["cpu_seconds"]) for labels, w in each if w["cpu_seconds"] is not None],
    )
    family(
        "worker_resident_memory_bytes",
        "gauge",
        "Of its main program.",
        [Sample(labels, w["memory_bytes"]) for labels, w in each if w["memory_bytes"] is not None],
    )
    family(
        "exits_total",
        "counter",
        "Ends of lives, by reason.",
        [Sample((("pool", pool), ("reason", reason)), n) for (pool, reason), n in counts.exits.items()],
    )
    family(
        "log_dropped_bytes_total",
        "counter",
        "Output that no log file took.",
        [Sample((("pool", pool),), n) for pool, n in counts.log_dropped_bytes.items()],
    )
    family(
        "events_total",
        "counter",
        "Published, by name.",
        [Sample((("event", name),), n) for name, n in counts.events.items()],
    )
    return "".join(lines)


def _family(name: str, kind: str, meaning: str, samples: Iterable[Sample]) -> list[str]:
    lines = [f"# HELP nssup_{name} {meaning}\n", f"# TYPE nssup_{name} {kind}\n"]
    for labels, value in samples:
        said = ",".join([f'{label}="{_escaped(word)}"' for label, word in labels])
        lines.append(f"nssup_{name}{{{said}}} {_number(value)}\n" if said else f"nssup_{name} {_number(value)}\n")
    return lines


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
