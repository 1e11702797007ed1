"""The terminal somebody sits at, and the bytes between it and a pseudo-terminal that a program runs on.

Synchronous: `Relay` says what it waits for (`interest`), whoever owns the poll calls `ready`. Nothing here blocks,
whatever the other side does: a full pipe, a stopped terminal, a program that reads nothing only hold up their own side.
Source: termios(3), ioctl_tty(2), pty(7), credentials(7); the kernel's n_tty.c and pty.c for what a closed end means.
"""

import contextlib
import errno
import fcntl
import os
import select
import stat
import sys
import termios
import tty
from collections.abc import Iterator
from typing import Any

BLOCK = 65536  # bytes read at once; a terminal gives at most 4095
TYPED = 4096  # bytes written to a program's terminal at once: its line discipline takes no more
LOCAL_MODES, CONTROL_CHARACTERS = 3, 6  # of what tcgetattr returns
RAW_ENDS = 32  # how often a program that reads single characters is told of the end: one may take it for a command
CLOSED = -1


class Terminal:
    """A terminal of the caller's: raw while the program's own pseudo-terminal does the editing, restored afterwards.

    It is touched only from the foreground: in the background it belongs to the shell or another job.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.settings: list[Any] | None = None  # as they were when we first came to the foreground
        self.raw = False

    def in_foreground(self) -> bool:
        """Whether job control lets us read. A terminal that is not our session's own is not under job control."""
        try:
            return os.tcgetpgrp(self.fd) == os.getpgrp()
        except OSError:
            return True

    def follow(self) -> bool:
        """Makes it raw when we have come to the foreground. Whether we are there."""
        foreground = self.in_foreground()
        if foreground and not self.raw:
            with _may_be_hung_up():
                self.settings = self.settings or termios.tcgetattr(self.fd)
                tty.setraw(self.fd, termios.TCSANOW)
        self.raw = foreground
        return foreground

    def restore(self) -> None:
        """As it was when found. Another job's by now: left alone."""
        if self.settings and self.raw and self.in_foreground():
            with _may_be_hung_up():
                termios.tcsetattr(self.fd, termios.TCSANOW, self.settings)
        self.raw = False


