"""The notes of the lives that a supervisor started, and finding those lives again when it is no more.

`RUNTIME_DIR/lives` is one file of fixed slots, two alternating for each life, one pwrite a step, never synced: it is of
use only within its boot. A life is found again by the pidfs handle of its init, else by the inode of its pidfd, else by
its start time; what is not proven to be ours is not touched.

Source: name_to_handle_at(2) (pidfs: Linux 6.14; unique inodes: 6.9), pidfd_open(2), pidfd_getfd(2), proc(5).
"""

import contextlib
import errno
import functools
import os
import select
from pathlib import Path
from typing import NamedTuple

from nssup import _pidfd, record
from nssup.adopt import Fact, place_of
from nssup.errors import ControlError, errno_name

_PAIR = 2 * record.SLOT_SIZE
_GROW = 64 * _PAIR


class Identity(NamedTuple):
    """What an init is known by beyond its PID; zero or empty where this kernel does not say."""

    init_host_pid: int = 0
    handle: bytes = b""
    pidfd_inode: int = 0
    start_time: int = 0


def identify(pidfd: int, init_host_pid: int) -> Identity:
    """The identity of a process held by pidfd. Its start time costs a read of /proc: only where nothing else is."""
    handle, inode = _handle(pidfd), _inode(pidfd)
    return Identity(init_host_pid, handle, inode, 0 if handle or inode else start_time(init_host_pid))


def _handle(pidfd: int) -> bytes:
    try:
        return _pidfd.handle(pidfd)
    except OSError:
        return b""


def _inode(pidfd: int) -> int:
    found = os.fstat(pidfd)
    return 0 if found.st_dev == _anonymous_device() else found.st_ino


@functools.cache
def _anonymous_device() -> int:
    """The device of descriptors that have no inode of their own, which pidfds were among before pidfs."""
    epoll = select.epoll()
    try:
        return os.fstat(epoll.fileno()).st_dev
    finally:
        epoll.close()


def start_time(host_pid: int) -> int:
    """Clock ticks after boot (proc(5), stat, field 22); 0 when the process is not there."""
    try:
        data = Path(f"/proc/{host_pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(data[data.rindex(b")") + 2 :].split()[19])


def last_epoch(path: Path) -> int:
    """The highest epoch that a file of slots knows; 0 when there is none. Never raises for what is there."""
    try:
        data = path.read_bytes()
    except OSError:
        return 0
    halves = (data[at : at + record.SLOT_SIZE] for at in range(0, len(data), record.SLOT_SIZE))
    return max((slot.epoch for slot in map(record.decode_slot, halves) if slot is not None), default=0)


def find(slot: record.Slot, own_pidfd: int) -> tuple[int | None, Fact]:
    """(a pidfd of the slot's init, what is so). The pidfd is the caller's; None when it is gone or cannot be proven.

    Raises OSError when we have no room for descriptors: that says nothing about the life.
    """
    if not slot.init_host_pid:
        return None, Fact(gone=True)
    if slot.handle:
        try:
            return _alive(_pidfd.reopen(slot.handle, own_pidfd))
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.ESRCH):
                return None, Fact(gone=True)
            raise_for_room(error)
    try:
        pidfd = os.pidfd_open(slot.init_host_pid)
    except OSError as error:
        raise_for_room(error)
        # EINVAL, ENOENT: a thread of somebody has the number.
        gone = error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT)
        return None, Fact(gone=gone, why=errno_name(error.errno or errno.EIO))
    there, noted = _inode(pidfd), slot.pidfd_inode
    if not noted or not there:  # zero: this kernel, or the one /proc that we see, does not say
        there, noted = start_time(slot.init_host_pid), slot.init_start_time
    if there and there == noted:
        return _alive(pidfd)
    os.close(pidfd)
    return None, Fact(gone=True) if there and noted else Fact(why="unproven")


