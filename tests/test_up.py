"""`nssup up` from its start to its end, and what is done to it meanwhile with `nssup ctl`, as a user does it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from live import (
    NSSUP,
    PATIENCE,
    Up,
    locked_by,
    marked,
    needs_namespaces,
    needs_root,
    opened,
    pool_text,
    shell,
    status_field,
    wait_readable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytestmark = needs_namespaces

# Deaf to TERM, once it has said so.
DEAF = shell('trap "" TERM; echo deaf; while :; do sleep 1000; done')
LONG_GRACE = 'stop=[{ signal = "TERM", wait = "1000s" }, "kill"]'


def wait_deaf(up: Up, pool: str = "deaf") -> None:
    up.wait_record(pool, lambda record: record["msg"] == "deaf")


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything_in_reverse_order(tmp_path: Path, signo: int) -> None:
    with Up(tmp_path, pool_text("first", workers=2) + pool_text("second")) as up:
        up.wait_running("first/0", "first/1", "second/0")
        assert up.end(signo) == 0
        begun = [event["worker"] for event in up.events if event["event"] == "stop_begun"]
        assert begun == ["second/0", "first/0", "first/1"]
        assert {event["worker"] for event in up.events if event["event"] == "stopped"} == set(begun)
        assert up.said == []


def test_a_second_sigint_skips_the_grace(tmp_path: Path) -> None:
    pools = pool_text("deaf", *DEAF, workers=2, stop='[{ signal = "TERM", wait = "1000s" }, "kill"]')
    with Up(tmp_path, pools) as up:
        for worker_id in ("deaf/0", "deaf/1"):
            up.wait_record("deaf", lambda record, name=worker_id: record["worker"] == name)  # type: ignore[misc]
        up.send(signal.SIGINT)
        up.wait("stop_begun", "deaf/0")
        assert {worker["state"] for worker in up.status()["workers"]} == {"stopping"}
        assert up.end(signal.SIGINT) == 0
        assert up.wait("stopped", "deaf/0")["exit"]["reason"] == "signal:SIGKILL"


def test_a_second_sigterm_changes_nothing(tmp_path: Path) -> None:
    """It is sent by whoever is impatient by habit; the stop sequences go on."""
    pools = pool_text("deaf", *DEAF, stop='[{ signal = "TERM", wait = "300ms" }, "kill"]')
    with Up(tmp_path, pools) as up:
        wait_deaf(up)
        up.send(signal.SIGTERM)
        begun = up.wait("stop_begun", "deaf/0")
        assert up.end(signal.SIGTERM) == 0
        stopped = up.wait("stopped", "deaf/0")
        assert stopped["exit"]["timed_out"] is True
        assert stopped["ts"] > begun["ts"]


def test_sighup_is_refused_politely(tmp_path: Path) -> None:
    with Up(tmp_path, pool_text("web")) as up:
        (worker,) = up.wait_running("web/0")
        up.send(signal.SIGHUP)
        refused = up.wait("reload_refused")
        assert refused["reason"]
        assert up.worker("web/0")["host_pid"] == worker["host_pid"]
        assert up.end() == 0
        assert json.dumps(refused) in [json.dumps(record) for record in up.records("nssup")]


def test_it_ends_by_itself_after_so_long(tmp_path: Path) -> None:
    with Up(tmp_path, pool_text("web"), "--for", "0.3") as up:
        assert up.wait_end() == 0
        assert [event["event"] for event in up.events] == ["pool_added", "launched", "started", "stop_begun", "stopped"]


def test_for_no_time_at_all(tmp_path: Path) -> None:
    up = Up(tmp_path, pool_text("web", workers=20), "--for", "0")
    try:
        assert up.wait_end() == 0
        assert up.left() == []
    finally:
        up.close()


@pytest.mark.parametrize(
    ("command", "keys", "code"),
    [
        (("sh", "-c", "exit 7"), {"type": '"oneshot"'}, 7),
        (("true",), {"type": '"oneshot"'}, 0),
        (("sh", "-c", "kill -9 $$"), {"type": '"oneshot"'}, 137),
        (("sh", "-c", "exit 3"), {"restart": '{ policy = "on-failure", success = [3] }', "type": '"oneshot"'}, 3),
        (("sh", "-c", "exit 9"), {"restart": '{ policy = "never" }'}, 9),
        (("/not/here",), {"type": '"oneshot"'}, 1),
    ],
)
def test_an_essential_pool_ends_it_with_its_code(
    tmp_path: Path, command: tuple[str, ...], keys: dict[str, str], code: int
) -> None:
    up = Up(tmp_path, pool_text("web") + pool_text("job", *command, essential=True, **keys))
    try:
        assert up.wait_end() == code
        assert up.left() == []
        assert up.wait("stopped", "web/0")
    finally:
        up.close()


def test_an_essential_pool_that_is_told_to_stop_is_no_failure(tmp_path: Path) -> None:
    with Up(tmp_path, pool_text("job", essential=True)) as up:
        up.wait_running("job/0")
        assert up.end() == 0


def test_who_failed_for_good_is_named(tmp_path: Path) -> None:
    keys = {"restart": '{ policy = "never" }'}
    pools = pool_text("web") + pool_text("bad", "sh", "-c", "exit 3", **keys) + pool_text("gone", "/not/here", **keys)
    with Up(tmp_path, pools) as up:
        up.wait("failed", "bad/0")
        up.wait("failed", "gone/0")
        assert up.worker("web/0")["state"] == "running"  # it goes on without them
        assert up.end() == 1
        assert sorted(up.said[-2:]) == [
            "nssup: bad/0 failed for good: exit:3",
            "nssup: gone/0 failed for good: exec-failed:ENOENT",
        ]


def test_who_was_mended_has_not_failed_for_good(tmp_path: Path) -> None:
    sign = tmp_path / "mended"
    script = shell('test -e "$1" && exec sleep 1000; exit 3', str(sign))
    with Up(tmp_path, pool_text("web", *script, restart='{ policy = "never" }')) as up:
        up.wait("failed", "web/0")
        sign.touch()
        assert up.ctl("start", "web").code == 0
        assert up.end() == 0
        assert up.said == []


def test_ctl_shutdown_comes_back_when_it_has_ended(tmp_path: Path) -> None:
    with Up(tmp_path, pool_text("web", workers=2)) as up:
        up.wait_running("web/0", "web/1")
        done = up.ctl("shutdown")
        assert (done.code, done.out, done.err) == (0, "web/0: stopped\nweb/1: stopped\n", "")
        wait_readable(up.pidfd, "still there", 0)
        assert not up.socket.exists()
        assert up.wait_end() == 0


def test_shutdown_is_the_end(tmp_path: Path) -> None:
    """Who starts something meanwhile is told so, and holds nobody up."""
    pools = pool_text("deaf", *DEAF, stop='[{ signal = "TERM", wait = "300ms" }, "kill"]') + pool_text(
        "idle", workers=0
    )
    with Up(tmp_path, pools) as up:
        wait_deaf(up)
        assert up.ctl("shutdown", "--no-wait").code == 0
        up.wait("stop_begun", "deaf/0")
        refused = up.ctl("scale", "idle", "3")
        assert (refused.code, refused.err) == (1, "nssup: this supervisor is ending\n")
        _, answer = up.api("POST", "/v1/start", {"select": ["deaf"], "wait": True})
        assert not answer["results"][0]["ok"]
        assert up.wait_end() == 0
        assert up.wait("stopped", "deaf/0")["generation"] == 1


def test_ctrl_c_before_anything_runs(tmp_path: Path) -> None:
    """It just ends, and says nothing."""
    config = tmp_path / "nssup.toml"
    os.mkfifo(config)
    with subprocess.Popen([*NSSUP, "up", "-c", str(config)], stderr=subprocess.PIPE) as process:
        writing = os.open(config, os.O_WRONLY)  # it is there, and waits for what the config says
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
        os.close(writing)
    assert (process.returncode, said) == (-signal.SIGINT, b"")


# --- the middle -------------------------------------------------------------------------------------------------------


def test_a_day_in_the_life(tmp_path: Path) -> None:
    """start, stop, restart, scale, kill, wait, logs, events: as a user types them, and what he reads."""
    says = shell('echo "hello from $NSSUP_ID"; exec sleep 1000')
    with Up(tmp_path, pool_text("web", *says, workers=2) + pool_text("off", enabled=False)) as up:
        assert up.ctl("wait", "web").code == 0
        first, second = up.wait_running("web/0", "web/1")
        stopped = up.ctl("stop", "web/1")
        assert (stopped.code, stopped.out) == (0, "web/1: stopped\n")
        assert up.ctl("status", "web/1").code == 3
        assert up.ctl("status", "web/0").code == 0
        assert up.ctl("pid", "web/1").code == 3
        started = up.ctl("start", "web/1")
        again = up.worker("web/1")
        assert started.code == 0
        assert started.out == "web/1: running\n"
        assert (again["generation"], again["restarts"]) == (2, 0)
        assert again["host_pid"] != second["host_pid"]
        restarted = up.ctl("restart", "web/0", "--json")
        assert restarted.code == 0
        (result,) = json.loads(restarted.out)["results"]
        assert (result["id"], result["ok"], result["generation"]) == ("web/0", True, 2)
        assert result["host_pid"] == up.worker("web/0")["host_pid"] != first["host_pid"]
        assert up.ctl("scale", "web", "+2").code == 0
        assert [worker["id"] for worker in up.status()["workers"] if worker["pool"] == "web"] == [
            f"web/{index}" for index in range(4)
        ]
        assert up.ctl("scale", "web", "1").code == 0
        assert [worker["id"] for worker in up.status()["workers"] if worker["pool"] == "web"] == ["web/0"]
        assert up.ctl("kill", "-9", "web/0").code == 0
        up.wait("started", "web/0", generation=3)
        assert up.ctl("start", "off").code == 0
        assert up.ctl("stop", "--all").code == 0
        assert {worker["state"] for worker in up.status()["workers"]} == {"stopped"}
        logs = up.ctl("logs", "web", "--raw").out.splitlines()
        assert sorted(logs) == ["hello from web/0"] * 3 + ["hello from web/1"] * 2 + [
            "hello from web/2",
            "hello from web/3",
        ]
        events = [json.loads(line) for line in up.ctl("events", "--json", "-n", "1000").out.splitlines()]
        told = {event["seq"]: event["event"] for event in events if "seq" in event}
        assert up.ctl("ping").out == f"pong: nssup 0.1.0, host PID {up.host_pid}\n"
        assert up.end() == 0
        mine = {event["seq"]: event["event"] for event in up.events}
        assert told.items() <= mine.items()
        assert list(mine) == list(range(1, len(mine) + 1))


@contextlib.contextmanager
def following(up: Up, *words: str) -> Iterator[Callable[[str], str]]:
    """`nssup ctl WORDS` that goes on; gives what reads it up to a line that ends so."""
    command = [*NSSUP, "ctl", *words]
    env = {**os.environ, "NSSUP_SOCKET": str(up.socket)}
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = process.stdout

        def read_until(wanted: str) -> str:
            read = b""
            while not read.endswith(wanted.encode() + b"\n"):
                wait_readable(lines.fileno(), f"no {wanted!r} after {read!r}")
                more = os.read(lines.fileno(), 1)
                assert more, f"ended without {wanted!r}: {read!r}"
                read += more
            return read.decode()

        try:
            yield read_until
        finally:
            process.kill()


def test_logs_of_a_pool_are_those_of_all_it_ever_had(tmp_path: Path) -> None:
    """Of workers that were scaled away, and of such as come while somebody follows."""
    says = shell('echo "$NSSUP_ID in $NSSUP_GENERATION"; exec sleep 1000')
    with Up(tmp_path, pool_text("web", *says, workers=2)) as up:
        up.wait_running("web/0", "web/1")
        up.wait_record("web", lambda record: record["msg"] == "web/1 in 1")
        assert up.ctl("scale", "web", "1").code == 0
        assert {record["worker"] for record in up.tail("web")} == {"web/0", "web/1"}
        assert {record["worker"] for record in up.tail("web/0")} == {"web/0"}
        with following(up, "logs", "-f", "web") as read_until:
            read_until("web/0 in 1")
            assert up.ctl("scale", "web", "2").code == 0
            read_until("web/1 in 2")


def test_the_wait_that_is_not_fulfilled(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho cannot go on\nexit 3\n")
    program.chmod(0o755)
    pools = pool_text("deaf", *DEAF, stop='[{ signal = "TERM", wait = "400ms" }, "kill"]')
    pools += pool_text("bad", str(program), restart='{ policy = "never" }')
    with Up(tmp_path, pools) as up:
        wait_deaf(up)
        done = up.ctl("stop", "deaf", "--timeout", "50ms")
        assert done.code == 124
        assert "deaf/0" in done.err
        assert up.ctl("wait", "deaf", "--for", "stopped").code == 0
        up.wait("failed", "bad/0")
        program.unlink()
        failed = up.ctl("start", "bad")
        assert failed.code == 1
        assert "exec-failed:ENOENT" in failed.err
        assert "cannot go on" in failed.err
        assert up.ctl("wait", "bad", "--for", "running", "--timeout", "10ms").code == 1
        assert up.ctl("wait", "deaf", "--for", "running", "--timeout", "10ms").code == 124
        assert up.end() == 1


def test_ten_at_once_restart_and_scale(tmp_path: Path) -> None:
    """Many hands on one supervisor: everyone gets an answer, and in the end it is as the last one wanted."""
    with Up(tmp_path, pool_text("web", workers=4, stop='["kill"]')) as up:
        up.wait_running(*[f"web/{index}" for index in range(4)])
        words = [
            ["restart", "web"],
            ["scale", "web", "6"],
            ["kill", "-9", "web/0"],
            ["stop", "web/1"],
            ["start", "web"],
        ]
        command = [*NSSUP, "ctl"]
        env = {**os.environ, "NSSUP_SOCKET": str(up.socket)}
        hands = [subprocess.Popen([*command, *each], env=env, stdout=-3, stderr=-3) for each in words * 2]
        assert {hand.wait(PATIENCE) for hand in hands} <= {0, 1}
        assert up.ctl("scale", "web", "3").code == 0
        assert up.ctl("start", "web").code == 0
        assert {worker["state"] for worker in up.status()["workers"]} == {"running"}
        assert len(marked(tmp_path)) == len(up.status()["workers"]) == 3


def test_three_hundred_workers(tmp_path: Path) -> None:
    """Up, restarted by a kill each, and stopped, with nothing left."""
    descriptors = len(os.listdir("/proc/self/fd"))
    mounted = Path("/proc/self/mountinfo").read_bytes().count(b"\n")
    with Up(tmp_path, pool_text("web", workers=300)) as up:
        assert up.ctl("wait", "web", "--timeout", "20").code == 0
        before = {worker["id"]: worker["host_pid"] for worker in up.status()["workers"]}
        assert len(set(before.values())) == 300
        at_rest = len(os.listdir(f"/proc/{up.host_pid}/fd"))
        assert at_rest < 4 * 300 + 60
        assert len(marked(tmp_path)) == 300
        for host_pid in before.values():
            os.kill(host_pid, signal.SIGKILL)
        for worker_id in before:
            up.wait("started", worker_id, generation=2)
        after = {worker["id"]: worker["host_pid"] for worker in up.status()["workers"]}
        assert not set(after.values()) & set(before.values())
        assert abs(len(os.listdir(f"/proc/{up.host_pid}/fd")) - at_rest) <= 2
        assert up.end() == 0
    assert Path("/proc/self/mountinfo").read_bytes().count(b"\n") == mounted
    assert len(os.listdir("/proc/self/fd")) == descriptors
    here = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert {"l/nssup.jsonl", "l/web.jsonl", "nssup.toml", "s/epoch", "s/lock", "s/run/lock"} <= set(here)
    assert len(here) < 10


# --- the end that nobody asked for ------------------------------------------------------------------------------------


def test_kill_9_of_the_supervisor(tmp_path: Path) -> None:
    """All that are to die with it are gone at once, whatever they hid; the next one starts as if nothing was."""
    script = '(setsid sh -c "trap : TERM HUP; while :; do sleep 1000; done" &); exec sleep 1000'
    pools = pool_text("web", *shell(script), workers=10) + pool_text("bare", init=False, stop='["kill"]')
    with Up(tmp_path, pools) as up, contextlib.ExitStack() as pidfds:
        up.wait_running(*[f"web/{index}" for index in range(10)], "bare/0")
        up.status()
        there = {*marked(tmp_path), *up.pid_namespaces.processes()}
        assert len(there) >= 10 * 3 + 1
        dying = select.poll()
        left = {pidfds.enter_context(opened(host_pid)): host_pid for host_pid in there}
        for pidfd in left:
            dying.register(pidfd, select.POLLIN)
        up.process.kill()
        wait_readable(up.pidfd, "it survived SIGKILL")
        begun = time.monotonic()
        while left:
            ready = dying.poll(5000)
            assert ready, f"still there: {left}"
            for pidfd, _ in ready:
                dying.unregister(pidfd)
                del left[pidfd]
        assert time.monotonic() - begun < 1.0  # by no deadline of ours; how soon is for scripts/bench
        assert up.wait_end() == -signal.SIGKILL
        assert up.socket.is_socket()
        assert locked_by(tmp_path / "s" / "lock") is None
        with Up(tmp_path, pools) as again:
            assert again.status()["supervisor"]["epoch"] == 2
            again.wait_running(*[f"web/{index}" for index in range(10)], "bare/0")
            assert again.said == []
            assert again.end() == 0
        up.socket.unlink(missing_ok=True)


# --- bad company ------------------------------------------------------------------------------------------------------


def test_garbage_on_the_control_socket(tmp_path: Path) -> None:
    """While workers restart. Nobody else is held up, and the supervisor does not grow."""
    rng = random.Random(2)
    pools = pool_text("web", *shell("exit 1"), workers=3, restart='{ backoff = { first = "5ms", max = "10ms" } }')
    pools += pool_text("calm")
    with Up(tmp_path, pools) as up:
        (calm,) = up.wait_running("calm/0")
        held = [connected(up) for _ in range(20)]  # who says nothing
        for round_ in range(60):
            with connected(up) as sock, contextlib.suppress(OSError):
                sock.sendall(GARBAGE[round_ % len(GARBAGE)] + rng.randbytes(rng.randrange(2000)))
                if round_ % 2:
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(65536):
                        pass
        assert up.ctl("ping").code == 0
        assert up.worker("calm/0")["host_pid"] == calm["host_pid"]
        assert up.wait("relaunched", "web/0", after=up.events[-1]["seq"] if up.events else 0)
        assert int(status_field(up.host_pid, "VmRSS").split()[0]) < 80_000
        for sock in held:
            sock.close()
        assert not [line for line in up.said if "Traceback" in line]


GARBAGE = [
    b"",
    b"\r\n" * 100,
    b"GET /v1/status",
    b"GET /v1/status HTTP/1.1\r\n",
    b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n" * 50,
    b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
    b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b'POST /v1/scale HTTP/1.1\r\nHost: x\r\nContent-Length: 38\r\n\r\n{"select": ["calm"], "n": "999999999"}',
    b'POST /v1/kill HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n{"select": ["calm"], "signal": "NOTHING"}',
    b'POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n{"select": [null]',
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/logs?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/workers/calm/%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n",
]


def connected(up: Up) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE)
    sock.connect(str(up.socket))
    return sock


def test_a_follower_that_stops_reading(tmp_path: Path) -> None:
    """Nobody waits for him, nothing is kept for him without bound, and he is told that he missed something."""
    fifo = tmp_path / "over"
    os.mkfifo(fifo)
    script = 'yes "$(head -c 200 /dev/zero | tr "\\0" x)" | head -c 20100000; echo over > "$1"; exec sleep 1000'
    with Up(tmp_path, pool_text("web", *shell(script, str(fifo)), enabled=False)) as up:
        with connected(up) as sock:
            sock.sendall(b"GET /v1/logs?follow=1&select=web HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(12) == b"HTTP/1.1 200"
            assert up.ctl("start", "web").code == 0
            assert fifo.read_text() == "over\n"
            assert up.ctl("ping").code == 0
            assert int(status_field(up.host_pid, "VmHWM").split()[0]) < 150_000
            read = b""
            while b" bytes of log skipped: the reader is too slow" not in read:
                more = sock.recv(1 << 20)
                assert more
                read = read[-100:] + more
        assert up.end() == 0
        records = up.records("web")
        assert [record["offset"] for record in records] == list(range(0, 20_100_000, 201))
        assert {record["msg"] for record in records} == {"x" * 200}


# --- scarcity ---------------------------------------------------------------------------------------------------------


def test_as_many_descriptors_as_may_be(tmp_path: Path) -> None:
    """The usual soft limit is far too low for a supervisor. Its workers get it all the same, or what they ask for."""
    says = shell("echo $(ulimit -Sn) of $(ulimit -Hn); exec sleep 1000")
    own = pool_text("own", *says, limits="{ rlimits = { nofile = { soft = 99, hard = 999 } } }")
    with Up(tmp_path, pool_text("web", *says, workers=30) + own, prefix=["prlimit", "--nofile=64:4096"]) as up:
        up.wait_running(*[f"web/{index}" for index in range(30)], "own/0")
        up.wait_record("web", lambda record: record["worker"] == "web/29")
        up.wait_record("own", lambda record: record["worker"] == "own/0")
        assert {record["msg"] for record in up.tail("web")} == {"64 of 4096"}
        assert {record["msg"] for record in up.tail("own")} == {"99 of 999"}


def test_no_descriptors_left(tmp_path: Path) -> None:
    """Launches fail by name, those that run are not harmed, and it goes on when there are descriptors again."""
    keys = {"restart": '{ backoff = { first = "20ms", max = "50ms" } }', "enabled": False}
    with Up(tmp_path, pool_text("web", workers=20, **keys), prefix=["prlimit", "--nofile=64:4096"]) as up:
        there = len(os.listdir(f"/proc/{up.host_pid}/fd"))
        resource.prlimit(up.host_pid, resource.RLIMIT_NOFILE, (there + 30, 4096))
        assert up.ctl("start", "web").code == 1
        failed = up.wait("backed_off")
        assert re_reason(failed["reason"]) == ("setup-failed", "EMFILE")
        workers = up.status()["workers"]
        running = {worker["id"]: worker["host_pid"] for worker in workers if worker["state"] == "running"}
        assert 2 < len(running) < 20
        resource.prlimit(up.host_pid, resource.RLIMIT_NOFILE, (4096, 4096))
        up.wait_running(*[f"web/{index}" for index in range(20)])
        after = {worker["id"]: worker["host_pid"] for worker in up.status()["workers"]}
        assert running.items() <= after.items()
        assert up.end() == 0


def re_reason(reason: str) -> tuple[str, str]:
    kind, _, error = reason.split(":")
    return kind, error


@pytest.fixture
def pids_cgroup() -> Iterator[Path]:
    """A cgroup of the test's own that can limit how many processes there are."""
    parent = Path("/sys/fs/cgroup/pids")
    if not (parent / "cgroup.procs").exists() or not os.access(parent, os.W_OK):
        pytest.skip("needs the pids controller of cgroup v1, writable")
    path = parent / f"nssup-pids-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


