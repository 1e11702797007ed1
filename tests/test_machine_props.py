"""The whole core against a model of the kernel that Hypothesis plays as nastily as a kernel may.

The model keeps what a life can still say (in its order, and late), and refuses what no supervisor may do.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from nssup import machine
from nssup.events import (
    Alive,
    CommandFailed,
    Empty,
    Event,
    Exit,
    Exited,
    Fail,
    Gone,
    Input,
    Kill,
    Launched,
    LaunchFailed,
    LifeInput,
    Passed,
    Ready,
    Reload,
    Reset,
    Restart,
    Running,
    SetupFailed,
    Sick,
    Start,
    Started,
    State,
    Stop,
    Tick,
    Unready,
)
from nssup.machine import (
    TABLE,
    Forget,
    KillTree,
    Launch,
    RunCommand,
    SignalMain,
    SignalTree,
    Worker,
    asks_readiness,
)
from nssup.restart import FAULTS, NEVER_RAN, TOO_MANY
from nssup.spec import Backoff, Intensity, PoolSpec, Probe, ReloadSpec, Requirement, RestartPolicy, Rule, StopStep
from nssup.workers import EVENTS, Actions, WorkerSet

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

QUICK = Backoff(first=0.5, max=4.0, reset_after=20.0)
SPECS = {
    "always": PoolSpec(name="always", command=("app",), workers=2, restart=RestartPolicy(backoff=QUICK)),
    "careful": PoolSpec(
        name="careful",
        command=("app",),
        restart=RestartPolicy(policy="on-failure", settle=0.0, backoff=QUICK),
        stop=(StopStep(15, 2.0), StopStep(2, 0.0), StopStep(3, 1.0), StopStep(None)),
    ),
    "once": PoolSpec(
        name="once",
        command=("app",),
        type="oneshot",
        enabled=False,
        restart=RestartPolicy(policy="never"),
        stop=(StopStep(None),),
    ),
    "probed": PoolSpec(
        name="probed",
        command=("app",),
        workers=2,
        restart=RestartPolicy(backoff=QUICK),
        stop=(StopStep(None, 1.0, ("quit",)), StopStep(15, 1.0), StopStep(None)),
        startup=Probe(log="begun"),
        ready=Probe(notify="sd"),
        start_timeout=3.0,
        watchdog=5.0,
    ),
    "asked": PoolSpec(name="asked", command=("app",), restart=RestartPolicy(policy="never"), ready=Probe(notify="fd")),
    "strict": PoolSpec(
        name="strict",
        command=("app",),
        workers=2,
        restart=RestartPolicy(
            settle=0.2,
            backoff=QUICK,
            intensity=Intensity(deaths=3, within=30.0, then="fail-pool"),
            rules=(Rule(then="stop", exit=(3,)), Rule(then="restart-now", signal=(11,))),
        ),
        reload=ReloadSpec(signal=1),
    ),
    "patient": PoolSpec(
        name="patient",
        command=("app",),
        restart=RestartPolicy(backoff=QUICK, intensity=Intensity(deaths=2, within=10.0, then="backoff")),
    ),
    "bare": PoolSpec(
        name="bare",
        command=("app",),
        init=False,
        restart=RestartPolicy(policy="on-failure", rules=(Rule(then="stop", exit=(3,)),)),
    ),
    "needy": PoolSpec(
        name="needy",
        command=("app",),
        restart=RestartPolicy(settle=0.0, backoff=QUICK),
        requires={"base": Requirement(lost="restart")},
    ),
    "fickle": PoolSpec(
        name="fickle",
        command=("app",),
        restart=RestartPolicy(policy="never"),
        requires={"base": Requirement(), "ground": Requirement()},
    ),
    "hopeful": PoolSpec(
        name="hopeful",
        command=("app",),
        restart=RestartPolicy(settle=0.0, backoff=QUICK),
        requires={"base": Requirement()},
    ),
    "frail": PoolSpec(
        name="frail",
        command=("app",),
        restart=RestartPolicy(policy="on-failure", backoff=QUICK),
        requires={"base": Requirement(when="started", lost="stop")},
    ),
}
BASES = {
    name: PoolSpec(name=name, command=("app",), restart=RestartPolicy(backoff=QUICK)) for name in ("base", "ground")
}
EXITS = [
    Exit(reason="exit:0", code=0, at=1.0),
    Exit(reason="exit:3", code=3, at=1.0),
    Exit(reason="signal:SIGSEGV", signal=11, at=1.0),
]
HEALTH = [Passed(0), Ready(0), Unready(0, "probe-failed"), Sick(0, "probe-failed"), Alive(0), CommandFailed(0, 0)]
T = TypeVar("T")

NAMES = st.sampled_from(sorted(SPECS))
NUMBERS = st.integers(0, 1000)
FINAL = {State.STOPPED, State.FAILED, State.DONE}


class Life:
    """One life as the kernel knows it. stage: 0 asked for, 1 init there, 2 the process there, 3 the program runs.

    failed: its set-up failed. ended: its program ended. killed: its tree was. over: its namespace is empty.
    """

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.stage = 0
        self.failed = False
        self.ended = False
        self.killed = False
        self.over = False


class Core(RuleBasedStateMachine):
    """What operators and timers do, and what the kernel does to a life that is there, in any order it may."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.seq = 0
        self.states: dict[str, str] = {}  # as told by events
        self.lives: dict[str, list[Life]] = {}  # those not reaped, oldest first
        self.newest: dict[str, int] = {}  # generations ever launched, by id
        self.wanted: dict[str, bool] = {}  # what operators said last
        self.deaths: dict[str, list[float]] = {}  # since then
        self.name = ""  # the pool's
        self.leaving = False  # the pool is being removed
        self.resizing = False  # its size is being changed
        self.set = WorkerSet(self.published, epoch=7, seed="seed")

    # --- what the model watches ------------------------------------------------------------------------------------

    def published(self, event: Event) -> None:
        assert event.event in EVENTS
        self.seq += 1
        assert event.seq == self.seq
        if event.event == "pool_removed":
            assert self.leaving
            self.leaving = False
            self.newest.clear()
        if event.worker is not None and event.to is not None:
            assert event.from_ == self.states.get(event.worker, "stopped")
            self.states[event.worker] = event.to
        elif event.worker is not None and event.event == "removed":
            assert self.states.pop(event.worker, "stopped") == "stopped"

    def do(self, actions: Actions) -> None:
        for worker_id, action in actions:
            lives = self.lives.setdefault(worker_id, [])
            if isinstance(action, Launch):
                self.launch(worker_id, lives, action.generation)
            elif isinstance(action, Forget):
                assert not self.lives.pop(worker_id), "forgotten while something of it is left"
                assert not self.wanted.pop(worker_id, False) or self.resizing
                self.deaths.pop(worker_id, None)
            else:
                assert isinstance(action, SignalMain | SignalTree | KillTree | RunCommand)
                self.signal(lives, action)

    def launch(self, worker_id: str, lives: list[Life], generation: int) -> None:
        assert all(life.over for life in lives), "a second life beside one that is not over"
        assert generation > self.newest.get(worker_id, 0), "a generation came twice"
        sized = self.resizing and int(worker_id.partition("/")[2]) < self.set.pools[worker_id.partition("/")[0]].workers
        assert sized or self.wanted.get(worker_id), "launched though an operator wants it down"
        if limit := self.set.pools[worker_id.partition("/")[0]].restart.intensity:
            recent = [at for at in self.deaths.get(worker_id, []) if at > self.now - limit.within + 1e-6]
            assert len(recent) < limit.deaths, "launched though it died too often"
        assert self.set.dependencies.blocker(worker_id.partition("/")[0]) is None, "launched before what it requires"
        self.newest[worker_id] = generation
        lives.append(Life(generation))

    def signal(self, lives: list[Life], action: SignalMain | SignalTree | KillTree | RunCommand) -> None:
        assert lives, "a signal to nobody"
        life = lives[-1]
        assert life.generation == action.generation
        assert not life.over, "a signal to a life that is over"
        assert life.stage > 0, "a signal to what is not launched"
        life.killed |= isinstance(action, KillTree)
        if isinstance(action, SignalMain | RunCommand):
            assert life.stage > 1, "a signal to a program that is not there"
            assert not life.ended, "a signal to a program that has ended"

    def feed(self, worker_id: str, event: Input) -> None:
        before = self.set.workers[worker_id]
        actions = self.set.feed(worker_id, event, self.now)
        if after := self.set.workers.get(worker_id):
            self.notice(before, after)
            if after.reason == TOO_MANY and before.reason != TOO_MANY:
                self.the_pool_is_going_down()
        self.do(actions)

    def the_pool_is_going_down(self) -> None:
        for worker in self.set.workers.values():
            down = worker.state in FINAL or worker.condemned or worker.outcome is not None or not worker.want_up
            assert down, f"{worker.id} goes on though one of its pool died too often"

    def notice(self, before: Worker, after: Worker) -> None:
        """An end by itself, and what may follow from it without an operator's word."""
        ended = after.last_exit
        if after.last_life == before.last_life or ended is None or before.again or before.condemned:
            return
        if before.want_up and not ended.reason.startswith(NEVER_RAN):
            self.deaths.setdefault(before.id, []).append(self.now)
        halts = any(rule.then == "stop" and ended.code in rule.exit for rule in SPECS[self.name].restart.rules)
        if halts and ended.reason not in FAULTS:
            self.wanted[before.id] = False

    # --- what operators do -----------------------------------------------------------------------------------------

    def resize(self, change: Callable[[], Actions]) -> None:
        self.resizing = True
        self.do(change())
        self.resizing = False
        self.deaths.clear()
        for worker_id, worker in self.set.workers.items():
            self.wanted[worker_id] = worker.want_up
            assert worker.index < self.set.pools[worker.pool].workers or not worker.want_up

    @initialize(name=NAMES)
    def begin(self, name: str) -> None:
        self.name = name
        for base in SPECS[name].requires:
            self.add_base(base)
        self.add_pool()

    def add_base(self, name: str) -> None:
        self.resize(lambda: self.set.add_pool(BASES[name], self.now))

    @precondition(lambda self: self.name not in self.set.pools)
    @rule()
    def add_pool(self) -> None:
        self.resize(lambda: self.set.add_pool(SPECS[self.name], self.now))

    @precondition(lambda self: self.name in self.set.pools)
    @rule(sure=st.integers(0, 9))
    def remove_pool(self, sure: int) -> None:
        if sure == 0:
            self.leaving = True
            self.resize(lambda: self.set.remove_pool(self.name, self.now))

    @precondition(lambda self: self.name in self.set.pools and not self.leaving)
    @rule(wanted=st.sampled_from([0, 1, 1, 2]))
    def scale(self, wanted: int) -> None:
        self.resize(lambda: self.set.scale(self.name, wanted, self.now))

    def worker(self, number: int) -> Worker:
        workers = list(self.set.workers.values())
        return workers[number % len(workers)]

    @precondition(lambda self: self.set.workers)
    @rule(number=NUMBERS, event=st.sampled_from([Start(), Stop(), Restart()]))
    def wish(self, number: int, event: Input) -> None:
        worker = self.worker(number)
        if isinstance(event, Stop):
            self.wanted[worker.id] = False
        elif worker.index < self.set.pools[worker.pool].workers:
            self.wanted[worker.id] = True
            self.deaths.pop(worker.id, None)
        self.feed(worker.id, event)

    @precondition(lambda self: self.set.workers)
    @rule(number=NUMBERS, event=st.sampled_from([Reset(), Reload(), Fail()]))
    def ask(self, number: int, event: Input) -> None:
        worker = self.worker(number)
        if isinstance(event, Reset):
            self.deaths.pop(worker.id, None)
            if State.FAILED in (worker.state, worker.outcome) or worker.condemned:
                self.wanted[worker.id] = False
        self.feed(worker.id, event)

    @precondition(lambda self: self.set.workers)
    @rule(number=NUMBERS, signo=st.sampled_from([1, 9]), tree=st.booleans())
    def kill(self, number: int, signo: int, tree: bool) -> None:
        self.feed(self.worker(number).id, Kill(signo, tree))

    # --- what time does --------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.3, 1.5, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.set.due(self.now))

    @rule(early=st.sampled_from([0.0, 0.001]))
    def alarm(self, early: float) -> None:
        deadline = self.set.next_deadline()
        if deadline is not None:
            self.now = max(self.now, deadline - early)
            self.do(self.set.due(self.now))

    @rule(number=NUMBERS)
    def come_up(self, number: int) -> None:
        """A life that comes up as most do."""
        while found := self.life(number, stages=range(3)):
            if found[1].failed or found[1].ended:
                break
            if found[1].stage == 0:
                self.launched(number, 1)
            else:
                self.set_up(number, 1)

    @precondition(lambda self: self.set.workers)
    @rule(number=NUMBERS)
    def stray_tick(self, number: int) -> None:
        self.feed(self.worker(number).id, Tick())

    # --- what the kernel does --------------------------------------------------------------------------------------

    def life(self, number: int, *, stages: range, also_over: bool = False) -> tuple[str, Life] | None:
        """One of the lives that can say something now. A killed one may have said it before."""
        found = [
            (worker_id, life)
            for worker_id, lives in self.lives.items()
            for life in lives
            if life.stage in stages and (also_over or not life.over)
        ]
        return found[number % len(found)] if found else None

    @rule(number=NUMBERS, works=st.integers(0, 4))
    def launched(self, number: int, works: int) -> None:
        if found := self.life(number, stages=range(1)):
            worker_id, life = found
            life.stage = 1
            if works:
                self.feed(worker_id, Launched(life.generation, 5))
            else:
                self.lives[worker_id].remove(life)
                self.feed(worker_id, LaunchFailed(life.generation, "setup-failed:clone:EAGAIN"))

    @rule(number=NUMBERS, works=st.integers(0, 4))
    def set_up(self, number: int, works: int) -> None:
        """The next message of a life on its way to its program."""
        found = self.life(number, stages=range(1, 3))
        if not found or found[1].failed or found[1].ended:
            return
        worker_id, life = found
        if not works:
            life.failed = True
            self.feed(worker_id, SetupFailed(life.generation, "exec-failed:ENOENT"))
        elif life.stage == 1:
            life.stage = 2
            self.feed(worker_id, Started(life.generation, 6, 2))
        else:
            life.stage = 3
            self.feed(worker_id, Running(life.generation))

    @rule(number=NUMBERS, what=st.sampled_from(HEALTH))
    def says(self, number: int, what: LifeInput) -> None:
        """What a program that runs says of itself, and what is found out about it."""
        found = self.life(number, stages=range(2 if isinstance(what, Ready | Alive) else 3, 4))
        if found and not found[1].ended and not found[1].failed:
            if isinstance(what, Alive):
                what = Alive(0, self.now - 0.001, number % 3, self.now - number % 2)
            self.feed(found[0], replace(what, generation=found[1].generation))

    @rule(number=NUMBERS, end=st.sampled_from(EXITS), empty=st.booleans())
    def exited(self, number: int, end: Exit, empty: bool) -> None:
        found = self.life(number, stages=range(2, 4))
        if found and not found[1].ended and not found[1].failed and self.has_init():
            worker_id, life = found
            life.ended, life.over = True, empty
            self.feed(worker_id, Exited(life.generation, end, empty))

    @rule(number=NUMBERS)
    def empty(self, number: int) -> None:
        found = self.life(number, stages=range(1, 4))
        if found and (found[1].ended or found[1].failed or number % 10 == 0) and self.has_init():
            worker_id, life = found
            life.over = True
            self.feed(worker_id, Empty(life.generation))

    @rule(number=NUMBERS, end=st.sampled_from([None, *EXITS]))
    def gone(self, number: int, end: Exit | None) -> None:
        if found := self.life(number, stages=range(1, 4), also_over=True):
            worker_id, life = found
            life.over = True
            self.lives[worker_id].remove(life)
            self.feed(worker_id, Gone(life.generation, end))

    @precondition(lambda self: self.set.workers)
    @rule(
        number=NUMBERS, kind=st.sampled_from([Exited, Empty, Gone, Running, Launched, Started]), old=st.integers(0, 3)
    )
    def late(self, number: int, kind: type[LifeInput], old: int) -> None:
        """News that nobody needs any more."""
        worker = self.worker(number)
        live = {life.generation for life in self.lives.get(worker.id, [])}
        generation = max(worker.generation - old, 0)
        if generation not in live:
            args = {Exited: (EXITS[0],), Launched: (5,), Started: (6, 2)}.get(kind, ())
            before = self.set.workers[worker.id]
            self.feed(worker.id, kind(generation, *args))
            assert self.set.workers[worker.id] == before

    def has_init(self) -> bool:
        return SPECS[self.name].init

    # --- what holds at every moment --------------------------------------------------------------------------------

    @invariant()
    def the_workers_know_their_lives(self) -> None:
        for worker_id, worker in self.set.workers.items():
            lives = self.lives.get(worker_id, [])
            assert worker.alive == any(not life.over for life in lives)
            assert set(worker.lingering) == {life.generation for life in lives if life.over}
            assert worker.generation == self.newest.get(worker_id, worker.generation)
            if worker.pool == "frail" and (worker.reason or "").startswith("dependency:"):
                self.wanted[worker_id] &= worker.want_up  # a loss is as good as an operator
            assert worker.want_up == self.wanted[worker_id]
            assert not worker.alive or worker.killed == lives[-1].killed

    @invariant()
    def a_final_state_is_a_proof(self) -> None:
        for worker_id, worker in self.set.workers.items():
            assert worker.state.value == self.states.get(worker_id, "stopped")
            if worker.state in FINAL:
                assert not self.lives.get(worker_id)
            if worker.state is State.STOPPED:
                assert not worker.want_up
            if worker.state in (State.STARTING, State.RUNNING):
                assert worker.alive
                assert worker.want_up
            if worker.state in (State.BACKOFF, State.WAITING):
                assert not worker.alive
                assert worker.want_up
            if worker.state is State.WAITING:
                assert worker.reason == self.set.dependencies.reason(worker.pool) is not None
            if worker.held:
                assert (worker.state, worker.pool in BASES) == (State.STOPPING, True)
                assert any(w.state is State.STOPPING for w in self.set.workers.values() if w.pool not in BASES)
            assert not worker.ready or worker.state is State.RUNNING
            assert (worker.up_since is not None) <= (worker.running_since is not None)
            if worker.state is State.RUNNING:
                assert worker.up_since is not None

    @invariant()
    def a_deadline_is_where_one_is_needed(self) -> None:
        deadlines = []
        for worker in self.set.workers.values():
            waits = worker.stop_step is not None or worker.exit is not None
            in_step = worker.alive and not worker.killed and waits
            spec = self.set.pools[worker.pool]
            needed = {
                State.BACKOFF: True,
                State.STOPPING: in_step,
                State.STARTING: worker.init_host_pid is not None and asks_readiness(spec) and not worker.killed,
                State.RUNNING: spec.watchdog is not None and not worker.killed,
            }
            assert (worker.deadline is not None) == needed.get(worker.state, False)
            deadlines += [] if worker.deadline is None else [worker.deadline]
        assert self.set.next_deadline() == min(deadlines, default=None)

    @invariant()
    def a_pool_has_the_workers_it_wants(self) -> None:
        for name, spec in self.set.pools.items():
            mine = [worker for worker in self.set.workers.values() if worker.pool == name]
            assert {worker.index for worker in mine if not worker.removing} >= set(range(spec.workers)) - {
                worker.index for worker in mine if worker.removing
            }
            assert all(worker.removing for worker in mine if worker.index >= spec.workers)
        assert {worker.pool for worker in self.set.workers.values()} <= set(self.set.pools)
        assert not self.leaving or self.name in self.set.pools

    def check(self) -> None:
        self.the_workers_know_their_lives()
        self.a_final_state_is_a_proof()
        self.a_deadline_is_where_one_is_needed()
        self.a_pool_has_the_workers_it_wants()

    # --- what is reached from every moment -------------------------------------------------------------------------

    def teardown(self) -> None:
        """Everything is removed, and ends although the programs are deaf: what is killed dies. Nothing is left."""
        if self.name in self.set.pools and not self.leaving:
            self.remove_pool(0)
        for _ in range(10):
            self.die()
        for name in list(self.set.pools):
            self.remove_base(name)
        assert not self.set.workers
        assert not self.set.pools
        assert self.set.next_deadline() is None

    def remove_base(self, name: str) -> None:
        self.leaving = True
        self.resize(lambda: self.set.remove_pool(name, self.now))
        for _ in range(10):
            self.die()

    def die(self) -> None:
        """Launches asked for happen, what was killed or ended by itself is reaped, and the next timer fires."""
        while self.life(0, stages=range(1)):
            self.launched(0, 1)
        for worker_id, lives in list(self.lives.items()):
            for life in list(lives):
                if life.over or life.ended or life.failed or life.killed:
                    lives.remove(life)
                    life.over = True
                    self.feed(worker_id, Gone(life.generation))
        self.alarm(0.0)