class Relay:
    """A pseudo-terminal for a program, and the copying between it and the caller's stdin and stdout.

    `slave` is what the program gets as its stdin, stdout and stderr. It stays open here until `drain`: a master whose
    slave nobody has open (a program may close its own and open /dev/tty later) is always ready, with nothing to read.

    terminal: what stdin is, to follow in modes; None when stdin is something else. size_of: a terminal whose size the
    program's follows, or None.
    """

    def __init__(self, stdin: int, stdout: int, terminal: Terminal | None, size_of: int | None) -> None:
        self.terminal = terminal
        self._size_of = size_of
        self._to_program = b""
        self._to_caller = b""
        self._last_typed = b"\n"
        self._ended = False  # stdin has
        self._raw_ends = 0
        self._keys: select.epoll | None = None
        self._stdin = self._stdout = CLOSED
        self.master, self.slave = os.openpty()
        try:
            os.set_blocking(self.master, False)
            if terminal and terminal.settings:
                termios.tcsetattr(self.slave, termios.TCSANOW, terminal.settings)
            self.resize()
            self._stdin = own_description(stdin, os.O_RDONLY)
            self._stdout = own_description(stdout, os.O_WRONLY)
            if terminal:
                # Ready once for each key, also when somebody else takes it. For the background, where a read would stop
                # us, and to a plain poll each key that is not ours would be ready for ever.
                self._keys = select.epoll()
                self._keys.register(self._stdin, select.EPOLLIN | select.EPOLLET)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives every descriptor back. Hangs the program's terminal up: its session gets SIGHUP, its reads end."""
        if self._keys:
            self._keys.close()
            self._keys = None
        for name in ("_stdin", "_stdout", "slave", "master"):
            fd = getattr(self, name)
            setattr(self, name, CLOSED)
            if fd != CLOSED:
                os.close(fd)

    # --- following the caller's terminal ---------------------------------------------------------------------------

    def resize(self) -> None:
        """Gives the program's terminal the caller's size; the kernel tells the program when that is a change."""
        if self._size_of is not None and self.master != CLOSED:
            with _may_be_hung_up():
                size = fcntl.ioctl(self._size_of, termios.TIOCGWINSZ, bytes(8))  # struct winsize
                fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def resume(self) -> None:
        """We were stopped, and whoever had the terminal meanwhile may have changed it."""
        if self.terminal:
            self.terminal.raw = False
        self.resize()

    # --- copying ----------------------------------------------------------------------------------------------------

    def interest(self) -> dict[int, int]:
        """fd -> poll events. What there is nothing to do for is left out: hung up, it would always be ready."""
        if self.master == CLOSED:
            return {}
        wanted = {}
        master = (select.POLLOUT if self._to_program else 0) | (0 if self._to_caller else select.POLLIN)
        if master:
            wanted[self.master] = master
        if self._to_caller:
            wanted[self._stdout] = select.POLLOUT
        if self.terminal and self._keys and not self.terminal.follow():
            wanted[self._keys.fileno()] = select.POLLIN
        elif not self._ended and not self._to_program:
            wanted[self._stdin] = select.POLLIN
        return wanted

    def ready(self, fd: int, events: int) -> None:
        """fd, one of interest() (or of an interest since changed), is ready for events."""
        if fd == self._stdin:
            self._read_stdin()
        elif fd == self._stdout:
            self._write_stdout()
        elif fd == self.master:
            if events & select.POLLOUT:
                self._write_master()
            if events & ~select.POLLOUT:
                self._read_master()
        elif self._keys and fd == self._keys.fileno():
            self._keys.poll(0)  # `interest` looks whether they are ours by now

    def drain(self) -> bool:
        """The program and all that wrote with it are gone: writes what is left. True when done; else call it again when
        stdout (`interest`) is ready.

        A read of the master first waits for bytes that are still on their way in the kernel, so EAGAIN (somebody
        outside has the slave open as well) is as much an end as EIO (nobody has).
        """
        if self.slave != CLOSED:
            os.close(self.slave)
            self.slave = CLOSED
        self._to_program = b""
        if self._to_caller:
            self._write_stdout()
        while self.master != CLOSED and not self._to_caller:
            if not self._read_master():
                return True
        return self.master == CLOSED

    def _read_stdin(self) -> None:
        try:
            data = os.read(self._stdin, TYPED)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._type(data)
        elif self.terminal is None:
            self._ended = True
            self._type_end()
        elif self.terminal.in_foreground():
            self.close()  # the caller's terminal is hung up, so the program's is

    def _type(self, data: bytes) -> None:
        self._last_typed = data[-1:]
        self._to_program += data
        self._write_master()

    def _type_end(self) -> None:
        """Types the end-of-file character, twice when the first would only end the line begun."""
        end = termios.tcgetattr(self.master)[CONTROL_CHARACTERS][termios.VEOF]
        self._type(end if self._last_typed == b"\n" else end * 2)
        self._last_typed = b"\n"

    def _retell_end(self) -> None:
        """Types the end again where the last one has been read, or lost: what is typed for one mode of a terminal means
        nothing in the other, and a shell changes it with each prompt. Called when the program has said something,
        as it does before it waits for an answer.
        """
        if self.slave == CLOSED or self._to_program:
            return
        poll = select.poll()
        poll.register(self.slave, select.POLLIN)
        unread = bool(poll.poll(0))  # also waits for what is on its way
        if termios.tcgetattr(self.master)[LOCAL_MODES] & termios.ICANON:
            if not unread:
                self._type_end()
        elif self._raw_ends < RAW_ENDS and _unread(self.slave) <= self._raw_ends + 2:
            # Nothing but ends is waiting (the first is two characters at most): all that was to be read has been.
            self._raw_ends += 1
            self._type_end()

    def _write_master(self) -> None:
        try:
            self._to_program = self._to_program[os.write(self.master, self._to_program) :]
        except BlockingIOError:
            pass
        except OSError:
            self._to_program = b""

    def _read_master(self) -> bool:
        try:
            self._to_caller = os.read(self.master, BLOCK)
        except OSError:  # EIO: nobody has a slave open; EAGAIN: there is nothing
            return False
        if self._ended:
            self._retell_end()
        self._write_stdout()
        return True

    def _write_stdout(self) -> None:
        try:
            self._to_caller = self._to_caller[os.write(self._stdout, self._to_caller) :]
        except BlockingIOError:
            pass
        except OSError:  # nobody reads what the program says, so its terminal is hung up
            self._to_caller = self._to_program = b""
            self.close()


def _unread(slave: int) -> int:
    """How many characters wait to be read."""
    return int.from_bytes(fcntl.ioctl(slave, termios.FIONREAD, bytes(4)), sys.byteorder)


@contextlib.contextmanager
def _may_be_hung_up() -> Iterator[None]:
    """Nothing can be set on, or asked of, a terminal that is gone; and nothing needs to be."""
    try:
        yield
    except (OSError, termios.error) as error:
        if error.args[0] not in (errno.EIO, errno.ENOTTY):
            raise


def own_description(fd: int, access: int) -> int:
    """A new non-blocking open file description of the terminal or pipe at fd, so that the caller's own stays blocking.

    A duplicate of fd where that cannot be had (a socket, a terminal of another user) or is not needed (a file).
    """
    if os.isatty(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode):
        try:
            return os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            pass
    return os.dup(fd)
