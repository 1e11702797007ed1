"""nssup.Executor: a concurrent.futures.Executor whose every worker is a Python interpreter in namespaces of its own.

And AsyncExecutor, its twin for asyncio.
"""

import asyncio
import concurrent.futures
import functools
import itertools
import os
import pickle
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, Unpack

from nssup.crew import Call, Crew, Setting
from nssup.hub import insist
from nssup.process import SpecKeys
from nssup.units import size

P = ParamSpec("P")
T = TypeVar("T")


class Executor(concurrent.futures.Executor):
    """Calls of Python functions, each worker an interpreter in namespaces of its own. Where ProcessPoolExecutor fits,
    it does: functions, arguments and results are pickled, main modules are found as multiprocessing's spawn does it.

    What is different: a call that is late, cancelled or dead by a signal ends for certain, with all that it started,
    and takes only its worker with it; what it leaves running when it returns is ended before its result is told. The
    future says what happened: CallTimeout, MemoryLimit, WorkerDied. Workers are started when they are needed.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        timeout: float | None = None,
        memory: int | str | None = None,
        max_tasks: int | None = None,
        spares: int = 0,
        **spec: Unpack[SpecKeys],
    ) -> None:
        """max_workers: calls at a time; None: as many as there are processors. initializer: called in each new worker.

        timeout: seconds that each call may take, from when it begins. memory: bytes, or a text with a unit, that each
        process of a worker may use on top of what its interpreter uses before the initializer; shared mappings may have
        1G more. max_tasks: calls until a worker is replaced. spares: interpreters that are kept ready to replace
        others. spec: as for nssup.run.

        Raises ValueError, SpecError, and PicklingError where the initializer cannot be pickled.
        """
        workers = (os.cpu_count() or 1) if max_workers is None else max_workers
        for name, value, least in (("max_workers", workers, 1), ("max_tasks", max_tasks, 1), ("spares", spares, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        bound = size(memory) if isinstance(memory, str) else memory
        setting = Setting(workers, spares, max_tasks, bound, initializer, initargs, spec)
        self.crew = Crew(setting)
        self._timeout = timeout
        weakref.finalize(self, self.crew.close).atexit = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Call[T]:
        """As Executor.submit. Raises ExecutorBroken, and RuntimeError after shutdown."""
        return self.submit_within(self._timeout, fn, *args, **kwargs)

    def submit_within(self, timeout: float | None, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Call[T]:
        """As submit, with a time limit of its own, in seconds; None: none."""
        call: Call[T] = Call(self.crew, b"", timeout)
        try:
            call._payload = pickle.dumps((fn, args, kwargs), pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # as ProcessPoolExecutor has it, which pickles later
            call.set_running_or_notify_cancel()
            call.set_exception(error.with_traceback(None))  # which would keep the arguments
            return call
        self.crew.submit(call)
        return call

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """As Executor.map. timeout: until the results are there; chunksize: so many items make one call, whose time
        limit is for all of them."""
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        chunks = _chunks(zip(*iterables, strict=False), chunksize)
        deadline = None if timeout is None else time.monotonic() + timeout
        calls = deque(self.submit(_each, fn, chunk) for chunk in chunks)
        return _results(calls, deadline)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As Executor.shutdown."""
        self.crew.close(cancel_futures)
        if wait:
            self.crew.join()

    def kill(self) -> None:
        """As shutdown, but calls that run are cancelled too. Returns when every worker and its tree are gone."""
        self.crew.kill()
        self.crew.join()


def _chunks(items: Iterator[tuple[Any, ...]], length: int) -> Iterator[tuple[tuple[Any, ...], ...]]:
    while chunk := tuple(itertools.islice(items, length)):
        yield chunk


def _each(fn: Callable[..., T], chunk: Iterable[tuple[Any, ...]]) -> list[T]:
    return [fn(*args) for args in chunk]


def _results(calls: "deque[Call[list[T]]]", deadline: float | None) -> Iterator[T]:
    """Whoever stops asking, or is told of a failure, needs none of the others."""
    try:
        while calls:
            left = None if deadline is None else deadline - time.monotonic()
            results = calls[0].result(left)
            calls.popleft()
            results.reverse()
            while results:
                yield results.pop()
    finally:
        for call in calls:
            call.cancel()


class AsyncExecutor:
    """Executor for asyncio: what is awaited is cancelled for certain. Use as `async with`: left by its end, it waits
    for the calls that are running; left by an exception or a cancellation, it ends them. Nothing is left either way.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        timeout: float | None = None,
        memory: int | str | None = None,
        max_tasks: int | None = None,
        spares: int = 0,
        **spec: Unpack[SpecKeys],
    ) -> None:
        """See Executor."""
        self._executor = Executor(
            max_workers,
            initializer=initializer,
            initargs=initargs,
            timeout=timeout,
            memory=memory,
            max_tasks=max_tasks,
            spares=spares,
            **spec,
        )
        self._timeout = timeout

    async def __aenter__(self) -> "AsyncExecutor":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._executor.crew.kill()
        await self.shutdown()

    async def call(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What fn returns, or raises; or CallTimeout, MemoryLimit, WorkerDied, ExecutorBroken.

        Cancelled, the call is killed with all that it started; when they are gone, CancelledError is raised.
        """
        return await self.call_within(self._timeout, fn, *args, **kwargs)

    async def call_within(self, timeout: float | None, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """As call, with a time limit of its own, in seconds; None: none."""
        call = self._executor.submit_within(timeout, fn, *args, **kwargs)
        await _done(call)
        return call.result()

    async def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], in_order: bool = True
    ) -> AsyncGenerator[T, None]:
        """The results of fn over the items, in their order or as they are done. Items are taken as workers get free:
        the iterables may be endless. Whoever stops asking, or is told of a failure, ends the calls that are begun."""
        loop, items = asyncio.get_running_loop(), zip(*iterables, strict=False)
        done: asyncio.Queue[Call[T]] = asyncio.Queue()
        begun: dict[Call[T], None] = {}

        def tell(call: Call[T], _: object) -> None:
            loop.call_soon_threadsafe(done.put_nowait, call)

        def begin(most: int) -> None:
            for args in itertools.islice(items, most):
                call = self._executor.submit(fn, *args)
                begun[call] = None
                call.add_done_callback(functools.partial(tell, call))

        try:
            begin(2 * self._executor.crew.setting.max_workers)
            while begun:
                if in_order:
                    await _done(call := next(iter(begun)))
                else:
                    call = await done.get()
                del begun[call]
                begin(1)
                yield call.result()
        finally:
            for call in begun:
                call.cancel()
            for call in begun:
                await _done(call)

    async def shutdown(self, *, cancel_futures: bool = False) -> None:
        """No more calls; returns when those that were begun are done and nothing is left. Cancelled, it ends them."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        self._executor.crew.close(cancel_futures)
        self._executor.crew.when_over(lambda: loop.call_soon_threadsafe(over.set))
        await insist(over, self._executor.crew.kill)
        self._executor.crew.join()  # its thread has nothing left to do but to end


async def _done(call: Call[Any]) -> None:
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    call.add_done_callback(lambda _: loop.call_soon_threadsafe(done.set))
    await insist(done, call.cancel)
