"""`nssup ctl exec`, as it is typed: inside a real worker, on pipes and on a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from live import NSSUP, PATIENCE, Up, needs_namespaces
from run_command import Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = needs_namespaces

POOL = '[pool.web]\ncommand = ["sleep", "1000"]\nenv = { SHOWN = "yes" }\nworkers = 2\nhostname = "web-{index}"\n'


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with Up(tmp_path_factory.mktemp("exec"), POOL) as up:
        up.wait_running("web/0", "web/1")
        yield up
        up.end()


def command(up: Up, *words: str) -> list[str]:
    return [*NSSUP, "ctl", "exec", "--socket", str(up.socket), *words]


def run(up: Up, *words: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    done = subprocess.run(command(up, *words), input=stdin, capture_output=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stdout, done.stderr


def processes(up: Up, worker_id: str) -> list[str]:
    (worker,) = json.loads(up.ctl("tree", worker_id, "--json").out)["workers"]
    return [process["command"] for process in worker["processes"]]


def wait_process(up: Up, wanted: str, *, there: bool) -> None:
    until = time.monotonic() + PATIENCE
    while (wanted in processes(up, "web/0")) is not there:
        assert time.monotonic() < until


def test_it_is_inside(up: Up) -> None:
    code, out, err = run(up, "web/1", "--", "sh", "-c", "hostname; echo $SHOWN $NSSUP_ID; echo oops >&2; cat; exit 7")
    assert (code, out, err) == (7, b"web-1\nyes web/1\n", b"oops\n")
    worker = up.worker("web/1")
    _, out, _ = run(up, f"host:{worker['host_pid']}", "--", "readlink", "/proc/self/ns/pid", "/proc/1/ns/mnt")
    assert out.decode().split()[0] == f"pid:[{worker['namespaces']['pid']}]"


def test_stdin_is_passed_on_when_asked(up: Up) -> None:
    data = os.urandom(300_000)
    assert run(up, "-i", "web/0", "--", "cat", stdin=data) == (0, data, b"")
    assert run(up, "web/0", "--", "cat", stdin=b"not read") == (0, b"", b"")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["web/0", "--", "no-such-program"], 127, "exec-failed:ENOENT"),
        (["web/0", "--", "/etc/passwd"], 126, "exec-failed:EACCES"),
        (["web/0", "--", "sh", "-c", "kill -9 $$"], 137, ""),
        (["web", "--", "true"], 2, "means 2"),
        (["wbe", "--", "true"], 4, "did you mean web?"),
        (["web/0", "--"], 2, "exec: what?"),
        (["web/0"], 2, "exec: what?"),
    ],
)
def test_exit_codes(up: Up, words: list[str], code: int, says: str) -> None:
    got = run(up, *words)
    assert (got[0], says in got[2].decode()) == (code, True), got


def test_who_hangs_up_takes_the_command_along(up: Up) -> None:
    with subprocess.Popen(
        command(up, "web/0", "--", "sh", "-c", "echo here; exec sleep 1001"), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        wait_process(up, "sleep 1001", there=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 143
    wait_process(up, "sleep 1001", there=False)
    assert up.worker("web/0")["state"] == "running"


def test_on_a_terminal(up: Up) -> None:
    with Terminal(*command(up, "-it", "web/0", "--", "sh"), env={**os.environ, "PS1": "> "}, size=(30, 90)) as terminal:
        terminal.type("PS1=pro''mpt; tty; stty size; ps -o tty= -p $$; echo $?\n")
        terminal.expect(r"/dev/pts/\d+\r\n30 90\r\n")
        terminal.expect("prompt")
        terminal.resize(40, 100)
        terminal.type("stty size\n")
        terminal.expect("40 100\r\n")
        terminal.expect("prompt")
        terminal.type("echo be''gun; sleep 1002\n")
        terminal.expect("begun\r\n")
        wait_process(up, "sleep 1002", there=True)
        terminal.type("\x03")  # to the sleep, not to us
        terminal.expect("prompt")
        terminal.type("echo $?\n")
        terminal.expect("130\r\n")
        terminal.type("exit 5\n")
        assert terminal.end() == 5
        assert terminal.modes() == terminal.settings, "the terminal is as it was"
    wait_process(up, "sleep 1002", there=False)


def test_a_worker_that_ends_takes_it_along(tmp_path: Path) -> None:
    with Up(tmp_path, POOL) as up:
        up.wait_running("web/0")
        with subprocess.Popen(
            command(up, "web/0", "--", "sh", "-c", "echo here; exec sleep 1003"), stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"here\n"
            before = len(os.listdir(f"/proc/{up.host_pid}/fd"))
            assert up.ctl("restart", "web/0").code == 0
            assert process.wait(PATIENCE) == 137
        until = time.monotonic() + PATIENCE
        while len(os.listdir(f"/proc/{up.host_pid}/fd")) > before:
            assert time.monotonic() < until
        up.end()
