"""When a worker is ready: decided (machine, readiness), configured, and with real programs that say so."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING

import pytest
from live import PATIENCE, needs_namespaces
from test_config import parse, pool, wrong_pool
from test_machine import CODE_0, Story, running, web

from nssup import readiness
from nssup.errors import SpecError
from nssup.events import (
    Alive,
    CommandFailed,
    Exited,
    Gone,
    Passed,
    Ready,
    Restart,
    Sick,
    Start,
    State,
    Stop,
    Tick,
    Unready,
)
from nssup.loop import Supervisor
from nssup.machine import KillTree, RunCommand, SignalMain
from nssup.spec import PoolSpec, Probe, ReloadSpec, RestartPolicy, SocketSpec, StopStep, validate
from nssup.wire import Flag, Notified

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from nssup import Event

ASKED = web(ready=Probe(notify="sd"), start_timeout=5.0)
BOTH = web(startup=Probe(log="up"), ready=Probe(notify="sd"))
DOG = web(ready=Probe(notify="sd"), watchdog=2.0)


# --- the machine ----------------------------------------------------------------------------------------------------


def test_who_is_asked_nothing_is_ready_when_it_runs() -> None:
    story = running()
    assert (story.state, story.worker.ready, story.worker.deadline) == (State.RUNNING, True, None)


def test_starting_lasts_until_it_is_ready() -> None:
    story = running(ASKED, uptime=1.0)
    assert (story.state, story.worker.ready) == (State.STARTING, False)
    story.tell(Ready(1))
    assert (story.state, story.worker.ready, story.worker.deadline) == (State.RUNNING, True, None)
    assert story.worker.up_since == story.now


def test_who_is_not_ready_in_time_is_stopped_and_then_the_policy_decides() -> None:
    story = running(ASKED, uptime=4.9).tell(Tick())
    assert story.state is State.STARTING
    story.later(0.1).tell(Tick())
    assert (story.state, story.worker.reason, story.did) == (State.STOPPING, "start-timeout", (SignalMain(1, 15),))
    story.told(Exited, CODE_0, True)
    assert (story.state, story.worker.reason) == (State.BACKOFF, "start-timeout")
    assert story.worker.last_exit is not None
    assert (story.worker.last_exit.reason, story.worker.last_exit.code) == ("start-timeout", 0)


def test_who_hangs_before_its_program_runs_is_killed_at_once() -> None:
    story = Story(ASKED).tell(Start())
    assert story.worker.deadline is None
    from nssup.events import Launched

    story.tell(Launched(1, 5)).later(5.0).tell(Tick())
    assert (story.worker.reason, story.did) == ("start-timeout", (KillTree(1),))


def test_a_fault_is_a_failure_however_well_it_went() -> None:
    for policy in ("never", "on-failure"):
        spec = web(type="oneshot", ready=Probe(notify="sd"), restart=RestartPolicy(policy=policy))
        story = running(spec, uptime=90.0).tell(Tick()).told(Exited, CODE_0, True).told(Gone)
        assert story.state is (State.FAILED if policy == "never" else State.BACKOFF)


def test_settled_counts_from_ready() -> None:
    story = running(ASKED, uptime=4.0).told(Exited, CODE_0, True)
    assert story.state is State.BACKOFF, "never ready, so never settled"
    story = running(ASKED, uptime=4.0).tell(Ready(1)).later(0.5).told(Exited, CODE_0, True)
    assert story.state is State.BACKOFF, "ready, but not long enough"
    story = running(ASKED, uptime=1.0).tell(Ready(1)).later(1.5).told(Exited, CODE_0, True)
    assert story.state is State.STARTING


def test_lost_readiness_changes_no_state() -> None:
    story = running(ASKED).tell(Ready(1), Unready(1, "probe-failed"))
    assert (story.state, story.worker.ready, story.did) == (State.RUNNING, False, ())
    story.tell(Ready(1))
    assert (story.state, story.worker.ready) == (State.RUNNING, True)
    assert not story.tell(Stop()).worker.ready


@pytest.mark.parametrize("reason", ["watchdog", "probe-failed"])
def test_who_is_sick_goes_through_its_stop_sequence(reason: str) -> None:
    story = running(uptime=9.0).tell(Sick(1, reason))
    assert (story.state, story.worker.reason, story.did) == (State.STOPPING, reason, (SignalMain(1, 15),))
    story.later(10.0).tell(Tick())
    assert story.did == (KillTree(1),)
    story.told(Gone)
    assert (story.state, story.worker.reason) == (State.STARTING, reason)
    assert story.worker.last_exit is not None
    assert (story.worker.last_exit.reason, story.worker.last_exit.timed_out) == (reason, True)


def test_an_operator_beats_a_fault() -> None:
    story = running().tell(Sick(1, "watchdog"), Stop()).told(Exited, CODE_0, True).told(Gone)
    assert (story.state, story.worker.reason) == (State.STOPPED, "operator")
    story = running().tell(Sick(1, "watchdog"), Restart()).told(Exited, CODE_0, True)
    assert (story.state, story.worker.reason, story.worker.fault) == (State.STARTING, None, None)


def test_the_watchdog_counts_from_ready_and_from_each_heartbeat() -> None:
    story = running(DOG, uptime=50.0).tell(Ready(1))
    assert story.worker.deadline == story.now + 2.0
    story.later(1.0).tell(Alive(1, story.now + 2.0))
    assert story.worker.deadline == story.now + 2.0
    story.later(2.0).tell(Tick())
    assert (story.state, story.worker.reason) == (State.STOPPING, "watchdog")


def test_time_in_which_we_were_not_there_does_not_count() -> None:
    """REL-52: a supervisor that was stopped does not blame its workers."""
    story = running(DOG).tell(Ready(1)).later(32.0).tell(Tick())
    assert (story.state, story.worker.deadline) == (State.RUNNING, story.now + 2.0)
    story = running(DOG).tell(Ready(1)).later(2.1).tell(Tick())
    assert (story.state, story.worker.deadline) == (State.RUNNING, story.now + 0.25), "the last news may be old ones"
    story = running(ASKED).later(5.7).tell(Tick())
    assert story.state is State.STARTING
    assert story.worker.deadline == pytest.approx(story.now + 0.7)


def test_more_time_is_given_when_it_is_asked_for() -> None:
    story = running(ASKED, uptime=4.0).tell(Alive(1, extend=10.0, extend_at=104.0))
    assert story.worker.deadline == 114.0
    story.tell(Alive(1, extend=99.0, extend_at=104.0))
    assert story.worker.deadline == 114.0, "said once, counted once"
    story.tell(Alive(1, extend=1.0, extend_at=105.0))
    assert story.worker.deadline == 114.0, "never less"
    story = running(ASKED).tell(Ready(1), Stop()).later(3.0)
    story.tell(Alive(1, extend=60.0, extend_at=99.0))
    assert story.worker.deadline == 110.0, "said before the stop began"
    story.tell(Alive(1, extend=60.0, extend_at=102.0))
    assert story.worker.deadline == 162.0


def test_a_stop_step_may_be_a_command() -> None:
    spec = web(stop=(StopStep(None, 5.0, ("app", "quit")), StopStep(15, 2.0), StopStep(None)))
    story = running(spec).tell(Stop())
    assert (story.did, story.worker.deadline) == ((RunCommand(1, ("app", "quit"), 0),), story.now + 5.0)
    failed = story.copy().tell(CommandFailed(1, 0))
    assert failed.did == (SignalMain(1, 15),)
    failed = failed.tell(CommandFailed(1, 0))
    assert failed.did == ()
    story.later(5.0).tell(Tick())
    assert story.did == (SignalMain(1, 15),)
    killed = story.later(2.0).tell(Tick()).did
    assert killed == (KillTree(1),)


# --- what it says of itself -------------------------------------------------------------------------------------------


def told(story: Story, said: Notified) -> list[object]:
    """Everything that follows, and is fed; each at most once."""
    events: list[object] = []
    while (event := readiness.follows(story.spec, story.worker, said)) is not None:
        events.append(event)
        story.tell(event)
        assert len(events) < 5, "it never ends"
    return events


READY = Notified(Flag.READY, taken=1, readies=1, ready_ns=1)


def test_ready_makes_ready_once() -> None:
    assert told(running(ASKED), READY) == [Ready(1)]
    assert told(running(ASKED).tell(Ready(1)), READY) == []
    assert told(running(ASKED), Notified(taken=5)) == []
    assert told(running(), READY) == [], "nobody asked"
    assert told(Story(ASKED).tell(Start()), READY) == [], "its program is not known to run"


def test_after_a_startup_probe() -> None:
    story = running(BOTH)
    assert told(story, READY) == [], "not started yet"
    assert told(story.tell(Passed(1)), READY) == [Ready(1)]
    spec = web(startup=Probe(notify="sd"), ready=Probe(tcp="127.0.0.1:80"))
    assert told(running(spec), READY) == [Passed(1)]
    assert told(running(web(startup=Probe(notify="fd"))), READY) == [Ready(1)]


def test_stopping_is_not_ready() -> None:
    said = READY._replace(flags=Flag.READY | Flag.STOPPING)
    story = running(ASKED).tell(Ready(1))
    assert told(story, said) == [Unready(1, "stopping")]
    reloading = READY._replace(flags=Flag.READY | Flag.RELOADING)
    assert told(running(ASKED).tell(Ready(1)), reloading) == [], "who reloads still serves"


def test_the_watchdog_hears() -> None:
    story = running(DOG).tell(Ready(1))
    assert told(story, READY._replace(watchdog_ns=int(101e9))) == [Alive(1, 103.0)]
    assert told(story, READY._replace(watchdog_ns=int(100e9))) == []
    assert told(story, READY._replace(watchdog_ns=int(102e9), watchdog_us=9_000_000)) == [Alive(1, 111.0)]
    assert told(story, READY._replace(triggers=1)) == [Sick(1, "watchdog")]
    assert told(running(ASKED).tell(Ready(1)), READY._replace(triggers=1)) == [], "nobody asked"
    assert told(running(DOG), Notified(triggers=1)) == [], "only once it is ready"


def test_more_time_is_heard_where_something_is_waited_for() -> None:
    said = READY._replace(flags=0, extend_us=60_000_000, extend_ns=int(101e9))
    assert told(running(ASKED), said) == [Alive(1, extend=60.0, extend_at=101.0)]
    assert told(running(DOG).tell(Ready(1)), said) == []
    story = running(DOG).tell(Ready(1), Stop())
    assert told(story, said) == [Alive(1, extend=60.0, extend_at=101.0)]
    assert told(running(DOG).tell(Ready(1)).later(5.0).tell(Stop()), said) == []


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys() -> None:
    spec = pool(
        """
        start_timeout = "1m"
        watchdog = "10s"
        startup = { log = "listening on \\\\d+", failures = 3 }
        ready = { http = "http://127.0.0.1:{index+9000}/ready", every = "500ms", timeout = "1s", successes = 2 }
        live = { exec = ["check", "{index}"], failures = 5 }
        stop = [{ command = ["app", "quit"], wait = "5s" }, { signal = "INT", wait = "1s" }, "kill"]
        reload = { command = ["app", "reload"] }
        """
    )
    assert (spec.start_timeout, spec.watchdog) == (60.0, 10.0)
    assert spec.startup == Probe(log="listening on \\d+", failures=3)
    assert spec.ready == Probe(http="http://127.0.0.1:{index+9000}/ready", every=0.5, timeout=1.0, successes=2)
    assert spec.live == Probe(exec=("check", "{index}"), failures=5)
    assert spec.stop == (StopStep(None, 5.0, ("app", "quit")), StopStep(2, 1.0), StopStep(None))
    assert spec.reload == ReloadSpec(command=("app", "reload"))
    assert pool('reload = { signal = "HUP" }').reload == ReloadSpec(signal=1)
    assert pool('ready = { notify = "fd", fd = 7 }').ready == Probe(notify="fd", fd=7)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ready = {}", "4:1: pool.p.ready: must say in one way how to ask: give one of notify, http, tcp"),
        ('ready = { tcp = "localhost:1", unix = "/x" }', "4:1: pool.p.ready: must say in one way how to ask"),
        ('ready = { notify = "dbus" }', '4:11: pool.p.ready.notify: "dbus" is none of sd, fd'),
        ('ready = { notify = "fd", fd = 2 }', "4:26: pool.p.ready.fd: must be from 3"),
        ('live = { notify = "sd" }', "4:10: pool.p.live.notify: unknown key"),
        ('live = { log = "x" }', "4:10: pool.p.live.log: unknown key"),
        ('ready = { log = "(" }', "4:11: pool.p.ready.log: is no regular expression: "),
        ('ready = { http = "https://localhost/" }', "4:11: pool.p.ready.http: must be http://ADDRESS:PORT/PATH"),
        ('ready = { http = "http://example.org/" }', "4:11: pool.p.ready.http: must be http://ADDRESS:PORT/PATH"),
        ('ready = { tcp = "localhost" }', "4:11: pool.p.ready.tcp: must be ADDRESS:PORT"),
        ('ready = { tcp = "localhost:70000" }', "4:11: pool.p.ready.tcp: has a port that is none"),
        ('ready = { tcp = "localhost:{port}" }', "4:11: pool.p.ready.tcp: unknown field {port}"),
        ('ready = { unix = "run/x" }', "4:11: pool.p.ready.unix: must be an absolute path"),
        ("ready = { exec = [] }", "4:11: pool.p.ready.exec: is empty"),
        ('ready = { exec = ["x"], every = "0s" }', "4:25: pool.p.ready.every: must be longer than nothing"),
        ('ready = { exec = ["x"], every = 5 }', "4:25: pool.p.ready.every: "),
        ('ready = { exec = ["x"], failures = 0 }', "4:25: pool.p.ready.failures: must be from 1"),
        ('watchdog = "0s"', "4:1: pool.p.watchdog: must be longer than nothing"),
        ('start_timeout = "0s"', "4:1: pool.p.start_timeout: must be longer than nothing"),
        ('watchdog = "1s"\ninit = false', "4:1: pool.p.watchdog: needs nssup-init inside the worker"),
        ('ready = { notify = "fd" }\ninit = false', "4:11: pool.p.ready.notify: needs nssup-init"),
        ('ready = { exec = ["x"] }\ninit = false', "4:11: pool.p.ready.exec: needs nssup-init"),
        ('ready = { notify = "sd" }\nnamespaces = ["pid"]\nproc = false', "4:11: pool.p.ready.notify: needs the mount"),
        (
            'startup = { notify = "fd" }\nready = { notify = "sd" }',
            "4:13: pool.p.startup.notify: a program says only once that it is ready: leave it to ready",
        ),
        ("reload = {}", "4:1: pool.p.reload: must have one of signal and command"),
        ('reload = { command = ["x"] }\ninit = false', "4:12: pool.p.reload.command: needs nssup-init"),
        ('stop = [{ command = ["x"] }, "kill"]', '4:9: pool.p.stop.0.wait: is missing: write { signal = "TERM"'),
        ('stop = [{ command = ["x"], signal = "INT", wait = "1s" }, "kill"]', "4:9: pool.p.stop.0: must have one of"),
        ('stop = [{ command = ["x"], wait = "1s" }]', '4:1: pool.p.stop: must end with "kill"'),
        ('stop = [{ command = ["{x}"], wait = "1s" }, "kill"]', "4:22: pool.p.stop.0.command.0: unknown field {x}"),
    ],
)
def test_wrong_keys(text: str, why: str) -> None:
    found = wrong_pool(text)
    assert len(found) == 1, found
    assert found[0].startswith("n.toml:" + why)


def test_another_way_takes_back_that_of_the_defaults() -> None:
    text = """version = 1
