"""A supervisor's directories: made, its own, locked against a second one. Lives taken over: test_handover."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from launching import end_of, forked, in_child, wait_readable

from nssup.custody import Directories
from nssup.errors import ControlError, ExitCode
from nssup.record import Identity
from nssup.spec import SupervisorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

NOBODY = Identity(65534, 65534, ())
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Where another user may make directories as well."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.geteuid() and not directory.stat().st_mode & 1:
            directory.chmod(0o711)
    return tmp_path


def spec_in(base: Path, **paths: str) -> SupervisorSpec:
    known = {name: str(base / name) for name in ("state_dir", "runtime_dir", "log_dir", "socket")}
    return SupervisorSpec(**(known | paths))  # type: ignore[arg-type]


def epoch_of(base: Path) -> int:
    """One run of a supervisor."""
    directories = Directories(spec_in(base))
    directories.close()
    return directories.epoch


def refusal(spec: SupervisorSpec) -> ControlError:
    with pytest.raises(ControlError) as caught:
        Directories(spec)
    return caught.value


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_they_are_made(base: Path) -> None:
    spec = spec_in(base / "a" / "b")
    Directories(spec).close()
    assert [mode_of(Path(path)) for path in (spec.state_dir, spec.runtime_dir, spec.log_dir)] == [0o700, 0o700, 0o750]


def test_each_run_has_its_number(base: Path) -> None:
    assert [epoch_of(base) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\xff\xfe", b"1.5", b"9" * 5000, b"-7", b"0", b"4294967295", b"4294967296", b"99999999999"]
)
def test_a_number_that_is_none_starts_again(content: bytes, base: Path) -> None:
    """It must fit into 32 bits of the line, one more included."""
    epoch_of(base)
    (base / "state_dir" / "epoch").write_bytes(content)
    assert epoch_of(base) == 1
    assert epoch_of(base) == 2


def test_the_last_number_but_one(base: Path) -> None:
    epoch_of(base)
    (base / "state_dir" / "epoch").write_text("4294967294\n")
    assert epoch_of(base) == 2**32 - 1


def test_a_half_written_number_is_no_matter(base: Path) -> None:
    epoch_of(base)
    (base / "state_dir" / "epoch.new").write_text("5")
    assert epoch_of(base) == 2


@pytest.mark.parametrize("name", ["state_dir", "runtime_dir", "log_dir"])
def test_a_file_in_its_place(name: str, base: Path) -> None:
    (base / name).write_text("")
    error = refusal(spec_in(base))
    assert error.code == "directory"
    assert error.message == f"cannot make {base / name}: is no directory"
    (base / name).unlink()
    Directories(spec_in(base)).close()  # and no lock was left


def test_one_directory_for_both(base: Path) -> None:
    same = spec_in(base, runtime_dir=str(base / "state_dir"))
    other_name = spec_in(base, runtime_dir=str(base / "state_dir" / ".." / "state_dir"))
    for spec in (same, other_name):
        first = Directories(spec)
        assert refusal(spec).code == "locked"
        first.close()


# --- the lock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["state_dir", "runtime_dir"])
def test_a_second_one_in_the_same_process(shared: str, base: Path) -> None:
    first = Directories(spec_in(base / "a"))
    second = spec_in(base / "b", **{shared: str(base / "a" / shared)})
    error = refusal(second)
    assert (error.code, error.exit_code) == ("locked", ExitCode.FAILED)
    assert f"host PID {os.getpid()}" in error.message
    first.close()
    Directories(second).close()


def holder(base: Path) -> Callable[[int], None]:
    def hold(say: int) -> None:
        kept = Directories(spec_in(base))
        os.write(say, b"x")
        signal.pause()
        kept.close()

    return hold


def test_a_second_one_in_another_process(base: Path) -> None:
    with forked(holder(base)) as (child, heard):
        wait_readable(heard)
        lock = base / "state_dir" / "lock"
        host_pid = int(lock.read_text())
        lock.write_text("")  # as if he had not come to write it yet: the kernel knows him
        error = refusal(spec_in(base))
        assert error.code == "locked"
        assert error.message == f"another supervisor has {base / 'state_dir'}: host PID {host_pid}"
        assert "its own state_dir" in error.hint
        signal.pidfd_send_signal(child, signal.SIGKILL)
        end_of(child)
        assert epoch_of(base) == 2  # at once


def test_copies_of_its_descriptors_do_not_hold_it(base: Path) -> None:
    """As the child of a clone has them for a moment."""

    def hold_and_copy(say: int) -> None:
        kept = Directories(spec_in(base))
        if os.fork() == 0:
            os.write(say, b"x")
            signal.pause()
        signal.pause()
        kept.close()

    with forked(hold_and_copy) as (child, heard):
        wait_readable(heard)
        assert refusal(spec_in(base)).code == "locked"
        copy = int(Path(f"/proc/self/fdinfo/{child}").read_text().split("Pid:")[1].split()[0])
        grandchild = int(Path(f"/proc/{copy}/task/{copy}/children").read_text())
        pidfd = os.pidfd_open(grandchild)
        signal.pidfd_send_signal(child, signal.SIGKILL)
        end_of(child)
        assert epoch_of(base) == 2
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


@pytest.mark.parametrize("what", ["symlink", "directory"])
def test_a_lock_that_is_no_file(what: str, base: Path) -> None:
    epoch_of(base)
    lock, target = base / "state_dir" / "lock", base / "target"
    lock.unlink()
    target.write_text("precious\n")
    if what == "symlink":
        lock.symlink_to(target)
    else:
        lock.mkdir()
    assert refusal(spec_in(base)).message.startswith(f"cannot open {lock}: ")
    assert target.read_text() == "precious\n"


# --- whose they are --------------------------------------------------------------------------------------------------


def test_what_others_may_write_is_not_ours(base: Path) -> None:
    epoch_of(base)
    (base / "state_dir").chmod(0o777)
    assert "mode 0777" in refusal(spec_in(base)).message
    (base / "state_dir").chmod(0o755)
    Directories(spec_in(base)).close()


@needs_root
def test_what_belongs_to_others_is_not_ours(base: Path) -> None:
    (base / "runtime_dir").mkdir(mode=0o700)
    os.chown(base / "runtime_dir", NOBODY.uid, NOBODY.gid)
    assert f"belongs to uid {NOBODY.uid}" in refusal(spec_in(base)).message


@needs_root
def test_where_one_may_not_write(base: Path) -> None:
    def refused() -> tuple[str, ExitCode, str]:
        error = refusal(spec_in(base))
        return error.code, error.exit_code, error.message

    expected = ("directory", ExitCode.NOT_PERMITTED, f"cannot make {base / 'state_dir'}: Permission denied")
    assert in_child(refused, identity=NOBODY) == expected
