"""`nssup run` without a terminal: exit codes, stdio, environment, signals, and that nothing is ever left."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from run_command import (
    PATIENCE,
    RUN,
    driver,
    namespace_pids,
    needs_namespaces,
    needs_root,
    processes_with,
    read_until,
    run,
    state_of,
    wait_gone,
)

from nssup import foreground
from nssup.foreground import Options, RunError
from nssup.wire import Step

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_namespaces

SAYS_READY = "echo ready; "


@contextlib.contextmanager
def started(
    *args: str, wanted: bytes = b"ready\n", process_group: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`nssup run ARGS...` whose program has said wanted on stdout; ended here if it has not ended by itself."""
    command = subprocess.Popen(
        [*RUN, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        process_group=process_group,
    )
    with command:
        try:
            assert command.stdout
            read_until(command.stdout.fileno(), wanted)
            yield command
        finally:
            if command.poll() is None:
                command.kill()


def program_of(command: subprocess.Popen[bytes]) -> int:
    """The host PID that -v says."""
    assert command.stderr
    said = re.fullmatch(rb"nssup run: host PID (\d+), namespace PID \d+\n", command.stderr.readline())
    assert said
    return int(said[1])


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 3, 63, 64, 124, 125, 126, 127, 128, 129, 200, 254, 255])
def test_the_exit_code_is_the_programs(code: int) -> None:
    assert run("--", "sh", "-c", f"exit {code}").code == code


@pytest.mark.parametrize("init", ["--init", "--no-init"])
def test_exit_codes_with_and_without_init(init: str) -> None:
    assert run(init, "--", "sh", "-c", "exit 77").code == 77


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGRTMIN])
def test_death_by_a_signal_is_128_and_its_number(signo: int) -> None:
    assert run("--", "sh", "-c", f"ulimit -c 0; kill -{int(signo)} $$").code == 128 + signo


@pytest.mark.parametrize("command", ["no-such-command", "./no-such-command", "/no/such/command"])
def test_not_found_is_127(command: str, tmp_path: Path) -> None:
    result = run("--", command, cwd=tmp_path)
    assert result.code == 127
    assert result.err.startswith(f"nssup run: {command}: not found")


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        ("#!/bin/sh\n", 0o644, "EACCES: no permission"),
        ("echo not quite a script\n", 0o755, "ENOEXEC: neither a known format nor a #! line"),
        ("#!/no/such/interpreter\n", 0o755, "its interpreter .* is missing"),
        (None, 0o755, "EACCES: .* no regular file"),
    ],
)
@pytest.mark.parametrize("by_path", [True, False])
def test_not_executable_is_126(content: str | None, mode: int, why: str, by_path: bool, tmp_path: Path) -> None:
    program = tmp_path / "program"
    if content is None:
        program.mkdir()
    else:
        program.write_text(content)
    program.chmod(mode)
    result = run("--", str(program)) if by_path else run("-e", f"PATH={tmp_path}:/usr/bin:/bin", "--", "program")
    assert result.code == 126
    assert re.search(f"nssup run: .*program: cannot be executed: .*{why}", result.err)


