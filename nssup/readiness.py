"""What makes a worker ready, keeps it so, and makes it useless: from what it says of itself to events. Pure.

init keeps the last values of all that a program said, so everything here is asked of values and never of differences:
the same news twice, or after a supervisor has died, lead to the same events once.
"""

from nssup.events import Alive, LifeInput, Passed, Ready, Sick, State, Unready
from nssup.machine import Worker
from nssup.spec import PoolSpec, Probe
from nssup.wire import Flag, Notified

_STATES = frozenset({State.STARTING, State.RUNNING, State.STOPPING})


def wants_socket(spec: PoolSpec) -> bool:
    """Whether its programs get the socket of sd_notify(3)."""
    said = (probe is not None and probe.notify == "sd" for probe in (spec.startup, spec.ready))
    return spec.watchdog is not None or any(said)


def ready_fd(spec: PoolSpec) -> int | None:
    """The descriptor on which its programs say a newline, if they do."""
    return next((probe.fd for probe in (spec.startup, spec.ready) if probe is not None and probe.notify == "fd"), None)


def awaits_startup(spec: PoolSpec, w: Worker) -> bool:
    """Whether a starting worker has yet to satisfy its startup probe, and not its ready probe."""
    return spec.startup is not None and not w.passed


def awaited(spec: PoolSpec, w: Worker) -> Probe | None:
    """The probe that a program which runs, and is starting, has yet to satisfy; None: there is none."""
    return spec.startup if awaits_startup(spec, w) else spec.ready


def succeeded(spec: PoolSpec, w: Worker) -> LifeInput:
    """What it means that the awaited probe of a starting worker has."""
    if awaits_startup(spec, w) and spec.ready is not None:
        return Passed(w.generation)
    return Ready(w.generation)


def follows(spec: PoolSpec, w: Worker, told: Notified) -> LifeInput | None:
    """The next thing that what the program has told so far means for the worker, None: nothing more.

    To be fed and asked again: each makes itself untrue.
    """
    if not w.alive or w.state not in _STATES:
        return None
    if w.state is State.STARTING:
        found = _starting(spec, w, told)
    elif w.state is State.RUNNING:
        found = _running(spec, w, told)
    else:
        found = None
    return found or _alive(spec, w, told)


def _starting(spec: PoolSpec, w: Worker, told: Notified) -> LifeInput | None:
    probe = awaited(spec, w)
    if w.running_since is None or probe is None or probe.notify is None or not told.flags & Flag.READY:
        return None
    return succeeded(spec, w)


def _running(spec: PoolSpec, w: Worker, told: Notified) -> LifeInput | None:
    if spec.watchdog is not None and told.triggers:
        return Sick(w.generation, "watchdog")
    if w.ready and told.flags & Flag.STOPPING:
        return Unready(w.generation, "stopping")
    return None


def _alive(spec: PoolSpec, w: Worker, told: Notified) -> LifeInput | None:
    """Whether one of the program's deadlines moves, by a heartbeat or because it asks for more time."""
    if w.deadline is None or w.exit is not None:
        return None
    if w.state is not State.RUNNING:
        at = told.extend_ns / 1e9
        return Alive(w.generation, extend=told.extend_us / 1e6, extend_at=at) if at > w.extended else None
    if spec.watchdog is None or not told.watchdog_ns:
        return None
    until = told.watchdog_ns / 1e9 + (told.watchdog_us / 1e6 or spec.watchdog)
    return Alive(w.generation, until) if until > w.deadline else None
