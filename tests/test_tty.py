"""`nssup run -t` on a scripted terminal: what a person at one would see, and how the terminal is left."""

from __future__ import annotations

import hashlib
import os
import re
import select
import signal
import subprocess
from pathlib import Path

import pytest
from run_command import (
    PATIENCE,
    RUN,
    Terminal,
    driver,
    namespace_pids,
    needs_namespaces,
    wait_gone,
)

pytestmark = needs_namespaces

SHELL = ("bash", "--norc", "--noprofile")
# No bracketed paste: its escape sequences would be part of every prompt.
SHELL_ENV = {"PATH": os.environ["PATH"], "PS1": r"\h$ ", "TERM": "dumb", "HOME": "/", "LC_ALL": "C.UTF-8"}
PROMPT = r"\n?\S+\$ $"
UNTIL_KILLED = ("--", "sh", "-c", "echo ready; exec sleep 1000")


def program_in(terminal: Terminal) -> int:
    """The host PID that -v says."""
    return int(terminal.expect(r"nssup run: host PID (\d+), namespace PID \d+\r\n")[1])


def parent_of(host_pid: int) -> int:
    status = Path(f"/proc/{host_pid}/status").read_text()
    return int(re.search(r"^PPid:\t(\d+)$", status, re.MULTILINE)[1])  # type: ignore[index]


# --- the main scene ---------------------------------------------------------------------------------------------------


def test_a_shell_that_is_pid_one(tmp_path: Path) -> None:
    """The facts the project starts from."""
    mounts = Path("/proc/self/mountinfo").read_bytes()
    command = (*RUN, "-t", "-v", "--no-init", "--hostname", "inside", "-w", str(tmp_path), "--", *SHELL)
    with Terminal(*command, env=SHELL_ENV) as terminal:
        host_pid = program_in(terminal)
        terminal.expect(r"inside\$ $")

        terminal.type("echo pid=$$\n")
        terminal.expect(r"\r\npid=1\r\n")

        terminal.type(f"kill -KILL {terminal.process.pid}\n")
        terminal.expect(r"No such process")

        assert namespace_pids(host_pid)[-2:] == [host_pid, 1]
        ps = subprocess.run(["ps", "-o", "comm=", "-p", str(host_pid)], capture_output=True, text=True)
        assert ps.stdout.strip() == "bash"

        terminal.type("mkdir proc && mount -t proc proc proc && echo $(cd proc && echo [0-9]*) && cat proc/1/comm\n")
        terminal.expect(r"\r\n1( \d)?\r\nbash\r\n")
        assert not (tmp_path / "proc" / "1").exists()
        assert Path("/proc/self/mountinfo").read_bytes() == mounts
        assert Path("/proc/self/comm").read_text()

        terminal.type("exit 7\n")
        assert terminal.end() == 7
        assert terminal.modes() == terminal.settings


def test_a_terminal_of_its_own_with_a_session() -> None:
    script = """
        tty
        ps -o pid=,sid=,pgid=,tpgid=,comm= -p $$
        echo to-the-terminal > /dev/tty
        readlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2
    """
    with Terminal(*RUN, "--", "sh", "-c", script) as terminal:
        assert terminal.end() == 0
        assert terminal.seen.count("/dev/pts/") == 4
        assert re.search(r"\r\n +2 +2 +2 +2 sh\r\n", terminal.seen)
        assert "\r\nto-the-terminal\r\n" in terminal.seen
        assert os.ttyname(terminal.slave) not in terminal.seen.split()


def test_without_a_terminal_by_itself_there_is_none() -> None:
    done = subprocess.run([*RUN, "--", "tty"], stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
    assert done.stdout == b"not a tty\n"


# --- the caller's terminal is left as it was --------------------------------------------------------------------------


def test_raw_while_it_runs_and_restored_when_it_ends() -> None:
    with Terminal(*RUN, "--", "sh", "-c", "echo ready; read go; exit 4") as terminal:
        terminal.expect("ready\r\n")
        assert terminal.is_raw()
        terminal.type("\r")
        assert terminal.end() == 4
        assert terminal.modes() == terminal.settings


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (["no-such-command"], 127, "no-such-command: not found in PATH\r\n"),
        (["/"], 126, "cannot be executed: EACCES: "),
        (["sh", "-c", "kill -SEGV $$"], 128 + signal.SIGSEGV, ""),
    ],
)
def test_restored_after_a_failure(command: list[str], code: int, says: str) -> None:
    with Terminal(*RUN, "-t", "--", *command) as terminal:
        assert terminal.end() == code
        assert says in terminal.seen
        assert terminal.modes() == terminal.settings


