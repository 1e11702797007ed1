from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nssup import machine
from nssup.errors import ImpossibleEvent
from nssup.events import (
    Alive,
    CommandFailed,
    DependencyLost,
    Empty,
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
    Released,
    Reload,
    Remove,
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
    Unblocked,
    Unready,
)
from nssup.machine import (
    ALONE,
    IGNORED,
    REST,
    TABLE,
    Action,
    Around,
    Edge,
    Forget,
    KillTree,
    Launch,
    SignalMain,
    SignalTree,
    Worker,
    step,
)
from nssup.spec import Backoff, PoolSpec, RestartPolicy, StopStep

if TYPE_CHECKING:
    from collections.abc import Callable

WISHES: list[type[Input]] = [Start, Stop, Restart, Remove, Kill, Reset, Reload, Fail]
HEALTH: list[type[LifeInput]] = [Passed, Ready, Unready, Sick, Alive, CommandFailed]
NEWS: list[type[LifeInput]] = [Launched, LaunchFailed, Started, Running, SetupFailed, Exited, Empty, Gone, *HEALTH]
BETWEEN: list[type[Input]] = [Unblocked, DependencyLost, Released]
INPUTS = [*WISHES, *NEWS, *BETWEEN, Tick]

NEVER = RestartPolicy(policy="never")
ON_FAILURE = RestartPolicy(policy="on-failure")
STEADY = RestartPolicy(backoff=Backoff(jitter=0.0))
CODE_0 = Exit(reason="exit:0", code=0, at=1.0)
CODE_3 = Exit(reason="exit:3", code=3, at=1.0)


def web(**fields: object) -> PoolSpec:
    return PoolSpec(name="web", command=("app",), **{"restart": STEADY, **fields})  # type: ignore[arg-type]


class Story:
    """A worker and its spec, told what happens; remembers the actions of the last thing told."""

    def __init__(self, spec: PoolSpec | None = None) -> None:
        self.spec = spec or web()
        self.worker = Worker(pool="web", index=3)
        self.now = 100.0
        self.around = ALONE
        self.did: tuple[Action, ...] = ()

    def copy(self) -> Story:
        return copy.copy(self)

    def tell(self, *events: Input) -> Story:
        for event in events:
            self.worker, self.did = step(self.worker, self.spec, event, self.now, "seed", self.around)
        return self

    def later(self, seconds: float) -> Story:
        self.now += seconds
        return self

    def up(self, uptime: float = 0.0) -> Story:
        """Its newest life comes up, and stays so for uptime seconds."""
        g = self.worker.generation
        return self.tell(Launched(g, 1000 + g), Started(g, 2000 + g, 2), Running(g)).later(uptime)

    def told(self, event: type[LifeInput], *args: object) -> Story:
        """News of the newest life."""
        return self.tell(event(self.worker.generation, *args))

    @property
    def state(self) -> State:
        return self.worker.state


def running(spec: PoolSpec | None = None, uptime: float = 0.0) -> Story:
    return Story(spec).tell(Start()).up(uptime)


# --- the table -----------------------------------------------------------------------------------------------------


def test_every_pair_is_either_an_edge_or_said_to_be_ignored() -> None:
    assert set(INPUTS) == {kind for _, kind in TABLE} | {kind for _, kind in IGNORED}
    assert not TABLE.keys() & IGNORED
    assert TABLE.keys() | IGNORED == {(state, kind) for state in State for kind in INPUTS}


