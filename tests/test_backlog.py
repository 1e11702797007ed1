"""Own events that a supervisor published and did not come to write."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest

from nssup import backlog
from nssup.backlog import Backlog, missing
from nssup.events import Event, Exit
from nssup.snapshot import event_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVENTS = [
    Event("pool_added", epoch=7, seq=1, ts=1.8e9, pool="web", detail={"workers": 8}),
    Event("started", epoch=7, seq=2, ts=1.8e9 + 1, worker="web/3", from_="starting", to="running", host_pid=5151),
    Event("exited", epoch=7, seq=3, ts=1.8e9 + 2, worker="web/3", exit=Exit(reason="exit:3", code=3, at=1.8e9)),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events"


@pytest.fixture
def kept(path: Path) -> Iterator[Backlog]:
    made = Backlog(path)
    for event in EVENTS:
        made.add(event)
    yield made
    made.close()


def left(path: Path) -> list[Event]:
    """What the next one finds."""
    found = Backlog(path)
    found.close()
    return found.left


def test_it_holds_what_was_added_until_it_is_cleared(kept: Backlog, path: Path) -> None:
    assert (kept.left, left(path)) == ([], EVENTS)
    kept.clear()
    assert left(path) == []
    kept.add(EVENTS[2])
    assert left(path) == EVENTS[2:]


def test_what_was_left_stays_until_it_is_written(kept: Backlog, path: Path) -> None:
    again = Backlog(path)
    more = Event("adopted", epoch=8, seq=1, worker="web/3")
    again.add(more)
    again.close()
    assert left(path) == [*EVENTS, more]


def test_more_than_it_holds_is_left_out(kept: Backlog, path: Path) -> None:
    large = Event("pool_added", epoch=7, seq=4, pool="web", detail={"x": "y" * 100_000})
    for _ in range(10):
        kept.add(large)
    kept.add(EVENTS[0])
    assert left(path) == [*EVENTS, *[large] * 5, EVENTS[0]]


def linked(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:  # the listing's own
        return ""


def test_it_is_nobody_elses(kept: Backlog, path: Path) -> None:
    assert path.stat().st_mode & 0o7777 == 0o600
    ours = [int(name) for name in os.listdir("/proc/self/fd") if linked(name) == str(path)]
    assert not any(map(os.get_inheritable, ours))


@pytest.mark.parametrize(
    ("at", "data"),
    [(0, b"OTHER"), (8, struct.pack("=I", backlog.VERSION + 1)), (16, bytes(16))],
    ids=["another file", "a later version", "another boot"],
)
def test_what_is_not_of_this_boot_and_version_means_nothing(kept: Backlog, path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    assert left(path) == []


@pytest.mark.parametrize("length", [2**63, backlog.SIZE * 2, 3])
def test_a_length_that_cannot_be(kept: Backlog, path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(64)
        file.write(struct.pack("=Q", length))
    assert left(path) == []
    again = Backlog(path)
    again.add(EVENTS[0])
    again.close()
    assert left(path) == EVENTS[:1]


def test_an_event_that_means_nothing_ends_it(kept: Backlog, path: Path) -> None:
    data = path.read_bytes()
    at = data.index(b"started")
    path.write_bytes(data[:at] + b"\xff" * 7 + data[at + 7 :])
    assert left(path) == EVENTS[:1]


def test_no_link_is_followed(path: Path) -> None:
    path.symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Backlog(path)


LINES = [event_line(event) for event in EVENTS]


@pytest.mark.parametrize(
    ("log", "stays", "missed"),
    [
        (None, None, 3),
        (b"", b"", 3),
        (LINES[0], LINES[0], 2),
        (LINES[0] + LINES[1][:40], LINES[0], 2),
        (LINES[0] + LINES[1][:-1], LINES[0], 2),
        (LINES[0] + LINES[1] + b'{"ts":"', LINES[0] + LINES[1], 1),
        (b"".join(LINES), b"".join(LINES), 0),
        (LINES[0] + b'{"ts":"x","msg":"something is missing"}\n', None, 2),
        (LINES[0][:30], None, 3),  # it may be anything: the log ends it
    ],
)
def test_what_is_missing_in_the_log(log: bytes | None, stays: bytes | None, missed: int, tmp_path: Path) -> None:
    path = tmp_path / "nssup.jsonl"
    if log is not None:
        path.write_bytes(log)
    assert missing(EVENTS, path) == EVENTS[len(EVENTS) - missed :]
    if log is not None:
        assert path.read_bytes() == (log if stays is None else stays)


def test_a_log_of_later_runs_has_them_all(tmp_path: Path) -> None:
    path = tmp_path / "nssup.jsonl"
    path.write_bytes(event_line(Event("pool_added", epoch=8, seq=1)))
    assert missing(EVENTS, path) == []


def test_nothing_is_touched_where_nothing_was_left(tmp_path: Path) -> None:
    path = tmp_path / "nssup.jsonl"
    path.write_bytes(b"torn")
    assert missing([], path) == []
    assert path.read_bytes() == b"torn"
