"""`nssup ctl top`: its frames, and the whole thing on a terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import NSSUP, Up, needs_namespaces
from run_command import Terminal

from nssup import screen
from nssup.screen import Sample, View

if TYPE_CHECKING:
    from pathlib import Path

    from nssup.render import StatusDocument


def document(*workers: dict[str, Any]) -> StatusDocument:
    base = {
        "pool": "web", "index": 0, "state": "running", "reason": None, "ready": True, "host_pid": 7, "ns_pid": 2,
        "uptime_seconds": 100.0, "restarts": 0, "cpu_seconds": 1.0, "memory_bytes": 1 << 20, "last_exit": None,
        "generation": 1,
    }  # fmt: skip
    made: list[Any] = [{**base, "id": f"web/{number}", "index": number, **each} for number, each in enumerate(workers)]
    supervisor: Any = {"host_pid": 1, "version": "0.1.0", "started_at": "", "epoch": 3}
    return {"api": 1, "supervisor": supervisor, "pools": [], "workers": made}


def names(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines[3:-1]]


def test_the_share_of_a_cpu_is_of_the_time_between_two_looks() -> None:
    before = Sample(document({"cpu_seconds": 1.0}, {"cpu_seconds": 5.0}, {"cpu_seconds": 1.0}), 10.0)
    after = Sample(document({"cpu_seconds": 2.0}, {"cpu_seconds": 5.0}, {"cpu_seconds": 0.5, "generation": 2}), 12.0)
    assert screen.percents(after, before) == {"web/0": 50.0, "web/1": 0.0, "web/2": 0.5}
    assert screen.percents(before, None) == {"web/0": 1.0, "web/1": 5.0, "web/2": 1.0}


@pytest.mark.parametrize(
    ("key", "wanted"),
    [("c", ["web/1", "web/2", "web/0"]), ("m", ["web/2", "web/0", "web/1"]), ("n", ["web/0", "web/1", "web/2"]),
     ("r", ["web/0", "web/1", "web/2"]), ("s", ["web/1", "web/2", "web/0"]), ("u", ["web/2", "web/0", "web/1"])],
)  # fmt: skip
def test_sorting(key: str, wanted: list[str]) -> None:
    sample = Sample(
        document(
            {"restarts": 9, "cpu_seconds": 0.0, "state": "failed"},
            {"cpu_seconds": 9.0, "memory_bytes": None},
            {"memory_bytes": 9 << 20, "uptime_seconds": 500.0},
        ),
        1.0,
    )
    view = screen.pressed(View("n"), key, 10)
    assert view is not None
    assert names(screen.frame(sample, None, view, height=20, width=200)) == wanted


def test_scrolling_stays_within() -> None:
    sample = Sample(document(*[{} for _ in range(20)]), 1.0)
    view: View | None = View("n")
    for key in ("up", "down", "pgdn", "pgdn", "pgdn", "pgdn"):
        assert view is not None
        view = screen.pressed(view, key, 6)
    assert view is not None
    lines = screen.frame(sample, None, view, height=10, width=200)
    assert names(lines) == [f"web/{n}" for n in range(14, 20)]
    assert "14 above, 0 below" in lines[-1]
    assert screen.pressed(view, "q", 6) is None


@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 30), st.integers(0, 100))
def test_a_frame_fits(height: int, width: int, workers: int, scroll: int) -> None:
    sample = Sample(document(*[{} for _ in range(workers)]), 1.0)
    lines = screen.frame(sample, None, View(scroll=scroll), height=height, width=width)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)


def test_keys() -> None:
    assert screen.keys_of("q\x1b[Ac\x1b[6~\x1b") == ["q", "up", "c", "pgdn", "\x1b"]


@needs_namespaces
def test_on_a_terminal(tmp_path: Path) -> None:
    pools = '[pool.web]\ncommand = ["sleep", "1000"]\nworkers = 3\n[pool.busy]\n'
    pools += 'command = ["sh", "-c", "for i in 1 2 3; do sleep 0.01; done; exec sleep 1000"]\n'
    with Up(tmp_path, pools) as up:
        up.wait_running("web/0", "web/1", "web/2", "busy/0")
        words = [*NSSUP, "ctl", "top", "--socket", str(up.socket), "--every", "200ms"]
        with Terminal(*words, size=(20, 120), env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"}) as terminal:
            terminal.expect(r"4 workers: 4 running")
            terminal.expect(r"busy/0 +running")
            terminal.type("n")
            terminal.expect(r"by name")
            terminal.resize(6, 60)
            terminal.expect(r"by name  \(0 above, 2 below\)")
            terminal.type("\x1b[6~")
            terminal.expect(r"2 above, 0 below")
            assert up.ctl("stop", "web/2").code == 0
            terminal.expect(r"3 running, 1 stopped")
            terminal.type("q")
            assert terminal.end() == 0
            assert terminal.modes() == terminal.settings
            assert terminal.seen.endswith("\x1b[?25h\x1b[?1049l")
        once = up.ctl("top", "web")
        assert (once.code, once.out.splitlines()[2].split()[0]) == (0, "NAME")
        assert "\x1b" not in once.out
        assert up.ctl("top", "nosuch").code == 4
        up.end()
