"""Every torn state that a supervisor can leave behind, and what the next one makes of it: without a process."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nssup import adopt, clone, machine, wire
from nssup.adopt import KEPT, PATIENCE, Fact, keep, place_of, restore
from nssup.errors import ImpossibleEvent
from nssup.events import (
    Empty,
    Exit,
    Exited,
    Gone,
    Kill,
    Launched,
    LaunchFailed,
    Remove,
    Restart,
    Running,
    SetupFailed,
    Start,
    Started,
    State,
    Stop,
    Tick,
)
from nssup.machine import Action, Forget, KillTree, Launch, SignalMain, Worker
from nssup.record import BODY_MAX, SLOT_OVER, SLOT_RELEASED, SLOT_SPAWNING, SLOT_STOPPING, Slot
from nssup.restart import History
from nssup.spec import Backoff, PoolSpec, Requirement, RestartPolicy, StopStep
from nssup.wire import Phase
from nssup.workers import WorkerSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nssup.events import Event, Input
    from nssup.workers import Actions

STEADY = RestartPolicy(backoff=Backoff(jitter=0.0))
LADDER = (StopStep(15, 10.0), StopStep(2, 5.0), StopStep(None))
WEB = PoolSpec(name="web", command=("app",), workers=4, restart=STEADY, stop=LADDER)
NEVER = replace(WEB, restart=RestartPolicy(policy="never"))
GONE_POOL = replace(WEB, workers=0, enabled=False)
CODE_0 = Exit(reason="exit:0", code=0, cpu_seconds=0.25, max_rss_bytes=4096, at=1.0)
CODE_3 = Exit(reason="exit:3", code=3, at=1.0)
HOLDS, GONE, UNKNOWN = Fact(holds=True), Fact(gone=True), Fact(why="EPERM")
UP = (Launched(1, 1001), Started(1, 2001, 2), Running(1))
THEN = 100.0  # when the last supervisor did what it did
NOW = 200.0  # when the next one starts


def lived(*events: Input, spec: PoolSpec = WEB, at: float = THEN) -> Worker:
    """A worker that went through events, as its supervisor noted it last."""
    worker = Worker(pool="web", index=3)
    for event in events:
        worker, _ = machine.step(worker, spec, event, at, "seed")
    return worker


def later(worker: Worker, *events: Input, at: float, spec: PoolSpec = WEB) -> Worker:
    for event in events:
        worker, _ = machine.step(worker, spec, event, at, "seed")
    return worker


def slot_of(worker: Worker, **changes: object) -> Slot:
    """As custody notes it: the init is known from the note of Launched on."""
    born = (worker.alive and worker.init_host_pid is not None) or worker.state is State.LOST
    step = SLOT_RELEASED if born else SLOT_SPAWNING
    if not worker.alive and worker.state is not State.LOST:
        step = SLOT_OVER
    elif worker.state is State.STOPPING:
        step = SLOT_STOPPING
    init = 1001 if born else 0
    slot = Slot(step, 1, bytes(16), 1, worker.generation, worker.id, init_host_pid=init, body=keep(worker))
    return slot._replace(**changes)  # type: ignore[arg-type]


class Taken:
    """A worker as the next supervisor has it: restored, fed, and what it was told to do, in order."""

    def __init__(
        self,
        slot: Slot,
        fact: Fact,
        lingering: tuple[int, ...] = (),
        *,
        spec: PoolSpec = WEB,
        now: float = NOW,
    ) -> None:
        self.spec, self.now = spec, now
        self.told: list[Event] = []
        self.did: list[Action] = []
        self.set = WorkerSet(self.told.append, epoch=2, seed="seed")
        self.id = slot.worker
        adopted = adopt.adopt(slot, fact, lingering, now)
        others = [
            Worker(pool=spec.name, index=index, reason="other")
            for index in range(spec.workers)
            if index != adopted.worker.index
        ]
        self._do(self.set.add_pool(spec, now, [adopted.worker, *others]))
        self.feed(*adopted.events)
        self.did += adopted.actions

    def _do(self, actions: Actions) -> None:
        self.did += [action for worker_id, action in actions if worker_id == self.id]

    def feed(self, *events: Input) -> Taken:
        for event in events:
            if self.id in self.set.workers:
                self._do(self.set.feed(self.id, event, self.now))
        return self

    def hear(self, state: wire.State) -> Taken:
        """As loop.py: what init answers to HELLO."""
        worker = self.set.workers[self.id]
        for event in adopt.said(worker, state, ended_of(state), state.exit.boottime_ns / 1e9 or None):
            self.feed(event)
        self.did += adopt.owed(self.set.workers.get(self.id), self.spec.stop, state.generation, state)
        return self

    def due(self, now: float) -> Taken:
        self.now = now
        self._do(self.set.due(now))
        return self

    @property
    def worker(self) -> Worker:
        return self.set.workers[self.id]

    @property
    def state(self) -> State:
        return self.worker.state


def ended_of(state: wire.State) -> Exit | None:
    return clone.exit_of_message(state.exit) if state.exit.code else None


def told(
    phase: int, generation: int = 1, *, step: int = 0, error: int = 0, code: int = 3, at: float = 150.0
) -> wire.State:
    """init's STATE in that phase; code: of the exit record, where there is one."""
    ended = phase in (Phase.EXITED, Phase.EMPTY)
    record = wire.Exit(1, code, 1000, 500, 4096, int(at * 1e9)) if ended else wire.Exit()
    return wire.State(generation, 2, phase, 0, 2, step, error, 0, record)


