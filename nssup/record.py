"""The launch record (what init is to do) and the life slot (what a supervisor notes of one life): their bytes.

docs/contracts.md (b), (c). Layouts of the record are native/wire.h's. Pure.
"""

import functools
import itertools
import struct
import zlib
from typing import NamedTuple

# --- launch record -----------------------------------------------------------------------------------------------

RECORD_MAGIC = 0x524C534E
RECORD_VERSION = 1
MUST = 1  # an init that does not know this field must refuse the record
UNLIMITED = 0xFFFFFFFFFFFFFFFF

FIELD_TOKEN = 1
FIELD_OPTIONS = 2
FIELD_ARGV = 3
FIELD_ENV = 4
FIELD_EXEC = 5
FIELD_DIRECTORY = 6
FIELD_HOSTNAME = 7
FIELD_IDENTITY = 8
FIELD_UMASK = 9
FIELD_RLIMITS = 10
FIELD_MOUNT_ID = 11
FIELD_SOCKETS = 15
FIELD_NOTIFY = 16

OPTION_INIT = 1
OPTION_MOUNT_NS = 2
OPTION_PROC = 4
OPTION_TTY = 8
OPTION_USER_NS = 16

WISH_SOCKET = 1
WISH_READY_FD = 2

_HEAD = struct.Struct("<IHHII")
_FIELD = struct.Struct("<HHI")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_RLIMIT = struct.Struct("<IIQQ")
_NOTIFY = struct.Struct("<II")
_SOCKETS = struct.Struct("<II")
_PADDING = (b"", b"\0" * 7, b"\0" * 6, b"\0" * 5, b"\0" * 4, b"\0" * 3, b"\0" * 2, b"\0")


DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def candidates(program: str, path: str) -> tuple[str, ...]:
    """The paths to try in order, as execvp(3): program itself if it holds a slash, else one for each part of path, an
    empty part meaning the working directory."""
    if "/" in program:
        return (program,)
    return tuple(f"{directory or '.'}/{program}" for directory in path.split(":"))


class Identity(NamedTuple):
    uid: int
    gid: int
    groups: tuple[int, ...]


class Notify(NamedTuple):
    """How a program may tell its init that it is ready, and more.

    directory: an existing one, absolute, in which the program finds the socket of sd_notify(3) as `socket`, and nothing
    else: a small file system is mounted over it inside. It takes the `mount` namespace; the program's user must be able
    to reach the directory. None: no socket. ready_fd: the number, 3 or more, as which the program has a pipe to write a
    newline to. None: no pipe.
    """

    directory: bytes | None = None
    ready_fd: int | None = None

    @property
    def socket(self) -> bytes | None:
        """What NOTIFY_SOCKET is to say."""
        return None if self.directory is None else self.directory + b"/notify"


class Plan(NamedTuple):
    """One life's launch, everything resolved. argv, env ("NAME=VALUE"), candidates (paths to try in order), directory
    and hostname are file-system encoded. rlimits: (resource number, soft, hard), UNLIMITED for no limit. identity None:
    the supervisor's own. die: the life ends with its supervisor. namespaces: names of spec.NAMESPACES. notify: read by
    init; without one the record is refused (`record`, EINVAL). sockets: how many descriptors the program is given, from
    3 on; a ready_fd comes behind them."""

    generation: int
    argv: tuple[bytes, ...]
    env: tuple[bytes, ...]
    candidates: tuple[bytes, ...]
    namespaces: frozenset[str]
    directory: bytes = b"/"
    hostname: bytes | None = None
    proc: bool = True
    init: bool = True
    tty: bool = False
    die: bool = True
    identity: Identity | None = None
    umask: int | None = None
    rlimits: tuple[tuple[int, int, int], ...] = ()
    notify: Notify | None = None
    sockets: int = 0


def _field(kind: int, data: bytes, flags: int = MUST) -> bytes:
    return _FIELD.pack(kind, flags, len(data)) + data + _PADDING[len(data) % 8]


def words(items: tuple[bytes, ...]) -> bytes:
    """A list as init reads it."""
    count = len(items)
    offsets = itertools.accumulate([len(item) + 1 for item in items[:-1]], initial=8 + 8 * (count + 1))
    return struct.pack(f"<II{count}QQ", count, 0, *(offsets if count else ()), 0) + b"\0".join(items) + b"\0"


def main_ns_pid(init: bool) -> int:
    """The namespace PID of a life's program: the first that is made under init, else PID 1 itself."""
    return 2 if init else 1


def options_of(plan: Plan) -> int:
    return (
        (OPTION_INIT if plan.init else 0)
        | (OPTION_MOUNT_NS if "mount" in plan.namespaces else 0)
        | (OPTION_PROC if plan.proc else 0)
        | (OPTION_TTY if plan.tty else 0)
        | (OPTION_USER_NS if "user" in plan.namespaces else 0)
    )


def _notify(notify: Notify) -> bytes:
    wishes = (0 if notify.directory is None else WISH_SOCKET) | (0 if notify.ready_fd is None else WISH_READY_FD)
    return _NOTIFY.pack(wishes, notify.ready_fd or 0) + (notify.directory or b"") + b"\0"


def encode(plan: Plan, token: bytes, mount_id: int) -> bytes:
    """The record's bytes. token: 16 bytes that GO repeats. mount_id: of the supervisor's root mount.

    Raises nothing: a Plan made from a valid spec can always be written.
    """
    what = _what(options_of(plan), mount_id, plan.argv)
    how = _how(plan.candidates, plan.directory, plan.hostname, plan.identity, plan.umask, plan.rlimits, plan.notify)
    body = _field(FIELD_TOKEN, token) + what + _field(FIELD_ENV, words(plan.env)) + how
    if plan.sockets:
        body += _field(FIELD_SOCKETS, _SOCKETS.pack(plan.sockets, main_ns_pid(plan.init)))
    return _HEAD.pack(RECORD_MAGIC, RECORD_VERSION, 0, _HEAD.size + len(body), plan.generation) + body


