"""The wire between supervisor and init: the bytes of native/wire.h, from the supervisor's side.

One datagram holds one or more messages: header {magic, version, type, length}, payload, zeroes up to a multiple of 8.
Fields are only ever appended, so a shorter payload (version N-1) reads as if zeroes followed and a longer one is cut;
unknown types and strange versions are counted and skipped, never an error. docs/contracts.md (a). Pure.
"""

import enum
import struct
from typing import Any, NamedTuple

from nssup.errors import errno_name

MAGIC = 0x534E
VERSION = 1  # understood, and the one before
SPOKEN = 1  # said: never above what a neighbouring version understands
TOKEN_SIZE = 16
RECORD_INLINE_MAX = 32768
RECORD_MAX = 16777216
SOCKETS_FIRST = 16  # where init keeps the listening sockets that came over the line
SOCKETS_MAX = 32
OWN_FIRST = 48  # from here on what init opens for itself
STATUS_SIZE = 120

_HEADER = struct.Struct("<HBBI")


class Fd(enum.IntEnum):
    """Descriptors that init is born with (0-2 are /dev/null)."""

    LINE = 3
    FAR = 4
    SUPERVISOR = 5
    STDOUT_LOG = 6
    STDERR_LOG = 7
    WORKER_STDIN = 8
    WORKER_STDOUT = 9
    WORKER_STDERR = 10
    STAGING = 11
    INIT_EXE = 12
    COUNT = 13


class Type(enum.IntEnum):
    HELLO = 1
    RECORD = 2
    GO = 3
    STATE = 4
    STARTED = 5
    FAILED = 6
    SIGNAL = 7
    SPAWN = 8
    POLICY = 9
    EXITED = 10
    EMPTY = 11
    ACK = 12
    NOTIFY = 13
    PING = 14
    SOCKET = 15
    CANCEL = 16
    DONE = 17


class Policy(enum.IntEnum):
    KEEP = 0
    DIE = 1


class Phase(enum.IntEnum):
    WAITING = 0
    SETUP = 1
    RUNNING = 2
    FAILED = 3
    EXITED = 4
    EMPTY = 5


SIGNAL_MAIN = 0
SIGNAL_ALL = -1


class Step(enum.IntEnum):
    """Where a launch can fail; the lower-case name is what users read in `setup-failed:STEP:ERRNO`."""

    NONE = 0
    LINE = 1
    PIPES = 2
    CLONE = 3
    EXEC_INIT = 4
    ID_MAPS = 5
    IDENTITY = 6
    SOCKETS = 7
    RECORD = 16
    GO = 17
    PID_ONE = 18
    PROPAGATION = 19
    MOUNT_PROC = 20
    HOSTNAME = 21
    DUMPABLE = 22
    CLONE_WORKER = 23
    NOTIFY = 24
    SESSION = 32
    STDIO = 33
    TTY = 34
    RLIMITS = 35
    GROUPS = 36
    GROUP = 37
    USER = 38
    CAPABILITIES = 39
    DIRECTORY = 40
    SIGNALS = 41
    DESCRIPTORS = 42
    EXEC = 43


def failure_reason(step: int, errno: int) -> str:
    """The reason that users see: `exec-failed:ENOENT` or `setup-failed:mount_proc:EPERM`."""
    if step == Step.EXEC:
        return f"exec-failed:{errno_name(errno)}"
    try:
        name = Step(step).name.lower()
    except ValueError:
        name = str(step)
    return f"setup-failed:{name}:{errno_name(errno)}"


# --- what the supervisor says ------------------------------------------------------------------------------------

_PADDING = (b"", b"\0" * 7, b"\0" * 6, b"\0" * 5, b"\0" * 4, b"\0" * 3, b"\0" * 2, b"\0")
_GO = struct.Struct("<II16s")
_SIGNAL = struct.Struct("<IiiI")
_SPAWN = struct.Struct("<IIIIII")
_TWO = struct.Struct("<II")
_SIZE = struct.Struct("<Q")


def message(kind: int, payload: bytes, version: int = SPOKEN) -> bytes:
    """One message, padded."""
    return _HEADER.pack(MAGIC, version, kind, len(payload)) + payload + _PADDING[len(payload) % 8]


