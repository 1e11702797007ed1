"""The file of notes as a crash, a forger or a full disk leave it; finding a life again, and no other in its place."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import struct
import subprocess
import sys
import zlib
from typing import TYPE_CHECKING

import pytest
from launching import launched, needs_namespaces, plan_of, shell, wait_readable
from msgspec.structs import replace

from nssup import _pidfd, adopt, clone, lives, record, wire
from nssup.adopt import Fact
from nssup.custody import Custody
from nssup.errors import ControlError
from nssup.events import State
from nssup.lives import Identity, Lives
from nssup.machine import Worker
from nssup.record import SLOT_OVER, SLOT_RELEASED, SLOT_SIZE, SLOT_SPAWNING, Slot, decode_slot, encode_slot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nssup.clone import Process

PAIR = 2 * SLOT_SIZE
NOBODY = Identity()
SOMEBODY = Identity(4711, b"handle", 77, 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lives"


@contextlib.contextmanager
def opened(path: Path, epoch: int = 1) -> Iterator[tuple[Lives, lives.Found]]:
    """One run of a supervisor."""
    file = Lives(path, epoch)
    try:
        yield file, file.read()
    finally:
        file.close()


def found_in(path: Path, epoch: int = 1) -> lives.Found:
    with opened(path, epoch) as (_, found):
        return found


def names(found: lives.Found) -> list[tuple[str, int, int]]:
    return sorted((slot.worker, slot.generation, slot.step) for slot in found.slots)


def patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


# --- what is written is read -----------------------------------------------------------------------------------------


def test_a_note_comes_back(path: Path) -> None:
    with opened(path, 3) as (file, found):
        assert found == ([], [], [])
        file.write("web/3", 7, SLOT_RELEASED, SOMEBODY, b"body", b"spechash")
    (slot,) = found_in(path).slots
    assert (slot.worker, slot.generation, slot.step, slot.epoch) == ("web/3", 7, SLOT_RELEASED, 3)
    assert (slot.init_host_pid, slot.handle, slot.pidfd_inode) == (4711, b"handle", 77)
    assert (slot.body, slot.spec_hash) == (b"body", b"spechash")
    assert path.stat().st_mode & 0o777 == 0o600


def test_halves_alternate_and_the_last_counts(path: Path) -> None:
    with opened(path) as (file, _):
        for number in range(5):
            file.write("web/0", 1, SLOT_RELEASED, SOMEBODY, b"%d" % number)
    assert [slot.body for slot in found_in(path).slots] == [b"4"]
    data = path.read_bytes()
    halves = [decode_slot(data[:SLOT_SIZE]), decode_slot(data[SLOT_SIZE:PAIR])]
    assert [slot.body for slot in halves if slot] == [b"4", b"3"]
    # The next run goes on in the other half, with a higher number.
    with opened(path) as (file, _):
        file.write("web/0", 1, SLOT_OVER, NOBODY, b"5")
    data = path.read_bytes()
    assert [slot.body for slot in map(decode_slot, (data[:SLOT_SIZE], data[SLOT_SIZE:PAIR])) if slot] == [b"4", b"5"]
    assert [slot.body for slot in found_in(path).slots] == [b"5"]


@pytest.mark.parametrize("torn", [1, 17, 255, 508, 511])
def test_a_torn_half_leaves_the_one_before(path: Path, torn: int) -> None:
    with opened(path) as (file, _):
        file.write("web/0", 1, SLOT_SPAWNING, NOBODY, b"before")
        file.write("web/0", 1, SLOT_RELEASED, SOMEBODY, b"after")
    patch(path, SLOT_SIZE + torn, bytes(SLOT_SIZE - torn))
    found = found_in(path)
    assert [slot.body for slot in found.slots] in ([b"before"], [b"after"])
    assert [slot.body for slot in found.slots] == [b"before"] or torn == 511
    assert found.strange == []
    # And the torn one is the one that is written next.
    with opened(path) as (file, _):
        file.write("web/0", 1, SLOT_OVER, NOBODY, b"later")
    assert [slot.body for slot in found_in(path).slots] == [b"later"]


def test_the_very_first_note_torn(path: Path) -> None:
    """Whoever was cloned for it had no GO."""
    with opened(path) as (file, _):
        file.write("web/0", 1, SLOT_SPAWNING, NOBODY, b"")
    patch(path, 100, b"torn")
    assert found_in(path).slots == []


def test_a_pair_without_a_whole_half_is_set_aside_once(path: Path) -> None:
    with opened(path) as (file, _):
        file.write("web/0", 1, SLOT_RELEASED, SOMEBODY, b"")
        file.write("web/1", 1, SLOT_RELEASED, SOMEBODY, b"")
    before = path.read_bytes()
    patch(path, 64, b"\xff" * 8)
    patch(path, SLOT_SIZE + 64, b"\xff" * 8)
    spoilt = path.read_bytes()[:PAIR]
    found = found_in(path, epoch=9)
    assert names(found) == [("web/1", 1, SLOT_RELEASED)]
    assert found.strange == [f"slot 0 of {path} is torn or forged: set aside as lives.bad-9-0"]
    assert path.with_name("lives.bad-9-0").read_bytes() == spoilt
    assert found_in(path, epoch=10).strange == []
    assert path.read_bytes()[PAIR:] == before[PAIR:]


def forged(slot: Slot, **changes: object) -> bytes:
    return encode_slot(slot._replace(**changes))  # type: ignore[arg-type]


def sealed(data: bytes) -> bytes:
    return data + struct.pack("<I", zlib.crc32(data))


def noted(path: Path) -> Slot:
    """A note of a file that has only one."""
    with opened(path) as (file, _):
        file.write("web/0", 1, SLOT_RELEASED, SOMEBODY, b"")
    (slot,) = found_in(path).slots
    return slot


FORGED: dict[str, Callable[[Slot], bytes]] = {
    "a wrong checksum": lambda slot: encode_slot(slot)[:-1] + b"!",
    "another magic": lambda slot: sealed(b"XXXX" + encode_slot(slot)[4:-4]),
    "no step": lambda slot: forged(slot, step=record.SLOT_FREE),
    "no pool": lambda slot: forged(slot, worker="/0"),
    "no index": lambda slot: forged(slot, worker="web/"),
    "an index that is none": lambda slot: forged(slot, worker="web/-1"),
    "a second name of a worker": lambda slot: forged(slot, worker="web/00"),
    "a way out of the directory": lambda slot: forged(slot, worker="../../etc/0"),
    "the name of our own log": lambda slot: forged(slot, worker="nssup/0"),
    "no text": lambda slot: sealed(encode_slot(slot)[:-4].replace(b"web/0", b"\xff\xfe\xfd/0")),
    "all ones": lambda slot: b"\xff" * SLOT_SIZE,
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_note_is_set_aside(path: Path, name: str) -> None:
    slot = noted(path)
    patch(path, 0, FORGED[name](slot) + bytes(SLOT_SIZE))
    found = found_in(path)
    assert (found.slots, found.elsewhere, len(found.strange)) == ([], [], 1)
    assert len(list(path.parent.glob("lives.bad-*"))) == 1


def test_a_life_that_is_noted_twice_is_taken_once(path: Path) -> None:
    slot = noted(path)
    patch(path, 5 * PAIR, encode_slot(slot))
    found = found_in(path)
    assert (names(found), len(found.strange)) == ([("web/0", 1, SLOT_RELEASED)], 1)


@pytest.mark.parametrize(
    ("changes", "where"), [({"boot_id": bytes(16)}, "reboot"), ({"pidns_inode": 17}, "pid-namespace")]
)
def test_notes_from_elsewhere_are_told_and_forgotten(path: Path, changes: dict[str, object], where: str) -> None:
    slot = noted(path)
    patch(path, 0, forged(slot, **changes) + bytes(SLOT_SIZE))
    for _ in range(2):
        found = found_in(path)
        assert (found.slots, found.strange) == ([], [])
        assert [(slot.worker, why) for slot, why in found.elsewhere] == [("web/0", where)]
    with opened(path) as (file, _):
        file.drop_stale()
        file.write("web/5", 1, SLOT_SPAWNING, NOBODY, b"")
    found = found_in(path)
    assert (names(found), found.elsewhere) == ([("web/5", 1, SLOT_SPAWNING)], [])


@pytest.mark.parametrize("half", [0, 1])
def test_notes_of_a_later_version_are_not_read_at_all(path: Path, half: int) -> None:
    """To take half of them for the whole would be to start workers twice."""
    slot = noted(path)
    data = bytearray(encode_slot(slot)[:-4])
    struct.pack_into("<H", data, 4, record.SLOT_VERSION + 1)
    before = encode_slot(slot) * 2
    patch(path, 0, before[: half * SLOT_SIZE] + sealed(bytes(data)) + before[(half + 1) * SLOT_SIZE :])
    with pytest.raises(ControlError, match="later version"):
        found_in(path)
    assert not list(path.parent.glob("lives.bad-*"))


def test_an_empty_file_and_one_of_a_strange_size(path: Path) -> None:
    path.write_bytes(b"")
    assert found_in(path) == ([], [], [])
    path.write_bytes(bytes(PAIR + 100))
    with opened(path) as (file, _):
        for index in range(3):
            file.write(f"web/{index}", 1, SLOT_RELEASED, SOMEBODY, b"")
    assert len(found_in(path).slots) == 3


def test_no_link_is_followed(path: Path) -> None:
    path.symlink_to("elsewhere")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        Lives(path, 1)
    with pytest.raises(ControlError, match="cannot use"):
        Custody(path, 1, -1)


def test_the_highest_epoch(path: Path) -> None:
    assert lives.last_epoch(path) == 0
    for epoch in (7, 3):
        with opened(path, epoch) as (file, _):
            file.write(f"web/{epoch}", 1, SLOT_RELEASED, SOMEBODY, b"")
    assert lives.last_epoch(path) == 7
    path.write_bytes(b"\xff" * 1000)
    assert lives.last_epoch(path) == 0


# --- room ------------------------------------------------------------------------------------------------------------


def test_two_thousand_workers(path: Path) -> None:
    ids = [f"web/{index}" for index in range(2000)]
    with opened(path) as (file, _):
        for step in (SLOT_SPAWNING, SLOT_RELEASED):
            for worker_id in ids:
                file.write(worker_id, 1, step, SOMEBODY, b"")
    assert path.stat().st_size == 2048 * PAIR
    found = found_in(path)
    assert names(found) == sorted((worker_id, 1, SLOT_RELEASED) for worker_id in ids)
    with opened(path) as (file, _):
        for worker_id in ids[500:]:
            file.forget(worker_id, 1)
        for worker_id in ids[500:1500]:
            file.write(worker_id, 2, SLOT_SPAWNING, NOBODY, b"")
    assert path.stat().st_size == 2048 * PAIR
    assert len(found_in(path).slots) == 1500


def test_what_is_freed_is_used_again_and_nothing_old_shows(path: Path) -> None:
    with opened(path) as (file, _):
        for generation in range(1, 500):
            file.write("web/0", generation, SLOT_SPAWNING, NOBODY, b"")
            file.write("web/0", generation, SLOT_RELEASED, SOMEBODY, b"")
            if generation > 1:
                file.forget("web/0", generation - 1)
        file.forget("web/0", 7)  # long gone
    assert path.stat().st_size == 64 * PAIR
    assert names(found_in(path)) == [("web/0", 499, SLOT_RELEASED)]


@contextlib.contextmanager
def file_size(limit: int) -> Iterator[None]:
    """As if the disk were full beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_room_a_new_life_cannot_be_noted_and_old_ones_can(path: Path) -> None:
    with opened(path) as (file, _):
        for index in range(64):
            file.write(f"web/{index}", 1, SLOT_RELEASED, SOMEBODY, b"")
        with file_size(64 * PAIR):
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                file.write("web/64", 1, SLOT_SPAWNING, NOBODY, b"")
            file.write("web/0", 1, SLOT_OVER, NOBODY, b"")
            file.forget("web/1", 1)
            file.write("web/64", 1, SLOT_SPAWNING, NOBODY, b"")
    assert len(found_in(path).slots) == 64


