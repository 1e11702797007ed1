from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import msgspec
import pytest
from msgspec.structs import replace

from nssup.errors import ControlError, ExitCode
from nssup.events import (
    Empty,
    Event,
    Exit,
    Exited,
    Gone,
    Kill,
    Launched,
    LaunchFailed,
    Remove,
    Restart,
    Running,
    SetupFailed,
    Start,
    Started,
    State,
    Stop,
)
from nssup.machine import Forget, KillTree, Launch, SignalMain, Span, Worker
from nssup.spec import Backoff, Intensity, PoolSpec, RestartPolicy
from nssup.workers import EVENTS, WorkerSet

if TYPE_CHECKING:
    from collections.abc import Callable

    from nssup.workers import Actions

CODE_0 = Exit(reason="exit:0", code=0, at=5.0)
CODE_3 = Exit(reason="exit:3", code=3, at=5.0)
EPOCH_OF_TESTS = 1_000_000.0


def web(workers: int = 1, **fields: object) -> PoolSpec:
    steady = RestartPolicy(backoff=Backoff(jitter=0.0))
    return PoolSpec(name="web", command=("app",), workers=workers, **{"restart": steady, **fields})  # type: ignore[arg-type]


class Set(WorkerSet):
    """A WorkerSet that keeps what it published."""

    def __init__(self, *specs: PoolSpec) -> None:
        self.told: list[Event] = []
        super().__init__(self.told.append, epoch=7, seed="seed", wall=lambda now: EPOCH_OF_TESTS + now)
        for spec in specs:
            self.add_pool(spec, 0.0)

    def up(self, *ids: str, now: float = 0.0) -> Set:
        for worker_id in ids or list(self.workers):
            n = self.workers[worker_id].generation
            for event in (Launched(n, 1000 + n), Started(n, 2000 + n, 2), Running(n)):
                self.feed(worker_id, event, now)
        return self

    def gone(self, worker_id: str, now: float = 0.0) -> list[object]:
        """It ended, completely."""
        n = self.workers[worker_id].generation
        return [a for _, a in self.feed(worker_id, Exited(n, CODE_3, True), now) + self.feed(worker_id, Gone(n), now)]

    def words(self) -> list[str]:
        return [event.event for event in self.told]

    def last(self) -> Event:
        return self.told[-1]


# --- pools ---------------------------------------------------------------------------------------------------------


def test_a_pool_comes_with_its_workers_started() -> None:
    workers = Set()
    assert workers.add_pool(web(3), 0.0) == [(f"web/{index}", Launch(1)) for index in range(3)]
    assert list(workers.workers) == ["web/0", "web/1", "web/2"]
    assert workers.words() == ["pool_added", "launched", "launched", "launched"]


def test_a_pool_not_enabled_stays_stopped_when_scaled_too() -> None:
    workers = Set()
    assert workers.add_pool(web(1, enabled=False), 0.0) == []
    assert workers.scale("web", 3, 0.0) == []
    assert [worker.state for worker in workers.workers.values()] == [State.STOPPED] * 3


def test_a_pool_of_a_name_that_is_there_is_refused() -> None:
    workers = Set(web())
    with pytest.raises(ControlError, match="there already"):
        workers.add_pool(web(), 0.0)
    workers.remove_pool("web", 0.0)
    with pytest.raises(ControlError, match="wait until it is removed"):
        workers.add_pool(web(), 0.0)


def test_a_removed_pool_is_gone_with_its_last_worker() -> None:
    workers = Set(web(2)).up()
    sent = workers.remove_pool("web", 1.0)
    assert sent == [("web/1", SignalMain(1, 15)), ("web/0", SignalMain(1, 15))]
    assert workers.remove_pool("web", 1.0) == []
    assert workers.gone("web/1", 2.0) == [Forget()]
    assert "web" in workers.pools
    assert workers.gone("web/0", 2.0) == [Forget()]
    assert (workers.pools, workers.workers) == ({}, {})
    assert workers.words()[-3:] == ["stopped", "removed", "pool_removed"]


def test_a_removed_pool_without_workers_is_gone_at_once() -> None:
    for workers in (Set(web(0)), Set(web(2, enabled=False))):
        workers.remove_pool("web", 0.0)
        assert not workers.pools
        assert workers.last().event == "pool_removed"


