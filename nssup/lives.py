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
from nssup.adopt import Fact

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


def find(slot: record.Slot, own_pidfd: int) -> tuple[int | None, Fact]:
    """(a pidfd of the slot's init, what is so). The pidfd is the caller's; None when it is gone or cannot be proven."""
    if not slot.init_host_pid:
        return None, Fact(gone=True)
    if slot.handle:
        try:
            return _alive(_pidfd.reopen(slot.handle, own_pidfd))
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.ESRCH):
                return None, Fact(gone=True)
    try:
        pidfd = os.pidfd_open(slot.init_host_pid)
    except ProcessLookupError:
        return None, Fact(gone=True)
    except OSError as error:
        return None, Fact(why=errno.errorcode.get(error.errno or 0, "unknown"))
    if slot.pidfd_inode:
        ours: bool | None = _inode(pidfd) == slot.pidfd_inode
    elif slot.init_start_time:
        ours = start_time(slot.init_host_pid) == slot.init_start_time
    else:
        ours = None
    if ours:
        return _alive(pidfd)
    os.close(pidfd)
    return None, Fact(gone=True) if ours is False else Fact(why="unproven")


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


class Lives:
    """The file of slots, ours while the directory's lock is. Raises OSError."""

    def __init__(self, path: Path, epoch: int) -> None:
        self._path = path
        self._epoch = epoch
        self._boot_id = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
        self._pidns = os.stat("/proc/self/ns/pid").st_ino
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._pairs: dict[tuple[str, int], tuple[int, int]] = {}  # life -> its pair, and the half written last
        self._free: list[int] = []
        self._size = os.fstat(self._fd).st_size // _PAIR
        self._sequence = 0

    def close(self) -> None:
        os.close(self._fd)

    def read(self) -> tuple[list[record.Slot], list[str]]:
        """(the lives noted in this boot and PID namespace, the better of each pair; a line for what was set aside).

        Slots of another boot or PID namespace are forgotten: their numbers mean nothing here.
        """
        found, strange = [], []
        for pair in range(self._size):
            data = os.pread(self._fd, _PAIR, pair * _PAIR)
            halves = [record.decode_slot(data[: record.SLOT_SIZE]), record.decode_slot(data[record.SLOT_SIZE :])]
            slots = [slot for slot in halves if slot is not None]
            if not slots:
                if any(data):
                    strange.append(self._set_aside(pair, data))
                self._free.append(pair)
                continue
            slot = max(slots, key=lambda one: one.sequence)
            self._sequence = max(self._sequence, slot.sequence)
            half = int(slot is halves[1])
            if slot.boot_id != self._boot_id or slot.pidns_inode != self._pidns:
                self._free.append(pair)
                continue
            self._pairs[slot.worker, slot.generation] = pair, half
            found.append(slot)
        return found, strange

    def _set_aside(self, pair: int, data: bytes) -> str:
        aside = self._path.with_name(f"lives.bad-{self._epoch}-{pair}")
        aside.write_bytes(data)
        return f"slot {pair} of {self._path} is torn or forged: set aside as {aside.name}"

    def write(
        self, worker_id: str, generation: int, step: int, identity: Identity, body: bytes, spec_hash: bytes = bytes(8)
    ) -> None:
        """Note a life, before what is noted is done. Raises OSError when it cannot be; nothing is lost then."""
        pair, half = self._pairs.get((worker_id, generation)) or (self._take(), 1)
        self._sequence += 1
        slot = record.Slot(
            step,
            self._sequence,
            self._boot_id,
            self._epoch,
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
        self._pairs[worker_id, generation] = pair, half
        os.pwrite(self._fd, record.encode_slot(slot), pair * _PAIR + half * record.SLOT_SIZE)

    def forget(self, worker_id: str, generation: int) -> None:
        """The life needs no note any more."""
        known = self._pairs.pop((worker_id, generation), None)
        if known is not None:
            os.pwrite(self._fd, bytes(_PAIR), known[0] * _PAIR)
            self._free.append(known[0])

    def _take(self) -> int:
        if not self._free:
            os.posix_fallocate(self._fd, self._size * _PAIR, _GROW)
            self._free = list(range(self._size + _GROW // _PAIR - 1, self._size - 1, -1))
            self._size += _GROW // _PAIR
        return self._free.pop()
