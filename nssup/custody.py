"""What outlives a supervisor: its directories, locked against a second one, and the custody of its workers' lives.

Source: fcntl(2), POSIX record locks. Such a lock is free at once when its process dies, although a clone's child may
still hold copies of the descriptors; any close of the file in the process drops it, so the descriptor is kept for life.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nssup import adopt, clone, lives, record
from nssup.desired import write_durably
from nssup.errors import ControlError, ExitCode, errno_name
from nssup.events import State
from nssup.machine import Worker
from nssup.spec import SupervisorSpec

# The lock files that this process holds, by device and inode: it would be given the same lock again, and would lose it
# with the close of any descriptor of the file.
_held: set[tuple[int, int]] = set()

EPOCH_MAX = 2**32 - 1  # it travels in 32 bits


class Directories:
    """State and runtime directory of one supervisor, ours while this object is open. epoch: the number of this run.

    Raises ControlError naming the directory when it cannot be made or another supervisor has it.
    """

    def __init__(self, spec: SupervisorSpec, inherited: Iterable[int] = ()) -> None:
        """inherited: lock files that `pass_on` gave, in this process, ours from here on."""
        self._locks: list[_Lock] = []
        there = {_file_key(fd): fd for fd in inherited}
        try:
            for path in (spec.state_dir, spec.runtime_dir):
                _make(path, 0o700)
                _check_ours(path)
                key = _file_key(Path(path, "lock"))
                if key not in [lock.key for lock in self._locks]:  # two names for one place
                    self._locks.append(_Lock(Path(path), there.pop(key, None)))
            _make(spec.log_dir, 0o750)
            self.epoch = _next_epoch(Path(spec.state_dir, "epoch"), lives.last_epoch(Path(spec.runtime_dir, "lives")))
        except BaseException:
            self.close()
            raise
        finally:
            for fd in there.values():
                os.close(fd)

    def close(self) -> None:
        while self._locks:
            self._locks.pop().close()

    def pass_on(self) -> tuple[int, ...]:
        """The lock files, the caller's from here on: as long as they are open, nobody else has the directories."""
        locks, self._locks = self._locks, []
        return tuple(lock.release() for lock in locks)


def refused(error: OSError, what: str, path: str | Path | None = None) -> ControlError:
    """That path (default: the one that the error names) cannot be made, opened ..., and why."""
    denied = error.errno in (errno.EACCES, errno.EPERM)
    return ControlError(
        "directory",
        f"cannot {what} {path or error.filename}: {error.strerror}",
        exit_code=ExitCode.NOT_PERMITTED if denied else ExitCode.FAILED,
    )


def _make(path: str, mode: int) -> None:
    try:
        os.makedirs(path, mode=mode, exist_ok=True)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise ControlError("directory", f"cannot make {path}: is no directory") from None
        raise refused(error, "make", path) from None


def _check_ours(path: str) -> None:
    """What is in there steers us: nobody else may write it."""
    found = os.stat(path)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ControlError(
            "directory",
            f"cannot use {path}: it belongs to uid {found.st_uid} and has mode {found.st_mode & 0o7777:04o}",
            hint=f"it must belong to uid {os.geteuid()} and be writable by nobody else",
        )


class _Lock:
    """The lock of one directory. inherited: its file, which this process has locked before. Raises ControlError."""

    def __init__(self, directory: Path, inherited: int | None = None) -> None:
        path = directory / "lock"
        try:
            if _file_key(path) in _held:
                raise _taken(directory, str(os.getpid()))
            if inherited is None:
                inherited = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise refused(error, "open", path) from None
        self._fd = inherited
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"{os.getpid()}\n".encode())
        except OSError as error:
            holder = _holder(self._fd)
            os.close(self._fd)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise refused(error, "lock", path) from None
            raise _taken(directory, holder) from None
        self.key = _file_key(self._fd)
        _held.add(self.key)

    def close(self) -> None:
        os.close(self.release())

    def release(self) -> int:
        """The file, the caller's."""
        _held.discard(self.key)
        return self._fd


_FLOCK = struct.Struct("hh4xqqi4x")  # struct flock of fcntl(2): type, whence, start, length, whose


def _holder(fd: int) -> str:
    """The host PID of who has the lock: the kernel's word, else what he wrote, which he may not have done yet."""
    asked = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    host_pid = _FLOCK.unpack(asked)[4]
    return str(host_pid) if host_pid > 0 else os.pread(fd, 32, 0).decode("ascii", "replace").strip()


