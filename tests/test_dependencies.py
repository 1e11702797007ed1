"""What pools need of each other: the graph, the conditions, and that no order of events breaks either."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nssup import dependencies
from nssup.dependencies import Unmet, circle, holds, longest_stop, start_order, stop_order
from nssup.errors import ControlError
from nssup.events import Event, Exit, Fail, Kill, Reset, Restart, Start, State, Stop
from nssup.machine import Launch, Worker
from nssup.sim import Fate, Simulation
from nssup.spec import Backoff, PoolSpec, Probe, Requirement, RestartPolicy, StopStep
from nssup.workers import WorkerSet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nssup.workers import Actions

CODE_0 = Exit(reason="exit:0", code=0)
CODE_3 = Exit(reason="exit:3", code=3)
STEADY = RestartPolicy(backoff=Backoff(jitter=0.0))
NEVER = RestartPolicy(policy="never")


def pool(name: str, *requires: str, workers: int = 1, **fields: object) -> PoolSpec:
    """requires: `db`, `db:done`, `db:ready:stop`."""
    wishes = {}
    for text in requires:
        needed, *wish = text.split(":")
        wishes[needed] = msgspec.convert(dict(zip(("when", "lost"), wish, strict=False)), Requirement)
    return PoolSpec(name=name, command=("app",), workers=workers, requires=wishes, **{"restart": STEADY, **fields})  # type: ignore[arg-type]


class World(Simulation):
    """A simulation that remembers what was told, in order."""

    def __init__(self, *specs: PoolSpec, fates: Mapping[str, list[Fate]] | None = None) -> None:
        """fates: of the lives of a worker, or of all workers of a pool, one after the other, the last for ever."""
        self.told: list[Event] = []
        given_fates = fates or {}

        def fate(worker_id: str, generation: int) -> Fate:
            found = given_fates.get(worker_id) or given_fates.get(worker_id.partition("/")[0]) or [Fate()]
            return found[min(generation, len(found)) - 1]

        super().__init__(fate, seed="seed", observe=self.told.append)
        for spec in specs:
            self.add_pool(spec)

    def states(self) -> dict[str, str]:
        return {w.id: w.state.value for w in self.workers.workers.values()}

    def reason(self, worker_id: str) -> str | None:
        return self.workers.workers[worker_id].reason

    def generation(self, worker_id: str) -> int:
        return self.workers.workers[worker_id].generation

    def since(self, seq: int) -> list[str]:
        return [f"{e.worker} {e.event}" for e in self.told if e.seq > seq and e.worker]

    def times(self, word: str) -> dict[str, float]:
        """When each worker last had this event."""
        return {e.worker: e.ts for e in self.told if e.event == word and e.worker}

    def stop_all(self) -> None:
        for name in self.workers.stop_order(self.workers.pools):
            for worker in [w for w in self.workers.workers.values() if w.pool == name]:
                self.feed(worker.id, Stop())


# --- the graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requires", "way"),
    [
        ({"a": ["a"]}, ["a", "a"]),
        ({"a": ["b"], "b": ["a"]}, ["a", "b", "a"]),
        ({"a": ["x", "b"], "b": ["c"], "c": ["y", "a"], "x": ["y"]}, ["a", "b", "c", "a"]),
        ({"a": ["b"], "b": ["c"], "c": ["b"]}, []),
        ({"a": ["b"], "b": ["c"]}, []),
        ({}, []),
    ],
)
def test_a_circle(requires: dict[str, list[str]], way: list[str]) -> None:
    assert circle({name: dict.fromkeys(needs) for name, needs in requires.items()}, "a") == way


def test_orders() -> None:
    requires = {"web": {"api": 0, "db": 0}, "api": {"db": 0}, "mail": {}, "db": {"net": 0}, "net": {}}
    assert start_order(requires, requires) == ["net", "db", "api", "web", "mail"]
    assert stop_order(requires, requires) == ["mail", "web", "api", "db", "net"]
    assert start_order(requires, ["web", "net"]) == ["net", "web"]
    assert stop_order({"a": {"b": 0}, "b": {"a": 0}}, ["a", "b"]) == ["a", "b"]
    assert stop_order({}, ["a", "b", "c"]) == ["c", "b", "a"]


def test_a_chain_as_long_as_a_config_may_be() -> None:
    requires = {f"p{n}": {f"p{n + 1}": 0} for n in range(5000)}
    assert start_order(requires, requires)[0] == "p4999"
    assert circle(requires, "p0") == []


def test_stop_sequences_add_up_along_the_longest_way() -> None:
    def slow(name: str, seconds: float, *requires: str) -> PoolSpec:
        return pool(name, *requires, stop=(StopStep(15, seconds), StopStep(None)))

    specs = [slow("db", 5), slow("api", 7, "db"), slow("web", 2, "api", "db"), slow("other", 10)]
    assert longest_stop({spec.name: spec for spec in specs}) == 14
    assert longest_stop({}) == 0


@pytest.mark.parametrize(
    ("state", "fields", "conditions"),
    [
        (State.STOPPED, {}, "stopped"),
        (State.WAITING, {}, ""),
        (State.STARTING, {}, ""),
        (State.STARTING, {"running_since": 1.0}, "started"),
        (State.RUNNING, {"running_since": 1.0}, "started"),
        (State.RUNNING, {"running_since": 1.0, "ready": True}, "started ready"),
        (State.STOPPING, {"running_since": 1.0}, ""),
        (State.BACKOFF, {}, ""),
        (State.FAILED, {}, "stopped"),
        (State.DONE, {}, "started ready done stopped"),
        (State.LOST, {}, ""),
    ],
)
def test_conditions(state: State, fields: dict[str, object], conditions: str) -> None:
    worker = Worker(pool="db", index=0, state=state, **fields)  # type: ignore[arg-type]
    assert " ".join(when for when in dependencies.HOLDS if holds(when, worker)) == conditions  # type: ignore[arg-type]


# --- coming up -----------------------------------------------------------------------------------------------------


def test_the_config_of_the_issue_comes_up_in_order_and_goes_down_in_reverse() -> None:
    world = World(
        pool("web", "migrate:done", "db", workers=4),
        pool("migrate", "db", type="oneshot", restart=NEVER),
        pool("db", ready=Probe(notify="sd")),
        fates={"db": [Fate(ready=3.0)], "migrate": [Fate(life=2.0)]},
    )
    assert set(world.states().values()) == {"waiting", "starting"}
    assert (world.reason("web/0"), world.reason("migrate/0")) == ("dependency:migrate", "dependency:db")
    world.run(60.0)
    assert set(world.states().items()) == {
        *((f"web/{n}", "running") for n in range(4)),
        ("migrate/0", "done"),
        ("db/0", "running"),
    }
    ended = world.times("finished")["migrate/0"]
    assert world.times("started")["db/0"] == pytest.approx(3.0, abs=0.1)
    assert {at >= ended for worker, at in world.times("launched").items() if "web" in worker} == {True}
    launched = [e.worker for e in world.told if e.event == "launched"]
    assert launched == ["db/0", "migrate/0", "web/0", "web/1", "web/2", "web/3"]
    seq = world.workers.seq
    world.stop_all()
    world.run(90.0)
    told = world.since(seq)
    assert told.index("db/0 signalled") > max(told.index(f"web/{n} stopped") for n in range(4))
    assert set(world.states().values()) == {"stopped"}


def test_all_workers_wanted_count() -> None:
    world = World(pool("web", "db"), pool("db", workers=3), fates={"db/2": [Fate(launch=5.0)]})
    world.run(4.9)
    assert world.states()["web/0"] == "waiting"
    unmet = world.workers.dependencies.unmet("web")
    assert unmet == [Unmet("db", "ready", 2, 3, stuck=False)]
    world.run(5.1)
    assert world.states()["web/0"] == "running"
    assert world.workers.dependencies.unmet("web") == []


def test_a_pool_that_has_no_workers_is_never_ready_but_always_stopped() -> None:
    world = World(pool("web", "db"), pool("after", "db:stopped"), pool("db", workers=0))
    world.run(1.0)
    assert world.states() == {"web/0": "waiting", "after/0": "running"}
    world.scale("db", 2)
    world.run(2.0)
    assert world.states()["web/0"] == "running"


def test_a_pool_that_is_not_there_is_waited_for() -> None:
    world = World(pool("web", "db"), pool("after", "db:stopped"))
    assert world.states() == {"web/0": "waiting", "after/0": "starting"}
    assert [(u.needed, u.so, u.wanted) for u in world.workers.dependencies.unmet("web")] == [("db", 0, 0)]
    world.run(1.0)
    world.add_pool(pool("db"))
    world.run(2.0)
    assert world.states()["web/0"] == "running"
    world.remove_pool("db")
    world.run(30.0)
    assert "db" not in world.workers.pools
    world.feed("web/0", Restart())
    world.run(60.0)
    assert world.states()["web/0"] == "waiting"


def test_a_pool_that_would_wait_for_itself_is_refused_and_nothing_is_changed() -> None:
    world = World(pool("a", "b"), pool("b", "c"))
    with pytest.raises(ControlError, match="would wait for itself: c -> a -> b -> c"):
        world.add_pool(pool("c", "a"))
    assert list(world.workers.pools) == ["a", "b"]
    world.add_pool(pool("c"))
    world.run(1.0)
    assert set(world.states().values()) == {"running"}


@pytest.mark.parametrize("how", ["disabled", "failed", "stopped"])
def test_who_requires_what_will_not_come_waits_until_an_operator_starts_it(how: str) -> None:
    fates = {"db": [Fate(life=0.5, exit=CODE_3), Fate()]} if how == "failed" else {}
    world = World(pool("db", enabled=how != "disabled", restart=NEVER), fates=fates)
    if how == "stopped":
        world.feed("db/0", Stop())
    world.run(10.0)
    world.add_pool(pool("web", "db"))
    world.feed("web/0", Start())
    world.feed("web/0", Restart())
    world.run(1000.0)
    assert (world.states()["web/0"], world.reason("web/0")) == ("waiting", "dependency:db")
    assert world.workers.dependencies.unmet("web") == [Unmet("db", "ready", 0, 1, stuck=True)]
    waits_for = world.workers.explain("web/0", world.now, 5).waits_for
    assert waits_for == (
        "pool db to be ready: 0 of its 1 workers are, and nobody else is on the way (nssup ctl start db)"
    )
    assert world.workers.next_deadline() is None
    world.feed("db/0", Start())
    world.run(1001.0)
    assert world.states() == {"db/0": "running", "web/0": "running"}


def test_who_waits_can_be_stopped_removed_and_scaled() -> None:
    world = World(pool("web", "db", workers=2))
    world.feed("web/0", Stop())
    assert world.states() == {"web/0": "stopped", "web/1": "waiting"}
    world.scale("web", 3)
    assert world.states()["web/2"] == "waiting"
    world.scale("web", 1)
    assert world.states() == {"web/0": "stopped"}
    world.add_pool(pool("db"))
    world.run(1.0)
    assert world.states() == {"web/0": "stopped", "db/0": "running"}


def test_a_launch_by_policy_waits_too() -> None:
    """Nothing is burned on a program that cannot work."""
    db = [Fate(life=5.0, exit=CODE_3), Fate(launch=3.0)]
    world = World(pool("db"), pool("web", "db"), fates={"db": db, "web": [Fate(life=5.5, exit=CODE_3), Fate()]})
    world.run(6.0)
    web = world.workers.workers["web/0"]
    assert (web.state, web.generation, web.restarts) == (State.WAITING, 1, 1)
    blocked = next(e for e in world.told if e.event == "blocked" and e.from_ == "running")
    assert blocked.exit is not None
    assert blocked.exit.reason == "exit:3"
    world.run(10.0)
    assert world.states() == {"db/0": "running", "web/0": "running"}


def test_what_is_waited_for_is_told_as_it_changes() -> None:
    world = World(pool("web", "a", "b"), pool("a"), pool("b", enabled=False))
    assert world.reason("web/0") == "dependency:a"
    world.run(1.0)
    assert world.reason("web/0") == "dependency:b"


# --- a dependency that is lost -------------------------------------------------------------------------------------


def test_a_loss_that_is_ignored() -> None:
    world = World(pool("db"), pool("web", "db"), fates={"db": [Fate(life=5.0, exit=CODE_3)]})
    world.run(30.0)
    assert world.generation("db/0") > 2
    assert (world.generation("web/0"), world.states()["web/0"]) == (1, "running")


def test_a_loss_that_restarts() -> None:
    world = World(
        pool("db", ready=Probe(notify="sd")),
        pool("web", "db:ready:restart", workers=2),
        fates={"db": [Fate(life=5.0, exit=CODE_3), Fate(ready=4.0)]},
    )
    world.run(6.0)
    assert world.states() == {"db/0": "starting", "web/0": "waiting", "web/1": "waiting"}
    begun = next(e for e in world.told if e.event == "stop_begun" and e.worker == "web/0")
    assert begun.reason == "dependency:db"
    world.run(20.0)
    assert set(world.states().values()) == {"running"}
    web = world.workers.workers["web/0"]
    assert (web.generation, web.restarts) == (2, 1)
    (past,) = world.workers.lives("web/0")
    assert past.exit.reason == "signal:SIGTERM"
    assert web.history.waits == 0


def test_a_loss_that_stops() -> None:
    world = World(pool("db"), pool("web", "db:started:stop"), fates={"db": [Fate(life=5.0, exit=CODE_3), Fate()]})
    world.run(60.0)
    web = world.workers.workers["web/0"]
    assert (web.state, web.reason, web.want_up) == (State.STOPPED, "dependency:db", False)
    world.feed("web/0", Start())
    world.run(61.0)
    assert world.states()["web/0"] == "running"


def test_a_worker_that_is_not_ready_any_more_is_a_loss() -> None:
    from nssup.events import Ready, Unready

    world = World(
        pool("db", ready=Probe(notify="sd")), pool("web", "db:ready:restart"), pool("api", "db:started:restart")
    )
    world.run(1.0)
    world.feed("db/0", Unready(1, "probe-failed"))
    world.run(2.0)
    assert world.states() == {"db/0": "running", "web/0": "waiting", "api/0": "running"}
    world.feed("db/0", Ready(1))
    world.run(3.0)
    assert set(world.states().values()) == {"running"}


def test_a_loss_runs_on_through_the_graph() -> None:
    world = World(
        pool("c", "b:ready:restart"),
        pool("b", "a:ready:stop"),
        pool("d", "a:ready:restart", "b:ready:stop"),
        pool("a"),
    )
    world.run(1.0)
    seq = world.workers.seq
    world.feed("a/0", Restart())
    told = world.since(seq)
    assert told[0] == "a/0 stop_begun"
    world.run(60.0)
    told = world.since(seq)
    # a and b are each held back for those that require them.
    for first, then in (
        ("c/0 blocked", "b/0 signalled"),
        ("b/0 stopped", "a/0 signalled"),
        ("d/0 stopped", "a/0 signalled"),
    ):
        assert told.index(first) < told.index(then), told
    assert world.states() == {"a/0": "running", "b/0": "stopped", "c/0": "waiting", "d/0": "stopped"}


def test_more_workers_of_a_dependency_are_no_loss() -> None:
    world = World(pool("db"), pool("web", "db:ready:restart"), fates={"db/1": [Fate(launch=5.0)]})
    world.run(1.0)
    world.scale("db", 2)
    world.run(2.0)
    assert (world.states()["web/0"], world.generation("web/0")) == ("running", 1)
    world.scale("web", 2)
    assert world.states()["web/1"] == "waiting"
    world.run(10.0)
    assert world.states()["web/1"] == "running"
    world.scale("db", 1)
    world.run(20.0)
    assert world.generation("web/0") == 1


def test_a_dependency_scaled_to_nothing_is_lost() -> None:
    world = World(pool("db", workers=2), pool("web", "db:ready:restart"), pool("api", "db:ready:stop"))
    world.run(1.0)
    world.scale("db", 0)
    world.run(30.0)
    assert world.states() == {"web/0": "waiting", "api/0": "stopped"}
    assert world.times("removed")["db/0"] >= world.times("stopped")["api/0"]


def test_a_oneshot_that_runs_again_is_not_done_any_more() -> None:
    """interface.md's example: migrate = { when = "done", lost = "restart" }."""
    world = World(
        pool("migrate", type="oneshot", restart=NEVER),
        pool("web", "migrate:done:restart"),
        fates={"migrate": [Fate(life=2.0)]},
    )
    world.run(10.0)
    world.feed("migrate/0", Start())
    world.run(11.0)
    assert world.states() == {"migrate/0": "running", "web/0": "waiting"}
    world.run(20.0)
    assert world.states() == {"migrate/0": "done", "web/0": "running"}


