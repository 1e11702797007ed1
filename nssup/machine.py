"""The life of one worker: what each event does to it in each state, and what is to be done about it.

`step` is a pure function over TABLE, the only place where a life is decided about; docs/states.md is drawn from it.
Restarts are decided in restart.py, what makes a worker ready in readiness.py. Times are CLOCK_BOOTTIME seconds. The
rules are those of interface.md (States) and design.md 5: a life is over when its namespace is empty, and only then may
the next one launch; `stopped`, `done` and `failed` are said when init itself was reaped, which is the kernel's proof.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import msgspec
from msgspec.structs import replace

from nssup import restart
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
from nssup.spec import SIGKILL, PoolSpec, StopStep

# Seconds from the end of a program to that of its tree: init kills it at once, but init may be frozen, or lie.
REST = 10.0
# Seconds that we may be late for a deadline before we blame ourselves: time in which nobody listened does not count.
# What its init has to say by then takes a moment to come, since the line holds old news first.
LATE = 0.05
MOMENT = 0.25
# The reason of workers that are down because another of their pool died too often.
POOL_FAILED = "pool-failed"

# The reason of who waits for another pool, or is down for want of it, is this and the pool's name.
DEPENDENCY = "dependency:"

# --- what is to be done --------------------------------------------------------------------------------------------


class Action(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Base of what `step` asks for. Done in order, before anything else is fed about the worker."""


class Launch(Action, frozen=True, gc=False):
    """Launch a life of this number; Launched or LaunchFailed must follow."""

    generation: int


class SignalMain(Action, frozen=True, gc=False):
    """Send signo to the main program."""

    generation: int
    signo: int


class SignalTree(Action, frozen=True, gc=False):
    """Send signo to every process of the namespace but init."""

    generation: int
    signo: int


class RunCommand(Action, frozen=True, gc=False):
    """Run a command of the spec in the worker's namespaces, as its user. stop_step: of the stop sequence, which
    CommandFailed names; None: it is no part of one."""

    generation: int
    command: tuple[str, ...]
    stop_step: int | None = None


class KillTree(Action, frozen=True, gc=False):
    """SIGKILL to init's pidfd, which takes everything in the namespace with it."""

    generation: int


class FailPool(Action, frozen=True, gc=False):
    """It died too often: the other workers of its pool are to fail with it. Workers take care of that."""


class EndSupervisor(Action, frozen=True, gc=False):
    """It died too often, and without it nothing makes sense: the supervisor is to stop everything and end."""


class Forget(Action, frozen=True, gc=False):
    """The worker is stopped and to be removed: nothing of it remains."""


# --- the worker ----------------------------------------------------------------------------------------------------


