"""A supervisor that ends without ending its workers: `ctl reexec`, and `ctl shutdown --leave-running`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from live import PATIENCE, Up, locked_by, needs_namespaces, nssup, opened, status_field, wait_gone, wait_readable

from nssup import reexec

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_namespaces

PACKAGE = Path(reexec.__file__).parent
# One of each kind: who outlives its supervisor, who ends with it, who has no init.
KINDS = """
[pool.keep]
command = ["sleep", "1000"]
workers = 2
on_supervisor_death = "keep"
[pool.die]
command = ["sleep", "1000"]
[pool.bare]
command = ["sleep", "1000"]
init = false
stop = ["kill"]
[pool.once]
command = ["sh", "-c", "exit 0"]
type = "oneshot"
on_supervisor_death = "keep"
"""
ALIVE = ("keep/0", "keep/1", "die/0", "bare/0")
SAME = ("host_pid", "ns_pid", "init_host_pid", "generation", "restarts", "namespaces", "last_exit", "state", "desired")


@pytest.fixture(params=["uvloop"])
def up(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Up]:
    (tmp_path / "uvloop.py").write_text("raise ImportError")
    env = {"PYTHONPATH": str(tmp_path)} if request.param == "asyncio" else {}
    with Up(tmp_path, KINDS, env=env) as running:
        running.wait_running(*ALIVE)
        running.wait("finished", "once/0")
        yield running


def seen(up: Up) -> dict[str, dict[str, Any]]:
    """What a change of supervisor must not change."""
    return {w["id"]: {key: w[key] for key in SAME} for w in up.status()["workers"]}


def children(host_pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{host_pid}/task/{host_pid}/children").read_text().split()]


def zombies(host_pid: int) -> list[int]:
    return [each for each in children(host_pid) if status_field(each, "State").startswith("Z")]


def changes(up: Up, epoch: int) -> list[str]:
    return [e["event"] for e in up.events if e["epoch"] == epoch and "to" in e]


# --- reexec -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", ["uvloop", "asyncio"], indirect=True)
def test_nobody_notices(up: Up) -> None:
    before, uptimes = seen(up), {w["id"]: w["uptime_seconds"] for w in up.status()["workers"]}
    said = up.ctl("reexec")
    here = f"host PID {up.host_pid}"
    assert said == (0, f"nssup 0.1.0 (epoch 1, {here}) -> nssup 0.1.0 (epoch 2, {here})\n", "")
    assert seen(up) == before
    status = up.status()
    assert (status["supervisor"]["host_pid"], status["supervisor"]["epoch"]) == (up.host_pid, 2)
    for worker in status["workers"]:
        assert worker["adopted"] == (worker["id"] in ALIVE)
        assert worker["id"] not in ALIVE or worker["uptime_seconds"] > uptimes[worker["id"]]
    up.wait("left_running", reason="reexec", detail={"workers": 4})
    assert changes(up, 2) == []
    # They are its children as before, and end as ever.
    assert sorted(children(up.host_pid)) == sorted(w["init_host_pid"] for w in before.values() if w["init_host_pid"])
    for worker_id in ALIVE:
        assert up.ctl("kill", "-9", worker_id).code == 0
        up.wait("relaunched", worker_id, epoch=2)
    for worker in up.wait_running(*ALIVE):
        assert (worker["generation"], worker["last_exit"]["reason"]) == (2, "signal:SIGKILL"), worker
    assert zombies(up.host_pid) == []


def settled_kinds(up: Up) -> list[str]:
    """What its descriptors are, once requests are over and all that is imported later is."""
    before: list[str] = []
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        seen = []
        for fd in Path(f"/proc/{up.host_pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                seen.append(os.readlink(fd).rstrip("0123456789]"))
        seen.sort()
        if seen == before and not any(name.endswith((".py", ".pyc", ".so")) for name in seen):
            return seen
        before = seen
        assert up.ctl("ping").code == 0  # a turn of its loop
    raise AssertionError("its descriptors do not come to rest")


def test_again_and_again_nothing_adds_up(up: Up) -> None:
    assert up.ctl("reexec").code == 0
    kinds = settled_kinds(up)
    environment = Path(f"/proc/{up.host_pid}/environ").read_bytes()
    for epoch in (3, 4):
        assert json.loads(up.ctl("reexec", "--json").out)["to"]["epoch"] == epoch
    assert settled_kinds(up) == kinds
    assert len(Path(f"/proc/{up.host_pid}/environ").read_bytes()) == len(environment)
    assert up.ctl("reexec", "--no-wait").out == f"nssup 0.1.0 (epoch 4, host PID {up.host_pid}) -> nssup 0.1.0\n"


LINES = """
trap 'printf "ter\\nafter\\n"; exec sleep 1000' USR1
printf 'before\\nhalf-'
while :; do sleep 1000 & wait $!; done
"""


def test_output_goes_on_byte_for_byte(tmp_path: Path) -> None:
    """Where a line is in two parts, they are two records that fit together."""
    command = f"command = ['sh', '-c', '''{LINES}''']\n"
    pools = (
        f'[pool.keep]\n{command}on_supervisor_death = "keep"\n[pool.die]\n{command}log.merge = true\n'
        f'[pool.bare]\n{command}init = false\nstop = ["kill"]\n'
    )
    workers = ("keep/0", "die/0", "bare/0")
    with Up(tmp_path, pools) as up:
        for worker_id in workers:
            up.wait_record(worker_id.partition("/")[0], lambda record: record.get("msg") == "before")
        assert up.ctl("reexec").code == 0
        assert up.ctl("kill", "-s", "USR1", *workers).code == 0
        for worker_id in workers:
            pool = worker_id.partition("/")[0]
            up.wait_record(pool, lambda record: record.get("msg") == "after")
        assert up.end() == 0  # then all is in the files
    for worker_id in workers:
        at, text = 0, ""
        for record in up.records(worker_id.partition("/")[0]):
            assert record["offset"] == at, record
            part = record["msg"] + ("" if record.get("nl") is False else "\n")
            at, text = at + len(part), text + part
        assert text == "before\nhalf-ter\nafter\n"


def test_whoever_asks_meanwhile_is_answered(up: Up) -> None:
    """None is refused, none is dropped: they wait in the queue of the one socket."""
    done = threading.Event()
    epochs: list[int] = []

    def ask() -> None:
        while not done.is_set():
            epochs.append(up.api("GET", "/healthz")[1]["supervisor"]["epoch"])

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    codes = [up.ctl("reexec").code for _ in range(2)]
    done.set()
    for thread in asking:
        thread.join()
    assert codes == [0, 0]
    assert {1, 3} <= set(epochs) <= {1, 2, 3}


def test_no_other_supervisor_slips_in(up: Up) -> None:
    locks = [up.directory / "s" / "lock", up.directory / "s" / "run" / "lock"]
    holders: set[int | None] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            holders.update(map(locked_by, locks))

    looking = threading.Thread(target=look)
    looking.start()
    assert up.ctl("reexec").code == 0
    done.set()
    looking.join()
    assert holders == {up.host_pid}
    second = nssup("up", "-c", str(up.config))
    assert (second.code, "another supervisor has" in second.err) == (1, True)


@pytest.mark.slow
def test_for_goes_on_from_where_it_was(tmp_path: Path) -> None:
    pools = '[pool.web]\ncommand = ["sleep", "1000"]\n'
    began = time.monotonic()
    with Up(tmp_path, pools) as up:
        up.wait_running("web/0")
        assert up.ctl("reexec").code == 0
        limit = min(1.0 + 2 * (time.monotonic() - began), PATIENCE - 5)  # there is time left when it has become another
    with Up(tmp_path, pools, "--for", str(limit)) as up:
        up.wait_running("web/0")
        assert up.ctl("reexec").code == 0
        assert up.wait_end() == 0
        adopted, stopped = up.wait("adopted", "web/0"), up.wait("stop_begun", "web/0", epoch=4)
        seconds = [float(event["ts"][17:26]) for event in (adopted, stopped)]
        assert (seconds[1] - seconds[0]) % 60 < limit


def test_what_the_death_of_the_supervisor_means_can_change(tmp_path: Path) -> None:
    """By the config, for workers that are there: neither is stopped."""
    script = "trap 'echo again' USR1; echo up; while :; do sleep 1000 & wait $!; done"
    pool = f'command = ["sh", "-c", "{script}"]\non_supervisor_death ='
    first = f'[pool.one]\n{pool} "keep"\n[pool.two]\n{pool} "die"\n'
    then = f'[pool.one]\n{pool} "die"\n[pool.two]\n{pool} "keep"\n'
    with Up(tmp_path, first) as up:
        up.leaves = True
        for name in ("one", "two"):
            up.wait_record(name, lambda record: record.get("msg") == "up")
        before = seen(up)
        up.config.write_text(up.config.read_text().replace(first, then))
        assert up.ctl("reexec").code == 0
        assert seen(up) == before
        assert up.ctl("kill", "-s", "USR1", "--all").code == 0
        for name in ("one", "two"):
            up.wait_record(name, lambda record: record.get("msg") == "again")
        with opened(before["one/0"]["init_host_pid"]) as pidfd:
            up.process.kill()
            up.wait_end()
            wait_readable(pidfd, "it outlives its supervisor")
        with Up(tmp_path, then) as after:
            one, two = after.wait_running("one/0", "two/0")
            assert (one["generation"], two["generation"]) == (2, 1)
            assert two["host_pid"] == before["two/0"]["host_pid"]
            after.wait_record("one", lambda record: record["generation"] == 2)
            said = [(r["offset"], r["msg"]) for r in after.records("one")]
        assert said == [(0, "up"), (3, "again"), (0, "up")]


def test_an_essential_pool_still_ends_it_with_its_code(tmp_path: Path) -> None:
    command = "command = ['sh', '-c', 'trap \"exit 7\" USR1; while :; do sleep 1000 & wait $!; done']"
    pool = f'[pool.web]\nessential = true\n{command}\nrestart.policy = "never"\n'
    with Up(tmp_path, pool) as up:
        up.wait_running("web/0")
        assert up.ctl("reexec").code == 0
        assert up.ctl("kill", "-s", "USR1", "web").code == 0
        assert up.wait_end() == 7


# What is refused, and then nothing has changed.


@pytest.mark.parametrize(
    ("change", "code", "why"),
    [
        (("command", "commnd"), 78, "unknown key"),
        (('log_dir = "', 'log_dir = "/elsewhere'), 1, "another log_dir now: that takes a restart"),
    ],
)
def test_a_config_that_would_not_do(up: Up, change: tuple[str, str], code: int, why: str) -> None:
    before = seen(up)
    up.config.write_text(up.config.read_text().replace(*change))
    said = up.ctl("reexec")
    assert (said.code, said.out) == (code, "")
    assert why in said.err
    assert (up.status()["supervisor"]["epoch"], seen(up)) == (1, before)
    answer = json.loads(up.ctl("reexec", "--json").out)
    assert answer["error"]["code"] == "refused"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the package, to put another version in its place."""
    place = tmp_path / "installed"
    shutil.copytree(PACKAGE, place / "nssup", ignore=shutil.ignore_patterns("__pycache__", "native"))
    return place