# Remembered, because mostly the lives of a pool differ in their environment alone.


@functools.lru_cache(maxsize=64)
def _what(options: int, mount_id: int, argv: tuple[bytes, ...]) -> bytes:
    return (
        _field(FIELD_OPTIONS, _U32.pack(options))
        + _field(FIELD_MOUNT_ID, _U64.pack(mount_id))
        + _field(FIELD_ARGV, words(argv))
    )


@functools.lru_cache(maxsize=64)
def _how(
    candidates: tuple[bytes, ...],
    directory: bytes,
    hostname: bytes | None,
    identity: Identity | None,
    umask: int | None,
    rlimits: tuple[tuple[int, int, int], ...],
    notify: Notify | None,
) -> bytes:
    fields = [_field(FIELD_EXEC, words(candidates))]
    if directory != b"/":
        fields.append(_field(FIELD_DIRECTORY, directory + b"\0"))
    if hostname is not None:
        fields.append(_field(FIELD_HOSTNAME, hostname + b"\0"))
    if identity is not None:
        uid, gid, groups = identity
        fields.append(_field(FIELD_IDENTITY, struct.pack(f"<{3 + len(groups)}I", uid, gid, len(groups), *groups)))
    if umask is not None:
        fields.append(_field(FIELD_UMASK, _U32.pack(umask)))
    if rlimits:
        limits = b"".join(_RLIMIT.pack(resource, 0, soft, hard) for resource, soft, hard in rlimits)
        fields.append(_field(FIELD_RLIMITS, limits))
    if notify is not None:
        fields.append(_field(FIELD_NOTIFY, _notify(notify)))
    return b"".join(fields)


# --- life slot -----------------------------------------------------------------------------------------------------

SLOT_SIZE = 512
SLOT_MAGIC = 0x4C53534E
SLOT_VERSION = 1

# magic, version, step, sequence, boot id, epoch, generation, PID namespace inode, init start time, pidfd inode,
# spec hash, init host PID, handle length, body length, handle, worker id, body; the last four bytes are the CRC-32.
_SLOT = struct.Struct("<IHHQ16sIIQQQ8siHH64s64s296s4x")
_CRC = struct.Struct("<I")
BODY_MAX = 296


class Slot(NamedTuple):
    """One life, and in the newest life's slot the worker, as its supervisor last knew them.

    step: one of SLOT_*. pidns_inode: of the supervisor's own PID namespace, in which the numbers mean something.
    init_start_time: as in proc(5) stat, clock ticks since boot. handle: the pidfs file handle of init's pidfd
    (name_to_handle_at(2)), empty where the kernel has none. spec_hash: 8 bytes. body: what `adopt.keep` wrote.
    """

    step: int
    sequence: int
    boot_id: bytes
    epoch: int
    generation: int
    worker: str
    pidns_inode: int = 0
    init_start_time: int = 0
    pidfd_inode: int = 0
    init_host_pid: int = 0
    handle: bytes = b""
    spec_hash: bytes = bytes(8)
    body: bytes = b""


SLOT_FREE, SLOT_SPAWNING, SLOT_RELEASED, SLOT_STOPPING, SLOT_OVER = range(5)


def encode_slot(slot: Slot) -> bytes:
    """Exactly SLOT_SIZE bytes. Raises ValueError when a field does not fit."""
    name = slot.worker.encode()
    if len(name) > 64 or len(slot.handle) > 64 or len(slot.body) > BODY_MAX:
        raise ValueError("life slot: a field is too long")
    if len(slot.spec_hash) != 8 or len(slot.boot_id) != 16:
        raise ValueError("life slot: a field has not its length")
    body = _SLOT.pack(
        SLOT_MAGIC,
        SLOT_VERSION,
        slot.step,
        slot.sequence,
        slot.boot_id,
        slot.epoch,
        slot.generation,
        slot.pidns_inode,
        slot.init_start_time,
        slot.pidfd_inode,
        slot.spec_hash,
        slot.init_host_pid,
        len(slot.handle),
        len(slot.body),
        slot.handle,
        name,
        slot.body,
    )
    return body + _CRC.pack(zlib.crc32(body))


def _is_whole(data: bytes) -> bool:
    return len(data) == SLOT_SIZE and _CRC.unpack_from(data, SLOT_SIZE - _CRC.size)[0] == zlib.crc32(data[: -_CRC.size])


def is_later_slot(data: bytes) -> bool:
    """Whether this is a slot that only a later version can read. Never raises."""
    return _is_whole(data) and _SLOT.unpack_from(data)[0] == SLOT_MAGIC and _SLOT.unpack_from(data)[1] > SLOT_VERSION


def decode_slot(data: bytes) -> Slot | None:
    """The slot, or None when it is free, torn, of another version, or not ours. Never raises."""
    if not _is_whole(data):
        return None
    magic, version, step, sequence, boot_id, epoch, generation, *rest = _SLOT.unpack_from(data)
    if magic != SLOT_MAGIC or not SLOT_VERSION - 1 <= version <= SLOT_VERSION or step == SLOT_FREE:
        return None
    pidns, started, inode, spec_hash, host_pid, handle_length, body_length, handle, name, body = rest
    try:
        worker = name.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return None
    identity = (pidns, started, inode, host_pid, handle[:handle_length], spec_hash, body[:body_length])
    return Slot._make((step, sequence, boot_id, epoch, generation, worker, *identity))