@needs_root
def test_no_processes_left(tmp_path: Path, pids_cgroup: Path) -> None:
    pools = pool_text("web", workers=20, restart='{ backoff = { first = "20ms", max = "50ms" } }')
    (pids_cgroup / "pids.max").write_text("25")
    prefix = ["sh", "-c", f'echo $$ > {pids_cgroup}/cgroup.procs; exec "$@"', "sh"]
    with Up(tmp_path, pools, prefix=prefix) as up:
        failed = up.wait("backed_off")
        assert re_reason(failed["reason"]) == ("setup-failed", "EAGAIN")
        running = {
            worker["id"]: worker["host_pid"] for worker in up.status()["workers"] if worker["state"] == "running"
        }
        assert 3 < len(running) < 20
        (pids_cgroup / "pids.max").write_text("max")
        up.wait_running(*[f"web/{index}" for index in range(20)])
        after = {worker["id"]: worker["host_pid"] for worker in up.status()["workers"]}
        assert running.items() <= after.items()
        assert up.end() == 0
        assert up.said == []


@needs_root
def test_no_process_left_for_a_thread_of_our_own(tmp_path: Path, pids_cgroup: Path) -> None:
    (pids_cgroup / "pids.max").write_text("1")
    prefix = ["sh", "-c", f'echo $$ > {pids_cgroup}/cgroup.procs; exec "$@"', "sh"]
    up = Up(tmp_path, pool_text("web"), prefix=prefix)
    try:
        assert up.wait_end() == 1
        assert up.said == ["nssup: cannot open the logs: a limit on processes was reached"]
        assert up.left() == []
    finally:
        up.close()


