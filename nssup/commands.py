"""Commands that inits run beside their programs: numbers, and who waits for the end of each."""

import errno
from collections.abc import Callable, Sequence
from typing import TypeAlias

from nssup import wire
from nssup.clone import Process, exit_of_message
from nssup.errors import errno_name

Ended: TypeAlias = Callable[[wire.Done], None]


def failure(done: wire.Done) -> str | None:
    """Why a command counts as failed, as a reason; None: it ended well."""
    if done.step or done.errno:
        if done.step == wire.Step.EXEC:
            return f"exec-failed:{errno_name(done.errno)}"
        return f"not-run:{errno_name(done.errno)}"
    if done.timed_out:
        return "timeout"
    ended = exit_of_message(done.exit)
    return None if ended.code == 0 else ended.reason


def hindered(done: wire.Done) -> bool:
    """Whether it never ran for want of room, and not through anything of its own."""
    return done.step != wire.Step.EXEC and done.errno in (errno.EAGAIN, errno.ENOMEM, errno.ESRCH)


class Commands:
    """The commands of all lives of one supervisor. A life that is gone takes its own along, and nobody is called."""

    def __init__(self) -> None:
        self._waiting: dict[Process, dict[int, Ended]] = {}
        self._number = 0

    def run(
        self,
        process: Process,
        argv: tuple[bytes, ...],
        candidates: tuple[bytes, ...],
        ended: Ended,
        *,
        timeout: float,
        stdio: Sequence[int] = (),
        stop_steps: int = 0,
    ) -> int | None:
        """Have it run; its number, or None when it cannot even be asked for. `ended` is called later, if at all."""
        self._number = self._number % 0xFFFFFFFF + 1
        number = self._number
        if not process.spawn(number, argv, candidates, stdio, timeout=timeout, stop_steps=stop_steps):
            return None
        self._waiting.setdefault(process, {})[number] = ended
        return number

    def done(self, process: Process, told: wire.Done, epoch: int) -> None:
        """What init says of one. Not for us when another supervisor asked for it, or nobody waits any more."""
        if told.epoch != epoch:
            return
        ended = self._waiting.get(process, {}).pop(told.number, None)
        if ended is not None:
            ended(told)

    def abandon(self, process: Process, number: int) -> None:
        """Nobody waits for it any more; it is killed."""
        if self._waiting.get(process, {}).pop(number, None) is not None:
            process.cancel(number)

    def forget(self, process: Process) -> None:
        self._waiting.pop(process, None)