[defaults]
ready = { http = "http://localhost/", every = "5s" }
reload = { signal = "HUP" }
[pool.a]
command = ["app"]
ready = { exec = ["check"] }
reload = { command = ["reload"] }
[pool.b]
command = ["app"]
ready = { every = "7s" }
"""
    pools = parse(text).pools
    assert pools["a"].ready == Probe(exec=("check",), every=5.0)
    assert pools["a"].reload == ReloadSpec(command=("reload",))
    assert pools["b"].ready == Probe(http="http://localhost/", every=7.0)


def test_a_descriptor_is_no_socket_as_well() -> None:
    spec = web(ready=Probe(notify="fd"), sockets=(SocketSpec(name="http", listen=("tcp://127.0.0.1:80",)),))
    with pytest.raises(SpecError, match=r"pool.web.ready.notify: fd must be 4 or more"):
        validate(spec)


def test_a_network_namespace_of_its_own_is_asked_by_exec() -> None:
    with pytest.raises(SpecError, match="use exec"):
        validate(web(namespaces=("pid", "mount", "net"), ready=Probe(tcp="localhost:80")))


# --- real programs ----------------------------------------------------------------------------------------------------

PYTHON = (os.path.realpath(sys.executable), "-S", "-E", "-c")
SENDER = """
import os, sys, time, signal, _socket
def send(text):
    s = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    s.connect(os.environ['NOTIFY_SOCKET']); s.send(text.encode()); s.close()
