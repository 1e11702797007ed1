"""What the version before wrote is read, what it reads is said, and a later one's is refused by name: version1.py."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import msgspec
import pytest
import version1
from launching import PACKAGE, ByHand, needs_namespaces, wait_readable

from nssup import adopt, handover, lives, record, reexec, staging, wire
from nssup.errors import ControlError
from nssup.events import State
from nssup.lines import Record, content

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GOLDEN = version1.golden()
EXIT = wire.Exit(2, 11, 1234, 5678, 4096, 123456789)
NOTIFIED = wire.Notified(
    wire.Flag.READY | wire.Flag.RELOADING,
    *(9, 2, 1, 3, 4, 6, 1, 17, 5, 123456789, 123456790, 2000000, 123456791, 123456792),
    status=b"busy",
)
MEANT = {
    "STATE": wire.State(3, 7, wire.Phase.EXITED, wire.Policy.DIE, 2, 0, 0, 5, EXIT, NOTIFIED),
    "STARTED": wire.Started(3, 2, 4711),
    "FAILED": wire.Failed(3, wire.Step.MOUNT_PROC, 1),
    "EXITED": wire.Exited(3, EXIT),
    "EMPTY": wire.Empty(3),
    "NOTIFY": wire.Notify(3, NOTIFIED),
}
PLAN = record.Plan(
    generation=3,
    argv=(b"sh", b"-c", b"echo $A"),
    env=(b"A=b",),
    candidates=(b"/bin/sh",),
    namespaces=frozenset({"pid"}),
    proc=False,
    umask=0o077,
    rlimits=((7, 64, 128),),
)
SLOT = record.Slot(
    record.SLOT_RELEASED,
    *(41, bytes(range(16, 32)), 7, 3, "web/3", 4026531836, 0, 3141, 5150, b"a handle", b"spechash", version1.BODY),
)
LIFE = reexec.Life("web/3", 3, 5150, True, 11, 12, 13, -1, (40, 0))
LEGACY = reexec.Inheritance(
    version=1, host_pid=4242, from_version="0.1.0", epoch=7, listener=9, locks=(7, 8), lives=(LIFE,), soft_limit=1024
)


def test_the_encoder_has_not_changed() -> None:
    assert {name: version1.squeezed(data) for name, data in version1.everything().items()} == GOLDEN


def test_it_knows_every_word_of_its_time() -> None:
    """A word that came later is no matter: who does not know it skips it."""
    first = range(1, 15)
    known = {data[3] for data in (version1.spoken() | version1.heard()).values()}
    assert {kind.value for kind in wire.Type if kind in first} - known == {wire.Type.SPAWN}


# --- as long as it is what is written --------------------------------------------------------------------------------

writes_it = pytest.mark.skipif(
    (wire.SPOKEN, record.RECORD_VERSION, record.SLOT_VERSION, handover.VERSION) != (1, 1, 1, 1),
    reason="this nssup writes a later version",
)


@writes_it
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("HELLO", wire.hello(7, wire.Policy.DIE)),
        ("RECORD", wire.record_inline(record.encode(PLAN, version1.TOKEN, 27))),
        ("RECORD in a memfd", wire.record_in_memfd(40000)),
        ("GO", wire.go(7, wire.Policy.KEEP, version1.TOKEN)),
        ("SIGNAL", wire.signal(7, 15, wire.SIGNAL_MAIN, 1)),
        ("POLICY", wire.policy_change(7, wire.Policy.DIE)),
        ("ACK", wire.ack(7, 3)),
        ("PING", wire.ping(7)),
        ("launch record", record.encode(PLAN, version1.TOKEN, 27)),
        ("life slot", record.encode_slot(SLOT)),
    ],
)
def test_what_is_said_and_noted(name: str, said: bytes) -> None:
    assert version1.squeezed(said) == GOLDEN[name]


@pytest.fixture
def stage() -> Iterator[staging.Staging]:
    made = staging.Staging.create("web", handover.Layout(version1.STREAMS, version1.HALF, version1.ENTRIES))
    yield made
    made.close()


@writes_it
def test_what_is_staged(stage: staging.Staging) -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    os.write(write, version1.STAGED)
    assert stage.attach(3, 3, 0, 5151, 2) == 0
    stage.take(0, read, 65536, version1.WALL)
    memory, position = version1.staging()
    assert version1.squeezed(os.pread(stage.fd, len(memory) + 1, 0)) == version1.squeezed(memory)
    assert os.lseek(stage.fd, 0, os.SEEK_CUR) == position
    os.close(read)
    os.close(write)


def test_what_is_left_to_the_next_code_in_this_process() -> None:
    """Fields that are not in it came later, and have what they are when nobody says them."""
    written = msgspec.json.decode(msgspec.json.encode(LEGACY))
    there = msgspec.json.decode(version1.inheritance())
    assert there.items() <= written.items()


# --- read ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEANT)
def test_what_an_init_says(name: str) -> None:
    assert wire.decode(version1.heard()[name], 4711) == ([MEANT[name]], 0)


def versioned(data: bytes, version: int) -> bytes:
    return data[:2] + bytes([version]) + data[3:]


@pytest.mark.parametrize("name", MEANT)
def test_the_neighbours_of_a_version_of_the_line(name: str) -> None:
    said = version1.heard()[name]
    assert wire.decode(versioned(said, wire.VERSION - 1), 4711) == ([MEANT[name]], 0)
    assert wire.decode(versioned(said, wire.VERSION + 1), 4711) == ([], 1)
    assert wire.decode(said, 4711, version=2) == ([MEANT[name]], 0)  # as the next one will
    assert wire.decode(said, 4711, version=3) == ([], 1)


def read_slot(path: Path, data: bytes) -> lives.Found:
    path.write_bytes(data + bytes(record.SLOT_SIZE))
    file = lives.Lives(path, 9)
    try:
        return file.read()
    finally:
        file.close()


@pytest.mark.parametrize("version", [record.SLOT_VERSION - 1, 1])
def test_notes(version: int, tmp_path: Path) -> None:
    assert record.decode_slot(version1.slot(version)) == SLOT
    worker = adopt.restore("web/3", SLOT.body)
    assert worker is not None
    assert (worker.state, worker.generation, worker.host_pid) == (State.RUNNING, 3, 5151)
    assert read_slot(tmp_path / "lives", version1.slot(version)).elsewhere == [(SLOT, "reboot")]


def test_notes_of_a_later_version(tmp_path: Path) -> None:
    assert record.decode_slot(version1.slot(record.SLOT_VERSION + 1)) is None
    with pytest.raises(ControlError, match="written by a later version of nssup"):
        read_slot(tmp_path / "lives", version1.slot(record.SLOT_VERSION + 1))


def memfd(version: int) -> int:
    memory, position = version1.staging(version)
    fd = os.memfd_create("version1", os.MFD_ALLOW_SEALING)
    os.write(fd, memory)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    os.lseek(fd, position, os.SEEK_SET)
    return fd


@pytest.mark.parametrize("version", [handover.VERSION - 1, 1])
def test_staged_output(version: int) -> None:
    stage = staging.Staging(memfd(version))
    (stream,) = stage.streams.values()
    assert (stage.pool, stream.state[:5]) == ("web", (3, 3, 0, 5151, 2))
    batch = stage.seal()
    assert batch is not None
    chunks = b"".join(chunk.records for chunk in batch.records())
    records = [msgspec.json.decode(line, type=Record) for line in chunks.splitlines()]
    assert b"".join(map(content, records)) == b"one\ntwo\n"
    stage.close()


def test_staged_output_of_a_later_version() -> None:
    fd = memfd(handover.VERSION + 1)
    with pytest.raises(handover.StagingError, match="of a version that this nssup does not know"):
        staging.Staging(fd)
    os.close(fd)


def inherit(data: bytes) -> reexec.Inheritance | None:
    fd = os.memfd_create("inheritance")
    os.write(fd, data)
    try:
        return reexec.take({reexec.VARIABLE: str(fd)})
    finally:
        if os.path.exists(f"/proc/self/fd/{fd}"):
            os.close(fd)


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the golden bytes speak of are nobody's here."""
    monkeypatch.setattr(os, "set_inheritable", lambda *_: None)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("version", [reexec.VERSION - 1, 1])
