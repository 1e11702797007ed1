"""One contract for two worlds: what the core tells of a story is the same over real processes and in the fake world."""

from __future__ import annotations

import asyncio
import math
import signal
from typing import TYPE_CHECKING, NamedTuple

import pytest
from live import PATIENCE, needs_namespaces

from nssup.events import Event, Exit, Input, Kill, Restart, Start, Stop
from nssup.loop import Supervisor
from nssup.sim import Fate, Simulation
from nssup.spec import Backoff, Intensity, PoolSpec, Probe, RestartPolicy, StopStep

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

pytestmark = [pytest.mark.both_loops, needs_namespaces]

NEVER = RestartPolicy(policy="never")
SLOWLY = Backoff(first=600.0, max=600.0, jitter=0.0)
ALWAYS = RestartPolicy(settle=60.0, backoff=SLOWLY)
AGAIN = RestartPolicy(policy="on-failure", settle=60.0, backoff=SLOWLY)
QUICKLY = Backoff(first=0.01, max=0.01, jitter=0.0)
TOO_OFTEN = RestartPolicy(settle=60.0, backoff=QUICKLY, intensity=Intensity(deaths=3, within=60.0))
DEAF = ("sh", "-c", 'trap "" TERM; echo >&3; exec 3>&-; exec sleep 1000')
SAYS = Probe(notify="fd")
THREE = Exit(reason="exit:3", code=3)


class Story(NamedTuple):
    """A program, what becomes of its lives in the fake world, and what is fed when which event was told how often."""

    command: tuple[str, ...]
    fate: Fate
    steps: Sequence[tuple[str, int, Input]]
    last: tuple[str, int]
    fields: Mapping[str, object]


SLEEP = ("sleep", "1000")
GENTLE = {"stop": (StopStep(signal.SIGTERM, 600.0), StopStep(None))}
STORIES = {
    "it ends well": Story(("true",), Fate(life=0.0), [], ("finished", 1), {"type": "oneshot", "restart": NEVER}),
    "it fails": Story(("sh", "-c", "exit 3"), Fate(life=0.0, exit=THREE), [], ("failed", 1), {"restart": NEVER}),
    "it crashes until somebody stops it": Story(
        ("sh", "-c", "exit 3"),
        Fate(life=0.0, exit=THREE),
        [("backed_off", 1, Stop())],
        ("stopped", 1),
        {"restart": AGAIN},
    ),
    "it dies too often": Story(
        ("sh", "-c", "exit 3"), Fate(life=0.0, exit=THREE), [], ("failed", 1), {"restart": TOO_OFTEN}
    ),
    "there is no such program": Story(
        ("/nonexistent/program",),
        Fate(setup_fails="exec-failed:ENOENT", launch=0.0),
        [("backed_off", 1, Stop())],
        ("stopped", 1),
        {"restart": ALWAYS},
    ),
    "it obeys": Story(SLEEP, Fate(), [("started", 1, Stop())], ("stopped", 1), GENTLE),
    "it is deaf": Story(
        DEAF,
        Fate(obeys=math.inf),
        [("started", 1, Stop())],
        ("stopped", 1),
        {"stop": (StopStep(signal.SIGTERM, 0.05), StopStep(None)), "ready": SAYS},
    ),
    "it is restarted and stopped": Story(
        SLEEP, Fate(), [("started", 1, Restart()), ("started", 2, Stop())], ("stopped", 1), GENTLE
    ),
    "it is killed": Story(SLEEP, Fate(), [("started", 1, Kill(signal.SIGKILL))], ("failed", 1), {"restart": NEVER}),
    "it is stopped and started": Story(
        SLEEP, Fate(), [("started", 1, Stop()), ("stopped", 1, Start()), ("started", 2, Stop())], ("stopped", 2), GENTLE
    ),
}


def told(events: Sequence[Event]) -> list[tuple[object, ...]]:
    """What a story is, without when it was and who was in it."""
    return [
        (e.event, e.from_, e.to, e.reason, e.generation, e.exit and (e.exit.code, e.exit.signal, e.exit.reason))
        for e in events
        if e.worker == "web/0"
    ]


def seen(events: Sequence[Event], name: str, times: int) -> bool:
    return sum(event.event == name and event.worker == "web/0" for event in events) >= times


async def real(story: Story, spec: PoolSpec) -> list[Event]:
    events: list[Event] = []
    changed = asyncio.Event()

    def note(event: Event) -> None:
        events.append(event)
        changed.set()

    async with asyncio.timeout(PATIENCE), Supervisor() as supervisor:
        supervisor.subscribe(note)
        supervisor.add_pool(spec)
        for name, times, what in [*story.steps, (*story.last, None)]:
            while not seen(events, name, times):
                changed.clear()
                await changed.wait()
            worker_id = "web/0"  # a stop would wait for its init: who is first is chance, and no event tells
            while supervisor.workers.workers[worker_id].lingering:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            if what is not None:
                supervisor.feed(worker_id, what)
        found = list(events)
    return found


def fake(story: Story, spec: PoolSpec) -> list[Event]:
    events: list[Event] = []
    world = Simulation(lambda worker_id, generation: story.fate, observe=events.append)
    world.add_pool(spec)
    for name, times, what in [*story.steps, (*story.last, None)]:
        while not seen(events, name, times):
            assert world.now < 1000.0, f"{name} never comes"
            world.run(world.now + 0.001)
        while world.workers.workers["web/0"].lingering:
            world.run(world.now + 0.001)
        if what is not None:
            world.feed("web/0", what)
    return events


@pytest.mark.parametrize("name", STORIES)
async def test_both_worlds_tell_the_same(name: str) -> None:
    story = STORIES[name]
    spec = PoolSpec(name="web", command=story.command, **story.fields)  # type: ignore[arg-type]
    assert told(await real(story, spec)) == told(fake(story, spec))
