"""The clone shim: puts nssup-init into fresh namespaces and talks to it. A plain synchronous call, no loop needed.

`Launcher` holds what every launch shares; `Process` is one life seen from the supervisor: init's pidfd, the line, the
log pipes. Who waits on them is somebody else's business (watch.py, foreground.py). Signals to the program go through
init; only the tree's SIGKILL goes to init's pidfd. Source: clone(2), unix(7), memfd_create(2), pidfd_open(2).
"""

import _socket
import array
import contextlib
import errno
import fcntl
import os
import select
import signal
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nssup import _clone, _pidfd, record, wire
from nssup.errors import LaunchError

if TYPE_CHECKING:
    from nssup.events import Exit  # where it is made it is imported: `nssup run` makes none, and starts 20 ms sooner

CLONE_NEW = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "time": 0x00000080,
}
SO_PASSCRED = 16
SCM_CREDENTIALS = 2
_UCRED = struct.Struct("3i")
_ANCILLARY = _socket.CMSG_SPACE(_UCRED.size)
_DATAGRAM = 4096
_NOT_NOW = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})
_BATCH = 64  # datagrams at a time: a life says three, and one that floods the line must not keep the supervisor
_WINDOW = 13  # descriptors of an init (wire.h, FD_COUNT); the sooner they are taken, the cheaper each launch
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MFD_EXEC = 0x0010
_SYSTEM_HINTS = {
    ("clone", errno.EPERM): "no right to make namespaces: run as root, or allow unprivileged user namespaces",
    ("clone", errno.EAGAIN): "a limit on processes was reached (pid_max, threads-max, RLIMIT_NPROC or pids.max)",
    ("clone", errno.ENOSPC): "a limit on namespaces was reached (/proc/sys/user/max_*_namespaces)",
    ("clone", errno.ENOSYS): "the kernel or a seccomp filter refuses clone3",
    ("clone", errno.EMFILE): "no free descriptor: raise the limit on open files",
    ("line", errno.EMFILE): "no free descriptor: raise the limit on open files",
    ("pipes", errno.EMFILE): "no free descriptor: raise the limit on open files",
}


def _launch_error(step: wire.Step, error: BaseException) -> BaseException:
    """What to raise for an error at this step: a refusal of the system by its name, anything else as it is."""
    if not isinstance(error, OSError):
        return error
    name, number = step.name.lower(), error.errno or errno.EIO
    return LaunchError(name, number, _SYSTEM_HINTS.get((name, number), ""))


def sealed_memfd(name: str, data: bytes, executable: bool = False) -> int:
    """An anonymous file that nobody can change any more. Raises OSError."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | (_MFD_EXEC if executable else 0))
    except OSError as error:
        if not executable or error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, flags)  # before 6.3 every memfd is executable, and the flag unknown
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def root_mount_id() -> int:
    """The id of the mount that is this process's root: unique over all mount namespaces of the kernel."""
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{root}") as lines:
            for line in lines:
                if line.startswith("mnt_id:"):
                    return int(line.split()[1])
    finally:
        os.close(root)
    raise OSError(errno.ENOTSUP, "the kernel does not tell mount ids")


