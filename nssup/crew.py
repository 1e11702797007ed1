"""The workers of an nssup.Executor, interpreters in namespaces of their own, and the thread that waits on them.

One thread of ours waits on all workers of an executor. A call goes straight from submit to a worker that is free; its
answer, its time limit or its worker's end is told by the thread. What a future tells is always after the fact: a call
that is late or cancelled is over when its whole tree is gone.
"""

import atexit
import concurrent.futures
import contextlib
import os
import pickle
import select
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from nssup import clone, interpreter, wire
from nssup.errors import LaunchError, NssupError
from nssup.events import Exit
from nssup.facts import Host
from nssup.interpreter import Remote
from nssup.process import SpecKeys, plan_of
from nssup.spec import SIGKILL

T = TypeVar("T")

GRACE = 5.0  # seconds that an interpreter that is not needed any more has to end by itself
UNFIT_MOST = 3  # workers in a row that end before they took a call, until that is what the executor is


class CallTimeout(NssupError, TimeoutError):
    """The call's time was over. Its worker and all that it had started are gone. seconds: how long it had."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the call was not done after {seconds:g} s")
        self.seconds = seconds


class MemoryLimit(NssupError, MemoryError):
    """The call needed more memory than its worker may have, and got a MemoryError. limit: bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the call needed more than the {limit} bytes that it may have")
        self.limit = limit


class WorkerDied(NssupError, concurrent.futures.BrokenExecutor):
    """The worker ended in the middle of the call, and was replaced: the executor goes on. exit: how it ended."""

    def __init__(self, ended: Exit) -> None:
        super().__init__(f"the worker ended during the call: {ended.reason}")
        self.exit = ended

    @property
    def signal(self) -> int | None:
        """The number of the signal that ended it, None if none did."""
        return self.exit.signal


class ExecutorBroken(NssupError, concurrent.futures.BrokenExecutor):
    """No worker can be had: the initializer raised, or interpreters end, or cannot be launched. Its cause says why."""


class Call(concurrent.futures.Future[T]):
    """The future of a call. Unlike others it can be cancelled while it runs: its worker is killed with all that it
    started, and the future is cancelled when they are gone."""

    def __init__(self, crew: "Crew", payload: bytes, timeout: float | None) -> None:
        super().__init__()
        self._crew = crew
        self._payload = payload
        self._timeout = timeout

    def cancel(self) -> bool:
        """False only when it is done."""
        return super().cancel() or self._crew.cancel(self)

    def _end_cancelled(self) -> None:
        with self._condition:
            self._state = "PENDING"  # a Future that runs refuses
        super().cancel()
        self.set_running_or_notify_cancel()


class _Worker:
    """One interpreter. state: starting, free, busy, then leaving: it takes no more calls."""

    __slots__ = (
        "call",
        "calls",
        "deadline",
        "ended",
        "fate",
        "inbox",
        "killed",
        "leaving",
        "outbox",
        "process",
        "ready",
        "socket",
    )

    def __init__(self, process: clone.Process, connection: socket.socket) -> None:
        self.process = process
        self.socket = connection
        self.ready = self.leaving = self.killed = False
        self.call: Call[Any] | None = None
        self.calls = 0
        self.deadline: float | None = None
        self.fate: Callable[[Call[Any]], None] | None = None  # what becomes of the call once the tree is gone
        self.ended: Exit | None = None
        self.inbox = bytearray()
        self.outbox: deque[memoryview] = deque()

    def kill(self) -> None:
        self.leaving = self.killed = True
        self.process.kill()


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Setting:
    """What makes the workers of an executor."""

    def __init__(
        self,
        max_workers: int,
        spares: int,
        max_tasks: int | None,
        memory: int | None,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
        keys: SpecKeys,
    ) -> None:
        self.max_workers = max_workers
        self.most = max_workers + spares
        self.spares = spares
        self.max_tasks = max_tasks
        self.memory = memory
        self.initial = pickle.dumps((initializer, initargs), pickle.HIGHEST_PROTOCOL)
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        start = f"import sys; sys.path.append({root!r}); from nssup.interpreter import main; main()"
        command = [sys.executable, *_flags(), "-c", start]
        self.plan = plan_of(command, None, keys, Host().capable("SYS_ADMIN"))

    def setup(self) -> bytes:
        """The first frame for a worker: as multiprocessing's spawn has it, so that main modules are found."""
        from multiprocessing import spawn

        preparation = spawn.get_preparation_data("nssup")
        preparation.pop("authkey", None)  # calls need it for nothing, and it is a secret
        payload = pickle.dumps((preparation, self.memory, self.initial), pickle.HIGHEST_PROTOCOL)
        return interpreter.frame(interpreter.SETUP, payload)