"""
NEVER = RestartPolicy(policy="never")


class Watched:
    """A supervisor, everything it has published, and somebody who waits for more."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.events: list[Event] = []
        self._news = asyncio.Event()
        supervisor.subscribe(self._heard)

    def _heard(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, name: str, worker: str = "web/0", after: int = 0) -> Event:
        return await self.which(lambda event: event.event == name and event.worker == worker, after)

    async def which(self, wanted: Callable[[Event], bool], after: int = 0) -> Event:
        async with asyncio.timeout(PATIENCE):
            while True:
                for event in self.events[after:]:
                    if wanted(event):
                        return event
                self._news.clear()
                await self._news.wait()


@contextlib.asynccontextmanager
async def watched(*specs: PoolSpec) -> AsyncIterator[Watched]:
    async with Supervisor() as supervisor:
        found = Watched(supervisor)
        for spec in specs:
            supervisor.add_pool(spec)
        yield found


def program(code: str, **fields: object) -> PoolSpec:
    return PoolSpec(name="web", command=(*PYTHON, SENDER + code), **fields)  # type: ignore[arg-type]


@needs_namespaces
@pytest.mark.both_loops
async def test_a_program_says_that_it_is_ready() -> None:
    code = "send('STATUS=busy'); sys.stdin.close(); send('READY=1'); signal.pause()"
    async with watched(program(code, ready=Probe(notify="sd"))) as seen:
        await seen.until("started")
        worker = seen.supervisor.workers.workers["web/0"]
        assert (worker.state, worker.ready) == (State.RUNNING, True)