# --- the torn states ------------------------------------------------------------------------------------------------

STARTING = lived(Start())
BORN = lived(Start(), Launched(1, 1001))
STARTED = lived(Start(), Launched(1, 1001), Started(1, 2001, 2))
RUNNING = lived(Start(), *UP)
STOPPING = lived(Start(), *UP, Stop())
STOPPING_2 = later(STOPPING, Tick(), at=THEN + 10)
STOPPED_EARLY = lived(Start(), Stop())
KILLED_EARLY = later(STOPPED_EARLY, Launched(1, 1001), at=THEN)
KILLED_BY_STOP = later(later(STOPPING_2, Tick(), at=THEN + 15), at=THEN + 15)
KILLED_BY_HAND = lived(Start(), *UP, Kill(9, tree=True))
RESTARTING = lived(Start(), *UP, Restart())
REMOVING = lived(Start(), *UP, Remove())
EXITED = lived(Start(), *UP, Exited(1, CODE_3))
EXITED_IN_STOP = lived(Start(), *UP, Stop(), Exited(1, CODE_0))
FAILING = lived(Start(), Launched(1, 1001), SetupFailed(1, "exec-failed:ENOENT"))
BACKOFF = lived(Start(), *UP, Exited(1, CODE_3, empty=True))
SECOND = later(BACKOFF, Tick(), at=THEN + 1)
SECOND_UP = later(SECOND, Launched(2, 1002), Started(2, 2002, 2), Running(2), at=THEN + 1)
OVER = lived(Start(), *UP, Stop(), Exited(1, CODE_0, empty=True))
STOPPED = later(OVER, Gone(1), at=THEN)
FAILED = lived(Start(), *UP, Exited(1, CODE_3, empty=True), Gone(1), spec=NEVER)
FAILED_OVER = lived(Start(), *UP, Exited(1, CODE_3, empty=True), spec=NEVER)
DONE = lived(Start(), *UP, Exited(1, CODE_0, empty=True), Gone(1), spec=replace(NEVER, type="oneshot"))
LOST = adopt.adopt(slot_of(RUNNING), UNKNOWN, (), NOW).worker
LOST_STOPPING = adopt.adopt(slot_of(STOPPING), UNKNOWN, (), NOW).worker


NEEDY = replace(WEB, requires={"db": Requirement()})
WAITING = machine.step(Worker(pool="web", index=3), NEEDY, Start(), THEN, "seed", machine.Around("db"))[0]
HELD = machine.step(RUNNING, WEB, Stop(), THEN, "seed", machine.Around(required=True))[0]


class Row(NamedTuple):
    """kept and fact in; the state, and all that is to be done."""

    kept: Worker
    fact: Fact
    state: State | None  # None: forgotten
    did: tuple[Action, ...] = ()
    reason: str | None = None
    lingering: tuple[int, ...] = ()
    spec: PoolSpec = WEB
    generation: int = 1
    deadline: float | None = None


