from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nssup.events import Exit
from nssup.restart import (
    FAULTS,
    FORGOTTEN,
    MIN_WAIT,
    MOST_HURRIED,
    Again,
    Finished,
    GaveUp,
    Halted,
    History,
    Verdict,
    decide,
    wait,
)
from nssup.spec import Backoff, Intensity, RestartPolicy, Rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    Policy = Literal["always", "on-failure", "never"]

ENDED_WELL = Exit(reason="exit:0", code=0)
FAILED = Exit(reason="exit:3", code=3)
SEGFAULT = Exit(reason="signal:SIGSEGV", signal=11, core=True)
INIT_KILLED = Exit(reason="init-killed")
NO_PROGRAM = Exit(reason="exec-failed:ENOENT")
NO_PROC = Exit(reason="setup-failed:mount_proc:EPERM")
STEADY = Backoff(jitter=0.0)


def decided(
    exit: Exit,  # noqa: A002
    *,
    policy: RestartPolicy,
    kind: Literal["service", "oneshot"] = "service",
    history: History = FORGOTTEN,
    uptime: float | None = 0.0,
    generation: int = 1,
    now: float = 1000.0,
) -> Verdict:
    return decide(policy, kind, history, exit, uptime, now=now, seed="seed", worker_id="web/3", generation=generation)


@pytest.mark.parametrize(
    ("policy", "end", "verdict"),
    [
        ("always", ENDED_WELL, Again),
        ("always", FAILED, Again),
        ("always", SEGFAULT, Again),
        ("always", INIT_KILLED, Again),
        ("always", NO_PROGRAM, Again),
        ("on-failure", ENDED_WELL, Finished),
        ("on-failure", FAILED, Again),
        ("on-failure", SEGFAULT, Again),
        ("on-failure", INIT_KILLED, Again),
        ("on-failure", NO_PROC, Again),
        ("never", ENDED_WELL, Finished),
        ("never", FAILED, GaveUp),
        ("never", SEGFAULT, GaveUp),
        ("never", INIT_KILLED, GaveUp),
        ("never", NO_PROGRAM, GaveUp),
        ("never", NO_PROC, GaveUp),
    ],
)
def test_policy(policy: Policy, end: Exit, verdict: type) -> None:
    assert type(decided(end, policy=RestartPolicy(policy=policy))) is verdict


def test_success_is_what_the_policy_calls_so() -> None:
    policy = RestartPolicy(policy="on-failure", success=(3, 75))
    assert isinstance(decided(FAILED, policy=policy), Finished)
    assert isinstance(decided(ENDED_WELL, policy=policy), Again)


def test_a_oneshot_that_ended_well_is_finished_under_every_policy() -> None:
    assert isinstance(decided(ENDED_WELL, policy=RestartPolicy(), kind="oneshot"), Finished)
    assert isinstance(decided(FAILED, policy=RestartPolicy(), kind="oneshot"), Again)


def waits(ends: Sequence[tuple[Exit, float | None]], policy: RestartPolicy) -> list[float]:
    """The delays before each next life of a worker that ends so."""
    history, delays = FORGOTTEN, []
    for generation, (end, uptime) in enumerate(ends, 1):
        verdict = decided(end, policy=policy, history=history, uptime=uptime, generation=generation)
        assert isinstance(verdict, Again)
        history = verdict.history
        delays.append(verdict.delay)
    return delays


def test_a_crash_loop_backs_off_from_its_first_death_and_doubles() -> None:
    policy = RestartPolicy(backoff=STEADY)
    expected = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    assert waits([(FAILED, 0.01)] * 11, policy) == pytest.approx(expected)


def test_the_first_restart_of_a_settled_life_is_immediate_and_later_ones_are_not() -> None:
    assert waits([(FAILED, 1.0)] * 4, RestartPolicy(backoff=STEADY)) == pytest.approx([0.0, 0.1, 0.2, 0.4])


def test_a_life_that_did_not_settle_does_not_use_up_the_immediate_restart() -> None:
    ends = [(FAILED, 0.5), (FAILED, 5.0), (FAILED, 5.0)]
    assert waits(ends, RestartPolicy(backoff=STEADY)) == pytest.approx([0.1, 0.0, 0.2])


def test_a_long_life_forgets_everything_before_it() -> None:
    ends = [(FAILED, 2.0), (FAILED, 2.0), (FAILED, 2.0), (FAILED, 60.0), (FAILED, 0.0)]
    assert waits(ends, RestartPolicy(backoff=STEADY)) == pytest.approx([0.0, 0.1, 0.2, 0.0, 0.1])


@pytest.mark.parametrize("end", [NO_PROGRAM, NO_PROC])
@pytest.mark.parametrize("uptime", [None, 5.0])
def test_a_life_whose_program_never_ran_always_waits(end: Exit, uptime: float | None) -> None:
    assert waits([(end, uptime)] * 3, RestartPolicy(settle=0.0, backoff=STEADY)) == pytest.approx([0.1, 0.2, 0.4])


