from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import pytest

from nssup.errors import ImpossibleEvent
from nssup.events import Event, Exit, Gone, Kill, Restart, Start, State, Stop
from nssup.machine import Forget, KillTree, Launch, SignalMain
from nssup.sim import Fate, Simulation, seeded
from nssup.spec import Backoff, PoolSpec, Probe, RestartPolicy, StopStep

if TYPE_CHECKING:
    from collections.abc import Callable

CODE_3 = Exit(reason="exit:3", code=3)
STEADY = RestartPolicy(backoff=Backoff(jitter=0.0))


def web(workers: int = 1, **fields: object) -> PoolSpec:
    return PoolSpec(name="web", command=("app",), workers=workers, **{"restart": STEADY, **fields})  # type: ignore[arg-type]


def script(*fates: Fate) -> Callable[[str, int], Fate]:
    """One fate after the other; the last for ever."""
    return lambda worker_id, generation: fates[min(generation, len(fates)) - 1]


def played(spec: PoolSpec, *fates: Fate, until: float = 60.0) -> tuple[Simulation, list[Event]]:
    told: list[Event] = []
    sim = Simulation(script(*fates), seed="seed", observe=told.append)
    sim.add_pool(spec)
    sim.run(until)
    return sim, [event for event in told if event.to]


def test_a_crash_loop_in_the_fake_world() -> None:
    sim, told = played(web(), Fate(life=0.0, launch=0.0, exit=CODE_3), until=10.0)
    launches = [event.ts for event in told if event.to == "starting"]
    assert [b - a for a, b in itertools.pairwise(launches)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
    assert sim.now == 10.0


def test_a_settled_life_is_followed_before_its_init_is_reaped() -> None:
    sim, told = played(web(), Fate(life=5.0, rest=0.1, reap=20.0), Fate(), until=10.0)
    assert [event.to for event in told] == ["starting", "running", "stopping", "starting", "running"]
    assert sim.unreaped() == 2
    sim.run(30.0)
    assert sim.unreaped() == 1


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        (Fate(launch_fails="setup-failed:clone:EAGAIN"), "setup-failed:clone:EAGAIN"),
        (Fate(setup_fails="exec-failed:ENOENT"), "exec-failed:ENOENT"),
        (Fate(life=1.0, init_dies=True), "init-killed"),
    ],
)
def test_lives_that_go_wrong(fate: Fate, reason: str) -> None:
    sim, told = played(web(restart=RestartPolicy(policy="never")), fate)
    assert (told[-1].to, told[-1].reason) == ("failed", reason)
    assert sim.unreaped() == 0


def test_a_deaf_program_is_killed_in_the_end() -> None:
    sim, _ = played(web(), Fate(obeys=math.inf))
    sim.feed("web/0", Stop())
    sim.run(69.0)
    assert sim.workers.workers["web/0"].state is State.STOPPING
    sim.run(71.0)
    last = sim.workers.workers["web/0"].last_exit
    assert last is not None
    assert (last.signal, last.timed_out) == (9, True)


def test_signals_in_the_fake_world() -> None:
    sim, _ = played(web(3), Fate())
    sim.feed("web/0", Kill(1))
    sim.feed("web/1", Kill(9, tree=True))
    sim.feed("web/2", Restart())
    sim.run(61.0)
    assert [w.generation for w in sim.workers.workers.values()] == [2, 2, 2]
    exits = [w.last_exit.reason for w in sim.workers.workers.values() if w.last_exit]
    assert exits == ["signal:SIGHUP", "signal:SIGKILL", "signal:SIGTERM"]


def test_an_init_that_dies_after_all_was_said_dies_once() -> None:
    sim, _ = played(web(), Fate(life=100.0, init_dies=True), Fate())
    sim.feed("web/0", Restart())
    sim.run(200.0)
    assert sim.workers.workers["web/0"].generation == 2
    assert sim.unreaped() == 1


def test_the_fake_world_refuses_what_no_supervisor_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    sim, _ = played(web(), Fate())
    for action, why in ((Launch(2), "a second life"), (Forget(), "something of it is left")):
        monkeypatch.setattr(sim.workers, "feed", lambda *_, a=action: [("web/0", a)])
        with pytest.raises(ImpossibleEvent, match=why):
            sim.feed("web/0", Start())
    sim, _ = played(web(), Fate(), until=0.0)
    for sent in (SignalMain(9, 15), KillTree(9)):
        monkeypatch.setattr(sim.workers, "feed", lambda *_, a=sent: [("web/0", a)])
        with pytest.raises(ImpossibleEvent, match="to a life that is over"):
            sim.feed("web/0", Gone(1))


def ten_minutes(seed: str, workers: int) -> Simulation:
    """A fleet in trouble, with an operator who restarts a part of it, scales it twice and ends it."""
    sim = Simulation(seeded(seed, mean_life=1200.0), seed=seed)
    sim.add_pool(web(workers))
    sim.add_pool(PoolSpec(name="job", command=("app",), workers=workers // 10, type="oneshot", restart=STEADY))
    sim.run(200.0)
    for index in range(0, workers, 10):
        sim.feed(f"web/{index}", Restart())
    sim.run(300.0)
    sim.scale("web", workers // 2)
    sim.run(300.1)
    sim.scale("web", workers)
    sim.run(590.0)
    assert sum(worker.state is State.RUNNING for worker in sim.workers.workers.values()) > workers * 0.9
    sim.remove_pool("web")
    sim.remove_pool("job")
    sim.run(700.0)
    assert not sim.workers.workers
    assert sim.unreaped() == 0
    assert sim.workers.next_deadline() is None
    return sim


def test_one_seed_gives_one_trace() -> None:
    assert ten_minutes("a", 200).trace() == ten_minutes("a", 200).trace()
    assert ten_minutes("a", 200).trace() != ten_minutes("b", 200).trace()


@pytest.mark.slow
def test_ten_thousand_workers_for_ten_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    sim = ten_minutes("fleet", 10_000)
    again = ten_minutes("fleet", 10_000)
    assert sim.trace() == again.trace()
    assert sim.bounds == again.bounds
    assert sim.bounds.launches > 20_000
    assert sim.bounds.most_deadlines <= 2 * 11_000 + 64
    with capsys.disabled():
        print(f"\n{sim.bounds}")


def test_readiness_in_the_fake_world() -> None:
    spec = web(ready=Probe(notify="sd"), start_timeout=2.0)
    _, told = played(spec, Fate(ready=math.inf), Fate(ready=0.5), until=10.0)
    assert [(event.event, event.reason, round(event.ts, 2)) for event in told] == [
        ("launched", None, 0.0),
        ("stop_begun", "start-timeout", 2.0),
        ("backed_off", "start-timeout", 2.01),
        ("relaunched", "start-timeout", 2.11),
        ("started", None, 2.61),
    ]


def test_a_stop_command_in_the_fake_world() -> None:
    spec = web(stop=(StopStep(None, 1.0, ("app", "quit")), StopStep(15, 1.0), StopStep(None)))
    sim, told = played(spec, Fate(obeys=0.25), until=5.0)
    sim.feed("web/0", Stop())
    sim.run(10.0)
    assert [event.event for event in told] == ["launched", "started"]
    worker = sim.workers.workers["web/0"]
    assert (worker.state, worker.generation) == (State.STOPPED, 1)
    assert sim.workers.workers["web/0"].last_exit == Exit(reason="exit:0", code=0, at=5.25)