@needs_namespaces
async def test_a_newline_says_it_too() -> None:
    code = "os.write(7, b'x\\n'); signal.pause()"
    async with watched(program(code, ready=Probe(notify="fd", fd=7))) as seen:
        await seen.until("started")


@needs_namespaces
@pytest.mark.both_loops
async def test_who_never_says_it_is_stopped_in_time() -> None:
    spec = program("signal.pause()", ready=Probe(notify="sd"), start_timeout=0.2, restart=NEVER)
    async with watched(spec) as seen:
        begun = await seen.until("stop_begun")
        assert (begun.from_, begun.to, begun.reason) == ("starting", "stopping", "start-timeout")
        failed = await seen.until("failed")
        assert failed.exit is not None
        assert (failed.reason, failed.exit.reason, failed.exit.signal) == ("start-timeout", "start-timeout", 15)


@needs_namespaces
async def test_a_heartbeat_keeps_it_and_its_end_does_not() -> None:
    """Beats for longer than the interval, then silence."""
    code = """
assert os.environ['WATCHDOG_USEC'] == '1500000'
send('READY=1')
for _ in range(40):
    time.sleep(0.05)
    send('WATCHDOG=1')
signal.pause()
"""
    async with watched(program(code, ready=Probe(notify="sd"), watchdog=1.5, restart=NEVER)) as seen:
        started, begun = await seen.until("started"), await seen.until("stop_begun")
        assert begun.reason == "watchdog"
        assert begun.ts - started.ts > 2.0 + 1.4
        assert (await seen.until("failed")).reason == "watchdog"