def test_a_pool_may_come_back_under_its_name() -> None:
    workers = Set(web(2, enabled=False))
    workers.remove_pool("web", 0.0)
    assert workers.add_pool(web(1), 0.0) == [("web/0", Launch(1))]


@pytest.mark.parametrize("wish", [Start(), Restart()])
def test_nothing_is_started_that_is_on_its_way_out(wish: Start | Restart) -> None:
    workers = Set(web(2)).up()
    workers.scale("web", 1, 0.0)
    assert workers.feed("web/1", wish, 0.0) == []
    assert workers.gone("web/1") == [Forget()]
    workers.remove_pool("web", 0.0)
    assert workers.feed("web/0", wish, 0.0) == []
    assert workers.gone("web/0") == [Forget()]


def test_unknown_names_are_the_askers_fault() -> None:
    workers = Set(web())
    asked: list[Callable[[], Actions]] = [
        lambda: workers.scale("wep", 3, 0.0),
        lambda: workers.remove_pool("wep", 0.0),
        lambda: workers.feed("web/9", Stop(), 0.0),
    ]
    for ask in asked:
        with pytest.raises(ControlError, match="there is no") as refused:
            ask()
        assert refused.value.exit_code == ExitCode.NO_SUCH
        assert refused.value.http_status == 404


# --- scaling -------------------------------------------------------------------------------------------------------


def test_scaling_up_starts_the_new_ones() -> None:
    workers = Set(web(1))
    assert workers.scale("web", 3, 0.0) == [("web/1", Launch(1)), ("web/2", Launch(1))]
    assert workers.pools["web"].workers == 3
    assert workers.last().event == "launched"
    assert [e.detail for e in workers.told if e.event == "scaled"] == [{"from": 1, "to": 3}]


def test_scaling_down_removes_the_highest_first() -> None:
    workers = Set(web(12)).up()
    assert [worker_id for worker_id, _ in workers.scale("web", 9, 0.0)] == ["web/11", "web/10", "web/9"]
    for worker_id in ("web/10", "web/9", "web/11"):
        assert workers.gone(worker_id) == [Forget()]
    assert sorted(workers.workers) == [f"web/{index}" for index in range(9)]


def test_scaling_further_down_leaves_those_alone_that_are_on_their_way() -> None:
    workers = Set(web(3)).up()
    workers.scale("web", 2, 0.0)
    assert workers.scale("web", 1, 0.0) == [("web/1", SignalMain(1, 15))]


def test_scaling_to_what_is_there_does_nothing() -> None:
    workers = Set(web(2))
    before = workers.seq
    assert workers.scale("web", 2, 0.0) == []
    assert workers.seq == before


def test_what_is_wanted_again_before_it_is_gone_comes_up_again() -> None:
    workers = Set(web(2)).up()
    workers.scale("web", 0, 0.0)
    assert workers.scale("web", 2, 0.0) == []
    assert workers.gone("web/0") == [Launch(2)]
    assert not workers.workers["web/0"].removing


def test_what_is_wanted_again_in_a_stopped_pool_is_kept_stopped() -> None:
    workers = Set(web(2)).up()
    for worker_id in ("web/0", "web/1"):
        workers.feed(worker_id, Stop(), 0.0)
    workers.scale("web", 0, 0.0)
    workers.scale("web", 2, 0.0)
    assert workers.gone("web/0") == []
    assert workers.workers["web/0"].state is State.STOPPED
    assert not workers.workers["web/0"].removing
    assert "removed" not in workers.words()


def test_a_pool_stopped_by_its_operator_is_scaled_without_starting() -> None:
    workers = Set(web(2))
    for worker_id in ("web/0", "web/1"):
        workers.feed(worker_id, Stop(), 0.0)
    assert workers.scale("web", 3, 0.0) == []
    workers.feed("web/0", Start(), 0.0)
    assert workers.scale("web", 4, 0.0) == [("web/3", Launch(1))]


def test_scaling_to_nothing_and_back_is_no_stop() -> None:
    workers = Set(web(1)).up()
    workers.scale("web", 0, 0.0)
    workers.gone("web/0")
    assert not workers.workers
    assert workers.scale("web", 1, 0.0) == [("web/0", Launch(2))]  # its numbers go on