def raise_for_room(error: OSError) -> None:
    """Raises the error again if it is about us and not about a life."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error


def _alive(pidfd: int) -> tuple[int | None, Fact]:
    """A pidfd that is readable is of a process that has ended, reaped or not."""
    if ended(pidfd):
        # Our own child, if we are what its supervisor exec'ed: then nobody else would reap it.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        os.close(pidfd)
        return None, Fact(gone=True)
    return pidfd, Fact(holds=True)


def ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


class Found(NamedTuple):
    """What there is in a file of slots. strange: a line for each that was set aside, torn or forged. elsewhere: those
    of another boot or PID namespace, and which: their numbers mean nothing here."""

    slots: list[record.Slot]
    elsewhere: list[tuple[record.Slot, str]]
    strange: list[str]


class Lives:
    """The file of slots, ours while the directory's lock is. epoch: what is noted as its writer's. Raises OSError."""

    def __init__(self, path: Path, epoch: int) -> None:
        self._path = path
        self.epoch = epoch
        self._boot_id = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
        self._pidns = os.stat("/proc/self/ns/pid").st_ino
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._pairs: dict[tuple[str, int], tuple[int, int]] = {}  # life -> its pair, and the half written last
        self._free: list[int] = []
        self._stale: list[int] = []
        self._size = os.fstat(self._fd).st_size // _PAIR
        self._sequence = 0

    def close(self) -> None:
        os.close(self._fd)

    def read(self) -> Found:
        """What is noted, the better half of each pair. Raises ControlError for notes of a later version."""
        found = Found([], [], [])
        for pair in range(self._size):
            data = os.pread(self._fd, _PAIR, pair * _PAIR)
            slot, half = self._better(data)
            if slot is None or place_of(slot.worker) is None or (slot.worker, slot.generation) in self._pairs:
                if any(data):
                    found.strange.append(self._set_aside(pair, data))
                self._free.append(pair)
                continue
            self._sequence = max(self._sequence, slot.sequence)
            elsewhere = self._elsewhere(slot)
            if elsewhere:
                self._stale.append(pair)
                found.elsewhere.append((slot, elsewhere))
                continue
            self._pairs[slot.worker, slot.generation] = pair, half
            found.slots.append(slot)
        return found

    def _elsewhere(self, slot: record.Slot) -> str:
        """Why the numbers in a slot mean nothing here; empty when they do."""
        if slot.boot_id != self._boot_id:
            return "reboot"
        return "" if slot.pidns_inode == self._pidns else "pid-namespace"

    def _better(self, pair: bytes) -> tuple[record.Slot | None, int]:
        """(the slot of a pair that counts, which half it is)."""
        halves = pair[: record.SLOT_SIZE], pair[record.SLOT_SIZE :]
        one, other = map(record.decode_slot, halves)
        for half, slot in zip(halves, (one, other), strict=True):
            if slot is None and record.is_later_slot(half):
                raise ControlError(
                    "version",
                    f"{self._path} was written by a later version of nssup, whose workers this one cannot take over",
                    hint="install that version again; this one can start when its workers are stopped",
                )
        if other is None or (one is not None and one.sequence > other.sequence):
            return one, 0
        return other, 1

    def _set_aside(self, pair: int, data: bytes) -> str:
        aside = self._path.with_name(f"lives.bad-{self.epoch}-{pair}")
        aside.write_bytes(data)
        self._put(bytes(_PAIR), pair * _PAIR)
        return f"slot {pair} of {self._path} is torn or forged: set aside as {aside.name}"

    def drop_stale(self) -> None:
        """What `read` found to be from elsewhere has been told, and is forgotten."""
        while self._stale:
            pair = self._stale.pop()
            self._put(bytes(_PAIR), pair * _PAIR)
            self._free.append(pair)

    def write(
        self, worker_id: str, generation: int, step: int, identity: Identity, body: bytes, spec_hash: bytes = bytes(8)
    ) -> None:
        """Note a life, before what is noted is done. Raises OSError when it cannot be; nothing is lost then."""
        known = self._pairs.get((worker_id, generation))
        pair, half = known or (self._take(), 1)
        self._sequence += 1
        slot = record.Slot(
            step,
            self._sequence,
            self._boot_id,
            self.epoch,
            generation,
            worker_id,
            self._pidns,
            identity.start_time,
            identity.pidfd_inode,
            identity.init_host_pid,
            identity.handle,
            spec_hash,
            body,
        )
        half = 1 - half
        try:
            self._put(record.encode_slot(slot), pair * _PAIR + half * record.SLOT_SIZE)
        except OSError:
            if known is None:
                self._free.append(pair)
            raise
        self._pairs[worker_id, generation] = pair, half

    def forget(self, worker_id: str, generation: int) -> None:
        """The life needs no note any more. Raises OSError, and then the note is still there."""
        known = self._pairs.get((worker_id, generation))
        if known is not None:
            self._put(bytes(_PAIR), known[0] * _PAIR)
            del self._pairs[worker_id, generation]
            self._free.append(known[0])

    def _put(self, data: bytes, at: int) -> None:
        if os.pwrite(self._fd, data, at) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _take(self) -> int:
        if not self._free:
            os.posix_fallocate(self._fd, self._size * _PAIR, _GROW)
            self._free = list(range(self._size + _GROW // _PAIR - 1, self._size - 1, -1))
            self._size += _GROW // _PAIR
        return self._free.pop()
