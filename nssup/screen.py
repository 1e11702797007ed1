"""What `nssup ctl top` shows: one frame of a table of workers, sorted, cut to the size of a terminal. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nssup import render
from nssup.render import StatusDocument, WorkerDocument

COLUMNS = ("NAME", "STATE", "READY", "HOST-PID", "NS-PID", "UPTIME", "RESTARTS", "CPU%", "CPU", "MEM", "LAST-EXIT")
_NUMBERS = frozenset(COLUMNS[3:10])
HELP = "q quit  c cpu  m mem  n name  s state  r restarts  u uptime  R reverse  up/down scroll"


class View(NamedTuple):
    """How the one who looks wants it. scroll: rows that are above the first shown."""

    order: str = "c"
    reverse: bool = False
    scroll: int = 0


class Sample(NamedTuple):
    """One look. at: seconds of any steady clock."""

    document: StatusDocument
    at: float


Key = Callable[[WorkerDocument, float], Any]
# key -> (what it is called, what it sorts by)
ORDERS: Mapping[str, tuple[str, Key]] = {
    "c": ("cpu", lambda w, percent: (-percent, -(w["cpu_seconds"] or 0.0))),
    "m": ("memory", lambda w, percent: -(w["memory_bytes"] or 0)),
    "n": ("name", lambda w, percent: ()),
    "s": ("state", lambda w, percent: render.PRECEDENCE.index(w["state"])),
    "r": ("restarts", lambda w, percent: -w["restarts"]),
    "u": ("uptime", lambda w, percent: -(w["uptime_seconds"] or 0.0)),
}


def pressed(view: View, key: str, page: int) -> View | None:
    """The view after a key (`up`, `down`, `pgup`, `pgdn` or a character); None: it is left."""
    moves = {"up": -1, "k": -1, "down": 1, "j": 1, "pgup": -page, "pgdn": page}
    if key in ("q", "\x03", "\x1b"):
        return None
    if key in ORDERS:
        return view._replace(order=key, scroll=0)
    if key == "R":
        return view._replace(reverse=not view.reverse, scroll=0)
    return view._replace(scroll=max(0, view.scroll + moves.get(key, 0)))


def percents(sample: Sample, before: Sample | None) -> dict[str, float]:
    """Share of one CPU that each worker's main program had since the sample before; of its whole life without one."""
    lives = {_life(w): w["cpu_seconds"] for w in before.document["workers"]} if before else {}
    found = {}
    for w in sample.document["workers"]:
        used, known = w["cpu_seconds"], lives.get(_life(w))
        if used is not None and before is not None and known is not None and sample.at > before.at:
            found[w["id"]] = max(0.0, 100 * (used - known) / (sample.at - before.at))
        elif used is not None and w["uptime_seconds"]:
            found[w["id"]] = 100 * used / w["uptime_seconds"]
    return found


def _life(w: WorkerDocument) -> tuple[str, int]:
    return w["id"], w["generation"]


def frame(
    sample: Sample, before: Sample | None, view: View, *, height: int, width: int, clock: str = "", color: bool = False
) -> list[str]:
    """At most height lines of at most width columns (not counting colours)."""
    shares = percents(sample, before)
    what, key = ORDERS[view.order]
    workers = sorted(sample.document["workers"], key=lambda w: (w["pool"], w["index"]))
    workers.sort(key=lambda w: key(w, shares.get(w["id"], 0.0)), reverse=view.reverse)
    room = max(height - 4, 0)
    first = min(view.scroll, max(len(workers) - room, 0))
    rows = [_row(w, shares.get(w["id"])) for w in workers[first : first + room]]
    paints = [render.HEAD, *(render.COLORS.get(w["state"], "") for w in workers[first : first + room])]
    lines = render.aligned([list(COLUMNS), *rows], paints if color else None, width, _NUMBERS).splitlines()
    below = len(workers) - first - len(rows)
    more = f"  ({first} above, {below} below)" if first or below else ""
    foot = f"by {what}{', reversed' if view.reverse else ''}{more}  {HELP}"
    return [*(_cut(line, width) for line in _head(sample.document, clock)), *lines, _cut(foot, width)][:height]


def _head(document: StatusDocument, clock: str) -> list[str]:
    supervisor, workers = document["supervisor"], document["workers"]
    counts: dict[str, int] = {}
    for w in workers:
        counts[w["state"]] = counts.get(w["state"], 0) + 1
    states = ", ".join(f"{counts[state]} {state}" for state in render.PRECEDENCE if state in counts)
    cpu = sum(w["cpu_seconds"] or 0.0 for w in workers)
    memory = sum(w["memory_bytes"] or 0 for w in workers)
    first = f"nssup {supervisor['version']}, host PID {supervisor['host_pid']}, epoch {supervisor['epoch']}  {clock}"
    return [
        first,
        f"{len(workers)} workers: {states or 'none'}; CPU {render.duration(cpu)}, memory {render.size(memory)}",
    ]


def _row(w: WorkerDocument, share: float | None) -> list[str]:
    row = render.worker_row(w)
    return [*row[:7], render.NONE if share is None else f"{share:.1f}", *row[7:]]


def _cut(line: str, width: int) -> str:
    return line[:width] if len(line) > width else line


def keys_of(data: str) -> Sequence[str]:
    """What was typed: single characters, and the few keys that are sequences."""
    named = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[5~": "pgup", "\x1b[6~": "pgdn", "\x1bOA": "up", "\x1bOB": "down"}
    found = []
    while data:
        sequence = next((each for each in named if data.startswith(each)), data[0])
        found.append(named.get(sequence, sequence))
        data = data[len(sequence) :]
    return found