def test_a_later_part_of_path_is_tried_when_an_earlier_may_not_be_run(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("#!/bin/sh\necho mine\n")
    assert run("-e", f"PATH={tmp_path}:/nowhere:/usr/bin:/bin", "--", "id", "-u").code == 0
    (tmp_path / "id").chmod(0o755)
    assert run("-e", f"PATH={tmp_path}:/usr/bin:/bin", "--", "id", "-u").out == "mine\n"


def test_a_failed_step_of_the_set_up_is_named(tmp_path: Path) -> None:
    result = run("-w", str(tmp_path / "nowhere"), "--", "true")
    assert result.code == 125
    assert result.err == (
        f"nssup run: setup directory: ENOENT: {tmp_path}/nowhere: no such directory inside: choose another with -w\n"
    )


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--ns", "mount,uts"], "must hold pid"),
        (["--ns", "pid,mars"], "--ns mars: unknown namespace: use .*mount"),
        (["--ns", "pid,uts", "--proc"], "needs a private mount namespace, or it would replace the host's /proc"),
        (["--ns", "pid,mount", "--hostname", "x"], "needs the uts namespace, or it would rename the host"),
        (["--hostname", "x" * 65], "longer than the 64 bytes"),
        (["-e", "NAME"], "-e NAME: not NAME=VALUE"),
        (["--user", "no-such-user"], "no such user 'no-such-user'"),
        (["--user", "0:no-such-group"], "no such group 'no-such-group'"),
        (["--user", "3999999999"], "name its group as well"),
        (["--user", "4294967295"], "4294967295 is no id"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(args: list[str], why: str) -> None:
    result = run(*args, "--", "true")
    assert result.code == 125
    assert re.match(f"nssup run: .*{why}", result.err)
    assert result.err.count("\n") == 1


def test_a_working_directory_that_was_removed_is_said(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, str(place), *driver("code = run(Options(('true',)))")],
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 125
    assert b"current directory has been removed" in done.stderr


# --- what the program finds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "ns_pid"), [("--init", 2), ("--no-init", 1)])
def test_both_pids(init: str, ns_pid: int) -> None:
    with started("-v", init, "--", "sh", "-c", "echo ready; echo $$; read go") as command:
        host_pid = program_of(command)
        assert namespace_pids(host_pid)[-2:] == [host_pid, ns_pid]
        assert command.stdout
        assert command.stdout.readline() == f"{ns_pid}\n".encode()
        command.communicate(b"go\n", timeout=PATIENCE)
        assert command.returncode == 0


def test_only_stdio_is_open() -> None:
    assert run("--", "ls", "/proc/self/fd").out.split() == ["0", "1", "2", "3"]  # 3 is the listing's own


@pytest.mark.parametrize("init", ["--init", "--no-init"])
def test_no_signal_is_blocked_ignored_or_pending(init: str) -> None:
    out = run(init, "--", "grep", "-E", "^(Sig|Shd)(Blk|Ign|Pnd)", "/proc/self/status").out
    assert set(re.findall(r"\t(\w+)", out)) == {"0" * 16}


def test_the_environment_is_the_callers_with_changes() -> None:
    callers = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "A": "1", "B": "1"}  # LC_ALL: or Python adds LC_CTYPE
    out = run("-e", "B=2", "-e", "C=a=b", "-e", "D=", "--", "env", env=callers).out
    assert dict(line.split("=", 1) for line in out.splitlines()) == callers | {"B": "2", "C": "a=b", "D": ""}


def test_the_directory_is_the_callers_or_w(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    assert run("--", "pwd", cwd=tmp_path).out == f"{tmp_path}\n"
    assert run("-w", "inner", "--", "pwd", cwd=tmp_path).out == f"{tmp_path}/inner\n"
    assert run("-w", "/", "--", "pwd", cwd=tmp_path).out == "/\n"


def test_a_hostname_stays_inside() -> None:
    before = os.uname().nodename
    assert run("--hostname", "inside", "--", "uname", "-n").out == "inside\n"
    assert os.uname().nodename == before


def test_ps_sees_the_namespace_alone_and_the_hosts_mounts_are_as_before() -> None:
    before = Path("/proc/self/mountinfo").read_bytes()
    assert run("--", "ps", "-e", "-o", "pid=,comm=").out.split() == ["1", "nssup-init", "2", "ps"]
    assert Path("/proc/self/mountinfo").read_bytes() == before
    assert Path("/proc/self/comm").read_text()


def test_without_a_private_proc_ps_shows_the_host() -> None:
    assert f" {os.getpid()} " in f" {' '.join(run('--no-proc', '--', 'ps', '-e', '-o', 'pid=').out.split())} "


@needs_root
@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("nobody", "65534 65534"),
        ("65534", "65534 65534"),
        ("nobody:0", "65534 0"),
        ("12345:12346", "12345 12346"),
    ],
)
def test_user(user: str, ids: str) -> None:
    result = run("--user", user, "-w", "/", "--", "sh", "-c", "echo $(id -u) $(id -g)")
    assert (result.out.strip(), result.err) == (ids, "")