def test_a_note_that_was_not_written_leaves_the_one_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as (file, _):
        file.write("web/0", 1, SLOT_SPAWNING, NOBODY, b"one")
        file.write("web/0", 1, SLOT_RELEASED, SOMEBODY, b"two")
        real = os.pwrite
        for short in (0, 100, None):

            def failing(fd: int, data: bytes, at: int, /, short: int | None = short) -> int:
                if short is None:
                    raise OSError(errno.EIO, "disk")
                return real(fd, data[:short], at)

            monkeypatch.setattr(os, "pwrite", failing)
            with pytest.raises(OSError, match=r"disk|No space"):
                file.write("web/0", 1, SLOT_OVER, NOBODY, b"three")
            with pytest.raises(OSError, match=r"disk|No space"):
                file.write("web/9", 1, SLOT_SPAWNING, NOBODY, b"")
            monkeypatch.undo()
            assert [slot.body for slot in found_in(path).slots] == [b"two"]
        file.write("web/0", 1, SLOT_OVER, NOBODY, b"four")
    assert [slot.body for slot in found_in(path).slots] == [b"four"]


def test_custody_says_when_it_cannot_note(path: Path) -> None:
    custody = Custody(path, 1, -1)
    worker = Worker(pool="web", index=0, state=State.STARTING, want_up=True, generation=1, alive=True)
    with contextlib.closing(custody), file_size(0):
        custody.changed(worker.id, worker)
        assert custody.failed is not None
        assert custody.failed.errno == errno.EFBIG