@contextlib.contextmanager
def running(directory: Path, installed: Path, pools: str = KINDS) -> Iterator[Up]:
    # `python -m` looks into the directory it is started in.
    with Up(directory, pools, prefix=("env", "-C", str(installed))) as up:
        yield up


def put(installed: Path, module: str, old: str, new: str) -> None:
    path = installed / "nssup" / f"{module}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_another_version(tmp_path: Path, installed: Path) -> None:
    with running(tmp_path, installed) as up:
        up.wait_running(*ALIVE)
        before = seen(up)
        put(installed, "__init__", '"0.1.0"', '"0.2.0"')
        said = up.ctl("reexec")
        here = f"host PID {up.host_pid}"
        assert said == (0, f"nssup 0.1.0 (epoch 1, {here}) -> nssup 0.2.0 (epoch 2, {here})\n", "")
        assert up.ctl("ping").out == f"pong: nssup 0.2.0, {here}\n"
        assert seen(up) == before


# Where each format has its version; each must be another, or the next version would not be one.
VERSIONS = {"wire": "\nVERSION", "record": "\nSLOT_VERSION", "handover": "\nVERSION", "reexec": "\nVERSION"}


def become_next(installed: Path) -> None:
    """As the next version will be, which understands one more of everything, and writes it where it may."""
    for module, name in VERSIONS.items():
        put(installed, module, f"{name} = 1", f"{name} = 2")