def _flags() -> list[str]:
    """This interpreter's own, for those in the workers."""
    import subprocess

    return list(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined] # multiprocessing uses it too


class Crew:
    """The workers of an executor, and the thread that waits on them. lock: of all that submit and the thread share."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.lock = threading.RLock()  # futures call back from within
        self.closing = False
        self.broken: ExecutorBroken | None = None
        self.over = threading.Event()
        self._queue: deque[Call[Any]] = deque()
        self._free: list[_Worker] = []
        self._workers: dict[int, _Worker] = {}  # by pidfd
        self._busy = 0
        self._unfit = 0
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._watch(self._wakeup, self._woken)
        self._launcher = clone.Launcher()
        self._thread: threading.Thread | None = None
        self._setup = b""
        self._on_over: list[Callable[[], object]] = []
        _crews.add(self)

    # --- from any thread -----------------------------------------------------------------------------------------

    def submit(self, call: Call[Any]) -> None:
        with self.lock:
            if self.broken is not None:
                raise ExecutorBroken(str(self.broken)) from self.broken.__cause__
            if self.closing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._thread is None:
                self._setup = (
                    self.setting.setup()
                )  # now: when the main module has ended, it is not to be found any more
                self._thread = threading.Thread(target=self._run, name="nssup-executor", daemon=True)
                self._thread.start()
            if self._free and self._busy < self.setting.max_workers and not self._queue:
                if self._begin(self._free.pop(), call):
                    return
            else:
                self._queue.append(call)
            self.wake()

    def cancel(self, call: Call[Any]) -> bool:
        with self.lock:
            worker = next((worker for worker in self._workers.values() if worker.call is call), None)
            if worker is None:
                return False
            worker.fate = Call._end_cancelled
            worker.kill()
            return True

    def close(self, cancel: bool = False) -> None:
        """No more calls; those that wait are done first, or cancelled."""
        with self.lock:
            self.closing = True
            if cancel:
                waiting, self._queue = self._queue, deque()
                for call in waiting:
                    call.cancel()
                    call.set_running_or_notify_cancel()
            if self._thread is None:
                self._close()
            else:
                self.wake()

    def kill(self) -> None:
        """End everything now: calls that run are cancelled."""
        self.close(cancel=True)
        with self.lock:
            for worker in self._workers.values():
                worker.fate = Call._end_cancelled
                worker.kill()

    def join(self) -> None:
        """Until all is over, the thread too."""
        self.over.wait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def when_over(self, callback: Callable[[], object]) -> None:
        """From the thread, or at once."""
        with self.lock:
            if not self.over.is_set():
                self._on_over.append(callback)
                return
        callback()

    def wake(self) -> None:
        if not self.over.is_set():
            os.eventfd_write(self._wakeup, 1)

    def abandon(self) -> None:
        """In a forked child, which has none of this: close the copies of its parent's descriptors."""
        self.lock = threading.RLock()
        self.closing = True
        for worker in self._workers.values():
            worker.process.close()
            worker.socket.close()
        self._workers.clear()
        self._on_over.clear()
        self._close()

    # --- under the lock ------------------------------------------------------------------------------------------

    def _begin(self, worker: _Worker, call: Call[Any]) -> bool:
        """Gives the call to the worker. Whether the thread must know; then it is not woken yet."""
        if not call.set_running_or_notify_cancel():
            self._free.append(worker)
            return True
        worker.call = call
        worker.calls += 1
        self._busy += 1
        if call._timeout is not None:
            worker.deadline = _now() + call._timeout
        worker.outbox.append(memoryview(interpreter.frame(interpreter.CALL, call._payload)))
        call._payload = b""
        return self._send(worker) and worker.deadline is None and self.setting.spares == 0

    def _send(self, worker: _Worker) -> bool:
        """Whether the worker's socket took all."""
        try:
            while worker.outbox:
                sent = worker.socket.send(worker.outbox[0])
                worker.outbox[0] = worker.outbox[0][sent:]
                if not worker.outbox[0]:
                    worker.outbox.popleft()
        except BlockingIOError:
            return False
        except OSError:
            worker.outbox.clear()  # it is gone, or about to be: its pidfd tells
        return True

    def _wants_more(self) -> bool:
        """Whether another interpreter is to be started: for a call that waits, or as a spare."""
        staying = sum(not worker.leaving for worker in self._workers.values())
        if self.broken or staying >= self.setting.most:
            return False
        starting = sum(not worker.ready and not worker.leaving for worker in self._workers.values())
        wanted = min(len(self._queue), self.setting.max_workers - self._busy)
        if not self.closing and self._busy + wanted:
            wanted += self.setting.spares
        return wanted > starting + len(self._free)

    def _hand_out(self) -> None:
        while self._queue and self._free and self._busy < self.setting.max_workers:
            worker, call = self._free.pop(), self._queue.popleft()
            self._begin(worker, call)
            if worker.outbox:
                self._epoll.modify(worker.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self.lock:
                self._hand_out()
                self._start_some()
                timeout = self._next()
                if self.closing and not self._queue and not self._busy and self._dismissed():
                    break
            for fd, _ in self._epoll.poll(timeout, 64):
                callback = self._callbacks.get(fd)
                if callback is not None:
                    callback()
            self._expire()
        with self.lock:
            self._close()

    def _close(self) -> None:
        if self.over.is_set():
            return
        self.over.set()
        self._epoll.close()
        self._launcher.close()
        os.close(self._wakeup)
        callbacks, self._on_over = self._on_over, []
        for callback in callbacks:
            callback()

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)
        with self.lock:
            for worker in self._workers.values():
                if worker.outbox:
                    self._epoll.modify(worker.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _watch(self, fd: int, callback: Callable[[], None]) -> None:
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = callback

    def _unwatch(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _next(self) -> float | None:
        """Seconds until something is due."""
        deadlines = [worker.deadline for worker in self._workers.values() if worker.deadline is not None]
        return max(0.0, min(deadlines) - _now()) + 0.001 if deadlines else None

    def _expire(self) -> None:
        with self.lock:
            for worker in self._workers.values():
                if worker.deadline is not None and worker.deadline <= _now():
                    worker.deadline = None
                    if not worker.leaving:
                        worker.fate = _late
                    worker.kill()

    def _dismissed(self) -> bool:
        """Nobody is needed any more: those that are free may go, those that have not begun are killed. Whether all are
        gone."""
        for worker in list(self._workers.values()):
            if not worker.leaving and worker.ready:
                self._dismiss(worker)
            elif not worker.leaving:
                worker.kill()
        return not self._workers

    def _dismiss(self, worker: _Worker) -> None:
        """It is to end by itself; its tree ends with it."""
        if worker in self._free:
            self._free.remove(worker)
        worker.leaving = True
        worker.deadline = _now() + GRACE
        with contextlib.suppress(OSError):
            worker.socket.shutdown(socket.SHUT_WR)

    def _start_some(self) -> None:
        while self._wants_more():
            try:
                self._start()
            except (LaunchError, OSError) as error:
                self._break("no worker can be launched", error)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            process = self._launcher.launch(self.setting.plan, stdio=(theirs.fileno(), *self._outputs()))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        worker = _Worker(process, ours)
        self._workers[process.pidfd] = worker
        self._watch(process.line, lambda: self._on_line(worker))
        self._watch(process.pidfd, lambda: self._on_gone(worker))
        self._watch(ours.fileno(), lambda: self._on_socket(worker))
        process.go()
        worker.outbox.append(memoryview(self._setup))
        if not self._send(worker):
            self._epoll.modify(ours.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _outputs(self) -> tuple[int, int]:
        """This process's own stdout and stderr, as other executors' workers have them."""
        return (1 if _is_open(1) else self._launcher.null, 2 if _is_open(2) else self._launcher.null)

    def _on_line(self, worker: _Worker) -> None:
        for message in worker.process.receive():
            if isinstance(message, wire.Exited):
                worker.ended = clone.exit_of_message(message.exit)
            elif isinstance(message, wire.Failed):
                worker.ended = Exit(reason=wire.failure_reason(message.step, message.errno))
            elif isinstance(message, wire.Empty):
                worker.process.release()
        if worker.process.line_ended and worker.process.line >= 0:
            self._unwatch(worker.process.line)
            worker.process.close_line()

    def _on_socket(self, worker: _Worker) -> None:
        with self.lock:
            if worker.outbox and self._send(worker):
                self._epoll.modify(worker.socket.fileno(), select.EPOLLIN)
        self._receive(worker)

    def _receive(self, worker: _Worker) -> None:
        try:
            data = worker.socket.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if worker.socket.fileno() in self._callbacks:
                self._unwatch(worker.socket.fileno())
                with self.lock:
                    self._hung_up(worker)
            return
        inbox = worker.inbox
        inbox += data
        while len(inbox) >= interpreter.HEAD.size:
            length, kind = interpreter.HEAD.unpack_from(inbox)
            end = interpreter.HEAD.size + length
            if len(inbox) < end:
                break
            payload = bytes(memoryview(inbox)[interpreter.HEAD.size : end])
            del inbox[:end]
            self._told(worker, kind, payload)

    def _hung_up(self, worker: _Worker) -> None:
        """Its end is about to be told; unless it only closed its socket, and then it is of no use."""
        if worker in self._free:
            self._free.remove(worker)
        worker.leaving = True
        if worker.deadline is None or worker.call is None:
            worker.deadline = _now() + GRACE

    def _told(self, worker: _Worker, kind: int, payload: bytes) -> None:
        what = kind & interpreter.KIND
        if what == interpreter.READY:
            with self.lock:
                worker.ready = True
                self._unfit = 0
                self._release(worker)
            return
        if what == interpreter.UNFIT:
            with self.lock:
                self._break("the initializer failed", _exception(payload))
            return
        with self.lock:
            call, worker.call = worker.call, None
            if call is None or worker.fate is not None:
                worker.call = call
                return  # it is being killed, and its fate is known
            worker.deadline = None
            self._busy -= 1
            if kind & (interpreter.LEFT | interpreter.MEMORY):
                # What it left must be gone first, and a heap that was full is not to be trusted.
                self._busy += 1
                worker.call = call
                worker.fate = lambda call: self._settle(call, kind, payload)
                worker.kill()
                return
            self._release(worker)
            self._hand_out()
        self._settle(call, kind, payload)

    def _release(self, worker: _Worker) -> None:
        if worker.leaving:
            return
        if self.setting.max_tasks is not None and worker.calls >= self.setting.max_tasks:
            self._dismiss(worker)
        else:
            self._free.append(worker)

    def _settle(self, call: Call[Any], kind: int, payload: bytes) -> None:
        """What the call is told: its result as the worker had it, or its exception."""
        if kind & interpreter.MEMORY and self.setting.memory is not None:
            error: BaseException = MemoryLimit(self.setting.memory)
            error.__cause__ = _exception(payload)
            call.set_exception(error)
        elif kind & interpreter.KIND == interpreter.ERROR:
            call.set_exception(_exception(payload))
        else:
            try:
                result = pickle.loads(payload)
            except BaseException as unreadable:
                call.set_exception(unreadable)
            else:
                call.set_result(result)

    def _on_gone(self, worker: _Worker) -> None:
        seen = worker.process.reap()
        if seen is None:
            return
        self._on_line(worker)
        if worker.socket.fileno() in self._callbacks:
            self._receive_rest(worker)
            self._unwatch(worker.socket.fileno())
        for fd in (worker.process.line, worker.process.pidfd):
            self._unwatch(fd)
        with self.lock:
            del self._workers[worker.process.pidfd]
            if worker in self._free:
                self._free.remove(worker)
            worker.leaving = True
            worker.socket.close()
            worker.process.close()
            call, worker.call = worker.call, None
            if call is not None:
                self._busy -= 1
            if not worker.ready and not worker.killed:
                self._unfit += 1
        ended = worker.ended or (Exit(reason="signal:SIGKILL", signal=SIGKILL) if worker.killed else seen)
        if call is not None:
            fate = worker.fate
            if fate is not None:
                fate(call)
            else:
                call.set_exception(WorkerDied(ended))
        with self.lock:
            if self._unfit >= UNFIT_MOST:
                self._break("workers end before they take a call", WorkerDied(ended))

    def _receive_rest(self, worker: _Worker) -> None:
        """What it had answered before it ended."""
        while worker.socket.fileno() in self._callbacks:
            before = len(worker.inbox), worker.call
            self._receive(worker)
            if (len(worker.inbox), worker.call) == before:
                break

    def _break(self, why: str, cause: BaseException) -> None:
        if self.broken is None:
            self.broken = ExecutorBroken(f"{why}: {cause}")
            self.broken.__cause__ = cause
        self.closing = True
        waiting, self._queue = self._queue, deque()
        for call in waiting:
            if call.set_running_or_notify_cancel():
                error = ExecutorBroken(str(self.broken))
                error.__cause__ = cause
                call.set_exception(error)


def _late(call: Call[Any]) -> None:
    call.set_exception(CallTimeout(call._timeout or 0.0))


def _exception(payload: bytes) -> BaseException:
    """The exception that a worker told of, with its traceback there as the cause."""
    pickled, text = pickle.loads(payload)
    try:
        error = pickle.loads(pickled)
    except BaseException as unreadable:
        error = unreadable
    found = error if isinstance(error, BaseException) else RuntimeError(f"not an exception: {error!r}")
    found.__cause__ = Remote(text)
    return found


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


_crews: "weakref.WeakSet[Crew]" = weakref.WeakSet()


def _at_exit() -> None:
    """As concurrent.futures has it: what was submitted is done before the interpreter ends."""
    for crew in list(_crews):
        crew.close()
        crew.join()


def _in_forked_child() -> None:
    for crew in list(_crews):
        crew.abandon()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_in_forked_child)
