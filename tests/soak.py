#!/usr/bin/env python3
"""python tests/soak.py [run|executor] [COUNT]: many runs, or calls, of which some hang, fork, eat memory or die.

Of ten, one hangs until its time is over, one leaves a tree of processes behind, one eats memory against a limit, one
dies by a signal. Each must end as it should and be reported so; afterwards no process, descriptor, thread or task is
left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import calls

import nssup

HANG = "trap '' TERM INT HUP; setsid sleep 1000 & while :; do sleep 1000; done"
FORK = "for i in 1 2 3; do (setsid sh -c 'sleep 1000 & sleep 1000' </dev/null >/dev/null 2>&1 &); done; echo forked"
EAT = "head -c 300000000 /dev/zero | tail"  # which keeps the last line, and there is only one
MEMORY = 64 << 20
AT_ONCE = 16
KINDS = {0: "hang", 3: "fork", 5: "eat", 7: "die"}  # by the last digit; the others are as they should be


class Wrong(Exception):
    """Something did not end, or was not reported, as it should."""


async def one_run(number: int, mark: dict[str, str]) -> str:
    """What became of a run of its kind."""
    kind = KINDS.get(number % 10, "good")
    if kind == "hang":
        try:
            await nssup.run(["sh", "-c", HANG], timeout=0.3, env=mark)
        except nssup.RunTimeout as late:
            return (
                kind if late.result.returncode == -signal.SIGKILL and late.result.exit.timed_out else repr(late.result)
            )
        return "a hang ended"
    scripts = {"fork": FORK, "eat": EAT, "die": "kill -USR1 $$", "good": f"echo {number}; exit {number % 256}"}
    limits: dict[str, tuple[int | None, int | None]] = {"data": (MEMORY, MEMORY)} if kind == "eat" else {}
    result = await nssup.run(["sh", "-c", scripts[kind]], env=mark, rlimits=limits)
    said = result.returncode, result.stdout
    good = {
        "fork": said == (0, b"forked\n"),
        "eat": result.returncode == 1 and b"memory" in result.stderr,
        "die": said == (-signal.SIGUSR1, b"") and result.exit.signal == signal.SIGUSR1,
        "good": said == (number % 256, f"{number}\n".encode()),
    }
    return kind if good[kind] and not result.exit.timed_out else repr(result)


async def one_call(number: int, executor: nssup.AsyncExecutor) -> str:
    """What became of a call of its kind."""
    kind = KINDS.get(number % 10, "good")
    try:
        if kind == "hang":
            await executor.call_within(0.3, calls.sleep, 1000)
        elif kind == "fork":
            return kind if await executor.call(calls.daemonize) == "left one" else "fork?"
        elif kind == "eat":
            await executor.call(calls.eat, 2 * MEMORY)
        elif kind == "die":
            await executor.call(calls.die_by, signal.SIGUSR1)
        else:
            return kind if await executor.call(calls.add_one, number) == number + 1 else "wrong"
    except (nssup.CallTimeout, nssup.MemoryLimit, nssup.WorkerDied) as error:
        expected = {"hang": nssup.CallTimeout, "eat": nssup.MemoryLimit, "die": nssup.WorkerDied}.get(kind)
        right = type(error) is expected and getattr(error, "signal", signal.SIGUSR1) == signal.SIGUSR1
        return kind if right else f"{kind}: {error!r}"
    return f"{kind} ended"


async def many(what: str, count: int, mark: dict[str, str]) -> Counter[str]:
    """What became of all of them."""
    found: Counter[str] = Counter()
    todo = iter(range(count))

    async def some(executor: nssup.AsyncExecutor | None) -> None:
        for number in todo:
            found[await (one_run(number, mark) if executor is None else one_call(number, executor))] += 1

    if what == "run":
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(some(None))
    else:
        async with nssup.AsyncExecutor(4, memory=MEMORY, spares=2) as executor, asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(some(executor))
    if len(asyncio.all_tasks()) > 1:
        raise Wrong(f"tasks are left: {asyncio.all_tasks()}")
    return found


def marked(mark: dict[str, str]) -> list[int]:
    """The host PIDs of processes whose environment has the mark."""
    text, found = "".join(f"{name}={value}" for name, value in mark.items() if name == "NSSUP_SOAK").encode(), []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if int(name) != os.getpid() and text in Path(f"/proc/{name}/environ").read_bytes():
                found.append(int(name))
        except OSError:
            continue
    return found


def holdings() -> tuple[int, int]:
    """Open descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def soak(what: str, count: int, runner: Any = asyncio.run) -> Counter[str]:  # noqa: ANN401
    """What became of count runs, or calls: kind -> how many. Raises Wrong when one is not as it should be, or something
    is left."""
    mark = {**os.environ, "NSSUP_SOAK": uuid.uuid4().hex}
    os.environ["NSSUP_SOAK"] = mark["NSSUP_SOAK"]  # interpreters have this process's environment
    runner(many(what, 1, mark))
    before = holdings()
    found: Counter[str] = runner(many(what, count, mark))
    if holdings() != before:
        raise Wrong(f"descriptors and threads: {before} before, {holdings()} after")
    if left := marked(mark):
        raise Wrong(f"processes are left: {left}")
    expected = Counter(KINDS.get(number % 10, "good") for number in range(count))
    if found != expected:
        raise Wrong(f"not as they should be: {found - expected}")
    return found


def main(args: list[str]) -> None:
    what, count = args[0] if args else "run", int(args[1]) if len(args) > 1 else 10_000
    start = time.monotonic()
    found = soak(what, count)
    print(f"{count} of {what} in {time.monotonic() - start:.0f} s: {dict(found)}; nothing is left")


if __name__ == "__main__":
    main(sys.argv[1:])