@needs_root
def test_a_full_disk(tmp_path: Path) -> None:
    """The workers go on, what is lost is counted and said, and it is written again when there is room."""
    (tmp_path / "l").mkdir()
    script = f'mount -t tmpfs -o size=256k tmpfs {tmp_path}/l && exec "$@"'
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    over, go = tmp_path / "over", tmp_path / "go"
    os.mkfifo(over)
    os.mkfifo(go)
    script = 'yes 0123456789 | head -c 1100000; echo > "$1"; read line < "$2"; echo again; exec sleep 1000'
    pools = pool_text("web", *shell(script, str(over), str(go))) + pool_text("calm")
    with Up(tmp_path, pools, prefix=prefix) as up:
        (calm,) = up.wait_running("calm/0")
        assert over.read_text() == "\n"
        assert up.wait("log_failed", "web")["reason"] == "ENOSPC"
        worker = up.worker("web/0")
        assert (worker["state"], worker["generation"]) == ("running", 1)
        assert worker["log_dropped_bytes"] > 100_000
        assert up.worker("calm/0")["host_pid"] == calm["host_pid"]
        # Room again: what is written goes into the file, after a word on what is missing.
        log = Path(f"/proc/{up.host_pid}/root{tmp_path}/l/web.jsonl")
        os.truncate(log, 0)
        go.write_text("go\n")
        up.wait_record("web", lambda record: record["msg"] == "again")
        assert up.ctl("restart", "web", "--no-wait").code == 0
        assert over.read_text() == "\n"
        assert "bytes of log dropped: ENOSPC" in log.read_text()
        assert up.end() == 0


