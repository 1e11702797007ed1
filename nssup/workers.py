"""All workers of a supervisor: their ids, their pools, one heap of deadlines, and the numbering of what is published.

Routes each event to `machine.step` and decides nothing about a life. Which workers a pool has is decided here, by
arithmetic alone: indexes 0 to wanted - 1.

Published, one Event per change of state, plus facts (`from` and `to` are None):

| event | what happened |
|---|---|
| `launched` | to starting, because somebody asked for it, or what it waited for is there |
| `blocked` | to waiting: it is to be up, and its pool requires what is not there yet |
| `relaunched` | to starting, by the restart policy |
| `started` | to running: the program runs, and is ready where that is asked |
| `stop_begun` | to stopping: somebody asked for it, a dependency was lost, it was not ready in time or is of no use |
| `main_exited` | to stopping: the program ended by itself, what else is in its namespace is being killed |
| `backed_off` | to backoff: it ended and will be launched again later |
| `stopped` `finished` `failed` | to stopped, done, failed: nothing of it is left |
| `became_ready` `became_unready` | facts: a running worker is ready again, or not any more |
| `command_run` | fact: the next stop step, a command, has begun |
| `probe_failed` | fact: a probe of a running worker failed after it had succeeded, or did so once too often |
| `command_failed` | fact: a command of the stop sequence, or of a reload, failed or could not be run |
| `signal_ignored` | fact: a stop step's signal is one that the program, a PID 1, does not handle: the next step |
| `signalled` | fact: a signal was sent without a change of state: an operator's, or the next stop step |
| `intensity_exceeded` | fact: a worker died too often, and has failed; `detail.then` says what else follows |
| `reset` | fact: an operator had a worker's failures forgotten |
| `removed` | fact: the worker was scaled away and is forgotten |
| `pool_added` `scaled` `pool_removed` | facts about a pool |
| `enabled` `disabled` | facts: an operator wants a pool started with the supervisor from now on, or not |
| `log_failed` | fact: a pool's log file took no more, and output was dropped (`note`d by whoever writes it) |
| `adopted` `lost` | facts: a worker of a supervisor that is no more is ours now; it cannot be proven ours |
| `requested` | fact: somebody asked for a change, and what was answered (`note`d by the control side, see audit) |
| `slot_set_aside` | fact: a note of a life was torn or forged |
| `notes_failed` | fact: lives can no more be noted; who is launched from now on ends with the supervisor |
| `reload_refused` | fact: SIGHUP came, and this version cannot apply a changed config |
| `left_running` | fact: the supervisor ends, and so many workers go on without it |
| `reexec_failed` | fact: the supervisor could not become the code that is installed now, and went on as it was |
| `desired_set_aside` `desired_failed` | facts: what was desired for good could not be read; it could not be tidied up |

`exit` is how the last life ended, where the change is about that. A relaunch at once has no event of its own for the
end before it: `relaunched` then carries `exit`, and the ended life's numbers in `detail.ended`.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

from msgspec.structs import replace

from nssup import dependencies, history, machine
from nssup.dependencies import Dependencies
from nssup.errors import ControlError, ExitCode
from nssup.events import (
    DependencyLost,
    Event,
    Exit,
    Fail,
    Input,
    Kill,
    Released,
    Reload,
    Remove,
    Reset,
    Restart,
    Start,
    State,
    Tick,
    Unblocked,
    Unready,
)
from nssup.explain import Explanation, explain
from nssup.machine import Action, Around, FailPool, Forget, KillTree, RunCommand, SignalMain, SignalTree, Worker
from nssup.restart import TOO_MANY
from nssup.spec import SIGKILL, PoolSpec

Actions: TypeAlias = list[tuple[str, Action]]

EVENT_OF = {
    State.WAITING: "blocked",
    State.STARTING: "launched",
    State.RUNNING: "started",
    State.STOPPING: "stop_begun",
    State.BACKOFF: "backed_off",
    State.STOPPED: "stopped",
    State.DONE: "finished",
    State.FAILED: "failed",
}
EVENTS = frozenset(EVENT_OF.values()) | {
    "relaunched",
    "main_exited",
    "became_ready",
    "became_unready",
    "command_run",
    "command_failed",
    "signal_ignored",
    "probe_failed",
    "signalled",
    "intensity_exceeded",
    "reset",
    "enabled",
    "disabled",
    "removed",
    "pool_added",
    "scaled",
    "pool_removed",
    "log_failed",
    "reload_refused",
    "adopted",
    "lost",
    "requested",
    "slot_set_aside",
    "notes_failed",
    "left_running",
    "reexec_failed",
    "desired_set_aside",
    "desired_failed",
}

# A life's end is told with the change that it caused.
_ENDS = frozenset({State.WAITING, State.BACKOFF, State.STOPPED, State.DONE, State.FAILED})
_LIVES = frozenset({State.STARTING, State.RUNNING, State.STOPPING})

# Stale heap entries are allowed up to this many beyond one per worker, so that small sets never compact.
_SLACK = 64


class _Pool:
    """What is kept of a pool beside its spec.

    ids: by index, those being removed as well. up: whether a new worker is to be started: at first if the pool is
    enabled, later what was last asked of its workers. wanting: how many of them want to be up.
    """

    __slots__ = ("ids", "removing", "up", "wanting")

    def __init__(self, up: bool) -> None:
        self.ids: dict[int, str] = {}
        self.removing = False
        self.up = up
        self.wanting = 0


class _Taken(NamedTuple):
    """One worker's step, not yet kept."""

    old: Worker
    new: Worker
    event: Input
    actions: tuple[Action, ...]