def test_restored_after_a_failed_set_up() -> None:
    with Terminal(*RUN, "-t", "-w", "/no/such/place", "--", "true") as terminal:
        assert terminal.end() == 125
        assert "nssup run: setup directory: ENOENT: /no/such/place: " in terminal.seen
        assert terminal.modes() == terminal.settings


@pytest.mark.parametrize("init", ["--init", "--no-init"])
@pytest.mark.parametrize("name", ["TERM", "HUP", "INT", "QUIT", "USR1", "ALRM"])
def test_restored_after_a_signal_to_nssup_run(name: str, init: str) -> None:
    with Terminal(*RUN, init, "--", "cat") as terminal:
        terminal.type("there?\n")
        terminal.expect(r"there\?\r\nthere\?\r\n")  # echoed, and by cat: not by a shell that may catch signals
        assert terminal.is_raw()
        signo = getattr(signal, f"SIG{name}")
        terminal.signal(signo)
        assert terminal.end() == 128 + signo
        assert terminal.modes() == terminal.settings


def test_restored_after_init_was_killed() -> None:
    with Terminal(*RUN, "-v", *UNTIL_KILLED) as terminal:
        program = program_in(terminal)
        terminal.expect("ready\r\n")
        os.kill(parent_of(program), signal.SIGKILL)
        assert terminal.end() == 128 + signal.SIGKILL
        assert "nssup run: init-killed: " in terminal.seen
        assert terminal.modes() == terminal.settings


def test_restored_after_a_time_out() -> None:
    with Terminal(*RUN, "--timeout", "0.5", *UNTIL_KILLED) as terminal:
        assert terminal.end() == 124
        assert terminal.modes() == terminal.settings


def test_restored_after_an_exception_of_ours() -> None:
    broken = """
def broken(self):
    raise RuntimeError("broken")
Life._wait = broken
try:
    run(Options(("sleep", "1000"), tty=True))
except RuntimeError:
    code = 9
"""
    with Terminal(*driver(broken)) as terminal:
        assert terminal.end() == 9
        assert terminal.modes() == terminal.settings


def test_settings_that_differ_from_the_usual_are_kept_and_passed_on() -> None:
    with Terminal(*SHELL, env=SHELL_ENV) as terminal:
        terminal.expect(PROMPT)
        terminal.type("stty intr ^A erase ^H -ixon\n")
        terminal.expect(PROMPT)
        before = terminal.modes()
        terminal.type(f"{' '.join(RUN)} -- stty -a\n")
        terminal.expect(r"intr = \^A;.* erase = \^H;")
        terminal.expect(r" -ixon ")
        terminal.expect(PROMPT)
        assert terminal.modes() == before
        terminal.type("exit\n")
        terminal.end()


# --- size -------------------------------------------------------------------------------------------------------------


