"""What holds for a pool, and who said it."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nssup import config, effective, units
from nssup.facts import Host
from nssup.spec import PoolSpec, StopStep

if TYPE_CHECKING:
    from nssup.config import Config

TEXT = """\
version = 1
[defaults]
umask = "077"
[pool.web]
command = ["sleep", "{index}"]
workers = 3
env = { DB_PASSWORD = "hunter2", URL = "postgres://me:pw@db/x", PLAIN = "1" }
env_inherit = ["AWS_*"]
stop = [{ signal = "INT", wait = "1m30s" }, "kill"]
[pool.web.limits]
rlimits = { nofile = 1024, core = { soft = "0B", hard = "unlimited" }, cpu = "10s" }
[pool.web.restart]
settle = "250ms"
"""


def read(text: str = TEXT) -> Config:
    return config.parse("n.toml", text.encode(), lambda pattern, file: [], Host())


def test_each_setting_names_its_line() -> None:
    found = read()
    settings = {s.key: s for s in effective.settings(found.pools["web"], found.origins)}
    assert settings["command"][2:] == ('["sleep", "{index}"]', "n.toml:5")
    assert settings["umask"] == ("umask", 0o077, '"077"', "n.toml:3")
    assert settings["restart.settle"][2:] == ('"250ms"', "n.toml:13")
    assert settings["restart.policy"][2:] == ('"always"', "default")
    assert settings["stop"][2:] == ('[{ signal = "INT", wait = "1m30s" }, "kill"]', "n.toml:9")
    assert settings["limits.rlimits.nofile"][2:] == ("1024", "n.toml:11")
    assert settings["limits.rlimits.core"].text == '{ soft = "0B", hard = "unlimited" }'
    assert settings["limits.rlimits.cpu"].text == '"10s"'
    assert settings["env.DB_PASSWORD"].text == f'"{effective.MASK}"'
    assert settings["env.PLAIN"].text == '"1"'


def test_what_is_shown_is_a_config_that_means_the_same() -> None:
    found = read(TEXT.replace("hunter2", "").replace("me:pw@", ""))
    spec = found.pools["web"]
    shown = effective.show("web", effective.settings(spec, found.origins))
    assert config.parse("n.toml", f"version = 1\n{shown}".encode(), lambda pattern, file: [], Host()).pools == {
        "web": spec
    }


def test_a_scaled_pool_says_so() -> None:
    spec = PoolSpec(name="web", command=("x",), workers=5)
    settings = {s.key: s for s in effective.settings(spec, {("pool", "web", "workers"): "n.toml:6"}, 3)}
    assert settings["workers"][1:] == (5, "5", "scale (the config says 3: n.toml:6)")


def test_where_variables_come_from() -> None:
    found = read()
    env = ["AWS_KEY=k", "DB_PASSWORD=hunter2", "HOME=/root", "NSSUP_ID=web/0", "PATH=/bin", "URL=postgres://me:pw@db/x"]
    assert [tuple(each) for each in effective.variables(found.pools["web"], env, found.origins)] == [
        ("AWS_KEY", effective.MASK, "inherited (n.toml:8)"),
        ("DB_PASSWORD", effective.MASK, "n.toml:7"),
        ("HOME", "/root", "user"),
        ("NSSUP_ID", "web/0", "nssup"),
        ("PATH", "/bin", "supervisor"),
        ("URL", f"postgres://me:{effective.MASK}@db/x", "n.toml:7"),
    ]


@pytest.mark.parametrize(
    ("name", "secret"),
    [("DB_PASSWORD", True), ("AWS_SECRET_ACCESS_KEY", True), ("GITHUB_TOKEN", True), ("API_KEY", True), ("KEY", True),
     ("PGPASSWORD", True), ("db_pass", True), ("AUTHOR", True), ("MONKEY", False), ("KEYBOARD", False), ("PATH", False),
     ("LANG", False), ("PORT", False)],
)  # fmt: skip
def test_what_is_masked(name: str, secret: bool) -> None:
    assert (effective.masked(name, "value") == effective.MASK) is secret
    assert effective.masked(name, "") == ""


@given(st.integers(0, 10**12))
def test_a_duration_is_read_as_it_is_written(microseconds: int) -> None:
    assert units.duration(effective.seconds(microseconds / 1e6)) == pytest.approx(microseconds / 1e6, abs=1e-9)


@pytest.mark.parametrize("value", [True, 1, 'a"b\\c\n', ["x", "y"], 2.5])
def test_literals_are_toml(value: Any) -> None:  # noqa: ANN401 - any plain value
    assert tomllib.loads(f"x = {effective.literal(('other',), value)}")["x"] == value


def test_kill_is_written_as_it_is_read() -> None:
    spec = PoolSpec(name="a", command=("x",), stop=(StopStep(None),))
    settings = {s.key: s.text for s in effective.settings(spec, {})}
    assert settings["stop"] == '["kill"]'