def test_scaling_what_cannot_be_scaled_is_refused() -> None:
    workers = Set(web(1)).up()
    with pytest.raises(ControlError, match="cannot scale web to -1"):
        workers.scale("web", -1, 0.0)
    workers.remove_pool("web", 0.0)
    with pytest.raises(ControlError, match="being removed"):
        workers.scale("web", 3, 0.0)


def test_a_single_worker_that_is_wanted_is_not_forgotten() -> None:
    workers = Set(web(1)).up()
    workers.feed("web/0", Remove(), 0.0)
    assert workers.gone("web/0") == []
    assert workers.workers["web/0"].state is State.STOPPED


# --- a pool that fails as one ----------------------------------------------------------------------------------------


def test_a_pool_that_was_failing_goes_on_failing_with_the_next_supervisor() -> None:
    """The one that died too often was noted, and the supervisor was killed before the others were."""
    limit = Intensity(deaths=3, within=60.0, then="fail-pool")
    failed = Worker(pool="web", index=0, state=State.FAILED, reason="intensity", want_up=True, generation=3)
    failed = replace(failed, last_exit=CODE_3, last_life=Span(3, 90.0, 95.0))
    up = Worker(pool="web", index=1, state=State.RUNNING, want_up=True, generation=1, alive=True)
    up = replace(up, launched_at=50.0, running_since=51.0, up_since=51.0, init_host_pid=5, host_pid=6, ns_pid=2)
    since = replace(up, index=2, launched_at=96.0)
    down = Worker(pool="web", index=3, state=State.STOPPED, reason="operator", generation=1)
    for then, state in (("fail-pool", State.STOPPING), ("fail", State.RUNNING)):
        workers = Set()
        policy = RestartPolicy(intensity=replace(limit, then=then))
        actions = workers.add_pool(web(4, restart=policy), 100.0, [failed, up, since, down])
        states = [w.state for w in workers.workers.values()]
        assert states == [State.FAILED, state, State.RUNNING, State.STOPPED]
        assert actions == ([("web/1", SignalMain(1, 15))] if then == "fail-pool" else [])
        assert [life.exit for life in workers.lives("web/0")] == [CODE_3]


def test_a_worker_taken_over_on_its_way_down_with_its_pool_fails() -> None:
    workers = Set()
    condemned = Worker(pool="web", index=0, state=State.STOPPING, reason="pool-failed", want_up=True, condemned=True)
    condemned = replace(condemned, generation=1, alive=True, launched_at=50.0, stop_step=0, deadline=110.0)
    workers.add_pool(web(), 100.0, [condemned])
    workers.gone("web/0", 101.0)
    assert workers.workers["web/0"].state is State.FAILED
    assert workers.last().reason == "pool-failed"


# --- deadlines -----------------------------------------------------------------------------------------------------


def test_the_earliest_deadline_comes_first() -> None:
    workers = Set(web(3)).up()
    assert workers.next_deadline() is None
    for worker_id, now in (("web/1", 2.0), ("web/0", 1.0), ("web/2", 3.0)):
        workers.feed(worker_id, Stop(), now)
    assert workers.next_deadline() == 11.0
    assert workers.due(10.999) == []
    assert workers.due(12.0) == [("web/0", KillTree(1)), ("web/1", KillTree(1))]
    assert workers.next_deadline() == 13.0


def test_a_deadline_no_longer_wanted_is_forgotten() -> None:
    workers = Set(web(2)).up()
    workers.feed("web/0", Stop(), 1.0)
    workers.feed("web/1", Stop(), 2.0)
    workers.gone("web/0", 3.0)
    assert workers.next_deadline() == 12.0
    assert workers.due(11.5) == []


def test_deadlines_of_forgotten_workers_are_forgotten() -> None:
    workers = Set(web(1)).up()
    workers.scale("web", 0, 1.0)
    workers.gone("web/0", 2.0)
    assert workers.next_deadline() is None
    assert workers.due(1000.0) == []


def test_the_heap_does_not_grow_with_what_happened() -> None:
    workers = Set(web(10)).up()
    now = 0.0
    for _ in range(200):
        for worker_id in list(workers.workers):
            workers.feed(worker_id, Stop(), now)
            workers.gone(worker_id, now)
            workers.feed(worker_id, Start(), now)
        workers.up(now=now)
        assert workers.pending() <= 2 * 10 + 64
        now += 0.001
    workers.feed("web/3", Stop(), now)
    assert workers.next_deadline() == now + 10.0