class Launcher:
    """What all launches of one supervisor share. Make it in the process that will launch; close it after the last life.

    Raises OSError when nssup-init cannot be read or sealed.
    """

    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch
        with contextlib.ExitStack() as on_error:
            with open(os.path.join(os.path.dirname(__file__), "nssup-init"), "rb") as file:
                program = file.read()
            self._init = sealed_memfd("nssup-init", program, executable=True)
            on_error.callback(os.close, self._init)
            self._self = os.pidfd_open(os.getpid())
            on_error.callback(os.close, self._self)
            self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            on_error.callback(os.close, self._null)
            window = []
            for _ in range(_WINDOW):
                window.append(os.dup(self._null))
                on_error.callback(os.close, window[-1])
            self._window = (*sorted(window), self._null)
            self._mount_id = root_mount_id()
            self._closes = on_error.pop_all()

    @property
    def null(self) -> int:
        """/dev/null, for reading and writing; stays the launcher's."""
        return self._null

    @property
    def own_pidfd(self) -> int:
        """A pidfd of this process, which inits hold to see its end."""
        return self._self

    def close(self) -> None:
        self._closes.close()

    def launch(
        self,
        plan: record.Plan,
        *,
        stdio: tuple[int, int, int] | None = None,
        merge: bool = False,
        staging: int = -1,
        sockets: Sequence[int] = (),
    ) -> "Process":
        """Clone init for this plan; nothing of the program runs before Process.go.

        stdio: descriptors for the program's 0, 1, 2 (the caller keeps them). None: stdin is /dev/null, stdout and
        stderr are pipes whose read ends the Process has (one pipe for both with merge). staging: a descriptor that init
        keeps for the next supervisor; -1: none. sockets: descriptors for the program from 3 on, which init keeps too;
        plan.sockets of them.
        Raises LaunchError; then nothing is left behind.
        """
        step = wire.Step.LINE
        kept: list[int] = []  # ours when all goes well
        line = None
        lent: list[int] = []  # only until init has them
        try:
            line, theirs = _line(lent)
            step = wire.Step.PIPES
            null = self._null
            if stdio is None:
                uid = None if plan.identity is None else plan.identity.uid
                out_log, out = _log_pipe(kept, lent, uid)
                err_log, err = (-1, out) if merge else _log_pipe(kept, lent, uid)
                stdio = (null, out, err)
            else:
                out_log = err_log = -1
            fds = (null, null, null, theirs, line.fileno(), self._self, out_log, err_log, *stdio, staging, self._init)
            pidfd, init_host_pid, failed, number = _clone.clone(_flags(plan.namespaces), fds, self._window, -1)
            if failed:
                step = wire.Step(failed)
                raise OSError(number, "clone")
        except BaseException as error:
            if line is not None:
                line.close()
            for fd in kept:
                os.close(fd)
            raise _launch_error(step, error) from None
        finally:
            for fd in lent:
                os.close(fd)
        token = os.urandom(wire.TOKEN_SIZE)
        process = Process(pidfd, init_host_pid, line, (out_log, err_log), plan, self.epoch, token)
        try:
            step = wire.Step.SOCKETS
            for fd in sockets:
                line.sendmsg([wire.socket()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [fd]))])
            step = wire.Step.RECORD  # made and sent while init is still being exec'ed: it costs the launch no time
            _send_record(line, record.encode(plan, token, self._mount_id))
            step = wire.Step.ID_MAPS
            if "user" in plan.namespaces:
                write_id_maps(init_host_pid)
        except BaseException as error:
            process.destroy()
            raise _launch_error(step, error) from None
        return process


def _flags(namespaces: frozenset[str]) -> int:
    flags = 0
    for name in namespaces:
        flags |= CLONE_NEW[name]
    return flags


def _line(lent: list[int]) -> tuple[_socket.socket, int]:
    ours, theirs = _socket.socketpair(
        _socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC
    )
    lent.append(theirs.detach())
    try:
        ours.setsockopt(_socket.SOL_SOCKET, SO_PASSCRED, 1)
    except OSError:
        ours.close()
        raise
    return ours, lent[-1]


def _log_pipe(kept: list[int], lent: list[int], uid: int | None) -> tuple[int, int]:
    """Only the read end is non-blocking: the program's end is its own. It belongs to uid, who may open it by its path:
    /dev/stdout, /dev/stderr."""
    read, write = os.pipe2(os.O_CLOEXEC)
    kept.append(read)
    lent.append(write)
    os.set_blocking(read, False)
    if uid is not None:
        with contextlib.suppress(PermissionError):  # then it is only that path that cannot be opened
            os.fchown(write, uid, -1)
    return read, write


def _send_record(line: _socket.socket, encoded: bytes) -> None:
    if len(encoded) <= wire.RECORD_INLINE_MAX:
        line.send(wire.record_inline(encoded))
        return
    if len(encoded) > wire.RECORD_MAX:
        raise OSError(errno.E2BIG, "launch record")
    fd = sealed_memfd("nssup-record", encoded)
    try:
        rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [fd]))
        line.sendmsg([wire.record_in_memfd(len(encoded))], [rights])
    finally:
        os.close(fd)


