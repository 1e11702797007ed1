"""Scripted failure histories in the fake world: which launches follow, and exactly when."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import pytest

from nssup.events import Event, Exit, Reload, Reset, Restart, Start, State, Stop
from nssup.sim import Fate, Simulation
from nssup.spec import Backoff, Intensity, PoolSpec, ReloadSpec, RestartPolicy, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nssup.machine import Worker

EVEN = Backoff(jitter=0.0)


def lives(seconds: float, code: int = 3, count: int = 1) -> list[Fate]:
    """Lives that run so long, with launches that take no time."""
    return [Fate(launch=0.0, life=seconds, exit=Exit(reason=f"exit:{code}", code=code), reap=0.001)] * count


def killed(seconds: float, signal: int, name: str) -> list[Fate]:
    return [Fate(launch=0.0, life=seconds, exit=Exit(reason=f"signal:{name}", signal=signal))]


NO_PROGRAM = Fate(launch=0.0, setup_fails="exec-failed:ENOENT")
NO_CLONE = Fate(launch_fails="setup-failed:clone:EAGAIN")
FOR_EVER = [Fate(launch=0.0)]


class Play:
    """One pool whose workers have these fates, one after the other; the last for ever."""

    def __init__(
        self,
        fates: Sequence[Fate],
        workers: int = 1,
        restart: RestartPolicy | None = None,
        others: Sequence[Fate] = FOR_EVER,
        **fields: object,
    ) -> None:
        """others: of web/1 and so on."""
        self.told: list[Event] = []
        self.sim = Simulation(self._fates(fates, others), seed="seed", observe=self.told.append)
        policy = restart or RestartPolicy(backoff=EVEN)
        self.sim.add_pool(PoolSpec(name="web", command=("app",), workers=workers, restart=policy, **fields))  # type: ignore[arg-type]

    def _fates(self, first: Sequence[Fate], others: Sequence[Fate]) -> Callable[[str, int], Fate]:
        def fate(worker_id: str, generation: int) -> Fate:
            script = first if worker_id == "web/0" else others
            return script[min(generation, len(script)) - 1]

        return fate

    def run(self, until: float) -> Play:
        self.sim.run(until)
        return self

    def worker(self, index: int = 0) -> Worker:
        return self.sim.workers.workers[f"web/{index}"]

    def launches(self, index: int = 0) -> list[float]:
        names = ("launched", "relaunched")
        return [round(e.ts, 6) for e in self.told if e.worker == f"web/{index}" and e.event in names]

    def events(self, worker: str = "web/0") -> list[str]:
        return [e.event for e in self.told if e.worker == worker]

    def states(self) -> list[tuple[str, str | None]]:
        return [(w.state.value, w.reason) for w in self.sim.workers.workers.values()]


class Scenario(NamedTuple):
    fates: list[Fate]
    launches: list[float]
    state: str = "running"
    reason: str | None = None
    restart: RestartPolicy = RestartPolicy(backoff=EVEN)
    type: str = "service"


LIMITED = Intensity(deaths=3, within=60.0)
SCENARIOS = {
    "a crash loop": Scenario([*lives(0.0, count=6), *FOR_EVER], [0.0, 0.1, 0.3, 0.7, 1.5, 3.1, 6.3]),
    "a wait has an end": Scenario(
        [*lives(0.0, count=5), *FOR_EVER],
        [0.0, 0.1, 0.3, 0.6, 0.9, 1.2],
        restart=RestartPolicy(backoff=Backoff(jitter=0.0, max=0.3)),
    ),
    "a settled life, then a crash loop": Scenario(
        [*lives(5.0), *lives(0.0, count=3), *FOR_EVER], [0.0, 5.0, 5.1, 5.3, 5.7]
    ),
    "long lives forget": Scenario(
        [*lives(0.0, count=3), *lives(60.0), *lives(0.0, count=2), *FOR_EVER],
        [0.0, 0.1, 0.3, 0.7, 60.7, 60.8, 61.0],
    ),
    "a program that comes late": Scenario(
        [NO_CLONE, NO_PROGRAM, NO_PROGRAM, *lives(0.0), *FOR_EVER], [0.0, 0.1, 0.3, 0.7, 0.8]
    ),
    "a program that never comes": Scenario(
        [NO_PROGRAM] * 20,
        [0.0, 0.1, 0.3, 0.7, 1.5, 3.1, 6.3, 12.7, 25.5, 51.1, 81.1],
        "backoff",
        "exec-failed:ENOENT",
        RestartPolicy(backoff=EVEN, intensity=LIMITED),
    ),
    "too many deaths": Scenario(
        lives(0.0), [0.0, 0.1, 0.3], "failed", "intensity", RestartPolicy(backoff=EVEN, intensity=LIMITED)
    ),
    "deaths that are far apart": Scenario(
        [*lives(29.0, count=2), *FOR_EVER], [0.0, 29.0, 58.1], restart=RestartPolicy(backoff=EVEN, intensity=LIMITED)
    ),
    "deaths with failed launches between them": Scenario(
        [*lives(0.0), NO_PROGRAM, *lives(0.0), NO_PROGRAM, *lives(0.0)],
        [0.0, 0.1, 0.2, 0.4, 0.5],
        "failed",
        "intensity",
        RestartPolicy(backoff=EVEN, intensity=LIMITED),
    ),
    "never more often than that": Scenario(
        lives(1.0),
        [0.0, 1.0, 2.1, 11.0, 12.4, 14.2, 22.0, 26.2],
        "backoff",
        "exit:3",
        RestartPolicy(backoff=EVEN, intensity=Intensity(deaths=3, within=10.0, then="backoff")),
    ),
    "restart-now": Scenario(
        [*lives(0.5, 75, 4), *FOR_EVER],
        [0.0, 0.5, 1.0, 1.5, 2.0],
        restart=RestartPolicy(backoff=EVEN, rules=(Rule(then="restart-now", exit=(75,)),)),
    ),
    "fail at once": Scenario(
        [*lives(0.0), *lives(5.0, 78)],
        [0.0, 0.1],
        "failed",
        "exit:78",
        RestartPolicy(backoff=EVEN, rules=(Rule(then="fail", exit=(78,)),)),
    ),
    "stop": Scenario(
        killed(5.0, 15, "SIGTERM"),
        [0.0],
        "stopped",
        "signal:SIGTERM",
        RestartPolicy(backoff=EVEN, rules=(Rule(then="stop", signal=(15,)),)),
    ),
    "done by a signal": Scenario(
        killed(5.0, 15, "SIGTERM"),
        [0.0],
        "done",
        "signal:SIGTERM",
        RestartPolicy(policy="on-failure", success=(0, -15)),
    ),
    "a oneshot tries again until it works": Scenario(
        [*lives(0.0, count=2), *lives(1.0, 0)],
        [0.0, 0.1, 0.3],
        "done",
        "exit:0",
        RestartPolicy(policy="on-failure", backoff=EVEN),
        "oneshot",
    ),
    "never": Scenario(lives(5.0), [0.0], "failed", "exit:3", RestartPolicy(policy="never")),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_launches_that_follow(name: str) -> None:
    scenario = SCENARIOS[name]
    play = Play(scenario.fates, restart=scenario.restart, type=scenario.type).run(100.0)
    launches = play.launches()
    assert launches[: len(scenario.launches)] == pytest.approx(scenario.launches, abs=1e-6)
    if name != "never more often than that":
        assert len(launches) == len(scenario.launches)
        assert play.states() == [(scenario.state, scenario.reason)]
    assert play.worker().restarts == len(launches) - 1


# --- who else is concerned --------------------------------------------------------------------------------------------


def limited(then: str, **fields: object) -> RestartPolicy:
    return RestartPolicy(backoff=EVEN, intensity=Intensity(deaths=3, within=60.0, then=then), **fields)  # type: ignore[arg-type]


def test_a_pool_may_fail_as_one() -> None:
    play = Play(lives(0.0), workers=3, restart=limited("fail-pool"))
    play.sim.feed("web/2", Stop())
    play.run(10.0)
    assert play.states() == [("failed", "intensity"), ("failed", "pool-failed"), ("stopped", "operator")]
    assert play.events("web/1") == ["launched", "started", "stop_begun", "failed"]
    (told,) = [e for e in play.told if e.event == "intensity_exceeded"]
    assert (told.worker, told.detail) == ("web/0", {"deaths": 3, "within": 60.0, "then": "fail-pool"})
    play.sim.feed("web/1", Start())
    assert play.run(20.0).worker(1).state is State.RUNNING


def test_an_operator_may_stop_or_start_what_goes_down_with_its_pool() -> None:
    deaf = [Fate(launch=0.0, obeys=math.inf)]
    play = Play(lives(0.0), workers=3, restart=limited("fail-pool"), others=deaf).run(1.0)
    assert [w.state for w in play.sim.workers.workers.values()] == [State.FAILED, State.STOPPING, State.STOPPING]
    play.sim.feed("web/1", Stop())
    play.sim.feed("web/2", Restart())
    play.run(30.0)
    assert play.states()[1:] == [("stopped", "operator"), ("running", None)]


def test_the_supervisor_may_be_asked_to_end() -> None:
    play = Play(lives(0.0), workers=2, restart=limited("shutdown")).run(10.0)
    assert play.sim.ended
    assert play.states() == [("failed", "intensity"), ("running", None)], "who ends it stops the others"
    assert not Play(lives(0.0), restart=limited("fail")).run(10.0).sim.ended


# --- what an operator does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["fail", "backoff", "fail-pool", "shutdown"])
@pytest.mark.parametrize("rule", ["restart-now", "backoff"])
@pytest.mark.parametrize("at", [0.0, 0.05, 0.1, 0.2, 0.35, 5.0])
def test_an_operators_stop_is_final(then: str, rule: str, at: float) -> None:
    policy = limited(then, rules=(Rule(then=rule, exit=(3,)),))  # type: ignore[arg-type]
    play = Play(lives(0.02), restart=policy).run(at)
    play.sim.feed("web/0", Stop())
    before = play.worker().generation
    play.run(10_000.0)
    assert play.states() == [("stopped", "operator")]
    assert play.worker().generation == before
    assert play.sim.workers.next_deadline() is None


def test_a_start_counts_from_the_beginning() -> None:
    play = Play(lives(0.0), restart=limited("fail")).run(10.0)
    play.sim.feed("web/0", Start())
    play.run(20.0)
    assert play.launches() == pytest.approx([0.0, 0.1, 0.3, 10.0, 10.1, 10.3])


def test_a_reset_forgets_failures_and_launches_nothing() -> None:
    play = Play(lives(0.0), restart=limited("fail")).run(10.0)
    play.sim.feed("web/0", Reset())
    assert play.states() == [("stopped", "operator")]
    assert not play.worker().want_up
    assert play.run(20.0).launches() == pytest.approx([0.0, 0.1, 0.3])


def test_a_reset_shortens_the_wait_to_the_first_one() -> None:
    play = Play([*lives(0.0, count=8), *FOR_EVER]).run(20.0)
    assert play.worker().state is State.BACKOFF
    play.sim.feed("web/0", Reset())
    assert play.worker().deadline == pytest.approx(20.1)
    assert play.worker().restarts == 0
    assert play.events()[-1] == "reset"
    assert play.run(30.0).launches()[-1] == pytest.approx(20.1)


def test_a_reset_of_a_running_worker_gives_its_deaths_back() -> None:
    play = Play([*lives(0.0, count=2), *lives(5.0), *FOR_EVER], restart=limited("fail")).run(1.0)
    play.sim.feed("web/0", Reset())
    assert play.run(20.0).states() == [("running", None)]


def test_a_reload_is_a_signal_to_what_runs() -> None:
    play = Play(FOR_EVER, reload=ReloadSpec(signal=1)).run(1.0)
    play.sim.feed("web/0", Reload())
    (told,) = [e for e in play.told if e.event == "signalled"]
    assert (told.detail, told.reason, told.to) == ({"signal": 1, "tree": False}, "operator", None)
    silent = Play(FOR_EVER).run(1.0)
    silent.sim.feed("web/0", Reload())
    assert "signalled" not in silent.events()


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_the_last_lives_tell_how_long_was_waited_after_them() -> None:
    play = Play([*lives(0.0, count=3), NO_PROGRAM, *lives(5.0), *lives(0.0, count=9), *FOR_EVER]).run(1.0)
    past = play.sim.workers.lives("web/0")
    assert [(life.generation, life.exit.reason, life.followed) for life in past] == [
        (1, "exit:3", "backoff"),
        (2, "exit:3", "backoff"),
        (3, "exit:3", "backoff"),
        (4, "exec-failed:ENOENT", "backoff"),
    ]
    assert [life.wait for life in past] == pytest.approx([0.1, 0.2, 0.4, 0.1])
    assert [life.began for life in past] == pytest.approx([0.0, 0.1, 0.3, 0.7])
    assert past[0].host_pid is not None
    past = play.run(1000.0).sim.workers.lives("web/0")
    assert [life.generation for life in past] == list(range(5, 15))
    assert (past[0].followed, past[0].wait) == ("starting", 0.0)
    assert past[0].ended - past[0].began == pytest.approx(5.0)


def test_a_life_that_was_stopped_is_one_of_them_and_a_launch_withdrawn_is_not() -> None:
    play = Play(FOR_EVER).run(1.0)
    play.sim.feed("web/0", Stop())
    play.run(2.0)
    play.sim.feed("web/0", Start())
    play.sim.feed("web/0", Stop())
    play.run(3.0)
    first, second = play.sim.workers.lives("web/0")
    assert (first.exit.reason, first.followed, first.wait) == ("signal:SIGTERM", "stopped", None)
    assert (second.generation, second.exit.reason) == (2, "signal:SIGKILL")
    play.sim.scale("web", 0)
    assert play.sim.workers.lives("web/0") == ()
