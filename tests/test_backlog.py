"""Own events that a supervisor published and did not come to write."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import msgspec
import pytest

from nssup import backlog
from nssup.backlog import Backlog
from nssup.events import Event, Exit
from nssup.loop import Supervisor
from nssup.snapshot import event_line
from nssup.spec import SupervisorSpec

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
    for _ in range(12):
        kept.add(large)
    kept.add(EVENTS[0])
    assert left(path) == [*EVENTS, *[large] * 10]  # and none behind a gap
    kept.clear()
    kept.add(EVENTS[0])
    assert left(path) == EVENTS[:1]


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
MARK = b'{"ts":"2026-11-23T12:00:00.000000Z","msg":"something is missing"}\n'


@pytest.mark.parametrize(
    ("log", "becomes"),
    [
        (None, LINES),
        (b"", LINES),
        (LINES[0], LINES),
        (LINES[0] + LINES[1][:40], LINES),
        (LINES[0] + LINES[1][:-1], LINES),
        (LINES[0] + LINES[1] + b'{"ts":"', LINES),
        (b"".join(LINES), LINES),
        (LINES[0] + MARK, [LINES[0], MARK, *LINES[1:]]),
        (LINES[0][:30], [LINES[0][:30], b"\n", *LINES]),  # it may be anything
    ],
)
def test_what_is_missing_in_the_log(log: bytes | None, becomes: list[bytes], kept: Backlog, path: Path) -> None:
    own = path.with_name("nssup.jsonl")
    if log is not None:
        own.write_bytes(log)
    for _ in range(2):
        found = Backlog(path)
        found.hand_over(own)
        found.close()
        assert own.read_bytes() == b"".join(becomes)
    assert left(path) == []


def test_a_log_of_later_runs_has_them_all(kept: Backlog, path: Path) -> None:
    own = path.with_name("nssup.jsonl")
    later = event_line(Event("pool_added", epoch=8, seq=1))
    own.write_bytes(later)
    found = Backlog(path)
    found.hand_over(own)
    found.close()
    assert own.read_bytes() == later


@pytest.mark.parametrize("log", [None, b""])
def test_a_log_that_was_just_set_aside_has_them(log: bytes | None, kept: Backlog, path: Path) -> None:
    own = path.with_name("nssup.jsonl")
    own.with_name("nssup.jsonl.1").write_bytes(LINES[0] + LINES[1])
    if log is not None:
        own.write_bytes(log)
    found = Backlog(path)
    found.hand_over(own)
    found.close()
    assert own.read_bytes() == LINES[2]


def test_time_does_not_go_back_in_the_log(kept: Backlog, path: Path) -> None:
    own = path.with_name("nssup.jsonl")
    own.write_bytes(event_line(Event("pool_added", epoch=6, seq=1, ts=1.9e9)))
    found = Backlog(path)
    found.hand_over(own)
    found.close()
    assert {msgspec.json.decode(line)["ts"] for line in own.read_bytes().splitlines()} == {
        "2030-03-17T17:46:40.000000Z"
    }


def test_what_cannot_be_written_stays(kept: Backlog, path: Path) -> None:
    path.with_name("elsewhere").symlink_to("nowhere")
    found = Backlog(path)
    with pytest.raises(OSError, match="symbolic links"):
        found.hand_over(path.with_name("elsewhere"))
    found.close()
    assert left(path) == EVENTS


async def test_a_supervisor_does_without_it_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    state, run, log = (str(tmp_path / name) for name in ("state", "run", "log"))
    spec = SupervisorSpec(state_dir=state, runtime_dir=run, log_dir=log, socket=f"{run}/nssup.sock")
    async with Supervisor(spec) as supervisor:
        supervisor.workers.note("reload_refused", 1.0)
    records = (tmp_path / "log" / "nssup.jsonl").read_text().splitlines()
    assert [msgspec.json.decode(record)["event"] for record in records] == ["reload_refused"]


def test_nothing_is_touched_where_nothing_was_left(path: Path) -> None:
    own = path.with_name("nssup.jsonl")
    own.write_bytes(b"torn")
    found = Backlog(path)
    found.hand_over(own)
    found.close()
    assert own.read_bytes() == b"torn"