@needs_root
def test_who_has_no_rights_gets_a_user_namespace_as_well() -> None:
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if subprocess.run([*as_nobody, "unshare", "--user", "true"], capture_output=True).returncode:
        pytest.skip("needs unprivileged user namespaces")
    may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # this Python may be root's own
    done = subprocess.run(
        [
            *as_nobody,
            *may_read,
            *RUN,
            "--",
            "sh",
            "-c",
            "id -u; echo $$; ps -e -o comm=; grep CapEff /proc/self/status",
        ],
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.stderr == b""
    assert done.stdout.split() == [b"65534", b"2", b"nssup-init", b"sh", b"ps", b"CapEff:", b"0" * 16]


# --- stdio ------------------------------------------------------------------------------------------------------------


def test_fifty_megabytes_go_through_intact(tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 50
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "out").open("wb") as out:
        feeder = subprocess.Popen(["cat", str(tmp_path / "in")], stdout=subprocess.PIPE)
        done = subprocess.run([*RUN, "--", "cat"], stdin=feeder.stdout, stdout=out, timeout=PATIENCE)
        assert feeder.stdout
        feeder.stdout.close()
        assert (feeder.wait(), done.returncode) == (0, 0)
    assert hashlib.sha256((tmp_path / "out").read_bytes()).digest() == hashlib.sha256(data).digest()


def test_whoever_reads_learns_that_the_program_closed_its_output() -> None:
    with started("--", "sh", "-c", "echo ready; exec >&-; read go; exit 5") as command:
        assert command.stdout
        assert select.select([command.stdout], [], [], PATIENCE)[0]
        assert command.stdout.read() == b""
        assert command.poll() is None
        assert command.stdin
        command.stdin.write(b"go\n")
        assert command.wait(PATIENCE) == 5


def test_whoever_writes_learns_that_the_program_closed_its_input() -> None:
    with started("--", "sh", "-c", "exec <&-; echo ready; exec sleep 1000") as command:
        assert command.stdin
        poll = select.poll()
        poll.register(command.stdin, 0)
        assert poll.poll(PATIENCE * 1000) == [(command.stdin.fileno(), select.POLLERR)]  # no reader is left
        command.terminate()
        assert command.wait(PATIENCE) == 128 + signal.SIGTERM


def test_closed_descriptors_are_dev_null() -> None:
    line = shlex.join([*RUN, "--", "sh", "-c", "exec 3>&1; readlink /proc/$$/fd/0 /proc/$$/fd/3 >&2; true"])
    done = subprocess.run(["sh", "-c", f"{line} <&- >&-"], capture_output=True, timeout=PATIENCE)
    assert done.stderr.split() == [b"/dev/null", b"/dev/null"]


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "USR1", "USR2", "ALRM", "TERM", "CONT", "WINCH", "RTMIN"])
@pytest.mark.parametrize("init", ["--init", "--no-init"])
def test_signals_reach_the_program(name: str, init: str) -> None:
    script = f"trap 'echo got {name}; exit 9' {name}; sleep 1000 & echo ready; wait"
    with started(init, "--", "bash", "-c", script) as command:
        command.send_signal(getattr(signal, f"SIG{name}"))
        assert command.stdout
        assert (command.stdout.readline(), command.wait(PATIENCE)) == (f"got {name}\n".encode(), 9)


@pytest.mark.parametrize("init", ["--init", "--no-init"])
def test_a_signal_that_the_program_does_not_catch_ends_it(init: str) -> None:
    """Also as PID 1, where the kernel by itself would drop it."""
    with started(init, "--", "sh", "-c", "echo ready; exec sleep 1000") as command:
        command.terminate()
        assert command.wait(PATIENCE) == 128 + signal.SIGTERM


@pytest.mark.parametrize("init", ["--init", "--no-init"])
def test_a_signal_that_the_program_ignores_does_not(init: str) -> None:
    with started(init, "--", "sh", "-c", "trap '' TERM; echo ready; read go; exit 4") as command:
        command.terminate()
        command.communicate(b"go\n", timeout=PATIENCE)
        assert command.returncode == 4


def test_a_signal_before_the_program_runs_is_kept_for_it() -> None:
    early = """
class Early(Launcher):
    def launch(self, *args, **options):
        signal.raise_signal(signal.SIGTERM)
        return super().launch(*args, **options)
foreground.Launcher = Early
code = run(Options(("sleep", "1000")))
"""
    assert subprocess.run(driver(early), timeout=PATIENCE).returncode == 128 + signal.SIGTERM


