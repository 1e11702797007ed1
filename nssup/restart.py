"""Whether a life that ended by itself is followed by another, and after how long.

Knows no clock, no state and no wish of the operator: an end that was asked for never gets here. Pure; the rules are
those of interface.md, `[pool.web.restart]`.
"""

import zlib
from typing import Literal, NamedTuple

from nssup.events import Exit
from nssup.spec import Backoff, RestartPolicy

# A wait of nothing between lives that do not settle would be a busy loop.
MIN_WAIT = 0.001

# The reasons of lives in which the program never ran.
NEVER_RAN = ("setup-failed:", "exec-failed:")

# The reasons for which we stop a worker ourselves: a failure, however well it went then.
FAULTS = frozenset({"start-timeout", "watchdog", "probe-failed"})


class History(NamedTuple):
    """What the lives since the last long or newly asked for one leave behind.

    waits: backoff waits so far. spared: a settled life has had its immediate restart.
    """

    waits: int = 0
    spared: bool = False


FORGOTTEN = History()


class Again(NamedTuple):
    """Launch again after delay seconds; 0.0 means at once, without a backoff."""

    delay: float
    history: History


class Finished(NamedTuple):
    """It ended well and stays so."""


class GaveUp(NamedTuple):
    """It failed, and its policy wants no other life."""


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
    seed: str,
    worker_id: str,
    generation: int,
) -> Again | Finished | GaveUp:
    """What follows a life that nobody asked to end.

    uptime: seconds it was RUNNING, which is ready where that is asked; None when it never was. generation: the life's
    that ended.
    A oneshot that ended well is finished whatever its policy. Never raises.
    """
    well = exit.code in policy.success and exit.reason not in FAULTS
    if well and (type == "oneshot" or policy.policy != "always"):
        return Finished()
    if policy.policy == "never":
        return GaveUp()
    if uptime is not None and uptime >= policy.backoff.reset_after:
        history = FORGOTTEN
    ran = uptime is not None and not exit.reason.startswith(NEVER_RAN)
    if ran and not history.spared and uptime is not None and uptime >= policy.settle:
        return Again(0.0, history._replace(spared=True))
    delay = wait(policy.backoff, history.waits, seed, worker_id, generation)
    return Again(delay, history._replace(waits=history.waits + 1))
