"""The facts the project starts from, each with real processes, through `nssup up` and `nssup ctl`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from live import (
    PATIENCE,
    PidNamespaces,
    Up,
    Witness,
    namespace_pids,
    needs_namespaces,
    needs_root,
    pool_text,
    shell,
    status_field,
)

from nssup import PoolSpec
from nssup.events import Stop
from nssup.loop import Supervisor
from nssup.spec import RestartPolicy, StopStep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from live import Json

    from nssup import Event

pytestmark = needs_namespaces


# --- who is who -------------------------------------------------------------------------------------------------------


def test_pids_inside_and_outside(tmp_path: Path) -> None:
    """With init a program is 2 under a 1 that is init; without, it is 1. Outside both have other PIDs, and everything
    that tells them tells the same: the kernel, status, records, events."""
    says = shell('echo "$$ under $PPID of $(cat /proc/1/comm)"; exec sleep 1000')
    pools = pool_text("init", *says, workers=2) + pool_text("bare", *says, workers=2, init=False, stop='["kill"]')
    with Up(tmp_path, pools) as up:
        workers = up.wait_running("init/0", "init/1", "bare/0", "bare/1")
        for worker in workers:
            bare = worker["pool"] == "bare"
            record = up.wait_record(worker["pool"], lambda record, name=worker["id"]: record["worker"] == name)  # type: ignore[misc]
            event = up.wait("started", worker["id"])
            assert record["msg"] == ("1 under 0 of sh" if bare else "2 under 1 of nssup-init")
            host_pid = worker["host_pid"]
            assert namespace_pids(host_pid) == [host_pid, worker["ns_pid"]] == [host_pid, 1 if bare else 2]
            for told in (record, event):
                assert (told["host_pid"], told["ns_pid"]) == (host_pid, worker["ns_pid"])
            assert namespace_pids(worker["init_host_pid"]) == [worker["init_host_pid"], 1]
            assert (worker["init_host_pid"] == host_pid) == bare
            assert worker["namespaces"] == {
                name: os.stat(f"/proc/{host_pid}/ns/{file}").st_ino
                for name, file in (("pid", "pid"), ("mount", "mnt"), ("uts", "uts"), ("ipc", "ipc"))
            }
            assert up.ctl("pid", worker["id"]).out == f"{host_pid}\n"
            assert up.ctl("pid", "--ns", worker["id"]).out == f"{worker['ns_pid']}\n"
            assert up.ctl("which", str(host_pid)).out == f"{worker['id']}\n"
        inodes = [worker["namespaces"][name] for worker in workers for name in worker["namespaces"]]
        assert len(set(inodes)) == len(inodes) == 16


def test_status_as_promised(tmp_path: Path) -> None:
    """Every field of interface.md, and what it says."""
    with Up(tmp_path, pool_text("web", workers=2) + pool_text("off", enabled=False)) as up:
        up.wait_running("web/0", "web/1")
        done = up.ctl("status", "--json", "web")
        assert (done.code, done.err) == (0, "")
        document = up.status()
        assert list(document) == ["api", "supervisor", "pools", "workers"]
        assert document["api"] == 1
        assert document["supervisor"]["host_pid"] == up.host_pid
        assert document["supervisor"]["epoch"] == 1
        assert document["pools"] == [
            {"name": "web", "wanted": 2, "running": 2, "ready": 2, "state": "running", "rollout": None, "sockets": []},
            {"name": "off", "wanted": 1, "running": 0, "ready": 0, "state": "stopped", "rollout": None, "sockets": []},
        ]
        worker = document["workers"][0]
        fields = (
            "id pool index state reason ready desired enabled paused draining adopted host_pid ns_pid init_host_pid "
            "namespaces generation restarts started_at uptime_seconds next_at spec_hash cpu_seconds memory_bytes "
            "log_dropped_bytes last_exit"
        )
        assert set(fields.split()) <= set(worker)
        assert (worker["state"], worker["ready"], worker["desired"], worker["generation"]) == ("running", True, "up", 1)
        assert 0 <= worker["uptime_seconds"] < PATIENCE
        assert worker["memory_bytes"] > 100_000
        off = document["workers"][2]
        assert (off["state"], off["host_pid"], off["namespaces"], off["desired"]) == ("stopped", None, {}, "down")
        table = up.ctl("status", "-a")
        assert table.code == 3
        assert table.out.split("\n")[0].split() == (
            "NAME STATE READY HOST-PID NS-PID UPTIME RESTARTS CPU MEM LAST-EXIT".split()
        )
        assert re.search(rf"^web/0 +running +yes +{worker['host_pid']} +2 ", table.out, re.M)


def three(tmp_path: Path, *command: str) -> Up:
    return Up(tmp_path, pool_text("web", *(command or ("sleep", "1000")), workers=3))


@needs_root
def test_renice_from_outside(tmp_path: Path) -> None:
    with three(tmp_path) as up:
        one, two, other = (worker["host_pid"] for worker in up.wait_running("web/0", "web/1", "web/2"))
        subprocess.run(["renice", "-n", "7", "-p", str(two)], check=True, capture_output=True)
        ours = os.getpriority(os.PRIO_PROCESS, 0)
        assert [os.getpriority(os.PRIO_PROCESS, each) for each in (one, two, other)] == [ours, 7, ours]


def test_taskset_from_outside(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    cpu = max(os.sched_getaffinity(0))
    with three(tmp_path) as up:
        one, two, other = (worker["host_pid"] for worker in up.wait_running("web/0", "web/1", "web/2"))
        subprocess.run(["taskset", "-cp", str(cpu), str(two)], check=True, capture_output=True)
        affinities = [os.sched_getaffinity(each) for each in (one, two, other)]
        assert affinities == [os.sched_getaffinity(0), {cpu}, os.sched_getaffinity(0)]


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of the test's own, with nothing limited."""
    for parent in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
        path = parent / f"nssup-test-{os.getpid()}"
        if (parent / "cgroup.procs").exists() and os.access(parent, os.W_OK):
            with contextlib.suppress(OSError):
                path.mkdir()
                break
    else:
        pytest.skip("needs a cgroup hierarchy that may be written")
    try:
        yield path
    finally:
        path.rmdir()