# --- publishing ----------------------------------------------------------------------------------------------------


def test_events_are_numbered_and_say_when() -> None:
    workers = Set(web(2)).up(now=2.5)
    assert [event.seq for event in workers.told] == list(range(1, len(workers.told) + 1))
    assert {event.epoch for event in workers.told} == {7}
    assert workers.last().ts == EPOCH_OF_TESTS + 2.5
    assert {event.v for event in workers.told} == {1}


def test_the_life_of_a_worker_is_told() -> None:
    workers = Set(web(1)).up(now=1.0)
    started = workers.last()
    assert (started.event, started.worker, started.from_, started.to) == ("started", "web/0", "starting", "running")
    assert (started.generation, started.host_pid, started.ns_pid, started.reason) == (1, 2001, 2, None)
    workers.feed("web/0", Exited(1, CODE_3), 5.0)
    exited = workers.last()
    assert (exited.event, exited.reason, exited.exit, exited.host_pid) == ("main_exited", "exit:3", CODE_3, 2001)
    workers.feed("web/0", Empty(1), 5.0)
    again = workers.last()
    assert (again.event, again.from_, again.to, again.reason) == ("relaunched", "stopping", "starting", "exit:3")
    assert (again.generation, again.host_pid, again.exit) == (2, None, CODE_3)
    assert again.detail == {"ended": {"generation": 1, "host_pid": 2001, "ns_pid": 2}}
    workers.up(now=5.0).feed("web/0", Exited(2, CODE_0, True), 5.5)
    waiting = workers.last()
    assert (waiting.event, waiting.to, waiting.exit, waiting.host_pid) == ("backed_off", "backoff", CODE_0, 2002)


def test_a_relaunch_at_once_is_one_event() -> None:
    workers = Set(web(1)).up(now=1.0)
    before = len(workers.told)
    workers.feed("web/0", Exited(1, CODE_3, True), 5.0)
    assert workers.words()[before:] == ["relaunched"]
    workers.feed("web/0", Gone(1), 5.0)
    assert workers.words()[before:] == ["relaunched"]


def test_a_stop_and_its_escalation_are_told() -> None:
    workers = Set(web(1)).up()
    workers.feed("web/0", Stop(), 1.0)
    assert (workers.last().event, workers.last().reason) == ("stop_begun", "operator")
    assert workers.last().detail == {"signal": 15, "tree": False}
    workers.due(11.0)
    assert (workers.last().event, workers.last().detail) == ("signalled", {"signal": 9, "tree": True})
    workers.feed("web/0", Gone(1), 11.5)
    stopped = workers.last()
    assert (stopped.event, stopped.from_, stopped.to, stopped.host_pid) == ("stopped", "stopping", "stopped", 2001)
    killed = Exit(reason="signal:SIGKILL", signal=9, timed_out=True, at=EPOCH_OF_TESTS + 11.5)
    assert stopped.exit == killed == workers.workers["web/0"].last_exit


def test_a_restart_is_told_as_a_stop_and_a_launch() -> None:
    workers = Set(web(1)).up()
    before = len(workers.told)
    workers.feed("web/0", Restart(), 1.0)
    workers.gone("web/0", 1.0)
    assert workers.words()[before:] == ["stop_begun", "launched"]
    assert [event.reason for event in workers.told[before:]] == ["operator", None]


@pytest.mark.parametrize("event", [Kill(1), Kill(1, tree=True), Kill(9, tree=True)])
def test_an_operators_signal_is_told(event: Kill) -> None:
    workers = Set(web(1)).up()
    workers.feed("web/0", event, 1.0)
    assert (workers.last().event, workers.last().reason) == ("signalled", "operator")
    assert workers.last().detail == {"signal": event.signo, "tree": event.tree}
    assert workers.last().host_pid == 2001


def test_a_signal_to_nobody_and_wishes_already_granted_are_not_told() -> None:
    workers = Set(web(1)).up()
    workers.feed("web/0", Start(), 0.0)
    workers.gone("web/0")
    before = workers.seq
    workers.feed("web/0", Kill(1), 0.0)
    assert workers.seq == before