class WorkerSet:
    """See the module. Not reentrant: what `publish` is told must not call back in before the method returned.

    workers: id -> Worker, in order of creation. pools: name -> its spec, `workers` being the number wanted now.
    dependencies: how the pools stand to each other, for reading.
    Each method returns the actions to do, in order.
    """

    def __init__(
        self,
        publish: Callable[[Event], None],
        *,
        epoch: int = 0,
        seed: str = "",
        wall: Callable[[float], float] = float,
        changed: Callable[[str, Worker | None], None] = lambda worker_id, worker: None,
    ) -> None:
        """epoch: put into every event. seed: of the jitter of restarts. wall: CLOCK_BOOTTIME -> wall clock seconds.

        changed: told of every new value of a worker before it is published and acted on, None when it is forgotten.
        """
        self.workers: dict[str, Worker] = {}
        self.pools: dict[str, PoolSpec] = {}
        self.dependencies = Dependencies()
        self.seq = 0
        self._publish = publish
        self._epoch = epoch
        self._seed = seed
        self._wall = wall
        self._note_change = changed
        self._state: dict[str, _Pool] = {}
        self._heap: list[tuple[float, str]] = []
        # Generations of workers that were removed: the numbers of one id never repeat, not even in a new pool.
        self._numbers: dict[str, int] = {}
        self._lives: dict[str, deque[history.Past]] = {}
        self._failing: list[Worker] = []  # whose pools are to fail with them, once their own step is told

    # --- pools -----------------------------------------------------------------------------------------------------

    def add_pool(self, spec: PoolSpec, now: float, restored: Iterable[Worker] = ()) -> Actions:
        """A new pool, its workers started if it is enabled. Raises ControlError if there is one of this name, or if it
        would require itself by way of others. That what it requires is there is not asked for: until then it waits.

        restored: workers of it that are there already, from a supervisor that is no more; they go on as they are, and
        the pool is up if one of them wants to be.
        """
        if spec.name in self.pools:
            raise ControlError(
                "pool-exists",
                f"pool {spec.name} is there already",
                http_status=409,
                hint="wait until it is removed" if self._state[spec.name].removing else "choose another name",
            )
        if way := self.dependencies.circle(spec):
            raise ControlError("circle", f"pool {spec.name} would wait for itself: {' -> '.join(way)}", http_status=409)
        self.pools[spec.name] = spec
        self._state[spec.name] = _Pool(spec.enabled)
        self.dependencies.add(spec)
        self._say(now, "pool_added", pool=spec.name, detail={"workers": spec.workers})
        restored = list(restored)
        for number, worker in enumerate(restored):
            self._restore(worker, now, first=number == 0)
        actions = self._shrink(spec.name, now) + self._go_on_failing(spec, restored, now)
        return actions + self._grow(spec.name, now) + self._settle(now)

    def _go_on_failing(self, spec: PoolSpec, restored: Iterable[Worker], now: float) -> Actions:
        """The pool failed as one, and the supervisor died before all of it was noted: so do those that were not started
        since."""
        if spec.restart.intensity is None or spec.restart.intensity.then != "fail-pool":
            return []
        failed = [w for w in restored if w.reason == TOO_MANY and State.FAILED in (w.state, w.outcome)]
        since = max((w.last_life.ended for w in failed if w.last_life), default=-math.inf)
        late = [w.id for w in restored if w.want_up and w not in failed and (w.launched_at or 0.0) < since]
        return [action for worker_id in late for action in self._step(worker_id, Fail(), now)]

    def _restore(self, worker: Worker, now: float, first: bool) -> None:
        pool = self._state[worker.pool]
        pool.ids[worker.index] = worker.id
        self.workers[worker.id] = worker
        self.dependencies.changed(None, worker)
        pool.up = worker.want_up or (pool.up and not first)
        if worker.want_up:
            pool.wanting += 1
        if worker.deadline is not None:
            self._remember(worker.deadline, worker.id)
        self._record_life(worker.id, history.remembered(worker))
        self._note_change(worker.id, worker)
        lost = worker.state is State.LOST
        self._say(now, "lost" if lost else "adopted", worker=worker.id, about=worker, reason=worker.reason)

    def remove_pool(self, name: str, now: float) -> Actions:
        """Stop and forget all its workers; the pool is gone with the last of them."""
        self._spec(name)
        pool = self._state[name]
        if pool.removing:
            return []
        pool.removing = True
        self._resize(name, 0)
        actions = self._shrink(name, now)
        self._drop_if_empty(name, now)
        return actions + self._settle(now)

    def scale(self, name: str, wanted: int, now: float) -> Actions:
        """Have `wanted` workers: new ones are started if the pool is up; the highest go first, by their stop sequence.

        Wanted again before they are gone, they come up again. Raises ControlError for a pool that is not there or is
        being removed, and for a negative number.
        """
        spec = self._spec(name)
        if self._state[name].removing:
            raise ControlError("pool-removed", f"pool {name} is being removed", http_status=409)
        if wanted < 0:
            raise ControlError("bad-request", f"cannot scale {name} to {wanted}", exit_code=ExitCode.USAGE)
        if wanted == spec.workers:
            return []
        self._say(now, "scaled", pool=name, detail={"from": spec.workers, "to": wanted})
        self._resize(name, wanted)
        return self._shrink(name, now) + self._grow(name, now) + self._settle(now)

    def _resize(self, name: str, wanted: int) -> None:
        self.pools[name] = replace(self.pools[name], workers=wanted)
        self.dependencies.resize(name, wanted, [self.workers[each] for each in self._state[name].ids.values()])

    def enable(self, name: str, enabled: bool, now: float) -> None:
        """Whether the pool is to be started with the next supervisor; nothing is started or stopped now.

        Raises ControlError for a pool that is not there.
        """
        spec = self._spec(name)
        if spec.enabled is not enabled:
            self.pools[name] = replace(spec, enabled=enabled)
            self._say(now, "enabled" if enabled else "disabled", pool=name, reason="operator")

    def lives(self, worker_id: str) -> tuple[history.Past, ...]:
        """The last lives of a worker that are over, oldest first."""
        return tuple(self._lives.get(worker_id, ()))

    def explain(self, worker_id: str, now: float, attempts: int) -> Explanation:
        """Why it is in its state, and what will be done. attempts: how many launches to come to tell at most."""
        worker = self.workers[worker_id]
        lacks = self.dependencies.unmet(worker.pool)
        return explain(worker, self.pools[worker.pool], now, self._seed, attempts, lacks)

    def _spec(self, name: str) -> PoolSpec:
        try:
            return self.pools[name]
        except KeyError:
            raise ControlError(
                "no-such-pool", f"there is no pool {name}", http_status=404, exit_code=ExitCode.NO_SUCH
            ) from None

    def _shrink(self, name: str, now: float) -> Actions:
        """Remove what is too much, downwards, so that what is left is 0 to n - 1 at every moment."""
        wanted, ids = self.pools[name].workers, self._state[name].ids
        surplus = sorted((index for index in ids if index >= wanted), reverse=True)
        actions: Actions = []
        for worker_id in [ids[index] for index in surplus]:
            actions += self._step(worker_id, Remove(), now)
        return actions

    def _grow(self, name: str, now: float) -> Actions:
        """Create what is missing, and start it, and what was being removed, if the pool is up."""
        actions: Actions = []
        spec, pool = self.pools[name], self._state[name]
        for index in range(spec.workers):
            worker_id = pool.ids.get(index)
            if worker_id is None:
                worker_id = self._create(name, index)
            elif not self.workers[worker_id].removing:
                continue
            if pool.up:
                actions += self._step(worker_id, Start(), now)
        return actions

    def _create(self, name: str, index: int) -> str:
        worker = Worker(pool=name, index=index)
        worker_id = worker.id
        if worker_id in self._numbers:
            worker = replace(worker, generation=self._numbers.pop(worker_id))
        self._state[name].ids[index] = worker_id
        self.workers[worker_id] = worker
        self.dependencies.changed(None, worker)
        return worker_id

    def _forget(self, worker: Worker, now: float) -> bool:
        """Drop a worker that is down; or keep it, stopped, if it is wanted again meanwhile."""
        pool = self._state[worker.pool]
        if worker.index < self.pools[worker.pool].workers:
            self.workers[worker.id] = replace(worker, removing=False)
            self._note_change(worker.id, self.workers[worker.id])
            return False
        self._note_change(worker.id, None)
        self._lives.pop(worker.id, None)
        self.dependencies.changed(worker, None)
        del self.workers[worker.id]
        del pool.ids[worker.index]
        self._numbers[worker.id] = worker.generation
        self._say(now, "removed", worker=worker.id)
        return True

    def _drop_if_empty(self, name: str, now: float) -> None:
        pool = self._state.get(name)
        if pool is not None and pool.removing and not pool.ids:
            del self.pools[name], self._state[name]
            self.dependencies.remove(name)
            self._say(now, "pool_removed", pool=name)

    def stop_order(self, names: Iterable[str]) -> list[str]:
        """Pools in the order in which to stop them: each before all that it requires, otherwise the last first."""
        return dependencies.stop_order(self.dependencies.requires, names)

    def required_first(self, workers: Iterable[str]) -> list[str]:
        """Ids of workers as given, but each after all that its pool requires."""
        ids = list(workers)
        pools = dict.fromkeys(self.workers[each].pool for each in ids)
        order = dependencies.start_order(self.dependencies.requires, pools)
        rank = {pool: number for number, pool in enumerate(order)}
        return sorted(ids, key=lambda each: rank[self.workers[each].pool])

    def dependents_first(self, workers: Iterable[str]) -> list[str]:
        """Ids of workers as given, but each before all that its pool requires, so that these wait for it to be down."""
        ids = list(workers)
        pools = list(dict.fromkeys(self.workers[each].pool for each in ids))
        if not any(self.dependencies.requires[pool] for pool in pools):
            return ids
        rank = {pool: number for number, pool in enumerate(self.stop_order(reversed(pools)))}
        return sorted(ids, key=lambda each: rank[self.workers[each].pool])

    # --- events ----------------------------------------------------------------------------------------------------

    def feed(self, worker_id: str, event: Input, now: float) -> Actions:
        """What becomes of the worker by event. Raises ControlError when there is no such worker.

        A worker on its way out, scaled away or with its pool, is not started any more.
        """
        worker = self.workers.get(worker_id)
        if worker is None:
            raise ControlError(
                "no-such-worker", f"there is no worker {worker_id}", http_status=404, exit_code=ExitCode.NO_SUCH
            )
        if isinstance(event, Start | Restart) and worker.index >= self.pools[worker.pool].workers:
            return []
        return self._step(worker_id, event, now) + self._settle(now)

    def due(self, now: float) -> Actions:
        """Tick every worker whose deadline is not after now, earliest first."""
        actions: Actions = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            # Not popped: the next stop step may have the very same deadline. Otherwise the entry is stale after this.
            actions += self._step(self._heap[0][1], Tick(), now)
        return actions + self._settle(now)

    def next_deadline(self) -> float | None:
        """When `due` has something to do next, or None."""
        heap = self._heap
        while heap:
            worker = self.workers.get(heap[0][1])
            if worker is not None and worker.deadline == heap[0][0]:
                return heap[0][0]
            heapq.heappop(heap)
        return None

    def pending(self) -> int:
        """The length of the heap, stale deadlines included: never more than 2 per worker and a few."""
        return len(self._heap)

    def _step(self, worker_id: str, event: Input, now: float) -> Actions:
        old = self.workers[worker_id]
        taken = self._take(old, event, now)
        if taken.new is not old and self.dependencies.is_required(old.pool):
            actions = self._keep_all(self._with_losses(taken, now), now)
        else:
            actions = self._keep(taken, now)
        while self._failing:
            actions += self._fail_pool(self._failing.pop(), now)
        return actions

    def _take(self, old: Worker, event: Input, now: float) -> _Taken:
        spec, pools = self.pools[old.pool], self.dependencies
        if spec.requires or pools.is_required(old.pool):
            around = Around(pools.blocker(old.pool), pools.is_required(old.pool))
            new, actions = machine.step(old, spec, event, now, self._seed, around)
        else:
            new, actions = machine.step(old, spec, event, now, self._seed)
        return _Taken(old, new, event, actions)

    def _with_losses(self, first: _Taken, now: float) -> list[_Taken]:
        """The step, and those of all who lose by it, by way of others too."""
        found = {first.old.id: first}
        todo = [first]
        for taken in todo:  # grows
            for loss in self.dependencies.losses(taken.old, taken.new):
                event = DependencyLost(loss.needed, loss.then)
                for worker_id in self._ids(loss.pool):
                    before = found.get(worker_id)
                    current = before.new if before else self.workers[worker_id]
                    if not dependencies.may_be_lost(current, loss.then):
                        continue
                    next_one = self._take(current, event, now)
                    if before is not None:
                        next_one = _Taken(before.old, next_one.new, event, before.actions + next_one.actions)
                    else:
                        todo.append(next_one)
                    found[worker_id] = next_one
        return list(found.values())

    def _keep_all(self, steps: list[_Taken], now: float) -> Actions:
        """Noted in reverse: should we die in between, whoever comes next sees who depends on a life stopped, and finds
        out about that life himself. The other way round nobody would know of the loss."""
        for number, taken in reversed(list(enumerate(steps))):
            if taken.new is not taken.old:
                steps[number] = taken._replace(new=self._changed(taken.old.id, taken.old, taken.new, now))
        actions: Actions = []
        for taken in steps:
            actions = self._finish(taken, now) + actions
        return actions

    def _keep(self, taken: _Taken, now: float) -> Actions:
        if taken.new is not taken.old:
            taken = taken._replace(new=self._changed(taken.old.id, taken.old, taken.new, now))
        return self._finish(taken, now)

    def _finish(self, taken: _Taken, now: float) -> Actions:
        old, new, event, actions = taken
        self._tell(old.id, old, new, event, actions, now)
        if not actions:
            return []
        if isinstance(actions[-1], Forget):
            gone = self._forget(new, now)
            self._drop_if_empty(new.pool, now)
            actions = actions if gone else actions[:-1]
        elif isinstance(actions[-1], FailPool):
            self._failing.append(new)
            actions = actions[:-1]
        return [(old.id, action) for action in actions]

    def _settle(self, now: float) -> Actions:
        """Launch those who wait no longer, and let those go down that are held back no longer, until nobody is left."""
        actions: Actions = []
        unsettled = self.dependencies.unsettled
        while unsettled:
            name = next(iter(unsettled))
            del unsettled[name]
            if name not in self.pools:
                continue
            if self.dependencies.waiting(name):
                reason = self.dependencies.reason(name)
                for worker_id in self._ids(name):
                    worker = self.workers[worker_id]
                    if worker.state is State.WAITING and worker.reason != reason:
                        actions += self._step(worker_id, Unblocked(), now)
            if self.dependencies.releases(name):
                for worker_id in self._ids(name):
                    if self.workers[worker_id].held:
                        actions += self._step(worker_id, Released(), now)
        return actions

    def _ids(self, name: str) -> list[str]:
        """The ids of a pool's workers, by index."""
        return [worker_id for _, worker_id in sorted(self._state[name].ids.items())]

    def _fail_pool(self, worker: Worker, now: float) -> Actions:
        """All others of its pool that are to be up go down, and have failed."""
        ids = self._state[worker.pool].ids
        others = [ids[index] for index in sorted(ids, reverse=True) if index != worker.index]
        return [action for worker_id in others for action in self._step(worker_id, Fail(), now)]

    def _changed(self, worker_id: str, old: Worker, new: Worker, now: float) -> Worker:
        """Keep new, its deadline, and the count of its pool's wishes."""
        if new.last_exit is not None and not new.last_exit.at:
            new = replace(new, last_exit=replace(new.last_exit, at=self._wall(now)))
        if new.exit is not None and not new.exit.at:
            new = replace(new, exit=replace(new.exit, at=self._wall(now)))
        self.workers[worker_id] = new
        self._record_life(worker_id, history.past(old, new))
        self.dependencies.changed(old, new)
        self._note_change(worker_id, new)
        if new.deadline is not None and new.deadline != old.deadline:
            self._remember(new.deadline, worker_id)
        if new.want_up != old.want_up:
            pool = self._state[new.pool]
            pool.wanting += 1 if new.want_up else -1
            # Scaling to nothing is no wish to be down.
            pool.up = pool.wanting > 0 or (pool.up and new.removing)
        return new

    def _record_life(self, worker_id: str, past: history.Past | None) -> None:
        if past is not None:
            self._lives.setdefault(worker_id, deque(maxlen=history.LIVES_KEPT)).append(past)

    def _remember(self, deadline: float, worker_id: str) -> None:
        heapq.heappush(self._heap, (deadline, worker_id))
        if len(self._heap) > 2 * len(self.workers) + _SLACK:
            self._heap = [(w.deadline, i) for i, w in self.workers.items() if w.deadline is not None]
            heapq.heapify(self._heap)

    # --- publishing ------------------------------------------------------------------------------------------------

    def note(
        self,
        event: str,
        now: float,
        *,
        pool: str | None = None,
        worker: str | None = None,
        generation: int | None = None,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        """Publish a fact that is no change of a worker's state, in the one sequence of numbers."""
        self._say(now, event, pool=pool, worker=worker, generation=generation, reason=reason, detail=detail)

    def _tell(
        self, worker_id: str, old: Worker, new: Worker, event: Input, actions: Iterable[Action], now: float
    ) -> None:
        """One event for a change of state, or for a fact without one."""
        signal = _deed_of(actions)
        relaunch = new.generation > old.generation
        if new.state is old.state and not relaunch:
            if signal:
                reason = "operator" if isinstance(event, Kill | Reload) else new.reason
                name = "command_run" if "command" in signal else "signalled"
                self._say(now, name, worker=worker_id, about=new, reason=reason, detail=signal)
            elif isinstance(event, Reset) and new is not old:
                self._say(now, "reset", worker=worker_id, reason="operator")
            elif new.ready is not old.ready:
                name = "became_ready" if new.ready else "became_unready"
                reason = event.reason if isinstance(event, Unready) else None
                self._say(now, name, worker=worker_id, about=new, reason=reason)
            return
        detail = signal
        ended = _ended(old, new)
        if ended is not None and relaunch:
            detail = {"ended": _life(old)}
        self._say(
            now,
            _event_name(old, new),
            worker=worker_id,
            about=new,
            from_=old.state.value,
            to=new.state.value,
            reason=new.reason,
            exit=ended,
            detail=detail,
        )
        intensity = self.pools[new.pool].restart.intensity
        if intensity is not None and new.reason == TOO_MANY and old.reason != TOO_MANY:
            detail = {"deaths": intensity.deaths, "within": intensity.within, "then": intensity.then}
            self._say(now, "intensity_exceeded", worker=worker_id, generation=old.generation, detail=detail)

    def _say(
        self,
        now: float,
        event: str,
        *,
        worker: str | None = None,
        pool: str | None = None,
        about: Worker | None = None,
        from_: str | None = None,
        to: str | None = None,
        reason: str | None = None,
        generation: int | None = None,
        exit: Exit | None = None,  # noqa: A002 - the field's name
        detail: dict[str, Any] | None = None,
    ) -> None:
        self.seq += 1
        host_pid = ns_pid = None
        if about is not None:
            # The change that ends a program still tells whose end it was.
            generation, host_pid, ns_pid = about.generation, about.last_host_pid, about.last_ns_pid
        self._publish(
            Event(
                event,
                epoch=self._epoch,
                seq=self.seq,
                ts=self._wall(now),
                worker=worker,
                pool=pool,
                from_=from_,
                to=to,
                reason=reason,
                generation=generation,
                host_pid=host_pid,
                ns_pid=ns_pid,
                exit=exit,
                detail=detail,
            )
        )


def _life(w: Worker) -> dict[str, Any]:
    return {"generation": w.generation, "host_pid": w.last_host_pid, "ns_pid": w.last_ns_pid}


def _event_name(old: Worker, new: Worker) -> str:
    if new.state is State.STARTING and new.restarts > old.restarts:
        return "relaunched"
    ended = old.alive and (not new.alive or (new.exit is not None and old.exit is None))
    if new.state is State.STOPPING and ended:
        return "main_exited"
    return EVENT_OF[new.state]


def _ended(old: Worker, new: Worker) -> Exit | None:
    """How the life ended that this change is about, if it is about an end."""
    if new.state is State.STOPPING:
        return new.exit or (new.last_exit if old.alive and not new.alive else None)
    if old.alive and new.last_exit is old.last_exit:
        return None  # the launch was withdrawn
    over = old.state in _LIVES and (new.state in _ENDS or new.generation > old.generation)
    return new.last_exit if over else None


def _deed_of(actions: Iterable[Action]) -> dict[str, Any] | None:
    for action in actions:
        if isinstance(action, SignalMain | SignalTree):
            return {"signal": action.signo, "tree": isinstance(action, SignalTree)}
        if isinstance(action, KillTree):
            return {"signal": SIGKILL, "tree": True}
        if isinstance(action, RunCommand):
            return {"command": list(action.command)}
    return None
