"""A short soak: see soak.py for a long one."""

from __future__ import annotations

import asyncio

import pytest
import uvloop
from live import needs_namespaces
from soak import soak

pytestmark = [needs_namespaces, pytest.mark.slow, pytest.mark.timeout(300)]


def on_uvloop(main):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@pytest.mark.parametrize("runner", [asyncio.run, on_uvloop], ids=["asyncio", "uvloop"])
def test_runs_that_hang_fork_eat_and_die(runner: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSSUP_SOAK", "")
    assert soak("run", 100, runner)["good"] == 60


def test_calls_that_hang_fork_eat_and_die(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSSUP_SOAK", "")
    assert soak("executor", 50)["good"] == 30
