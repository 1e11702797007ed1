"""What an operator wants for good: the file, and supervisors that come and go."""

from __future__ import annotations

import json
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest
from live import Up, needs_namespaces, needs_root

from nssup.desired import Desired, write_durably

if TYPE_CHECKING:
    from pathlib import Path

SLEEP = 'command = ["sleep", "1000"]\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "desired.json"


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_wanted_is_there_next_time(path: Path) -> None:
    desired = Desired(path, 1)
    assert (desired.scale("web"), desired.strange, path.exists()) == (None, [], False)
    desired.set_scales({"web": 5, "api": 0})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text()) == {"version": 1, "pools": {"api": {"scale": 0}, "web": {"scale": 5}}}
    again = Desired(path, 2)
    assert (again.scale("web"), again.scale("api"), again.scale("db"), again.strange) == (5, 0, None, [])
    again.set_scales({"web": None})
    assert (Desired(path, 3).scale("web"), Desired(path, 3).scale("api")) == (None, 0)
    assert list(path.parent.iterdir()) == [path]


def test_it_is_written_only_when_it_changes(path: Path) -> None:
    Desired(path, 1).set_scales({"web": 5})
    before = path.stat().st_ino, path.stat().st_mtime_ns
    desired = Desired(path, 2)
    desired.set_scales({"web": 5, "api": None})
    desired.keep_only(["web", "api"])
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    desired.keep_only(["api"])
    assert json.loads(path.read_text())["pools"] == {}


