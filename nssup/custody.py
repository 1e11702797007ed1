"""The supervisor's own directories: made, and locked against a second supervisor.

Source: fcntl(2), POSIX record locks. Such a lock is free at once when its process dies, although a clone's child may
still hold copies of the descriptors; any close of the file in the process drops it, so the descriptor is kept for life.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from nssup.errors import ControlError
from nssup.spec import SupervisorSpec


class Directories:
    """State and runtime directory of one supervisor, ours while this object is open. epoch: the number of this run.

    Raises ControlError naming the directory when it cannot be made or another supervisor has it.
    """

    def __init__(self, spec: SupervisorSpec) -> None:
        self._locks: list[int] = []
        try:
            for path in (spec.state_dir, spec.runtime_dir):
                _make(path, 0o700)
                _check_ours(path)
                self._locks.append(_lock(Path(path)))
            _make(spec.log_dir, 0o750)
            self.epoch = _next_epoch(Path(spec.state_dir, "epoch"))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._locks:
            os.close(self._locks.pop())


def _make(path: str, mode: int) -> None:
    try:
        os.makedirs(path, mode=mode, exist_ok=True)
    except OSError as error:
        why = "is no directory" if isinstance(error, FileExistsError) else (error.strerror or str(error))
        raise ControlError("directory", f"cannot make {path}: {why}") from None


def _check_ours(path: str) -> None:
    """What is in there steers us: nobody else may write it."""
    found = os.stat(path)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ControlError(
            "directory",
            f"cannot use {path}: it belongs to uid {found.st_uid} and has mode {found.st_mode & 0o7777:04o}",
            hint=f"it must belong to uid {os.geteuid()} and be writable by nobody else",
        )


def _lock(directory: Path) -> int:
    path = directory / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ControlError("directory", f"cannot open {path}: {error.strerror}") from None
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
    except OSError as error:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise ControlError("directory", f"cannot lock {path}: {error.strerror}") from None
        raise ControlError(
            "locked",
            f"another supervisor has {directory}" + (f": host PID {holder}" if holder else ""),
            hint="stop it, or give this one its own state_dir and runtime_dir",
        ) from None
    return fd


def _next_epoch(path: Path) -> int:
    """One more than the last run's, kept by tmp + fsync + rename. A file that is no number starts again at 1."""
    try:
        epoch = int(path.read_text()) + 1
    except (OSError, ValueError):
        epoch = 1
    fresh = path.with_suffix(".new")
    try:
        with fresh.open("w") as file:
            file.write(f"{epoch}\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise ControlError("directory", f"cannot write {path}: {error.strerror}") from None
    return epoch