def write_id_maps(init_host_pid: int) -> None:
    """Map the supervisor's own uid and gid to themselves: all that an unprivileged supervisor may (user_namespaces(7)).

    By host PID, which cannot be recycled: init is our child and not reaped. Raises OSError.
    """
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{os.geteuid()} {os.geteuid()} 1"),
        ("gid_map", f"{os.getegid()} {os.getegid()} 1"),
    ):
        fd = os.open(f"/proc/{init_host_pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


class Process:
    """One life, from clone to reaped init. Owns its descriptors: `pidfd`, `line`, `stdout`, `stderr` (None: not ours).

    Messages come in the order Started or Failed, Exited, Empty; then the pidfd. Without init (plan.init False) Started
    comes before the exec, a Failed may follow it, and there are neither Exited nor Empty: the end of the line without a
    Failed means that the exec succeeded, and `reap` knows the exit.
    """

    __slots__ = (
        "_epoch",
        "_hello",
        "_socket",
        "_token",
        "_unheard",
        "awaits_state",
        "generation",
        "has_init",
        "init_host_pid",
        "line_ended",
        "pidfd",
        "policy",
        "stderr",
        "stdout",
        "unknown",
    )

    def __init__(
        self,
        pidfd: int,
        init_host_pid: int,
        line: _socket.socket,
        logs: tuple[int, int],
        plan: record.Plan,
        epoch: int,
        token: bytes,
    ) -> None:
        self.pidfd = pidfd
        self.init_host_pid = init_host_pid
        self._socket = line
        self.stdout = logs[0] if logs[0] >= 0 else None
        self.stderr = logs[1] if logs[1] >= 0 else None
        self.generation = plan.generation
        self.has_init = plan.init
        self.policy = wire.Policy.DIE if plan.die else wire.Policy.KEEP
        self.line_ended = False
        self.unknown = 0
        self._epoch = epoch
        self._token = token
        self._hello: int | None = None  # our pidfd, as long as the line has no room for a word to its init
        self._unheard: list[wire.Message] = []
        self.awaits_state = False

    @property
    def line(self) -> int:
        """The line's descriptor, -1 once closed: readable means `receive` has something."""
        return self._socket.fileno()

    def go(self) -> None:
        """Everything outside is set up: run. Lost on a dead init, which its pidfd tells."""
        if not self._send(wire.go(self._epoch, self.policy, self._token)):
            self.kill()  # or it would wait for it until its deadline

    def _send(self, data: bytes) -> bool:
        """Whether the line took it. A full queue or a dead init is no error: its state counts, and its pidfd."""
        if self._hello is not None:
            self.hello(self._hello)
        try:
            self._socket.send(data)
        except OSError:
            return False
        return True

    def receive(self) -> list[wire.Message]:
        """What init said since the last call, up to a bound: the line stays readable while there is more.

        Sets line_ended. Never blocks, never raises for what init sent.
        """
        found: list[wire.Message] = []
        for _ in range(_BATCH if not self.line_ended else 0):
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_DATAGRAM, _ANCILLARY)
            except ConnectionError:
                # init went with a word of ours unread. The kernel says that once, and before what init said last.
                continue
            except OSError as error:
                if error.errno not in _NOT_NOW:
                    raise
                break
            if not data:
                self.line_ended = True
                break
            messages, unknown = wire.decode(data, _sender(ancillary))
            self.unknown += unknown
            found += self._ours(messages) if self.awaits_state else messages
        if self._hello is not None:
            self.hello(self._hello)
        return found

    def _ours(self, messages: list[wire.Message]) -> list[wire.Message]:
        """What counts of messages while init has not answered `hello`: from its State under our epoch on.

        And a Started that nobody read: it is the kernel's word, and of a program that has ended since nobody can ask
        for it again.
        """
        counted: list[wire.Message] = []
        for number, message in enumerate(messages):
            if isinstance(message, wire.State) and message.epoch == self._epoch:
                self.awaits_state = False
                return counted + messages[number:]
            if isinstance(message, wire.Started):
                counted.append(message)
            elif not isinstance(message, wire.State):
                self._unheard.append(message)
        return counted

    def last_words(self) -> list[wire.Message]:
        """What init had said to a supervisor before us, when it is gone and never answered `hello`."""
        found, self._unheard = self._unheard if self.awaits_state else [], []
        return found

    def signal(self, signo: int, *, tree: bool = False, stop_steps: int = 0, ns_pid: int | None = None) -> None:
        """Send signo to the program; to every process of the namespace but init (tree); or to one of it (ns_pid).
        stop_steps: see wire; a step of a stop is followed by SIGCONT, as one that is stopped could not begin to end."""
        if self.has_init:
            target = wire.SIGNAL_ALL if tree else wire.SIGNAL_MAIN if ns_pid is None else ns_pid
            self._send(wire.signal(self._epoch, signo, target, stop_steps))
        else:
            self._signal_init(signo)
            if stop_steps and signo not in (signal.SIGSTOP, signal.SIGTSTP):
                self._signal_init(signal.SIGCONT)

    def spawn(
        self,
        number: int,
        argv: tuple[bytes, ...],
        candidates: tuple[bytes, ...],
        stdio: Sequence[int],
        *,
        timeout: float = 0.0,
        stop_steps: int = 0,
    ) -> bool:
        """Run a command in the worker's namespaces, as its user: init answers with Done {number} when it has ended.

        stdio: up to three descriptors for its 0, 1, 2, the caller's; the last stands for those that are missing, none
        for /dev/null. timeout: seconds until init kills it, 0: never. Whether it is on its way: not if the line has no
        room.
        """
        milliseconds = min(round(timeout * 1000) or (timeout > 0), 0xFFFFFFFF)
        data = wire.spawn(
            self._epoch,
            number,
            record.words(argv),
            record.words(candidates),
            timeout_ms=milliseconds,
            stop_steps=stop_steps,
        )
        if len(data) > wire.RECORD_INLINE_MAX:
            return False
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", stdio))] if stdio else []
        try:
            self._socket.sendmsg([data], rights)
        except OSError:
            return False
        return True

    def cancel(self, number: int) -> None:
        """Kill a command of ours."""
        self._send(wire.cancel(self._epoch, number))

    def kill(self) -> None:
        """SIGKILL to init's pidfd: the kernel takes every process of the namespace with it."""
        self._signal_init(signal.SIGKILL)

    def _signal_init(self, signo: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signo)

    def acknowledge(self) -> None:
        """The exit record is ours: init may go."""
        self._send(wire.ack(self._epoch, self.generation))

    def release(self) -> None:
        """As acknowledge, for good: that nothing is left is init's word, and one that lies or is frozen goes too."""
        self.acknowledge()
        if self.pidfd >= 0:  # its log may be whole only after it is gone
            self.kill()

    def ping(self) -> None:
        """Ask for init's State."""
        self._send(wire.ping(self._epoch))

    def reap(self) -> "Exit | None":
        """Collect init itself, once; None while it lives. The exit is the program's own only without init."""
        try:
            found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            # Adopted, or somebody else in this program reaped it: nobody knows the code.
            return _unknown() if _readable(self.pidfd) else None
        if found is None:
            return None
        return exit_of(found.si_code, found.si_status) if not self.has_init else _unknown()

    @classmethod
    def adopt(cls, pidfd: int, init_host_pid: int, generation: int, epoch: int) -> "Process":
        """A life that another supervisor launched, by a pidfd of its init, which is ours from here on if this succeeds.

        Takes copies of what init kept. Nothing said before counts: call `hello`, and init says everything anew.
        Raises OSError when the kernel does not let us have them.
        """
        line = _line_of(pidfd)
        try:
            stdout = _log_of(pidfd, init_host_pid, wire.Fd.STDOUT_LOG)
            try:
                stderr = _log_of(pidfd, init_host_pid, wire.Fd.STDERR_LOG)
            except OSError as error:
                if error.errno not in (errno.EBADF, errno.ENOENT):
                    os.close(stdout)
                    raise
                stderr = -1  # it goes into the same pipe
        except OSError:
            line.close()
            raise
        plan = record.Plan(generation, (), (), (), frozenset(), die=False)
        process = cls(pidfd, init_host_pid, line, (stdout, stderr), plan, epoch, b"")
        process.awaits_state = True
        return process

    @classmethod
    def inherit(
        cls, fds: tuple[int, int, int, int], init_host_pid: int, generation: int, epoch: int, has_init: bool
    ) -> "Process":
        """A life of the supervisor that this process was before it exec'ed: one that ends with its supervisor.

        fds: pidfd, line, stdout, stderr, ours from here on; -1: there is none. What init said and nobody read counts.
        """
        pidfd, number, stdout, stderr = fds
        line = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, number if number >= 0 else None)
        if number < 0:
            line.close()
        plan = record.Plan(generation, (), (), (), frozenset(), init=has_init, die=True)
        process = cls(pidfd, init_host_pid, line, (stdout, stderr), plan, epoch, b"")
        process.line_ended = number < 0
        return process

    def change_policy(self, policy: wire.Policy) -> None:
        """What our death means from now on. Only where there is an init."""
        ends = [self.line] if policy is wire.Policy.KEEP else []  # init gave its copy up under DIE
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", ends))] if ends else []
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionError):
            self._socket.sendmsg([wire.policy_change(self._epoch, policy)], rights)
            self.policy = policy

    def staging(self) -> int | None:
        """A copy of the staging memory that init keeps, the caller's; None: it keeps none. Raises OSError."""
        if not self.has_init:
            return None
        try:
            return _pidfd.getfd(self.pidfd, wire.Fd.STAGING)
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ESRCH):
                return None
            raise

    def sockets(self) -> list[int]:
        """Copies of the listening sockets that init keeps, in the program's order, the caller's. Raises OSError."""
        found: list[int] = []
        if not self.has_init:
            return found
        try:
            while len(found) < wire.SOCKETS_MAX:
                found.append(_pidfd.getfd(self.pidfd, wire.SOCKETS_FIRST + len(found)))
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ESRCH):
                return found
            for fd in found:
                os.close(fd)
            raise
        return found

    def hello(self, own_pidfd: int) -> None:
        """Tell init that we are its supervisor now; it answers with its State, and only what follows is listened to.

        What has no room on the line is said as soon as there may be some; own_pidfd stays open for that.
        """
        self._hello = None
        rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [own_pidfd]))
        try:
            self._socket.sendmsg([wire.hello(self._epoch, self.policy)], [rights])
        except BlockingIOError:
            self._hello = own_pidfd
        except (BrokenPipeError, ConnectionError):
            return  # its pidfd will tell

    def take_logs(self) -> tuple[int | None, int | None]:
        """The read ends of the log pipes; whoever takes them closes them."""
        logs = self.stdout, self.stderr
        self.stdout = self.stderr = None
        return logs

    def close_line(self) -> None:
        self._socket.close()

    def close(self) -> None:
        """Close what is still ours. The caller has removed it from every epoll first."""
        self._socket.close()
        for fd in (self.pidfd, self.stdout, self.stderr):
            if fd is not None and fd >= 0:
                os.close(fd)
        self.pidfd, self.stdout, self.stderr = -1, None, None

    def destroy(self) -> None:
        """Kill the whole life, wait until it is gone, close everything. For ways out where nobody else will."""
        if self.pidfd < 0:
            return
        self.kill()
        while not _readable(self.pidfd, None):
            continue
        with contextlib.suppress(ChildProcessError):  # adopted: somebody else reaps it
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)  # waits where it is traced, and its tracer comes first
        self.close()


