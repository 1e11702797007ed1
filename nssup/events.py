"""Everything that can happen to a worker: machine events (in), published events (out), and the exit record.

Pure data. Machine events say what the kernel or an operator did; they name the life (generation) they speak of,
so that news of a life already replaced can never act on its successor. Times are CLOCK_BOOTTIME seconds.
"""

import enum
from typing import Any, Literal

import msgspec


class State(enum.StrEnum):
    """interface.md, States."""

    STOPPED = "stopped"
    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"
    DONE = "done"
    LOST = "lost"


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How one life ended, as the kernel told it. Exactly one of code, signal is set, or neither when nobody can know.

    code: 0-255. signal: number. reason: of the closed set in docs/contracts.md (`exit:3`, `signal:SIGSEGV`,
    `exec-failed:ENOENT`, `setup-failed:mount_proc:EPERM`, `init-killed`); `start-timeout`, `watchdog`, `probe-failed`:
    it was stopped for that, and code or signal say how it went. cpu_seconds, max_rss_bytes: rusage of the
    main program, None when unknown. at: wall clock seconds since 1970, set by the loop, for display only.
    """

    reason: str
    code: int | None = None
    signal: int | None = None
    core: bool = False
    oom: bool = False
    timed_out: bool = False
    cpu_seconds: float | None = None
    max_rss_bytes: int | None = None
    at: float = 0.0


class Input(msgspec.Struct, frozen=True, tag=True):
    """Base of what `machine.step` takes."""


# --- asked by an operator, the API or the pool -------------------------------------------------------------------


class Start(Input, frozen=True):
    """Be up. Resets the restart counters."""


class Stop(Input, frozen=True):
    """Be down, by the stop sequence; beats every policy."""


class Restart(Input, frozen=True):
    """Stop by the stop sequence, then start again."""


class Remove(Input, frozen=True):
    """Stop, then forget the worker (scaled away)."""


class Reset(Input, frozen=True):
    """Forget all failures; who has failed is stopped. Nothing is launched or ended by it."""


class Fail(Input, frozen=True):
    """Go down and be failed, because the pool has failed; unless it is to be down anyway."""


class Reload(Input, frozen=True):
    """Have the program read its configuration again, in the way its spec says."""


class Kill(Input, frozen=True):
    """Send signo to the main program, or to every process of the worker (tree)."""

    signo: int
    tree: bool = False


# --- decided between pools ---------------------------------------------------------------------------------------


class Unblocked(Input, frozen=True):
    """What the pool requires is there, or lacks something else than before."""


class DependencyLost(Input, frozen=True):
    """A worker of `pool`, which this one's pool requires, is not as required any more. then: what is to follow."""

    pool: str
    then: Literal["restart", "stop"]


class Released(Input, frozen=True):
    """Those that require the worker's pool are down: its stop sequence may begin."""


# --- what became of a life ---------------------------------------------------------------------------------------


class LifeInput(Input, frozen=True):
    generation: int


class Launched(LifeInput, frozen=True):
    """The clone succeeded: init is there, nothing of the program ran yet."""

    init_host_pid: int


class LaunchFailed(LifeInput, frozen=True):
    """The launch failed before there was an init; nothing remains. reason: `setup-failed:STEP:ERRNO`."""

    reason: str


class Started(LifeInput, frozen=True):
    """The worker's process exists and is about to exec: its PIDs, translated by the kernel."""

    host_pid: int
    ns_pid: int


class Running(LifeInput, frozen=True):
    """The exec succeeded."""


class Passed(LifeInput, frozen=True):
    """The startup probe has succeeded: from now on it is asked whether the program is ready."""


class Ready(LifeInput, frozen=True):
    """The program is ready, by whatever was asked of it."""


class Unready(LifeInput, frozen=True):
    """The program is not ready any more. reason: `probe-failed`, or `stopping` by its own word."""

    reason: str


class Sick(LifeInput, frozen=True):
    """The program runs, and is of no use: it is to be stopped. reason: `watchdog` or `probe-failed`."""

    reason: str


class Alive(LifeInput, frozen=True):
    """The program said something that its deadlines depend on. until: its last heartbeat is good until then, None: it
    moves nothing; extend: seconds that it wanted from extend_at on, for whatever is being waited for."""

    until: float | None = None
    extend: float = 0.0
    extend_at: float = 0.0


class CommandFailed(LifeInput, frozen=True):
    """The command of this step of the stop sequence could not be run, or failed; or its signal was dropped by the
    kernel, as the program is a PID 1 that does not handle it."""

    stop_step: int


class SetupFailed(LifeInput, frozen=True):
    """A step inside failed; the life will be empty next. reason: `setup-failed:STEP:ERRNO` or `exec-failed:ERRNO`."""

    reason: str


class Exited(LifeInput, frozen=True):
    """The main program ended. empty: the namespace is empty as well (no Empty follows). at: when, None: just now."""

    exit: Exit
    empty: bool = False
    at: float | None = None


class Empty(LifeInput, frozen=True):
    """Nothing but init is left in the namespace: the life is over, the next may launch."""


class Gone(LifeInput, frozen=True):
    """init itself was reaped: the kernel's proof. exit: what the reaper saw, used only if no Exited came before."""

    exit: Exit | None = None


class Tick(Input, frozen=True):
    """The worker's deadline has passed."""


# --- published ---------------------------------------------------------------------------------------------------


class Event(msgspec.Struct, frozen=True, omit_defaults=True, rename={"from_": "from"}):
    """One change, published once: to nssup.jsonl, to `ctl events` and to library observers (contracts, part d).

    event: past tense. ts: wall clock seconds since 1970 (rendered RFC 3339 where written). Exactly one of worker
    (`web/3`) and pool is set, or neither when the supervisor itself is meant.
    """

    event: str
    epoch: int = 0
    seq: int = 0
    ts: float = 0.0
    worker: str | None = None
    pool: str | None = None
    from_: str | None = None
    to: str | None = None
    reason: str | None = None
    generation: int | None = None
    host_pid: int | None = None
    ns_pid: int | None = None
    exit: Exit | None = None
    detail: dict[str, Any] | None = None
    v: int = 1