def test_no_order_of_events_breaks_the_rules() -> None:
    run_state_machine_as_test(
        Core,
        settings=settings(
            derandomize=True,
            database=None,
            max_examples=100,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_declared_way_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long walks by chance through the same model: no edge declares a state that it cannot lead to, and vice versa."""
    gone: set[tuple[State, type[Input], State]] = set()
    step = machine.step

    def watched(w: Worker, spec: PoolSpec, event: Input, *args: object) -> machine.Step:
        after = step(w, spec, event, *args)  # type: ignore[arg-type]
        late = isinstance(event, LifeInput) and (event.generation < w.generation or not w.alive)
        if (w.state, type(event)) in TABLE and (isinstance(event, Gone) or not late):
            gone.add((w.state, type(event), after[0].state))
        return after

    monkeypatch.setattr(machine, "step", watched)
    done_without_what_it_required()
    silent_for_too_long()
    names = [*sorted(SPECS), "probed"]  # which has the longest ways
    for walk in range(1000):
        stroll(random.Random(walk), names[walk % len(names)])
    # Nothing leads to lost but adoption, which is not part of this model.
    declared = {(state, kind, to) for (state, kind), edge in TABLE.items() for to in edge.to if state is not State.LOST}
    assert not {str(way) for way in declared - gone}
    assert not {str(way) for way in gone - declared}


def done_without_what_it_required() -> None:
    """Which chance finds seldom, as the next one."""
    for event in (Start(), Restart()):
        core = Core()
        core.begin("fickle")
        for _ in range(3):
            core.come_up(0)
            core.come_up(1)
        fickle, base = core.set.workers["fickle/0"], core.set.workers["base/0"]
        core.feed("fickle/0", Exited(fickle.generation, EXITS[0], empty=True))
        core.lives["fickle/0"].clear()
        core.feed("fickle/0", Gone(fickle.generation))
        core.wanted["base/0"] = False
        core.feed("base/0", Stop())
        core.lives["base/0"].clear()
        core.feed("base/0", Gone(base.generation))
        core.wanted["fickle/0"] = True
        core.feed("fickle/0", event)
        core.check()
        core.teardown()


def silent_for_too_long() -> None:
    core = Core()
    core.begin("probed")
    for _ in range(3):
        core.come_up(0)
        core.come_up(1)
    for worker_id in list(core.set.workers):
        core.feed(worker_id, Ready(1))
    core.alarm(0.0)
    core.check()
    core.teardown()


def stroll(chance: random.Random, name: str) -> None:
    core = Core()
    core.begin(name)

    def number() -> int:
        return chance.randrange(1000)

    def one_of(*values: T) -> T:
        return chance.choice(values)

    ways: list[Callable[[], None]] = [
        lambda: core.remove_pool(number() % 50),
        lambda: core.scale(one_of(0, 1, 2)),
        lambda: core.wish(number(), one_of(Start(), Start(), Stop(), Restart())),
        lambda: core.kill(number(), one_of(1, 9), one_of(False, True)),
        lambda: core.ask(number(), one_of(Reset(), Reload(), Fail())),
        lambda: core.wait(one_of(0.0, 0.001, 1.5)),
        lambda: core.alarm(one_of(0.0, 0.001)),
        lambda: core.stray_tick(number()),
        lambda: core.late(number(), one_of(Exited, Empty, Gone, Running, Launched, Started), number() % 4),
        *2 * [lambda: core.launched(number(), number() % 5)],
        *2 * [lambda: core.set_up(number(), number() % 5)],
        *2 * [lambda: core.come_up(number())],
        *2 * [lambda: core.says(number(), one_of(*HEALTH))],
        *2 * [lambda: core.exited(number(), one_of(*EXITS), one_of(False, True))],
        *2 * [lambda: core.empty(number())],
        *2 * [lambda: core.gone(number(), one_of(None, *EXITS))],
    ]
    for _ in range(200):
        if core.name not in core.set.pools:
            core.add_pool()
        if core.leaving or not core.set.workers:
            core.die()
        else:
            chance.choice(ways)()
        core.check()
    core.teardown()