@needs_root
def test_a_cgroup_from_outside(tmp_path: Path, cgroup: Path) -> None:
    with three(tmp_path) as up:
        workers = up.wait_running("web/0", "web/1", "web/2")
        host_pids = [worker["host_pid"] for worker in workers]
        (cgroup / "cgroup.procs").write_text(str(host_pids[1]))
        inside = [cgroup.name in Path(f"/proc/{each}/cgroup").read_text() for each in host_pids]
        assert inside == [False, True, False]
        assert (cgroup / "cgroup.procs").read_text().split() == [str(host_pids[1])]


def test_kill_from_outside(tmp_path: Path) -> None:
    """By the host_pid that status shows: that worker and no other."""
    script = 'trap "echo got USR1" USR1; echo ready; while :; do sleep 1000 & wait; done'
    with three(tmp_path, *shell(script)) as up:
        for worker_id in ("web/0", "web/1", "web/2"):
            up.wait_record("web", lambda record, name=worker_id: (record["worker"], record["msg"]) == (name, "ready"))  # type: ignore[misc]
        workers = up.wait_running("web/0", "web/1", "web/2")
        os.kill(workers[1]["host_pid"], signal.SIGUSR1)
        got = up.wait_record("web", lambda record: record["msg"] == "got USR1")
        assert (got["worker"], got["host_pid"]) == ("web/1", workers[1]["host_pid"])
        os.kill(workers[2]["host_pid"], signal.SIGKILL)
        up.wait("started", "web/2", generation=2)
        after = up.wait_running("web/0", "web/1", "web/2")
        assert [worker["host_pid"] for worker in after[:2]] == [worker["host_pid"] for worker in workers[:2]]
        assert [worker["generation"] for worker in after] == [1, 1, 2]
        assert after[2]["host_pid"] != workers[2]["host_pid"]
        assert after[2]["restarts"] == 1
        assert after[2]["last_exit"] | {"at": "", "cpu_seconds": 0, "max_rss_bytes": 0} == {
            "code": None,
            "signal": "SIGKILL",
            "core": False,
            "oom": False,
            "timed_out": False,
            "reason": "signal:SIGKILL",
            "at": "",
            "cpu_seconds": 0,
            "max_rss_bytes": 0,
        }
        assert [record["worker"] for record in up.tail("web") if record["msg"] == "got USR1"] == ["web/1"]
        up.wait_record("web", lambda record: (record["worker"], record["generation"]) == ("web/2", 2))
        assert [r["generation"] for r in up.tail("web") if r["worker"] == "web/2"] == [1, 2]


