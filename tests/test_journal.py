from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from nssup import journal, lines
from nssup.events import Event, Exit
from nssup.journal import Journal
from nssup.logs import LogHub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOON = 1_795_435_200.0
pytestmark = pytest.mark.both_loops


class Reader:
    """A pipe to hand out as stderr."""

    def __init__(self) -> None:
        self.fd, self.write_end = os.pipe()

    def lines(self) -> list[str]:
        """All that was written, of a write end that nobody writes to any more."""
        os.close(self.write_end)
        with os.fdopen(self.fd) as file:
            return file.read().splitlines()


@pytest.fixture
def stderr() -> Reader:
    return Reader()


def change(seq: int = 1, **more: Any) -> Event:  # noqa: ANN401
    fields: dict[str, Any] = {"event": "started", "epoch": 7, "seq": seq, "ts": NOON + seq, "worker": "web/3"}
    return Event(**(fields | {"from_": "starting", "to": "running"} | more))


def new_hub(log_dir: Path | None) -> LogHub:
    return LogHub(asyncio.get_running_loop(), log_dir, lambda: NOON)


def written(log_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log_dir / "nssup.jsonl").read_text().splitlines()]


async def turn() -> None:
    await asyncio.sleep(0)


async def test_events_are_written_as_promised(tmp_path: Path) -> None:
    hub = new_hub(tmp_path)
    own = Journal(hub)
    ended = Exit(reason="signal:SIGKILL", signal=9, at=NOON)
    own.record(change(1, host_pid=5151, ns_pid=2, generation=4))
    own.record(Event("pool_added", epoch=7, seq=2, ts=NOON + 2, pool="web", detail={"workers": 8}))
    own.record(change(3, event="exited", to="backoff", from_="running", reason="signal:SIGKILL", exit=ended))
    own.close()
    await hub.close()
    first, second, third = written(tmp_path)
    assert list(first.items()) == [
        ("ts", "2026-11-23T12:00:01.000000Z"),
        ("v", 1),
        ("epoch", 7),
        ("seq", 1),
        ("event", "started"),
        ("worker", "web/3"),
        ("from", "starting"),
        ("to", "running"),
        ("generation", 4),
        ("host_pid", 5151),
        ("ns_pid", 2),
    ]
    assert (second["pool"], second["detail"]) == ("web", {"workers": 8})
    assert third["exit"]["signal"] == "SIGKILL"


async def test_time_does_not_go_back_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "nssup.jsonl").write_bytes(lines.mark(lines.stamp(NOON + 5), None, None, "of an earlier run"))
    hub = new_hub(tmp_path)
    own = Journal(hub)
    for seq in (3, 9, 8):
        own.record(change(seq))
    own.close()
    await hub.close()
    assert [document["ts"][17:19] for document in written(tmp_path)] == ["05", "05", "09", "09"]


async def test_the_first_events_wait_and_later_ones_do_not(tmp_path: Path) -> None:
    hub = new_hub(tmp_path)
    own = Journal(hub)
    own.record(change(1))
    await asyncio.sleep(0)
    assert own._log is None
    assert own._due is not None
    own.flush()
    assert own._due is None
    own.record(change(2))
    await asyncio.sleep(0)
    await hub.flush()
    assert [document["seq"] for document in written(tmp_path)] == [1, 2]
    own.close()
    await hub.close()


async def test_events_come_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "FIRST_AFTER", 0.0)
    hub = new_hub(tmp_path)
    follower = hub.follow(["nssup"])
    own = Journal(hub)
    own.record(change(1))
    assert json.loads(await anext(follower))["seq"] == 1
    own.close()
    await hub.close()


async def test_events_wait_for_workers_to_be_launched_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "FIRST_AFTER", 0.0)
    asked = 0

    def busy() -> bool:
        nonlocal asked
        asked += 1
        return True

    hub = new_hub(tmp_path)
    follower = hub.follow(["nssup"])
    own = Journal(hub, busy=busy)
    own.record(change(1))
    assert json.loads(await anext(follower))["seq"] == 1
    assert asked == journal.FIRST_WAITS
    own.close()
    await hub.close()


async def test_a_library_writes_nothing_and_imports_nothing() -> None:
    hub = new_hub(None)
    own = Journal(hub)
    own.record(change())
    assert (own._events, own._due) == ([], None)
    own.close()
    assert own._log is None
    await hub.close()


async def test_an_event_after_the_end_does_no_harm(tmp_path: Path, stderr: Reader) -> None:
    hub = new_hub(tmp_path)
    own = Journal(hub, "json", stderr_fd=stderr.write_end)
    await hub.close()
    own.record(change(1))
    own.close()
    own.record(change(2))
    assert [json.loads(line)["seq"] for line in stderr.lines()] == [1]


