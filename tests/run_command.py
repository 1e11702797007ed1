"""How the tests of `nssup run` start it, talk to it through a terminal, and look at the host's side of it."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from nssup.foreground import may_make_namespaces

if TYPE_CHECKING:
    import signal
    from collections.abc import Iterator

RUN = (sys.executable, "-m", "nssup", "run")
PATIENCE = 20.0  # seconds until something that should happen has failed to

needs_namespaces = pytest.mark.skipif(not may_make_namespaces(), reason="needs CAP_SYS_ADMIN")
needs_root = pytest.mark.skipif(os.geteuid() != 0 or not may_make_namespaces(), reason="needs root with CAP_SYS_ADMIN")


def driver(body: str, **names: object) -> list[str]:
    """A Python that runs body (which may use the names given and nssup.foreground's) and exits with the code it set."""
    lines = ["import os, signal, sys", "from nssup import foreground", "from nssup.foreground import *"]
    lines += [f"{name} = {value!r}" for name, value in names.items()]
    return [sys.executable, "-c", "\n".join([*lines, body, "sys.exit(code)"])]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*args: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> Result:
    """`nssup run ARGS...` to its end, without a terminal and with nothing to read."""
    done = subprocess.run(
        [*RUN, *args], stdin=subprocess.DEVNULL, capture_output=True, cwd=cwd, env=env, timeout=PATIENCE
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def wait_gone(pidfd: int) -> None:
    """Until the process is dead. A pidfd is readable then, reaped or not."""
    assert select.select([pidfd], [], [], PATIENCE)[0], "still alive"


def read_until(fd: int, wanted: bytes) -> bytes:
    """All that fd gives up to wanted, and not a byte more."""
    seen = b""
    deadline = time.monotonic() + PATIENCE
    while wanted not in seen:
        assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], f"no {wanted!r} after {seen!r}"
        data = os.read(fd, 1)
        assert data, f"ended without {wanted!r}: {seen!r}"
        seen += data
    return seen


def processes_with(marker: str) -> list[str]:
    """Command lines on this host that hold marker."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if marker in line:
                found.append(f"{entry.name}: {line}")
    return found


def namespace_pids(host_pid: int) -> list[int]:
    """NSpid: the process's PID in each namespace from the host's down to its own."""
    status = Path(f"/proc/{host_pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
    return [int(number) for number in line.split()[1:]]


def state_of(host_pid: int) -> str:
    """R, S, T, Z ... of proc_pid_stat(5)."""
    return Path(f"/proc/{host_pid}/stat").read_text().rpartition(")")[2].split()[0]


class Terminal:
    """A terminal with a command on it, in a session of its own whose controlling terminal it is; we hold the far end.

    Never sleeps: everything waits for output, or for the end of the command, until a deadline.
    """

    def __init__(self, *command: str, size: tuple[int, int] = (24, 80), env: dict[str, str] | None = None) -> None:
        self.master, self.slave = os.openpty()
        os.set_blocking(self.master, False)
        self.resize(*size)
        self.settings = self.modes()
        self.seen = ""
        self._looked_at = 0
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=self.slave, stdout=self.slave, stderr=self.slave, env=env
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for fd in (self.master, self.slave):
            if fd >= 0:
                os.close(fd)

    def modes(self) -> list[Any]:
        """The terminal's settings, as the shell the command was started from would find them."""
        return termios.tcgetattr(self.slave)

    def is_raw(self) -> bool:
        return not self.modes()[3] & (termios.ICANON | termios.ECHO)

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self.master, (rows, columns))

    def type(self, text: str) -> None:
        data = text.encode()
        while data:
            assert select.select([], [self.master], [], PATIENCE)[1], "nobody reads what is typed"
            data = data[os.write(self.master, data) :]

    def expect(self, pattern: str) -> re.Match[str]:
        """Waits until the pattern is on the screen after what was expected last."""
        return next(found for found in self._waits(pattern) if found)

    def _waits(self, pattern: str) -> Iterator[re.Match[str] | None]:
        deadline = time.monotonic() + PATIENCE
        while True:
            if found := re.compile(pattern).search(self.seen, self._looked_at):
                self._looked_at = found.end()
            yield found
            if not self._read(deadline):
                pytest.fail(f"no {pattern!r} in {self.seen[self._looked_at :]!r} (before it: {self.seen[-2000:]!r})")

    def _read(self, deadline: float) -> bool:
        if not select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: nobody has the other side open
            return False
        self.seen += data.decode(errors="replace")
        return True

    def end(self) -> int:
        """Waits for the command's end while reading what it says. Its exit code, negative for a signal."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            deadline = time.monotonic() + PATIENCE
            while not select.select([pidfd], [], [], 0)[0]:
                ready, _, _ = select.select([pidfd, self.master], [], [], max(0.0, deadline - time.monotonic()))
                assert ready, f"did not end; last it said {self.seen[-500:]!r}"
                if self.master in ready:
                    self._read(deadline)
            while self._read(0):
                pass
            return self.process.wait()
        finally:
            os.close(pidfd)

    def wait_foreground(self, group: int) -> None:
        """Until the shell has given the terminal to this process group, which nothing announces."""
        deadline = time.monotonic() + PATIENCE
        while os.tcgetpgrp(self.master) != group:
            assert time.monotonic() < deadline, f"in the foreground is {os.tcgetpgrp(self.master)}, not {group}"
            os.sched_yield()

    def hang_up(self) -> None:
        """As when the window is closed."""
        for fd in (self.master, self.slave):
            os.close(fd)
        self.master = self.slave = -1

    def signal(self, signo: signal.Signals) -> None:
        self.process.send_signal(signo)