def test_a_loss_while_it_waits_for_its_next_attempt() -> None:
    world = World(
        pool("db"),
        pool("web", "db:ready:restart", restart=RestartPolicy(backoff=Backoff(first=10.0, jitter=0.0))),
        pool("api", "db:ready:stop", restart=RestartPolicy(backoff=Backoff(first=10.0, jitter=0.0))),
        fates={
            "web": [Fate(life=0.1, exit=CODE_3), Fate()],
            "api": [Fate(life=0.1, exit=CODE_3), Fate()],
            "db": [Fate(life=5.0, exit=CODE_3, launch=20.0)],
        },
    )
    world.run(20.5)
    assert world.states() == {"db/0": "running", "web/0": "backoff", "api/0": "backoff"}
    world.run(26.0)
    assert world.states() == {"db/0": "starting", "web/0": "backoff", "api/0": "stopped"}
    world.run(31.0)
    assert world.states()["web/0"] == "waiting"
    world.run(46.0)
    assert world.states()["web/0"] == "running"


def test_a_loss_finds_one_that_is_about_to_come_back() -> None:
    """stop beats restart, and what the policy or an operator had in mind."""
    world = World(
        pool("db"), pool("web", "db:ready:stop"), fates={"db": [Fate(life=5.0)], "web": [Fate(life=4.5, rest=2.0)]}
    )
    world.run(20.0)
    assert (world.states()["web/0"], world.reason("web/0")) == ("stopped", "dependency:db")


