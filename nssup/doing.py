"""Handlers that change something: request -> inputs to the workers -> what became of each.

No operation lives in a request: what was begun goes on, its client may hang up.
"""

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from nssup import _pidfd, http, operation, render, units, wire
from nssup.api import (
    Accepted,
    Answer,
    Become,
    Call,
    Command,
    EnableCommand,
    ExecCommand,
    Executed,
    KillCommand,
    Left,
    Reply,
    ScaleCommand,
    Shutdown,
    json_reply,
    text_reply,
    usage,
)
from nssup.clone import exit_of_message
from nssup.desk import Desk
from nssup.errors import ControlError, ExitCode, errno_name
from nssup.events import Input, Kill, Reload, Reset, Restart, Start, State, Stop
from nssup.machine import Worker
from nssup.operation import DOWN, UP, Goal, Judge
from nssup.selection import select_pools
from nssup.snapshot import Snapshot, members
from nssup.spec import SIGKILL

MOST_WORKERS = 100_000


def _meant(desk: Desk, command: Command, verb: str, *, by_default: bool = False) -> tuple[str, ...]:
    """The workers that a changing verb is about."""
    if command.all and command.select:
        raise usage(f"{verb}: all, or only {' '.join(command.select)}?", "leave one of them out")
    if not command.select and not command.all and not by_default:
        raise usage(f"{verb}: of what?", f"name pools or workers, or say --all: nssup ctl {verb} --all")
    return desk.select(command.select).workers


async def _run(
    desk: Desk,
    verb: str,
    work: Iterable[tuple[str, Input | None, Judge]],
    timeout: float | None,
    text: bool,
    then: Callable[[], None] | None = None,
) -> Reply:
    found, code = await desk.settle(work, timeout, then)
    if text:
        out, err = render.results(verb, found)
        return text_reply(out, err, code=code)
    return json_reply(Accepted(desk.supervisor.workers.seq, found), code=code)


def start(desk: Desk, call: Call) -> Answer:
    command: Command = call.command
    judge = _unless_stuck(desk, operation.aim(command.wait, operation.up, UP))
    workers = desk.supervisor.workers
    work = [(each, Start(), judge) for each in workers.required_first(_meant(desk, command, "start", by_default=True))]
    return _run(desk, "start", work, command.timeout, call.text)


def _unless_stuck(desk: Desk, judge: Judge) -> Judge:
    """Who waits for a pool that nobody has started waits for an operator: he is told, not kept waiting himself."""
    dependencies = desk.supervisor.workers.dependencies

    def judged(w: Worker | None) -> bool | None:
        said = judge(w)
        if said is None and w is not None and w.state is State.WAITING:
            return False if any(lack.stuck for lack in dependencies.unmet(w.pool)) else None
        return said

    return judged


def stop(desk: Desk, call: Call) -> Answer:
    command: Command = call.command
    judge = operation.aim(command.wait, operation.down, DOWN)
    work = [(each, Stop(), judge) for each in desk.supervisor.workers.dependents_first(_meant(desk, command, "stop"))]
    return _run(desk, "stop", work, command.timeout, call.text)


def restart(desk: Desk, call: Call) -> Answer:
    command: Command = call.command
    there = desk.supervisor.workers.workers
    work = [
        (
            each,
            Restart(),
            _unless_stuck(desk, operation.aim(command.wait, operation.renewed(there[each].generation), UP)),
        )
        for each in desk.supervisor.workers.dependents_first(_meant(desk, command, "restart"))
    ]
    return _run(desk, "restart", work, command.timeout, call.text)


def kill(desk: Desk, call: Call) -> Answer:
    command: KillCommand = call.command
    try:
        signo = units.signal_number(str(command.signal))
    except ValueError as e:
        raise usage(f"{command.signal}: {e}") from None
    if command.ns_pid is not None:
        return _kill_inside(desk, call, command.ns_pid, signo)
    there = desk.supervisor.workers.workers
    judge = operation.aim(command.wait, operation.at_once, ())
    work: list[tuple[str, Input | None, Judge]] = []
    for each in _meant(desk, command, "kill"):
        w = there[each]
        reachable = w.alive and (w.init_host_pid if command.tree else w.host_pid) is not None
        work.append((each, Kill(signo, command.tree), judge) if reachable else (each, None, operation.never))
    return _run(desk, "kill", work, command.timeout, call.text)


