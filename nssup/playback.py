"""A scenario played on the pools of a config: the timeline, and whether what was expected came true (`nssup sim`).

The core is the real one, its world is sim's: nothing here decides about a life, and nothing takes any time.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from nssup import render
from nssup.errors import ControlError, Problem, SpecError
from nssup.events import Event, Exit, Input, Kill, Reset, Restart, Start, State, Stop
from nssup.machine import Worker
from nssup.scenario import FOREVER, Expectation, Life, Scenario, Step
from nssup.selection import canonical, pool_of, select, select_pools
from nssup.sim import Fate, Simulation
from nssup.snapshot import event_document, members, signal_name
from nssup.spec import SIGTERM, PoolSpec

ONESHOT_RUNS = 1.0  # seconds, where no [[life]] says anything


class Line(NamedTuple):
    """One thing that was done or happened. wait: of a backoff that it began, in seconds."""

    at: float
    what: Event | Step
    wait: float | None = None


class Outcome(NamedTuple):
    """why: what was so instead, where an expectation did not hold."""

    expectation: Expectation
    held: bool
    why: str


class Played(NamedTuple):
    lines: list[Line]
    outcomes: list[Outcome]
    workers: list[Worker]

    @property
    def held(self) -> bool:
        return all(outcome.held for outcome in self.outcomes)


def play(pools: Mapping[str, PoolSpec], scenario: Scenario) -> Played:
    """Raises SpecError for a step or expectation about a pool that there is not."""
    return _Playback(pools, scenario).play()


class _Playback:
    def __init__(self, pools: Mapping[str, PoolSpec], scenario: Scenario) -> None:
        self._pools = pools
        self._scenario = scenario
        self._lines: list[Line] = []
        self._sim = Simulation(self._fate, seed=scenario.seed, observe=self._observe)

    def play(self) -> Played:
        self._check_names()
        for spec in self._pools.values():
            self._sim.add_pool(spec)
        outcomes: dict[int, Outcome] = {}
        until = self._scenario.until
        expected = list(enumerate(self._scenario.expectations))
        moments = sorted({step.at for step in self._scenario.steps} | {e.at for _, e in expected if e.at is not None})
        for moment in [at for at in moments if at <= until]:
            self._sim.run(moment)
            for step in self._scenario.steps:
                if step.at == moment:
                    self._do(step)
            outcomes |= {n: self._judge(each) for n, each in expected if each.at == moment}
        self._sim.run(until)
        outcomes |= {n: self._judge(each) for n, each in expected if n not in outcomes}
        workers = list(self._sim.workers.workers.values())
        return Played(self._lines, [outcomes[n] for n, _ in expected], workers)

    def _check_names(self) -> None:
        """A slip of the pen must not be an expectation that holds."""
        named = [("life", n, each.of, each.place) for n, each in enumerate(self._scenario.lives)]
        named += [("step", n, each.of, each.place) for n, each in enumerate(self._scenario.steps)]
        named += [("expect", n, each.of, each.place) for n, each in enumerate(self._scenario.expectations) if each.of]
        for kind, number, of, place in named:
            if not any(_means(of, f"{name}/{index}") for name in self._pools for index in _indexes(of)):
                why = f"{of!r} is no pool or worker of the config: there are {', '.join(self._pools)}"
                raise SpecError(Problem(*place, f"{kind}.{number}", why))

    # --- what happens ------------------------------------------------------------------------------------------------

    def _fate(self, worker_id: str, generation: int) -> Fate:
        for life in self._scenario.lives:
            if _means(life.of, worker_id) and life.lives[0] <= generation <= life.lives[1]:
                return self._fate_of(life, worker_id)
        return self._fate_of(Life(of=worker_id), worker_id)

    def _fate_of(self, life: Life, worker_id: str) -> Fate:
        oneshot = self._pools[pool_of(worker_id)].type == "oneshot"
        runs = ONESHOT_RUNS if oneshot and life.runs == FOREVER and life.silent == FOREVER else life.runs
        never = life.fails or ""
        return Fate(
            launch_fails=None,
            setup_fails=never or None,
            launch=life.launch,
            ready=life.ready,
            life=runs,
            exit=_exit(life.exit, life.signal),
            rest=life.leaves,
            obeys=life.stops,
            silent=life.silent,
        )

    def _observe(self, event: Event) -> None:
        wait = None
        if event.to == State.BACKOFF and event.worker is not None:
            deadline = self._sim.workers.workers[event.worker].deadline
            wait = None if deadline is None else deadline - self._sim.now
        self._lines.append(Line(self._sim.now, event, wait))

    def _do(self, step: Step) -> None:
        self._lines.append(Line(self._sim.now, step))
        workers = self._sim.workers
        try:
            if step.what == "scale":
                for pool in select_pools([step.of], members(workers)):
                    self._sim.scale(pool, step.to or 0)
                return
            ids: Sequence[str] = select([step.of], members(workers), lambda host_pid: None).workers
        except ControlError as error:
            raise SpecError(Problem(*step.place, "", str(error))) from None
        if step.what == "start":
            ids = workers.required_first(ids)
        elif step.what in ("stop", "restart"):
            ids = workers.dependents_first(ids)
        for worker_id in ids:
            if worker_id in workers.workers:
                self._do_to(worker_id, step)

    def _do_to(self, worker_id: str, step: Step) -> None:
        wishes: dict[str, Input] = {"start": Start(), "stop": Stop(), "restart": Restart(), "reset": Reset()}
        if step.what in wishes:
            self._sim.feed(worker_id, wishes[step.what])
        elif step.what == "kill":
            self._sim.feed(worker_id, Kill(step.signal or SIGTERM, step.tree))
        elif step.what == "end":
            self._sim.end(worker_id, _exit(step.exit, step.signal))
        else:
            self._sim.say_ready(worker_id, step.what == "ready")

    # --- what was expected -------------------------------------------------------------------------------------------

    def _judge(self, e: Expectation) -> Outcome:
        if e.order:
            why = self._disorder(e.order)
        elif e.event is not None:
            why = self._miscount(e)
        else:
            why = self._difference(e)
        return Outcome(e, not why, why)

    def _difference(self, e: Expectation) -> str:
        ids = [each for each in self._sim.workers.workers if _means(e.of, each)]
        if not ids:
            return f"there is no worker {e.of} then"
        wrong = [f"{each} {why}" for each in ids if (why := _unlike(e, self._sim.workers.workers[each]))]
        return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")

    def _miscount(self, e: Expectation) -> str:
        found = [
            line.at
            for line in self._lines
            if isinstance(line.what, Event) and _is(line.what, e) and e.after <= line.at <= e.before
        ]
        if e.times is None:
            return "" if found else "it never happened" if e.before == FOREVER and not e.after else "not in that time"
        return "" if len(found) == e.times else f"it happened {len(found)} times"

    def _disorder(self, order: Sequence[str]) -> str:
        at = -1
        for each in order:
            of, event = each.split()
            place = next((n for n, line in enumerate(self._lines) if _told(line, of, event)), None)
            if place is None:
                return f"{each!r} never happened"
            if place < at:
                return f"{each!r} came first"
            at = place
        return ""


def _exit(code: int | None, signo: int | None) -> Exit:
    if signo is not None:
        return Exit(reason=f"signal:{signal_name(signo)}", signal=signo)
    return Exit(reason=f"exit:{code or 0}", code=code or 0)


def _means(of: str, worker_id: str) -> bool:
    """As a selector, though the worker need not be there."""
    name = canonical(of)
    if "/" not in name:
        return fnmatchcase(pool_of(worker_id), name)
    return all(map(fnmatchcase, worker_id.split("/"), name.split("/", 1)))


def _indexes(of: str) -> Iterable[str]:
    index = canonical(of).partition("/")[2]
    return [index] if index.isdecimal() else ["0"]


def _told(line: Line, of: str, event: str) -> bool:
    return isinstance(line.what, Event) and line.what.event == event and of in (line.what.worker, line.what.pool)


def _is(event: Event, e: Expectation) -> bool:
    about = not e.of or event.pool == e.of or (event.worker is not None and _means(e.of, event.worker))
    return event.event == e.event and about and e.reason in (None, event.reason)


def _unlike(e: Expectation, w: Worker) -> str:
    """What of the worker is not as expected."""
    if e.state is not None and w.state.value not in e.state:
        return f"is {w.state.value}" + (f" ({w.reason})" if w.reason else "")
    if e.reason is not None and w.reason != e.reason:
        return f"is {w.state.value} because of {w.reason}"
    if e.ready is not None and w.ready is not e.ready:
        return "is ready" if w.ready else "is not ready"
    if e.lives is not None and w.generation != e.lives:
        return f"has been launched {w.generation} times"
    if e.restarts is not None and w.restarts != e.restarts:
        return f"has been restarted {w.restarts} times"
    return ""


# --- as it is read ---------------------------------------------------------------------------------------------------


def text(played: Played) -> list[str]:
    """The timeline, how all is at the end, and what was expected, as lines."""
    width = max([len(_who(line.what)) for line in played.lines], default=0)
    lines = [_line(line, width) for line in played.lines]
    lines += ["", *(_at_the_end(worker, width) for worker in played.workers)]
    if played.outcomes:
        lines += ["", *map(_outcome, played.outcomes)]
    return lines


def _who(what: Event | Step) -> str:
    return what.of if isinstance(what, Step) else what.worker or what.pool or "nssup"


def _line(line: Line, width: int) -> str:
    what = line.what
    if isinstance(what, Step):
        return f"{line.at:12.3f}  {what.of:{width}}  <- {_deed(what)}"
    words = [f"{what.from_} -> {what.to}"] if what.to else []
    ended = what.exit.reason if what.exit else None
    words += [f"({reason})" for reason in dict.fromkeys((ended, what.reason)) if reason]
    words += [f"next attempt in {render.duration(line.wait)}"] if line.wait is not None else []
    detail = what.detail or {}
    if "signal" in detail:
        words.append(signal_name(detail["signal"]) + (" to its tree" if detail.get("tree") else ""))
    if what.event == "scaled":
        words.append(f"{detail['from']} -> {detail['to']} workers")
    return f"{line.at:12.3f}  {_who(what):{width}}  {what.event:15} {' '.join(words)}".rstrip()


def _deed(step: Step) -> str:
    words = [step.what]
    words += [f"to {step.to}"] if step.to is not None else []
    words += [f"with {step.exit}"] if step.exit is not None else []
    words += [signal_name(step.signal)] if step.signal is not None else []
    words += ["to its tree"] if step.tree else []
    return " ".join(words)


def _at_the_end(w: Worker, width: int) -> str:
    said = f" ({w.reason})" if w.reason else ""
    return f"{'at the end':>12}  {w.id:{width}}  {w.state.value}{said}, launched {w.generation} times"


def _outcome(outcome: Outcome) -> str:
    file, line, _ = outcome.expectation.place
    what = _expected(outcome.expectation)
    return f"{file}:{line}: " + (f"as expected: {what}" if outcome.held else f"expected {what}, but {outcome.why}")


def _expected(e: Expectation) -> str:
    if e.order:
        return " before ".join(e.order)
    if e.event is not None:
        words = [f"{e.of or 'somebody'} {e.event}"]
        words += [f"({e.reason})"] if e.reason else []
        words += [f"{e.times} times"] if e.times is not None else []
        words += [f"after {e.after:g} s"] if e.after else []
        words += [f"before {e.before:g} s"] if e.before != FOREVER else []
        return " ".join(words)
    fields = {
        "state": None if e.state is None else " or ".join(e.state),
        "reason": e.reason,
        "ready": None if e.ready is None else str(e.ready).lower(),
        "lives": e.lives,
        "restarts": e.restarts,
    }
    what = ", ".join(f"{name} {value}" for name, value in fields.items() if value is not None)
    return f"{e.of}: {what} at {'the end' if e.at is None else f'{e.at:g} s'}"


def documents(played: Played) -> list[dict[str, Any]]:
    """The same as JSON: a line for each step, event and expectation. `at` in seconds, in place of `ts`."""
    found = []
    for line in played.lines:
        if isinstance(line.what, Step):
            step = {name: value for name, value in msgspec.structs.asdict(line.what).items() if name != "place"}
            found.append(
                {"at": line.at, "step": {k: v for k, v in step.items() if k != "at" and v not in (None, False)}}
            )
        else:
            event = event_document(replace(line.what, ts=0.0))
            del event["ts"]
            event.get("exit", {}).pop("at", None)  # of no clock that anybody has
            found.append({"at": round(line.at, 6), **event})
    for outcome in played.outcomes:
        file, line_number, _ = outcome.expectation.place
        what = {"expected": _expected(outcome.expectation), "held": outcome.held}
        found.append({**what, "why": outcome.why or None, "file": file, "line": line_number})
    return found