def _readable(fd: int, timeout: float | None = 0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout))


def _line_of(pidfd: int) -> _socket.socket:
    """The far end of the line that init keeps. Raises OSError; ENOTSOCK when what is there is no line of ours."""
    fd = _pidfd.getfd(pidfd, wire.Fd.FAR)
    try:
        line = _socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise
    if (line.family, line.type) != (_socket.AF_UNIX, _socket.SOCK_SEQPACKET):
        line.close()
        raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
    return line


def _log_of(pidfd: int, host_pid: int, number: int) -> int:
    """A read end that init keeps. Where the kernel refuses the copy, /proc still opens the pipe. Raises OSError."""
    try:
        return _pidfd.getfd(pidfd, number)
    except PermissionError:
        return os.open(f"/proc/{host_pid}/fd/{number}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == SCM_CREDENTIALS:
            host_pid: int = _UCRED.unpack_from(data)[0]
            return host_pid
    return 0


def signal_name(signo: int) -> str:
    """`SIGSEGV` for 11; `SIG37` where it has no name."""
    try:
        return signal.Signals(signo).name
    except ValueError:
        return f"SIG{signo}"


def exit_of(code: int, status: int, cpu_seconds: float | None = None, max_rss_bytes: int | None = None) -> "Exit":
    """events.Exit from what waitid(2) said: code CLD_EXITED, CLD_KILLED or CLD_DUMPED, status exit code or signal."""
    from nssup.events import Exit

    if code == os.CLD_EXITED:
        return Exit(reason=f"exit:{status}", code=status, cpu_seconds=cpu_seconds, max_rss_bytes=max_rss_bytes)
    return Exit(
        reason=f"signal:{signal_name(status)}",
        signal=status,
        core=code == os.CLD_DUMPED,
        cpu_seconds=cpu_seconds,
        max_rss_bytes=max_rss_bytes,
    )


def exit_of_message(told: wire.Exit) -> "Exit":
    """events.Exit from init's own record."""
    return exit_of(told.code, told.status, (told.user_us + told.system_us) / 1e6, told.max_rss_bytes)


def _unknown() -> "Exit":
    """init ended without having told how the program did."""
    from nssup.events import Exit

    return Exit(reason="init-killed")