# --- finding a life again --------------------------------------------------------------------------------------------


@pytest.fixture
def own_pidfd() -> Iterator[int]:
    fd = os.pidfd_open(os.getpid())
    yield fd
    os.close(fd)


def slot_of(identity: Identity) -> Slot:
    return Slot(
        SLOT_RELEASED,
        1,
        bytes(16),
        1,
        1,
        "web/0",
        0,
        identity.start_time,
        identity.pidfd_inode,
        identity.init_host_pid,
        identity.handle,
    )


def look(slot: Slot, own_pidfd: int) -> Fact:
    pidfd, fact = lives.find(slot, own_pidfd)
    assert (pidfd is not None) == fact.holds
    if pidfd is not None:
        os.close(pidfd)
    return fact


def refuse(number: int) -> Callable[..., object]:
    def refused(*_: object) -> object:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of ours."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


HOLDS, GONE, UNPROVEN = Fact(holds=True), Fact(gone=True), Fact(why="unproven")
MASKS = ["handle", "inode", "start time"]


def mask(monkeypatch: pytest.MonkeyPatch, ways: int) -> None:
    """Leaves what a kernel has that knows only the last `3 - ways` ways of naming a process."""
    if ways >= 1:
        monkeypatch.setattr(_pidfd, "handle", refuse(errno.EOPNOTSUPP))
        monkeypatch.setattr(_pidfd, "reopen", refuse(errno.EOPNOTSUPP))
    if ways >= 2:
        monkeypatch.setattr(lives, "_inode", lambda pidfd: 0)