# --- stopping ------------------------------------------------------------------------------------------------------


def slow(name: str, seconds: float, *requires: str, workers: int = 1) -> tuple[PoolSpec, dict[str, list[Fate]]]:
    return pool(name, *requires, workers=workers), {name: [Fate(obeys=seconds)]}


def test_a_stop_waits_for_those_that_require_it_and_for_nobody_else() -> None:
    specs, fates = zip(
        *[slow("db", 1, workers=2), slow("api", 2, "db"), slow("web", 3, "api", "db"), slow("mail", 4)], strict=True
    )
    world = World(*specs, fates={name: them for each in fates for name, them in each.items()})
    world.run(10.0)
    world.stop_all()
    assert world.states() == dict.fromkeys(world.states(), "stopping")
    world.run(60.0)
    stopped = world.times("stopped")
    assert stopped == pytest.approx({"mail/0": 14, "web/0": 13, "api/0": 15, "db/0": 16, "db/1": 16}, abs=0.1)


def test_an_operators_stop_of_a_dependency_takes_those_down_first_that_cannot_be_without_it() -> None:
    specs, fates = zip(
        *[slow("db", 1), slow("web", 3, "db:ready:restart"), slow("api", 5, "db:ready:ignore")], strict=True
    )
    world = World(*specs, fates={name: them for each in fates for name, them in each.items()})
    world.run(10.0)
    world.feed("db/0", Stop())
    db = world.workers.workers["db/0"]
    assert (db.state, db.held, db.want_up, db.deadline) == (State.STOPPING, True, False, None)
    world.run(12.9)
    assert world.workers.workers["db/0"].held
    world.run(60.0)
    assert world.times("stopped")["db/0"] == pytest.approx(14, abs=0.1)
    assert world.states() == {"db/0": "stopped", "web/0": "waiting", "api/0": "running"}