@needs_namespaces
async def test_who_gives_itself_up_is_stopped_at_once() -> None:
    code = "send('READY=1'); send('WATCHDOG=trigger'); signal.pause()"
    async with watched(program(code, ready=Probe(notify="sd"), watchdog=600.0, restart=NEVER)) as seen:
        assert (await seen.until("stop_begun")).reason == "watchdog"


@needs_namespaces
async def test_who_says_that_it_stops_is_not_ready_any_more() -> None:
    code = "send('READY=1'); send('STOPPING=1'); signal.pause()"
    async with watched(program(code, ready=Probe(notify="sd"))) as seen:
        lost = await seen.until("became_unready")
        assert (lost.reason, lost.to) == ("stopping", None)
        worker = seen.supervisor.workers.workers["web/0"]
        assert (worker.state, worker.ready) == (State.RUNNING, False)


@needs_namespaces
async def test_more_time_to_start_and_to_stop() -> None:
    code = """
def slowly(*_):
    send('EXTEND_TIMEOUT_USEC=600000000')
    time.sleep(0.6)
    os._exit(5)
signal.signal(signal.SIGTERM, slowly)
send('EXTEND_TIMEOUT_USEC=600000000')
time.sleep(0.6)
send('READY=1')
while True: signal.pause()
"""
    spec = program(code, ready=Probe(notify="sd"), start_timeout=0.4, stop=(StopStep(15, 0.4), StopStep(None)))
    async with watched(spec) as seen:
        await seen.until("started")
        seen.supervisor.feed("web/0", Stop())
        await seen.until("stopped")
        ended = seen.supervisor.workers.workers["web/0"].last_exit
        assert ended is not None
        assert (ended.code, ended.timed_out) == (5, False)
