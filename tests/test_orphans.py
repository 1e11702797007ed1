"""Lives that cannot be proven to be ours: told of, and left alone, until somebody says that they are dealt with."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import TYPE_CHECKING

import pytest
from live import Up, needs_namespaces, wait_readable

from nssup import record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = needs_namespaces

POOL = '[pool.web]\ncommand = ["sleep", "1000"]\non_supervisor_death = "keep"\n'
OTHER = '[pool.other]\ncommand = ["sleep", "1000"]\n'


def make_unprovable(notes: Path) -> None:
    """As on a kernel that tells nothing of a process by which it could be known again."""
    data = bytearray(notes.read_bytes())
    for at in range(0, len(data), record.SLOT_SIZE):
        slot = record.decode_slot(bytes(data[at : at + record.SLOT_SIZE]))
        if slot is not None and slot.worker == "web/0":
            unknown = slot._replace(handle=b"", pidfd_inode=0, init_start_time=0)
            data[at : at + record.SLOT_SIZE] = record.encode_slot(unknown)
    notes.write_bytes(data)


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[int]:
    """The host PID of the init of web/0, which a killed supervisor left and nobody can know again."""
    with contextlib.ExitStack() as held:
        with Up(tmp_path, POOL) as up:
            up.leaves = True
            (worker,) = up.wait_running("web/0")
            host_pid = worker["init_host_pid"]
            pidfd = os.pidfd_open(host_pid)
            held.callback(os.close, pidfd)
            held.callback(wait_readable, pidfd, "it cannot be killed")
            held.callback(signal.pidfd_send_signal, pidfd, signal.SIGKILL)
            up.process.kill()
            up.wait_end()
        make_unprovable(up.socket.parent / "lives")
        yield host_pid
        signal.pidfd_send_signal(pidfd, 0)  # whatever was done, it is still there


def told(up: Up, host_pid: int) -> None:
    listed = up.ctl("orphans")
    assert listed.code == 0
    assert listed.out.startswith(f"web/0 generation 1: init's host PID {host_pid}, its program's ")
    assert listed.out.endswith(": lost:unproven\n")
    (found,) = json.loads(up.ctl("orphans", "--json").out)["orphans"]
    assert (found["worker"], found["generation"], found["init_host_pid"]) == ("web/0", 1, host_pid)
    assert found["reason"] == "lost:unproven"


def test_it_is_listed_and_left_alone_until_somebody_deals_with_it(tmp_path: Path, orphan: int) -> None:
    for _ in range(2):  # an end as it should be forgets everything else
        with Up(tmp_path, POOL + OTHER) as up:
            up.leaves = True
            up.wait("lost", "web/0", reason="lost:unproven")
            up.wait_running("other/0")
            told(up, orphan)
            assert up.worker("web/0")["state"] == "lost"
            assert up.ctl("kill", "-9", "--tree", "web").code == 1
            assert up.ctl("restart", "web", "--timeout", "10ms").code != 0
            assert up.ctl("reexec").code == 0
            told(up, orphan)
            assert up.end() == 0
            assert not any(e["event"] in ("launched", "relaunched") for e in up.events if e.get("worker") == "web/0")
    with Up(tmp_path, POOL) as up:
        up.leaves = True
        told(up, orphan)
        assert up.ctl("stop", "web").code == 0
        assert up.ctl("orphans") == (0, "", "")
        assert up.ctl("start", "web").code == 0
        (worker,) = up.wait_running("web/0")
        assert (worker["generation"], worker["adopted"]) == (2, False)
        assert worker["init_host_pid"] != orphan


def test_also_when_its_pool_is_no_more(tmp_path: Path, orphan: int) -> None:
    for _ in range(2):
        with Up(tmp_path, OTHER) as up:
            up.leaves = True
            told(up, orphan)
            assert [pool["name"] for pool in up.status()["pools"]] == ["other"]


def test_there_is_none(tmp_path: Path) -> None:
    with Up(tmp_path, POOL) as up:
        assert up.ctl("orphans") == (0, "", "")
        assert up.ctl("orphans", "-q") == (0, "", "")
        assert json.loads(up.ctl("orphans", "--json").out) == {"orphans": [], "set_aside": []}