def test_a_stop_of_a_dependency_nobody_of_whom_is_on_its_way_down_begins_at_once() -> None:
    world = World(pool("db"), pool("web", "db"))
    world.run(1.0)
    world.feed("db/0", Stop())
    assert not world.workers.workers["db/0"].held
    assert world.since(0)[-2:] == ["db/0 stop_begun", "db/0 signalled"]


def test_a_start_of_one_that_is_held_back() -> None:
    specs, fates = zip(*[slow("db", 1), slow("web", 3, "db")], strict=True)
    world = World(*specs, fates={name: them for each in fates for name, them in each.items()})
    world.run(10.0)
    world.stop_all()
    world.feed("db/0", Start())
    world.feed("web/0", Start())
    world.run(60.0)
    assert world.states() == {"db/0": "running", "web/0": "running"}
    assert (world.generation("db/0"), world.generation("web/0")) == (2, 2)


def test_one_that_ends_by_itself_while_it_is_held_back() -> None:
    world = World(
        pool("db"), pool("web", "db"), fates={"db": [Fate(life=12.0, rest=0.5)], "web": [Fate(obeys=math.inf)]}
    )
    world.run(10.0)
    world.stop_all()
    world.run(60.0)
    assert set(world.states().values()) == {"stopped"}
    assert world.times("stopped")["db/0"] == pytest.approx(12.5, abs=0.1)