def hello(epoch: int, policy: Policy) -> bytes:
    return message(Type.HELLO, _TWO.pack(epoch, policy))


def record_inline(record: bytes) -> bytes:
    return message(Type.RECORD, record)


def record_in_memfd(size: int) -> bytes:
    """Announces a record of size bytes in the sealed memfd that travels with it."""
    return message(Type.RECORD, _SIZE.pack(size))


def socket() -> bytes:
    """Announces a listening socket, which travels with it; before the record, in the program's order."""
    return message(Type.SOCKET, b"")


def go(epoch: int, policy: Policy, token: bytes) -> bytes:
    return message(Type.GO, _GO.pack(epoch, policy, token))


def signal(epoch: int, signo: int, target: int, stop_steps: int = 0) -> bytes:
    """target: SIGNAL_MAIN, SIGNAL_ALL, or a namespace PID. stop_steps: steps of the stop sequence begun with this one,
    0 when it is no part of it."""
    return message(Type.SIGNAL, _SIGNAL.pack(epoch, signo, target, stop_steps))


def spawn(
    epoch: int, number: int, argv: bytes, candidates: bytes, *, timeout_ms: int = 0, stop_steps: int = 0
) -> bytes:
    """Run a command beside the program. number: ours for it, which Done repeats. argv, candidates: lists as in the
    launch record. timeout_ms: killed after that, 0: never. stop_steps: as in `signal`."""
    head = _SPAWN.pack(epoch, number, stop_steps, timeout_ms, len(argv), len(candidates))
    return message(Type.SPAWN, head + argv + _PADDING[len(argv) % 8] + candidates)


def cancel(epoch: int, number: int) -> bytes:
    return message(Type.CANCEL, _TWO.pack(epoch, number))


def policy_change(epoch: int, policy: Policy) -> bytes:
    return message(Type.POLICY, _TWO.pack(epoch, policy))


def ack(epoch: int, generation: int) -> bytes:
    return message(Type.ACK, _TWO.pack(epoch, generation))


def ping(epoch: int) -> bytes:
    return message(Type.PING, _TWO.pack(epoch, 0))


# --- what init (and the worker, before its exec) says ---------------------------------------------------------------


class Exit(NamedTuple):
    """How the program ended. code: CLD_EXITED 1, CLD_KILLED 2, CLD_DUMPED 3, 0 while it has not; boottime_ns: when."""

    code: int = 0
    status: int = 0
    user_us: int = 0
    system_us: int = 0
    max_rss_bytes: int = 0
    boottime_ns: int = 0


class Started(NamedTuple):
    """The program runs (without init: is about to exec). host_pid: translated by the kernel from the credentials."""

    generation: int
    ns_pid: int
    host_pid: int


class Failed(NamedTuple):
    generation: int
    step: int
    errno: int


class Exited(NamedTuple):
    generation: int
    exit: Exit


class Empty(NamedTuple):
    generation: int


class Flag(enum.IntFlag):
    """What holds of a program by its own word. READY: also by the newline on its ready pipe. RELOADING: with no READY=1
    since. ENDED: the ready pipe has ended without its newline."""

    READY = 1
    STOPPING = 2
    RELOADING = 4
    ENDED = 8


class Notified(NamedTuple):
    """What the program last said of itself, and how often; zero where it said nothing. Counters go round after 2^32.

    flags: of Flag. taken: datagrams that came; strangers: those from outside its PID namespace, broken: those too long
    or with a NUL inside, neither of which was read. readies: READY=1 and the newline. main_ns_pid, error: MAINPID= and
    ERRNO= as they were said: nobody has looked whether there is such a process. *_ns: CLOCK_BOOTTIME of the last one,
    0 for none. extend_us: EXTEND_TIMEOUT_USEC=, said at extend_ns. monotonic_us: MONOTONIC_USEC=, CLOCK_MONOTONIC when
    a reload began. status: STATUS=, at most STATUS_SIZE raw bytes: who shows them takes out what steers a terminal.
    watchdog_us: WATCHDOG_USEC=.
    """

    flags: int = 0
    taken: int = 0
    strangers: int = 0
    broken: int = 0
    readies: int = 0
    reloads: int = 0
    watchdogs: int = 0
    triggers: int = 0
    main_ns_pid: int = 0
    error: int = 0
    ready_ns: int = 0
    watchdog_ns: int = 0
    extend_us: int = 0
    extend_ns: int = 0
    monotonic_us: int = 0
    status: bytes = b""
    watchdog_us: int = 0