TERM_1, KILL_1 = SignalMain(1, 15), KillTree(1)
ROWS = {
    # Nothing but the intent was noted: whatever was cloned had no GO.
    "spawning": Row(STARTING, GONE, State.STARTING, (Launch(1),)),
    "spawning, never to be restarted": Row(STARTING, GONE, State.STARTING, (Launch(1),), spec=NEVER),
    "spawning, a later life": Row(SECOND, GONE, State.STARTING, (Launch(2),), generation=2, reason="exit:3"),
    "spawning, the life before lingers": Row(
        SECOND, GONE, State.STARTING, (Launch(2),), generation=2, lingering=(1,), reason="exit:3"
    ),
    "spawning, stop asked": Row(STOPPED_EARLY, GONE, State.STOPPED, reason="operator"),
    "spawning, of a pool that is no more": Row(
        STARTING, GONE, State.STOPPING, (Launch(1),), "operator", spec=GONE_POOL
    ),
    # An init is noted.
    "released, init gone": Row(BORN, GONE, State.BACKOFF, (), "init-killed", deadline=NOW + 0.1),
    "released, init gone, never to be restarted": Row(BORN, GONE, State.FAILED, (), "init-killed", spec=NEVER),
    "released": Row(BORN, HOLDS, State.STARTING),
    "released, stop asked": Row(KILLED_EARLY, HOLDS, State.STOPPING, (), "operator"),
    "released, stop asked, init gone": Row(KILLED_EARLY, GONE, State.STOPPED, (), "operator"),
    "started": Row(STARTED, HOLDS, State.STARTING),
    "failing": Row(FAILING, HOLDS, State.STARTING),
    "failing, init gone": Row(FAILING, GONE, State.BACKOFF, (), "exec-failed:ENOENT", deadline=NOW + 0.1),
    "running": Row(RUNNING, HOLDS, State.RUNNING),
    "running, init gone": Row(RUNNING, GONE, State.STARTING, (Launch(2),), "init-killed", generation=2),
    "running, init gone, never to be restarted": Row(RUNNING, GONE, State.FAILED, (), "init-killed", spec=NEVER),
    "running, unprovable": Row(RUNNING, UNKNOWN, State.LOST, (), "lost:EPERM"),
    "running, two lives before linger": Row(RUNNING, HOLDS, State.RUNNING, lingering=(-2, -1)),
    "running, never to be restarted, gone, one lingers": Row(
        RUNNING, GONE, State.STOPPING, (), "init-killed", lingering=(-1,), spec=NEVER
    ),
    "running, too many": Row(
        RUNNING, HOLDS, State.STOPPING, (TERM_1,), "operator", spec=replace(WEB, workers=3), deadline=NOW + 10
    ),
    "running, of a pool that is no more": Row(
        RUNNING, HOLDS, State.STOPPING, (TERM_1,), "operator", spec=GONE_POOL, deadline=NOW + 10
    ),
    "running, of a pool that is no more, gone": Row(RUNNING, GONE, None, (TERM_1, Forget()), spec=GONE_POOL),
    "killed by hand": Row(KILLED_BY_HAND, HOLDS, State.RUNNING),
    "killed by hand, gone": Row(KILLED_BY_HAND, GONE, State.STARTING, (Launch(2),), "signal:SIGKILL", generation=2),
    # A stop.
    "stopping": Row(STOPPING, HOLDS, State.STOPPING, (), "operator", deadline=NOW + PATIENCE),
    "stopping, its second step": Row(STOPPING_2, HOLDS, State.STOPPING, (), "operator", deadline=NOW + PATIENCE),
    "stopping, killed": Row(KILLED_BY_STOP, HOLDS, State.STOPPING, (), "operator"),
    "stopping, killed, gone": Row(KILLED_BY_STOP, GONE, State.STOPPED, (), "operator"),
    "stopping, gone": Row(STOPPING, GONE, State.STOPPED, (), "operator"),
    "stopping, unprovable": Row(STOPPING, UNKNOWN, State.LOST, (), "lost:EPERM"),
    "restarting": Row(RESTARTING, HOLDS, State.STOPPING, (), "operator", deadline=NOW + PATIENCE),
    "restarting, gone": Row(RESTARTING, GONE, State.STARTING, (Launch(2),), None, generation=2),
    "removing": Row(REMOVING, HOLDS, State.STOPPING, (), "operator", deadline=NOW + PATIENCE, spec=GONE_POOL),
    "removing, gone": Row(REMOVING, GONE, None, (Forget(),), spec=GONE_POOL),
    "removing, wanted again": Row(REMOVING, HOLDS, State.STOPPING, (), "operator", deadline=NOW + PATIENCE),
    # The program has ended, the namespace is not empty yet.
    "exited": Row(EXITED, HOLDS, State.STOPPING, (), "exit:3", deadline=NOW + PATIENCE),
    "exited, gone": Row(EXITED, GONE, State.BACKOFF, (), "exit:3", deadline=NOW + 0.1),
    "exited in a stop": Row(EXITED_IN_STOP, HOLDS, State.STOPPING, (), "operator", deadline=NOW + PATIENCE),
    "exited in a stop, gone": Row(EXITED_IN_STOP, GONE, State.STOPPED, (), "operator"),
    # Over; its init waits for the word.
    "over": Row(OVER, HOLDS, State.STOPPING, (), "operator", lingering=(1,)),
    "over, gone": Row(OVER, GONE, State.STOPPED, (), "operator"),
    "over for good": Row(FAILED_OVER, HOLDS, State.STOPPING, (), "exit:3", lingering=(1,), spec=NEVER),
    "over for good, gone": Row(FAILED_OVER, GONE, State.FAILED, (), "exit:3", spec=NEVER),
    "backoff": Row(BACKOFF, GONE, State.BACKOFF, (), "exit:3", deadline=THEN + 0.1),
    "backoff, its life lingers": Row(BACKOFF, HOLDS, State.BACKOFF, (), "exit:3", lingering=(1,), deadline=THEN + 0.1),
    "the next life, the one before lingers": Row(SECOND_UP, HOLDS, State.RUNNING, lingering=(1,), generation=2),
    # What other pools are to it.
    "waiting": Row(WAITING, GONE, State.WAITING, (), "dependency:db", spec=NEEDY, generation=0),
    "waiting, for nothing any more": Row(WAITING, GONE, State.STARTING, (Launch(1),)),
    "running, and what it requires is not there": Row(RUNNING, HOLDS, State.RUNNING, spec=NEEDY),
    "running, init gone, and what it requires is not there": Row(
        RUNNING, GONE, State.WAITING, (), "dependency:db", spec=NEEDY
    ),
    "held back, for nobody any more": Row(HELD, HOLDS, State.STOPPING, (TERM_1,), "operator", deadline=NOW + 10),
    "held back, gone": Row(HELD, GONE, State.STOPPED, (TERM_1,), "operator"),
    # Nothing lives.
    "stopped, not gone": Row(STOPPED, HOLDS, State.STOPPING, (), "operator", lingering=(1,)),
    "lost, one lingers, of a pool that is no more": Row(
        LOST, UNKNOWN, State.STOPPING, (), "operator", lingering=(-1,), spec=GONE_POOL
    ),
    "stopped": Row(STOPPED, GONE, State.STOPPED, (), "operator"),
    "failed": Row(FAILED, GONE, State.FAILED, (), "exit:3"),
    "done": Row(DONE, GONE, State.DONE, (), "exit:0"),
    "stopped, of a pool that is no more": Row(STOPPED, GONE, None, (Forget(),), spec=GONE_POOL),
    # What could not be proven ours, by the supervisor before.
    "lost": Row(LOST, UNKNOWN, State.LOST, (), "lost:EPERM"),
    "lost, found": Row(LOST, HOLDS, State.STARTING, (), "lost:EPERM"),
    "lost, gone": Row(LOST, GONE, State.BACKOFF, (), "init-killed", deadline=NOW + 0.1),
    "lost in a stop, found": Row(LOST_STOPPING, HOLDS, State.STOPPING, (), "lost:EPERM", deadline=NOW + PATIENCE),
    "lost in a stop, gone": Row(LOST_STOPPING, GONE, State.STOPPED, (), "operator"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_torn_state(name: str) -> None:
    row = ROWS[name]
    older = tuple(one for one in row.lingering if one != row.kept.generation)
    taken = Taken(slot_of(row.kept), row.fact, older, spec=row.spec)
    assert tuple(taken.did) == row.did
    if row.state is None:
        assert taken.id not in taken.set.workers
        return
    worker = taken.worker
    assert (worker.state, worker.reason, worker.generation) == (row.state, row.reason, row.generation)
    assert worker.lingering == row.lingering
    if row.deadline is None:
        assert worker.deadline is None
    else:
        assert worker.deadline == pytest.approx(row.deadline)


def test_the_table_has_every_kind_of_worker() -> None:
    kept = [row.kept for row in ROWS.values()]
    assert {worker.state for worker in kept} == set(State)


def test_a_deadline_that_has_not_passed_is_kept() -> None:
    taken = Taken(slot_of(STOPPING), HOLDS, now=THEN + 4)
    assert taken.worker.deadline == THEN + 10
    assert taken.due(THEN + 10).did == [SignalMain(1, 2)]


def test_a_deadline_that_has_passed_is_held_against_who_has_said_nothing_for_a_while() -> None:
    taken = Taken(slot_of(STOPPING_2), HOLDS)
    assert taken.due(NOW + PATIENCE / 2).did == []
    assert taken.due(NOW + PATIENCE).did == [KILL_1]


def test_a_backoff_that_ran_out_ends_at_once() -> None:
    assert Taken(slot_of(BACKOFF), GONE).due(NOW).did == [Launch(2)]


def test_counters_and_wishes_come_along() -> None:
    worker = Taken(slot_of(SECOND_UP), HOLDS).worker
    assert replace(worker, lingering=()) == replace(SECOND_UP, lingering=())
    assert (worker.restarts, worker.history, worker.last_exit) == (1, History(waits=1), CODE_3)


def test_a_lingering_life_that_ends_lets_the_outcome_be_said() -> None:
    taken = Taken(slot_of(OVER), HOLDS, (0,))
    assert taken.feed(Gone(0)).state is State.STOPPING
    assert taken.feed(Gone(1)).state is State.STOPPED


def test_a_taken_over_worker_is_said_to_be() -> None:
    assert [e.event for e in Taken(slot_of(RUNNING), HOLDS).told if e.worker == "web/3"] == ["adopted"]
    assert [e.event for e in Taken(slot_of(RUNNING), UNKNOWN).told if e.worker == "web/3"] == ["lost"]


# --- bodies -----------------------------------------------------------------------------------------------------------

GOLDEN_KEPT = Worker(
    pool="web",
    index=3,
    state=State.STOPPING,
    reason="operator",
    want_up=True,
    again=True,
    generation=7,
    restarts=4,
    history=History(waits=3, spared=True),
    launched_at=1000.5,
    running_since=1001.25,
    deadline=1012.0,
    init_host_pid=5150,
    host_pid=5151,
    ns_pid=2,
    last_host_pid=5151,
    last_ns_pid=2,
    alive=True,
    stop_step=0,
    last_exit=Exit(reason="signal:SIGSEGV", signal=11, core=True, cpu_seconds=0.5, max_rss_bytes=8192, at=1.5e9),
)
# Of the first version. What a later version writes may be longer; this is read for ever.
GOLDEN = (
    "dc0017a873746f7070696e67a86f70657261746f72c3c2c3070492"
    "03c3cb408f440000000000cb408f4a0000000000c0cb408fa00000000000cd141ecd141f02cd141f02c3c200c0c0"
    "99ae7369676e616c3a53494753454756c00bc3c2c2cb3fe0000000000000cd2000cb41d65a0bc0000000"
)


def test_golden_body() -> None:
    """What is written now begins as it always did."""
    assert restore("web/3", bytes.fromhex(GOLDEN)) == GOLDEN_KEPT
    first, now = (msgspec.msgpack.decode(body) for body in (bytes.fromhex(GOLDEN), keep(GOLDEN_KEPT)))
    history = KEPT.index("history")
    assert now[history] == [*first[history], 0, 0, []]
    assert now[:history] + now[history + 1 : len(first)] == first[:history] + first[history + 1 :]
    assert restore("web/3", keep(GOLDEN_KEPT)) == GOLDEN_KEPT


def test_deaths_are_kept_to_the_millisecond_and_the_newest_if_not_all_fit() -> None:
    deaths = tuple(1000.0 + 0.7501 * n for n in range(200))
    few = replace(GOLDEN_KEPT, history=History(waits=3, deaths=deaths[:5]))
    kept = restore("web/3", keep(few))
    assert kept is not None
    assert kept.history.deaths == pytest.approx(deaths[:5], abs=0.001)
    assert kept.last_exit == few.last_exit
    kept = restore("web/3", keep(replace(GOLDEN_KEPT, history=History(waits=3, deaths=deaths))))
    assert kept is not None
    assert len(kept.history.deaths) > 20
    assert kept.history.deaths == pytest.approx(deaths[-len(kept.history.deaths) :], abs=0.001)
    assert kept.last_exit is None


def test_bodies_of_other_versions() -> None:
    values = msgspec.msgpack.decode(bytes.fromhex(GOLDEN))
    history = [*values[:7], [*values[7], 1, 2, [7.5, 500], "tomorrow"], *values[8:]]
    restored = restore("web/3", msgspec.msgpack.encode(history))
    assert restored == replace(GOLDEN_KEPT, history=History(3, True, 1, 2, (7.0, 7.5)))
    since = [getattr(GOLDEN_KEPT, name) for name in KEPT[len(values) :]]
    more = msgspec.msgpack.encode([*values[:-1], [*values[-1], "tomorrow"], *since, {"a": "field"}, 17])
    assert restore("web/3", more) == GOLDEN_KEPT
    fewer = msgspec.msgpack.encode(values[:-2])
    assert restore("web/3", fewer) == replace(GOLDEN_KEPT, last_exit=None)
    short_exit = msgspec.msgpack.encode([*values[:-1], values[-1][:3]])
    assert restore("web/3", short_exit) == replace(GOLDEN_KEPT, last_exit=Exit(reason="signal:SIGSEGV", signal=11))


def test_who_ran_before_there_was_readiness_is_ready() -> None:
    old = msgspec.msgpack.encode(msgspec.msgpack.decode(keep(replace(RUNNING, ready=False, up_since=None)))[:23])
    worker = restore("web/3", old)
    assert worker is not None
    assert (worker.ready, worker.up_since) == (True, worker.running_since)


def test_what_is_known_of_its_readiness_is_kept() -> None:
    w = replace(RUNNING, up_since=1001.5, ready=False, passed=True, extended=1000.5, fault=None)
    assert restore("web/3", keep(w)) == w
    w = replace(STOPPING, fault="start-timeout")
    assert restore("web/3", keep(w)) == w


def test_every_field_of_a_worker_is_kept_or_known_otherwise() -> None:
    assert set(Worker.__struct_fields__) == {*KEPT, "pool", "index", "lingering"}
    assert set(Exit.__struct_fields__) == set(adopt._KEPT_EXIT)


UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "zeroes": bytes(20),
    "no list": msgspec.msgpack.encode({"state": "running"}),
    "a state of tomorrow": msgspec.msgpack.encode(["hibernating"]),
    "waiting, and not to be up": msgspec.msgpack.encode(["waiting"]),
    "waiting with a life": keep(replace(WAITING, alive=True)),
    "a text for a number": msgspec.msgpack.encode(["stopped", None, False, False, False, "7"]),
    "an exit that is none": msgspec.msgpack.encode(["stopped", *[None] * 20, 7]),
    "running without a life": msgspec.msgpack.encode(["running"]),
    "backoff without a deadline": msgspec.msgpack.encode(["backoff"]),
    "stopped with a life": keep(replace(STOPPED, alive=True)),
    "over with nothing to wait for": keep(replace(OVER, outcome=None)),
    "an outcome that is none": keep(replace(OVER, outcome=State.RUNNING)),
    "held back and running": keep(replace(RUNNING, held=True)),
    "held back in its stop sequence": keep(replace(STOPPING, held=True)),
    "running, and to be launched again": keep(replace(RUNNING, again=True)),
    "no time": keep(replace(BACKOFF, deadline=float("nan"))),
    "a time that never comes": keep(replace(BACKOFF, deadline=float("inf"))),
    "of another generation": keep(replace(RUNNING, generation=9)),
    "a step before the first": keep(replace(STOPPING, stop_step=-1)),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_who_cannot_be_read_is_held_and_asked(name: str) -> None:
    slot = slot_of(RUNNING, body=UNREADABLE[name])
    taken = Taken(slot, HOLDS)
    assert (taken.state, taken.worker.init_host_pid, taken.did) == (State.STARTING, 1001, [])
    taken.hear(told(Phase.RUNNING)).feed(*adopt.known(taken.worker, 2001, 2))
    assert (taken.state, taken.worker.host_pid, taken.worker.generation) == (State.RUNNING, 2001, 1)
    assert Taken(slot, HOLDS).hear(told(Phase.EMPTY)).worker.last_exit == Exit(
        reason="exit:3", code=3, cpu_seconds=0.0015, max_rss_bytes=4096, at=NOW
    )
    assert Taken(slot, GONE).state is State.BACKOFF
    assert (Taken(slot, UNKNOWN).state, Taken(slot, UNKNOWN).did) == (State.LOST, [])


def test_who_cannot_be_read_is_stopped_on() -> None:
    slot = slot_of(STOPPING, body=b"")
    taken = Taken(slot, HOLDS).due(NOW + PATIENCE)
    assert (taken.state, taken.did) == (State.STOPPING, [SignalMain(1, 2)])
    assert Taken(slot, GONE).state is State.STOPPED


def test_who_cannot_be_read_and_is_over_does_not_come_up_by_itself() -> None:
    slot = slot_of(BACKOFF, body=b"")
    assert (Taken(slot, GONE).state, Taken(slot, GONE).worker.reason) == (State.FAILED, adopt.UNREADABLE)
    taken = Taken(slot, HOLDS)
    assert (taken.state, taken.worker.lingering) == (State.STOPPING, (1,))
    assert taken.feed(Gone(1)).state is State.FAILED
    assert taken.feed(Start()).did == [Launch(2)]


def test_who_cannot_be_read_and_was_not_born_is_launched() -> None:
    assert Taken(slot_of(STARTING, body=b""), GONE).did == [Launch(1)]


def test_a_lost_one_without_a_name_stays_lost() -> None:
    taken = Taken(slot_of(LOST, init_host_pid=0), GONE)
    assert (taken.state, taken.did, taken.worker.reason) == (State.LOST, [], "lost:unproven")


@given(st.binary(max_size=BODY_MAX))
def test_restore_never_raises(body: bytes) -> None:
    restore("web/3", body)


VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9)


@given(st.lists(VALUES | st.lists(VALUES, max_size=10)))
def test_restore_never_raises_for_a_list(values: list[Any]) -> None:
    restore("web/3", msgspec.msgpack.encode(["running", *values[:22]][:23]))


@pytest.mark.parametrize(
    "worker_id",
    [
        "",
        "web",
        "web/",
        "/3",
        "web/x",
        "web/-1",
        "web/03",
        "web/+3",
        "web/3/4",
        "web/ 3",
        "web/\u0663",
        "WEB/3",
        "nssup/0",
    ],
)
def test_ids_that_are_none(worker_id: str) -> None:
    assert place_of(worker_id) is None
    assert restore(worker_id, keep(RUNNING)) is None


def test_ids() -> None:
    assert place_of("web/3") == ("web", 3)
    assert place_of("a-b_c/0") == ("a-b_c", 0)


def longest() -> Worker:
    """With everything as long as it can get, a hostile init included."""
    reason = "setup-failed:4294967295:-2147483648"
    ended = Exit(
        reason=reason,
        code=-(2**31),
        core=True,
        oom=True,
        timed_out=True,
        cpu_seconds=0.1,
        max_rss_bytes=2**64 - 1,
        at=0.1,
    )
    return replace(
        GOLDEN_KEPT,
        reason="setup-failed:capabilities:EPROTONOSUPPORT",
        generation=2**32 - 1,
        restarts=2**32 - 1,
        history=History(2**32 - 1, True),
        uptime=0.1,
        init_host_pid=2**22,
        host_pid=2**22,
        ns_pid=-(2**31),
        last_host_pid=2**22,
        last_ns_pid=-(2**31),
        stop_step=1000,
        outcome=State.STOPPED,
        exit=ended,
        last_exit=ended,
    )


def test_the_longest_worker_fits_without_its_last_exit() -> None:
    worker = longest()
    assert len(keep(worker)) <= BODY_MAX
    assert restore(worker.id, keep(worker)) == replace(worker, last_exit=None)
    assert restore(worker.id, keep(replace(worker, exit=None))) == replace(worker, exit=None)


# --- what init says ---------------------------------------------------------------------------------------------------


STRANGE_EXIT = told(Phase.EMPTY)._replace(exit=wire.Exit(-7, -9))
RUNS_AND_EXITED = told(Phase.RUNNING)._replace(exit=wire.Exit(1, 0))
FAILED_STATE = told(Phase.FAILED, step=20, error=1)


class Said(NamedTuple):
    kept: Worker
    state: wire.State
    becomes: State
    did: tuple[Action, ...] = ()
    spec: PoolSpec = WEB


SAID = {
    "as noted": Said(RUNNING, told(Phase.RUNNING), State.RUNNING),
    "still setting up": Said(BORN, told(Phase.SETUP), State.STARTING),
    "released and not begun": Said(BORN, told(Phase.WAITING), State.STARTING),
    "set-up failed": Said(BORN, FAILED_STATE, State.BACKOFF),
    "set-up failed, noted": Said(FAILING, told(Phase.FAILED, step=43, error=2), State.BACKOFF),
    "set-up failed, said of one that runs": Said(RUNNING, FAILED_STATE, State.STARTING, (Launch(2),)),
    "set-up failed in a stop": Said(KILLED_EARLY, FAILED_STATE, State.STOPPING),
    "ended meanwhile, tree there": Said(RUNNING, told(Phase.EXITED), State.STOPPING),
    "ended meanwhile": Said(RUNNING, told(Phase.EMPTY), State.STARTING, (Launch(2),)),
    "ended before it was known to run": Said(STARTED, told(Phase.EMPTY), State.BACKOFF),
    "ended before it was known to run, tree there": Said(BORN, told(Phase.EXITED), State.STOPPING),
    "ended, noted, tree there": Said(EXITED, told(Phase.EXITED), State.STOPPING),
    "ended, noted, empty now": Said(EXITED, told(Phase.EMPTY), State.BACKOFF),
    "ended for good": Said(RUNNING, told(Phase.EMPTY), State.STOPPING, spec=NEVER),
    "stop obeyed": Said(STOPPING, told(Phase.EMPTY), State.STOPPING),
    "stop obeyed, noted": Said(EXITED_IN_STOP, told(Phase.EMPTY), State.STOPPING),
    "restart obeyed": Said(RESTARTING, told(Phase.EMPTY), State.STARTING, (Launch(2),)),
    # What was noted and may not have been done.
    "the stop never reached it": Said(STOPPING, told(Phase.RUNNING, step=0), State.STOPPING, (TERM_1,)),
    "the stop reached it": Said(STOPPING, told(Phase.RUNNING, step=1), State.STOPPING),
    "the second step never reached it": Said(
        STOPPING_2, told(Phase.RUNNING, step=1), State.STOPPING, (SignalMain(1, 2),)
    ),
    "the second step reached it": Said(STOPPING_2, told(Phase.RUNNING, step=2), State.STOPPING),
    "the step is not in the config any more": Said(
        STOPPING_2, told(Phase.RUNNING, step=1), State.STOPPING, spec=replace(WEB, stop=LADDER[2:])
    ),
    "the kill never reached it": Said(KILLED_BY_STOP, told(Phase.RUNNING, step=2), State.STOPPING, (KILL_1,)),
    "the kill by hand never reached it": Said(KILLED_BY_HAND, told(Phase.RUNNING), State.RUNNING, (KILL_1,)),
    "the early kill never reached it": Said(KILLED_EARLY, told(Phase.SETUP), State.STOPPING, (KILL_1,)),
    "killed, and ended by itself": Said(KILLED_BY_STOP, told(Phase.EMPTY), State.STOPPING),
    # Over for us.
    "over": Said(OVER, told(Phase.EMPTY), State.STOPPING),
    "over, says it runs": Said(OVER, told(Phase.RUNNING), State.STOPPING, (KILL_1,)),
    "an older life, over": Said(SECOND_UP, told(Phase.EMPTY, 1), State.RUNNING),
    "an older life, failed": Said(SECOND_UP, told(Phase.FAILED, 1), State.RUNNING),
    "an older life, says it runs": Said(SECOND_UP, told(Phase.RUNNING, 1), State.RUNNING, (KILL_1,)),
    "an older life, not empty": Said(SECOND_UP, told(Phase.EXITED, 1), State.RUNNING, (KILL_1,)),
    # Forged.
    "a phase that is none": Said(RUNNING, told(77), State.RUNNING),
    "over without an exit": Said(RUNNING, told(Phase.EMPTY)._replace(exit=wire.Exit()), State.RUNNING),
    "runs and has an exit": Said(RUNNING, RUNS_AND_EXITED, State.RUNNING),
    "back to where it began": Said(RUNNING, told(Phase.WAITING), State.RUNNING),
    "an exit that is none": Said(RUNNING, STRANGE_EXIT, State.STARTING, (Launch(2),)),
    "more steps than there are": Said(STOPPING, told(Phase.RUNNING, step=2**32 - 1), State.STOPPING),
    "of a life to come": Said(RUNNING, told(Phase.EMPTY, 2), State.RUNNING),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_init_says(name: str) -> None:
    row = SAID[name]
    taken = Taken(slot_of(row.kept), HOLDS, (1,) if row.kept is SECOND_UP else (), spec=row.spec).hear(row.state)
    assert (taken.state, tuple(taken.did)) == (row.becomes, row.did)


def test_the_exit_of_a_life_that_nobody_watched_is_its_own() -> None:
    worker = Taken(slot_of(RUNNING), HOLDS, spec=NEVER).hear(told(Phase.EMPTY)).worker
    assert worker.last_exit == Exit(reason="exit:3", code=3, cpu_seconds=0.0015, max_rss_bytes=4096, at=NOW)
    assert worker.outcome is State.FAILED


def test_the_time_that_nobody_watched_is_no_uptime() -> None:
    """It crashed at once; that its supervisor was away for long does not make it a settled life."""
    crashed = Taken(slot_of(RUNNING), HOLDS).hear(told(Phase.EMPTY, at=THEN + 0.1))
    assert (crashed.state, crashed.worker.history) == (State.BACKOFF, History(waits=1))
    settled = Taken(slot_of(RUNNING), HOLDS).hear(told(Phase.EMPTY, at=THEN + 5))
    assert (settled.state, settled.worker.history) == (State.STARTING, History(spared=True))


@pytest.mark.parametrize("at", [0.001, THEN - 50, NOW + 1e9])
def test_a_time_that_cannot_be_is_not_believed(at: float) -> None:
    worker = Taken(slot_of(RUNNING), HOLDS).hear(told(Phase.EXITED, at=at)).worker
    assert worker.uptime is not None
    assert 0 <= worker.uptime <= NOW - THEN


def test_a_kill_that_nobody_answers_for_is_done_again() -> None:
    assert adopt.owed(KILLED_BY_STOP, LADDER, 1, None) == (KILL_1,)
    assert adopt.owed(STOPPING, LADDER, 1, None) == ()
    assert adopt.owed(RUNNING, LADDER, 1, None) == ()
    assert adopt.owed(SECOND_UP, LADDER, 1, None) == ()
    assert adopt.owed(None, LADDER, 1, None) == ()


def test_a_life_of_nobody_is_ended() -> None:
    assert adopt.owed(None, (), 4, told(Phase.RUNNING, 4)) == (KillTree(4),)
    assert adopt.owed(None, (), 4, told(Phase.EMPTY, 4)) == ()


@pytest.mark.parametrize(
    ("kept", "events"),
    [
        (BORN, (Started(1, 2001, 2), Running(1))),
        (STARTED, (Running(1),)),
        (RUNNING, ()),
        (STOPPING, ()),
        (KILLED_EARLY, (Started(1, 2001, 2),)),
    ],
)
def test_what_started_adds(kept: Worker, events: tuple[Input, ...]) -> None:
    assert adopt.known(kept, 2001, 2) == events


# --- everything the machine can get into, and everything an init can say ----------------------------------------------

SPECS = [
    WEB,
    NEVER,
    replace(NEVER, type="oneshot"),
    replace(WEB, workers=2, restart=RestartPolicy(settle=0.0)),
    replace(WEB, stop=(StopStep(None),)),
    GONE_POOL,
]
WISHES: tuple[Input, ...] = (Start(), Stop(), Restart(), Remove(), Kill(9, tree=True), Tick())


def news(worker: Worker) -> tuple[Input, ...]:
    """What its newest life may say: first of all that it was born."""
    generation = worker.generation
    if not worker.alive:
        return (Gone(generation),) if generation in worker.lingering else ()
    if worker.init_host_pid is None:
        return Launched(generation, 1000 + generation), LaunchFailed(generation, "setup-failed:clone:EAGAIN")
    return (
        Started(generation, 2000 + generation, 2),
        Running(generation),
        SetupFailed(generation, "exec-failed:ENOENT"),
        Exited(generation, CODE_0),
        Exited(generation, CODE_3, empty=True),
        Empty(generation),
        Gone(generation),
    )


def reachable(spec: PoolSpec, depth: int) -> list[Worker]:
    """Workers that some story of so many events leads to."""
    found = {lived(): None}
    edge = list(found)
    for _ in range(depth):
        fresh = []
        for worker in edge:
            here = (*WISHES, *news(worker), *(Gone(one) for one in worker.lingering))
            for event in here:
                try:
                    after, _ = machine.step(worker, spec, event, (worker.deadline or THEN) + 0.5, "seed")
                except ImpossibleEvent:
                    continue  # a story that no life tells
                if after not in found:
                    found[after] = None
                    fresh.append(after)
        edge = fresh
    return list(found)


def hostile(generation: int) -> Iterator[wire.State]:
    exits = (wire.Exit(), wire.Exit(1, 0), wire.Exit(2, 9, boottime_ns=int(150e9)), wire.Exit(-1, -(2**31), 2**64 - 1))
    for phase, step, ended in itertools.product((*Phase, 77), (0, 1, 2**32 - 1), exits):
        yield wire.State(generation, 2, phase, 9, -7, step, -5, 3, ended)


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_from_wherever_it_was_left_it_comes_to_rest(spec: PoolSpec) -> None:
    """Whatever was noted last, whatever the kernel says of it and its init tells: no impossible event, never two lives,
    and when nothing is left of it, a state that says so."""
    chance = random.Random(7)
    lives = [worker for worker in reachable(NEVER if spec is GONE_POOL else spec, 6) if worker.generation]
    for worker in chance.sample(lives, min(len(lives), 350)):
        assert restore(worker.id, keep(worker)) == replace(worker, lingering=())
        states = list(hostile(worker.generation))
        for fact in (HOLDS, GONE, UNKNOWN):
            older = tuple(one for one in worker.lingering if one != worker.generation)
            for state in chance.sample(states, 3) if fact is HOLDS else (None,):
                taken = Taken(slot_of(worker), fact, older, spec=spec)
                goes_through(taken, worker, fact, state)


def goes_through(taken: Taken, worker: Worker, fact: Fact, state: wire.State | None) -> None:
    number = worker.generation
    if state is not None:
        taken.hear(state)
        if taken.id in taken.set.workers and taken.worker.alive and taken.worker.generation == number:
            taken.feed(*adopt.known(taken.worker, 2001, 2))
    launches = [action for action in taken.did if isinstance(action, Launch)]
    assert len(launches) <= 1
    if fact is HOLDS and worker.alive and not launches:
        taken.feed(Gone(number))
    if fact is HOLDS and not worker.alive:
        taken.feed(Gone(number))
    taken.feed(*(Gone(one) for one in worker.lingering))
    if taken.id not in taken.set.workers:
        return
    after = taken.worker
    assert not (after.alive and after.generation == number and not launches), "its end was not understood"
    assert after.state is not State.STOPPING or after.generation > number or launches