def test_a_life_that_never_was_running_does_not_settle() -> None:
    assert waits([(FAILED, None)], RestartPolicy(settle=0.0, backoff=STEADY)) == pytest.approx([0.1])


@pytest.mark.parametrize("backoff", [Backoff(first=0.0), Backoff(max=0.0), Backoff(factor=0.0), Backoff(jitter=1.0)])
def test_a_wait_is_never_nothing(backoff: Backoff) -> None:
    assert min(wait(backoff, n, "seed", "web/0", 1) for n in range(50)) >= MIN_WAIT


@pytest.mark.parametrize("count", [0, 1, 10, 1024, 10**9])
@pytest.mark.parametrize("factor", [1.0, 2.0, 1.5e300])
def test_no_number_of_waits_is_too_many(count: int, factor: float) -> None:
    assert 0 < wait(Backoff(factor=factor, jitter=0.0), count, "seed", "web/0", 1) <= 30.0


@given(st.integers(0, 60), st.text(max_size=8), st.integers(0, 10**6), st.floats(0, 1), st.integers(0, 10**6))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_jitter_stays_within_its_share(count: int, seed: str, index: int, jitter: float, generation: int) -> None:
    plain = wait(Backoff(jitter=0.0), count, seed, f"web/{index}", generation)
    jittered = wait(Backoff(jitter=jitter), count, seed, f"web/{index}", generation)
    assert max(plain * (1 - jitter), MIN_WAIT) - 1e-9 <= jittered <= plain * (1 + jitter) + 1e-9


def test_jitter_is_the_same_in_a_replay_and_spreads_workers_lives_and_hosts() -> None:
    backoff = Backoff(first=1.0, jitter=0.1)
    workers = [wait(backoff, 0, "seed", f"web/{index}", 1) for index in range(1000)]
    assert workers == [wait(backoff, 0, "seed", f"web/{index}", 1) for index in range(1000)]
    for spread in (
        workers,
        [wait(backoff, 0, "seed", "web/0", generation) for generation in range(1000)],
        [wait(backoff, 0, f"host{host}", "web/0", 1) for host in range(1000)],
    ):
        tenths = [sum(0.9 + n / 50 <= delay < 0.9 + (n + 1) / 50 for delay in spread) for n in range(10)]
        assert min(tenths) > 50, "each tenth of the range should get about 100 of 1000"


# --- signals that are a success, rules --------------------------------------------------------------------------------

TERMINATED = Exit(reason="signal:SIGTERM", signal=15)


def test_a_signal_may_be_a_success() -> None:
    policy = RestartPolicy(policy="on-failure", success=(0, -15))
    assert isinstance(decided(TERMINATED, policy=policy), Finished)
    assert isinstance(decided(SEGFAULT, policy=policy), Again)
    assert isinstance(decided(Exit(reason="exit:15", code=15), policy=policy), Again)


RULES = (
    Rule(then="restart-now", exit=(75,)),
    Rule(then="fail", exit=(78,), signal=(6,)),
    Rule(then="stop", exit=(0,), signal=(15,)),
    Rule(then="backoff", exit=(3,)),
    Rule(then="fail", exit=(3,)),
)


@pytest.mark.parametrize("policy", ["always", "on-failure", "never"])
@pytest.mark.parametrize(
    ("end", "verdict"),
    [
        (Exit(reason="exit:75", code=75), Again),
        (Exit(reason="exit:78", code=78), GaveUp),
        (Exit(reason="signal:SIGABRT", signal=6), GaveUp),
        (ENDED_WELL, Halted),
        (TERMINATED, Halted),
        (FAILED, Again),
    ],
)
def test_the_first_rule_that_matches_beats_every_policy(policy: Policy, end: Exit, verdict: type) -> None:
    assert type(decided(end, policy=RestartPolicy(policy=policy, rules=RULES))) is verdict


def test_a_rule_for_an_end_says_nothing_about_others() -> None:
    assert isinstance(decided(SEGFAULT, policy=RestartPolicy(policy="never", rules=RULES)), GaveUp)
    assert isinstance(decided(INIT_KILLED, policy=RestartPolicy(rules=RULES)), Again)
    assert isinstance(decided(NO_PROGRAM, policy=RestartPolicy(policy="never", rules=RULES)), GaveUp)


@pytest.mark.parametrize("reason", sorted(FAULTS))
def test_an_end_that_we_caused_is_a_failure_of_no_rule(reason: str) -> None:
    policy = RestartPolicy(policy="on-failure", rules=RULES, backoff=STEADY)
    verdict = decided(Exit(reason=reason, signal=15), policy=policy)
    assert isinstance(verdict, Again)
    assert verdict.delay == pytest.approx(0.1)


