"""`nssup sim`: scenarios read strictly, played on the real core, and what is expected of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nssup import config, facts, playback, scenario
from nssup.errors import SpecError
from nssup.scenario import Life

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "sim.md").read_text()
CONFIG = """\
version = 1
[pool.web]
command = "nowhere-to-be-found"
user = "nobody-knows"
workers = 2
[pool.web.restart]
backoff = { first = "1s", factor = 2, jitter = 0 }
[pool.job]
command = "job"
type = "oneshot"
requires = { web = "started" }
[pool.careful]
command = "careful"
enabled = false
ready = { notify = "sd" }
watchdog = "10s"
stop = [{ signal = "TERM", wait = "5s" }, "kill"]
restart = { settle = "0s", backoff = { first = "1s", jitter = 0 } }
"""


def sim(directory: Path, text: str, *options: str, pools: str = CONFIG) -> subprocess.CompletedProcess[str]:
    (directory / "nssup.toml").write_text(pools)
    (directory / "scenario.toml").write_text(text)
    words = [sys.executable, "-m", "nssup", "sim", "scenario.toml", *options]
    return subprocess.run(words, cwd=directory, capture_output=True, text=True, check=False)


def played(text: str, of: str = CONFIG) -> playback.Played:
    anywhere = facts.Anywhere()
    pools = config.parse("nssup.toml", of.encode(), facts.read, anywhere).pools
    return playback.play(pools, scenario.parse("s.toml", text.encode()))


def timeline(text: str) -> list[str]:
    """Without the blanks, and without what comes after it."""
    lines = playback.text(played(text))
    return [" ".join(line.split()) for line in lines[: lines.index("")]]


def refused(text: str) -> list[str]:
    with pytest.raises(SpecError) as found:
        played(text)
    return [str(problem) for problem in found.value.problems]


# --- as a user runs it -----------------------------------------------------------------------------------------------


def test_the_example_of_the_page_says_what_the_page_says(tmp_path: Path) -> None:
    pools, text = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (said,) = re.findall(r"says:\n\n```\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "crash.toml").write_text(text)
    (tmp_path / "nssup.toml").write_text(pools)
    words = [sys.executable, "-m", "nssup", "sim", "crash.toml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_what_is_not_as_expected_is_told_and_fails(tmp_path: Path) -> None:
    done = sim(
        tmp_path, 'until = "1m"\n[[expect]]\nof = "web"\nstate = "failed"\n[[expect]]\nof = "web"\nready = true\n'
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == [
        "scenario.toml:2: expected web: state failed at the end, but web/0 is running; web/1 is running",
        "scenario.toml:5: as expected: web: ready true at the end",
    ]


def test_json_and_options(tmp_path: Path) -> None:
    text = '[[step]]\nat = "1s"\nkill = "web/0"\nsignal = "HUP"\n[[expect]]\nof = "web/0"\nlives = 2\n'
    done = sim(tmp_path, text, "--json", "--until", "30s", "-c", "nssup.toml")
    assert done.returncode == 0
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in lines if "step" in line] == [
        {"at": 1.0, "step": {"what": "kill", "of": "web/0", "signal": 1}}
    ]
    assert lines[-1] == {
        "expected": "web/0: lives 2 at the end", "held": True, "why": None, "file": "scenario.toml", "line": 5
    }  # fmt: skip
    (ended,) = [line for line in lines if line.get("event") == "relaunched"]
    assert (ended["at"], ended["worker"], ended["exit"]["signal"]) == (1.01, "web/0", "SIGHUP")
    assert max(line["at"] for line in lines if "at" in line) <= 30.0


def test_the_same_seed_gives_the_same_times(tmp_path: Path) -> None:
    pools = 'version = 1\n[pool.web]\ncommand = "app"\nworkers = 3\n'
    text = '[[life]]\nof = "*"\nruns = "10ms"\nexit = 1\n'
    said = [sim(tmp_path, text, "--seed", seed, pools=pools).stdout for seed in ("a", "a", "b")]
    assert said[0] == said[1] != said[2]
    assert "backed_off" in said[0]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("[[step]]\nat = 5\n", 78, "scenario.toml:2:1: step.0.at: 5 has no unit"),
        ('config = "other.toml"', 78, "other.toml: cannot be read"),
        (
            '[[expect]]\nof = "wep"\nlives = 1',
            78,
            "'wep' is no pool or worker of the config: there are web, job, careful",
        ),
    ],
)
def test_mistakes(tmp_path: Path, text: str, code: int, said: str) -> None:
    done = sim(tmp_path, text)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stdout == ""


def test_a_scenario_that_is_not_there(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "nssup", "sim", "nowhere.toml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "nssup: nowhere.toml: No such file or directory\n")


# --- timelines -------------------------------------------------------------------------------------------------------


def test_a_crash_loop() -> None:
    lines = timeline('until = "8s"\n[[life]]\nof = "web/1"\nlives = "1-3"\nruns = "100ms"\nsignal = "SEGV"\n')
    assert [line for line in lines if "web/1" in line] == [
        "0.000 web/1 launched stopped -> starting",
        "0.001 web/1 started starting -> running",
        "0.101 web/1 backed_off running -> backoff (signal:SIGSEGV) next attempt in 1.00s",
        "1.101 web/1 relaunched backoff -> starting (signal:SIGSEGV)",
        "1.102 web/1 started starting -> running",
        "1.202 web/1 backed_off running -> backoff (signal:SIGSEGV) next attempt in 2.00s",
        "3.202 web/1 relaunched backoff -> starting (signal:SIGSEGV)",
        "3.203 web/1 started starting -> running",
        "3.303 web/1 backed_off running -> backoff (signal:SIGSEGV) next attempt in 4.00s",
        "7.303 web/1 relaunched backoff -> starting (signal:SIGSEGV)",
        "7.304 web/1 started starting -> running",
    ]


def test_one_that_hangs_on_stop() -> None:
    lines = timeline(
        'until = "30s"\n[[life]]\nof = "careful"\nready = "2s"\nstops = "never"\n'
        '[[step]]\nat = "1s"\nstart = "careful"\n[[step]]\nat = "10s"\nstop = "careful"\n'
    )
    assert [line for line in lines if "careful" in line and "pool" not in line] == [
        "1.000 careful <- start",
        "1.000 careful/0 launched stopped -> starting",
        "3.001 careful/0 started starting -> running",
        "10.000 careful <- stop",
        "10.000 careful/0 stop_begun running -> stopping (operator) SIGTERM",
        "15.000 careful/0 signalled (operator) SIGKILL to its tree",
        "15.001 careful/0 stopped stopping -> stopped (signal:SIGKILL) (operator)",
    ]


def test_a_watchdog_that_is_fed_and_one_that_is_not() -> None:
    text = (
        'until = "70s"\n[[life]]\nof = "careful"\nlives = 1\nsilent = "20s"\n[[step]]\nat = "0s"\nstart = "careful"\n'
    )
    lines = timeline(text + '[[step]]\nat = "65s"\nunready = "careful"\n[[step]]\nat = "66s"\nready = "careful"\n')
    told = [line for line in lines if "careful/0" in line]
    assert told[2:] == [
        "25.001 careful/0 stop_begun running -> stopping (watchdog) SIGTERM",
        "25.011 careful/0 relaunched stopping -> starting (watchdog)",
        "25.012 careful/0 started starting -> running",
        "65.000 careful/0 became_unready (probe-failed)",
        "66.000 careful/0 became_ready",
    ]


def test_steps_of_operators_and_programs() -> None:
    lines = timeline(
        'until = "40s"\n'
        '[[life]]\nof = "job"\nfails = "exec-failed:ENOENT"\n'
        '[[step]]\nat = "10s"\nscale = "web"\nto = 3\n'
        '[[step]]\nat = "12s"\nend = "web/2"\nexit = 7\n'
        '[[step]]\nat = "20s"\nrestart = "web/0"\n'
        '[[step]]\nat = "30s"\nscale = "web"\nto = 1\n'
        '[[step]]\nat = "31s"\nreset = "job"\n'
    )
    for line in (
        "0.001 job/0 launched waiting -> starting",
        "0.003 job/0 failed stopping -> failed (exec-failed:ENOENT)",
        "10.000 web <- scale to 3",
        "10.000 web scaled 2 -> 3 workers",
        "12.000 web/2 <- end with 7",
        "12.000 web/2 relaunched running -> starting (exit:7)",
        "20.010 web/0 launched stopping -> starting (signal:SIGTERM)",
        "30.011 web/2 removed",
        "31.000 job/0 stopped failed -> stopped (operator)",
    ):
        assert line in lines, "\n".join(lines)


@pytest.mark.parametrize(
    ("expect", "why"),
    [
        ('of = "web"\nstate = ["running", "backoff"]\nrestarts = 0', ""),
        ('of = "web/0"\nat = "500us"\nstate = "starting"\nready = false', ""),
        ('of = "job"\nstate = "done"\nreason = "exit:0"', ""),
        ('of = "job"\nreason = "exit:1"', "job/0 is done because of exit:0"),
        ('of = "job"\nlives = 2', "job/0 has been launched 1 times"),
        ('of = "job"\nrestarts = 1', "job/0 has been restarted 0 times"),
        ('of = "web"\nready = false', "web/0 is ready; web/1 is ready"),
        ('of = "web/7"\nlives = 1', "there is no worker web/7 then"),
        ('of = "web"\nevent = "started"\ntimes = 2\nbefore = "1s"', ""),
        ('of = "web"\nevent = "started"\ntimes = 3', "it happened 2 times"),
        ('event = "failed"', "it never happened"),
        ('of = "web"\nevent = "started"\nafter = "10s"', "not in that time"),
        ('of = "job"\nevent = "finished"\nreason = "exit:0"', ""),
        ('order = ["web/1 started", "job/0 launched", "job/0 finished"]', ""),
        ('order = ["job/0 launched", "web/1 started"]', "'web/1 started' came first"),
        ('order = ["job/0 launched", "job/0 failed"]', "'job/0 failed' never happened"),
    ],
)
def test_expectations(expect: str, why: str) -> None:
    (outcome,) = played(f"[[expect]]\n{expect}\n").outcomes
    assert (outcome.held, outcome.why) == (not why, why)


# --- the text --------------------------------------------------------------------------------------------------------


def test_lives_that_are_meant() -> None:
    text = "".join(f'[[life]]\nof = "web"\nlives = {lives}\n' for lives in ("3", '"2-4"', '"5-"', '"6"'))
    found = scenario.parse("s.toml", text.encode()).lives
    assert [life.lives for life in found] == [(3, 3), (2, 4), (5, 1 << 60), (6, 6)]
    assert Life(of="web").lives[0] == 1


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("[[life]]\nruns = '1s'", ['s.toml:1:3: life.0: of is missing: say whose life it is, such as of = "web/0"']),
        (
            "[[life]]\nof = 'web'\nexit = 1\nsignal = 'HUP'",
            ["s.toml:4:1: life.0.signal: it ends with exit or signal, not with both: leave one out"],
        ),
        ("[[life]]\nof = 'web'\nlives = '4-2'", ["s.toml:3:1: life.0.lives: ends before it begins"]),
        (
            "[[life]]\nof = 'web'\nlives = 0",
            ['s.toml:3:1: life.0.lives: must be a number from 1 on, or a text: "2-4", "5-"'],
        ),
        (
            "[[life]]\nof = 'web'\nfails = 'badly'",
            [
                's.toml:3:1: life.0.fails: must be "exec-failed:ERRNO" or "setup-failed:STEP:ERRNO", such as '
                '"exec-failed:ENOENT"'
            ],
        ),
        ("[[step]]\nat = '1s'", [f"s.toml:1:3: step.0: must be one of {', '.join(scenario.STEPS)}"]),
        (
            "[[step]]\nat = '1s'\nstart = 'web'\nstop = 'web'",
            [f"s.toml:1:3: step.0: must be one of {', '.join(scenario.STEPS)}, not start and stop"],
        ),
        (
            "[[step]]\nstop = 'web'\nto = 3",
            [
                's.toml:1:3: step.0: at is missing: say when, such as at = "10s"',
                "s.toml:3:1: step.0.to: means nothing to stop: leave it out",
            ],
        ),
        ("[[step]]\nat = '1s'\nscale = 'web'", ["s.toml:1:3: step.0: to is missing: say how many workers"]),
        (
            "[[expect]]\nof = 'web'",
            [
                "s.toml:1:3: expect.0: expects nothing: say state, reason, ready, lives, restarts, event or order",
            ],
        ),
        (
            "[[expect]]\nevent = 'failed'\nstate = 'failed'",
            ["s.toml:3:1: expect.0.state: does not go with event: leave it out"],
        ),
        (
            "[[expect]]\norder = ['web started', 'then']",
            ['s.toml:2:1: expect.0.order: "then" is no "WORKER EVENT", such as "db/0 started"'],
        ),
        ("[[life]\n", ["s.toml:1:7: is no TOML: expected ']]' at the end of an array declaration"]),
        ("lives = 1", ["s.toml:1:1: lives: unknown key: did you mean life?"]),
    ],
)
def test_a_scenario_that_means_nothing(text: str, problems: list[str]) -> None:
    assert refused(text) == problems
