"""The file of a Unix socket: made with the right mode, never stolen from somebody alive, removed if it is still ours.

By itself, and light, so that a supervisor can have its socket, or say why not, before anything is started.
"""

import contextlib
import errno
import os
import socket
import stat

from nssup.errors import ControlError, ExitCode

PATH_BYTES = 107  # sizeof(sockaddr_un.sun_path) - 1: unix(7)
BACKLOG = 128


class Listener:
    """A listening socket and its file. Both ends may be called more than once."""

    def __init__(self, path: str, sock: socket.socket) -> None:
        self.path = path
        self.socket = sock
        self._identity = _identity(path)

    def keep(self) -> int:
        """A descriptor of the socket, the caller's, for whoever listens there next: from now on the file stays.

        Who connects in between waits in the queue. Raises OSError.
        """
        fd = os.dup(self.socket.fileno())
        self._identity = None
        return fd

    def open_to(self, gid: int) -> None:
        """The members of a group may connect. Raises OSError."""
        os.chown(self.path, -1, gid)
        os.chmod(self.path, 0o660)

    def remove(self) -> None:
        """Removes the file, if it is still the one made here. The socket is somebody else's by now."""
        if self._identity is not None and _identity(self.path) == self._identity:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self._identity = None

    def close(self) -> None:
        """Removes the file and closes the socket."""
        self.remove()
        self.socket.close()


def listen(path: str, *, lock_held: bool) -> Listener:
    """A listener at path, mode 0660, its directory made if missing (0750).

    lock_held: the caller holds the supervisor's lock, so that a socket file which nobody listens on is a dead
    predecessor's and is replaced. Raises ControlError: path too long, something else there, somebody listening.
    """
    _check_path(path)
    try:
        os.makedirs(os.path.dirname(path) or ".", mode=0o750, exist_ok=True)
        _make_room(path, lock_held)
        return Listener(path, _bind(path))
    except OSError as e:
        raise _unusable(path, f"cannot listen: {e.strerror or e}") from e


def resume(path: str, fd: int) -> Listener | None:
    """A listener that a supervisor before us left, in fd, which is ours from here on.

    None when it does not listen at path, or nobody could reach it there any more; then fd is closed.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError:  # no socket at all
        os.close(fd)
        return None
    try:
        if _listens_at(sock, path) and stat.S_ISSOCK(os.lstat(path).st_mode):
            sock.setblocking(False)
            return Listener(path, sock)
    except OSError:
        pass
    sock.close()
    return None


def _listens_at(sock: socket.socket, path: str) -> bool:
    return (
        (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
        and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        and sock.getsockname() == path
    )


def _check_path(path: str) -> None:
    size = len(os.fsencode(path))
    if size > PATH_BYTES:
        raise ControlError(
            "socket-path-too-long",
            f"socket path of {size} bytes, and Linux takes {PATH_BYTES}: {path}",
            hint="set supervisor.socket to a shorter path",
            exit_code=ExitCode.CONFIG,
        )
    if not path or "\0" in path:
        raise _unusable(path, "no usable path")


def _unusable(path: str, why: str, hint: str = "") -> ControlError:
    return ControlError("socket-unusable", f"socket {path}: {why}", hint=hint, exit_code=ExitCode.FAILED)


def _make_room(path: str, lock_held: bool) -> None:
    """Removes a stale socket file, and nothing else."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(there.st_mode):
        raise _unusable(path, "is there and is no socket", "move it away, or set supervisor.socket to another path")
    if _somebody_listens(path):
        raise _unusable(path, "another program listens there", "another supervisor? set supervisor.socket")
    if not lock_held:
        raise _unusable(path, "a socket that nobody listens on is there", "remove it")
    os.unlink(path)


def _somebody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(path)
    return code not in (errno.ECONNREFUSED, errno.ENOENT)  # EAGAIN: its queue is full, so it is alive


def _bind(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Never open to others, not even between bind and chmod.
        umask = os.umask(0o117)
        try:
            listener.bind(path)
        finally:
            os.umask(umask)
        os.chmod(path, 0o660)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _identity(path: str) -> tuple[int, int] | None:
    """Device and inode of what is at path now."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
