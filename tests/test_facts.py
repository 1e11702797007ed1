"""The real machine's answers, and reading real files."""

from __future__ import annotations

import grp
import os
import pwd
import resource
import stat
from typing import TYPE_CHECKING

import pytest

from nssup import facts, spec
from nssup.errors import ExitCode, SpecError

if TYPE_CHECKING:
    from pathlib import Path

POOL = 'version = 1\n[pool.a]\ncommand = ["/bin/sh"]\n'


@pytest.fixture
def host() -> facts.Host:
    return facts.Host()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_users_and_groups(host: facts.Host) -> None:
    entry = pwd.getpwuid(0)
    root = spec.User(entry.pw_name, 0, entry.pw_gid, entry.pw_dir, entry.pw_shell)
    assert host.user(entry.pw_name) == root
    assert host.user("0") == root
    assert host.group(grp.getgrgid(0).gr_name) == 0
    assert 0 in host.groups_of(root)


@pytest.mark.parametrize(
    "name", ["no-such-user", "", "-1", "99999999999999999999", "4294967295", "a\0b", "\udcff", "²"]
)
def test_who_is_not_there(host: facts.Host, name: str) -> None:
    assert host.user(name) is None
    assert host.group(name) is None


def test_this_process(host: facts.Host, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSSUP_TEST", "x")
    assert (host.uid, host.gid) == (os.geteuid(), os.getegid())
    assert set(host.groups) == set(os.getgroups())
    assert host.directory == str(here.resolve())
    assert host.variable("NSSUP_TEST") == "x"
    assert host.variable("NSSUP_TEST_NOT") is None


def test_a_working_directory_that_is_gone(host: facts.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert host.directory == "/"


def test_capabilities_are_the_kernels(host: facts.Host) -> None:
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    for name, number in facts.CAPABILITIES.items():
        assert host.capable(name) == bool(effective & 1 << number)


@pytest.mark.parametrize("name", spec.RLIMITS)
def test_every_limit_has_an_answer(host: facts.Host, name: str) -> None:
    hard = host.hard_limit(name)
    assert hard is None or hard >= 0


def test_a_limit_is_the_kernels(host: facts.Host) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert host.hard_limit("nofile") == (None if hard == resource.RLIM_INFINITY else hard)


def test_files(host: facts.Host, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    assert not host.is_executable(str(script))
    script.chmod(stat.S_IRWXU)
    assert host.is_executable(str(script))
    assert not host.is_executable(str(tmp_path))
    assert host.is_directory(str(tmp_path))
    assert not host.is_directory(str(script))
    assert host.exists(str(link))
    assert not host.exists(str(tmp_path / "none"))


def test_reading_a_pattern(here: Path) -> None:
    (here / "conf.d").mkdir()
    (here / "conf.d" / "folder.toml").mkdir()
    for name in ("b", "a", "x"):
        (here / "conf.d" / f"{name}.toml").write_text(name)
    (here / "conf.d" / "c.txt").write_text("c")
    assert facts.read("conf.d/[ab].toml", "nssup.toml") == [("conf.d/a.toml", b"a"), ("conf.d/b.toml", b"b")]
    assert [name for name, _ in facts.read("*.toml", "conf.d/a.toml")] == [f"conf.d/{name}.toml" for name in "abx"]
    assert facts.read("../conf.d/./a.toml", "conf.d/b.toml") == [("conf.d/a.toml", b"a")]
    assert facts.read(str(here / "conf.d" / "a.toml"), "x/y.toml") == [(str(here / "conf.d" / "a.toml"), b"a")]
    assert facts.read("none.toml", "nssup.toml") == []
    assert facts.read("none*.toml", "nssup.toml") == []
    with pytest.raises(IsADirectoryError):
        facts.read("conf.d", "nssup.toml")


def test_loading(here: Path) -> None:
    (here / "nssup.toml").write_text('version = 1\ninclude = ["b.toml"]\n[pool.a]\ncommand = ["/bin/sh"]\n')
    (here / "b.toml").write_text('[pool.b]\ncommand = ["/bin/sh"]\n[supervisor]\n')
    with pytest.raises(SpecError) as refused:
        facts.load("nssup.toml")
    assert str(refused.value).startswith("b.toml:3:2: supervisor: belongs in the main file")
    (here / "b.toml").write_text('[pool.b]\ncommand = ["/bin/sh"]\n')
    assert list(facts.load("nssup.toml").pools) == ["a", "b"]


def test_checking(here: Path) -> None:
    (here / "n.toml").write_text(POOL)
    assert facts.check("n.toml") == (["n.toml: ok, 1 pool, 1 worker"], ExitCode.OK)
    (here / "n.toml").write_text(POOL + "x = 1\n")
    lines, code = facts.check("n.toml")
    assert [line.split(": ")[:2] for line in lines] == [["n.toml:4:1", "pool.a.x"]]
    assert code == ExitCode.CONFIG


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("none.toml", "none.toml: cannot be read: no such file or directory"),
        (".", ".: cannot be read: is a directory"),
        ("a\0b", "a\0b: cannot be read: embedded null byte"),
    ],
)
def test_a_config_that_cannot_be_read(here: Path, name: str, line: str) -> None:
    assert facts.check(name) == ([line], ExitCode.CONFIG)
    with pytest.raises(SpecError, match="cannot be read"):
        facts.load(name)


def test_finding(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSSUP_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / "config"))
    assert facts.find("x.toml") == "x.toml"
    (here / "nssup.toml").write_text("")
    assert facts.find(None) == "nssup.toml"
    monkeypatch.setenv("NSSUP_CONFIG", "/y.toml")
    assert facts.find(None) == "/y.toml"


def test_finding_nothing_says_where_it_looked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSSUP_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")
    monkeypatch.setattr(facts.Host, "exists", lambda _self, _path: False)
    with pytest.raises(SpecError) as refused:
        facts.find(None)
    assert str(refused.value) == (
        "no config file: looked for nssup.toml, /nowhere/nssup/nssup.toml, /etc/nssup/nssup.toml; name one with -c FILE"
    )