def test_a_pool_is_removed_after_those_that_require_it() -> None:
    world = World(pool("db"), pool("web", "db"))
    world.run(1.0)
    for name in world.workers.stop_order(["db", "web"]):
        world.remove_pool(name)
    world.run(60.0)
    assert not world.workers.pools
    removed = [e.pool for e in world.told if e.event == "pool_removed"]
    assert removed == ["web", "db"]


# --- a supervisor that is no more ----------------------------------------------------------------------------------


def test_what_is_restored_is_no_loss_and_who_waited_goes_on_waiting() -> None:
    workers = WorkerSet(lambda event: None)
    up = Worker(
        pool="web", index=0, state=State.RUNNING, want_up=True, alive=True, generation=1, running_since=1.0, ready=True
    )
    waits = Worker(pool="web", index=1, state=State.WAITING, want_up=True, reason="dependency:db")
    assert workers.add_pool(pool("web", "db:ready:restart", workers=2), 5.0, [up, waits]) == []
    assert workers.add_pool(pool("db"), 5.0) == [("db/0", Launch(1))]
    assert workers.workers["web/0"].state is State.RUNNING
    assert workers.workers["web/1"].state is State.WAITING


def test_a_loss_is_noted_before_what_caused_it() -> None:
    """Should we die in between, the next supervisor finds the cause by itself, and those who lost by it stopped."""
    noted: list[str] = []
    workers = WorkerSet(lambda event: None, changed=lambda worker_id, w: noted.append(f"{worker_id} {w and w.state}"))
    sim = World(pool("db"), pool("api", "db:ready:restart"), pool("web", "api:ready:restart"))
    sim.run(1.0)
    restored = {name: [w for w in sim.workers.workers.values() if w.pool == name] for name in sim.workers.pools}
    for name in ("db", "api", "web"):
        workers.add_pool(sim.workers.pools[name], 1.0, restored[name])
    noted.clear()
    workers.feed("db/0", Stop(), 2.0)
    assert noted[:3] == ["web/0 stopping", "api/0 stopping", "db/0 stopping"]