def _kill_inside(desk: Desk, call: Call, ns_pid: int, signo: int) -> Answer:
    command: KillCommand = call.command
    workers = _meant(desk, command, "kill")
    if len(workers) != 1 or command.tree:
        raise usage("kill: --ns-pid means one process of one worker", "nssup ctl tree WORKER shows them")
    sent = desk.supervisor.signal_inside(workers[0], ns_pid, signo)
    return _run(desk, "kill", [(workers[0], None, operation.at_once if sent else operation.never)], None, call.text)


async def execute(desk: Desk, call: Call) -> Reply:
    command: ExecCommand = call.command
    workers = desk.select(command.select).workers
    if len(workers) != 1:
        raise usage("exec: in one worker", f"{' '.join(command.select)!r} means {len(workers)}")
    stdio = _descriptors_of(call.peer, command.stdio)
    done = await desk.supervisor.run_inside(workers[0], [word.encode() for word in command.argv], stdio)
    answer, code = _executed(done)
    return json_reply(answer, code=code)


def _descriptors_of(peer: http.Peer, numbers: Sequence[int]) -> list[int]:
    """Copies of the client's descriptors, the caller's. Raises ControlError."""
    found: list[int] = []
    try:
        pidfd = os.pidfd_open(peer.host_pid) if peer.pidfd < 0 else os.dup(peer.pidfd)
        try:
            for number in numbers:
                found.append(_pidfd.getfd(pidfd, number))  # noqa: PERF401 - those before the one that fails are ours
        finally:
            os.close(pidfd)
    except OSError as error:
        for fd in found:
            os.close(fd)
        why = f"cannot take descriptors of host PID {peer.host_pid}: {error.strerror}"
        raise ControlError("descriptors", why, http_status=403, exit_code=ExitCode.NOT_PERMITTED) from None
    return found


def _executed(done: wire.Done | None) -> tuple[Executed, int]:
    """What is told of a command, and the exit code that says it."""
    if done is None:
        return Executed(None, SIGKILL, "the worker ended"), 128 + SIGKILL
    if done.step or done.errno:
        if done.step != wire.Step.EXEC:
            return Executed(None, None, f"not-run:{errno_name(done.errno)}"), ExitCode.RUN_FAILED
        code = ExitCode.NOT_FOUND if done.errno == errno.ENOENT else ExitCode.NOT_EXECUTABLE
        return Executed(None, None, f"exec-failed:{errno_name(done.errno)}"), code
    ended = exit_of_message(done.exit)
    if ended.code is not None:
        return Executed(ended.code, None, None), ended.code
    return Executed(None, ended.signal, None), 128 + (ended.signal or 0)


def scale(desk: Desk, call: Call) -> Answer:
    command: ScaleCommand = call.command
    if not command.select and not command.all:
        raise usage("scale: of what?", "name a pool and a number: nssup ctl scale web 3")
    there = members(desk.supervisor.workers)
    pools = select_pools(command.select, there) if command.select else tuple(there)
    wanted = {name: _number(command.n, desk.supervisor.workers.pools[name].workers, name) for name in pools}
    desk.supervisor.scale_pools(wanted)
    judge = _unless_stuck(desk, operation.aim(command.wait, operation.scaled, UP))
    work = [(each, None, judge) for name in pools for each in _changed(desk, name, there[name])]
    return _run(desk, "scale", work, command.timeout, call.text)


def _changed(desk: Desk, pool: str, before: Sequence[str]) -> list[str]:
    """The workers of a pool that came or are going by a scale."""
    now, workers = members(desk.supervisor.workers)[pool], desk.supervisor.workers.workers
    gone = [each for each in before if each not in workers]
    return [each for each in now if each not in before or workers[each].removing] + gone


def wait(desk: Desk, call: Call) -> Answer:
    command: Command = call.command
    goal: Goal = command.wait if isinstance(command.wait, str) else "ready"
    judge = operation.reached(goal)
    work = [(each, None, judge) for each in _meant(desk, command, "wait", by_default=True)]
    return _run(desk, "wait", work, command.timeout, call.text)


def shutdown(desk: Desk, call: Call) -> Answer:
    command: Shutdown = call.command
    if command.leave_running:
        return _leave_running(desk, command, call.text)
    judge = operation.down_for_good if command.wait else operation.at_once
    work = [(each, None, judge) for each in desk.select([]).workers]
    return _run(desk, "shutdown", work, command.timeout, call.text, desk.supervisor.shutdown)