def example(kind: type[Input], generation: int = 1) -> Input:
    examples: dict[type[Input], Input] = {
        Start: Start(),
        Stop: Stop(),
        Restart: Restart(),
        Remove: Remove(),
        Kill: Kill(1),
        Reset: Reset(),
        Reload: Reload(),
        Fail: Fail(),
        Tick: Tick(),
        Launched: Launched(generation, 5),
        LaunchFailed: LaunchFailed(generation, "setup-failed:clone:EAGAIN"),
        Started: Started(generation, 6, 2),
        Running: Running(generation),
        SetupFailed: SetupFailed(generation, "exec-failed:ENOENT"),
        Exited: Exited(generation, CODE_3),
        Empty: Empty(generation),
        Gone: Gone(generation),
        Passed: Passed(generation),
        Ready: Ready(generation),
        Unready: Unready(generation, "probe-failed"),
        Sick: Sick(generation, "probe-failed"),
        Alive: Alive(generation),
        CommandFailed: CommandFailed(generation, 0),
        Unblocked: Unblocked(),
        DependencyLost: DependencyLost("db", "restart"),
        Released: Released(),
    }
    return examples[kind]


@pytest.mark.parametrize(("state", "kind"), sorted(IGNORED, key=str))
def test_what_is_ignored_changes_nothing(state: State, kind: type[Input]) -> None:
    story = in_state(state)
    assert story.state is state
    before = story.worker
    after, actions = step(before, story.spec, example(kind, before.generation), story.now + 1000)
    assert after == before
    assert actions == ()


def lost() -> Story:
    """Nothing leads there but adoption."""
    story = Story()
    story.worker = Worker(pool="web", index=3, state=State.LOST, reason="lost:EPERM", want_up=True, generation=4)
    return story


@pytest.mark.parametrize(("event", "did"), [(Stop(), ()), (Remove(), (Forget(),))])
def test_what_is_lost_is_never_signalled_and_only_an_operator_lets_go_of_it(
    event: Input, did: tuple[Action, ...]
) -> None:
    story = lost().tell(Start(), Restart(), Kill(9, True))
    assert (story.state, story.did) == (State.LOST, ())
    story.tell(event)
    assert (story.state, story.did, story.worker.want_up) == (State.STOPPED, did, False)


def waiting() -> Story:
    story = running().tell(Restart())
    story.around = Around("db")
    return story.told(Exited, CODE_0, True)


def in_state(state: State) -> Story:
    ways: dict[State, Callable[[], Story]] = {
        State.STOPPED: lambda: running().tell(Stop()).told(Gone),
        State.WAITING: waiting,
        State.STARTING: lambda: Story().tell(Start(), Launched(1, 5), Started(1, 6, 2)),
        State.RUNNING: running,
        State.STOPPING: lambda: running().tell(Stop()),
        State.BACKOFF: lambda: running().told(Exited, CODE_3, True),
        State.FAILED: lambda: running(web(restart=NEVER)).told(Gone),
        State.DONE: lambda: running(web(restart=NEVER)).told(Exited, CODE_0, True).told(Gone),
        State.LOST: lost,
    }
    return ways[state]()


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", NEWS)
def test_news_of_a_life_never_launched_is_our_bug(state: State, kind: type[LifeInput]) -> None:
    story = in_state(state)
    with pytest.raises(ImpossibleEvent, match="in generation"):
        story.tell(example(kind, story.worker.generation + 1))


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", NEWS)
def test_news_of_a_life_long_gone_changes_nothing(state: State, kind: type[LifeInput]) -> None:
    story = in_state(state)
    before = story.worker
    assert story.tell(example(kind, 0)).worker == before
    assert story.did == ()


def test_an_edge_that_leads_where_it_did_not_say_is_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    table = dict(TABLE)
    table[State.STOPPED, Start] = Edge(TABLE[State.STOPPED, Start].do, frozenset({State.DONE}))
    monkeypatch.setattr(machine, "TABLE", table)
    with pytest.raises(ImpossibleEvent, match="no edge declares"):
        Story().tell(Start())


