"""Readiness as users see it, and over the death of the supervisor: `nssup up` with real programs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from live import PATIENCE, Up, environment, needs_namespaces, needs_root, pool_text, shell

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_namespaces

PYTHON = (os.path.realpath(sys.executable), "-S", "-E", "-c")
SENDER = """
import os, sys, time, signal, _socket, array
def send(text):
    s = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    s.connect(os.environ['NOTIFY_SOCKET']); s.send(text.encode()); s.close()
def barrier():
    read, write = os.pipe()
    s = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    s.connect(os.environ['NOTIFY_SOCKET'])
    s.sendmsg([b'BARRIER=1'], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array('i', [write]))])
    s.close(); os.close(write); os.read(read, 1); os.close(read)
"""


def program(code: str, **keys: object) -> str:
    return pool_text("web", *PYTHON, SENDER + code, **keys)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A FIFO in which the program waits for a byte, when it opens it."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


def open_gate(gate: Path) -> None:
    """Returns when the program has taken it."""
    fd = os.open(gate, os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)


def killed(up: Up) -> None:
    """Its workers go on without it."""
    up.status()
    up.process.kill()
    up.wait_end()
    up.leaves = True


def over_a_death(tmp_path: Path, pools: str, meanwhile: Callable[[Up], None], after: Callable[[Up], None]) -> None:
    """The pools come up, their supervisor is killed, something happens, and the next supervisor sees it."""
    pools = pools.replace("[pool.web]\n", '[pool.web]\non_supervisor_death = "keep"\n')
    with Up(tmp_path, pools) as first:
        first.wait("launched", "web/0")
        meanwhile(first)
        with Up(tmp_path, pools) as second:
            after(second)
            second.status()


def test_starting_and_then_ready(tmp_path: Path, gate: Path) -> None:
    code = (
        f"send('STATUS=warming\\x1b[31m up'); open({str(gate)!r}).read(); send('READY=1\\nSTATUS=up'); signal.pause()"
    )
    with Up(tmp_path, program(code, ready='{ notify = "sd" }')) as up:
        up.wait("launched", "web/0")
        done = up.ctl("wait", "web", "--for", "ready", "--timeout", "0.2s")
        assert done.code == 124
        worker = up.worker("web/0")
        assert (worker["state"], worker["ready"]) == ("starting", False)
        open_gate(gate)
        assert up.ctl("wait", "web", "--for", "ready").code == 0
        worker = up.worker("web/0")
        assert (worker["state"], worker["ready"], worker["status_text"]) == ("running", True, "up")


def test_a_reload_and_other_news_are_shown(tmp_path: Path) -> None:
    code = "send('READY=1\\nSTATUS=1'); signal.sigwait([signal.SIGHUP]); "
    code += "send('RELOADING=1\\nMAINPID=7\\nERRNO=2\\nSTATUS=2'); signal.sigwait([signal.SIGHUP]); "
    code += "send('READY=1\\nSTATUS=3'); signal.pause()"
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP]); "
    with Up(tmp_path, program(block + code, ready='{ notify = "sd" }')) as up:
        up.wait("started", "web/0")
        wait_for(lambda: up.worker("web/0")["status_text"] == "1")
        nothing = {"reloading": False, "stopping": False, "main_ns_pid": None, "errno": None}
        assert up.worker("web/0")["notified"] == nothing
        assert up.ctl("kill", "-s", "HUP", "web/0").code == 0
        wait_for(lambda: up.worker("web/0")["status_text"] == "2")
        worker = up.worker("web/0")
        assert worker["notified"] == {"reloading": True, "stopping": False, "main_ns_pid": 7, "errno": 2}
        assert (worker["state"], worker["ready"]) == ("running", True)
        assert up.ctl("kill", "-s", "HUP", "web/0").code == 0
        wait_for(lambda: up.worker("web/0")["status_text"] == "3")
        assert up.worker("web/0")["notified"]["reloading"] is False


def test_a_status_steers_no_terminal(tmp_path: Path) -> None:
    """SEC-52: what a worker says of itself is text."""
    code = "send('STATUS=a\\x1b[31m\\x07b\\u202ec\\nREADY=1'); signal.pause()"
    with Up(tmp_path, program(code, ready='{ notify = "sd" }')) as up:
        up.wait("started", "web/0")
        assert up.worker("web/0")["status_text"] == "a\ufffd[31m\ufffdb\ufffdc"


def test_ready_said_while_no_supervisor_lives_is_known_afterwards(tmp_path: Path, gate: Path) -> None:
    said = tmp_path / "said"
    code = f"open({str(gate)!r}).read(); send('READY=1'); barrier(); open({str(said)!r}, 'w').close(); signal.pause()"

    def meanwhile(first: Up) -> None:
        worker = first.worker("web/0")
        assert (worker["state"], worker["ready"]) == ("starting", False)
        killed(first)
        open_gate(gate)
        wait_for(said.exists)

    def after(second: Up) -> None:
        started = second.wait("started", "web/0")
        assert (started["from"], started["generation"]) == ("starting", 1)
        worker = second.worker("web/0")
        assert (worker["ready"], worker["adopted"], worker["restarts"]) == (True, True, 0)

    over_a_death(tmp_path, program(code, ready='{ notify = "sd" }'), meanwhile, after)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def test_a_line_said_while_no_supervisor_lives_is_known_afterwards(tmp_path: Path, gate: Path) -> None:
    code = f"open({str(gate)!r}).read(); os.write(1, b'listening on 80\\n'); signal.pause()"

    def meanwhile(first: Up) -> None:
        wait_for(lambda: first.worker("web/0")["host_pid"])
        killed(first)
        open_gate(gate)

    def after(second: Up) -> None:
        assert second.wait("started", "web/0")["generation"] == 1

    over_a_death(tmp_path, program(code, ready=r'{ log = "listening on \\d+" }'), meanwhile, after)


def test_a_line_said_before_the_supervisor_died_still_counts(tmp_path: Path) -> None:
    """The startup probe has not succeeded yet, so nobody has taken note of the line."""
    flag = tmp_path / "flag"
    pools = pool_text(
        "web",
        *shell("echo listening; exec sleep 1000"),
        startup=f'{{ exec = ["test", "-e", "{flag}"], every = "20ms" }}',
        ready='{ log = "listening" }',
    )

    def meanwhile(first: Up) -> None:
        first.wait_record("web", lambda record: record["msg"] == "listening")
        wait_for(lambda: (first.log_dir / "web.jsonl").read_text())
        killed(first)
        flag.touch()

    def after(second: Up) -> None:
        assert second.wait("started", "web/0")["generation"] == 1

    over_a_death(tmp_path, pools, meanwhile, after)


@pytest.mark.slow
def test_the_time_to_start_goes_on(tmp_path: Path) -> None:
    pools = program("signal.pause()", ready='{ notify = "sd" }', start_timeout='"4s"')
    pools += '[pool.web.restart]\npolicy = "never"\n'

    def meanwhile(first: Up) -> None:
        killed(first)

    def after(second: Up) -> None:
        begun = second.wait("stop_begun", "web/0")
        assert (begun["reason"], begun["from"], begun["generation"]) == ("start-timeout", "starting", 1)
        assert second.wait("failed", "web/0")["exit"]["reason"] == "start-timeout"

    over_a_death(tmp_path, pools, meanwhile, after)


def test_probes_go_on(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    exec_ = f'{{ exec = ["test", "-e", "{flag}"], every = "20ms" }}'
    pools = pool_text("web", ready=exec_, live=exec_) + '[pool.web.restart]\npolicy = "never"\n'

    def meanwhile(first: Up) -> None:
        first.wait("started", "web/0")
        killed(first)
        flag.unlink()

    def after(second: Up) -> None:
        begun = second.wait("stop_begun", "web/0")
        assert (begun["reason"], begun["generation"]) == ("probe-failed", 1)

    over_a_death(tmp_path, pools, meanwhile, after)


@pytest.mark.slow
def test_heartbeats_that_nobody_heard_count(tmp_path: Path) -> None:
    """It beats, nobody hears it for longer than the interval, and it is not blamed."""
    code = "send('READY=1')\nfor n in range(100000): send('WATCHDOG=1\\nSTATUS=%d' % n); time.sleep(0.05)"
    pools = program(code, ready='{ notify = "sd" }', watchdog='"2s"')

    def beats(up: Up) -> int:
        return int(up.worker("web/0")["status_text"] or 0)

    def meanwhile(first: Up) -> None:
        first.wait("started", "web/0")
        wait_for(lambda: beats(first) > 45)  # longer than the interval
        killed(first)

    def after(second: Up) -> None:
        now = beats(second)
        wait_for(lambda: beats(second) > now + 45)
        worker = second.worker("web/0")
        assert (worker["state"], worker["generation"], worker["ready"]) == ("running", 1, True)

    over_a_death(tmp_path, pools, meanwhile, after)


@pytest.mark.slow
def test_a_supervisor_that_stood_still_blames_nobody(tmp_path: Path) -> None:
    """REL-52: the line holds old news when it goes on."""
    code = "send('READY=1')\nfor n in range(100000): send('WATCHDOG=1\\nSTATUS=%d' % n); time.sleep(0.02)"
    with Up(tmp_path, program(code, ready='{ notify = "sd" }', watchdog='"1s"')) as up:
        up.wait("started", "web/0")
        for seconds in (1.1, 1.3, 2.5):
            up.send(signal.SIGSTOP)
            time.sleep(seconds)  # longer than the interval
            up.send(signal.SIGCONT)
            now = int(up.worker("web/0")["status_text"])
            wait_for(lambda now=now: int(up.worker("web/0")["status_text"]) > now + 75)  # type: ignore[misc]
        worker = up.worker("web/0")
        assert (worker["state"], worker["generation"], worker["ready"]) == ("running", 1, True)


def test_a_stop_command_is_not_run_twice(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    stop = f'[{{ command = ["sh", "-c", "echo x >> {ran}; exec sleep 1000"], wait = "600s" }}, "kill"]'

    def meanwhile(first: Up) -> None:
        first.wait("started", "web/0")
        assert first.ctl("stop", "web", "--no-wait").code == 0
        wait_for(ran.exists)
        killed(first)

    def after(second: Up) -> None:
        worker = second.worker("web/0")
        assert (worker["state"], worker["generation"]) == ("stopping", 1)
        assert second.ctl("kill", "web", "--tree").code == 0
        second.wait("stopped", "web/0")
        assert ran.read_text() == "x\n"

    over_a_death(tmp_path, pool_text("web", stop=stop), meanwhile, after)


@needs_root
def test_ready_is_the_words_of_nobody_else(tmp_path: Path, gate: Path) -> None:
    """SEC-57: neither the host's processes nor those of other workers speak for it, whoever they run as."""
    code = f"open({str(gate)!r}).read(); send('STATUS=mine'); signal.pause()"
    theirs = SENDER + "send('READY=1\\nSTATUS=theirs'); signal.pause()"
    other = pool_text("other", *PYTHON, theirs, ready='{ notify = "sd" }')
    with Up(tmp_path, program(code, ready='{ notify = "sd" }') + other) as up:
        up.wait("started", "other/0")
        up.wait("launched", "web/0")
        wait_for(lambda: up.worker("web/0")["host_pid"])
        host_pid = up.worker("web/0")["host_pid"]
        (told,) = [each for each in environment(host_pid) if each.startswith("NOTIFY_SOCKET=")]
        place = Path(f"/proc/{host_pid}/root{told.partition('=')[2]}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            fd = os.open(place, os.O_PATH)
            stranger.connect(f"/proc/self/fd/{fd}")
            stranger.send(b"READY=1\nSTATUS=forged")
            os.close(fd)
        open_gate(gate)
        wait_for(lambda: up.worker("web/0")["status_text"] == "mine")
        assert up.worker("web/0")["state"] == "starting"


def test_a_flood_of_notes_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    code = (
        "send('READY=1')\nwhile True: send('WATCHDOG=1\\nSTATUS=' + 'x' * 3000); send('\\x00' * 50); send('=' * 4000)"
    )
    pools = program(code, ready='{ notify = "sd" }', watchdog='"60s"') + pool_text("calm")
    with Up(tmp_path, pools) as up:
        up.wait("started", "web/0")
        assert up.ctl("restart", "calm").code == 0
        assert up.ctl("stop", "web").code == 0


needs_systemd_notify = pytest.mark.skipif(not shutil.which("systemd-notify"), reason="needs systemd-notify")


@needs_systemd_notify
def test_systemd_notify(tmp_path: Path) -> None:
    """As a shell script says it: its own child speaks for it."""
    script = 'systemd-notify --status="from a script" && systemd-notify --ready && exec sleep 1000'
    with Up(tmp_path, pool_text("web", *shell(script), ready='{ notify = "sd" }')) as up:
        up.wait("started", "web/0")
        assert up.worker("web/0")["status_text"] == "from a script"


@needs_root
@needs_systemd_notify
def test_another_user_reaches_the_socket(tmp_path: Path) -> None:
    """Although the state directory is closed to him."""
    command = shell("systemd-notify --ready; exec sleep 1000")
    with Up(tmp_path, pool_text("web", *command, ready='{ notify = "sd" }', user='"nobody"')) as up:
        up.wait("started", "web/0")


def test_a_newline_on_a_descriptor(tmp_path: Path) -> None:
    pools = pool_text("web", *shell("echo >&7; exec 7>&-; exec sleep 1000"), ready='{ notify = "fd", fd = 7 }')
    with Up(tmp_path, pools) as up:
        up.wait("started", "web/0")


def test_a_failing_probe_is_shown(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    with Up(tmp_path, pool_text("web", ready=f'{{ exec = ["test", "-e", "{flag}"], every = "20ms" }}')) as up:
        up.wait("started", "web/0")
        flag.unlink()
        up.wait("became_unready", "web/0")
        worker = up.worker("web/0")
        assert (worker["state"], worker["ready"], worker["probes"]) == ("running", False, {"ready": "exit:1"})
        assert "\n  ready probe: exit:1\n" in up.ctl("explain", "web/0").out
        flag.touch()
        up.wait("became_ready", "web/0")
        assert up.ctl("kill", "web", "-s", "TERM").code == 0
        up.wait("started", "web/0", generation=2)