async def _leave_running(desk: Desk, command: Shutdown, text: bool) -> Reply:
    there = desk.supervisor.workers.workers
    alive = [w.id for w in there.values() if w.alive]
    left = [worker_id for worker_id in alive if desk.supervisor.outlives_us(worker_id)]
    bound = [worker_id for worker_id in alive if worker_id not in left]
    judge = operation.down_for_good if command.wait else operation.at_once
    work = [(each, None, judge if each in bound else operation.at_once) for each in alive]
    found, code = await desk.settle(work, command.timeout, desk.supervisor.leave_running)
    if not text:
        return json_reply(Left(desk.supervisor.workers.seq, found, left, bound), code=code)
    for result in found:
        if result["id"] in left:
            result["state"] = "left running"
    out, err = render.results("shutdown", found)
    return text_reply(out, err, code=code)


async def reexec(desk: Desk, call: Call) -> Reply:
    if desk.upgrade is None:
        raise ControlError("not-possible", "this supervisor is part of another program", http_status=409)
    version = await desk.upgrade.rehearse()
    desk.upgrade.begin()
    return json_reply(Become(Snapshot(desk.supervisor, stats=False).supervisor(), version))


def enable(desk: Desk, call: Call) -> Answer:
    return _enable(desk, call, "enable")


def disable(desk: Desk, call: Call) -> Answer:
    return _enable(desk, call, "disable")


async def _enable(desk: Desk, call: Call, verb: Literal["enable", "disable"]) -> Reply:
    command: EnableCommand = call.command
    chosen = _meant(desk, command, verb)
    there = members(desk.supervisor.workers)
    pools = select_pools(command.select, there) if command.select else tuple(there)
    desk.supervisor.enable_pools(pools, verb == "enable")
    event: Input | None = None
    judge: Judge = operation.at_once
    if command.now:
        event = Start() if verb == "enable" else Stop()
        usual, means = (operation.up, UP) if verb == "enable" else (operation.down, DOWN)
        judge = operation.aim(command.wait, usual, means)
    found, code = await desk.settle([(each, event, judge) for each in chosen], command.timeout, None)
    if not call.text:
        return json_reply(Accepted(desk.supervisor.workers.seq, found), code=code)
    out, err = render.results(verb, found) if command.now else ("", "")
    said = [f"{pool}: {verb}d{'' if command.now else _as_before(desk, pool, verb)}\n" for pool in pools]
    return text_reply("".join(said) + out, err, code=code)


def _as_before(desk: Desk, pool: str, verb: str) -> str:
    """What somebody may have expected to change with it."""
    workers = desk.supervisor.workers
    up = any(workers.workers[each].want_up for each in members(workers)[pool])
    if verb == "disable":
        return "; its workers go on (--now stops them)" if up else ""
    return "" if up else "; nothing is started before the next supervisor (--now starts it)"


def reset(desk: Desk, call: Call) -> Answer:
    command: Command = call.command
    work = [(each, Reset(), operation.at_once) for each in _meant(desk, command, "reset", by_default=True)]
    return _run(desk, "reset", work, command.timeout, call.text)


def reload(desk: Desk, call: Call) -> Answer:
    """With `all`, those that can. Who does not run cannot read anything."""
    command: Command = call.command
    workers = desk.supervisor.workers
    work: list[tuple[str, Input | None, Judge]] = []
    for each in _meant(desk, command, "reload"):
        w = workers.workers[each]
        if workers.pools[w.pool].reload is None:
            if not command.all:
                raise _no_reload(w.pool)
        elif w.state is State.RUNNING:
            work.append((each, Reload(), operation.at_once))
        else:
            work.append((each, None, operation.never))
    return _run(desk, "reload", work, command.timeout, call.text)


def _no_reload(pool: str) -> ControlError:
    hint = 'give it one in the config: reload = { signal = "HUP" }; or restart it'
    return ControlError("no-reload", f"nobody has said how {pool} is reloaded", http_status=409, hint=hint)


def _number(n: int | str, now: int, pool: str) -> int:
    """How many workers `n` means: a number, or a step from how many are wanted now."""
    try:
        wanted = int(n) + (now if isinstance(n, str) and n[:1] in ("+", "-") else 0)
    except ValueError:
        raise usage(f"scale: {n!r} is no number", "write N, +N or -N") from None
    if not 0 <= wanted <= MOST_WORKERS:
        raise usage(f"scale: {pool} cannot have {wanted} workers")
    return wanted