def test_nohup_holds() -> None:
    body = "code = run(Options(('sh', '-c', 'echo ready; read go; exit 6')))"
    command = subprocess.Popen(
        ["nohup", *driver(body)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with command:
        assert command.stdout
        read_until(command.stdout.fileno(), b"ready\n")
        command.send_signal(signal.SIGHUP)
        command.communicate(b"go\n", timeout=PATIENCE)
    assert command.returncode == 6


@pytest.mark.parametrize("init", ["--init", "--no-init"])
def test_stopping_nssup_run_stops_the_program_and_continuing_continues_it(init: str) -> None:
    with started(
        "-v", init, "--", "sh", "-c", "echo ready; while read line; do echo $line; done", process_group=0
    ) as command:
        host_pid = program_of(command)
        command.send_signal(signal.SIGTSTP)
        stopped = os.waitid(os.P_PID, command.pid, os.WSTOPPED)
        assert stopped
        assert stopped.si_status == signal.SIGTSTP
        wait_for_state(host_pid, "T")
        command.send_signal(signal.SIGCONT)
        out, _ = command.communicate(b"back\n", timeout=PATIENCE)
        assert (out, command.returncode) == (b"back\n", 0)


def wait_for_state(host_pid: int, state: str) -> None:
    """A stop shows once the process has been scheduled: nothing to wait on but its own time slices."""
    for _ in range(100_000):
        if state_of(host_pid) == state:
            return
        os.sched_yield()
    pytest.fail(f"{host_pid} is {state_of(host_pid)}, not {state}")


# --- nothing is left --------------------------------------------------------------------------------------------------

# Leaves processes that ignore TERM, in sessions of their own, holding stdout, and says its PID.
DAEMONS = """
for i in 1 2 3 4 5; do
    setsid sh -c "trap '' TERM HUP INT; setsid sleep {marker} & exec sleep {marker}" &
done
while [ $(ps -e -o args= | grep -c '^sleep {marker}') -lt 10 ]; do :; done
echo ready
"""


def a_marker() -> str:
    """A sleep that nobody else asks for."""
    return f"1000.{int.from_bytes(os.urandom(6), 'big')}"


def test_daemons_go_with_the_program() -> None:
    marker = a_marker()
    result = run("--", "sh", "-c", DAEMONS.format(marker=marker) + "exit 3")  # returns when nobody has stdout open
    assert (result.code, result.out) == (3, "ready\n")
    assert processes_with(marker) == []


@pytest.mark.parametrize("init", ["--init", "--no-init"])
def test_a_time_out_is_124_and_takes_the_tree(init: str) -> None:
    marker = a_marker()
    result = run(init, "--timeout", "0.5", "--", "sh", "-c", f"trap '' TERM; sleep {marker} & exec sleep {marker}")
    assert result.code == 124
    assert processes_with(marker) == []


def test_a_time_out_that_is_not_reached_changes_nothing() -> None:
    assert run("--timeout", "1000000", "--", "sh", "-c", "exit 3").code == 3


@pytest.mark.parametrize("init", ["--init", "--no-init"])
def test_a_parent_that_ignores_sigchld_changes_nothing(init: str) -> None:
    line = shlex.join([*RUN, init, "--", "sh", "-c", "exit 3"])
    done = subprocess.run(["bash", "-c", f"trap '' CHLD; exec {line}"], capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (3, b"")


def test_killing_init_is_told() -> None:
    with started("-v", "--", "sh", "-c", "echo ready; exec sleep 1000") as command:
        program = program_of(command)
        status = Path(f"/proc/{program}/status").read_text()
        init = int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])
        os.kill(init, signal.SIGKILL)
        _, err = command.communicate(timeout=PATIENCE)
        assert command.returncode == 128 + signal.SIGKILL
        assert err.startswith(b"nssup run: init-killed: ")


@pytest.mark.parametrize("init", ["--init", "--no-init"])
def test_killing_nssup_run_takes_the_program(init: str) -> None:
    with started("-v", init, "--", "sh", "-c", "echo ready; exec sleep 1000") as command:
        pidfd = os.pidfd_open(program_of(command))
        try:
            command.kill()
            wait_gone(pidfd)
        finally:
            os.close(pidfd)


def test_an_exception_of_ours_leaves_nothing_either() -> None:
    marker = a_marker()
    broken = """
from pathlib import Path
def broken(self):
    raise RuntimeError("broken")
Life._wait = broken
before = set(os.listdir("/proc/self/fd"))
try:
    run(Options(("sleep", marker)))
    code = 1
except RuntimeError:
    code = 0 if set(os.listdir("/proc/self/fd")) == before and not Path("/proc/thread-self/children").read_text() else 2
"""
    assert subprocess.run(driver(broken, marker=marker), timeout=PATIENCE).returncode == 0
    assert processes_with(marker) == []


@pytest.mark.parametrize("command", [["true"], ["no-such-command"], ["sh", "-c", "kill -9 $$"]])
@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("init", [True, False])
def test_no_descriptor_child_or_handler_is_left(command: list[str], tty: bool, init: bool) -> None:
    body = """
from pathlib import Path
def state():
    handlers = {signo: signal.getsignal(signo) for signo in signal.valid_signals()}
    return set(os.listdir("/proc/self/fd")), handlers, Path("/proc/thread-self/children").read_text()
before = state()
run(options)
code = 0 if state() == before else 1
"""
    options = Options(tuple(command), tty=tty, init=init)
    done = subprocess.run(
        driver(body, options=options), timeout=PATIENCE, stdin=subprocess.DEVNULL, capture_output=True
    )
    assert done.returncode == 0


# --- the pure parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["A", "=A", ""])
def test_a_change_of_the_environment_needs_name_and_value(change: str) -> None:
    with pytest.raises(RunError, match="not NAME=VALUE"):
        foreground.environment({}, [change])


def test_without_a_command_there_is_nothing_to_run() -> None:
    with pytest.raises(RunError, match="no command"):
        foreground.plan_of(Options(()), {}, tty=False)


def test_each_hint_belongs_to_a_step_that_exists() -> None:
    steps = {step.name.lower() for step in Step}
    assert {step for step, _ in foreground._HINTS} <= steps
    assert all(number in errno.errorcode for _, number in foreground._HINTS)


def test_starting_imports_no_event_loop() -> None:
    """Start-up time is a feature: what a run without a terminal loads."""
    body = "import nssup.foreground, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True).stdout.split()
    assert {"asyncio", "msgspec", "pathlib", "socket", "subprocess", "termios", "threading"}.isdisjoint(loaded)