def test_the_size_is_passed_on_at_the_start_and_when_it_changes() -> None:
    script = "trap 'stty size; exit 0' WINCH; stty size; sleep 1000 & wait"
    with Terminal(*RUN, "--", "bash", "-c", script, size=(33, 101)) as terminal:
        terminal.expect(r"33 101\r\n")
        terminal.resize(44, 122)
        terminal.expect(r"44 122\r\n")
        assert terminal.end() == 0


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_ten_megabytes_of_output_are_intact() -> None:
    numbers = "".join(f"{n}\r\n" for n in range(1, 1_400_001)).encode()
    assert len(numbers) > 10_000_000
    command = [*RUN, "-t", "--", "seq", "1400000"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(numbers).digest()


def test_a_reader_that_pauses_holds_the_program_up_and_misses_nothing() -> None:
    command = subprocess.Popen(
        [*RUN, "-t", "--", "sh", "-c", "seq 200000; echo done >&2; exit 3"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    with command:
        assert command.stdout
        assert select.select([command.stdout], [], [], PATIENCE)[0]
        # The pipe holds 64 KiB of the 1.3 MB, so the program cannot be over; only now is it read.
        assert command.poll() is None
        out = command.stdout.read()
    assert command.returncode == 3
    assert out == "".join(f"{n}\r\n" for n in range(1, 200_001)).encode() + b"done\r\n"


@pytest.mark.parametrize("ending", ["--timeout=0.5", "TERM"])
def test_a_reader_that_never_reads_does_not_hold_up_the_end(ending: str) -> None:
    args = ["-v", *([ending] if ending.startswith("-") else [])]
    command = subprocess.Popen(
        [*RUN, "-t", *args, "--", "seq", "1000000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with command:
        assert command.stdout
        assert command.stderr
        host_pid = int(command.stderr.readline().split()[4].rstrip(b","))
        assert select.select([command.stdout], [], [], PATIENCE)[0]
        if ending == "TERM":
            init = os.pidfd_open(parent_of(host_pid))
            command.terminate()  # ends the program
            wait_gone(init)
            os.close(init)
            command.terminate()  # ends the wait for the reader
        assert command.wait(PATIENCE) == (124 if ending != "TERM" else 128 + signal.SIGTERM)


def test_the_last_words_are_not_lost() -> None:
    for _ in range(10):
        command = [*RUN, "-t", "--", "sh", "-c", "seq 300; kill -KILL $$"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
        assert done.stdout.endswith(b"\r\n300\r\n")
        assert done.returncode == 128 + signal.SIGKILL


def test_a_program_may_close_its_terminal_and_come_back() -> None:
    script = "exec <&- >&- 2>&-; exec </dev/tty >/dev/tty; echo back; read line; echo got $line"
    with Terminal(*RUN, "--", "sh", "-c", script) as terminal:
        terminal.expect("back\r\n")
        terminal.type("x\r")
        terminal.expect("got x\r\n")
        assert terminal.end() == 0


def test_much_typing_arrives() -> None:
    """More than any buffer on the way, while the program reads nothing at first."""
    lines = [f"{n:060d}" for n in range(5000)]
    script = "stty -echo; echo ready; sha256sum; echo over"
    with Terminal(*RUN, "--", "sh", "-c", script) as terminal:
        terminal.expect("ready\r\n")
        terminal.type("".join(f"{line}\r" for line in lines))
        terminal.type("\x04")
        wanted = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
        terminal.expect(wanted)
        terminal.expect("over\r\n")
        assert terminal.end() == 0


# --- -t where stdin is no terminal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"", b"one line\n", b"one line\nand a half"])
@pytest.mark.parametrize("program", [["cat"], [*SHELL, "-c", "cat"]])
def test_the_end_of_a_piped_stdin_is_typed(text: bytes, program: list[str]) -> None:
    done = subprocess.run([*RUN, "-t", "--", *program], input=text, capture_output=True, timeout=PATIENCE)
    # Echoed, then written by cat.
    expected = [text.replace(b"\n", b"\r\n") * 2] if b"half" not in text else [b"one line\r\n", b"and a half"]
    assert all(part in done.stdout for part in expected)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("text", [b"", b"echo $((40+2))\n", b"cat\nabc\n"])
def test_the_end_reaches_a_program_that_changes_the_mode(text: bytes) -> None:
    """A shell reads its prompt raw, and what it starts does not: an end typed too early would be lost."""
    done = subprocess.run([*RUN, "-t", "--", *SHELL], input=text, capture_output=True, timeout=PATIENCE, env=SHELL_ENV)
    assert done.returncode == 0
    assert (b"42" in done.stdout) == (b"40" in text)
    assert done.stdout.rstrip().endswith(b"exit")


def test_when_nobody_reads_any_more_the_program_is_hung_up() -> None:
    command = subprocess.Popen(
        [*RUN, "-t", "--", "sh", "-c", "while echo y; do :; done"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    with command:
        assert command.stdout
        assert command.stdout.read(10)
        command.stdout.close()
        assert command.wait(PATIENCE) == 128 + signal.SIGHUP


# --- job control ------------------------------------------------------------------------------------------------------


def test_job_control_of_the_shell_inside() -> None:
    with Terminal(*RUN, "--", *SHELL, env=SHELL_ENV) as terminal:
        terminal.expect(PROMPT)
        terminal.type("sh -c 'echo cat is there; exec cat'\n")
        terminal.expect(r"cat is there\r\n")
        terminal.type("first\n")
        terminal.expect(r"first\r\nfirst\r\n")
        terminal.type("\x1a")
        terminal.expect(r"\[1\]\+ +Stopped +sh -c .*\r\n")
        terminal.expect(PROMPT)
        terminal.type("fg\n")
        terminal.expect(r"fg\r\nsh -c .*\r\n")
        terminal.type("second\n")
        terminal.expect(r"second\r\nsecond\r\n")
        terminal.type("\x03")
        terminal.expect(PROMPT)
        terminal.type("echo $?\n")
        terminal.expect(r"\r\n130\r\n")
        terminal.type("sleep 1000 &\n")
        terminal.expect(r"\[1\] \d+\r\n")
        terminal.expect(PROMPT)
        terminal.type("kill %1; wait %1; echo w=$?\n")
        terminal.expect(r"\nw=143\r\n")
        terminal.expect(PROMPT)
        terminal.type("\x04")
        assert terminal.end() == 0


def test_stopped_and_continued_from_the_callers_shell() -> None:
    """kill -TSTP: the shell gets its terminal back as it was, and `fg` goes on where it stopped."""
    # A shell that edits no lines and leaves the terminal's settings alone: what is restored, we restored.
    with Terminal("dash", "-i", env=SHELL_ENV | {"PS1": "$ "}) as terminal:
        terminal.expect(r"\$ $")
        terminal.type(f"{' '.join(RUN)} -v -- sh -c 'echo ready; while read line; do echo got $line; done; exit 6'\n")
        program = program_in(terminal)
        terminal.expect(r"ready\r\n")
        os.kill(parent_of(parent_of(program)), signal.SIGTSTP)
        terminal.expect(r"\$ $")
        assert terminal.modes() == terminal.settings
        terminal.type("fg\n")
        terminal.expect(r"fg\r\n.*\n")
        terminal.type("hello\n")
        terminal.expect(r"got hello\r\n")
        assert terminal.is_raw()
        terminal.type("\x04")
        terminal.expect(r"\$ $")
        assert terminal.modes() == terminal.settings
        terminal.type("exit\n")
        assert terminal.end() == 6


def test_in_the_background_it_runs_and_leaves_the_terminal_alone() -> None:
    with Terminal(*SHELL, env=SHELL_ENV) as terminal:
        terminal.expect(PROMPT)
        terminal.type(f"{' '.join(RUN)} -t -- sh -c 'echo out-$((1+1)); exit 5' & wait $!; echo rc=$?\n")
        terminal.expect(r"out-2\r+\n")
        terminal.expect(r"rc=5\r\n")
        terminal.expect(PROMPT)
        terminal.type("exit\n")
        assert terminal.end() == 0


def test_brought_to_the_foreground_it_gets_the_keyboard() -> None:
    """Keys typed to the shell in the meantime neither stop it nor reach it."""
    with Terminal(*SHELL, env=SHELL_ENV) as terminal:
        terminal.expect(PROMPT)
        terminal.type(f"{' '.join(RUN)} -t -- sh -c 'echo ready; while read line; do echo got $line; done; exit 7' &\n")
        job = int(terminal.expect(r"\[1\] (\d+)\r\n")[1])
        terminal.expect(r"ready\r+\n")
        terminal.type("jobs\n")
        terminal.expect(r"\[1\]\+ +Running")
        terminal.expect(PROMPT)
        terminal.type("fg\n")
        terminal.expect(r"fg\r\n.*\r\n")
        terminal.wait_foreground(job)
        terminal.type("hello\n")
        terminal.expect(r"got hello\r\n")
        assert terminal.is_raw()
        terminal.type("again\n")
        terminal.expect(r"got again\r\n")
        assert "got jobs" not in terminal.seen
        terminal.type("\x04")
        terminal.expect(PROMPT)
        terminal.type("echo rc=$?\n")
        terminal.expect(r"\nrc=7\r\n")
        terminal.type("exit\n")
        assert terminal.end() == 0


def test_a_closed_window_hangs_the_program_up() -> None:
    with Terminal(*RUN, "-v", *UNTIL_KILLED) as terminal:
        program = os.pidfd_open(program_in(terminal))
        terminal.expect("ready\r\n")
        terminal.hang_up()
        try:
            wait_gone(program)
        finally:
            os.close(program)
        assert terminal.process.wait(PATIENCE) == 128 + signal.SIGHUP
