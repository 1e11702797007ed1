"""Who may steer a supervisor: nobody from inside its own workers, however it connects."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from live import Up, needs_namespaces, needs_root

from nssup import http

if TYPE_CHECKING:
    from pathlib import Path

# Says what was answered to each question, in a line.
ASK = """
import os, socket, sys
def connect():
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(os.environ["CONTROL"])
    return peer
def ask(peer):
    peer.sendall(b"POST /v1/stop HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 18\\r\\n\\r\\n" + b'{"select":["web"]}')
    answer = peer.recv(65536).decode()
    print(sys.argv[1], answer.split()[1], "inside a worker" in answer, flush=True)
"""
DIRECTLY = "ask(connect())\n"
# The one that connects has ended when its child asks.
THROUGH_A_CHILD = """
read_end, write_end = os.pipe()
if os.fork() == 0:
    peer = connect()
    if os.fork() == 0:
        os.close(write_end)
        os.read(read_end, 1)
        ask(peer)
    os._exit(0)
os.wait()
os.close(write_end)
import time; time.sleep(1000)
"""


def ask_from_inside(up_directory: Path, how: str, *before: str) -> str:
    """What a worker is answered that asks for its own end."""
    script = up_directory / "ask.py"
    script.write_text(ASK + how)
    words = [*before, sys.executable, str(script), "answer"]
    pool = f"[pool.web]\ncommand = {words}\nrestart.policy = 'never'\n"
    pool += f'env = {{ CONTROL = "{up_directory}/s/run/nssup.sock" }}\n'
    with Up(up_directory, pool) as up:
        record = up.wait_record("web", lambda record: record.get("msg", "").startswith("answer"))
        assert not any(e["event"] == "stop_begun" for e in up.events)
        up.ctl("stop", "web")
        up.end()
    return str(record["msg"])


@needs_namespaces
@pytest.mark.parametrize("how", [DIRECTLY, THROUGH_A_CHILD], ids=["directly", "through a child"])
def test_a_worker_may_not(tmp_path: Path, how: str) -> None:
    assert ask_from_inside(tmp_path, how) == "answer 403 True"


@needs_root
@needs_namespaces
def test_nor_may_what_it_puts_into_namespaces_of_its_own(tmp_path: Path) -> None:
    assert ask_from_inside(tmp_path, DIRECTLY, "unshare", "-p", "-m", "-f") == "answer 403 True"


@needs_root
def test_another_pid_namespace_is_no_reason(tmp_path: Path) -> None:
    question = ASK.replace("/v1/stop", "/v1/wait").replace('"select":["web"]', '"timeout": 1.5  ')
    with Up(tmp_path, "") as up:
        done = subprocess.run(
            ["unshare", "-p", "-f", sys.executable, "-c", question + DIRECTLY, "answer"],
            env={**os.environ, "CONTROL": str(up.socket)},
            capture_output=True,
            check=True,
        )
        assert done.stdout == b"answer 200 False\n"


# As user 65533 with the groups given: the statuses of seeing, doing, and what only an admin may.
AS_MEMBER = """
import os, socket, sys
groups = [int(word) for word in sys.argv[2:]]
os.setgroups(groups[1:])
os.setgid(groups[0])
os.setuid(65533)
for what in "GET /v1/status", "POST /v1/start", "POST /v1/reexec":
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(f"/proc/self/fd/{sys.argv[1]}/nssup.sock")
    except PermissionError:
        print("closed")
        break
    peer.sendall(f"{what} HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 2\\r\\n\\r\\n{{}}".encode())
    print(peer.recv(65536).split()[1].decode())
"""


@needs_root
def test_members_of_groups_may_what_the_config_says(tmp_path: Path) -> None:
    control = 'control = { group = "3001", roles = { viewer = ["3001", "3002"], operator = ["3003"] } }'
    with Up(tmp_path, "", supervisor=control) as up:
        there = os.open(up.socket.parent, os.O_PATH)  # the directories of a test are closed to everybody

        def answers(*groups: int) -> list[str]:
            words = [sys.executable, "-c", AS_MEMBER, str(there), *map(str, groups)]
            return subprocess.run(words, pass_fds=[there], capture_output=True, check=True, text=True).stdout.split()

        assert answers(3001) == ["200", "403", "403"]
        assert answers(9, 3001, 3003) == ["200", "200", "403"]
        assert answers(9, 3003) == ["closed"], "no member of the socket's own group"
        os.close(there)
        up.end()
    refused = [event["detail"] for event in up.events if event.get("reason") == "not-permitted"]
    assert [(detail["request"], detail["role"], detail["uid"]) for detail in refused] == [
        ("start", "viewer", 65533),
        ("reexec", "viewer", 65533),
        ("reexec", "operator", 65533),
    ]


def test_who_connected() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = http.peer_of(ours)
        assert peer[:3] == (os.getpid(), os.getuid(), os.getgid())
        assert peer.ended is False
        if peer.pidfd >= 0:
            assert not os.get_inheritable(peer.pidfd)
            os.close(peer.pidfd)