def test_the_next_version_takes_over_and_this_one_does_not_take_over_from_it(tmp_path: Path, installed: Path) -> None:
    """Told by reexec, and by a kill: with the inits, the notes, the staged output and the inheritance of this one."""
    script = "trap 'echo again' USR1; echo up; while :; do sleep 1000 & wait $!; done"
    pools = "".join(
        f'[pool.{name}]\ncommand = ["sh", "-c", "{script}"]\non_supervisor_death = "{name}"\n'
        for name in ("keep", "die")
    )

    def says(up: Up, pool: str, times: int) -> None:
        assert up.ctl("kill", "-s", "USR1", pool).code == 0
        up.wait_record(pool, lambda record: record["offset"] == len("up\n") + len("again\n") * (times - 1))

    with running(tmp_path, installed, pools) as up:
        up.leaves = True
        for name in ("keep", "die"):
            up.wait_record(name, lambda record: record.get("msg") == "up")
        before = seen(up)
        become_next(installed)
        assert up.ctl("reexec").code == 0
        assert seen(up) == before
        for name in ("keep", "die"):
            says(up, name, 1)
        shutil.copytree(PACKAGE, installed / "nssup", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        said = up.ctl("reexec")
        assert (said.code, "does not understand the inheritance of this one" in said.err) == (1, True), said
        up.process.kill()
        up.wait_end()
    refused = nssup("up", "-c", str(up.config))
    assert (refused.code, "written by a later version of nssup" in refused.err) == (1, True), refused
    become_next(installed)
    with running(tmp_path, installed, pools) as up:
        up.wait_running("keep/0", "die/0")
        after = seen(up)
        assert after["keep/0"] == before["keep/0"]
        assert after["die/0"]["host_pid"] != before["die/0"]["host_pid"]
        says(up, "keep", 2)
        assert up.end() == 0
    assert [record["msg"] for record in up.records("keep")][:3] == ["up", "again", "again"]


@pytest.mark.parametrize(
    ("module", "old", "new", "why"),
    [
        ("loop", "class Supervisor", "class Supervisor:", "SyntaxError"),
        ("ctl", "import asyncio", "import no_such_module", "No module named"),
        ("record", "SLOT_VERSION = 1", "SLOT_VERSION = 3", "does not understand the lives of this one"),
    ],
)
def test_code_that_would_not_do(tmp_path: Path, installed: Path, module: str, old: str, new: str, why: str) -> None:
    with running(tmp_path, installed) as up:
        up.wait_running(*ALIVE)
        before = seen(up)
        put(installed, module, old, new)
        said = up.ctl("reexec")
        assert (said.code, said.out, why in said.err) == (1, "", True), said
        assert seen(up) == before
        assert up.status()["supervisor"]["epoch"] == 1


def test_when_the_exec_fails_the_code_of_before_goes_on(tmp_path: Path, installed: Path) -> None:
    put(installed, "reexec", "os.execve(words[0], ", "os.execve('/not/there', ")
    with running(tmp_path, installed) as up:
        up.wait_running(*ALIVE)
        before = seen(up)
        for epoch in (2, 3):
            said = up.ctl("reexec")
            assert (said.code, f"(epoch {epoch}, host PID {up.host_pid})" in said.out) == (1, True), said
            assert "still the code of before: cannot exec" in said.err
            failed = up.wait("reexec_failed", epoch=epoch)
            assert failed["reason"].endswith("No such file or directory")
            assert seen(up) == before
        assert zombies(up.host_pid) == []


def test_how_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    for original, seen, start in (
        (["python3", "-X", "dev", "/bin/nssup", "up"], ["/bin/nssup", "up"], ["-X", "dev", "/bin/nssup"]),
        (["python3", "-m", "nssup", "up"], ["/lib/nssup/__main__.py", "up"], ["-m", "nssup"]),
        (["python3", "-c", "main()", "up"], ["-c", "up"], ["-c", "main()"]),
    ):
        monkeypatch.setattr(sys, "orig_argv", original)
        monkeypatch.setattr(sys, "argv", seen)
        assert reexec.command() == (["/usr/bin/python3", *start], ["up"])
    monkeypatch.setattr(sys, "argv", ["program", "something", "else"])
    assert reexec.command() is None


@pytest.mark.parametrize("value", ["", "x", "99", "0", "-1"])
def test_an_inheritance_that_is_none(tmp_path: Path, value: str) -> None:
    with Up(tmp_path, KINDS, env={reexec.VARIABLE: value}) as up:
        up.wait_running(*ALIVE)
        assert os.readlink(f"/proc/{up.host_pid}/fd/0") == "/dev/null"
        assert up.end() == 0
        assert any(line.startswith(f"nssup: NSSUP_INHERITANCE={value}: ") for line in up.said)


# --- what happens in the gap ------------------------------------------------------------------------------------------

PATIENT = """command = ["sh", "-c", "trap 'exit 5' USR1; while :; do sleep 1000 & wait $!; done"]\n"""
IN_GAP = f"""
[defaults.restart]
policy = "never"
[pool.keep]
{PATIENT}workers = 2
on_supervisor_death = "keep"
[pool.die]
{PATIENT}workers = 2
[pool.bare]
{PATIENT}init = false
stop = ["kill"]
"""


@contextlib.contextmanager
def with_gap(directory: Path, installed: Path, pools: str) -> Iterator[tuple[Up, Path]]:
    """A supervisor, and a file of Python that it runs when it has let go of everything and is about to exec."""
    gap = directory / "gap.py"
    put(installed, "reexec", "        os.execve(", "        exec(open(environ['GAP']).read())\n        os.execve(")
    with Up(directory, pools, prefix=("env", "-C", str(installed), f"GAP={gap}")) as up:
        yield up, gap


def test_who_ends_in_the_gap_is_told_of_as_ever(tmp_path: Path, installed: Path) -> None:
    with with_gap(tmp_path, installed, IN_GAP) as (up, gap):
        up.api("POST", "/v1/wait", {"wait": "running"})
        workers = {w["id"]: w for w in up.status()["workers"]}
        signals = [
            (workers["keep/0"]["host_pid"], signal.SIGUSR1),
            (workers["keep/1"]["init_host_pid"], signal.SIGKILL),
            (workers["die/0"]["host_pid"], signal.SIGUSR1),
            (workers["die/1"]["init_host_pid"], signal.SIGKILL),
            (workers["bare/0"]["host_pid"], signal.SIGUSR1),
        ]
        gap.write_text(
            "import select, signal\n"
            f"for number, signo in {[(host_pid, int(signo)) for host_pid, signo in signals]}:\n"
            "    fd = os.pidfd_open(number)\n"
            "    signal.pidfd_send_signal(fd, signo)\n"
            "    gone = select.poll()\n"
            "    gone.register(fd, select.POLLIN)\n"
            "    gone.poll()\n"
            "    os.close(fd)\n"
        )
        assert up.ctl("reexec").code == 0
        reasons = {worker_id: up.wait("failed", worker_id, epoch=2)["exit"]["reason"] for worker_id in workers}
        assert reasons == {
            "keep/0": "exit:5",
            "keep/1": "init-killed",
            "die/0": "exit:5",
            "die/1": "init-killed",
            "bare/0": "exit:5",
        }
        assert children(up.host_pid) == []
        assert up.end() == 1  # they failed for good


def test_a_signal_in_the_gap_is_not_lost(tmp_path: Path, installed: Path) -> None:
    with with_gap(tmp_path, installed, KINDS) as (up, gap):
        up.wait_running(*ALIVE)
        up.status()
        gap.write_text("import signal; signal.raise_signal(signal.SIGTERM)\n")
        assert up.ctl("reexec", "--no-wait").code == 0
        assert up.wait_end() == 0
        assert {e["worker"] for e in up.events if e["event"] == "stopped" and e["epoch"] == 2} >= set(ALIVE)


def test_a_kill_in_the_gap_costs_what_a_kill_costs(tmp_path: Path, installed: Path) -> None:
    """Who ends with its supervisor ends; who outlives it is adopted by the next one."""
    with with_gap(tmp_path, installed, KINDS) as (up, gap):
        up.leaves = True
        up.wait_running(*ALIVE)
        before = {w["id"]: w for w in up.status()["workers"]}
        gap.write_text("import signal; signal.raise_signal(signal.SIGKILL)\n")
        assert up.ctl("reexec").code == 69
        assert up.wait_end() == -signal.SIGKILL
        for worker_id in ("die/0", "bare/0"):
            wait_ended(before[worker_id]["init_host_pid"])
        with Up(tmp_path, KINDS) as after:
            there = {w["id"]: w for w in after.wait_running(*ALIVE)}
            for worker_id in ("keep/0", "keep/1"):
                assert there[worker_id]["host_pid"] == before[worker_id]["host_pid"]
            for worker_id in ("die/0", "bare/0"):
                assert there[worker_id]["generation"] == 2


def interrupt_twice(up: Up) -> None:
    """A signal that is pending is not sent a second time. Who ends at the first leaves the second one pending."""
    ended = select.poll()
    ended.register(up.pidfd, select.POLLIN)
    for _ in range(2):
        up.send(signal.SIGINT)
        while not ended.poll(0) and int(status_field(up.host_pid, "ShdPnd"), 16) >> (signal.SIGINT - 1) & 1:
            continue


def wait_ended(host_pid: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        wait_gone(host_pid)


# --- shutdown --leave-running -----------------------------------------------------------------------------------------


def test_who_can_go_on_goes_on(up: Up) -> None:
    up.leaves = True
    before = seen(up)
    status, answer = up.api("POST", "/v1/shutdown", {"leave_running": True, "wait": True})
    assert (status, answer["left"], answer["stopped"]) == (200, ["keep/0", "keep/1"], ["die/0", "bare/0"])
    states = {result["id"]: (result["state"], result["ok"]) for result in answer["results"]}
    assert states == {worker_id: ("running" if "keep" in worker_id else "stopped", True) for worker_id in ALIVE}
    assert up.wait_end() == 0
    up.wait("left_running", reason="operator", detail={"workers": 2})
    own = [json.loads(line)["event"] for line in (up.log_dir / "nssup.jsonl").read_text().splitlines()]
    assert own[-1] == "left_running"
    assert not up.socket.exists()
    assert locked_by(up.socket.parent / "lock") is None
    with Up(up.directory, KINDS) as after:
        after.wait_running(*ALIVE)
        now = seen(after)
        for worker_id in ("keep/0", "keep/1", "once/0"):
            assert now[worker_id] == before[worker_id]
        # The others were stopped because they had to be, not because somebody wanted them down.
        for worker_id in ("die/0", "bare/0"):
            assert (now[worker_id]["generation"], now[worker_id]["desired"]) == (2, "up")


def test_the_text_says_who_goes_on(up: Up) -> None:
    up.leaves = True
    said = up.ctl("shutdown", "--leave-running")
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines() == [
        "keep/0: left running",
        "keep/1: left running",
        "die/0: stopped",
        "bare/0: stopped",
    ]
    assert up.wait_end() == 0
    with Up(up.directory, KINDS):
        pass


def test_who_has_to_stop_stops_by_its_stop_sequence(tmp_path: Path) -> None:
    script = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 1000 & wait $!; done"
    pool = f'command = ["sh", "-c", "{script}"]\n'
    pools = f'[pool.die]\n{pool}[pool.down]\n{pool}[pool.keep]\n{pool}on_supervisor_death = "keep"\n'
    with Up(tmp_path, pools) as up:
        up.leaves = True
        for name in ("die", "down", "keep"):
            up.wait_record(name, lambda record: record.get("msg") == "up")
        assert up.ctl("stop", "down").code == 0
        assert up.ctl("shutdown", "--leave-running").code == 0
        assert up.wait_end() == 0
        assert [record["msg"] for record in up.records("die")] == ["up", "bye"]
        assert [record["msg"] for record in up.records("keep")] == ["up"]
        with Up(tmp_path, pools) as after:
            after.wait_running("die/0", "keep/0")
            assert after.worker("down/0")["state"] == "stopped"


def test_a_second_interrupt_skips_only_the_grace_of_those_who_stop(tmp_path: Path) -> None:
    deaf = """command = ["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1000; done"]\n"""
    pools = f'[pool.die]\n{deaf}stop = [{{ signal = "TERM", wait = "1h" }}, "kill"]\n'
    pools += f'[pool.keep]\n{deaf}on_supervisor_death = "keep"\nstop = ["kill"]\n'
    with Up(tmp_path, pools) as up:
        up.leaves = True
        for name in ("die", "keep"):
            up.wait_record(name, lambda record: record.get("msg") == "deaf")
        before = up.worker("keep/0")
        assert up.ctl("shutdown", "--leave-running", "--no-wait").code == 0
        up.wait("stop_begun", "die/0")
        interrupt_twice(up)
        assert up.wait_end() == 0
        with Up(tmp_path, pools) as after:
            (there,) = after.wait_running("keep/0")
            assert there["host_pid"] == before["host_pid"]
            interrupt_twice(after)
            assert after.wait_end() == 0


# --- the end, and the next start --------------------------------------------------------------------------------------


def test_after_an_end_as_it_should_be_everything_starts_anew(up: Up) -> None:
    assert up.ctl("stop", "keep/0").code == 0
    assert up.end() == 0
    with Up(up.directory, KINDS) as after:
        after.wait_running(*ALIVE)
        assert after.wait("finished", "once/0")["generation"] == 1
        assert not any(e["event"] == "adopted" for e in after.events)


def test_a_kill_while_it_ends_does_not_make_wishes_of_it(tmp_path: Path) -> None:
    """They were stopping because their supervisor was: the next one has them up again."""
    deaf = """command = ["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1000; done"]\n"""
    pools = f'[pool.web]\n{deaf}on_supervisor_death = "keep"\nstop = [{{ signal = "TERM", wait = "1h" }}, "kill"]\n'
    with Up(tmp_path, pools) as up:
        up.leaves = True
        up.wait_record("web", lambda record: record.get("msg") == "deaf")
        before = up.worker("web/0")
        up.send(signal.SIGTERM)
        up.wait("stop_begun", "web/0")
        up.process.kill()
        up.wait_end()
        with Up(tmp_path, pools) as after:
            assert after.worker("web/0")["host_pid"] == before["host_pid"]
            assert after.worker("web/0")["state"] == "stopping"
            assert after.ctl("kill", "-9", "web/0").code == 0
            (there,) = after.wait_running("web/0")
            assert there["generation"] == 2
            after.ctl("kill", "-9", "--tree", "web/0")
            interrupt_twice(after)
            assert after.wait_end() == 0
