"""Restart policies with real processes, and what a supervisor's kill -9 does not make forgotten."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from typing import TYPE_CHECKING

import pytest
from live import Up, needs_namespaces, pool_text, shell

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_namespaces

# Ends with 3 when something is written to the fifo of its generation.
MORTAL = shell('f="$1/$NSSUP_GENERATION"; mkfifo "$f"; echo "ready $NSSUP_GENERATION"; read x < "$f"; exit 3')
KEEP = {"on_supervisor_death": '"keep"'}


def mortal(tmp_path: Path, **keys: object) -> str:
    return pool_text("web", *MORTAL, str(tmp_path), **{**KEEP, **keys})


def die(up: Up, tmp_path: Path, generation: int) -> None:
    up.wait_record("web", lambda record: record.get("msg") == f"ready {generation}")
    (tmp_path / str(generation)).write_text("x\n")


def leave(up: Up) -> None:
    """The supervisor is killed, and leaves its workers."""
    up.status()
    up.process.kill()
    up.wait_end()
    up.leaves = True


def history(up: Up, *options: str) -> list[dict[str, object]]:
    (found,) = json.loads(up.ctl("history", "web/0", "--json", *options).out)["workers"]
    lives: list[dict[str, object]] = found["lives"]
    return lives


def explained(up: Up, worker: str = "web/0") -> dict[str, object]:
    (found,) = json.loads(up.ctl("explain", worker, "--json").out)["workers"]
    return dict(found)


def test_a_crash_loop_waits_as_history_shows_and_explain_foretells(tmp_path: Path) -> None:
    crash = pool_text("web", *shell('echo "no $NSSUP_GENERATION"; exit 3'))
    policy = 'restart = { settle = "1000s", backoff = { first = "2ms", max = "1000s", factor = 40 } }\n'
    with Up(tmp_path, crash + policy) as up:
        up.wait("backed_off", "web/0", generation=4)
        lives = history(up)
        assert [life["generation"] for life in lives] == [1, 2, 3, 4]
        for life, plain in zip(lives, (0.002, 0.08, 3.2, 128.0), strict=True):
            assert life["wait_seconds"] == pytest.approx(plain, rel=0.11)
            assert (life["reason"], life["followed"]) == ("exit:3", "backoff")
            assert life["last_lines"] == [f"no {life['generation']}"]
        assert [life["generation"] for life in history(up, "-n", "2")] == [3, 4]
        document = explained(up)
        assert (document["state"], document["waits_for"]) == ("backoff", "the backoff to be over")
        next_at = [datetime.fromisoformat(str(at)) for at in (document["next_at"], up.worker("web/0")["next_at"])]
        assert abs((next_at[0] - next_at[1]).total_seconds()) < 1
        waits = [attempt["wait_seconds"] for attempt in document["attempts"]]  # type: ignore[attr-defined]
        assert waits == pytest.approx([128.0, 1000.0, 1000.0, 1000.0, 1000.0], rel=0.11)
        text = up.ctl("history", "web").out.splitlines()
        assert text[1] == "  | no 1"
        assert "exit:3, again after" in text[0]
        up.ctl("reset", "web")
        up.wait("relaunched", "web/0", generation=5)


def test_deaths_are_counted_across_a_kill_of_the_supervisor(tmp_path: Path) -> None:
    config = mortal(tmp_path, **{"restart.intensity": '{ deaths = 3, within = "1000s" }'})
    with Up(tmp_path, config) as up:
        up.wait("started", "web/0", generation=1)
        die(up, tmp_path, 1)
        up.wait("started", "web/0", generation=2)
        die(up, tmp_path, 2)
        up.wait("started", "web/0", generation=3)
        leave(up)
        with Up(tmp_path, config) as after:
            document = explained(after)
            assert document["deaths"] == {"count": 2, "most": 3, "within_seconds": 1000.0, "then": "fail"}
            (last,) = history(after)
            assert (last["generation"], last["reason"], last["followed"]) == (2, "exit:3", "starting")
            die(after, tmp_path, 3)
            assert after.wait("failed", "web/0")["reason"] == "intensity"
            assert after.wait("intensity_exceeded", "web/0")["detail"]["then"] == "fail"
            assert after.end() == 1
            assert "nssup: web/0 failed for good: intensity" in after.said


def test_an_operators_stop_outlasts_a_kill_of_the_supervisor(tmp_path: Path) -> None:
    config = pool_text("web", *shell("exit 3"), **KEEP, **{"restart.settle": '"1000s"'})
    with Up(tmp_path, config) as up:
        up.wait("backed_off", "web/0", generation=3)
        assert up.ctl("stop", "web").code == 0
        leave(up)
        with Up(tmp_path, config) as after:
            worker = after.worker("web/0")
            assert (worker["state"], worker["desired"]) == ("stopped", "down")
            assert explained(after)["why"] == "an operator wants it down"
            assert not [e for e in after.events if e["event"] in ("launched", "relaunched")]


def test_disabled_is_for_good(tmp_path: Path) -> None:
    config = pool_text("web", **KEEP) + pool_text("off", enabled=False)
    with Up(tmp_path, config) as up:
        up.wait_running("web/0")
        assert up.ctl("disable", "web") == (0, "web: disabled; its workers go on (--now stops them)\n", "")
        assert up.ctl("enable", "off").out == (
            "off: enabled; nothing is started before the next supervisor (--now starts it)\n"
        )
        web, off = up.status()["workers"]
        assert (web["enabled"], web["state"], off["enabled"], off["state"]) == (False, "running", True, "stopped")
        assert up.ctl("reexec").code == 0
        assert up.worker("web/0")["state"] == "running"
        leave(up)
        with Up(tmp_path, config) as after:  # whoever runs goes on
            assert [w["enabled"] for w in after.status()["workers"]] == [False, True]
            assert after.worker("web/0")["state"] == "running"
            assert after.ctl("disable", "web/0").code == 2
            assert after.ctl("disable", "nobody").code == 4
    shutil.rmtree(tmp_path / "s" / "run")  # as a reboot does
    with Up(tmp_path, config) as up:
        up.wait_running("off/0")
        assert up.worker("web/0")["state"] == "stopped"
        assert "its pool is disabled" in up.ctl("explain", "web").out
        assert up.ctl("enable", "--now", "web") == (0, "web: enabled\nweb/0: running\n", "")
        assert up.ctl("disable", "--now", "off") == (0, "off: disabled\noff/0: stopped\n", "")
    assert json.loads((tmp_path / "s" / "desired.json").read_text())["pools"] == {}


def test_a_pool_fails_as_one_and_is_stopped_by_its_sequence(tmp_path: Path) -> None:
    script = 'trap "exit 0" TERM; [ "$NSSUP_INDEX" = 1 ] && exit 3; while :; do sleep 1000 & wait; done'
    limit = '{ deaths = 3, within = "1000s", then = "fail-pool" }'
    pool = pool_text("web", *shell(script), workers=2, **{"restart.intensity": limit})
    with Up(tmp_path, pool + pool_text("other")) as up:
        up.wait("failed", "web/0", reason="pool-failed")
        up.wait("failed", "web/1", reason="intensity")
        up.wait_running("other/0")
        assert up.ctl("reset", "web").out == "web/0: stopped\nweb/1: stopped\n"
        assert up.ctl("start", "web/0").code == 0


def test_a_worker_may_end_the_supervisor(tmp_path: Path) -> None:
    limit = '{ deaths = 2, within = "1000s", then = "shutdown" }'
    pools = pool_text("web", *shell("exit 3"), **{"restart.intensity": limit}) + pool_text("other")
    with Up(tmp_path, pools) as up:
        assert up.wait_end() == 1
        assert [e["event"] for e in up.events if e.get("worker") == "other/0"][-1] == "stopped"
        assert [line for line in up.said if "failed for good" in line] == ["nssup: web/0 failed for good: intensity"]


def test_rules_by_code_and_signal(tmp_path: Path) -> None:
    fail, stop, now = '{ exit = [78], then = "fail" }', '{ signal = ["TERM"], then = "stop" }', 'then = "restart-now"'
    rules = {"restart.rules": f"[{fail}, {stop}, {{ exit = [75], {now} }}]"}
    pools = pool_text("bad", *shell("exit 78"), **rules)
    pools += pool_text("asked", *shell("kill -TERM $$"), **rules)
    pools += pool_text("again", *shell('[ "$NSSUP_GENERATION" = 5 ] || exit 75; exec sleep 1000'), **rules)
    with Up(tmp_path, pools) as up:
        assert up.wait("failed", "bad/0")["reason"] == "exit:78"
        assert up.wait("stopped", "asked/0")["reason"] == "signal:SIGTERM"
        up.wait("started", "again/0", generation=5)
        assert "backed_off" not in [e["event"] for e in up.events if e.get("worker") == "again/0"]
        assert up.worker("asked/0")["desired"] == "down"


def test_an_essential_worker_that_a_rule_stops_ends_it_all(tmp_path: Path) -> None:
    stop = '[{ exit = [7], then = "stop" }]'
    pools = pool_text("job", *shell("exit 7"), essential=True, **{"restart.rules": stop}) + pool_text("other")
    with Up(tmp_path, pools) as up:
        assert up.wait_end() == 7


def test_reload_is_a_signal_that_the_config_names(tmp_path: Path) -> None:
    script = 'trap "echo again" HUP; echo up; while :; do sleep 1000 & wait; done'
    config = (
        pool_text("web", *shell(script), reload='{ signal = "HUP" }')
        + pool_text("db")
        + pool_text("down", enabled=False, reload='{ signal = "HUP" }')
    )
    with Up(tmp_path, config) as up:
        up.wait_record("web", lambda record: record["msg"] == "up")
        before = up.worker("web/0")["host_pid"]
        assert up.ctl("reload", "web") == (0, "web/0: running\n", "")
        up.wait_record("web", lambda record: record["msg"] == "again")
        assert up.worker("web/0")["host_pid"] == before
        refused = up.ctl("reload", "db")
        assert (refused.code, refused.out) == (1, "")
        assert "nobody has said how db is reloaded" in refused.err
        assert up.ctl("reload", "down").code == 1
        assert up.ctl("reload", "down", "web").code == 1
        assert up.ctl("reload").code == 2
