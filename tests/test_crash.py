"""A short run of crash.py: the supervisor killed at random instants, its workers' output and exits complete."""

import os
import random
from pathlib import Path

import crash
import pytest

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a pidfd of the init of a dead supervisor's child"),
    pytest.mark.timeout(300),
]


def test_a_supervisor_killed_at_any_instant_loses_and_doubles_nothing(tmp_path: Path) -> None:
    seed = 20261123
    found = crash.crash(tmp_path, kills=8, workers=12, chance=random.Random(seed))
    assert found.wrong == []
    assert found.restarted == []
    assert found.lives > 12