def test_an_inheritance(version: int) -> None:
    found = inherit(version1.inheritance(os.getpid(), version, of_a_later_version=[1, 2]))
    assert found == msgspec.structs.replace(LEGACY, host_pid=os.getpid(), version=version)


@pytest.mark.usefixtures("descriptors")
def test_an_inheritance_of_a_later_version() -> None:
    with pytest.raises(ValueError, match="of another version"):
        inherit(version1.inheritance(os.getpid(), reexec.VERSION + 1))


# --- with an init ----------------------------------------------------------------------------------------------------


def later_init(directory: Path) -> Path:
    """nssup-init as the next version will build it: it understands one version more, and says what this one says."""
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    native = directory / "native"
    shutil.copytree(PACKAGE / "native", native)
    header = native / "wire.h"
    text = header.read_text()
    for name, version in (("WIRE_VERSION", wire.VERSION), ("RECORD_VERSION", record.RECORD_VERSION)):
        assert f"{name} = {version}" in text
        text = text.replace(f"{name} = {version}", f"{name} = {version + 1}")
    header.write_text(text)
    flags = "-Os -ffreestanding -fno-builtin -fno-stack-protector -fno-pie -static -nostdlib -nostartfiles"
    subprocess.run(["cc", *flags.split(), "-o", directory / "nssup-init", native / "init.c"], check=True)
    return directory / "nssup-init"