def _file_key(file: Path | int) -> tuple[int, int]:
    """Device and inode; of no file if it is not there."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return -1, -1
    return found.st_dev, found.st_ino


def _taken(directory: Path, holder: str) -> ControlError:
    return ControlError(
        "locked",
        f"another supervisor has {directory}" + (f": host PID {holder}" if holder else ""),
        hint="stop it, or give this one its own state_dir and runtime_dir",
    )


def _next_epoch(path: Path, known: int) -> int:
    """One more than the last run's, kept by tmp + fsync + rename. One that is no such number starts again at 1.

    known: the highest that lives know. They listen to no lower one, wherever the file went meanwhile.
    """
    try:
        last = int(path.read_text())
    except (OSError, ValueError):
        last = 0
    epoch = max(last if 0 < last < EPOCH_MAX else 0, known) + 1
    try:
        write_durably(path, f"{epoch}\n".encode())
    except OSError as error:
        raise refused(error, "write", path) from None
    return epoch


# --- lives -----------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """One worker taken over. processes: its lives that are still there, `hello` not said yet."""

    adopted: adopt.Adopted
    processes: tuple[clone.Process, ...]


class Orphan(NamedTuple):
    """A life that may be ours and cannot be proven so. reason: `lost:WHY`. host_pid: of its program, where known."""

    worker: str
    generation: int
    init_host_pid: int | None
    host_pid: int | None
    reason: str

    @classmethod
    def of(cls, worker: Worker) -> "Orphan":
        """The newest life of a worker that is lost."""
        reason = worker.reason or "lost"
        return cls(worker.id, worker.generation, worker.init_host_pid, worker.last_host_pid, reason)


class Custody:
    """Notes every change of a worker before it is acted on, and takes over the lives that a dead supervisor noted.

    failed: the notes could not be written: lives launched from then on must die with us. strange: notes that were torn
    or forged, a line each. unproven: notes of older lives that cannot be proven ours or gone, and why. elsewhere:
    (worker id, generation, where) of lives noted in another boot or PID namespace.
    """

    def __init__(
        self, path: Path, epoch: int, own_pidfd: int, inherited: Iterable[tuple[str, clone.Process]] = ()
    ) -> None:
        """inherited: lives of the supervisor that this process was before, by worker id.

        Raises ControlError when the notes cannot be had, or are a later version's.
        """
        self._epoch = epoch
        self._own_pidfd = own_pidfd
        self._inherited = {(worker_id, process.generation): process for worker_id, process in inherited}
        self.unproven: list[Orphan] = []
        self._identities: dict[tuple[str, int], lives.Identity] = {}
        self._lost: set[tuple[str, int]] = set()
        self._newest: dict[str, int] = {}
        self.failed: OSError | None = None
        try:
            self._lives = lives.Lives(path, epoch)
            try:
                found = self._lives.read()
            except BaseException:
                self._lives.close()
                raise
        except OSError as error:
            raise refused(error, "use", path) from None
        self.strange = found.strange
        newest = {slot.worker: (slot, where) for slot, where in sorted(found.elsewhere, key=_age)}
        self.elsewhere = [
            (worker_id, slot.generation, where)
            for worker_id, (slot, where) in newest.items()
            if slot.step != record.SLOT_OVER
        ]
        self._slots: dict[str, list[record.Slot]] = {}
        for slot in found.slots:
            self._slots.setdefault(slot.worker, []).append(slot)

    def close(self) -> None:
        self._lives.close()
        while self._inherited:
            self._inherited.popitem()[1].destroy()  # of which there is no note

    # --- noting ------------------------------------------------------------------------------------------------------

    def born(self, worker_id: str, process: clone.Process) -> None:
        """A life was cloned: from its next change on, its init is in the notes."""
        key = worker_id, process.generation
        self._identities[key] = lives.identify(process.pidfd, process.init_host_pid)

    def changed(self, worker_id: str, worker: Worker | None) -> None:
        """Note the worker as it is now; None: it is forgotten."""
        try:  # not `_noting`, which would cost as much as the note
            if worker is None:
                self._forget_worker(worker_id)
            else:
                self._note(worker_id, worker)
        except OSError as error:
            self.failed = error

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = error

    def _note(self, worker_id: str, worker: Worker) -> None:
        key = worker_id, worker.generation
        if key in self._lost and worker.state is not State.LOST:
            self._lost.discard(key)  # an operator has dealt with it: nobody looks for it any more
            self._identities.pop(key, None)
        before = self._newest.get(worker_id)
        self._newest[worker_id] = worker.generation
        identity = self._identities.get(key, lives.Identity())
        self._lives.write(worker_id, worker.generation, _step(worker, identity), identity, adopt.keep(worker))
        if before is not None and before != worker.generation and (worker_id, before) not in self._identities:
            self._lives.forget(worker_id, before)

    def forget_all(self, but: Collection[str]) -> None:
        """Everything ended as it should: whoever comes next starts anew. but: workers whose notes stay."""
        for worker_id in [worker_id for worker_id in self._newest if worker_id not in but]:
            self.changed(worker_id, None)

    def _forget_worker(self, worker_id: str) -> None:
        generation = self._newest.pop(worker_id, None)
        if generation is not None:
            self._lives.forget(worker_id, generation)

    def reaped(self, worker_id: str, generation: int) -> None:
        """A life's init is gone. Its note goes with it, unless it is the worker's own."""
        self._identities.pop((worker_id, generation), None)
        if self._newest.get(worker_id) != generation:
            with self._noting():
                self._lives.forget(worker_id, generation)

    # --- taking over -----------------------------------------------------------------------------------------------

    def forget_elsewhere(self) -> None:
        """What is from elsewhere has been told, and need not be again."""
        with self._noting():
            self._lives.drop_stale()

    def unclaimed(self) -> set[str]:
        """Pools that notes speak of and nobody claimed yet."""
        return {worker_id.partition("/")[0] for worker_id in self._slots}

    def claim(self, pool: str, now: float) -> list[Claim]:
        """The workers of a pool that a supervisor before us had.

        Raises ControlError when we have no room for their descriptors: then none of the pool is taken.
        """
        there = {worker_id: slots for worker_id, slots in self._slots.items() if worker_id.partition("/")[0] == pool}
        claims: list[Claim] = []
        try:
            for worker_id, slots in there.items():
                claims += [self._claim(worker_id, slots, now)]
        except OSError as error:
            for process in [process for claim in claims for process in claim.processes]:
                process.close()
            raise no_room(pool, error) from None
        for worker_id in there:
            del self._slots[worker_id]
        return claims

    def _claim(self, worker_id: str, slots: list[record.Slot], now: float) -> Claim:
        slots.sort(key=lambda slot: slot.generation)
        newest = slots[-1]
        processes: list[clone.Process] = []
        fact = adopt.Fact()
        try:
            for slot in slots:
                process, fact = self._take(slot)
                if process is not None:
                    processes.append(process)
                if process is not None or slot is newest:
                    self._identities[worker_id, slot.generation] = _identity(slot)
                else:
                    self._leave(slot, fact)
        except BaseException:
            for process in processes:
                process.close()
            raise
        older = tuple(process.generation for process in processes if process.generation != newest.generation)
        adopted = adopt.adopt(newest, fact, older, now)
        self._newest[worker_id] = newest.generation
        if adopted.worker.state is State.LOST:
            self._lost.add((worker_id, newest.generation))
        return Claim(adopted, tuple(processes))

    def _leave(self, slot: record.Slot, fact: adopt.Fact) -> None:
        """An older life that is not ours to hold."""
        if fact.gone:
            self._lives.forget(slot.worker, slot.generation)
        else:
            self.unproven.append(
                Orphan(slot.worker, slot.generation, slot.init_host_pid or None, None, f"lost:{fact.why}")
            )

    def _take(self, slot: record.Slot) -> tuple[clone.Process | None, adopt.Fact]:
        inherited = self._inherited.pop((slot.worker, slot.generation), None)
        if inherited is not None:
            return inherited, adopt.Fact(holds=True)
        pidfd, fact = lives.find(slot, self._own_pidfd)
        if pidfd is None:
            return None, fact
        try:
            return clone.Process.adopt(pidfd, slot.init_host_pid, slot.generation, self._epoch), fact
        except OSError as error:
            gone = lives.ended(pidfd)
            os.close(pidfd)
            lives.raise_for_room(error)
            return None, adopt.Fact(gone=gone, why=errno_name(error.errno or errno.EIO))


def no_room(pool: str, error: OSError) -> ControlError:
    """The workers of a pool cannot be taken over for want of descriptors or memory of ours."""
    return ControlError(
        "no-room",
        f"cannot take over the workers of {pool}: {error.strerror}",
        hint="they go on: raise the limit on open files, and start again",
    )


def _age(found: tuple[record.Slot, str]) -> int:
    return found[0].generation


def _identity(slot: record.Slot) -> lives.Identity:
    return lives.Identity(slot.init_host_pid, slot.handle, slot.pidfd_inode, slot.init_start_time)


def _step(worker: Worker, identity: lives.Identity) -> int:
    """How far its newest life is, in the words of the notes."""
    if worker.state is State.LOST:
        return record.SLOT_RELEASED
    if not worker.alive:
        return record.SLOT_OVER
    if not identity.init_host_pid:
        return record.SLOT_SPAWNING
    return record.SLOT_STOPPING if worker.state is State.STOPPING else record.SLOT_RELEASED