# --- what is inside stays inside --------------------------------------------------------------------------------------


def test_a_hostname_and_an_ipc_object_are_not_seen_outside(tmp_path: Path) -> None:
    if not shutil.which("ipcmk"):
        pytest.skip("needs ipcmk of util-linux")
    outside = os.uname().nodename, Path("/proc/sysvipc/msg").read_text()
    script = 'ipcmk -Q >/dev/null; echo "$(uname -n) $(($(wc -l < /proc/sysvipc/msg) - 1))"; exec sleep 1000'
    with Up(tmp_path, pool_text("web", *shell(script), workers=2, hostname='"inside-{index}"')) as up:
        for index in range(2):
            said = up.wait_record("web", lambda record, name=f"web/{index}": record["worker"] == name)["msg"]  # type: ignore[misc]
            assert said == f"inside-{index} 1"
        assert (os.uname().nodename, Path("/proc/sysvipc/msg").read_text()) == outside
    assert (os.uname().nodename, Path("/proc/sysvipc/msg").read_text()) == outside


def test_from_inside_nobody_outside_can_be_killed(tmp_path: Path) -> None:
    """Neither the supervisor nor another worker, by the PIDs that the host knows them by: ESRCH."""
    fifo = tmp_path / "host_pids"
    os.mkfifo(fifo)
    script = 'read host_pids < "$1"; for each in $host_pids; do kill -0 "$each"; done 2>&1; echo over; exec sleep 1000'
    pools = pool_text("victim") + pool_text("killer", *shell(script, str(fifo)))
    with Up(tmp_path, pools) as up:
        victim, _ = up.wait_running("victim/0", "killer/0")
        fifo.write_text(f"{up.host_pid} {victim['host_pid']} {victim['init_host_pid']} {os.getpid()}\n")
        up.wait_record("killer", lambda record: record["msg"] == "over")
        refusals = [record["msg"] for record in up.tail("killer") if record["msg"] not in ("over", "")]
        assert len(refusals) == 4
        assert all("No such process" in refusal for refusal in refusals)


def test_ps_inside(tmp_path: Path) -> None:
    """With a private /proc a worker sees its own processes only; without, the host's."""
    script = "ps -e -o pid={}; echo over; exec sleep 1000"
    pools = pool_text("own", *shell(script.format(" -o args=")))
    pools += pool_text("host", *shell(script.format("")), proc=False)  # a stranger's arguments may hold newlines
    with Up(tmp_path, pools) as up:
        for pool in ("own", "host"):
            up.wait_record(pool, lambda record: record["msg"] == "over")
        own = [r["msg"].split(None, 1) for r in up.tail("own")][:-1]
        assert [int(host_pid) for host_pid, _ in own][:2] == [1, 2]
        assert len(own) == 3
        assert [args.split()[0] for _, args in own] == [own[0][1].split()[0], "sh", "ps"]
        host = {int(r["msg"]) for r in up.tail("host") if r["msg"] != "over"}
        assert {1, up.host_pid, os.getpid()} <= host


def mounts(host_pid: int) -> bytes:
    return Path(f"/proc/{host_pid}/mountinfo").read_bytes()