def test_restart_now_is_now_until_it_spins() -> None:
    policy = RestartPolicy(rules=(Rule(then="restart-now", exit=(3,)),), backoff=STEADY)
    assert waits([(FAILED, 5.0)] * 30, policy) == [0.0] * 30
    spinning = waits([(FAILED, 0.0)] * (MOST_HURRIED + 3), policy)
    assert spinning == pytest.approx([0.0] * MOST_HURRIED + [0.1, 0.2, 0.4])
    calm = [*[(FAILED, 0.0)] * MOST_HURRIED, (FAILED, 5.0), (FAILED, 0.0)]
    assert waits(calm, policy) == [0.0] * len(calm)


def test_a_rule_may_ask_for_a_wait_where_there_would_be_none() -> None:
    policy = RestartPolicy(rules=(Rule(then="backoff", exit=(3,)),), backoff=STEADY)
    assert waits([(FAILED, 5.0), (SEGFAULT, 5.0)], policy) == pytest.approx([0.1, 0.0])


# --- launches that failed ---------------------------------------------------------------------------------------------


def test_a_launch_that_failed_is_no_crash_of_the_program() -> None:
    limited = RestartPolicy(backoff=STEADY, intensity=Intensity(deaths=2, within=1e9))
    assert waits([(NO_PROGRAM, None)] * 5, limited) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])
    mixed = [(FAILED, 0.0), (NO_PROGRAM, None), (NO_PROC, None), (FAILED, 0.0), (NO_PROGRAM, None)]
    assert waits(mixed, RestartPolicy(backoff=STEADY)) == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.1])


# --- intensity --------------------------------------------------------------------------------------------------------


def died(policy: RestartPolicy, times: Sequence[float], end: Exit = FAILED, uptime: float = 0.0) -> list[Verdict]:
    """What is decided at each of these deaths."""
    verdicts: list[Verdict] = []
    history = FORGOTTEN
    for generation, now in enumerate(times, 1):
        verdict = decided(end, policy=policy, history=history, uptime=uptime, generation=generation, now=now)
        history = verdict.history if isinstance(verdict, Again | GaveUp) else history
        verdicts.append(verdict)
    return verdicts


@pytest.mark.parametrize("then", ["fail", "fail-pool", "shutdown"])
@pytest.mark.parametrize("end", [FAILED, SEGFAULT, ENDED_WELL, INIT_KILLED])
def test_so_many_deaths_within_so_long_are_too_many(then: Literal["fail", "fail-pool", "shutdown"], end: Exit) -> None:
    policy = RestartPolicy(intensity=Intensity(deaths=3, within=10.0, then=then))
    assert [type(v) for v in died(policy, [0.0, 5.0, 9.0], end)] == [Again, Again, GaveUp]
    last = died(policy, [0.0, 5.0, 9.0], end)[-1]
    assert isinstance(last, GaveUp)
    assert (last.reason, last.then) == ("intensity", then)
    assert [type(v) for v in died(policy, [0.0, 5.0, 10.0, 14.9], end)] == [Again, Again, Again, GaveUp]


def test_deaths_are_counted_however_long_the_lives_between_them() -> None:
    policy = RestartPolicy(intensity=Intensity(deaths=3, within=1000.0), backoff=Backoff(reset_after=60.0))
    assert [type(v) for v in died(policy, [0.0, 300.0, 600.0], uptime=299.0)] == [Again, Again, GaveUp]


def test_one_death_may_be_too_many() -> None:
    assert isinstance(died(RestartPolicy(intensity=Intensity(deaths=1, within=1.0)), [0.0])[0], GaveUp)


def test_instead_of_giving_up_a_worker_may_wait_until_there_were_fewer() -> None:
    policy = RestartPolicy(intensity=Intensity(deaths=3, within=10.0, then="backoff"), backoff=STEADY)
    delays = [v.delay for v in died(policy, [0.0, 1.0, 2.0, 10.5, 19.0], uptime=5.0) if isinstance(v, Again)]
    assert delays == pytest.approx([0.0, 0.1, 8.0, 0.5, 0.8])


@given(st.lists(st.floats(0.0, 30.0), min_size=1, max_size=60), st.integers(1, 6), st.floats(0.1, 60.0))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_no_window_ever_has_more_deaths_than_intensity_allows(lives: list[float], most: int, within: float) -> None:
    policy = RestartPolicy(intensity=Intensity(deaths=most, within=within, then="backoff"))
    now, history = 0.0, FORGOTTEN
    deaths: list[float] = []
    for generation, uptime in enumerate(lives, 1):
        now += uptime
        deaths.append(now)
        assert len([at for at in deaths if at > now - within + 1e-6]) <= most
        verdict = decided(FAILED, policy=policy, history=history, uptime=uptime, generation=generation, now=now)
        assert isinstance(verdict, Again)
        assert len(verdict.history.deaths) <= most
        history = verdict.history
        now += verdict.delay