def test_closed_stdin_stdout_and_stderr(tmp_path: Path) -> None:
    """As some start their daemons. Nothing that is opened then may be taken for stderr."""
    up = Up(
        tmp_path,
        pool_text("web", *shell("echo hello; exec sleep 1000")),
        prefix=["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"],
    )
    with up:
        up.wait_running("web/0")
        up.wait_record("web", lambda record: record["msg"] == "hello")
        assert (tmp_path / "s" / "lock").read_text() == f"{up.host_pid}\n"
        assert up.end() == 0
        assert up.records("nssup")


@pytest.mark.parametrize("gone", [False, True])
def test_nobody_reads_stderr(tmp_path: Path, gone: bool) -> None:
    """Its reader has stopped reading, or is gone. What it says is in its log all the same."""
    with Up(tmp_path, pool_text("web", workers=40, stop='["kill"]')) as up:
        assert up.process.stderr is not None
        fcntl.fcntl(up.process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        if gone:
            up.process.stderr.close()
        for _ in range(50):  # an event of about 200 bytes for each worker
            assert up.api("POST", "/v1/kill", {"select": ["web"], "signal": "CONT"})[0] == 200
        assert up.ctl("ping").code == 0
        assert up.ctl("stop", "web").code == 0
        seq = up.api("POST", "/v1/stop", {"select": ["web"]})[1]["seq"]
        assert seq > 1500
        up.send(signal.SIGTERM)
        wait_readable(up.pidfd, "it waits for somebody to read its stderr")
        up.code = up.process.wait()
        assert up.code == 0
        seqs = [record["seq"] for record in up.records("nssup")]
        assert len(seqs) >= seq
        assert seqs == list(range(1, len(seqs) + 1))
