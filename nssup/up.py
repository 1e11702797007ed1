"""`nssup up`: a supervisor with its control socket in the foreground, until it is told to end.

SIGTERM and SIGINT stop everything in reverse order, a second SIGINT skips the grace. SIGHUP is reserved for `apply`.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from nssup.config import Config
from nssup.errors import ExitCode
from nssup.events import Event
from nssup.listener import listen
from nssup.loop import Supervisor


def serve(config: Config, for_seconds: float | None = None) -> int:
    """Run the pools of config. Returns the exit code: an essential pool's own; 1 if a pool failed for good, naming it.

    for_seconds: end by itself after so long. Raises ControlError (directories, socket), SpecError (accounts).
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(config, for_seconds))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        print("nssup: uvloop is not installed: running on asyncio", file=sys.stderr)
        return asyncio.new_event_loop
    return uvloop.new_event_loop


class _Verdict:
    """What the exit code will be, gathered from events."""

    def __init__(self, config: Config, supervisor: Supervisor) -> None:
        self._essential = {name for name, spec in config.pools.items() if spec.essential}
        self._supervisor = supervisor
        self._asked = False
        self.failed: dict[str, str] = {}
        self.essential_code: int | None = None

    def end(self) -> None:
        """The end was asked for: what ends from now on is not the workers' doing."""
        self._asked = True
        self._supervisor.shutdown()

    def note(self, event: Event) -> None:
        if event.worker is None or event.event not in ("failed", "finished", "launched"):
            return
        pool = event.worker.partition("/")[0]
        if event.event == "failed":
            self.failed[event.worker] = event.reason or "failed"
        elif event.event == "launched":
            self.failed.pop(event.worker, None)
        if pool in self._essential and event.event != "launched" and not self._asked:
            self.essential_code = _code_of(event)
            self.end()

    def exit_code(self) -> int:
        if self.essential_code is not None:
            return self.essential_code
        for worker, reason in self.failed.items():
            print(f"nssup: {worker} failed for good: {reason}", file=sys.stderr)
        return ExitCode.FAILED if self.failed else ExitCode.OK


def _code_of(event: Event) -> int:
    """An essential worker's code as a shell would tell it."""
    if event.exit is not None and event.exit.code is not None:
        return event.exit.code
    if event.exit is not None and event.exit.signal is not None:
        return 128 + event.exit.signal
    return ExitCode.FAILED


async def _serve(config: Config, for_seconds: float | None) -> int:
    async with Supervisor(config.supervisor, stderr="text" if sys.stderr.isatty() else "json") as supervisor:
        verdict = _Verdict(config, supervisor)
        supervisor.subscribe(verdict.note)
        with _signals(verdict, supervisor), contextlib.ExitStack() as ended:
            socket = listen(config.supervisor.socket, lock_held=True)  # if it is not to be had, nothing is started
            ended.callback(socket.close)
            supervisor.add_pools(config.pools.values())
            if for_seconds is not None:
                ended.callback(asyncio.get_running_loop().call_later(for_seconds, verdict.end).cancel)
            await asyncio.sleep(0)  # the first launches go before the imports of the control side
            from nssup.ctl import ControlServer

            async with ControlServer(supervisor, socket):
                await supervisor.wait_shutdown()
                verdict.end()
                if not supervisor.leaving:
                    await supervisor.stop_all()
    return verdict.exit_code()


@contextlib.contextmanager
def _signals(verdict: _Verdict, supervisor: Supervisor) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    interrupts = 0

    def interrupted() -> None:
        nonlocal interrupts
        interrupts += 1
        verdict.end()
        if interrupts > 1:
            supervisor.kill_all()

    def reload() -> None:
        supervisor.workers.note("reload_refused", supervisor.now(), reason="apply is not in this version")

    loop.add_signal_handler(signal.SIGTERM, verdict.end)
    loop.add_signal_handler(signal.SIGINT, interrupted)
    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        yield
    finally:
        for signo in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(signo)