@needs_namespaces
@pytest.mark.parametrize("later", [False, True])
def test_an_init_hears_a_supervisor_of_that_version(later: bool, tmp_path: Path) -> None:
    """Its own, and one of the next: both say what a supervisor of that version understands."""
    with ByHand(init=later_init(tmp_path) if later else None) as init:
        words = version1.message
        init.say(words(2, version1.launch_record(argv=(b"sh", b"-c", b"echo $A; ulimit -n; umask; exec sleep 1000"))))
        init.say(words(3, struct.pack("<II16s", 7, 0, version1.TOKEN)))
        started = init.hear(wire.Started)
        assert (started.generation, started.ns_pid) == (3, 2)
        init.say(words(1, struct.pack("<II", 8, 0)))
        state = init.hear(wire.State)
        assert (state.epoch, state.phase, state.unknown) == (8, wire.Phase.RUNNING, 0)
        out = b""
        while not out.endswith(b"0077\n"):
            wait_readable(init.out)
            out += os.read(init.out, 100)
        assert out == b"b\n64\n0077\n"
        init.say(words(7, struct.pack("<IiiI", 8, 15, 0, 1)))
        assert init.hear(wire.Exited).exit[:2] == (os.CLD_KILLED, 15)
        init.hear(wire.Empty)
        init.say(words(14, struct.pack("<II", 8, 0), version=wire.VERSION - 1 + later))
        assert init.hear(wire.State).phase == wire.Phase.EMPTY
        init.say(words(12, struct.pack("<II", 8, 3)))
        assert init.end() == (os.CLD_EXITED, 0)


@needs_namespaces
def test_an_init_counts_what_a_later_version_says() -> None:
    with ByHand() as init:
        init.say(version1.message(2, version1.launch_record(argv=(b"sh", b"-c", b"exec sleep 1000"))))
        init.say(version1.message(3, struct.pack("<II16s", 7, 0, version1.TOKEN)))
        init.hear(wire.Started)
        for kind in (1, 7, 9, 12, 14):
            init.say(version1.message(kind, struct.pack("<II", 2**31, 9) + bytes(8), version=wire.VERSION + 1))
        state = init.state(epoch=7)
        assert (state.epoch, state.phase, state.unknown) == (7, wire.Phase.RUNNING, 5)


@needs_namespaces
def test_a_record_of_a_later_version_is_refused_by_name() -> None:
    with ByHand() as init:
        init.say(version1.message(2, version1.launch_record(version=record.RECORD_VERSION + 1)))
        assert wire.failure_reason(*init.hear(wire.Failed)[1:]) == "setup-failed:record:EPROTONOSUPPORT"