@pytest.mark.parametrize(
    ("end", "words", "last"),
    [(CODE_0, ["main_exited", "finished"], "done"), (CODE_3, ["main_exited", "failed"], "failed")],
)
def test_an_end_for_good_is_told(end: Exit, words: list[str], last: str) -> None:
    workers = Set(web(1, restart=RestartPolicy(policy="never"))).up()
    before = len(workers.told)
    workers.feed("web/0", Exited(1, end, True), 5.0)
    workers.feed("web/0", Gone(1), 5.0)
    assert workers.words()[before:] == words
    assert (workers.last().to, workers.last().reason, workers.last().exit) == (last, end.reason, end)
    workers.feed("web/0", Stop(), 6.0)
    assert (workers.last().event, workers.last().exit) == ("stopped", None)


def test_a_stop_while_only_init_lingers_is_told_without_an_exit() -> None:
    workers = Set(web(1)).up()
    workers.feed("web/0", Exited(1, CODE_3, True), 0.0)
    workers.feed("web/0", Stop(), 0.0)
    assert (workers.last().event, workers.last().exit, workers.last().detail) == ("stop_begun", None, None)


def test_an_exit_that_the_core_made_says_when() -> None:
    workers = Set(web(1))
    workers.feed("web/0", LaunchFailed(1, "setup-failed:clone:EAGAIN"), 3.0)
    assert workers.last().exit == Exit(reason="setup-failed:clone:EAGAIN", at=EPOCH_OF_TESTS + 3.0)
    workers.due(10.0)
    workers.feed("web/0", Launched(2, 5), 10.0)
    workers.feed("web/0", SetupFailed(2, "exec-failed:ENOENT"), 11.0)
    workers.feed("web/0", Empty(2), 12.0)
    assert workers.workers["web/0"].last_exit == Exit(reason="exec-failed:ENOENT", at=EPOCH_OF_TESTS + 11.0)


def test_a_launch_withdrawn_is_no_end() -> None:
    workers = Set(web(1)).up()
    workers.gone("web/0")
    workers.feed("web/0", Start(), 0.0)
    workers.feed("web/0", Stop(), 0.0)
    workers.feed("web/0", LaunchFailed(2, "operator"), 0.0)
    assert (workers.last().event, workers.last().exit) == ("stopped", None)


def test_other_facts_are_numbered_with_the_rest() -> None:
    workers = Set(web(1))
    before = workers.seq
    workers.note("log_failed", 2.0, pool="web", reason="ENOSPC", detail={"dropped_bytes": 7})
    assert (workers.last().seq, workers.last().ts) == (before + 1, EPOCH_OF_TESTS + 2.0)
    assert (workers.last().pool, workers.last().reason) == ("web", "ENOSPC")


def test_a_removal_is_told() -> None:
    workers = Set(web(1)).up()
    workers.scale("web", 0, 0.0)
    workers.gone("web/0")
    assert (workers.last().event, workers.last().worker, workers.last().to) == ("removed", "web/0", None)


def test_every_event_is_of_the_set_that_is_documented_and_can_be_written() -> None:
    workers = Set(web(2)).up(now=1.0)
    workers.feed("web/0", Exited(1, CODE_3, True), 5.0)
    workers.scale("web", 1, 5.0)
    workers.remove_pool("web", 6.0)
    assert set(workers.words()) <= EVENTS
    for event in workers.told:
        assert msgspec.json.decode(msgspec.json.encode(event))["event"] == event.event


def test_the_events_documented_are_the_events_there_are() -> None:
    from nssup import workers

    table = [line for line in (workers.__doc__ or "").splitlines() if line.startswith("| `")]
    named = {word for line in table for word in line.split("|")[1].replace("`", " ").split()}
    assert named == EVENTS


# --- cost ----------------------------------------------------------------------------------------------------------


def test_a_worker_costs_little_memory() -> None:
    tracemalloc.start()
    try:
        workers = WorkerSet(lambda event: None)
        workers.add_pool(web(2000), 0.0)
        for worker_id in workers.workers:
            for event in (Launched(1, 5), Started(1, 6, 2), Running(1)):
                workers.feed(worker_id, event, 0.0)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / 2000 < 1024