# --- any graph, any history ----------------------------------------------------------------------------------------

WHEN: st.SearchStrategy[dependencies.When] = st.sampled_from(["started", "ready", "done", "stopped"])
LOST: st.SearchStrategy[Literal["ignore", "restart", "stop"]] = st.sampled_from(["ignore", "restart", "stop"])


@st.composite
def graphs(draw: st.DrawFn) -> list[PoolSpec]:
    """Pools that require some of those drawn before them, in any order."""
    specs: list[PoolSpec] = []
    for number in range(draw(st.integers(1, 6))):
        needs = draw(st.lists(st.sampled_from(range(number)), unique=True, max_size=3)) if number else []
        requires = {f"p{n}": Requirement(when=draw(WHEN), lost=draw(LOST)) for n in needs}
        oneshot = draw(st.booleans())
        specs.append(
            PoolSpec(
                name=f"p{number}",
                command=("app",),
                workers=draw(st.integers(1, 3)),
                requires=requires,
                type="oneshot" if oneshot else "service",
                restart=NEVER if oneshot else STEADY,
                ready=Probe(notify="sd") if draw(st.booleans()) else None,
            )
        )
    return draw(st.permutations(specs))


class Watched(World):
    """Checks each launch against the graph."""

    def _perform(self, actions: Actions) -> None:
        for worker_id, action in actions:
            if isinstance(action, Launch):
                assert self.workers.dependencies.blocker(worker_id.partition("/")[0]) is None, f"{worker_id} too early"
        super()._perform(actions)


def come_up(spec: PoolSpec, world: World) -> bool:
    return all(
        world.workers.workers[f"{spec.name}/{index}"].state is (State.DONE if spec.type == "oneshot" else State.RUNNING)
        for index in range(spec.workers)
    )


