"""nssup.Tasks: tasks for long-lived workers of any language, one line or one MessagePack value each way.

A worker reads a task from its stdin, writes one answer to its stdout, and waits for the next. It is in namespaces of
its own, and what happens to a task is known: an answer, a time limit that ended the worker's whole tree, or how the
worker died. A task is given to a worker once, unless retries are asked for.
"""

import asyncio
import functools
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack

import msgspec

from nssup.errors import NssupError
from nssup.events import Exit
from nssup.frames import BadFrame, Frames, Lines, Values
from nssup.hub import Life, hub, insist
from nssup.pipes import Sink
from nssup.process import Command, SpecKeys, Stdio, begin, failure, plan_of
from nssup.units import size

GRACE = 5.0  # seconds that a worker has to end by itself, after the end of its stdin or of its stdout

Protocol: TypeAlias = Literal["lines", "json", "msgpack"]


class TaskTimeout(NssupError, TimeoutError):
    """The task's time was over. The worker that had it and its whole tree are gone. seconds: how long it had."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the task was not done after {seconds:g} s")
        self.seconds = seconds


class TaskDied(NssupError):
    """The worker ended, or closed its stdout, before it answered. exit: how it ended."""

    def __init__(self, ended: Exit) -> None:
        super().__init__(f"the worker ended before it answered: {ended.reason}")
        self.exit = ended


class BadAnswer(NssupError):
    """What the worker wrote is no answer: too long, or not of the protocol. The worker and its tree are gone."""


class TasksClosed(NssupError):
    """The Tasks were left before the task was done."""


class _Codec(NamedTuple):
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    frames: Callable[[int], Frames]


def _line(task: object) -> bytes:
    if not isinstance(task, str) or "\n" in task:
        raise ValueError("a task is a text without a newline")
    return task.encode() + b"\n"


def _json_line(task: object) -> bytes:
    return msgspec.json.encode(task) + b"\n"


_CODECS: dict[str, _Codec] = {
    "lines": _Codec(_line, bytes.decode, Lines),
    "json": _Codec(_json_line, msgspec.json.decode, Lines),
    "msgpack": _Codec(msgspec.msgpack.encode, msgspec.msgpack.decode, Values),
}


class _Ended(Exception):
    """The worker's stdout has ended."""


class _Answers(Sink):
    """What a worker writes, as the one who waits for its answer gets it."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._spoilt: Exception | None = None  # why nothing that it writes can be an answer any more
        self._outcome: asyncio.Future[bytes] | None = None

    @property
    def spoilt(self) -> bool:
        return self._spoilt is not None

    def expect(self) -> "asyncio.Future[bytes]":
        """The next answer. Raises _Ended, BadFrame: there will be none."""
        self._outcome = asyncio.get_running_loop().create_future()
        if self._spoilt is not None:
            self._outcome.set_exception(self._spoilt)
        return self._outcome

    def take(self, data: bytes) -> None:
        if self._spoilt is not None:
            return
        try:
            for answer in self._frames.feed(data):
                if self._outcome is None or self._outcome.done():
                    raise BadFrame("a worker wrote more than its answer")
                self._outcome.set_result(answer)
        except BadFrame as error:
            self._spoil(error)

    def end(self) -> None:
        self._spoil(_Ended())

    def _spoil(self, why: Exception) -> None:
        self._spoilt = self._spoilt or why
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_exception(self._spoilt)


class _Worker(NamedTuple):
    life: Life
    answers: _Answers
    done: list[None]  # one for each task


class _Task:
    """over: its answer, or what became of it instead, is there; nothing is left of what was done for it."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.over = asyncio.Event()
        self.answer = b""
        self.error: BaseException | None = None
        self.outcome: asyncio.Future[bytes] | None = None
        self.withdrawn = False

    def withdraw(self) -> None:
        """Nobody wants it any more."""
        self.withdrawn = True
        if self.outcome is not None:
            self.outcome.cancel()