@needs_root
@pytest.mark.parametrize("propagation", ["private", "shared"])
def test_the_mount_table_outside_stays_as_it_is(tmp_path: Path, propagation: str) -> None:
    """Also where / is a shared mount, as systemd makes it. The host's /proc goes on working."""
    prefix = ["unshare", "--mount", "--propagation", propagation]
    with Up(tmp_path, pool_text("web", workers=5, enabled=False), prefix=prefix) as up:
        before = mounts(up.host_pid)
        assert (b" shared:" in before) == (propagation == "shared")
        assert up.ctl("start", "web").code == 0
        (worker, *_) = up.wait_running("web/0", "web/1", "web/2", "web/3", "web/4")
        assert mounts(up.host_pid) == before
        assert mounts(worker["host_pid"]) != before
        assert b" shared:" not in mounts(worker["host_pid"])
        assert up.ctl("restart", "web").code == 0
        assert up.ctl("stop", "web").code == 0
        assert mounts(up.host_pid) == before
        assert status_field(up.host_pid, "Name")


# --- stopped is a proof -----------------------------------------------------------------------------------------------

DAEMONS = 200
# Each forks twice, has a session of its own, and is deaf to all that may be ignored.
OUT_OF_SIGHT = (
    "i=0; while [ $i -lt $1 ]; do i=$((i+1)); "
    "(setsid sh -c 'trap \"\" TERM HUP INT QUIT; echo up; while :; do sleep 1000; done' &) ; done; exec sleep 1000"
)


async def hidden(supervisor: Supervisor, spec: PoolSpec, namespaces: PidNamespaces) -> None:
    """Adds the pool, and waits until all its daemons are up and deaf."""
    supervisor.add_pool(spec)
    up = 0
    with contextlib.closing(supervisor.logs.follow([spec.name])) as follower:
        async with asyncio.timeout(PATIENCE):
            async for batch in follower:
                up += batch.count(b'"up"')
                if up >= DAEMONS:
                    break
    init = supervisor.workers.workers[f"{spec.name}/0"].init_host_pid
    assert init is not None
    namespaces.hold(init)
    assert len(namespaces.processes()) >= DAEMONS


@pytest.mark.parametrize("how", ["kill init", "kill the program", "stop", "leave"])
async def test_the_whole_tree_is_gone_when_that_is_said(how: str) -> None:
    namespaces = PidNamespaces()
    left: dict[str, list[int]] = {}
    seen: list[Event] = []
    spec = PoolSpec(
        name="web",
        command=shell(OUT_OF_SIGHT, str(DAEMONS)),
        restart=RestartPolicy(policy="never"),
        stop=(StopStep(signal.SIGTERM, 5.0), StopStep(None)),
    )

    def look(event: Event) -> None:
        seen.append(event)
        if event.to in ("stopped", "failed", "done"):
            left[event.event] = namespaces.processes()

    try:
        async with Supervisor() as supervisor:
            supervisor.subscribe(look)
            witness = Witness(supervisor)
            await hidden(supervisor, spec, namespaces)
            worker = supervisor.workers.workers["web/0"]
            assert worker.init_host_pid is not None
            assert worker.host_pid is not None
            if how == "kill init":
                os.kill(worker.init_host_pid, signal.SIGKILL)
                assert (await witness.wait("failed", "web/0")).reason == "init-killed"
            elif how == "kill the program":
                os.kill(worker.host_pid, signal.SIGKILL)
                assert (await witness.wait("failed", "web/0")).reason == "signal:SIGKILL"
            elif how == "stop":
                supervisor.feed("web/0", Stop())
                assert (await witness.wait("stopped", "web/0")).exit
        if how == "leave":
            assert seen[-1].event == "stopped"
        assert list(left.values()) == [[]] * len(left) != []
        assert namespaces.processes() == []
    finally:
        namespaces.close()


def test_ctl_stop_comes_back_when_nothing_is_left(tmp_path: Path) -> None:
    with Up(tmp_path, pool_text("web", *shell(OUT_OF_SIGHT, str(DAEMONS)))) as up:
        up.wait_running("web/0")
        count = 0

        def another(record: Json) -> bool:
            nonlocal count
            count += int(record["msg"] == "up")
            return count == DAEMONS

        up.wait_record("web", another)
        assert len(up.pid_namespaces.processes()) >= DAEMONS
        done = up.ctl("stop", "web")
        assert (done.code, done.out) == (0, "web/0: stopped\n")
        assert up.pid_namespaces.processes() == []
        assert up.worker("web/0")["host_pid"] is None