def possible(specs: dict[str, PoolSpec]) -> set[str]:
    """The pools that come up although nobody ever fails: those whose every requirement can come true for good."""
    found: set[str] = set()
    for name in start_order({name: spec.requires for name, spec in specs.items()}, specs):
        spec = specs[name]
        if all(
            needed in found and (requirement.when in ("started", "ready") or specs[needed].type == "oneshot")
            for needed, requirement in spec.requires.items()
        ):
            found.add(name)
    return found


ANY = settings(
    max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@ANY
@given(specs=graphs())
def test_whatever_the_graph_all_come_up_that_can_and_go_down_in_reverse(specs: list[PoolSpec]) -> None:
    by_name = {spec.name: spec for spec in specs}
    slow_ones = {spec.name: [Fate(life=1.0 if spec.type == "oneshot" else math.inf, ready=0.5)] for spec in specs}
    world = Watched(*specs, fates=slow_ones)
    world.run(200.0)
    # A `stopped` that came true before the pool came up may have let others go first: only the sure ones are sure.
    for name in possible(by_name):
        lost = [r for r in by_name[name].requires.values() if r.lost == "stop"]
        if not lost:
            assert come_up(by_name[name], world) or any(
                r.lost == "stop" for n in _below(by_name, name) for r in by_name[n].requires.values()
            ), world.states()
    world.stop_all()
    world.run(400.0)
    assert set(world.states().values()) <= {"stopped"}
    stopped = world.times("stopped")
    signalled = {e.worker: e.ts for e in world.told if e.detail and e.detail.get("signal") == 15 and e.ts >= 200.0}
    for name, spec in by_name.items():
        for needed in spec.requires:
            for mine in (w for w in stopped if w.startswith(f"{name}/") and w in signalled):
                for others in (w for w in signalled if w and w.startswith(f"{needed}/")):
                    assert stopped[mine] <= signalled[others], f"{others} before {mine}"


def _below(specs: dict[str, PoolSpec], name: str) -> set[str]:
    found = set(specs[name].requires)
    return found.union(*(_below(specs, each) for each in found))


@ANY
@given(specs=graphs(), seed=st.integers(0, 1 << 32))
def test_whatever_happens_nobody_is_launched_too_early_or_held_back_for_ever(specs: list[PoolSpec], seed: int) -> None:
    chance = random.Random(seed)
    world = Watched(*specs)
    world._fates = lambda worker_id, generation: Fate(
        life=chance.expovariate(0.2),
        exit=chance.choice([CODE_0, CODE_3]),
        ready=chance.random(),
        rest=chance.choice([0.0, 0.3]),
        obeys=chance.choice([0.1, 3.0, math.inf]),
        launch_fails=chance.choice([None, None, None, "setup-failed:clone:EAGAIN"]),
    )
    for _ in range(30):
        world.run(world.now + chance.random() * 5)
        worker = chance.choice(list(world.workers.workers.values()))
        world.feed(
            worker.id, chance.choice([Start(), Stop(), Restart(), Reset(), Kill(9, tree=True), Kill(15), Fail()])
        )
        if chance.random() < 0.3 and world.workers.workers[worker.id].running_since is not None:
            world.say_ready(worker.id, chance.random() < 0.5)
        if chance.random() < 0.2:
            world.scale(worker.pool, chance.randrange(1, 4))
        settled(world)
    world.stop_all()
    world.run(world.now + 300.0)
    assert set(world.states().values()) == {"stopped"}
    assert world.workers.next_deadline() is None
    assert world.unreaped() == 0


def settled(world: World) -> None:
    """What is kept of how pools stand is what counting them anew gives; nobody waits or is held back for nothing."""
    graph = world.workers.dependencies
    for name, spec in world.workers.pools.items():
        mine = [w for w in world.workers.workers.values() if w.pool == name]
        kept = graph._standing[name]
        fresh = dependencies.Standing(spec.workers)
        for w in mine:
            fresh.count(w, 1)
        assert all(getattr(kept, slot) == getattr(fresh, slot) for slot in fresh.__slots__)
        for w in mine:
            assert (w.state is State.WAITING) <= (w.reason == graph.reason(name) is not None)
            if w.held:
                after = [o for o in world.workers.workers.values() if name in world.workers.pools[o.pool].requires]
                assert any(o.state is State.STOPPING for o in after)
    assert not graph.unsettled