class Tasks:
    """Workers that answer tasks. Use as `async with`: left by its end, all that was asked is answered first, and the
    workers end at the end of their stdin; left by an exception or a cancellation, they are killed. Nothing is left
    either way.
    """

    def __init__(
        self,
        cmd: Command,
        *,
        workers: int = 1,
        protocol: Protocol = "lines",
        timeout: float | None = None,
        retries: int = 0,
        max_waiting: int | None = None,
        max_tasks: int | None = None,
        max_answer: int | str = "64M",
        stderr: Stdio = "inherit",
        env: Mapping[str, str] | None = None,
        **spec: Unpack[SpecKeys],
    ) -> None:
        """cmd, stderr, env, spec: as for nssup.launch. workers: so many, each started with its first task.

        protocol: `lines`: tasks and answers are texts; `json`: values, one a line; `msgpack`: values. timeout: seconds
        for an answer, from when the task is given to a worker; then its tree is killed. retries: how often a task is
        given to another worker when one was late or died. max_waiting: tasks that wait for a worker until `call` waits
        as well, by default as many as there are workers. max_tasks: until a worker is replaced. max_answer: bytes.

        Raises ValueError, SpecError.
        """
        if workers < 1 or retries < 0 or (max_tasks is not None and max_tasks < 1):
            raise ValueError("workers and max_tasks must be at least 1, retries at least 0")
        self._command, self._env, self._stderr, self._keys = cmd, env, stderr, spec
        self._workers = workers
        self._codec = _CODECS[protocol]
        self._timeout = timeout
        self._retries = retries
        self._max_tasks = max_tasks
        self._max_answer = size(max_answer) if isinstance(max_answer, str) else max_answer
        self._ahead = workers if max_waiting is None else max(max_waiting, 1)

    async def __aenter__(self) -> "Tasks":
        self._hub = hub()
        self._plan = plan_of(self._command, self._env, self._keys, self._hub.privileged)
        self._queue: asyncio.Queue[_Task] = asyncio.Queue(self._ahead)
        self._closed = self._hurried = False
        self._group = await asyncio.TaskGroup().__aenter__()
        self._runners = [
            self._group.create_task(self._run(), name=f"nssup-tasks-{number}") for number in range(self._workers)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._hurried = True
        try:
            if kind is None:
                await self._queue.join()
                self._hurried = False
        finally:
            for runner in self._runners:
                runner.cancel()
            try:
                await self._group.__aexit__(None, None, None)
            finally:
                while not self._queue.empty():
                    self._end(self._queue.get_nowait(), TasksClosed("the tasks were left"))
                    self._queue.task_done()

    async def call(self, task: Any) -> Any:  # noqa: ANN401 - what the protocol carries
        """The answer to task. Raises TaskTimeout, TaskDied, BadAnswer, LaunchError, TasksClosed.

        Cancelled, the worker that has it is killed; when its tree is gone, CancelledError is raised.
        """
        asked = _Task(self._codec.encode(task))
        await self._put(asked)
        return await self._answer(asked)

    async def map(self, tasks: Iterable[Any], *, in_order: bool = True) -> AsyncGenerator[Any, None]:
        """The answers, in the order of the tasks or as they come. Tasks are taken as workers get free: there may be
        endlessly many. Whoever stops asking, or is told of a failure, ends those that are begun."""
        source = iter(tasks)
        begun: dict[_Task, None] = {}
        done: asyncio.Queue[_Task] = asyncio.Queue()
        try:
            while True:
                for task in itertools.islice(source, self._workers + self._ahead - len(begun)):
                    asked = _Task(self._codec.encode(task))
                    begun[asked] = None
                    asked.over = _Told(functools.partial(done.put_nowait, asked))
                    await self._put(asked)
                if not begun:
                    return
                first = next(iter(begun)) if in_order else await done.get()
                answer = await self._answer(first)
                del begun[first]
                yield answer
        finally:
            for asked in begun:
                asked.withdraw()
            for asked in begun:
                await insist(asked.over, asked.withdraw)

    async def _put(self, asked: _Task) -> None:
        if self._closed:
            raise TasksClosed("the tasks were left")
        try:
            await self._queue.put(asked)
        except asyncio.CancelledError:
            asked.over.set()
            raise

    async def _answer(self, asked: _Task) -> Any:  # noqa: ANN401
        await insist(asked.over, asked.withdraw)
        if asked.error is not None:
            raise asked.error
        try:
            return self._codec.decode(asked.answer)
        except (ValueError, msgspec.MsgspecError) as error:
            raise BadAnswer(f"what a worker answered cannot be read: {error}") from None

    # --- the workers ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """One worker after the other, with one task after the other."""
        worker: _Worker | None = None
        asked: _Task | None = None
        try:
            while True:
                asked = await self._queue.get()
                worker = await self._do(worker, asked)
                self._queue.task_done()
                asked = None
        finally:
            if asked is not None:
                self._queue.task_done()
            if worker is not None and (asked is not None or self._hurried):
                worker.life.kill()
            await self._dismiss(worker)
            if asked is not None:
                self._end(asked, TasksClosed("the tasks were left"))

    async def _do(self, worker: _Worker | None, asked: _Task) -> _Worker | None:
        """Has the task done, by this worker or by others. Who is there afterwards."""
        error: BaseException | None = None
        for _ in range(self._retries + 1):
            if asked.withdrawn:
                break
            try:
                worker = await self._fit(worker)
                error = await self._give(worker, asked)
            except NssupError as refused:
                worker, error = None, refused
            if error is None or isinstance(error, BadAnswer):
                break
        self._end(asked, error)
        return worker

    def _end(self, asked: _Task, error: BaseException | None) -> None:
        asked.error = error
        asked.over.set()

    async def _fit(self, worker: _Worker | None) -> _Worker:
        """This one, or another one where it can take no task any more."""
        if worker is not None:
            spent = self._max_tasks is not None and len(worker.done) >= self._max_tasks
            if not spent and not worker.answers.spoilt and worker.life.exit is None:
                return worker
            if worker.answers.spoilt:
                worker.life.kill()
            await self._dismiss(worker)
        await self._hub.turn()
        answers = _Answers(self._codec.frames(self._max_answer))
        life = begin(self._hub, self._plan, "pipe", answers, self._stderr)
        try:
            await life.started()
        except asyncio.CancelledError:
            life.kill()
            await life.over()
            raise
        if not life.host_pid:
            await life.wait()
            raise failure(life, self._plan)
        return _Worker(life, answers, [])

    async def _give(self, worker: _Worker, asked: _Task) -> BaseException | None:
        """What became of the task instead of an answer. Then nothing is left of the worker."""
        if asked.withdrawn:
            return None
        life = worker.life
        asked.outcome = worker.answers.expect()
        if life.stdin is not None:
            life.stdin.write(asked.payload)
        worker.done.append(None)
        try:
            async with asyncio.timeout(self._timeout):
                asked.answer = await asked.outcome
        except TimeoutError:
            life.kill()
            await life.over()
            return TaskTimeout(self._timeout or 0.0)
        except _Ended:
            return TaskDied(await self._ending(life))
        except BadFrame as error:
            life.kill()
            await life.over()
            return BadAnswer(str(error))
        except asyncio.CancelledError:
            life.kill()
            await life.over()
            task = asyncio.current_task()
            if not asked.withdrawn or (task is not None and task.cancelling()):
                raise
        return None

    async def _ending(self, life: Life) -> Exit:
        """How it ends by itself, if it does so soon."""
        try:
            async with asyncio.timeout(GRACE):
                return await life.wait()
        except TimeoutError:
            life.kill()
            return await life.wait()

    async def _dismiss(self, worker: _Worker | None) -> None:
        """It has no task: it may end by itself. Cancelled, it is killed."""
        if worker is None:
            return
        if worker.life.stdin is not None:
            worker.life.stdin.close()
        try:
            await self._ending(worker.life)
        finally:
            worker.life.kill()
            await worker.life.over()


class _Told(asyncio.Event):
    """An event that tells when it is set."""

    def __init__(self, tell: Callable[[], object]) -> None:
        super().__init__()
        self._tell = tell

    def set(self) -> None:
        if not self.is_set():
            self._tell()
        super().set()
