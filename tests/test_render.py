"""The texts that people read: tables, outcomes, quantities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from nssup import render

if TYPE_CHECKING:
    from nssup.render import ExitDocument, PoolDocument, Result, StatusDocument, WorkerDocument

KILLED: ExitDocument = {
    "code": None,
    "signal": "SIGKILL",
    "core": False,
    "oom": False,
    "timed_out": False,
    "reason": "signal:SIGKILL",
    "at": "2026-11-23T12:00:00.000000Z",
    "cpu_seconds": 0.1,
    "max_rss_bytes": 123,
}


def worker(name: str, state: str = "running", **changes: Any) -> WorkerDocument:  # noqa: ANN401 - any field
    pool, _, index = name.partition("/")
    running = state == "running"
    fields = {
        "id": name,
        "pool": pool,
        "index": int(index),
        "state": state,
        "reason": None,
        "ready": running,
        "host_pid": 5000 + int(index) if running else None,
        "ns_pid": 2 if running else None,
        "uptime_seconds": 12.5 if running else None,
        "restarts": 0,
        "cpu_seconds": None,
        "memory_bytes": None,
        "last_exit": None,
    }
    return cast("WorkerDocument", fields | changes)


def pool(name: str, workers: list[WorkerDocument], wanted: int | None = None) -> PoolDocument:
    running = sum(w["state"] == "running" for w in workers)
    return {
        "name": name,
        "wanted": len(workers) if wanted is None else wanted,
        "running": running,
        "ready": running,
        "state": render.pool_state(w["state"] for w in workers),
        "rollout": None,
        "sockets": [],
    }


def document(**pools: list[WorkerDocument]) -> StatusDocument:
    return {
        "api": 1,
        "supervisor": {"host_pid": 1, "version": "0", "started_at": "", "epoch": 1},
        "pools": [pool(name, workers) for name, workers in pools.items()],
        "workers": [w for workers in pools.values() for w in workers],
    }


SITE = document(
    web=[worker(f"web/{i}") for i in range(7)]
    + [worker("web/7", "backoff", restarts=3, last_exit=KILLED | {"reason": "exit:3"})],
    db=[worker("db/0", host_pid=4242, uptime_seconds=7265.0, cpu_seconds=0.123, memory_bytes=1234567)],
    migrate=[worker("migrate/0", "done", last_exit=KILLED | {"reason": "exit:0"})],
    idle=[],
)


def test_pools_of_many_fold() -> None:
    assert render.table(SITE).splitlines() == [
        "NAME       STATE    READY  HOST-PID  NS-PID  UPTIME  RESTARTS    CPU   MEM  LAST-EXIT",
        "web        running  7/8           -       -     12s         3      -     -  exit:3",
        "db/0       running  yes        4242       2   2h01m         0  0.12s  1.2M  -",
        "migrate/0  done     -             -       -       -         0      -     -  exit:0",
        "idle       stopped  0/0           -       -       -         0      -     -  -",
    ]


def test_unfolded_each_worker_has_a_line() -> None:
    lines = render.table(SITE, unfold=True).splitlines()
    assert [line.split()[0] for line in lines] == [
        "NAME",
        *(f"web/{i}" for i in range(8)),
        "db/0",
        "migrate/0",
        "idle",
    ]
    assert lines[8].split() == ["web/7", "backoff", "-", "-", "-", "-", "3", "-", "-", "exit:3"]


def test_a_pool_scaled_to_one_folds_until_the_others_are_gone() -> None:
    leaving = document(web=[worker("web/0"), worker("web/1", "stopping")])
    leaving["pools"][0]["wanted"] = 1
    assert render.table(leaving).splitlines()[1].split()[:3] == ["web", "running", "1/1"]


def test_a_pool_scaled_up_from_one_folds_already() -> None:
    coming = document(web=[worker("web/0")])
    coming["pools"][0]["wanted"] = 3
    assert render.table(coming).splitlines()[1].split()[:3] == ["web", "running", "1/3"]


def test_the_newest_exit_speaks_for_the_pool() -> None:
    older = KILLED | {"reason": "exit:9", "at": "2026-11-23T11:59:59.999999Z"}
    doc = document(web=[worker("web/0", last_exit=KILLED | {"core": True}), worker("web/1", last_exit=older)])
    assert render.table(doc).splitlines()[1].endswith("  signal:SIGKILL (core)")


def test_plain_text_is_stable_and_color_only_adds_escapes() -> None:
    plain, colored = render.table(SITE), render.table(SITE, color=True)
    assert "\x1b" not in plain
    assert render.table(SITE, color=False) == plain
    assert "\x1b[33mrunning\x1b[0m" in colored, "7 of 8"
    assert "\x1b[32mrunning\x1b[0m" in colored
    for escape in ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[33m"):
        colored = colored.replace(escape, "")
    assert colored == plain


@pytest.mark.parametrize("width", [20, 40, 79])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = render.table(SITE, unfold=True, width=width).splitlines()
    assert max(map(len, lines)) == width
    assert any(line.endswith("…") for line in lines)


def test_nothing_at_all() -> None:
    assert render.table(document()) == "  ".join(render.COLUMNS) + "\n"


@pytest.mark.parametrize(
    ("states", "word"),
    [
        ("running backoff failed", "running"),
        ("backoff failed", "backoff"),
        ("failed done", "failed"),
        ("stopped done", "stopped"),
        ("done done", "done"),
        ("", "stopped"),
    ],
)
def test_one_word_for_a_pool(states: str, word: str) -> None:
    assert render.pool_state(states.split()) == word


@pytest.mark.parametrize(
    ("workers", "code"),
    [
        ([], 0),
        ([worker("web/0")], 0),
        ([worker("web/0"), worker("web/1", "starting")], 3),
        ([worker("job/0", "done")], 0),
        ([worker("web/0", "done")], 3),
        ([worker("job/0", "stopped")], 3),
    ],
)
def test_status_exits_3_when_something_is_not_running(workers: list[WorkerDocument], code: int) -> None:
    assert render.exit_code(workers, {"job"}) == code


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0.00s"),
        (-0.5, "0.00s"),
        (0.123, "0.12s"),
        (59.9, "59s"),
        (60, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (86399, "23h59m"),
        (90000, "1d01h"),
        (86400 * 400, "400d00h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert render.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1.0K"),
        (1234567, "1.2M"),
        (102400, "100K"),
        (1048575, "1.0M"),
        (300 << 20, "300M"),
        (3 << 29, "1.5G"),
        (5 << 60, "5120P"),
    ],
)
def test_sizes(count: int | None, text: str) -> None:
    assert render.size(count) == text


def test_what_a_terminal_would_obey_is_made_visible() -> None:
    assert render.visible("a\tb é") == "a\tb é"
    assert render.visible("\x1b[2J\x07\x7f\x9b1m\r") == "\\x1b[2J\\x07\\x7f\\x9b1m\\x0d"


def result(name: str, state: str = "running", **changes: Any) -> Result:  # noqa: ANN401 - any field
    fields: dict[str, Any] = {"id": name, "state": state, "reason": None, "ok": True, "timed_out": False}
    return cast("Result", fields | {"last_lines": []} | changes)


def test_results_say_who_is_how_and_why_not() -> None:
    found = [
        result("web/0"),
        result("web/1", "backoff", ok=False, reason="exit:3", last_lines=["boom", "\x1b[31mred"]),
        result("web/2", "starting", ok=False, timed_out=True),
    ]
    assert render.results("start", found) == (
        "web/0: running\n",
        "web/1: start: backoff: exit:3\n  | boom\n  | \\x1b[31mred\n"
        "web/2: start: still starting when the time was up\n",
    )


def test_many_results_are_counted() -> None:
    found = [result(f"web/{i}", "stopped") for i in range(100)] + [result("db/0", "done")]
    assert render.results("stop", found).out == "web: 100 stopped\ndb: 1 done\n"


def test_kill_is_silent() -> None:
    assert render.results("kill", [result("web/0")]) == ("", "")


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (
            {
                "ts": "T",
                "event": "backed_off",
                "worker": "web/0",
                "from": "running",
                "to": "backoff",
                "reason": "exit:3",
            },
            "T backed_off web/0 running -> backoff (exit:3)",
        ),
        ({"ts": "T", "event": "scaled", "pool": "web", "detail": {"from": 1, "to": 2}}, "T scaled web from=1 to=2"),
        ({"event": "events_lost", "detail": {"lost": 5}}, "- events_lost lost=5"),
        (
            {"event": "snapshot", "epoch": 1, "seq": 9, "status": {"workers": [1, 2]}},
            "1:9 snapshot of 2 workers",
        ),
        ({"ts": "T", "event": "log_failed", "pool": "w", "reason": "\x1b[2J"}, "T log_failed w (\\x1b[2J)"),
    ],
)
def test_an_event_in_a_line(document: dict[str, Any], line: str) -> None:
    assert render.event(document) == line


def test_a_record_in_a_line() -> None:
    assert render.record("T", "web/0", "stdout", "hello", color=False) == "T web/0 stdout | hello"
    assert render.record("T", None, "nssup", "cut", color=False) == "T - nssup | cut"
    one, other = (render.record("T", f"web/{i}", "stdout", "x", color=True) for i in range(2))
    assert one.replace("web/0", "web/1") != other, "each worker has its color"
