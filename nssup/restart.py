"""Whether a life that ended by itself is followed by another, and after how long.

Knows no clock, no state and no wish of the operator: an end that was asked for never gets here. Pure; the rules are
those of interface.md, `[pool.web.restart]`.
"""

import zlib
from typing import Literal, NamedTuple, TypeAlias

from nssup.events import Exit
from nssup.spec import Backoff, Intensity, RestartPolicy, Rule

# A wait of nothing between lives that do not settle would be a busy loop.
MIN_WAIT = 0.001
# For the same reason: so many lives in a row that did not settle may be followed at once because a rule says so.
MOST_HURRIED = 10

# The reasons of lives in which the program never ran.
NEVER_RAN = ("setup-failed:", "exec-failed:")

# The reasons for which we stop a worker ourselves: a failure, however well it went then.
FAULTS = frozenset({"start-timeout", "watchdog", "probe-failed"})

TOO_MANY = "intensity"  # the reason of a worker that died too often


class History(NamedTuple):
    """What the lives since the last long or newly asked for one leave behind.

    waits: backoff waits so far, after lives in which the program ran. spared: a settled life has had its immediate
    restart. unlaunched: launches in a row that failed before the program ran. hurried: lives in a row that did not
    settle and were followed at once by a rule. deaths: when the last ones were, oldest first, CLOCK_BOOTTIME seconds:
    as many as intensity counts. Those alone outlast a long life.
    """

    waits: int = 0
    spared: bool = False
    unlaunched: int = 0
    hurried: int = 0
    deaths: tuple[float, ...] = ()


FORGOTTEN = History()


class Again(NamedTuple):
    """Launch again after delay seconds; 0.0 means at once, without a backoff."""

    delay: float
    history: History


class Finished(NamedTuple):
    """It ended well and stays so."""


class Halted(NamedTuple):
    """A rule wants no other life, and calls it no failure."""


class GaveUp(NamedTuple):
    """It failed, and there is no other life. reason: TOO_MANY, or None: its last end is. then: who fails with it."""

    reason: str | None = None
    then: Literal["fail", "fail-pool", "shutdown"] = "fail"
    history: History = FORGOTTEN


Verdict: TypeAlias = Again | Finished | Halted | GaveUp


def wait(backoff: Backoff, waits: int, seed: str, worker_id: str, generation: int) -> float:
    """Seconds of the backoff wait after `waits` earlier ones, at least MIN_WAIT. Never raises, however many.

    The jitter is a hash of seed, id and generation: the same in a replay, different between workers and hosts.
    """
    try:
        seconds = min(backoff.first * backoff.factor**waits, backoff.max)
    except OverflowError:
        seconds = backoff.max
    hashed = zlib.crc32(f"{seed}:{worker_id}:{generation}".encode())
    # crc32 is linear: the multiplication parts neighbours that the crc leaves at a fixed distance.
    share = (hashed * 0x9E3779B1 & 0xFFFFFFFF) / 0xFFFFFFFF
    return max(seconds * (1 + backoff.jitter * (2 * share - 1)), MIN_WAIT)


def decide(
    policy: RestartPolicy,
    type: Literal["service", "oneshot"],  # noqa: A002 - the config's word
    history: History,
    exit: Exit,  # noqa: A002 - the word of events and records
    uptime: float | None,
    *,
    now: float,
    seed: str,
    worker_id: str,
    generation: int,
) -> Verdict:
    """What follows a life that nobody asked to end.

    uptime: seconds it was RUNNING, which is ready where that is asked; None when it never was. now: when it was over.
    generation: the life's that ended.
    A oneshot that ended well is finished whatever its policy. Never raises.
    """

    def waited(times: int) -> float:
        return wait(policy.backoff, times, seed, worker_id, generation)

    if exit.reason.startswith(NEVER_RAN):
        if policy.policy == "never":
            return GaveUp(history=history)
        return Again(waited(history.unlaunched), history._replace(unlaunched=history.unlaunched + 1))
    then = _wanted(policy, type, exit)
    if then in ("finish", "stop", "fail"):
        return Finished() if then == "finish" else Halted() if then == "stop" else GaveUp(history=history)
    history = _after_death(policy, history, uptime, now)
    too_many = policy.intensity is not None and len(history.deaths) >= policy.intensity.deaths
    if policy.intensity is not None and too_many and policy.intensity.then != "backoff":
        return GaveUp(TOO_MANY, policy.intensity.then, history)
    settled = uptime is not None and uptime >= policy.settle
    if not too_many and _at_once(then, history, settled):
        hurried = 0 if settled else history.hurried + 1
        return Again(0.0, history._replace(spared=history.spared or then == "restart", hurried=hurried))
    delay = waited(history.waits)
    if policy.intensity is not None and too_many:
        delay = max(delay, history.deaths[0] + policy.intensity.within - now)
    return Again(delay, history._replace(waits=history.waits + 1, hurried=0 if settled else history.hurried))


def _wanted(
    policy: RestartPolicy,
    type: Literal["service", "oneshot"],  # noqa: A002
    exit: Exit,  # noqa: A002
) -> Literal["restart", "restart-now", "backoff", "stop", "fail", "finish"]:
    """What the rules want after this end, else the policy. An end that we caused is a failure of no rule."""
    ours = exit.reason in FAULTS
    rule = None if ours else next((rule for rule in policy.rules if _matches(rule, exit)), None)
    if rule is not None:
        return rule.then
    if not ours and _well(policy, exit) and (type == "oneshot" or policy.policy != "always"):
        return "finish"
    return "fail" if policy.policy == "never" else "restart"


def _matches(rule: Rule, exit: Exit) -> bool:  # noqa: A002
    return exit.code in rule.exit or exit.signal in rule.signal


def _well(policy: RestartPolicy, exit: Exit) -> bool:  # noqa: A002
    return exit.code in policy.success or (exit.signal is not None and -exit.signal in policy.success)


def _after_death(policy: RestartPolicy, history: History, uptime: float | None, now: float) -> History:
    """history with one more death; what a long life makes forgotten is forgotten."""
    if uptime is not None and uptime >= policy.backoff.reset_after:
        history = FORGOTTEN._replace(deaths=history.deaths)
    return history._replace(unlaunched=0, deaths=counted(policy.intensity, (*history.deaths, now), now))


def counted(intensity: Intensity | None, deaths: tuple[float, ...], now: float) -> tuple[float, ...]:
    """Those of the deaths that count at this moment, the newest of them."""
    if intensity is None:
        return ()
    return tuple(at for at in deaths if at > now - intensity.within)[-intensity.deaths :]


def _at_once(then: str, history: History, settled: bool) -> bool:
    """Whether the next life needs no wait, unless there were too many deaths."""
    if then == "restart-now":
        return settled or history.hurried < MOST_HURRIED
    return then == "restart" and settled and not history.spared