class Worker(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Everything that is known about a worker.

    reason: why it is in this state (closed set in docs/contracts.md), None while running.
    want_up, removing, again: what was asked of it: be up; be forgotten once down; launch as soon as this life is over.
    generation: the number of its newest life, 0 before the first. restarts: automatic ones since an operator's start.
    launched_at: when the newest life was asked for. running_since: when its exec succeeded, None when its program does
    not run. up_since: when it came into RUNNING. uptime: seconds since then, known between its exit and its end.
    deadline: when it wants a Tick; exactly in BACKOFF, in STOPPING while a stop step, or what the program left behind,
    is waited for, in STARTING with an init where readiness is asked, in RUNNING where there is a watchdog.
    ready: in RUNNING, as long as the program is. passed: its startup probe has succeeded. extended: when it last asked
    for more time. fault: why we began to stop it, without being asked to.
    host_pid, ns_pid: the program's, None when there is none; last_host_pid, last_ns_pid: also after its end.
    alive: the newest life is not over. killed: its tree was sent SIGKILL by us. stop_step: the step of spec.stop it is
    in, None outside the sequence. held: its stop sequence begins only when those that require its pool are down; in
    STOPPING alone. lingering: lives that are over, their init not reaped yet. outcome: the state that waits for that,
    in STOPPING. exit: how the life ended so far; last_exit: how the last life that is over ended; last_life: which one
    that was. condemned: it is going down to be FAILED, because its pool has failed.
    """

    pool: str
    index: int
    state: State = State.STOPPED
    reason: str | None = None
    want_up: bool = False
    removing: bool = False
    again: bool = False
    generation: int = 0
    restarts: int = 0
    history: restart.History = restart.FORGOTTEN
    launched_at: float | None = None
    running_since: float | None = None
    up_since: float | None = None
    uptime: float | None = None
    deadline: float | None = None
    ready: bool = False
    passed: bool = False
    extended: float = 0.0
    fault: str | None = None
    init_host_pid: int | None = None
    host_pid: int | None = None
    ns_pid: int | None = None
    last_host_pid: int | None = None
    last_ns_pid: int | None = None
    alive: bool = False
    killed: bool = False
    stop_step: int | None = None
    held: bool = False
    lingering: tuple[int, ...] = ()
    outcome: State | None = None
    exit: Exit | None = None
    last_exit: Exit | None = None
    last_life: "Span | None" = None
    condemned: bool = False

    @property
    def id(self) -> str:
        """`web/3`."""
        return f"{self.pool}/{self.index}"


class Span(NamedTuple):
    """When a life was, CLOCK_BOOTTIME seconds: from when it was asked for until it was over."""

    generation: int
    began: float
    ended: float


class Around(NamedTuple):
    """How its pool stands to others. blocker: the pool that has to be waited for before a launch. required: others
    require it."""

    blocker: str | None = None
    required: bool = False


ALONE = Around()


class Here(NamedTuple):
    """What a step may know beside the worker and the event. seed: of the jitter, one for the whole supervisor."""

    spec: PoolSpec
    now: float
    seed: str
    around: Around = ALONE


Step: TypeAlias = tuple[Worker, tuple[Action, ...]]
NOTHING: tuple[Action, ...] = ()


# --- launching -----------------------------------------------------------------------------------------------------


def _launch(w: Worker, here: Here, reason: str | None) -> Step:
    """The next life, as soon as no other pool is in the way. Whatever lingers goes on lingering beside it."""
    if here.around.blocker is not None:
        reason = DEPENDENCY + here.around.blocker
        return replace(w, state=State.WAITING, reason=reason, again=False, deadline=None, outcome=None), NOTHING
    generation = w.generation + 1
    w = replace(
        w,
        state=State.STARTING,
        reason=reason,
        again=False,
        generation=generation,
        launched_at=here.now,
        deadline=None,
        last_host_pid=None,
        last_ns_pid=None,
        alive=True,
        killed=False,
        outcome=None,
        passed=False,
        extended=0.0,
        fault=None,
    )
    return w, (Launch(generation),)


def _start(w: Worker, event: Input, here: Here) -> Step:
    """An operator wants it up, and no life is in the way."""
    return _launch(_asked(w), here, None)


def _asked(w: Worker) -> Worker:
    """Up because an operator said so: what went before is forgotten."""
    return replace(w, want_up=True, removing=False, restarts=0, history=restart.FORGOTTEN, condemned=False)


def _stay_up(w: Worker, event: Input, here: Here) -> Step:
    """Up already: only what went before is forgotten."""
    return _asked(w), NOTHING


def _relaunch(w: Worker, here: Here) -> Step:
    """The next life, by policy."""
    reason = w.last_exit.reason if w.last_exit else None
    return _launch(replace(w, restarts=w.restarts + 1), here, reason)


def _unblocked(w: Worker, event: Unblocked, here: Here) -> Step:
    """What it waited for is there: launched; or it waits for something else."""
    return _launch(w, here, None)


def _launched(w: Worker, event: Launched, here: Here) -> Step:
    """There is an init that can be killed. Where readiness is asked, the time for it runs from here."""
    deadline = here.now + here.spec.start_timeout if asks_readiness(here.spec) else None
    return replace(w, init_host_pid=event.init_host_pid, deadline=deadline), NOTHING


def asks_readiness(spec: PoolSpec) -> bool:
    """Whether a worker is `starting` until it is ready, and not only until its program runs."""
    return spec.startup is not None or spec.ready is not None


def _launched_to_die(w: Worker, event: Launched, here: Here) -> Step:
    """A stop was faster than the launch."""
    return _kill(replace(w, init_host_pid=event.init_host_pid))


def _started(w: Worker, event: Started, here: Here) -> Step:
    """The program's process is there, its PIDs known."""
    host_pid, ns_pid = event.host_pid, event.ns_pid
    return replace(w, host_pid=host_pid, ns_pid=ns_pid, last_host_pid=host_pid, last_ns_pid=ns_pid), NOTHING


def _running(w: Worker, event: Running, here: Here) -> Step:
    """The program runs. Where readiness is asked, that is not enough."""
    if w.running_since is None:
        w = replace(w, running_since=here.now)
    return (w, NOTHING) if asks_readiness(here.spec) else _up(w, here)


def _up(w: Worker, here: Here) -> Step:
    """What it was started for is there."""
    watchdog = here.spec.watchdog
    deadline = None if watchdog is None or w.killed else here.now + watchdog
    return replace(w, state=State.RUNNING, reason=None, up_since=here.now, ready=True, deadline=deadline), NOTHING


def _passed(w: Worker, event: Passed, here: Here) -> Step:
    """Started, as far as its startup probe tells: from now on its readiness is what counts."""
    return replace(w, passed=True), NOTHING


def _ready(w: Worker, event: Ready, here: Here) -> Step:
    """It is ready, which counts once its program is known to run."""
    return (w, NOTHING) if w.running_since is None else _up(w, here)


def _ready_again(w: Worker, event: Ready, here: Here) -> Step:
    """It is ready again."""
    return (w, NOTHING) if w.ready else (replace(w, ready=True), NOTHING)


def _unready(w: Worker, event: Unready, here: Here) -> Step:
    """It goes on, but is not ready: others may wait for it, it is not touched."""
    return (replace(w, ready=False), NOTHING) if w.ready else (w, NOTHING)


def _sick(w: Worker, event: Sick, here: Here) -> Step:
    """Down, by the stop sequence, because it is of no use; the policy decides what follows."""
    return _begin_stop(replace(w, fault=event.reason), here, event.reason)


def _unready_in_time(w: Worker, event: Tick, here: Here) -> Step:
    """Not ready in the time that it had: down, by the stop sequence; the policy decides what follows."""
    return _at_deadline(w, here, "start-timeout", here.spec.start_timeout)


def _heartbeat_missed(w: Worker, event: Tick, here: Here) -> Step:
    """The watchdog heard nothing for too long: down, by the stop sequence; the policy decides what follows."""
    if here.spec.watchdog is None:  # any more
        return replace(w, deadline=None), NOTHING
    return _at_deadline(w, here, "watchdog", here.spec.watchdog)


def _at_deadline(w: Worker, here: Here, fault: str, period: float) -> Step:
    """It missed its deadline, unless it was us who were not there to hear of it: then it gets that time once more."""
    if w.deadline is None or here.now < w.deadline:
        return w, NOTHING
    late = here.now - w.deadline
    if late > LATE:
        return replace(w, deadline=here.now + min(max(late, MOMENT), period)), NOTHING
    return _begin_stop(replace(w, fault=fault), here, fault)


def _alive(w: Worker, event: Alive, here: Here) -> Step:
    """A deadline moves: by a heartbeat that of the watchdog, by a wish for more time any other."""
    deadline, extended = w.deadline, w.extended
    if deadline is None or w.exit is not None:
        return w, NOTHING
    if w.state is not State.RUNNING and event.extend_at > extended:
        extended = event.extend_at
        deadline = max(deadline, extended + event.extend)
    if w.state is State.RUNNING and event.until is not None:
        deadline = max(deadline, event.until)
    if (deadline, extended) == (w.deadline, w.extended):
        return w, NOTHING
    return replace(w, deadline=deadline, extended=extended), NOTHING


def _setup_failed(w: Worker, event: SetupFailed, here: Here) -> Step:
    """Only remembered: the life is over when it is empty."""
    return replace(w, exit=Exit(reason=event.reason), host_pid=None, ns_pid=None), NOTHING


def _launch_failed(w: Worker, event: LaunchFailed, here: Here) -> Step:
    """Over before there was anything to end."""
    return _over(w, Exit(reason=event.reason), here)


def _launch_withdrawn(w: Worker, event: LaunchFailed, here: Here) -> Step:
    """A stop was faster than the launch: there was no life, so nothing ended."""
    after, actions = _over(w, Exit(reason=event.reason), here)
    return replace(after, last_exit=w.last_exit, last_life=w.last_life), actions


# --- stopping ------------------------------------------------------------------------------------------------------


def _begin_stop(w: Worker, here: Here, reason: str = "operator") -> Step:
    """Into the stop sequence, or straight to the kill when the program does not run yet. A program that others may
    lean on is held back first, until they are down; but not one that is of no use."""
    w = replace(w, state=State.STOPPING, reason=reason, ready=False, deadline=None, extended=here.now)
    if w.running_since is not None:
        held = here.around.required and w.fault is None
        return (replace(w, held=True), NOTHING) if held else _stop_step(w, 0, here)
    # Without an init yet, the kill comes with Launched.
    return _kill(w) if w.init_host_pid is not None and not w.killed else (w, NOTHING)


def _stop_step(w: Worker, number: int, here: Here) -> Step:
    """Step `number` of the stop sequence. One that was killed already has nothing left to be sent."""
    if w.killed:
        return w, NOTHING
    w = replace(w, stop_step=number)
    step = here.spec.stop[number] if number < len(here.spec.stop) else None
    if step is None or step.kills:
        return _kill(w)
    return replace(w, deadline=here.now + step.wait), (stop_deed(step, w.generation, number),)


def stop_deed(step: StopStep, generation: int, number: int) -> Action:
    """What there is to do in this step of the stop sequence."""
    if step.command is not None:
        return RunCommand(generation, step.command, number)
    return KillTree(generation) if step.signal is None else SignalMain(generation, step.signal)


def _command_failed(w: Worker, event: CommandFailed, here: Here) -> Step:
    """A stop step that did nothing is not waited for: the next one."""
    if w.exit is not None or w.stop_step != event.stop_step:
        return w, NOTHING
    return _stop_step(w, event.stop_step + 1, here)


def _kill(w: Worker) -> Step:
    """The whole tree. Nothing can be done after it, so nothing is waited for but the end."""
    return replace(w, killed=True, deadline=None), (KillTree(w.generation),)


def _stop(w: Worker, event: Input, here: Here) -> Step:
    """Down, by the stop sequence."""
    return _begin_stop(replace(w, want_up=False), here)


def _remove(w: Worker, event: Input, here: Here) -> Step:
    """Down, by the stop sequence, and forgotten then."""
    return _begin_stop(replace(w, want_up=False, removing=True), here)


def _restart(w: Worker, event: Input, here: Here) -> Step:
    """Down, by the stop sequence, and launched again as soon as that life is over."""
    return _begin_stop(replace(_asked(w), again=True), here)


def _fail(w: Worker, event: Input, here: Here) -> Step:
    """Down, by the stop sequence, to be failed with its pool."""
    return _begin_stop(replace(w, condemned=True), here, POOL_FAILED)


def _fail_after_stop(w: Worker, event: Input, here: Here) -> Step:
    """Who is going down only to come up again is failed instead; who is to be down stays so."""
    if not w.alive or not w.want_up:
        return w, NOTHING
    return replace(w, condemned=True, again=False, reason=POOL_FAILED), NOTHING


def _fail_at_rest(w: Worker, event: Input, here: Here) -> Step:
    """Failed with its pool; no life is in the way."""
    return _rest(replace(w, deadline=None), State.FAILED, POOL_FAILED)


def _released(w: Worker, event: Released, here: Here) -> Step:
    """Nobody leans on it any more: the stop sequence begins, if the program has not ended meanwhile."""
    if not w.held:
        return w, NOTHING
    w = replace(w, held=False)
    return _stop_step(w, 0, here) if w.running_since is not None else (w, NOTHING)


def _dependency_lost(w: Worker, event: DependencyLost, here: Here) -> Step:
    """Down, by the stop sequence: for good, or until what is required is there again."""
    back = event.then == "restart"
    w = replace(w, want_up=back, again=back, restarts=w.restarts + back)
    return _begin_stop(w, here, DEPENDENCY + event.pool)


def _dependency_lost_in_backoff(w: Worker, event: DependencyLost, here: Here) -> Step:
    """Down for good; or nothing: the next launch will wait."""
    if event.then == "restart":
        return w, NOTHING
    return _rest(replace(w, want_up=False, deadline=None), State.STOPPED, DEPENDENCY + event.pool)


def _dependency_lost_in_stop(w: Worker, event: DependencyLost, here: Here) -> Step:
    """Whatever was to follow does not, if it is to stay down."""
    if event.then == "restart" or not w.want_up or w.outcome is not None:
        return w, NOTHING
    return replace(w, want_up=False, again=False, reason=DEPENDENCY + event.pool), NOTHING


def _next_stop_step(w: Worker, event: Tick, here: Here) -> Step:
    """The wait of a stop step ran out: the next step. The wait for the rest of the tree did: the kill."""
    if w.deadline is None or here.now < w.deadline:
        return w, NOTHING
    if w.exit is not None:
        return _kill(w)
    if w.stop_step is None:
        return w, NOTHING
    return _stop_step(w, w.stop_step + 1, here)


def _come_back(w: Worker, event: Input, here: Here) -> Step:
    """An operator wants up what is going down: when this life is over, or at once when it already is."""
    if not w.alive:
        return _start(w, event, here)
    return replace(_asked(w), again=True), NOTHING


def _stay_down(w: Worker, event: Input, here: Here) -> Step:
    """An operator wants down what is going down: whatever was to follow does not."""
    removing = w.removing or isinstance(event, Remove)
    outcome = None if w.alive else State.STOPPED
    w = replace(w, want_up=False, again=False, removing=removing, condemned=False)
    return replace(w, reason="operator", outcome=outcome), NOTHING


def _down(w: Worker, event: Input, here: Here) -> Step:
    """An operator wants down what has no life."""
    removing = w.removing or isinstance(event, Remove)
    return _rest(replace(w, want_up=False, removing=removing, deadline=None), State.STOPPED, "operator")


# --- the end of a life ---------------------------------------------------------------------------------------------


def _exited(w: Worker, event: Exited, here: Here) -> Step:
    """The main program is gone; init kills the rest of the tree by itself, so no stop step is needed any more. One that
    does not come to an end with that is ended itself."""
    if w.exit is None:
        ended = here.now if event.at is None else min(event.at, here.now)
        ran = None if w.up_since is None else max(ended - w.up_since, 0.0)
        w = replace(w, exit=_marked(w, event.exit), uptime=ran)
    rest = None if event.empty or w.killed else here.now + REST
    w = replace(w, running_since=None, up_since=None, ready=False, host_pid=None, ns_pid=None, deadline=rest)
    if event.empty:
        return _linger(w, here)
    if w.state is State.STOPPING:
        return w, NOTHING
    return replace(w, state=State.STOPPING, reason=event.exit.reason), NOTHING


def _empty(w: Worker, event: Empty, here: Here) -> Step:
    """Nothing but init is left."""
    return _linger(w, here)


def _linger(w: Worker, here: Here) -> Step:
    """Over, though its init is still there."""
    return _over(replace(w, lingering=(*w.lingering, w.generation)), w.exit or _unseen(w, None, here), here)


def _gone(w: Worker, event: Gone, here: Here) -> Step:
    """An init was reaped: the end of the newest life, or the proof about one that is over."""
    if event.generation == w.generation and w.alive:
        return _over(w, w.exit or _unseen(w, event.exit, here), here)
    w = replace(w, lingering=tuple(g for g in w.lingering if g != event.generation))
    if w.outcome is not None and not w.lingering:
        return _rest(w, w.outcome, w.reason)
    return w, NOTHING


def _unseen(w: Worker, seen: Exit | None, here: Here) -> Exit:
    """The exit of a life whose init said nothing about it. seen: what the reaper of its PID 1 saw.

    Without init that is the truth itself. With init it is the status of init, which says nothing about the program;
    but a tree that we killed died of that, and of one killed by others no code is invented.
    """
    if seen is not None and not here.spec.init:
        return _marked(w, seen)
    at = seen.at if seen else 0.0
    if w.killed:
        return _marked(w, Exit(reason="signal:SIGKILL", signal=SIGKILL, at=at))
    return Exit(reason="init-killed", at=at)


def _marked(w: Worker, seen: Exit) -> Exit:
    """seen, with timed_out set when the life had to be killed because it outlasted its stop sequence, and with the
    reason for which we stopped it, if we did."""
    return replace(seen, timed_out=bool(w.killed and w.stop_step), reason=w.fault or seen.reason)


def _over(w: Worker, ended: Exit, here: Here) -> Step:
    """The newest life is over: what follows it. Never two lives: the only way to a launch from a life is this one."""
    uptime = w.uptime
    if uptime is None and w.up_since is not None:
        uptime = here.now - w.up_since
    w = replace(
        w,
        alive=False,
        last_exit=ended,
        last_life=Span(w.generation, w.launched_at or 0.0, here.now),
        exit=None,
        uptime=None,
        running_since=None,
        up_since=None,
        ready=False,
        deadline=None,
        stop_step=None,
        held=False,
        init_host_pid=None,
        host_pid=None,
        ns_pid=None,
    )
    if w.again:
        return _launch(w, here, None)
    if not w.want_up:
        return _rest(w, State.STOPPED, w.reason if (w.reason or "").startswith(DEPENDENCY) else "operator")
    if w.condemned:
        return _rest(w, State.FAILED, POOL_FAILED)
    return _by_policy(w, ended, uptime, here)


def _by_policy(w: Worker, ended: Exit, uptime: float | None, here: Here) -> Step:
    """What follows a life that nobody asked to end."""
    spec = here.spec
    verdict = restart.decide(
        spec.restart,
        spec.type,
        w.history,
        ended,
        uptime,
        now=here.now,
        seed=here.seed,
        worker_id=w.id,
        generation=w.generation,
    )
    if isinstance(verdict, restart.Finished):
        return _rest(w, State.DONE, ended.reason)
    if isinstance(verdict, restart.Halted):
        return _rest(replace(w, want_up=False), State.STOPPED, ended.reason)
    if isinstance(verdict, restart.GaveUp):
        return _give_up(w, verdict, ended)
    w = replace(w, history=verdict.history)
    if verdict.delay == 0:
        return _relaunch(w, here)
    return replace(w, state=State.BACKOFF, reason=ended.reason, deadline=here.now + verdict.delay), NOTHING


def _give_up(w: Worker, verdict: restart.GaveUp, ended: Exit) -> Step:
    """It failed; and others with it, if it died too often and its policy wants that."""
    after, actions = _rest(replace(w, history=verdict.history), State.FAILED, verdict.reason or ended.reason)
    if verdict.then == "fail":
        return after, actions
    return after, (*actions, FailPool() if verdict.then == "fail-pool" else EndSupervisor())


def _rest(w: Worker, state: State, reason: str | None) -> Step:
    """Into STOPPED, DONE or FAILED, but not before every init was reaped."""
    if w.lingering:
        return replace(w, state=State.STOPPING, reason=reason, outcome=state), NOTHING
    w = replace(w, state=state, reason=reason, outcome=None)
    return w, (Forget(),) if w.removing else NOTHING


def _wait_over(w: Worker, event: Tick, here: Here) -> Step:
    """The backoff wait is over."""
    if w.deadline is None or here.now < w.deadline:
        return w, NOTHING
    return _relaunch(w, here)


# --- forgetting ----------------------------------------------------------------------------------------------------


def _reset(w: Worker, event: Input, here: Here) -> Step:
    """All failures are forgotten."""
    return replace(w, restarts=0, history=restart.FORGOTTEN), NOTHING


def _reset_failed(w: Worker, event: Input, here: Here) -> Step:
    """It has not failed any more, and is not wanted up before somebody says so."""
    w, _ = _reset(w, event, here)
    return _rest(replace(w, want_up=False), State.STOPPED, "operator")


def _reset_stopping(w: Worker, event: Input, here: Here) -> Step:
    """All failures are forgotten; whoever only waits to be failed will be stopped."""
    w, _ = _reset(w, event, here)
    if w.condemned or w.outcome is State.FAILED:
        outcome = State.STOPPED if w.outcome is State.FAILED else None
        w = replace(w, want_up=False, condemned=False, reason="operator", outcome=outcome)
    return w, NOTHING


def _reset_wait(w: Worker, event: Input, here: Here) -> Step:
    """All failures are forgotten, so the wait is no longer than the first one."""
    w, _ = _reset(w, event, here)
    first = restart.wait(here.spec.restart.backoff, 0, here.seed, w.id, w.generation)
    w = replace(w, history=restart.FORGOTTEN._replace(waits=1))
    return replace(w, deadline=min(w.deadline or 0.0, here.now + first)), NOTHING


# --- signals -------------------------------------------------------------------------------------------------------


def _signal(w: Worker, event: Kill, here: Here) -> Step:
    """What an operator asked for, as far as there is somebody to get it. No stop: the policy decides what follows."""
    if event.tree and w.init_host_pid is not None:
        if event.signo != SIGKILL:
            return w, (SignalTree(w.generation, event.signo),)
        return _kill(replace(w, stop_step=None))
    if not event.tree and w.host_pid is not None:
        return w, (SignalMain(w.generation, event.signo),)
    return w, NOTHING


def _reload(w: Worker, event: Reload, here: Here) -> Step:
    """The program is told to read its configuration again, where its spec says how."""
    reload = here.spec.reload
    if reload is None or w.host_pid is None:
        return w, NOTHING
    if reload.command is not None:
        return w, (RunCommand(w.generation, reload.command),)
    return w, (SignalMain(w.generation, reload.signal or 0),)


# --- the table -----------------------------------------------------------------------------------------------------


class Edge(NamedTuple):
    """What an event does in a state, and every state it may lead to (checked on each step)."""

    do: Callable[..., Step]
    to: frozenset[State]


def _to(do: Callable[..., Step], *states: State) -> Edge:
    return Edge(do, frozenset(states))


_S = State

TABLE: dict[tuple[State, type[Input]], Edge] = {
    (_S.STOPPED, Start): _to(_start, _S.STARTING, _S.WAITING),
    (_S.STOPPED, Restart): _to(_start, _S.STARTING, _S.WAITING),
    (_S.STOPPED, Remove): _to(_down, _S.STOPPED),
    (_S.STOPPED, Reset): _to(_reset, _S.STOPPED),
    (_S.WAITING, Start): _to(_stay_up, _S.WAITING),
    (_S.WAITING, Stop): _to(_down, _S.STOPPED, _S.STOPPING),
    (_S.WAITING, Restart): _to(_stay_up, _S.WAITING),
    (_S.WAITING, Remove): _to(_down, _S.STOPPED, _S.STOPPING),
    (_S.WAITING, Reset): _to(_reset, _S.WAITING),
    (_S.WAITING, Fail): _to(_fail_at_rest, _S.FAILED, _S.STOPPING),
    (_S.WAITING, Unblocked): _to(_unblocked, _S.WAITING, _S.STARTING),
    (_S.WAITING, Gone): _to(_gone, _S.WAITING),
    (_S.STARTING, Start): _to(_stay_up, _S.STARTING),
    (_S.STARTING, Stop): _to(_stop, _S.STOPPING),
    (_S.STARTING, Restart): _to(_restart, _S.STOPPING),
    (_S.STARTING, Remove): _to(_remove, _S.STOPPING),
    (_S.STARTING, DependencyLost): _to(_dependency_lost, _S.STOPPING),
    (_S.STARTING, Kill): _to(_signal, _S.STARTING),
    (_S.STARTING, Reset): _to(_reset, _S.STARTING),
    (_S.STARTING, Fail): _to(_fail, _S.STOPPING),
    (_S.STARTING, Launched): _to(_launched, _S.STARTING),
    (_S.STARTING, LaunchFailed): _to(_launch_failed, _S.BACKOFF, _S.FAILED, _S.STOPPING),
    (_S.STARTING, Started): _to(_started, _S.STARTING),
    (_S.STARTING, Running): _to(_running, _S.STARTING, _S.RUNNING),
    (_S.STARTING, Passed): _to(_passed, _S.STARTING),
    (_S.STARTING, Ready): _to(_ready, _S.STARTING, _S.RUNNING),
    (_S.STARTING, Sick): _to(_sick, _S.STOPPING),
    (_S.STARTING, Alive): _to(_alive, _S.STARTING),
    (_S.STARTING, Tick): _to(_unready_in_time, _S.STARTING, _S.STOPPING),
    (_S.STARTING, SetupFailed): _to(_setup_failed, _S.STARTING),
    (_S.STARTING, Exited): _to(_exited, _S.STOPPING, _S.STARTING, _S.BACKOFF),
    (_S.STARTING, Empty): _to(_empty, _S.BACKOFF, _S.STOPPING),
    (_S.STARTING, Gone): _to(_gone, _S.STARTING, _S.BACKOFF, _S.STOPPED, _S.FAILED, _S.DONE, _S.STOPPING),
    (_S.RUNNING, Start): _to(_stay_up, _S.RUNNING),
    (_S.RUNNING, Stop): _to(_stop, _S.STOPPING),
    (_S.RUNNING, Restart): _to(_restart, _S.STOPPING),
    (_S.RUNNING, Remove): _to(_remove, _S.STOPPING),
    (_S.RUNNING, DependencyLost): _to(_dependency_lost, _S.STOPPING),
    (_S.RUNNING, Kill): _to(_signal, _S.RUNNING),
    (_S.RUNNING, Ready): _to(_ready_again, _S.RUNNING),
    (_S.RUNNING, Unready): _to(_unready, _S.RUNNING),
    (_S.RUNNING, Sick): _to(_sick, _S.STOPPING),
    (_S.RUNNING, Alive): _to(_alive, _S.RUNNING),
    (_S.RUNNING, Tick): _to(_heartbeat_missed, _S.RUNNING, _S.STOPPING),
    (_S.RUNNING, Reload): _to(_reload, _S.RUNNING),
    (_S.RUNNING, Reset): _to(_reset, _S.RUNNING),
    (_S.RUNNING, Fail): _to(_fail, _S.STOPPING),
    (_S.RUNNING, Exited): _to(_exited, _S.STOPPING, _S.STARTING, _S.WAITING, _S.BACKOFF),
    (_S.RUNNING, Empty): _to(_empty, _S.STOPPING, _S.STARTING, _S.WAITING, _S.BACKOFF),
    (_S.RUNNING, Gone): _to(
        _gone, _S.RUNNING, _S.STARTING, _S.WAITING, _S.BACKOFF, _S.STOPPED, _S.FAILED, _S.DONE, _S.STOPPING
    ),
    (_S.STOPPING, Start): _to(_come_back, _S.STOPPING, _S.STARTING, _S.WAITING),
    (_S.STOPPING, Stop): _to(_stay_down, _S.STOPPING),
    (_S.STOPPING, Restart): _to(_come_back, _S.STOPPING, _S.STARTING, _S.WAITING),
    (_S.STOPPING, Remove): _to(_stay_down, _S.STOPPING),
    (_S.STOPPING, DependencyLost): _to(_dependency_lost_in_stop, _S.STOPPING),
    (_S.STOPPING, Released): _to(_released, _S.STOPPING),
    (_S.STOPPING, Kill): _to(_signal, _S.STOPPING),
    (_S.STOPPING, Reset): _to(_reset_stopping, _S.STOPPING),
    (_S.STOPPING, Fail): _to(_fail_after_stop, _S.STOPPING),
    (_S.STOPPING, Launched): _to(_launched_to_die, _S.STOPPING),
    (_S.STOPPING, LaunchFailed): _to(_launch_withdrawn, _S.STOPPED, _S.STARTING, _S.WAITING, _S.FAILED, _S.STOPPING),
    (_S.STOPPING, Started): _to(_started, _S.STOPPING),
    (_S.STOPPING, SetupFailed): _to(_setup_failed, _S.STOPPING),
    (_S.STOPPING, Exited): _to(_exited, _S.STOPPING, _S.STARTING, _S.WAITING, _S.BACKOFF),
    (_S.STOPPING, Empty): _to(_empty, _S.STOPPING, _S.STARTING, _S.WAITING, _S.BACKOFF),
    (_S.STOPPING, Gone): _to(_gone, _S.STOPPING, _S.STOPPED, _S.STARTING, _S.WAITING, _S.BACKOFF, _S.FAILED, _S.DONE),
    (_S.STOPPING, Alive): _to(_alive, _S.STOPPING),
    (_S.STOPPING, CommandFailed): _to(_command_failed, _S.STOPPING),
    (_S.STOPPING, Tick): _to(_next_stop_step, _S.STOPPING),
    (_S.BACKOFF, Start): _to(_start, _S.STARTING, _S.WAITING),
    (_S.BACKOFF, Stop): _to(_down, _S.STOPPED, _S.STOPPING),
    (_S.BACKOFF, Restart): _to(_start, _S.STARTING, _S.WAITING),
    (_S.BACKOFF, Remove): _to(_down, _S.STOPPED, _S.STOPPING),
    (_S.BACKOFF, Reset): _to(_reset_wait, _S.BACKOFF),
    (_S.BACKOFF, Fail): _to(_fail_at_rest, _S.FAILED, _S.STOPPING),
    (_S.BACKOFF, DependencyLost): _to(_dependency_lost_in_backoff, _S.BACKOFF, _S.STOPPED, _S.STOPPING),
    (_S.BACKOFF, Gone): _to(_gone, _S.BACKOFF),
    (_S.BACKOFF, Tick): _to(_wait_over, _S.BACKOFF, _S.STARTING, _S.WAITING),
    (_S.FAILED, Start): _to(_start, _S.STARTING, _S.WAITING),
    (_S.FAILED, Stop): _to(_down, _S.STOPPED),
    (_S.FAILED, Restart): _to(_start, _S.STARTING, _S.WAITING),
    (_S.FAILED, Remove): _to(_down, _S.STOPPED),
    (_S.FAILED, Reset): _to(_reset_failed, _S.STOPPED),
    (_S.DONE, Start): _to(_start, _S.STARTING, _S.WAITING),
    (_S.DONE, Stop): _to(_down, _S.STOPPED),
    (_S.DONE, Restart): _to(_start, _S.STARTING, _S.WAITING),
    (_S.DONE, Remove): _to(_down, _S.STOPPED),
    (_S.DONE, Reset): _to(_reset, _S.DONE),
    # Only an operator may say that what could not be proven ours is dealt with.
    (_S.LOST, Stop): _to(_down, _S.STOPPED, _S.STOPPING),
    (_S.LOST, Remove): _to(_down, _S.STOPPED, _S.STOPPING),
    (_S.LOST, Gone): _to(_gone, _S.LOST),
}

_PROGRESS: tuple[type[Input], ...] = (Launched, LaunchFailed, Started, Running, SetupFailed, Exited, Empty)
_HEALTH: tuple[type[Input], ...] = (Passed, Ready, Unready, Sick, Alive, CommandFailed)
_BETWEEN: tuple[type[Input], ...] = (Unblocked, DependencyLost, Released)


def _ignored(state: State, *kinds: type[Input]) -> frozenset[tuple[State, type[Input]]]:
    return frozenset((state, kind) for kind in kinds)


# Legal and without effect: repeated wishes, signals to nobody, late timers, and news of a life that is over (what
# happened after the kill is told by Gone alone) or of a step that this life has behind it.
IGNORED: frozenset[tuple[State, type[Input]]] = (
    _ignored(State.STOPPED, Stop, Kill, Reload, Fail, Tick, Gone, *_PROGRESS, *_HEALTH, *_BETWEEN)
    | _ignored(State.WAITING, Kill, Reload, Tick, DependencyLost, Released, *_PROGRESS, *_HEALTH)
    | _ignored(State.STARTING, Reload, Unready, CommandFailed, Unblocked, Released)
    | _ignored(State.RUNNING, Launched, LaunchFailed, Started, Running, SetupFailed, Passed, CommandFailed)
    | _ignored(State.RUNNING, Unblocked, Released)
    | _ignored(State.STOPPING, Reload, Running, Passed, Ready, Unready, Sick, Unblocked)
    | _ignored(State.BACKOFF, Kill, Reload, Unblocked, Released, *_PROGRESS, *_HEALTH)
    | _ignored(State.FAILED, Kill, Reload, Fail, Tick, Gone, *_PROGRESS, *_HEALTH, *_BETWEEN)
    | _ignored(State.DONE, Kill, Reload, Fail, Tick, Gone, *_PROGRESS, *_HEALTH, *_BETWEEN)
    | _ignored(State.LOST, Start, Restart, Kill, Reset, Reload, Fail, Tick, *_PROGRESS, *_HEALTH, *_BETWEEN)
)


def step(w: Worker, spec: PoolSpec, event: Input, now: float, seed: str = "", around: Around = ALONE) -> Step:
    """The worker after event, and the actions to do, in order.

    News of an older life, or of one that is over, changes nothing but `lingering`. Raises ImpossibleEvent for a pair
    that the table does not know, for news of a life never launched, and when an edge leads where it did not declare.
    """
    kind = type(event)
    edge = TABLE.get((w.state, kind))
    if isinstance(event, LifeInput):
        if event.generation > w.generation:
            raise ImpossibleEvent(f"{w.id}: {event} in generation {w.generation}")
        if kind is not Gone and (event.generation < w.generation or not w.alive):
            return w, NOTHING
    if edge is None:
        if (w.state, kind) in IGNORED:
            return w, NOTHING
        raise ImpossibleEvent(f"{w.id}: {event} in state {w.state}")
    result = edge.do(w, event, Here(spec, now, seed, around))
    if result[0].state not in edge.to:
        raise ImpossibleEvent(f"{w.id}: {event} led from {w.state} to {result[0].state}, which no edge declares")
    return result
