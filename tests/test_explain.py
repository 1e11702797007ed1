"""Why a worker is as it is, and when it is launched again: in every state, and exactly as it happens then."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from nssup import explain as explaining
from nssup import history as histories
from nssup.events import Event, Exit, Restart, Start, State, Stop
from nssup.explain import explain
from nssup.machine import Span, Worker
from nssup.sim import Fate, Simulation
from nssup.snapshot import exit_document
from nssup.spec import Backoff, Intensity, PoolSpec, Probe, Requirement, RestartPolicy, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nssup.explain import Explanation

CODE_3 = Exit(reason="exit:3", code=3, at=1.0)
CRASH = Fate(launch=0.0, life=0.0, exit=CODE_3)
NO_PROGRAM = Fate(launch=0.0, setup_fails="exec-failed:ENOENT")
STEADY = Fate(launch=0.0)


class World:
    """One worker with these fates, one after the other; the last for ever."""

    def __init__(self, fates: Sequence[Fate], **fields: object) -> None:
        self.told: list[Event] = []
        self.sim = Simulation(lambda _, n: fates[min(n, len(fates)) - 1], seed="seed", observe=self.told.append)
        self.sim.add_pool(PoolSpec(name="web", command=("app",), **fields))  # type: ignore[arg-type]

    def run(self, until: float) -> World:
        self.sim.run(until)
        return self

    def feed(self, *events: Start | Stop | Restart) -> World:
        for event in events:
            self.sim.feed("web/0", event)
        return self

    def explain(self, attempts: int = 5) -> Explanation:
        return self.sim.workers.explain("web/0", self.sim.now, attempts)

    def launches(self) -> list[float]:
        return [event.ts for event in self.told if event.to == "starting"]

    def text(self) -> str:
        return explaining.text(self.document())

    def document(self) -> explaining.ExplanationDocument:
        found = self.explain()
        last = found.worker.last_exit
        spec = self.sim.workers.pools["web"]
        return explaining.document(found, spec, lambda at: f"@{at:.3f}", exit_document(last) if last else None)


# --- the schedule is what happens -------------------------------------------------------------------------------------

POLICIES = {
    "plain": RestartPolicy(),
    "capped": RestartPolicy(backoff=Backoff(first=0.05, max=0.4, jitter=0.5)),
    "limited": RestartPolicy(intensity=Intensity(deaths=6, within=60.0)),
    "patient": RestartPolicy(intensity=Intensity(deaths=3, within=5.0, then="backoff")),
    "by rule": RestartPolicy(rules=(Rule(then="backoff", exit=(3,)),)),
}


@pytest.mark.parametrize("fate", [CRASH, NO_PROGRAM], ids=["crash", "no program"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("at", [0.0, 0.5, 3.0])
def test_a_crash_loop_goes_on_as_explain_foretold(name: str, at: float, fate: Fate) -> None:
    world = World([fate], restart=POLICIES[name]).run(at)
    assert world.sim.workers.workers["web/0"].state is State.BACKOFF
    foretold = world.explain(6).schedule
    launched = len(world.launches())
    world.run(foretold.attempts[-1].at + 0.001)
    assert world.launches()[launched:] == pytest.approx([each.at for each in foretold.attempts], abs=1e-6)
    if foretold.then:
        assert world.run(1000.0).sim.workers.workers["web/0"].state is State.FAILED
        assert foretold.then == "failed"
        assert len(world.launches()) == launched + len(foretold.attempts)


@pytest.mark.parametrize("uptime", [0.5, 5.0, 100.0])
def test_of_a_life_that_runs_it_tells_what_would_follow_its_failure(uptime: float) -> None:
    crashing = World([Fate(launch=0.0, life=uptime, exit=CODE_3), CRASH]).run(uptime - 0.001)
    foretold = crashing.explain(4).schedule
    crashing.run(foretold.attempts[-1].at + 0.1)
    assert crashing.launches()[1:5] == pytest.approx([each.at for each in foretold.attempts], abs=0.01)
    assert (foretold.attempts[0].wait == 0.0) == (uptime >= 1.0)


def test_no_attempts_where_none_will_be() -> None:
    assert World([STEADY], restart=RestartPolicy(policy="never")).run(5.0).explain().schedule == ((), "failed")
    assert World([STEADY]).run(5.0).feed(Stop()).explain().schedule == ((), "")
    assert World([STEADY], enabled=False).explain().schedule == ((), "")
    pool = World([STEADY], restart=RestartPolicy(intensity=Intensity(deaths=1, within=1.0, then="fail-pool")))
    assert pool.run(5.0).explain().schedule == ((), "failed, and its pool with it")


# --- every state ------------------------------------------------------------------------------------------------------

DEAF = Fate(launch=0.0, obeys=math.inf)
SLOW = Fate(launch=100.0)
TWICE = RestartPolicy(backoff=Backoff(jitter=0.0), intensity=Intensity(deaths=2, within=60.0))
NEVER = RestartPolicy(policy="never")

TEXTS: dict[str, tuple[Callable[[], World], str]] = {
    "stopped, never started": (
        lambda: World([STEADY], enabled=False),
        "web/0: stopped: nobody has started it; its pool is disabled\n"
        "  waits for: somebody to start it (nssup ctl start)\n",
    ),
    "stopped": (
        lambda: World([STEADY]).run(1.0).feed(Stop()).run(2.0),
        "web/0: stopped: an operator wants it down\n  waits for: somebody to start it (nssup ctl start)\n",
    ),
    "stopped by a rule": (
        lambda: World([CRASH], restart=RestartPolicy(rules=(Rule(then="stop", exit=(3,)),))).run(1.0),
        "web/0: stopped: its last life ended with exit:3, after which its rules want no other\n"
        "  waits for: somebody to start it (nssup ctl start)\n",
    ),
    "starting": (
        lambda: World([SLOW], restart=NEVER).run(1.0),
        "web/0: starting: generation 1 was launched\n  waits for: its program to be running\n"
        "  if it failed now, and so on: failed\n",
    ),
    "running": (
        lambda: World([STEADY], restart=TWICE).run(5.0),
        "web/0: running: its program runs\n  if it failed now, and so on: at once, failed\n"
        "  deaths: 0 within 1m00s; 2 are too many: fail\n",
    ),
    "stopping": (
        lambda: World([DEAF]).run(5.0).feed(Stop()),
        "web/0: stopping: an operator wants it down\n"
        "  waits for: its program to end: step 1 of 2 of its stop sequence, until @15.000\n",
    ),
    "stopping, to come back": (
        lambda: World([DEAF]).run(5.0).feed(Restart()),
        "web/0: stopping: an operator wants it started again\n"
        "  waits for: its program to end: step 1 of 2 of its stop sequence, until @15.000\n",
    ),
    "stopping, killed": (
        lambda: World([replace(DEAF, reap=100.0)]).run(5.0).feed(Stop()).run(20.0),
        "web/0: stopping: an operator wants it down\n  waits for: its processes to be gone: they were sent SIGKILL\n",
    ),
    "stopping, what is left": (
        lambda: World([replace(CRASH, rest=5.0)], restart=NEVER).run(1.0),
        "web/0: stopping: its life is ending: exit:3\n"
        "  waits for: what its program left behind to be gone, until @10.000\n"
        "  if it failed now, and so on: failed\n",
    ),
    "stopping, its init": (
        lambda: World([replace(CRASH, reap=5.0)], restart=NEVER).run(1.0),
        "web/0: stopping: its life is ending: exit:3\n  waits for: its init to be reaped\n",
    ),
    "backoff": (
        lambda: World([CRASH], restart=TWICE).run(0.05),
        "web/0: backoff: its last life ended (exit:3), and it is to be launched again\n"
        "  waits for: the backoff to be over, until @0.100\n"
        "  next attempt: @0.100, after a wait of 0.10s\n"
        "  if that life ends at once, and so on: failed\n"
        "  deaths: 1 within 1m00s; 2 are too many: fail\n",
    ),
    "failed": (
        lambda: World([CRASH], restart=NEVER).run(1.0),
        "web/0: failed: its last life ended with exit:3, and its policy wants no other\n"
        "  waits for: somebody to start or reset it (nssup ctl start, nssup ctl reset)\n",
    ),
    "failed too often": (
        lambda: World([CRASH], restart=TWICE).run(1.0),
        "web/0: failed: it died too often: 2 times within 60 s, the last time of exit:3\n"
        "  waits for: somebody to start or reset it (nssup ctl start, nssup ctl reset)\n"
        "  deaths: 2 within 1m00s; 2 are too many: fail\n",
    ),
    "done": (
        lambda: World([replace(CRASH, exit=Exit(reason="exit:0", code=0))], restart=NEVER).run(1.0),
        "web/0: done: it has ended well (exit:0)\n",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_every_state(name: str) -> None:
    make, text = TEXTS[name]
    assert make().text() == text


def told_of(worker: Worker, **fields: object) -> tuple[str, str | None]:
    spec = PoolSpec(name="web", command=("app",), **fields)  # type: ignore[arg-type]
    found = explain(worker, spec, 100.0, "seed", 3)
    return found.why, found.waits_for


def test_states_that_the_fake_world_does_not_know() -> None:
    lost = Worker(pool="web", index=0, state=State.LOST, reason="lost:EPERM", want_up=True, generation=4)
    assert "cannot be proven its own (lost:EPERM)" in told_of(lost)[0]
    waiting = Worker(pool="web", index=0, state=State.WAITING, reason="dependency:db", want_up=True)
    assert told_of(waiting)[0] == "it is to be up, and what its pool requires is not there"
    lost = replace(waiting, state=State.STOPPED, want_up=False)
    assert told_of(lost)[0] == "pool db, which it requires, was lost"
    up = Worker(pool="web", index=0, state=State.STARTING, want_up=True, alive=True, generation=2, reason="exit:3")
    up = replace(up, running_since=99.0, deadline=150.0)
    why, waits_for = told_of(up, ready=Probe(notify="sd"))
    assert why == "generation 2 was launched because the one before ended with exit:3; its program runs"
    assert waits_for == "its program to be ready"
    unready = replace(up, state=State.RUNNING, up_since=99.0)
    assert told_of(unready, ready=Probe(notify="sd")) == ("its program runs, and is not ready any more", None)


def test_the_document_says_the_same_for_scripts() -> None:
    document = World([CRASH], restart=TWICE).run(0.05).document()
    assert document == {
        "id": "web/0",
        "state": "backoff",
        "reason": "exit:3",
        "desired": "up",
        "enabled": True,
        "why": "its last life ended (exit:3), and it is to be launched again",
        "waits_for": "the backoff to be over",
        "until": "@0.100",
        "missing": [],
        "next_at": "@0.100",
        "attempts": [{"at": "@0.100", "wait_seconds": 0.1}],
        "after_attempts": "failed",
        "restarts": 0,
        "deaths": {"count": 1, "most": 2, "within_seconds": 60.0, "then": "fail"},
        "probes": {},
        "last_exit": exit_document(replace(CODE_3, at=1.0)),
    }


def test_what_requires_others_tells_what_is_missing_and_whom_it_waits_for() -> None:
    told: list[Event] = []
    sim = Simulation(lambda worker_id, _: SLOW if worker_id == "db/1" else DEAF, seed="seed", observe=told.append)
    sim.add_pool(PoolSpec(name="db", command=("app",), workers=2))
    sim.add_pool(PoolSpec(name="web", command=("app",), requires={"db": Requirement()}))
    sim.run(1.0)
    waiting = sim.workers.explain("web/0", 1.0, 3)
    assert waiting.waits_for == "pool db to be ready: 1 of its 2 workers are"
    assert waiting.schedule == ((), "")
    found = explaining.document(waiting, sim.workers.pools["web"], str, None)
    assert found["missing"] == [{"pool": "db", "when": "ready", "so": 1, "wanted": 2}]
    sim.run(200.0)
    for each in ("web/0", "db/0"):
        sim.feed(each, Stop())
    assert "those to be down that require its pool" in str(sim.workers.explain("db/0", 200.0, 3).waits_for)


# --- the lives before -------------------------------------------------------------------------------------------------


def test_a_worker_that_was_taken_over_remembers_its_last_life() -> None:
    ended = Worker(pool="web", index=0, generation=7, last_exit=CODE_3, last_life=Span(7, 10.0, 12.0), want_up=True)
    backoff = histories.remembered(replace(ended, state=State.BACKOFF, deadline=12.5))
    assert backoff is not None
    assert (backoff.generation, backoff.began, backoff.ended, backoff.exit) == (7, 10.0, 12.0, CODE_3)
    assert (backoff.followed, backoff.wait, backoff.host_pid) == ("backoff", 0.5, None)
    again = histories.remembered(replace(ended, state=State.RUNNING, generation=8, launched_at=12.25, alive=True))
    assert again is not None
    assert (again.followed, again.wait) == ("starting", 0.25)
    over = histories.remembered(replace(ended, state=State.STOPPING, outcome=State.FAILED))
    assert over is not None
    assert (over.followed, over.wait) == ("failed", None)
    assert histories.remembered(replace(ended, last_life=None)) is None


def test_a_line_for_each_life_and_what_it_wrote() -> None:
    world = World([CRASH, replace(CRASH, life=75.0, launch=0.0), NO_PROGRAM], restart=RestartPolicy()).run(76.0)
    past = world.sim.workers.lives("web/0")
    lives = [histories.document(each, lambda at: f"@{at:.1f}", exit_document(each.exit), []) for each in past]
    lives[0]["last_lines"] = ["no\tway\x1b"]
    text = histories.text([{"id": "web/0", "lives": lives}, {"id": "web/1", "lives": []}])
    first, line, second, *rest, last = text.splitlines()
    assert (first.rsplit(" ", 2)[0], line) == (
        "web/0 generation 1: @0.0 +0.00s: exit:3, again after",
        "  | no\tway\\x1b",
    )
    assert second == "web/0 generation 2: @0.1 +1m15s: exit:3, again at once"
    assert all("exec-failed:ENOENT, again after" in each for each in rest)
    assert last == "web/1: no life of it is over"
