"""What pools need of each other: who has to wait, who is told of a loss, and who is stopped before whom. Pure.

A pool requires others by `spec.Requirement`: `all workers wanted of db are ready`. That is asked each time a worker is
to be launched, by whomever; one whose pool lacks something is `waiting`, for as long as it takes and at no cost. A pool
without workers is never started, ready or done; one that is not there, or whose last worker is gone, is stopped.

A loss is that one of the workers wanted of db was so and is so no more: not that db is to have more workers than
before. Whoever is stopped has its dependents stopped before: see machine, `held`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from nssup.events import State
from nssup.machine import DEPENDENCY, Worker
from nssup.spec import PoolSpec, Requirement

When: TypeAlias = Literal["started", "ready", "done", "stopped"]
Requires: TypeAlias = Mapping[str, Mapping[str, Any]]  # pool -> the names of those it requires -> whatever

_RUNS = frozenset({State.STARTING, State.RUNNING})
_DOWN = frozenset({State.STOPPED, State.DONE, State.FAILED})


# --- one worker ----------------------------------------------------------------------------------------------------


def _started(w: Worker) -> bool:
    return w.state is State.DONE or (w.state in _RUNS and w.running_since is not None)


def _ready(w: Worker) -> bool:
    return w.state is State.DONE or w.ready


def _done(w: Worker) -> bool:
    return w.state is State.DONE


def _stopped(w: Worker) -> bool:
    return w.state in _DOWN


HOLDS: dict[str, Callable[[Worker], bool]] = {
    "started": _started,
    "ready": _ready,
    "done": _done,
    "stopped": _stopped,
}


def holds(when: When, w: Worker) -> bool:
    """Whether one worker is as required: its program runs; it is ready; it ended well; nothing of it is left. Who ended
    well counts as started and ready; who is on its way down does not. Where no readiness is asked, running is ready."""
    return HOLDS[when](w)


def may_be_lost(w: Worker, lost: Literal["restart", "stop"]) -> bool:
    """Whether a loss means anything to a worker of the pool that requires."""
    if w.state in _RUNS or w.state is State.BACKOFF:
        return True
    return lost == "stop" and w.state is State.STOPPING and w.want_up


# --- the graph -----------------------------------------------------------------------------------------------------


def circle(requires: Requires, start: str) -> list[str]:
    """A way from start back to it, both ends included; empty when there is none."""
    came_from: dict[str, str] = {}
    todo = [start]
    for name in todo:  # grows
        for needed in requires.get(name, ()):
            if needed == start:
                way = [start, name]
                while way[-1] != start:
                    way.append(came_from[way[-1]])
                return way[::-1]
            if needed not in came_from:
                came_from[needed] = name
                todo.append(needed)
    return []


def start_order(requires: Requires, names: Iterable[str]) -> list[str]:
    """names, each after all that it requires, also by way of others; otherwise in the order given. A circle is cut."""
    wanted = dict.fromkeys(names)
    order: dict[str, None] = {}
    seen: set[str] = set()
    for name in wanted:
        stack: list[tuple[str, Iterator[str]]] = []
        if name not in seen:
            seen.add(name)
            stack.append((name, iter(requires.get(name, ()))))
        while stack:
            at, rest = stack[-1]
            needed = next(rest, None)
            if needed is None:
                order[at] = None
                stack.pop()
            elif needed not in seen:
                seen.add(needed)
                stack.append((needed, iter(requires.get(needed, ()))))
    return [name for name in order if name in wanted]


def stop_order(requires: Requires, names: Iterable[str]) -> list[str]:
    """names, each before all that it requires; otherwise the last first."""
    return start_order(requires, names)[::-1]


def longest_stop(specs: Mapping[str, PoolSpec]) -> float:
    """Seconds that the stop sequences of all pools may take together: each waits for those that require it."""
    requires = {name: spec.requires for name, spec in specs.items()}
    needs: dict[str, float] = dict.fromkeys(specs, 0.0)  # until those that require it are down
    longest = 0.0
    for name in stop_order(requires, specs):
        ends = needs[name] + sum(step.wait for step in specs[name].stop)
        longest = max(longest, ends)
        for needed in specs[name].requires:
            if needed in needs:
                needs[needed] = max(needs[needed], ends)
    return longest


def problems(specs: Mapping[str, PoolSpec]) -> list[tuple[str, str, str]]:
    """(pool, name of the pool it requires, why) of all that is wrong between pools."""
    requires = {name: spec.requires for name, spec in specs.items()}
    found: list[tuple[str, str, str]] = []
    for name, spec in specs.items():
        for needed, requirement in spec.requires.items():
            if needed not in specs:
                found.append((name, needed, f"there is no pool {needed}: {_meant(needed, specs)}"))
            elif requirement.when == "done" and not _may_be_done(specs[needed]):
                why = f'a service that is restarted always is never done: give {needed} type = "oneshot"'
                found.append((name, needed, why))
    return found + _circles(requires)


def _circles(requires: Requires) -> list[tuple[str, str, str]]:
    """Each circle once, told of the first pool that is in it."""
    found: list[tuple[str, str, str]] = []
    told: set[str] = set()
    for name in requires:
        if name not in told and (way := circle(requires, name)):
            told.update(way)
            found.append((name, way[1], f"goes in a circle: {' -> '.join(way)}: leave one out"))
    return found


def _may_be_done(spec: PoolSpec) -> bool:
    return spec.type == "oneshot" or spec.restart.policy != "always"


def _meant(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches  # only a file with errors pays for it

    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else "define it, or leave it out"


# --- how pools stand -----------------------------------------------------------------------------------------------


class Standing:
    """How many workers of a pool are how. wanted: as many are to be there; the first four count only those, `stopped`
    and the others all there are."""

    __slots__ = ("done", "held", "ready", "started", "stopped", "stopping", "there", "waiting", "wanted")

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.there = self.started = self.ready = self.done = self.stopped = 0
        self.stopping = self.waiting = self.held = 0

    def count(self, w: Worker, by: int) -> None:
        """One worker more (by 1) or less (-1) as this one."""
        self.there += by
        if w.state in _DOWN:
            self.stopped += by
        elif w.state is State.STOPPING:
            self.stopping += by
            self.held += by * w.held
        elif w.state is State.WAITING:
            self.waiting += by
        if w.index < self.wanted:
            self.started += by * _started(w)
            self.ready += by * _ready(w)
            self.done += by * _done(w)

    def met(self, when: When) -> bool:
        if when == "stopped":
            return self.stopped == self.there
        so: int = getattr(self, when)
        return so == self.wanted > 0


class Loss(NamedTuple):
    """pool requires `needed`, one of whose workers is not any more as it has to be."""

    pool: str
    needed: str
    then: Literal["restart", "stop"]


class Unmet(NamedTuple):
    """One thing that a pool waits for. so: how many workers of `needed` are as required, of how many; both 0 when it
    has none, or is not there. stuck: it will not come without an operator, as all others of them are down."""

    needed: str
    when: When
    so: int
    wanted: int
    stuck: bool


class Dependencies:
    """The graph of all pools and how each stands; kept up to date by workers.WorkerSet, which asks it what to do.

    unsettled: pools in which somebody may wait no longer, or be held back no longer.
    """

    def __init__(self) -> None:
        self.requires: dict[str, Mapping[str, Requirement]] = {}
        self.unsettled: dict[str, None] = {}
        self._dependents: dict[str, list[str]] = {}
        self._standing: dict[str, Standing] = {}

    def add(self, spec: PoolSpec) -> None:
        """A pool, none of whose workers is there yet."""
        self.requires[spec.name] = spec.requires
        self._standing[spec.name] = Standing(spec.workers)
        for needed in spec.requires:
            self._dependents.setdefault(needed, []).append(spec.name)
        self._unsettle(spec.name)
        self.unsettled[spec.name] = None  # a worker may have waited already, for a supervisor that is no more

    def remove(self, name: str) -> None:
        """A pool, none of whose workers is there any more."""
        for needed in self.requires.pop(name):
            self._dependents[needed].remove(name)
        del self._standing[name]
        self._unsettle(name)

    def circle(self, spec: PoolSpec) -> list[str]:
        """The way back to a pool that is to be added; empty when there is none."""
        return circle(self.requires | {spec.name: spec.requires}, spec.name)

    def resize(self, name: str, wanted: int, workers: Iterable[Worker]) -> None:
        """Other workers of the pool are wanted. workers: those that are there."""
        self._standing[name] = standing = Standing(wanted)
        for w in workers:
            standing.count(w, 1)
        self._unsettle(name)

    def changed(self, old: Worker | None, new: Worker | None) -> None:
        """A worker is another than before; None: it was not there, or is no more."""
        about = new or old
        if about is None or (old is not None and new is not None and _same(old, new)):
            return
        standing = self._standing[about.pool]
        if old is not None:
            standing.count(old, -1)
        if new is not None:
            standing.count(new, 1)
        self._unsettle(about.pool)

    def _unsettle(self, name: str) -> None:
        for dependent in self._dependents.get(name, ()):
            self.unsettled[dependent] = None
        for needed in self.requires.get(name, ()):
            self.unsettled[needed] = None
        if name in self.requires and (self.requires[name] or self.is_required(name)):
            self.unsettled[name] = None

    # --- what follows ----------------------------------------------------------------------------------------------

    def is_required(self, name: str) -> bool:
        return bool(self._dependents.get(name))

    def blocker(self, name: str) -> str | None:
        """The first pool that this one lacks something of."""
        for needed, requirement in self.requires[name].items():
            if not self._met(needed, requirement.when):
                return needed
        return None

    def reason(self, name: str) -> str | None:
        """Of a worker of the pool that waits; None: nothing is in its way."""
        blocker = self.blocker(name)
        return None if blocker is None else DEPENDENCY + blocker

    def unmet(self, name: str) -> list[Unmet]:
        """All that the pool lacks, in the order of its `requires`."""
        found = []
        for needed, requirement in self.requires[name].items():
            if not self._met(needed, requirement.when):
                standing = self._standing.get(needed, Standing(0))
                so = getattr(standing, requirement.when)
                if requirement.when == "stopped":
                    found.append(Unmet(needed, requirement.when, so, standing.there, stuck=not standing.stopping))
                else:
                    down = standing.stopped - standing.done  # who failed among them
                    stuck = so + down >= standing.wanted
                    found.append(Unmet(needed, requirement.when, so, standing.wanted, stuck))
        return found

    def _met(self, needed: str, when: When) -> bool:
        standing = self._standing.get(needed)
        return when == "stopped" if standing is None else standing.met(when)

    def waiting(self, name: str) -> int:
        """How many workers of the pool wait."""
        return self._standing[name].waiting

    def releases(self, name: str) -> bool:
        """Whether workers of the pool are held back, and nobody is any more for whose sake."""
        if not self._standing[name].held:
            return False
        return not any(self._standing[dependent].stopping for dependent in self._dependents.get(name, ()))

    def losses(self, old: Worker, new: Worker) -> list[Loss]:
        """What the change of one worker takes from others."""
        dependents = self._dependents.get(old.pool)
        if not dependents or _same(old, new):
            return []
        wanted = self._standing[old.pool].wanted
        if old.index >= wanted > 0:  # scaled away
            return []
        found = []
        for dependent in dependents:
            requirement = self.requires[dependent][old.pool]
            lost = holds(requirement.when, old) and not holds(requirement.when, new)
            if lost and requirement.lost != "ignore":
                found.append(Loss(dependent, old.pool, requirement.lost))
        return found


def _same(old: Worker, new: Worker) -> bool:
    """As far as standing goes."""
    return (
        old.state is new.state
        and old.held == new.held
        and (old.running_since is None) == (new.running_since is None)
        and old.ready is new.ready
    )
