"""Supervisors killed at every step and at random, with real processes; what is done and what must hold: takeover.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import takeover
from launching import needs_root

pytestmark = needs_root

PROGRAM = Path(takeover.__file__)
PARTS = 2


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """Name of a case -> what came of it. All are run at the first that is asked for, some at a time."""
    running = [
        subprocess.Popen([sys.executable, PROGRAM, "points", "--part", f"{part}/{PARTS}"], stdout=subprocess.PIPE)
        for part in range(PARTS)
    ]
    try:
        lines = [line for process in running for line in process.communicate(timeout=55)[0].splitlines()]
    finally:
        for process in running:
            process.kill()
            process.wait()
    found = map(json.loads, lines)
    return {outcome["name"]: outcome for outcome in found}


@pytest.mark.parametrize("name", takeover.cases())
def test_the_next_one_takes_everything_over(name: str, outcomes: dict[str, Any]) -> None:
    assert name in outcomes, "it was not come to"
    assert outcomes[name]["wrong"] == []


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_at_random_instants() -> None:
    print(run("random", "--kills", "12", "--workers", "40", "--seed", "5"))


@pytest.mark.slow
def test_killed_while_it_recovers() -> None:
    print(run("recovery", "--kills", "25", "--workers", "20", "--seed", "5"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("redis-server") or not shutil.which("redis-benchmark"), reason="needs redis")
def test_redis_under_load_does_not_notice() -> None:
    print(run("redis"))