async def test_json_on_stderr_is_what_the_file_has(tmp_path: Path, stderr: Reader) -> None:
    hub = new_hub(tmp_path)
    own = Journal(hub, "json", stderr_fd=stderr.write_end)
    for seq in range(50):
        own.record(change(seq))
    own.close()
    await hub.close()
    assert stderr.lines() == (tmp_path / "nssup.jsonl").read_text().splitlines()


async def test_text_on_stderr_is_for_people(stderr: Reader) -> None:
    hub = new_hub(None)
    own = Journal(hub, "text", stderr_fd=stderr.write_end)
    own.record(change(1, host_pid=5151))
    own.record(change(2, event="failed", to="failed", from_="starting", reason="exec-failed:ENO\x1b[2JENT"))
    own.close()
    await hub.close()
    first, second = stderr.lines()
    assert first == "12:00:01.000 started web/3 starting -> running host PID 5151"
    assert second == "12:00:02.000 failed web/3 starting -> failed (exec-failed:ENO\\x1b[2JENT)"


def test_colours_mark_what_went_wrong() -> None:
    good = {"ts": lines.stamp(NOON), "event": "started", "worker": "web/3", "from": "starting", "to": "running"}
    assert journal.text_line(good, True) == "\x1b[2m12:00:00.000\x1b[0m started web/3 starting -> running\n"
    bad = good | {"to": "failed"}
    assert "\x1b[31mstarted web/3 starting -> failed\x1b[0m\n" in journal.text_line(bad, True)


@pytest.fixture
def terminal() -> Iterator[int]:
    main, other = os.openpty()
    yield other
    os.close(main)
    os.close(other)


def test_colours_are_for_terminals_that_want_them(terminal: int, stderr: Reader) -> None:
    assert journal.wants_color(terminal, {"TERM": "xterm"})
    assert not journal.wants_color(terminal, {"TERM": "dumb"})
    assert not journal.wants_color(terminal, {"NO_COLOR": "1"})
    assert not journal.wants_color(stderr.write_end, {})
    stderr.lines()


async def test_a_stderr_that_nobody_reads_stops_nothing(
    tmp_path: Path, stderr: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "LAST_WAIT", 0.01)
    hub = new_hub(tmp_path)
    own = Journal(hub, "json", stderr_fd=stderr.write_end)
    count = (journal.BEHIND + 3 * 65536) // 100
    for seq in range(count):
        own.record(change(seq))
    own.flush()
    await hub.flush()
    assert len(written(tmp_path)) == count
    own.close()
    await hub.close()
    thread = own._output._stderr._thread if own._output._stderr else None
    assert thread is not None
    assert thread.daemon
    assert thread.is_alive()
    drained = threading.Thread(target=_read_all, args=[stderr.fd])
    drained.start()
    thread.join()
    os.close(stderr.write_end)
    drained.join()
    os.close(stderr.fd)


def _read_all(fd: int) -> bytes:
    found = b""
    while data := os.read(fd, 65536):
        found += data
    return found


async def test_what_stderr_missed_is_said(stderr: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BEHIND", 300)
    hub = new_hub(None)
    own = Journal(hub, "json", stderr_fd=stderr.write_end)
    for seq in range(10):
        own.record(change(seq))
    own.flush()
    writer = own._output._stderr
    assert writer is not None
    first = os.read(stderr.fd, 65536).splitlines()
    shown = len(first)
    assert 0 < shown < 10
    while writer._behind:  # the thread is about to say that it is done
        await turn()
    own.record(change(10))
    own.close()
    await hub.close()
    missed, last = (json.loads(line) for line in stderr.lines())
    assert (missed["event"], missed["detail"]) == ("events_lost", {"count": 10 - shown})
    assert last["seq"] == 10


async def test_a_broken_stderr_is_no_matter(stderr: Reader) -> None:
    os.close(stderr.fd)
    hub = new_hub(None)
    own = Journal(hub, "json", stderr_fd=stderr.write_end)
    own.record(change())
    own.close()
    await hub.close()
    os.close(stderr.write_end)


async def test_a_stderr_that_does_not_block_is_waited_for(stderr: Reader) -> None:
    os.set_blocking(stderr.write_end, False)
    hub = new_hub(None)
    own = Journal(hub, "json", stderr_fd=stderr.write_end)
    reader = threading.Thread(target=lambda: found.append(_read_all(stderr.fd)))
    found: list[bytes] = []
    for seq in range(1500):
        own.record(change(seq))
    own.flush()
    reader.start()
    own.close()
    await hub.close()
    os.close(stderr.write_end)
    reader.join()
    os.close(stderr.fd)
    assert len(found[0].splitlines()) == 1500


def test_structlog_does_not_bring_rich(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("print('imported')")
    script = (
        "import sys; from nssup import journal; assert 'structlog' not in sys.modules; journal._import_structlog();"
        "print('rich' in sys.modules, 'structlog' in sys.modules); import rich"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "True", "imported"]
