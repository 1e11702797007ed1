"""What tests/test_executor.py calls in workers."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

initialized: Any = None


def add_one(number: int) -> int:
    return number + 1


def both(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
    return args, kwargs


def fail(text: str) -> NoReturn:
    raise ValueError(text)


def sleep(seconds: float, path: str | None = None) -> None:
    """Writes its namespace PID to path when it is begun, if there is one."""
    if path is not None:
        with Path(path).open("w") as fifo:
            fifo.write(f"{os.getpid()}\n")
    time.sleep(seconds)


def own_namespaces() -> tuple[int, list[str]]:
    return os.getpid(), [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "mnt", "uts", "ipc")]


def ns_pid() -> int:
    return os.getpid()


def pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def die_by(signo: int) -> None:
    os.kill(os.getpid(), signo)
    time.sleep(1000)


def exit_with(code: int) -> None:
    os._exit(code)


def leave_with(code: int) -> None:
    sys.exit(code)


def crash() -> None:
    ctypes.string_at(0)


def eat(size: int) -> int:
    return len(bytearray(size))


def eat_slowly() -> None:
    kept: list[Any] = []
    while True:
        kept.append([object() for _ in range(10_000)])


def survive(size: int) -> str:
    try:
        eat(size)
    except MemoryError:
        return "survived"
    return "had it"


def daemonize(path: str | None = None) -> str:
    """Leaves a process in a session of its own behind, that has let go of everything."""
    subprocess.run(["sh", "-c", "setsid sleep 1000 </dev/null >/dev/null 2>&1 &"], check=True)
    if path is not None:
        sleep(1000, path)
    return "left one"


def talk(size: int) -> bytes:
    return b"x" * size


def count(data: bytes) -> int:
    return len(data)


def remember(value: object) -> None:
    global initialized
    initialized = value


def remembered() -> object:
    return initialized


def count_calls() -> int:
    """Of this, in this worker."""
    global initialized
    initialized = (initialized or 0) + 1
    return int(initialized)


def read_stdin() -> str:
    return sys.stdin.read()


def close_everything() -> str:
    os.closerange(0, 1000)
    time.sleep(1000)
    return "never"


class Unpicklable:
    def __reduce__(self) -> NoReturn:
        raise TypeError("not to be pickled")


class Unreadable:
    """Can be pickled, and then not be read again."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return fail, ("cannot be read",)


class DeadlyToRead:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return exit_with, (1,)


class OddError(Exception):
    """Exceptions like this break many pools: what it is pickled with does not make it again."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def fail_oddly() -> NoReturn:
    raise OddError(1, 2)


def give_unpicklable() -> Unpicklable:
    return Unpicklable()


def give_unreadable() -> Unreadable:
    return Unreadable()


def raise_unpicklable() -> NoReturn:
    raise RuntimeError(Unpicklable())


TERM = signal.SIGTERM
