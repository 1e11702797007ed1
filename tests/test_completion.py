"""What is made from the table of verbs: completion, tried in the shells themselves, and the manual pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from live import Up, needs_namespaces
from run_command import Terminal

from nssup import completion
from nssup.verbs import COMMANDS, OPTIONS, SHELLS, VERBS

BIN = Path(__file__).parent.parent / "scripts"


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the scripts, `nssup` in PATH, and no supervisor."""
    for shell in SHELLS:
        (tmp_path / f"nssup.{shell}").write_text(completion.script(shell, COMMANDS, OPTIONS))
    command = tmp_path / "bin" / "nssup"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{BIN}/nssup" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("NSSUP_SOCKET", str(tmp_path / "none.sock"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def bash(place: Path, *words: str) -> list[str]:
    """What bash offers for the last of words."""
    quoted = " ".join(f"'{word}'" for word in words)
    script = (
        f"source {place}/nssup.bash; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _nssup; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=False, timeout=20)
    assert done.stderr == ""
    return done.stdout.split()


def fish(place: Path, *words: str) -> list[str]:
    script = f"source {place}/nssup.fish; complete -C '{' '.join(words)}'"
    done = subprocess.run(["fish", "-N", "-c", script], capture_output=True, text=True, check=True, timeout=20)
    assert done.stderr == ""
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


SHELL = {"bash": bash, "fish": fish}
EACH = [pytest.param(shell, marks=needs(shell)) for shell in SHELL]


@pytest.mark.parametrize("shell", EACH)
def test_words_and_options(place: Path, shell: str) -> None:
    complete = SHELL[shell]
    assert set(complete(place, "nssup", "c")) == {"ctl", "check", "completion"}
    assert set(complete(place, "nssup", "ctl", "sta")) == {"status", "stats", "start"}
    assert set(complete(place, "nssup", "ctl", "stop", "--n")) == {"--no-wait"}
    assert set(complete(place, "nssup", "ctl", "wait", "--for", "r")) == {"ready", "running"}
    assert set(complete(place, "nssup", "completion", "z")) == {"zsh"}
    assert "--workdir" in complete(place, "nssup", "run", "--w")
    assert complete(place, "nssup", "ctl", "status", "w") == [], "no supervisor, no names, and no complaint"


@needs_namespaces
def test_names_are_those_of_the_supervisor_that_is_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Up(
        place, '[pool.web]\ncommand = ["sleep", "1000"]\nworkers = 2\n[pool.db]\ncommand = ["sleep", "1000"]\n'
    ) as up:
        monkeypatch.setenv("NSSUP_SOCKET", str(up.socket))
        for shell, complete in SHELL.items():
            if shutil.which(shell):
                assert complete(place, "nssup", "ctl", "restart", "w") == ["web", "web/0", "web/1"], shell
        up.end()


@needs("zsh")
def test_zsh(place: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "TERM": "dumb", "NSSUP_SOCKET": "/nonexistent", "HOME": str(place)}
    with Terminal("zsh", "-f", "-i", env=environ) as terminal:
        terminal.type("unsetopt zle_bracketed_paste; PROMPT='rea''dy> '; autoload -Uz compinit; compinit -D -u\n")
        terminal.expect("ready> ")
        terminal.type(f"source {place}/nssup.zsh; echo sour''ced\n")
        terminal.expect("sourced\r\n.*ready> ")
        terminal.type("nssup ctl shutd\t")
        terminal.expect("shutdown ")
        terminal.type("--leave\t")
        terminal.expect("--leave-running")
        terminal.type("\x15exit\n")
        terminal.end()


@pytest.mark.parametrize("shell", [pytest.param(shell, marks=needs(shell)) for shell in SHELLS])
def test_every_shell_can_read_its_script(place: Path, shell: str) -> None:
    subprocess.run([shell, "-n", str(place / f"nssup.{shell}")], check=True, timeout=20)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_verb_and_option_is_in_it(shell: str) -> None:
    script = completion.script(shell, COMMANDS, OPTIONS)
    options = [option for verb in VERBS.values() for option in verb.options]
    options += [option for found in OPTIONS.values() for option in found]
    for word in [*COMMANDS, *VERBS, *(name.lstrip("-") for option in options for name in option.names)]:
        assert word in script


ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "man").glob("*"))


def test_the_manual_pages_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "manual.py"), "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run scripts/manual.py"
    assert [page.name for page in PAGES] == ["nssup-ctl.1", "nssup.1", "nssup.toml.5"]


@needs("mandoc")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_mandoc_finds_no_fault(page: Path) -> None:
    done = subprocess.run(["mandoc", "-Tlint", str(page)], capture_output=True, text=True, check=False, timeout=20)
    # Ours refer to each other, and are not installed here.
    assert [line for line in done.stdout.splitlines() if "referenced manual not found: Xr nssup" not in line] == []
