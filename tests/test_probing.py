"""When a probe is tried and what its results mean: pure."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_machine import Story, running, web

from nssup.events import LifeInput, Passed, Ready, Sick, Start, State, Stop, Unready
from nssup.probe import matches
from nssup.probing import Gauge, Name, after, begin, meaning, wait, wanted
from nssup.spec import PoolSpec, Probe

if TYPE_CHECKING:
    from collections.abc import Iterable

TCP = Probe(tcp="localhost:80")
HTTP = Probe(http="http://localhost:80/", failures=2, successes=2)
ALL = web(startup=TCP, ready=HTTP, live=TCP)


# --- which -----------------------------------------------------------------------------------------------------------


def test_each_probe_in_its_time() -> None:
    story = Story(ALL).tell(Start())
    assert wanted(ALL, story.worker) == {}
    story = running(ALL)
    assert wanted(ALL, story.worker) == {"startup": True}
    story.tell(Passed(1))
    assert wanted(ALL, story.worker) == {"ready": True}
    story.tell(Ready(1))
    assert wanted(ALL, story.worker) == {"ready": False, "live": False}
    story.tell(Unready(1, "probe-failed"))
    assert wanted(ALL, story.worker) == {"ready": False, "live": False}
    assert wanted(ALL, story.tell(Stop()).worker) == {}


def test_what_tells_by_itself_is_not_tried() -> None:
    assert wanted(web(), running().worker) == {}
    for probe in (Probe(notify="sd"), Probe(notify="fd"), Probe(log="up")):
        spec = web(ready=probe)
        assert wanted(spec, running(spec).worker) == {}
        assert wanted(spec, running(spec).tell(Ready(1)).worker) == {}


def test_the_same_probe_twice() -> None:
    spec = web(startup=TCP, ready=TCP)
    assert wanted(spec, running(spec).worker) == {"startup": True}
    assert wanted(spec, running(spec).tell(Passed(1)).worker) == {"ready": True}


# --- when ------------------------------------------------------------------------------------------------------------


def test_who_is_waited_for_is_tried_soon_and_then_less_and_less_often() -> None:
    probe, gauge, waits = Probe(tcp="x", every=1.0), Gauge(False), []
    for _ in range(8):
        waits.append(wait(probe, gauge, True, "web/0:1:ready"))
        gauge = after(probe, gauge, False)
    assert waits[0] == 0.0
    assert waits[1:] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0], rel=0.1)
    assert wait(Probe(tcp="x", every=0.01), after(probe, Gauge(False), False), True, "k") <= 0.011


def test_a_thousand_do_not_come_at_once() -> None:
    probe = Probe(tcp="x", every=10.0)
    first = [wait(probe, Gauge(True), False, f"web/{n}:1:live") for n in range(1000)]
    seconds = Counter(int(at) for at in first)
    assert set(seconds) == set(range(10))
    assert all(60 <= there <= 140 for there in seconds.values())
    assert first == [wait(probe, Gauge(True), False, f"web/{n}:1:live") for n in range(1000)]


@given(
    every=st.floats(0.001, 1e6),
    tries=st.integers(0, 10**9),
    hurried=st.booleans(),
    key=st.text(max_size=20),
)
def test_a_wait_is_never_longer_than_it_may_be(every: float, tries: int, hurried: bool, key: str) -> None:
    seconds = wait(Probe(tcp="x", every=every), Gauge(True, tries=tries), hurried, key)
    assert 0.0 <= seconds <= every * 1.2
    assert not tries or hurried or seconds >= every * 0.89


# --- what it means ---------------------------------------------------------------------------------------------------


def results(spec: PoolSpec, story: Story, name: Name, said: str) -> list[LifeInput | None]:
    """What each of the results means, `+` or `-`, as the worker stays where it is."""
    gauge, found = begin(name, story.worker, story.state is State.STARTING), []
    for one in said:
        before, gauge = gauge, after(getattr(spec, name), gauge, one == "+")
        found.append(meaning(name, spec, story.worker, before, gauge))
    return found


def shown(events: Iterable[LifeInput | None]) -> str:
    return "".join("." if event is None else type(event).__name__[0] for event in events)


@pytest.mark.parametrize(
    ("said", "means"),
    [("+", "R"), ("---------------+", "...............R"), ("-+", ".R")],
)
def test_ready_at_last(said: str, means: str) -> None:
    spec = web(ready=TCP)
    assert shown(results(spec, running(spec), "ready", said)) == means


def test_two_in_a_row_where_two_are_asked() -> None:
    spec = web(ready=HTTP)
    assert shown(results(spec, running(spec), "ready", "+-+--++")) == "......R"


def test_a_startup_probe_comes_before_the_others() -> None:
    assert results(ALL, running(ALL), "startup", "--+")[-1] == Passed(1)
    spec = web(startup=TCP)
    assert results(spec, running(spec), "startup", "-+")[-1] == Ready(1)


def test_a_startup_probe_may_give_up() -> None:
    spec = web(startup=Probe(tcp="x", failures=3))
    assert results(spec, running(spec), "startup", "---")[-1] == Sick(1, "probe-failed")
    assert shown(results(web(startup=TCP), running(web(startup=TCP)), "startup", "-" * 50)) == "." * 50


def test_readiness_comes_and_goes() -> None:
    spec = web(ready=HTTP)
    story = running(spec).tell(Ready(1))
    assert shown(results(spec, story, "ready", "+-+---+-++--")) == "....U....R.U"
    assert results(spec, story, "ready", "--")[-1] == Unready(1, "probe-failed")


def test_who_was_taken_over_without_its_readiness_gets_it_again() -> None:
    spec = web(ready=TCP)
    story = running(spec).tell(Ready(1), Unready(1, "probe-failed"))
    assert shown(results(spec, story, "ready", "--+")) == "..R"


def test_three_failures_in_a_row_where_nothing_is_said() -> None:
    story = running(ALL).tell(Passed(1), Ready(1))
    assert shown(results(ALL, story, "live", "+--+--+---")) == ".........S"
    assert results(ALL, story, "live", "---")[-1] == Sick(1, "probe-failed")


@given(
    said=st.lists(st.booleans(), max_size=60),
    failures=st.integers(1, 5),
    successes=st.integers(1, 5),
    hurried=st.booleans(),
)
def test_an_answer_changes_after_so_many_in_a_row_and_not_before(
    said: list[bool], failures: int, successes: int, hurried: bool
) -> None:
    probe, gauge = Probe(tcp="x", failures=failures, successes=successes), Gauge(not hurried)
    for number, good in enumerate(said):
        before, gauge = gauge, after(probe, gauge, good)
        needed = successes if good else failures
        recent = said[max(0, number + 1 - needed) : number + 1]
        changes = before.answer is not good and len(recent) == needed and set(recent) == {good}
        assert (gauge.answer is not before.answer) == changes
    assert gauge.tries == len(said)


# --- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "found"),
    [
        (b'{"worker":"web/0","generation":3,"msg":"now listening on 80"}\n', True),
        (b'{"worker":"web/0","generation":2,"msg":"now listening on 80"}\n', False),
        (b'{"worker":"web/0","generation":3,"msg":"listening"}\n', False),
        (b'{"worker":"web/0","generation":3,"data":{"event":"listening on","port":80}}\n', False),
        (b'{"worker":"web/0","generation":3,"data":{"said":"listening on 80"}}\n', True),
        (b'{"x":1}\n{"worker":"web/0","generation":3,"msg":"listening on 80"}\n{"worker":"web/0","gen', True),
        (b'{"worker":"web/0","generation":3,"msg":"listening on 80', False),
        (b"\n\xff\n", False),
    ],
)
def test_lines(records: bytes, found: bool) -> None:
    assert matches(re.compile(r"listening on \d+"), 3, records) is found
