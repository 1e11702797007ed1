"""Pools that require others, with real processes: in order up, in reverse down, and over the death of a supervisor."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from live import Up, needs_namespaces, opened, pool_text, shell, wait_readable

if TYPE_CHECKING:
    from pathlib import Path

    from live import Json

pytestmark = needs_namespaces

# Ready when somebody writes a line into the pipe $1; takes its time to go down, and says when it does.
DB = "trap 'echo going; exit 0' TERM; read line < $1; echo >&3; while :; do sleep 1000 & wait; done"
WEB = ("web/0", "web/1", "web/2", "web/3")
KEEP = {"on_supervisor_death": '"keep"'}


def pools(directory: Path, **web: str) -> str:
    """db (ready by a newline) -> migrate (oneshot) -> web x4."""
    os.mkfifo(directory / "ready")
    requires = '{ db = "ready", migrate = { when = "done", lost = "restart" } }'
    return (
        pool_text("web", requires=web.pop("requires", requires), workers=4, **web)
        + pool_text("migrate", "true", type='"oneshot"', requires='{ db = "ready" }', **web)
        + pool_text("db", *shell(DB, str(directory / "ready")), ready='{ notify = "fd" }', **web)
    )


def make_ready(directory: Path) -> None:
    """db reads this, and its reader is there: it waits for one."""
    with (directory / "ready").open("w") as pipe:
        pipe.write("now\n")


def states(up: Up) -> dict[str, tuple[str, str | None]]:
    return {w["id"]: (w["state"], w["reason"]) for w in up.status()["workers"]}


def place(up: Up, event: str, worker: str) -> int:
    seq: int = up.wait(event, worker)["seq"]
    return seq


def test_in_order_up_and_in_reverse_down(tmp_path: Path) -> None:
    with Up(tmp_path, pools(tmp_path)) as up:
        up.wait("blocked", "migrate/0")
        waiting = states(up)
        assert waiting["web/0"] == ("waiting", "dependency:db")
        assert waiting["migrate/0"] == ("waiting", "dependency:db")
        assert waiting["db/0"] == ("starting", None)
        make_ready(tmp_path)
        up.wait_running(*WEB)
        assert place(up, "started", "db/0") < place(up, "launched", "migrate/0")
        assert place(up, "finished", "migrate/0") < min(place(up, "launched", f"web/{n}") for n in range(4))
        assert up.end() == 0
        assert max(place(up, "stopped", f"web/{n}") for n in range(4)) < up.wait("signalled", "db/0")["seq"]


def test_ctl_stop_of_several_goes_in_reverse_too(tmp_path: Path) -> None:
    with Up(tmp_path, pools(tmp_path)) as up:
        make_ready(tmp_path)
        up.wait_running(*WEB)
        done = up.ctl("stop", "db", "web")
        assert (done.code, done.err) == (0, "")
        assert max(place(up, "stopped", f"web/{n}") for n in range(4)) < up.wait("signalled", "db/0")["seq"]
        started = up.ctl("start", "web")
        assert started.code == 1
        assert "dependency:db" in started.err
        assert states(up)["web/3"] == ("waiting", "dependency:db")
        told = up.ctl("explain", "web/3").out
        assert "waits for: pool db to be ready: 0 of its 1 workers are, and nobody else is on the way" in told
        assert up.ctl("restart", "web").code == 1
        assert up.ctl("scale", "web", "5").code == 1
        assert up.ctl("scale", "web", "4").code == 0
        assert up.ctl("start", "--all", "--timeout", "0.01").code == 124  # db is not ready yet
        make_ready(tmp_path)
        assert up.ctl("wait", "web").code == 0


@pytest.mark.parametrize(("lost", "state"), [("ignore", "running"), ("restart", "waiting"), ("stop", "stopped")])
def test_a_dependency_that_dies(tmp_path: Path, lost: str, state: str) -> None:
    with Up(tmp_path, pools(tmp_path, requires=f'{{ db = {{ when = "ready", lost = "{lost}" }} }}')) as up:
        make_ready(tmp_path)
        up.wait_running(*WEB)
        with opened(up.worker("db/0")["host_pid"]) as pidfd:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        up.wait("relaunched", "db/0")
        if lost != "ignore":
            up.wait("blocked" if lost == "restart" else "stopped", "web/3")
        assert states(up)["web/3"] == (state, "dependency:db" if lost != "ignore" else None)
        if lost == "restart":
            before = up.events[-1]["seq"]
            make_ready(tmp_path)
            up.wait("started", "web/3", after=before)
            assert up.worker("web/3")["restarts"] == 1


def test_who_waits_goes_on_waiting_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    text = pools(tmp_path, **KEEP)
    first = Up(tmp_path, text)
    first.leaves = True
    with first:
        first.wait("blocked", "web/3")
        db = first.worker("db/0")
        first.end(signal.SIGKILL)
    with Up(tmp_path, text) as up:
        found = states(up)
        assert found["web/0"] == ("waiting", "dependency:db")
        assert up.worker("db/0")["init_host_pid"] == db["init_host_pid"]
        make_ready(tmp_path)
        up.wait_running(*WEB)
        assert up.worker("web/0")["generation"] == 1


def test_a_dependency_that_dies_while_nobody_watches_is_lost_all_the_same(tmp_path: Path) -> None:
    text = pools(tmp_path, requires='{ db = { when = "ready", lost = "restart" } }', **KEEP)
    first = Up(tmp_path, text)
    first.leaves = True
    with first:
        make_ready(tmp_path)
        first.wait_running(*WEB)
        with opened(first.worker("db/0")["host_pid"]) as pidfd:
            first.end(signal.SIGKILL)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            wait_readable(pidfd, "db is still there")
    with Up(tmp_path, text) as up:
        for worker_id in WEB:
            assert up.wait("stop_begun", worker_id)["reason"] == "dependency:db"
            up.wait("blocked", worker_id)
        before = up.events[-1]["seq"]
        make_ready(tmp_path)
        up.wait("started", "web/3", after=before)
        assert up.worker("web/3")["generation"] == 2


def test_a_stop_that_is_held_back_goes_on_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    """An operator's stop is for ever, also where its turn had not come."""
    deaf = shell("trap : TERM; echo up; while :; do sleep 1000 & wait; done")
    hour = '[{ signal = "TERM", wait = "1h" }, "kill"]'
    text = pool_text("web", *deaf, requires='{ db = "ready" }', stop=hour, **KEEP) + pool_text("db", **KEEP)
    first = Up(tmp_path, text)
    first.leaves = True
    with first:
        first.wait_record("web", lambda record: record["msg"] == "up")
        assert first.ctl("stop", "--all", "--no-wait").code == 0
        first.wait("stop_begun", "db/0")
        db = first.worker("db/0")
        assert (db["state"], db["desired"]) == ("stopping", "down")
        first.end(signal.SIGKILL)
    with Up(tmp_path, text) as up:
        assert states(up) == {"web/0": ("stopping", "operator"), "db/0": ("stopping", "operator")}
        assert up.ctl("kill", "-9", "--tree", "web").code == 0
        up.wait("stopped", "db/0")
        assert place(up, "stopped", "web/0") < up.wait("signalled", "db/0")["seq"]
        assert {each[0] for each in states(up).values()} == {"stopped"}


def test_who_waits_costs_nothing(tmp_path: Path) -> None:
    """No process, no descriptor, no timer."""

    def seen(up: Up) -> list[Json]:
        return [w for w in up.status()["workers"] if w["state"] == "waiting"]

    with Up(tmp_path, pool_text("web", workers=60, requires='{ db = "ready" }') + pool_text("db", enabled=False)) as up:
        before = len(os.listdir(f"/proc/{up.host_pid}/fd"))
        waiting = seen(up)
        assert len(waiting) == 60
        assert {(w["init_host_pid"], w["generation"], w["next_at"]) for w in waiting} == {(None, 0, None)}
        assert before < 100
        assert up.ctl("start", "db").code == 0
        assert up.ctl("wait", "web").code == 0
