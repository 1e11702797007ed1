"""Probes: which ones a worker wants at a moment, when each is tried next, and what its results mean. Pure.

A probe that is awaited at the start is tried at once, and then less and less often up to `every`; one of a worker that
runs has its place in the period by a hash, so that a thousand of them do not come at the same time.
"""

import zlib
from typing import Literal, NamedTuple, TypeAlias

from nssup.events import LifeInput, Ready, Sick, State, Unready
from nssup.machine import Worker
from nssup.readiness import awaited, awaits_startup, succeeded
from nssup.spec import PoolSpec, Probe

Name: TypeAlias = Literal["startup", "ready", "live"]

TRIED = frozenset({"http", "tcp", "unix", "exec"})  # ways that are tried again and again; the others tell by themselves
FAILURES = 3  # in a row change the answer, where the probe does not say how many
SOON = 0.05  # seconds from the first try to the second, while a start is awaited
JITTER = 0.1  # each wait is longer or shorter by up to this share of it


class Gauge(NamedTuple):
    """Where a probe of one life stands. answer: what it says for now; against: results in a row that say the opposite.
    tries: so far; failed: failures in a row."""

    answer: bool
    against: int = 0
    tries: int = 0
    failed: int = 0


def wanted(spec: PoolSpec, w: Worker) -> dict[Name, bool]:
    """The probes to try while the worker is as it is; true: somebody waits for the answer."""
    if not w.alive:
        return {}
    if w.state is State.STARTING and w.running_since is not None:
        probe = awaited(spec, w)
        if probe is None or probe.way not in TRIED:
            return {}
        return {"startup": True} if awaits_startup(spec, w) else {"ready": True}
    if w.state is not State.RUNNING:
        return {}
    found: dict[Name, bool] = {}
    if spec.ready is not None and spec.ready.way in TRIED:
        found["ready"] = False
    if spec.live is not None:
        found["live"] = False
    return found


def begin(name: Name, w: Worker, hurried: bool) -> Gauge:
    """Of a probe that is wanted from now on; hurried: somebody waits for it, so the answer is no until it is yes. Else
    the answer is what the worker is: one that was taken over may have lost its readiness before."""
    return Gauge(answer=not hurried and (w.ready or name != "ready"))


def share(key: str) -> float:
    """A number from 0 to 1, always the same for this key, and another for others."""
    return (zlib.crc32(key.encode()) * 0x9E3779B1 & 0xFFFFFFFF) / 0x100000000


def wait(probe: Probe, gauge: Gauge, hurried: bool, key: str) -> float:
    """Seconds until the next try."""
    if hurried:
        seconds = 0.0 if not gauge.tries else min(SOON * 2.0 ** min(gauge.tries - 1, 60), probe.every)
    elif not gauge.tries:
        return probe.every * share(key)
    else:
        seconds = probe.every
    return seconds * (1 + JITTER * (2 * share(f"{key}:{gauge.tries}") - 1))


def after(probe: Probe, gauge: Gauge, good: bool) -> Gauge:
    """The gauge after one more result."""
    tries, failed = gauge.tries + 1, 0 if good else gauge.failed + 1
    if good is gauge.answer:
        return Gauge(good, 0, tries, failed)
    against = gauge.against + 1
    enough = probe.successes if good else probe.failures or FAILURES
    return Gauge(good, 0, tries, failed) if against >= enough else Gauge(gauge.answer, against, tries, failed)


def meaning(name: Name, spec: PoolSpec, w: Worker, before: Gauge, now: Gauge) -> LifeInput | None:
    """What a result means for the worker; None: nothing."""
    if w.state is State.STARTING:
        if now.answer:
            return succeeded(spec, w)
        fatal = name == "startup" and spec.startup is not None and spec.startup.failures
        return Sick(w.generation, "probe-failed") if fatal and now.failed >= fatal else None
    if before.answer is now.answer:
        return None
    if name == "live":
        return None if now.answer else Sick(w.generation, "probe-failed")
    return Ready(w.generation) if now.answer else Unready(w.generation, "probe-failed")
