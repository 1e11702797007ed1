"""A fake world under the real core: the same WorkerSet, with lives that are told their fate and a clock that is turned.

No process, no sleep, no wall clock; one seed gives one trace. It keeps the kernel's side of the bargain (what a life
tells, in which order, and that nothing is heard of what was killed) and refuses what no supervisor may ask: a second
life beside one that is not over, and a signal to a life that is.
"""

import hashlib
import heapq
import math
import random
import signal
from collections.abc import Callable
from typing import TypeAlias

import msgspec

from nssup.errors import ImpossibleEvent
from nssup.events import (
    Alive,
    Empty,
    Event,
    Exit,
    Exited,
    Gone,
    Input,
    Launched,
    LaunchFailed,
    LifeInput,
    Ready,
    Running,
    SetupFailed,
    Started,
    Unready,
)
from nssup.machine import EndSupervisor, Forget, KillTree, Launch, RunCommand, SignalMain, SignalTree, asks_readiness
from nssup.spec import SIGKILL, PoolSpec
from nssup.workers import Actions, WorkerSet


class Fate(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one life. Times in seconds.

    launch_fails, setup_fails: the reason, or None. launch: until its program runs, or its set-up fails. ready: from
    then until it is ready, where that is asked; math.inf: never. life: until the program ends by itself, with `exit`;
    math.inf: never. rest: from the program's end to the empty namespace, 0 when it was alone in it. reap: from there,
    or from the kill, until init is reaped. obeys: seconds until it ends on a signal, or on a command of its stop
    sequence; math.inf: it is deaf to all but SIGKILL. silent: from when it runs until it feeds its watchdog no more.
    init_dies: what ends after `life` is not the program but init.
    """

    launch_fails: str | None = None
    setup_fails: str | None = None
    launch: float = 0.001
    ready: float = 0.0
    life: float = math.inf
    exit: Exit = Exit(reason="exit:0", code=0)
    rest: float = 0.0
    reap: float = 0.001
    obeys: float = 0.01
    silent: float = math.inf
    init_dies: bool = False


Fates: TypeAlias = Callable[[str, int], Fate]


def seeded(seed: str, *, mean_life: float = 600.0, trouble: float = 0.05) -> Fates:
    """Fates by chance: lives of mean_life seconds on average; a share `trouble` of them ends, or begins, badly."""
    chance = random.Random(seed)

    def fate(worker_id: str, generation: int) -> Fate:
        code = chance.choice((0, 1, 3))
        trouble_kind = chance.choice(("launch", "setup", "init", "deaf")) if chance.random() < trouble else ""
        return Fate(
            launch_fails="setup-failed:clone:EAGAIN" if trouble_kind == "launch" else None,
            setup_fails="exec-failed:ENOENT" if trouble_kind == "setup" else None,
            launch=chance.uniform(0.0005, 0.005),
            life=chance.expovariate(1 / mean_life),
            exit=Exit(reason=f"exit:{code}", code=code),
            rest=chance.choice((0.0, chance.uniform(0.001, 0.1))),
            reap=chance.uniform(0.0005, 0.5),
            obeys=math.inf if trouble_kind == "deaf" else chance.uniform(0.001, 1.0),
            init_dies=trouble_kind == "init",
        )

    return fate


class _Life:
    """One fake life. ended: its program is gone. over: nothing more is heard of it but Gone. killed: we did that,
    and its init is not reaped yet. silent_at: from when on its watchdog is not fed."""

    __slots__ = ("ended", "fate", "generation", "killed", "over", "silent_at", "worker_id")

    def __init__(self, worker_id: str, generation: int, fate: Fate) -> None:
        self.worker_id = worker_id
        self.generation = generation
        self.fate = fate
        self.ended = False
        self.over = self.killed = False
        self.silent_at = math.inf


class Bounds(msgspec.Struct):
    """How much there was of it: steps taken, events published, lives launched, and the longest heaps."""

    steps: int = 0
    events: int = 0
    launches: int = 0
    most_deadlines: int = 0
    most_news: int = 0


class Simulation:
    """A WorkerSet in a fake world. now: seconds, moved by `run` alone. workers is for reading. ended: a worker's policy
    has asked the supervisor to end."""

    def __init__(self, fates: Fates, *, seed: str = "", observe: Callable[[Event], None] | None = None) -> None:
        self.now = 0.0
        self.workers = WorkerSet(self._published, epoch=1, seed=seed)
        self.bounds = Bounds()
        self.ended = False
        self._fates = fates
        self._observe = observe
        self._news: list[tuple[float, int, _Life, LifeInput]] = []
        self._order = 0
        self._lives: dict[str, list[_Life]] = {}
        self._trace = hashlib.blake2b(digest_size=16)
        self._encode = msgspec.json.Encoder().encode

    # --- what an operator does -------------------------------------------------------------------------------------

    def add_pool(self, spec: PoolSpec) -> None:
        self._perform(self.workers.add_pool(spec, self.now))

    def remove_pool(self, name: str) -> None:
        self._perform(self.workers.remove_pool(name, self.now))

    def scale(self, name: str, wanted: int) -> None:
        self._perform(self.workers.scale(name, wanted, self.now))

    def feed(self, worker_id: str, event: Input) -> None:
        self.bounds.steps += 1
        self._perform(self.workers.feed(worker_id, event, self.now))

    # --- what becomes of programs ----------------------------------------------------------------------------------

    def end(self, worker_id: str, how: Exit) -> bool:
        """The program ends by itself, now. False: there is none."""
        worker = self.workers.workers.get(worker_id)
        for life in self._lives.get(worker_id, ()):
            if worker is not None and worker.host_pid is not None and not life.over and not life.ended:
                self._deliver(life, self._exited(life, how))
                return True
        return False

    def say_ready(self, worker_id: str, ready: bool) -> bool:
        """The program is ready again, or not any more. False: it does not run."""
        worker = self.workers.workers.get(worker_id)
        if worker is None or worker.running_since is None:
            return False
        self.feed(worker_id, Ready(worker.generation) if ready else Unready(worker.generation, "probe-failed"))
        return True

    # --- time ------------------------------------------------------------------------------------------------------

    def run(self, until: float) -> None:
        """Let everything happen that happens up to `until`."""
        while True:
            deadline = self.workers.next_deadline()
            at = self._news[0][0] if self._news else math.inf
            if deadline is not None and deadline <= min(at, until):
                self.now = max(self.now, deadline)
                self.bounds.steps += 1
                self._perform(self.workers.due(self.now))
            elif at <= until:
                self.now, _, life, news = heapq.heappop(self._news)
                self._deliver(life, news)
            else:
                break
        self.now = until

    def trace(self) -> str:
        """A hash of everything published so far."""
        return self._trace.hexdigest()

    def unreaped(self) -> int:
        """Lives of which something is left."""
        return sum(map(len, self._lives.values()))

    # --- the world -------------------------------------------------------------------------------------------------

    def _published(self, event: Event) -> None:
        self.bounds.events += 1
        self._trace.update(self._encode(event))
        if self._observe is not None:
            self._observe(event)

    def _later(self, seconds: float, life: _Life, news: LifeInput) -> None:
        if seconds < math.inf:
            self._order += 1
            heapq.heappush(self._news, (self.now + seconds, self._order, life, news))

    def _deliver(self, life: _Life, news: LifeInput) -> None:
        if isinstance(news, Gone):
            if life not in self._lives.get(life.worker_id, ()):
                return  # reaped already
            life.over = True
            self._lives[life.worker_id].remove(life)
        elif life.over or (life.ended and isinstance(news, Exited | Ready | Alive)):
            return  # killed, or ended by something else, meanwhile
        elif isinstance(news, Alive):
            self._beat_again(life)
        elif isinstance(news, LaunchFailed):
            life.over = True
            self._lives[life.worker_id].remove(life)
        elif isinstance(news, Exited):
            life.ended = True
            if news.empty:
                self._emptied(life)
            else:
                self._later(life.fate.rest, life, Empty(life.generation))
        elif isinstance(news, Empty):
            self._emptied(life)
        self.feed(life.worker_id, news)

    def _beat(self, life: _Life, after: float, watchdog: float) -> None:
        """Good for one period of the watchdog."""
        self._later(after, life, Alive(life.generation, until=self.now + after + watchdog))

    def _beat_again(self, life: _Life) -> None:
        watchdog = self.workers.pools[life.worker_id.partition("/")[0]].watchdog
        if watchdog is not None and self.now + watchdog / 2 < life.silent_at:
            self._beat(life, watchdog / 2, watchdog)

    def _emptied(self, life: _Life) -> None:
        life.over = True
        self._later(life.fate.reap, life, Gone(life.generation))

    def _perform(self, actions: Actions) -> None:
        for worker_id, action in actions:
            if isinstance(action, Launch):
                self._launch(worker_id, action.generation)
            elif isinstance(action, Forget):
                if self._lives.pop(worker_id, []):
                    raise ImpossibleEvent(f"{worker_id} is forgotten, though something of it is left")
            elif isinstance(action, SignalMain | SignalTree | KillTree | RunCommand):
                self._signal(worker_id, action)
            elif isinstance(action, EndSupervisor):
                self.ended = True
        self.bounds.most_deadlines = max(self.bounds.most_deadlines, self.workers.pending())
        self.bounds.most_news = max(self.bounds.most_news, len(self._news))

    def _launch(self, worker_id: str, generation: int) -> None:
        lives = self._lives.setdefault(worker_id, [])
        if any(not life.over for life in lives):
            raise ImpossibleEvent(f"{worker_id}: a second life beside one that is not over")
        self.bounds.launches += 1
        fate = self._fates(worker_id, generation)
        life = _Life(worker_id, generation, fate)
        lives.append(life)
        if fate.launch_fails:
            self._later(0.0, life, LaunchFailed(generation, fate.launch_fails))
            return
        host_pid = 2 * self.bounds.launches + 1000
        self._later(0.0, life, Launched(generation, host_pid))
        self._later(fate.launch, life, Started(generation, host_pid + 1, 2))
        if fate.setup_fails:
            self._later(fate.launch, life, SetupFailed(generation, fate.setup_fails))
            self._later(fate.launch, life, Empty(generation))
            return
        self._later(fate.launch, life, Running(generation))
        spec = self.workers.pools[worker_id.partition("/")[0]]
        if asks_readiness(spec):
            self._later(fate.launch + fate.ready, life, Ready(generation))
        if spec.watchdog is not None and fate.silent > 0:
            life.silent_at = self.now + fate.launch + fate.silent
            self._beat(life, fate.launch, spec.watchdog)
        if not fate.init_dies:
            self._later(fate.launch + fate.life, life, self._exited(life, fate.exit))
        elif fate.life < math.inf:
            self._later(fate.launch + fate.life, life, Gone(generation))

    def _exited(self, life: _Life, how: Exit) -> Exited:
        return Exited(life.generation, how, empty=life.fate.rest == 0)

    def _signal(self, worker_id: str, action: SignalMain | SignalTree | KillTree | RunCommand) -> None:
        found = [life for life in self._lives[worker_id] if life.generation == action.generation]
        if not found or (found[0].over and not found[0].killed):
            raise ImpossibleEvent(f"{worker_id}: {action} to a life that is over")
        life = found[0]
        if life.killed:
            return  # on its way out: nothing hears it
        if isinstance(action, KillTree):
            life.over = life.killed = True
            self._later(life.fate.reap, life, Gone(life.generation))
        elif isinstance(action, RunCommand):
            self._later(life.fate.obeys, life, self._exited(life, Exit(reason="exit:0", code=0)))
        else:
            how = Exit(reason=f"signal:{signal.Signals(action.signo).name}", signal=action.signo)
            self._later(0.0 if action.signo == SIGKILL else life.fate.obeys, life, self._exited(life, how))
