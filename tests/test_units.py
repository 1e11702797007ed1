from __future__ import annotations

import contextlib
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nssup import units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10.0),
        ("0s", 0.0),
        ("250ms", 0.25),
        ("500us", 0.0005),
        ("1.5h", 5400.0),
        ("2m", 120.0),
        ("1d", 86400.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("1d2h3m4s5ms6us", 93784.005006),
        ("10 s", 10.0),
        (" 10s ", 10.0),
        ("0.1s", 0.1),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert units.duration(text) == pytest.approx(seconds, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10", 'has no unit: write "10s"'),
        ("1.5", 'has no unit: write "1.5s"'),
        ("", "is no duration"),
        ("s", "is no duration"),
        ("-1s", "is no duration"),
        ("10 seconds", "is no duration"),
        ("10sec", "is no duration"),
        ("1e3s", "is no duration"),
        ("30m1h", "is no duration"),
        ("1s1s", "is no duration"),
        ("1h30", "is no duration"),
        ("1h-30m", "is no duration"),
        ("\u0661\u0660s", "is no duration"),
        ("1S", "is no duration"),
        ("1w", "is no duration"),
        ("inf", "is no duration"),
        ("9" * 59 + "s", "is longer than a hundred years"),
        ("9" * 5000 + "s", "is no duration"),
        ("36501d", "is longer than a hundred years"),
    ],
)
def test_what_is_no_duration(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="^.{0,100}" + why):
        units.duration(text)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("0B", 0),
        ("100B", 100),
        ("1K", 1024),
        ("64M", 64 << 20),
        ("64MiB", 64 << 20),
        ("64 MiB", 64 << 20),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("512KiB", 512 << 10),
        ("8388607T", 8388607 << 40),
    ],
)
def test_sizes(text: str, bytes_: int) -> None:
    assert units.size(text) == bytes_


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("64", 'has no unit: write "64B"'),
        ("", "is no size"),
        ("M", "is no size"),
        ("64MB", "is no size"),  # 1000 or 1024?
        ("64m", "is no size"),
        ("64iB", "is no size"),
        ("-1M", "is no size"),
        ("0.3B", "is no whole number of bytes"),
        ("8388608T", "is more than"),
        ("9" * 5000 + "M", "is no size"),
        ("9" * 39 + "B", "is more than"),
    ],
)
def test_what_is_no_size(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="^.{0,100}" + why):
        units.size(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("TERM", 15),
        ("SIGTERM", 15),
        ("term", 15),
        ("15", 15),
        ("USR1", int(signal.SIGUSR1)),
        ("64", 64),
        ("RTMIN", int(signal.SIGRTMIN)),
        ("SIGRTMIN+3", signal.SIGRTMIN + 3),
        ("RTMAX-1", signal.SIGRTMAX - 1),
    ],
)
def test_signals(text: str, number: int) -> None:
    assert units.signal_number(text) == number


@pytest.mark.parametrize(
    "text", ["", "SIG", "FOO", "0", "65", "-1", "99999999", "RTMIN+60", "RTMAX+1", "RTMIN+", "_DFL", "²"]
)
def test_what_is_no_signal(text: str) -> None:
    with pytest.raises(ValueError, match="is no signal"):
        units.signal_number(text)


@settings(derandomize=True, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_taken_or_refused(text: str) -> None:
    for read in (units.duration, units.size, units.signal_number):
        with contextlib.suppress(ValueError):
            assert read(text) >= 0


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=6, max_size=6).filter(any))
def test_a_duration_is_the_sum_of_its_parts(counts: list[int]) -> None:
    parts = [(count, unit) for count, unit in zip(counts, units.SECONDS, strict=True) if count]
    text = "".join(f"{count}{unit}" for count, unit in parts)
    assert units.duration(text) == pytest.approx(sum(count * units.SECONDS[unit] for count, unit in parts))