def test_what_a_later_nssup_put_there_is_kept(path: Path) -> None:
    path.write_text('{"version": 1, "new": 1, "pools": {"web": {"scale": 2, "enabled": false, "rollout": {"at": 3}}}}')
    desired = Desired(path, 1)
    assert (desired.scale("web"), desired.strange) == (2, [])
    desired.set_scales({"web": 3, "api": 1})
    pools = json.loads(path.read_text())["pools"]
    assert pools == {"web": {"scale": 3, "enabled": False, "rollout": {"at": 3}}, "api": {"scale": 1}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"version": 2, "pools": {}}',
        b'{"version": 1, "pools": []}',
        b'{"version": 1, "pools": {"web": 3}}',
        b'{"version": 1, "pools": {"web": {"scale": "3"}}}',
        b'{"version": 1, "pools": {"web": {"scale": -1}}}',
        b'{"version": 1, "pools": {"web": {"scale": true}}}',
        b'{"version": 1, "pools": {"web": {"scale": 1000000000}}}',
        b'{"version": 1, "pools": {"web": {"enabled": 1}}}',
    ],
)
def test_a_file_that_means_nothing_is_set_aside(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    desired = Desired(path, 7)
    aside = path.with_name("desired.json.bad-7")
    assert (desired.scale("web"), path.exists(), aside.read_bytes()) == (None, False, content)
    (line,) = desired.strange
    assert line.startswith(f"{path} means nothing (")
    assert line.endswith("): set aside as desired.json.bad-7; the config counts")
    desired.set_scales({"web": 1})
    assert Desired(path, 8).scale("web") == 1


def test_a_file_that_cannot_be_read_is_left_alone(path: Path) -> None:
    path.mkdir()
    desired = Desired(path, 1)
    assert desired.strange == [f"{path} cannot be read: EISDIR; the config counts"]
    with pytest.raises(IsADirectoryError):
        desired.set_scales({"web": 1})
    assert desired.scale("web") is None
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_leaves_what_was_there(path: Path) -> None:
    write_durably(path, b"old")
    path.with_name("desired.json.new").mkdir()
    with pytest.raises(IsADirectoryError):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_link_in_its_way_is_not_followed(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.with_name("desired.json.new").symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links"):
        write_durably(path, b"new")
    assert not elsewhere.exists()


# --- supervisors ------------------------------------------------------------------------------------------------------


def wanted(up: Up) -> dict[str, int]:
    return {pool["name"]: pool["wanted"] for pool in up.status()["pools"]}


@needs_namespaces
def test_a_scale_lasts(tmp_path: Path) -> None:
    both = f"[pool.web]\n{SLEEP}workers = 2\n[pool.api]\n{SLEEP}"
    file = tmp_path / "s" / "desired.json"
    with Up(tmp_path, both) as up:
        up.wait_running("web/0", "web/1", "api/0")
        assert not file.exists()
        assert up.ctl("scale", "web", "+1").code == 0
        assert up.ctl("scale", "api", "0").code == 0
        assert wanted(up) == {"web": 3, "api": 0}
        assert up.ctl("reexec").code == 0
        assert wanted(up) == {"web": 3, "api": 0}
    with Up(tmp_path, both) as up:  # it was ended
        assert wanted(up) == {"web": 3, "api": 0}
        up.wait_running("web/2")
        up.status()
        up.process.kill()
        up.wait_end()
        up.leaves = True
        with Up(tmp_path, both) as after:  # it was killed
            assert wanted(after) == {"web": 3, "api": 0}
            assert after.ctl("scale", "web", "2").code == 0  # what the config says: so it counts again
    assert json.loads(file.read_text())["pools"] == {"api": {"scale": 0}}
    with Up(tmp_path, f"[pool.web]\n{SLEEP}workers = 4\n") as up:  # and a pool is no more
        assert wanted(up) == {"web": 4}
        assert json.loads(file.read_text())["pools"] == {}


@needs_namespaces
def test_a_broken_file_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o700)
    (tmp_path / "s" / "desired.json").write_text("{")
    with Up(tmp_path, f"[pool.web]\n{SLEEP}workers = 2\n") as up:
        told = up.wait("desired_set_aside")["reason"]
        assert told.endswith("set aside as desired.json.bad-1; the config counts")
        assert wanted(up) == {"web": 2}
        assert up.ctl("orphans") == (0, f"{told}\n", "")
        assert json.loads(up.ctl("orphans", "--json").out) == {"orphans": [], "set_aside": [told]}
        assert up.ctl("reexec").code == 0
        aside = tmp_path / "s" / "desired.json.bad-1"
        assert up.ctl("orphans").out == f"{aside}: set aside by an earlier supervisor\n"
        aside.unlink()
        assert up.ctl("orphans") == (0, "", "")


# The state directory becomes a small file system of its own, where only its run/ is seen from outside.
SMALL = """
mkdir "$0/keep" && mount --bind "$0/s/run" "$0/keep" && mount -t tmpfs -o size=64k,mode=0700 none "$0/s"
mkdir -m 0700 "$0/s/run" && mount --bind "$0/keep" "$0/s/run" && exec "$@"
"""
FILL = 'dd if=/dev/zero "of=$0/s/filler" bs=1k'
FREEZE = 'mount --rbind "$0/s" "$0/s" && mount -o remount,ro,bind "$0/s"'


@needs_root
@needs_namespaces
@pytest.mark.parametrize(
    ("then", "status", "why"), [(FILL, 507, "No space left on device"), (FREEZE, 500, "Read-only file system")]
)
def test_what_cannot_be_remembered_is_not_done(tmp_path: Path, then: str, status: int, why: str) -> None:
    prefix = ("unshare", "-m", "sh", "-c", SMALL, str(tmp_path))
    with Up(tmp_path, f"[pool.web]\n{SLEEP}workers = 2\n", prefix=prefix) as up:
        up.wait_running("web/0", "web/1")
        inside = ["nsenter", "-m", "-t", str(up.host_pid), "sh", "-c", then, str(tmp_path)]
        subprocess.run(inside, capture_output=True, check=then is FREEZE)
        answer = up.api("POST", "/v1/scale", {"select": ["web"], "n": 5})
        assert (answer[0], answer[1]["error"]["code"]) == (status, "not-remembered")
        assert answer[1]["error"]["message"] == f"cannot write {tmp_path}/s/desired.json: {why}"
        assert wanted(up) == {"web": 2}
        assert [w["id"] for w in up.status()["workers"]] == ["web/0", "web/1"]