@pytest.mark.parametrize("way", MASKS)
def test_a_process_is_found_by(
    way: str, sleeper: subprocess.Popen[bytes], own_pidfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask(monkeypatch, MASKS.index(way))
    host_pid = sleeper.pid
    pidfd = os.pidfd_open(host_pid)
    identity = lives.identify(pidfd, host_pid)
    os.close(pidfd)
    known = [name for name, value in zip(MASKS, identity[1:], strict=True) if value]
    assert known[0] == way
    assert ("start time" in known) == (way == "start time")
    slot = slot_of(identity)
    assert look(slot, own_pidfd) == HOLDS
    sleeper.kill()
    wait_ended(sleeper)
    assert look(slot, own_pidfd) == GONE  # a zombie
    sleeper.wait()
    assert look(slot, own_pidfd).gone


def wait_ended(process: subprocess.Popen[bytes]) -> None:
    pidfd = os.pidfd_open(process.pid)
    wait_readable(pidfd)
    os.close(pidfd)


@pytest.mark.parametrize("way", MASKS)
def test_a_stranger_with_the_same_number_is_not_taken(
    way: str, sleeper: subprocess.Popen[bytes], own_pidfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number is right, and everything else is of somebody who is gone."""
    mask(monkeypatch, MASKS.index(way))
    gone = subprocess.Popen(["sleep", "1000"])
    pidfd = os.pidfd_open(gone.pid)
    identity = lives.identify(pidfd, gone.pid)
    os.close(pidfd)
    gone.kill()
    gone.wait()
    if identity.start_time:
        # A tick is 10 ms: both may have begun in the same.
        identity = identity._replace(start_time=lives.start_time(sleeper.pid) - 1)
    assert look(slot_of(identity._replace(init_host_pid=sleeper.pid)), own_pidfd) == GONE


def test_what_cannot_be_told_is_not_guessed(
    sleeper: subprocess.Popen[bytes], own_pidfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look(slot_of(Identity(sleeper.pid)), own_pidfd) == UNPROVEN
    by_time = Identity(sleeper.pid, start_time=lives.start_time(sleeper.pid))
    assert look(slot_of(by_time), own_pidfd) == HOLDS
    monkeypatch.setattr(lives, "start_time", lambda host_pid: 0)  # /proc with hidepid
    assert look(slot_of(by_time), own_pidfd) == UNPROVEN
    monkeypatch.setattr(os, "pidfd_open", refuse(errno.EPERM))
    assert look(slot_of(by_time), own_pidfd) == Fact(why="EPERM")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_no_room_for_a_descriptor_says_nothing_about_a_life(
    number: int, own_pidfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = slot_of(Identity(os.getpid(), b"x" * 12))
    monkeypatch.setattr(_pidfd, "reopen", refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        lives.find(slot, own_pidfd)
    monkeypatch.setattr(_pidfd, "reopen", refuse(errno.ENOSYS))
    monkeypatch.setattr(os, "pidfd_open", refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        lives.find(slot, own_pidfd)


def test_a_number_that_a_thread_has_now_is_of_nobody(own_pidfd: int) -> None:
    code = "import threading; t = threading.Thread(target=input); t.start(); print(t.native_id, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        thread = int(process.stdout.readline())
        assert look(slot_of(Identity(thread, start_time=1)), own_pidfd).gone
        process.communicate("\n")


@pytest.mark.parametrize("host_pid", [-1, -(2**31), 2**31 - 1])
def test_numbers_that_are_none(host_pid: int, own_pidfd: int) -> None:
    assert look(slot_of(Identity(host_pid, b"\0" * 12)), own_pidfd).gone


def test_nothing_was_noted_of_its_init(own_pidfd: int) -> None:
    assert look(slot_of(NOBODY), own_pidfd) == GONE


# --- taking it over ---------------------------------------------------------------------------------------------------


def worker_of(identity: Identity) -> Worker:
    return Worker(
        pool="web",
        index=0,
        state=State.RUNNING,
        want_up=True,
        generation=1,
        alive=True,
        running_since=1.0,
        up_since=1.0,
        ready=True,
        init_host_pid=identity.init_host_pid,
        host_pid=1,
        ns_pid=2,
        last_host_pid=1,
        last_ns_pid=2,
    )


@contextlib.contextmanager
def claimed(path: Path, identity: Identity, own_pidfd: int) -> Iterator[tuple[adopt.Adopted, Process | None]]:
    """What the next supervisor makes of a worker that runs with an init of this identity."""
    with opened(path, 1) as (file, _):
        file.write("web/0", 1, SLOT_RELEASED, identity, adopt.keep(worker_of(identity)))
    custody = Custody(path, 2, own_pidfd)
    with contextlib.closing(custody):
        assert custody.unclaimed() == {"web"}
        (claim,) = custody.claim("web", 100.0)
        assert custody.unclaimed() == set()
        custody.changed("web/0", claim.adopted.worker)
        try:
            yield claim.adopted, claim.processes[0] if claim.processes else None
        finally:
            for process in claim.processes:
                process.close()


@pytest.mark.parametrize("full", [True, False])
def test_a_forged_note_with_our_own_number_is_not_believed(path: Path, own_pidfd: int, full: bool) -> None:
    """Not even one with everything right about us: who is no init of ours has no line of ours."""
    identity = lives.identify(own_pidfd, os.getpid()) if full else Identity(os.getpid())
    with claimed(path, identity, own_pidfd) as (adopted, process):
        assert process is None
        assert adopted.worker.state is State.LOST
        assert adopted.worker.reason in ("lost:ENOTSOCK", "lost:EBADF", "lost:unproven")
        assert (adopted.events, adopted.actions) == ((), ())


def test_who_was_lost_keeps_its_name_for_the_next_one(path: Path, own_pidfd: int) -> None:
    identity = lives.identify(own_pidfd, os.getpid())
    with claimed(path, identity, own_pidfd):
        pass
    (slot,) = found_in(path).slots
    assert (slot.init_host_pid, slot.handle) == (os.getpid(), identity.handle)
    custody = Custody(path, 3, own_pidfd)
    with contextlib.closing(custody):
        (claim,) = custody.claim("web", 100.0)
        assert claim.adopted.worker.state is State.LOST
        # Until somebody says that it is dealt with.
        down = replace(claim.adopted.worker, state=State.STOPPED, want_up=False)
        custody.changed("web/0", down)
    (slot,) = found_in(path).slots
    assert (slot.init_host_pid, slot.handle, slot.step) == (0, b"", SLOT_OVER)


@needs_namespaces
@pytest.mark.parametrize("way", MASKS)
def test_a_life_is_taken_over(way: str, path: Path, own_pidfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask(monkeypatch, MASKS.index(way))
    with launched(plan_of("/bin/sleep", "1000", die=False)) as life:
        identity = lives.identify(life.process.pidfd, life.process.init_host_pid)
        with claimed(path, identity, own_pidfd) as (adopted, process):
            assert process is not None
            assert adopted == adopt.Adopted(worker_of(identity))
            process.hello(own_pidfd)
            wait_readable(process.line)


@needs_namespaces
def test_a_merged_log_has_one_pipe(path: Path, own_pidfd: int) -> None:
    launcher = clone.Launcher()
    with contextlib.closing(launcher):
        process = launcher.launch(plan_of("/bin/sleep", "1000", die=False), merge=True)
        try:
            process.go()
            identity = lives.identify(process.pidfd, process.init_host_pid)
            with claimed(path, identity, own_pidfd) as (_, taken):
                assert taken is not None
                assert (taken.stdout is None, taken.stderr is None) == (False, True)
        finally:
            process.destroy()


@needs_namespaces
def test_without_room_nothing_is_taken_and_nothing_is_lost(
    path: Path, own_pidfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with launched(plan_of("/bin/sleep", "1000", die=False)) as life:
        identity = lives.identify(life.process.pidfd, life.process.init_host_pid)
        with opened(path, 1) as (file, _):
            for index in range(3):
                file.write(f"web/{index}", 1, SLOT_RELEASED, identity, adopt.keep(worker_of(identity)))
        custody = Custody(path, 2, own_pidfd)
        with contextlib.closing(custody):
            real = clone._log_of
            calls = iter(range(100))

            def soon_none(*args: int) -> int:
                if next(calls) > 3:
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                return real(*args)

            monkeypatch.setattr(clone, "_log_of", soon_none)
            with pytest.raises(ControlError, match="cannot take over the workers of web: Too many open files"):
                custody.claim("web", 100.0)
            monkeypatch.undo()
            claims = custody.claim("web", 100.0)
            assert [claim.adopted.worker.state for claim in claims] == [State.RUNNING] * 3
            for claim in claims:
                for process in claim.processes:
                    process.close()


def told(process: Process) -> wire.State:
    """What an adopted life says when it is asked: its State, and that its program runs."""
    found: list[wire.Message] = []
    while not any(isinstance(message, wire.State) for message in found) or not isinstance(found[-1], wire.Started):
        wait_readable(process.line)
        found += process.receive()
    (state,) = (message for message in found if isinstance(message, wire.State))
    return state


@contextlib.contextmanager
def adopted_twice(epochs: tuple[int, int]) -> Iterator[list[Process]]:
    """A life, and two supervisors that take it over, of these epochs. The program ends with 3 on SIGUSR1."""
    with launched(plan_of(*shell("trap 'exit 3' USR1; echo; while :; do sleep 1000 & wait; done"), die=False)) as life:
        assert life.process.stdout is not None
        wait_readable(life.process.stdout)
        life.hear(wire.Started)
        found = []
        for epoch in epochs:
            pidfd = os.pidfd_open(life.process.init_host_pid)
            found.append(clone.Process.adopt(pidfd, life.process.init_host_pid, 1, epoch))
        try:
            yield found
        finally:
            for process in found:
                process.close()


@needs_namespaces
def test_init_listens_to_the_newest_supervisor_only(own_pidfd: int) -> None:
    with adopted_twice((3, 2)) as (newer, older):
        newer.hello(own_pidfd)
        state = told(newer)
        assert (state.epoch, state.phase) == (3, wire.Phase.RUNNING)
        older.hello(own_pidfd)
        older.signal(signal.SIGKILL)
        older.change_policy(wire.Policy.DIE)
        older.ping()
        newer.ping()
        wait_readable(newer.line)
        (answer,) = newer.receive()  # both read the same line: what came was for this one
        assert isinstance(answer, wire.State)
        state = answer
        assert (state.epoch, state.phase, state.policy) == (3, wire.Phase.RUNNING, wire.Policy.KEEP)
        assert state.unknown == 4


@needs_namespaces
def test_init_knows_the_steps_of_a_stop_that_reached_it(own_pidfd: int) -> None:
    with adopted_twice((2, 3)) as (one, other):
        one.hello(own_pidfd)
        assert told(one).step == 0
        one.signal(signal.SIGCONT, stop_steps=1)
        one.signal(signal.SIGCONT)
        other.hello(own_pidfd)
        state = told(other)
        assert (state.phase, state.step) == (wire.Phase.RUNNING, 1)


@needs_namespaces
def test_what_init_answers_waits_for_room(own_pidfd: int) -> None:
    """Supervisors that died before they read have filled the line: the next one is answered all the same."""
    with adopted_twice((2, 3)) as (one, other):
        one.hello(own_pidfd)
        for _ in range(2000):
            one.ping()
            os.sched_yield()
        other.hello(own_pidfd)
        assert told(other).epoch == 3


@needs_namespaces
def test_a_hello_waits_for_room(own_pidfd: int) -> None:
    """init was frozen for long, and the line to it is full."""
    with adopted_twice((2, 3)) as (one, other):
        signal.pidfd_send_signal(one.pidfd, signal.SIGSTOP)
        for _ in range(2000):
            one.ping()
        other.hello(own_pidfd)
        assert other._hello == own_pidfd
        signal.pidfd_send_signal(one.pidfd, signal.SIGCONT)
        assert told(other).epoch == 3
        assert other._hello is None


@needs_namespaces
def test_last_words_of_an_init_that_never_answered(own_pidfd: int) -> None:
    with adopted_twice((2, 3)) as (one, _):
        one.hello(own_pidfd)
        told(one)
        one.signal(signal.SIGUSR1)
        wait_readable(one.line)
        pidfd = os.pidfd_open(one.init_host_pid)
        late = clone.Process.adopt(pidfd, one.init_host_pid, 1, 4)
        late.kill()
        wait_readable(pidfd)
        while not late.line_ended and late.receive() == [] and not late._unheard:
            wait_readable(late.line)
        words = late.last_words()
        assert isinstance(words[0], wire.Exited)
        assert words[0].exit[:2] == (os.CLD_EXITED, 3)
        assert late.last_words() == []
        late.close()


@needs_namespaces
def test_an_init_that_ends_meanwhile_is_gone(path: Path, own_pidfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with launched(plan_of(*shell("sleep 1000"), die=False)) as life:
        identity = lives.identify(life.process.pidfd, life.process.init_host_pid)

        def dies(pidfd: int, number: int) -> int:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            wait_readable(pidfd)
            return real(pidfd, number)

        real = _pidfd.getfd
        monkeypatch.setattr(_pidfd, "getfd", dies)
        with claimed(path, identity, own_pidfd) as (adopted, process):
            assert process is None
            assert [type(event).__name__ for event in adopted.events] == ["Gone"]