class Notify(NamedTuple):
    """A hint that notified has changed. There is at most one on the line: it comes when all before it has been read."""

    generation: int
    notified: Notified


class State(NamedTuple):
    """init's whole state. step: of the failure, with errno; while the program runs, how many steps of the stop sequence
    have reached it. unknown: messages it did not understand so far."""

    generation: int
    epoch: int
    phase: int
    policy: int
    ns_pid: int
    step: int
    errno: int
    unknown: int
    exit: Exit
    notified: Notified = Notified()


class Done(NamedTuple):
    """A command has ended, or never ran: then step and errno say why. epoch: of the supervisor whose number it is."""

    generation: int
    epoch: int
    number: int
    timed_out: int
    step: int
    errno: int
    exit: Exit


Message = Done | Started | Failed | Exited | Empty | State | Notify

_STARTED = struct.Struct("<Ii")
_FAILED = struct.Struct("<IIiI")
_EXITED = struct.Struct("<IIiiQQQQ")
_DONE = struct.Struct("<IIIIIiiiQQQQ")
_NOTIFIED = struct.Struct("<IIIIIIIIiiQQQQQII120sQ")
_NOTIFY = struct.Struct("<II" + _NOTIFIED.format.removeprefix("<"))
_STATE = struct.Struct("<IIIIiIiIiiQQQQ" + _NOTIFIED.format.removeprefix("<"))


def _fit(layout: struct.Struct, data: bytes, at: int, length: int) -> tuple[Any, ...]:
    if length >= layout.size:
        return layout.unpack_from(data, at)
    return layout.unpack(data[at : at + length] + bytes(layout.size - length))


def _notified(f: tuple[Any, ...]) -> Notified:
    *values, status_length, _, status, watchdog_us = f
    return Notified._make((*values, status[:status_length], watchdog_us))


def _decode_one(kind: int, data: bytes, at: int, length: int, host_pid: int) -> Message | None:
    if kind == Type.STATE:
        f = _fit(_STATE, data, at, length)
        return State._make((*f[:8], Exit._make(f[8:14]), _notified(f[14:])))
    if kind == Type.STARTED:
        generation, ns_pid = _fit(_STARTED, data, at, length)
        return Started(generation, ns_pid, host_pid)
    if kind == Type.EXITED:
        f = _fit(_EXITED, data, at, length)
        return Exited(f[0], Exit._make(f[2:]))
    if kind == Type.EMPTY:
        return Empty(_fit(_TWO, data, at, length)[0])
    if kind == Type.FAILED:
        return Failed._make(_fit(_FAILED, data, at, length)[:3])
    if kind == Type.DONE:
        f = _fit(_DONE, data, at, length)
        return Done._make((*f[:6], Exit._make(f[6:])))
    if kind == Type.NOTIFY:
        f = _fit(_NOTIFY, data, at, length)
        return Notify(f[0], _notified(f[2:]))
    return None


def decode(datagram: bytes, host_pid: int, version: int = VERSION) -> tuple[list[Message], int]:
    """(the messages of one datagram, how many were not understood). host_pid: the sender's, 0 when unknown.

    Never raises: a namespace's init is not trusted with our life. What follows a broken header is one unknown more.
    """
    found: list[Message] = []
    unknown, at, end = 0, 0, len(datagram)
    while at < end:
        if end - at < 8:
            return found, unknown + 1
        magic, spoken, kind, length = _HEADER.unpack_from(datagram, at)
        at += 8
        if magic != MAGIC or length > end - at:
            return found, unknown + 1
        one = _decode_one(kind, datagram, at, length, host_pid) if version - 1 <= spoken <= version else None
        if one is None:
            unknown += 1
        else:
            found.append(one)
        at += (length + 7) & ~7
    return found, unknown