def test_the_page_drawn_from_the_table_is_up_to_date() -> None:
    script = Path(__file__).parent.parent / "scripts" / "states"
    done = subprocess.run([sys.executable, script, "--check"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- coming up -----------------------------------------------------------------------------------------------------


def test_a_start_launches_the_next_generation() -> None:
    story = Story().tell(Start())
    assert story.did == (Launch(1),)
    assert (story.state, story.worker.generation, story.worker.want_up) == (State.STARTING, 1, True)
    assert story.worker.launched_at == 100.0


def test_a_life_comes_up_step_by_step() -> None:
    story = Story().tell(Start(), Launched(1, 5))
    assert (story.state, story.worker.init_host_pid, story.worker.host_pid) == (State.STARTING, 5, None)
    story.tell(Started(1, 6, 2))
    assert (story.state, story.worker.host_pid, story.worker.ns_pid) == (State.STARTING, 6, 2)
    story.later(1.5).tell(Running(1))
    assert (story.state, story.worker.running_since, story.worker.reason) == (State.RUNNING, 101.5, None)


@pytest.mark.parametrize(
    ("policy", "state"), [(STEADY, State.BACKOFF), (ON_FAILURE, State.BACKOFF), (NEVER, State.FAILED)]
)
def test_a_launch_that_failed(policy: RestartPolicy, state: State) -> None:
    story = Story(web(restart=policy)).tell(Start(), LaunchFailed(1, "setup-failed:clone:EAGAIN"))
    assert (story.state, story.worker.reason) == (state, "setup-failed:clone:EAGAIN")
    assert story.worker.last_exit == Exit(reason="setup-failed:clone:EAGAIN")
    assert not story.worker.lingering


@pytest.mark.parametrize(("policy", "state"), [(STEADY, State.BACKOFF), (NEVER, State.FAILED)])
def test_a_set_up_that_failed_ends_with_the_empty_namespace(policy: RestartPolicy, state: State) -> None:
    story = Story(web(restart=policy)).tell(Start(), Launched(1, 5), SetupFailed(1, "exec-failed:ENOENT"))
    assert story.state is State.STARTING
    story.tell(Empty(1), Gone(1))
    assert (story.state, story.worker.reason) == (state, "exec-failed:ENOENT")


# --- ending by itself ----------------------------------------------------------------------------------------------


def test_a_settled_life_is_followed_at_once_while_its_init_lingers() -> None:
    story = running(uptime=5.0).told(Exited, CODE_3, True)
    assert story.did == (Launch(2),)
    worker = story.worker
    assert (worker.state, worker.generation, worker.restarts, worker.lingering) == (State.STARTING, 2, 1, (1,))
    assert (worker.reason, worker.last_exit, worker.exit) == ("exit:3", CODE_3, None)
    assert story.tell(Gone(1)).worker.lingering == ()
    assert story.up().state is State.RUNNING


def test_the_next_life_waits_for_the_namespace_not_for_the_program() -> None:
    story = running(uptime=5.0).told(Exited, CODE_3)
    assert (story.state, story.did, story.worker.reason) == (State.STOPPING, (), "exit:3")
    assert (story.worker.host_pid, story.worker.last_host_pid) == (None, 2001)
    assert story.told(Empty).did == (Launch(2),)


def test_a_tree_that_outlasts_its_program_is_ended() -> None:
    """Its init kills it at once; but init may be frozen, or not what it seems."""
    story = running(uptime=5.0).told(Exited, CODE_3)
    assert story.later(REST - 0.1).tell(Tick()).did == ()
    assert story.later(0.1).tell(Tick()).did == (KillTree(1),)
    assert (story.state, story.worker.deadline) == (State.STOPPING, None)
    assert story.told(Gone).worker.last_exit == CODE_3
    killed = running(uptime=5.0).tell(Kill(9, tree=True)).told(Exited, CODE_3)
    assert killed.worker.deadline is None


def test_the_time_a_tree_takes_to_die_does_not_settle_its_life() -> None:
    assert running(uptime=0.5).told(Exited, CODE_3).later(5.0).told(Empty).state is State.BACKOFF


def test_a_crash_loop_waits_longer_each_time() -> None:
    story, delays = Story().tell(Start()), []
    for _ in range(4):
        story.up().told(Exited, CODE_3, True).told(Gone)
        assert story.worker.deadline is not None
        delays.append(story.worker.deadline - story.now)
        story.later(delays[-1]).tell(Tick())
        assert story.did == (Launch(story.worker.generation),)
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert story.worker.restarts == 4


def test_a_timer_that_fires_early_changes_nothing() -> None:
    for story in (running().told(Exited, CODE_3, True), running().tell(Stop())):
        before = story.worker
        assert before.deadline is not None
        story.now = before.deadline - 0.001
        assert story.tell(Tick()).worker == before
        assert story.did == ()


@pytest.mark.parametrize(
    ("policy", "end", "state"),
    [(NEVER, CODE_0, State.DONE), (NEVER, CODE_3, State.FAILED), (ON_FAILURE, CODE_0, State.DONE)],
)
def test_done_and_failed_are_said_only_when_init_was_reaped(policy: RestartPolicy, end: Exit, state: State) -> None:
    story = running(web(restart=policy)).told(Exited, end, True)
    assert (story.state, story.worker.reason, story.worker.deadline) == (State.STOPPING, end.reason, None)
    story.told(Gone)
    assert (story.state, story.worker.reason, story.worker.last_exit) == (state, end.reason, end)
    assert story.worker.want_up


def test_an_earlier_life_that_lingers_holds_the_final_state_back() -> None:
    story = running(web(restart=RestartPolicy(policy="on-failure", success=(0,))), uptime=5.0)
    story.told(Exited, CODE_3, True).up().told(Gone, None)  # init-killed, the first still lingers
    assert story.state is State.BACKOFF
    story.later(1.0).tell(Tick()).up().told(Exited, CODE_0, True).told(Gone)
    assert (story.state, story.worker.lingering) == (State.STOPPING, (1,))
    assert story.tell(Gone(1)).state is State.DONE


def test_a_launch_that_failed_for_good_waits_for_an_earlier_life() -> None:
    story = running().told(Exited, CODE_3, True).later(1.0).tell(Tick())
    story.spec = web(restart=NEVER)
    assert story.told(LaunchFailed, "setup-failed:clone:EAGAIN").state is State.STOPPING
    assert story.tell(Gone(1)).state is State.FAILED


@pytest.mark.parametrize("story", [Story().tell(Start(), Launched(1, 5)), running(), running().told(Exited, CODE_3)])
def test_init_killed_from_outside_invents_no_code(story: Story) -> None:
    known = story.worker.exit
    story = story.copy().tell(Gone(1, Exit(reason="signal:SIGKILL", signal=9, at=7.0)))
    assert story.state is State.BACKOFF
    assert story.worker.last_exit == (known or Exit(reason="init-killed", at=7.0))


def test_without_init_the_reaper_sees_the_truth() -> None:
    story = running(web(init=False, restart=NEVER)).told(Gone, CODE_3)
    assert (story.state, story.worker.last_exit) == (State.FAILED, CODE_3)
    assert running(web(init=False, restart=NEVER)).told(Gone, CODE_0).state is State.DONE
    early = Story(web(init=False, restart=NEVER)).tell(Start(), Launched(1, 5), Gone(1, CODE_0))
    assert early.state is State.DONE


def test_an_empty_namespace_without_an_exit_is_an_end_all_the_same() -> None:
    story = running(uptime=5.0).told(Empty)
    assert (story.did, story.worker.last_exit) == ((Launch(2),), Exit(reason="init-killed"))


def test_how_long_a_life_ran_is_not_remembered_for_the_next() -> None:
    story = running(uptime=100.0).told(Exited, CODE_3).told(Empty)
    assert story.did == (Launch(2),)
    assert story.up().told(Gone).state is State.BACKOFF


def test_a_second_exit_of_one_life_is_not_believed() -> None:
    story = running().told(Exited, CODE_3).told(Exited, CODE_0).told(Empty)
    assert story.worker.last_exit == CODE_3


def test_a_program_may_end_before_it_was_seen_running() -> None:
    story = Story(web(restart=RestartPolicy(settle=0.0))).tell(Start(), Launched(1, 5), Started(1, 6, 2))
    assert story.told(Exited, CODE_3).state is State.STOPPING
    assert story.told(Empty).state is State.BACKOFF


# --- being stopped -------------------------------------------------------------------------------------------------

LADDER = (StopStep(15, 10.0), StopStep(2, 5.0), StopStep(None))


def test_the_stop_sequence_goes_step_by_step_to_the_kill() -> None:
    story = running(web(stop=LADDER)).tell(Stop())
    assert (story.state, story.worker.reason, story.did) == (State.STOPPING, "operator", (SignalMain(1, 15),))
    assert story.worker.deadline == 110.0
    assert story.later(10.0).tell(Tick()).did == (SignalMain(1, 2),)
    assert story.worker.deadline == 115.0
    assert story.later(5.0).tell(Tick()).did == (KillTree(1),)
    assert story.worker.deadline is None
    assert story.tell(Tick()).did == ()
    story.told(Gone)
    assert (story.state, story.worker.reason) == (State.STOPPED, "operator")
    assert story.worker.last_exit == Exit(reason="signal:SIGKILL", signal=9, timed_out=True)


def test_a_stop_obeyed_is_no_timeout_and_no_failure() -> None:
    end = Exit(reason="signal:SIGTERM", signal=15)
    story = running(web(stop=LADDER)).tell(Stop()).later(2.0).told(Exited, end)
    assert (story.state, story.worker.deadline, story.worker.reason) == (State.STOPPING, story.now + REST, "operator")
    assert story.told(Empty).state is State.STOPPING
    assert story.told(Gone).state is State.STOPPED
    assert (story.worker.last_exit, story.did) == (end, ())


def test_a_later_step_obeyed_is_no_timeout() -> None:
    end = Exit(reason="signal:SIGINT", signal=2)
    story = running(web(stop=LADDER)).tell(Stop()).later(10.0).tell(Tick()).told(Exited, end, True).told(Gone)
    assert story.worker.last_exit == end


def test_an_exit_heard_after_the_kill_of_a_life_that_outlasted_its_stop_is_marked() -> None:
    story = running().tell(Stop()).later(10.0).tell(Tick()).told(Exited, CODE_0, True).told(Gone)
    assert story.worker.last_exit == Exit(reason="exit:0", code=0, timed_out=True, at=1.0)


def test_without_init_an_exit_after_the_kill_is_marked_as_well() -> None:
    seen = Exit(reason="signal:SIGKILL", signal=9, at=7.0)
    story = running(web(init=False)).tell(Stop()).later(10.0).tell(Tick()).told(Gone, seen)
    assert story.worker.last_exit == Exit(reason="signal:SIGKILL", signal=9, timed_out=True, at=7.0)


def test_the_shortest_stop_kills_at_once_and_is_no_timeout() -> None:
    story = running(web(stop=(StopStep(None),))).tell(Stop())
    assert story.did == (KillTree(1),)
    assert story.told(Gone).worker.last_exit == Exit(reason="signal:SIGKILL", signal=9)


def test_a_stop_sequence_without_an_end_is_ended_by_the_kill() -> None:
    story = running(web(stop=(StopStep(15, 1.0),))).tell(Stop()).later(1.0).tell(Tick())
    assert story.did == (KillTree(1),)


@pytest.mark.parametrize("wish", [Stop(), Restart(), Remove()])
def test_a_life_that_does_not_run_yet_is_killed(wish: Input) -> None:
    story = Story().tell(Start(), Launched(1, 5), Started(1, 6, 2), wish)
    assert (story.state, story.did, story.worker.deadline) == (State.STOPPING, (KillTree(1),), None)


def test_a_stop_before_the_launch_is_known_kills_then() -> None:
    story = Story().tell(Start(), Stop())
    assert (story.state, story.did) == (State.STOPPING, ())
    assert story.tell(Launched(1, 5)).did == (KillTree(1),)
    assert story.tell(Started(1, 6, 2), SetupFailed(1, "exec-failed:ENOENT")).state is State.STOPPING
    assert story.tell(Gone(1)).state is State.STOPPED
    assert story.worker.last_exit == Exit(reason="exec-failed:ENOENT")


def test_a_stop_before_a_launch_that_fails() -> None:
    assert Story().tell(Start(), Stop(), LaunchFailed(1, "setup-failed:clone:EAGAIN")).state is State.STOPPED
    before = in_state(State.BACKOFF).tell(Start(), Stop())
    assert before.told(LaunchFailed, "operator").state is State.STOPPING  # the first life's init is still there
    assert before.tell(Gone(1)).worker.last_exit == CODE_3, "no life ended, so the last exit is the one before"
    restarted = Story().tell(Start(), Restart(), LaunchFailed(1, "setup-failed:clone:EAGAIN"))
    assert (restarted.state, restarted.did) == (State.STARTING, (Launch(2),))


def test_a_stop_beats_the_policy_in_every_state() -> None:
    dying = running(uptime=5.0).told(Exited, CODE_3).tell(Stop())
    assert (dying.state, dying.did) == (State.STOPPING, ())
    assert (dying.told(Empty).state, dying.did) == (State.STOPPING, ())
    assert dying.told(Gone).state is State.STOPPED
    waiting = running().told(Exited, CODE_3, True).told(Gone).tell(Stop())
    assert (waiting.state, waiting.worker.deadline) == (State.STOPPED, None)
    lingering = running().told(Exited, CODE_3, True).tell(Stop())
    assert (lingering.state, lingering.worker.deadline) == (State.STOPPING, None)
    assert lingering.told(Gone).state is State.STOPPED
    restarting = running().tell(Restart(), Stop()).told(Gone)
    assert (restarting.state, restarting.did) == (State.STOPPED, ())


@pytest.mark.parametrize("end", [CODE_0, CODE_3])
def test_a_stop_of_what_has_ended_makes_it_stopped(end: Exit) -> None:
    lingering = running(web(restart=NEVER)).told(Exited, end, True).tell(Stop())
    assert lingering.told(Gone).state is State.STOPPED
    ended = running(web(restart=NEVER)).told(Exited, end, True).told(Gone).tell(Stop())
    assert (ended.state, ended.worker.reason, ended.worker.want_up) == (State.STOPPED, "operator", False)


# --- restart, and start after all ----------------------------------------------------------------------------------


def test_a_restart_launches_as_soon_as_the_life_is_over() -> None:
    story = running().tell(Restart())
    assert (story.state, story.did) == (State.STOPPING, (SignalMain(1, 15),))
    assert story.told(Exited, CODE_0).did == ()
    assert story.told(Empty).did == (Launch(2),)
    assert (story.worker.restarts, story.worker.reason, story.worker.lingering) == (0, None, (1,))


@pytest.mark.parametrize("wish", [Start(), Restart()])
def test_a_wish_to_be_up_while_going_down(wish: Input) -> None:
    story = running().tell(Stop(), wish)
    assert (story.state, story.did) == (State.STOPPING, ())
    assert story.told(Gone).did == (Launch(2),)
    over = running().tell(Stop()).told(Exited, CODE_0, True).tell(wish)
    assert (over.state, over.did, over.worker.lingering) == (State.STARTING, (Launch(2),), (1,))


@pytest.mark.parametrize("wish", [Start(), Restart()])
@pytest.mark.parametrize("state", [State.STOPPED, State.BACKOFF, State.FAILED, State.DONE])
def test_a_wish_to_be_up_launches_where_no_life_is(state: State, wish: Input) -> None:
    story = in_state(state).tell(wish)
    assert (story.state, story.did) == (State.STARTING, (Launch(2),))
    assert (story.worker.deadline, story.worker.restarts, story.worker.want_up) == (None, 0, True)


def test_a_start_forgets_what_was_before() -> None:
    story = Story().tell(Start())
    for _ in range(3):
        story.up().told(Exited, CODE_3, True).later(60.0).tell(Tick())
    assert story.worker.restarts == 3
    story.up().tell(Start())
    assert (story.state, story.worker.restarts) == (State.RUNNING, 0)
    story.told(Exited, CODE_3, True)
    assert story.worker.deadline == pytest.approx(story.now + 0.1)


def test_a_start_while_starting_forgets_as_well() -> None:
    story = running(uptime=5.0).told(Exited, CODE_3, True).tell(Start())
    assert (story.state, story.worker.restarts, story.did) == (State.STARTING, 0, ())


# --- removal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.STOPPED, State.FAILED, State.DONE])
def test_a_removal_where_nothing_is_left_forgets_at_once(state: State) -> None:
    story = in_state(state).tell(Remove())
    assert (story.state, story.did) == (State.STOPPED, (Forget(),))


def test_a_removal_stops_and_forgets_when_init_was_reaped() -> None:
    story = running().tell(Remove())
    assert story.did == (SignalMain(1, 15),)
    assert story.told(Exited, CODE_0, True).did == ()
    assert story.told(Gone).did == (Forget(),)


def test_a_removal_while_stopping_or_waiting() -> None:
    assert running().tell(Stop(), Remove()).told(Gone).did == (Forget(),)
    assert running().told(Exited, CODE_3, True).tell(Remove()).told(Gone).did == (Forget(),)
    assert running().tell(Remove(), Stop()).told(Gone).did == (Forget(),)


def test_a_start_cancels_a_removal() -> None:
    story = running().tell(Remove(), Start()).told(Gone)
    assert (story.did, story.worker.removing) == ((Launch(2),), False)


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "story",
    [Story().tell(Start(), Launched(1, 5), Started(1, 6, 2)), running(), running().tell(Stop())],
    ids=["starting", "running", "stopping"],
)
def test_a_signal_reaches_what_lives(story: Story) -> None:
    story, state = story.copy(), story.state
    assert story.tell(Kill(1)).did == (SignalMain(1, 1),)
    assert story.tell(Kill(1, tree=True)).did == (SignalTree(1, 1),)
    assert story.tell(Kill(9)).did == (SignalMain(1, 9),)
    assert story.tell(Kill(9, tree=True)).did == (KillTree(1),)
    assert (story.state, story.worker.deadline) == (state, None)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize(
    "story",
    [
        Story().tell(Start()),
        running().tell(Stop()).told(Exited, CODE_0, True),
        *map(in_state, [State.STOPPED, State.BACKOFF, State.FAILED, State.DONE]),
    ],
)
def test_a_signal_to_nobody_is_not_sent(story: Story, tree: bool) -> None:
    before, story = story.worker, story.copy()
    assert story.tell(Kill(9, tree)).did == ()
    assert story.worker == before


def test_a_signal_to_a_program_that_ended_is_not_sent_but_the_rest_can_be_killed() -> None:
    story = running().told(Exited, CODE_3)
    assert story.tell(Kill(15)).did == ()
    assert story.tell(Kill(9, tree=True)).did == (KillTree(1),)
    assert story.told(Gone).worker.last_exit == CODE_3


def test_a_kill_is_no_stop() -> None:
    story = running(uptime=5.0).tell(Kill(9, tree=True)).told(Gone)
    assert story.did == (Launch(2),)
    assert story.worker.last_exit == Exit(reason="signal:SIGKILL", signal=9)


def test_a_stop_after_the_kill_of_the_tree_has_nothing_to_send() -> None:
    story = running().tell(Kill(9, tree=True), Stop())
    assert (story.state, story.did, story.worker.deadline) == (State.STOPPING, (), None)
    starting = Story().tell(Start(), Launched(1, 5), Kill(9, tree=True), Stop())
    assert (starting.state, starting.did) == (State.STOPPING, ())


def test_a_kill_during_the_stop_ends_the_sequence_without_a_timeout() -> None:
    story = running(web(stop=LADDER)).tell(Stop()).later(10.0).tell(Tick(), Kill(9, tree=True))
    assert story.worker.deadline is None
    assert story.told(Gone).worker.last_exit == Exit(reason="signal:SIGKILL", signal=9)


def test_the_id_of_a_worker_is_its_pool_and_its_index() -> None:
    assert Worker(pool="web", index=3).id == "web/3"
