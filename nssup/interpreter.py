"""Inside a worker of an Executor: an interpreter that takes calls from its stdin, a socket, and answers there.

It imports as little as it can: its start is what a new worker costs. Frames both ways: length (u64, little-endian),
kind (one byte), then so many bytes. The parent sends SETUP once and then CALL after CALL; nobody else speaks this.
"""

import os
import pickle
import socket
import struct
import traceback

HEAD = struct.Struct("<QB")

SETUP, CALL = 0, 1  # from the parent: a pickled Setup; a pickled (function, args, kwargs)
READY, RESULT, ERROR, UNFIT = 0, 1, 2, 3  # from here; UNFIT: as ERROR, of the initializer or of what comes before it

# Beside the answer: processes that the call started are still there; it ended by a MemoryError.
LEFT, MEMORY = 0x40, 0x80
KIND = 0x0F

# Shared mappings are no data of a process (getrlimit(2), RLIMIT_DATA); so much of them a worker may have all the same.
SHARED = 1 << 30

_reserve = bytearray(1 << 20)  # given back when there is no memory left to say so
_NO_MEMORY = pickle.dumps((pickle.dumps(MemoryError()), ""))


class Remote(Exception):
    """Where an exception was raised in a worker: the cause of the exception here, for its text alone."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return self.text


def frame(kind: int, payload: bytes) -> bytes:
    return HEAD.pack(len(payload), kind) + payload


def main() -> None:
    """Takes calls until the parent closes its end."""
    connection = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)  # what a call reads or closes is not our connection
    os.close(null)
    buffer = bytearray()
    try:
        _prepare(_next(connection, buffer))
    except BaseException as error:
        connection.sendall(frame(UNFIT, _told(error)))
        return
    connection.sendall(frame(READY, b""))
    while call := _next(connection, buffer):
        connection.sendall(_answer(call))
        del call


def _next(connection: socket.socket, buffer: bytearray) -> bytes:
    """The payload of the next frame; empty at the end."""
    while len(buffer) < HEAD.size:
        data = connection.recv(1 << 16)
        if not data:
            return b""
        buffer += data
    length = HEAD.unpack_from(buffer)[0]
    end = HEAD.size + length
    while len(buffer) < end:
        data = connection.recv(min(max(end - len(buffer), 1 << 16), 1 << 24))
        if not data:
            return b""
        buffer += data
    payload = bytes(memoryview(buffer)[HEAD.size : end])
    del buffer[:end]
    return payload


def _prepare(setup: bytes) -> None:
    import multiprocessing.spawn

    preparation, memory, initial = pickle.loads(setup)
    multiprocessing.spawn.prepare(preparation)
    if memory is not None:
        _limit(memory)
    initializer, arguments = pickle.loads(initial)
    if initializer is not None:
        initializer(*arguments)


def _limit(memory: int) -> None:
    """So many bytes more than now, and no core for what dies of it."""
    import resource

    with open("/proc/self/status") as status:
        sizes = {name: value for name, _, value in (line.partition(":") for line in status)}
    data = int(sizes["VmData"].split()[0]) * 1024 + memory
    everything = int(sizes["VmSize"].split()[0]) * 1024 + memory + SHARED
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    resource.setrlimit(resource.RLIMIT_AS, (everything, everything))


def _answer(call: bytes) -> bytes:
    kind = RESULT
    try:
        function, args, kwargs = pickle.loads(call)
        payload = pickle.dumps(function(*args, **kwargs), pickle.HIGHEST_PROTOCOL)
    except MemoryError as error:
        kind, payload = ERROR | MEMORY, _told_without_memory(error)
    except BaseException as error:
        kind, payload = ERROR, _told(error)
    function = args = kwargs = None  # nothing of a call is kept while the next one is waited for
    return frame(kind | (LEFT if _others() else 0), payload)


def _told_without_memory(error: MemoryError) -> bytes:
    _reserve.clear()
    traceback.clear_frames(error.__traceback__)
    try:
        return _told(error)
    except MemoryError:
        return _NO_MEMORY


def _told(error: BaseException) -> bytes:
    """The exception, pickled by itself: whatever cannot be read of it in the parent, its text can."""
    text = "".join(traceback.format_exception(error))
    try:
        pickled = pickle.dumps(error, pickle.HIGHEST_PROTOCOL)
    except BaseException as unpicklable:
        try:
            pickled = pickle.dumps(unpicklable, pickle.HIGHEST_PROTOCOL)
        except BaseException:
            pickled = pickle.dumps(pickle.PicklingError(f"{type(error).__name__} cannot be pickled"))
    return pickle.dumps((pickled, f'\n"""\n{text}"""'))


def _others() -> bool:
    """Whether anybody but init and us is in our PID namespace, whose own /proc this is."""
    own = ("1", str(os.getpid()))
    return any(name.isdigit() and name not in own for name in os.listdir("/proc"))
