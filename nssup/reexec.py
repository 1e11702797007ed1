"""What passes from a supervisor to the next one in the same process, when it execs the code that is installed now.

Descriptors keep their numbers over execve(2), and so does the process: its PID, its children, its POSIX locks. What
they are is told in a memfd, whose number is in one environment variable, which is removed as soon as it is read.
"""

import os
import sys
from collections.abc import Mapping, MutableMapping

import msgspec

from nssup.sockets import Spare

VARIABLE = "NSSUP_INHERITANCE"
VERSION = 1


class Life(msgspec.Struct, frozen=True, array_like=True):
    """A life that ends with its supervisor and has to be passed on whole; -1: there is no such descriptor.

    offsets: bytes of stdout and stderr that are in records.
    """

    worker: str
    generation: int
    init_host_pid: int
    has_init: bool
    pidfd: int
    line: int
    stdout: int
    stderr: int
    offsets: tuple[int, int] = (0, 0)

    def descriptors(self) -> list[int]:
        return [fd for fd in (self.pidfd, self.line, self.stdout, self.stderr) if fd >= 0]


class Inheritance(msgspec.Struct, frozen=True, kw_only=True):
    """host_pid: of the process it is for. from_version, epoch: of who left it. listener: the control socket, listening.
    locks: the lock files of the directories, locked. sockets: held for workers. ends_at: when `--for` is over
    (CLOCK_BOOTTIME), None: never. failed: why the exec did not happen; then it is for the same code again. soft_limit:
    on descriptors, that this process was started with.
    """

    version: int = VERSION
    host_pid: int
    from_version: str
    epoch: int
    listener: int
    locks: tuple[int, ...]
    lives: tuple[Life, ...] = ()
    sockets: tuple[Spare, ...] = ()
    ends_at: float | None = None
    failed: str | None = None
    soft_limit: int | None = None

    def descriptors(self) -> list[int]:
        return [
            self.listener,
            *self.locks,
            *(fd for life in self.lives for fd in life.descriptors()),
            *(each.fd for each in self.sockets),
        ]


def command() -> tuple[list[str], list[str]] | None:
    """(how this interpreter was started, up to the program; the program's arguments), as they were given.

    None when that cannot be told: inside another program, say.
    """
    arguments = sys.argv[1:]
    start = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    if not sys.executable or sys.orig_argv[len(start) :] != arguments or not start:
        return None
    return [sys.executable, *start[1:]], arguments


def take(environ: MutableMapping[str, str]) -> Inheritance | None:
    """What was left to this process, None: nothing. Its descriptors are passed to nobody else.

    Raises ValueError when it is not for us or means nothing.
    """
    text = environ.pop(VARIABLE, None)
    if text is None:
        return None
    try:
        fd = int(text)
        found = msgspec.json.decode(os.pread(fd, os.fstat(fd).st_size, 0), type=Inheritance)
        if found.host_pid != os.getpid() or not VERSION - 1 <= found.version <= VERSION:
            raise ValueError("it is for another process, or of another version")
        os.close(fd)
        for each in found.descriptors():
            os.set_inheritable(each, False)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise ValueError(f"{VARIABLE}={text}: {error}") from None
    return found


def execute(words: list[str], environ: Mapping[str, str], inheritance: Inheritance) -> OSError:
    """Become words, leaving it the inheritance. Returns only if that fails; then nothing has changed."""
    fds = inheritance.descriptors()
    passed = os.memfd_create("nssup-inheritance", 0)
    try:
        os.write(passed, msgspec.json.encode(inheritance))
        for fd in fds:
            os.set_inheritable(fd, True)
        os.execve(words[0], words, {**environ, VARIABLE: str(passed)})
    except OSError as error:
        for fd in fds:
            os.set_inheritable(fd, False)
        return error
    finally:
        os.close(passed)
