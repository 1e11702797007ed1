"""The real nssup-init, spoken to by hand over its line: also what no supervisor of ours would ever say."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from launching import (
    ISOLATED,
    PACKAGE,
    TOKEN,
    ByHand,
    eventually,
    is_there,
    needs_namespaces,
    plan_of,
    shell,
    status_of,
    tree_of,
    wait_executed,
    wait_readable,
)

from nssup import record, wire
from nssup.clone import root_mount_id, sealed_memfd
from nssup.record import encode
from nssup.wire import Phase, Policy, Step, Type

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nssup.record import Plan

pytestmark = needs_namespaces

KILLED = (os.CLD_KILLED, signal.SIGKILL)
DIED = (os.CLD_EXITED, 1)  # what init says by itself when it must not go on
GONE = (os.CLD_EXITED, 0)


def simple(*argv: str) -> Plan:
    """Only a PID namespace, so that nothing but the line can go wrong."""
    return plan_of(*argv, namespaces={"pid"})


def python(code: str, *args: str) -> Plan:
    """Without site-packages, which would cost most of its time."""
    return simple(os.path.realpath(sys.executable), "-S", "-E", "-c", code, *args)


SLEEPER = simple("/bin/sleep", "1000")
TRUE = simple("/bin/true")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def leaving(canary: Path) -> Plan:
    """A program whose first act is to leave a canary."""
    return simple(*shell(': > "$0"', str(canary)))


# --- the record: well made, and not ----------------------------------------------------------------------------------


def field(kind: int, data: bytes, flags: int = record.MUST) -> bytes:
    return struct.pack("<HHI", kind, flags, len(data)) + data + bytes(-len(data) % 8)


def made(*fields: bytes, magic: int = record.RECORD_MAGIC, version: int = 1, length: int | None = None) -> bytes:
    body = b"".join(fields)
    return struct.pack("<IHHII", magic, version, 0, 16 + len(body) if length is None else length, 1) + body


def a_list(*items: bytes, count: int | None = None, offsets: tuple[int, ...] | None = None, end: int = 0) -> bytes:
    """A list as encode writes it, where nothing else is said."""
    start = 8 + 8 * (len(items) + 1)
    right = tuple(start + sum(len(item) + 1 for item in items[:at]) for at in range(len(items)))
    numbers = (*(right if offsets is None else offsets), end)
    return struct.pack(f"<II{len(numbers)}Q", len(items) if count is None else count, 0, *numbers) + b"".join(
        item + b"\0" for item in items
    )


TOKEN_FIELD = field(record.FIELD_TOKEN, TOKEN)
INIT = field(record.FIELD_OPTIONS, struct.pack("<I", record.OPTION_INIT))
ARGV = field(record.FIELD_ARGV, a_list(b"sh", b"-c", b"echo $0 $A; pwd; ulimit -n; umask"))
ENV = field(record.FIELD_ENV, a_list(b"A=b"))
EXEC = field(record.FIELD_EXEC, a_list(b"/no/such/sh", b"/bin/sh"))
GOOD = (TOKEN_FIELD, INIT, ARGV, ENV, EXEC)
LIST = a_list(b"one", b"two")
U64 = 2**64


def said_of(init: ByHand, encoded: bytes, fds: tuple[int, ...] = (), *, raw: bool = False) -> wire.Message:
    """What init says first about a record, while GO comes right behind it."""
    init.say(encoded if raw else wire.message(Type.RECORD, encoded), fds=fds)
    # It may have gone already.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        init.say_go()
    return init.last_words()[0]


def test_a_record_made_by_hand_runs() -> None:
    with ByHand() as init:
        init.say(wire.message(Type.RECORD, made(*GOOD)))
        init.say_go()
        assert [type(message) for message in init.last_words()] == [wire.Started, wire.Exited, wire.Empty]
        assert init.output().split()[:3] == [b"sh", b"b", b"/"]


@pytest.mark.parametrize("without", range(len(GOOD)))
def test_what_a_launch_cannot_do_without(without: int) -> None:
    with ByHand() as init:
        fields = [*GOOD[:without], *GOOD[without + 1 :]]
        if without == GOOD.index(INIT):
            assert type(said_of(init, made(*fields))) is wire.Started  # options are zero, then: it is PID 1 itself
            return
        assert said_of(init, made(*fields)) == wire.Failed(1, Step.RECORD, errno.EBADMSG)
        assert init.end() == (os.CLD_EXITED, 127)
        assert init.output() == b""


BROKEN = {
    "another magic": made(*GOOD, magic=0x4C53534E),
    "shorter than its head": made(*GOOD)[:15],
    "nothing": b"",
    "longer than itself": made(*GOOD, length=16 + len(b"".join(GOOD)) + 1),
    "length 0": made(*GOOD, length=0),
    "length of a part": made(*GOOD, length=40),
    "ends in a field's head": made(*GOOD, b"\x01\0\0\0"),
    "field longer than what is left": made(*GOOD, struct.pack("<HHI", 99, 0, 9) + bytes(8)),
    "field of 4 GiB": made(*GOOD, struct.pack("<HHI", 99, 0, 0xFFFFFFFF) + bytes(8)),
    "field of 4 GiB less its padding": made(*GOOD, struct.pack("<HHI", 99, 0, 0xFFFFFFF9) + bytes(8)),
    "short token": made(field(record.FIELD_TOKEN, TOKEN[:15]), *GOOD[1:]),
    "long token": made(field(record.FIELD_TOKEN, TOKEN + b"\0"), *GOOD[1:]),
    "options of 8 bytes": made(*GOOD, field(record.FIELD_OPTIONS, bytes(8))),
    "umask of 2 bytes": made(*GOOD, field(record.FIELD_UMASK, bytes(2))),
    "mount id of 4 bytes": made(*GOOD, field(record.FIELD_MOUNT_ID, bytes(4))),
    "directory without an end": made(*GOOD, field(record.FIELD_DIRECTORY, b"/tmp")),
    "empty directory field": made(*GOOD, field(record.FIELD_DIRECTORY, b"")),
    "hostname without an end": made(*GOOD, field(record.FIELD_HOSTNAME, b"x")),
    "identity too short": made(*GOOD, field(record.FIELD_IDENTITY, bytes(8))),
    "identity with groups that are not there": made(*GOOD, field(record.FIELD_IDENTITY, struct.pack("<III", 0, 0, 1))),
    "identity with 2**30 groups": made(*GOOD, field(record.FIELD_IDENTITY, struct.pack("<III", 0, 0, 2**30))),
    "half an rlimit": made(*GOOD, field(record.FIELD_RLIMITS, bytes(12))),
    "no words": made(TOKEN_FIELD, INIT, field(record.FIELD_ARGV, a_list()), ENV, EXEC),
    "no paths": made(TOKEN_FIELD, INIT, ARGV, ENV, field(record.FIELD_EXEC, a_list())),
} | {
    f"list: {name}": made(TOKEN_FIELD, INIT, field(record.FIELD_ARGV, data), ENV, EXEC)
    for name, data in {
        "empty field": b"",
        "no room for a count": LIST[:7],
        "no room for the offsets": LIST[:24],
        "no room for the last offset": LIST[:31],
        "cut in a string": LIST[:-1],
        "cut in the first string": LIST[:34],
        "last byte is no NUL": LIST[:-1] + b"x",
        "count too large": a_list(b"one", b"two", count=3),
        "count 2**32 - 1": a_list(b"one", b"two", count=2**32 - 1),
        "count that wraps round": a_list(b"one", b"two", count=2**29 - 1),
        "count too small": a_list(b"one", b"two", count=1),
        "offset into the count": a_list(b"one", b"two", offsets=(0, 36)),
        "offset into the offsets": a_list(b"one", b"two", offsets=(31, 36)),
        "offset to the end": a_list(b"one", b"two", offsets=(32, 40)),
        "offset behind the end": a_list(b"one", b"two", offsets=(32, 4096)),
        "offset of -1": a_list(b"one", b"two", offsets=(32, U64 - 1)),
        "offset that wraps into the list": a_list(b"one", b"two", offsets=(U64 - 32, 36)),
        "offsets without an end": a_list(b"one", b"two", end=32),
    }.items()
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_refused(name: str) -> None:
    with ByHand() as init:
        said = said_of(init, BROKEN[name])
        assert isinstance(said, wire.Failed)
        assert said[1:] == (Step.RECORD, errno.EBADMSG)
        assert init.output() == b""


@pytest.mark.parametrize(
    ("version", "said"),
    [(0, wire.Started), (1, wire.Started), (2, wire.Failed(0, Step.RECORD, errno.EPROTONOSUPPORT)), (65535, None)],
)
def test_record_versions(version: int, said: object) -> None:
    with ByHand() as init:
        heard = said_of(init, made(*GOOD, version=version))
        if said is wire.Started:
            assert type(heard) is wire.Started
        else:
            assert heard == wire.Failed(0, Step.RECORD, errno.EPROTONOSUPPORT)


@pytest.mark.parametrize("kind", [0, 12, 99, 65535])
def test_an_unknown_field_is_skipped_unless_it_must_be_understood(kind: int) -> None:
    with ByHand() as init:
        assert type(said_of(init, made(*GOOD, field(kind, b"whatever", flags=0), INIT))) is wire.Started
    with ByHand() as init:
        assert said_of(init, made(*GOOD, field(kind, b"whatever"))) == wire.Failed(1, Step.RECORD, errno.EOPNOTSUPP)
        assert init.output() == b""


def test_the_last_field_needs_no_padding() -> None:
    with ByHand() as init:
        whole = made(*GOOD, field(99, b"123", flags=0))
        short = made(*GOOD, field(99, b"123", flags=0)[:-5])
        assert len(whole) - len(short) == 5
        assert type(said_of(init, short)) is wire.Started


def memfd(data: bytes) -> int:
    return sealed_memfd("record", data)


@pytest.mark.parametrize("size", [100, 40_000, 1 << 20])
def test_a_record_in_a_memfd(size: int) -> None:
    """Of any size; one word of argv is as long as it has to be."""
    words = field(record.FIELD_ARGV, a_list(b"sh", b"-c", b'echo "${#0}"', b"x" * min(size, 100_000)))
    filler = field(99, bytes(size), flags=0)
    data = made(TOKEN_FIELD, INIT, words, ENV, EXEC, filler)
    fd = memfd(data)
    with ByHand() as init:
        assert type(said_of(init, wire.record_in_memfd(len(data)), (fd,), raw=True)) is wire.Started
        assert init.output() == b"%d\n" % min(size, 100_000)
    os.close(fd)


@pytest.mark.parametrize("size", [0, 1, 4096 * 100, wire.RECORD_MAX + 1, 2**63, 2**64 - 1])
def test_a_memfd_of_another_size_than_was_said(size: int) -> None:
    """Behind its end there is only SIGBUS."""
    fd = memfd(made(*GOOD))
    with ByHand() as init:
        said = said_of(init, wire.record_in_memfd(size), (fd,), raw=True)
        assert isinstance(said, wire.Failed)
        assert said.step == Step.RECORD
    os.close(fd)


def test_a_memfd_that_did_not_come_or_is_none(tmp_path: Path) -> None:
    with ByHand() as init:
        assert isinstance(said_of(init, wire.record_in_memfd(4096), raw=True), wire.Failed)
    read, write = os.pipe()
    with ByHand() as init:
        assert isinstance(said_of(init, wire.record_in_memfd(4096), (read,), raw=True), wire.Failed)
    os.close(read)
    os.close(write)


def program_of(init: ByHand) -> str:
    host_pid = init.hear(wire.Started).host_pid
    wait_executed(host_pid)
    return status_of(host_pid)["Name"]


def test_a_second_record_is_not_heard() -> None:
    with ByHand() as init:
        init.say_record(SLEEPER)
        init.say_record(TRUE)
        assert init.state(epoch=1).unknown == 1
        init.say_go()
        assert program_of(init) == "sleep"


# --- before GO: every doubt means die --------------------------------------------------------------------------------


def dies_without_running(init: ByHand, canary: Path) -> None:
    assert init.end() == DIED
    assert not canary.exists()


@pytest.mark.parametrize("token", [bytes(16), TOKEN[:-1] + b"\0", b"\xff" + TOKEN[1:], b""])
def test_a_wrong_token(token: bytes, canary: Path) -> None:
    with ByHand() as init:
        init.say_record(leaving(canary))
        init.say_go(token=token)
        dies_without_running(init, canary)


def test_go_without_a_record(canary: Path) -> None:
    with ByHand() as init:
        init.say_go(token=bytes(16))
        dies_without_running(init, canary)


def test_go_of_an_older_epoch_is_not_heard(canary: Path) -> None:
    with ByHand() as init:
        init.say_record(leaving(canary))
        init.state(epoch=5)
        init.say_go(epoch=4)
        state = init.state(epoch=5)
        assert (state.phase, state.unknown) == (Phase.WAITING, 1)
        assert not canary.exists()


def test_the_end_of_the_line(canary: Path) -> None:
    """init's own dup of our end hides it until then, so it is given up first."""
    with ByHand() as init:
        init.say_record(leaving(canary))
        init.say(wire.policy_change(1, Policy.DIE))
        init.socket.close()
        dies_without_running(init, canary)


@pytest.fixture
def supervisor() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def pidfd_of(process: subprocess.Popen[bytes]) -> int:
    return os.pidfd_open(process.pid)


@pytest.mark.parametrize("said", ["nothing", "record", "keep"])
def test_the_supervisors_death(supervisor: subprocess.Popen[bytes], said: str, canary: Path) -> None:
    """Also when a policy was said before GO."""
    pidfd = pidfd_of(supervisor)
    with ByHand(supervisor=pidfd) as init:
        if said != "nothing":
            init.say_record(leaving(canary))
        if said == "keep":
            init.say(wire.policy_change(1, Policy.KEEP))
            init.state(epoch=1)
        supervisor.kill()
        dies_without_running(init, canary)
    os.close(pidfd)


def test_a_go_that_was_said_counts_also_from_the_dead(supervisor: subprocess.Popen[bytes], canary: Path) -> None:
    """Under `keep`: under `die` the program would not live long enough to tell."""
    pidfd = pidfd_of(supervisor)
    with ByHand(supervisor=pidfd) as init:
        init.say_record(leaving(canary))
        init.state(epoch=1)
        init.stop()
        init.say_go(Policy.KEEP)
        supervisor.kill()
        wait_readable(pidfd)
        init.go_on()
        assert init.hear(wire.Exited).exit.status == 0
        assert canary.exists()
    os.close(pidfd)


def built(directory: Path, *defines: str) -> Path:
    """An nssup-init that differs from the real one as told."""
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    flags = "-Os -ffreestanding -fno-builtin -fno-stack-protector -fno-pie -static -nostdlib -nostartfiles"
    source, made = PACKAGE / "native" / "init.c", directory / "nssup-init"
    subprocess.run(["cc", *flags.split(), *defines, "-o", made, source], check=True)
    return made


@pytest.fixture(scope="session")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("impatient"), "-DNSSUP_GO_DEADLINE_MS=1")


@pytest.fixture(scope="session")
def holding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("holding"), "-DNSSUP_FAILPOINTS")


@pytest.mark.parametrize("with_record", [False, True])
def test_a_go_that_does_not_come(impatient: Path, with_record: bool, canary: Path) -> None:
    with ByHand(init=impatient) as init:
        if with_record:
            # It may be gone before we speak.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                init.say_record(leaving(canary))
        dies_without_running(init, canary)


# --- what is said on the line ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(plan: Plan, policy: Policy = Policy.KEEP, supervisor: int | None = None) -> Iterator[tuple[ByHand, int]]:
    """(a life by hand whose program runs, the program's host PID)."""
    with ByHand(supervisor=supervisor) as init:
        init.say_record(plan)
        init.say_go(policy)
        yield init, init.hear(wire.Started).host_pid


NOT_UNDERSTOOD = {
    "no header": b"NSSUP",
    "another magic": b"XX" + wire.ping(1)[2:],
    "longer than its datagram": wire.ping(1)[:4] + b"\xff\xff\xff\xff" + bytes(8),
    "a later version": wire.message(Type.PING, struct.pack("<II", 1, 0), wire.VERSION + 1),
    "an unknown type": wire.message(200, struct.pack("<II", 1, 0)),
    "an unknown type of a huge epoch": wire.message(31, b"\xff" * 8),
    "type 0": wire.message(0, b"\xff" * 8),
    "a new word of init's own": wire.message(Type.DONE, b"\xff" * 64),
    "init's own word": wire.message(Type.STATE, b"\xff" * 72),
    "an older epoch": wire.ping(0),
    "nothing but an older epoch": wire.message(Type.PING, b""),
    "an older epoch's signal": wire.signal(0, signal.SIGKILL, 0),
    "a signal that is none": wire.signal(1, 65, 0),
    "a negative signal": wire.signal(1, -9, 0),
    "an ACK of another generation": wire.ack(1, 2),
    "a policy that is none": wire.policy_change(1, 2),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_counted_and_skipped(name: str) -> None:
    strange = NOT_UNDERSTOOD[name]
    with running(SLEEPER) as (init, host_pid):
        init.say(strange)
        init.say(strange)
        assert init.state(epoch=1) == wire.State(1, 1, Phase.RUNNING, Policy.KEEP, 2, 0, 0, 2, wire.Exit())
        assert is_there(host_pid)


def test_what_is_understood_beside_what_is_not() -> None:
    with running(SLEEPER) as (init, _):
        strange = NOT_UNDERSTOOD["an unknown type"]
        init.say(strange, wire.ping(1), strange, wire.signal(1, signal.SIGTERM, 0), b"rest")
        assert init.hear(wire.State).unknown == 1
        assert init.hear(wire.Exited).exit[:2] == (os.CLD_KILLED, signal.SIGTERM)
        assert init.state(epoch=1).unknown == 3


def test_the_version_before_and_longer_payloads_are_understood() -> None:
    with running(SLEEPER) as (init, _):
        init.say(wire.message(Type.PING, struct.pack("<II", 1, 0) + b"a later field", wire.VERSION - 1))
        assert init.hear(wire.State).unknown == 0


@pytest.mark.parametrize("seed", range(3))
def test_garbage_is_survived(seed: int) -> None:
    bytes_of = random.Random(seed)
    with running(SLEEPER) as (init, host_pid):
        for _ in range(100):
            kind = bytes_of.choice((0, 4, 5, 13, 15, 17, 18, 31, 32, 63, 64, 255))
            noise = bytes_of.randbytes(bytes_of.randrange(1, 300))
            init.say(bytes_of.choice((noise, wire.message(kind, noise), wire.message(kind, noise)[:-3])))
            state = init.state(epoch=1)
        assert state.unknown >= 100
        assert is_there(host_pid)


def test_a_datagram_larger_than_any_is_one_unknown() -> None:
    with running(SLEEPER) as (init, _):
        init.say(wire.message(200, bytes(60_000)))
        assert init.state(epoch=1).unknown == 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_descriptors_that_nobody_asked_for_are_closed(count: int) -> None:
    read, write = os.pipe()
    with running(SLEEPER) as (init, _):
        before = len(os.listdir(f"/proc/{init.host_pid}/fd"))
        for _ in range(3):
            init.say(wire.ping(1), fds=[read] * count)
            init.hear(wire.State)
        init.state(epoch=1)  # answered when it is through with those before
        assert len(os.listdir(f"/proc/{init.host_pid}/fd")) == before
    os.close(read)
    os.close(write)


def test_what_init_keeps_open() -> None:
    """Line and its far end, supervisor, log; 0-2 are /dev/null. Nothing of the program's, and its own signals not where
    somebody would look for a descriptor that it was not given."""
    with running(SLEEPER) as (init, host_pid):
        init.state()
        there = f"/proc/{init.host_pid}/fd"
        found = {int(fd): os.readlink(f"{there}/{fd}").partition(":")[0] for fd in os.listdir(there)}
        assert max(found) >= wire.Fd.INIT_EXE
        assert found.pop(max(found)) == "anon_inode"  # its signals
        assert {found.pop(fd) for fd in range(3)} == {"/dev/null"}
        assert found == {3: "socket", 4: "socket", 5: "anon_inode", 6: "pipe"}
        eventually(lambda: sorted(os.listdir(f"/proc/{host_pid}/fd")) == ["0", "1", "2"])  # its loader is through


def test_a_newer_epoch_takes_over() -> None:
    with running(SLEEPER) as (init, host_pid):
        init.say(wire.hello(9, Policy.KEEP))
        assert init.hear(wire.State) == wire.State(1, 9, Phase.RUNNING, Policy.KEEP, 2, 0, 0, 0, wire.Exit())
        init.say(wire.signal(8, signal.SIGKILL, wire.SIGNAL_MAIN))
        assert init.state(epoch=9).unknown == 1
        assert is_there(host_pid)
        init.say(wire.signal(9, signal.SIGKILL, wire.SIGNAL_MAIN))
        assert init.hear(wire.Exited).exit[:2] == KILLED


def test_hello_brings_a_new_supervisor_to_watch(supervisor: subprocess.Popen[bytes]) -> None:
    pidfd = pidfd_of(supervisor)
    with running(SLEEPER) as (init, host_pid):
        init.say(wire.hello(2, Policy.DIE), fds=[pidfd])
        assert init.hear(wire.State).policy == Policy.DIE
        supervisor.kill()
        assert init.end() == DIED
        assert not is_there(host_pid)
    os.close(pidfd)


@pytest.mark.parametrize("policy", list(Policy))
def test_policy_decides_what_the_supervisors_death_means(policy: Policy, supervisor: subprocess.Popen[bytes]) -> None:
    pidfd = pidfd_of(supervisor)
    with running(SLEEPER, Policy(1 - policy), supervisor=pidfd) as (init, host_pid):
        far_end = [init.socket.fileno()] if policy == Policy.KEEP else []
        init.say(wire.policy_change(1, policy), fds=far_end)
        assert init.state(epoch=1).policy == policy
        supervisor.kill()
        wait_readable(pidfd)
        if policy == Policy.DIE:
            assert init.end() == DIED
            assert not is_there(host_pid)
        else:
            assert init.state(epoch=1).phase == Phase.RUNNING
            os.close(init.socket.detach())  # with nobody else at the line, its dup keeps it open
            os.kill(host_pid, signal.SIGTERM)
            eventually(lambda: not is_there(host_pid))
            eventually(lambda: status_of(init.host_pid)["State"].startswith("S"))
    os.close(pidfd)


def test_keep_needs_the_far_end_once_it_was_given_up() -> None:
    with running(SLEEPER, Policy.DIE) as (init, _):
        init.say(wire.policy_change(1, Policy.KEEP))
        state = init.state(epoch=1)
        assert (state.policy, state.unknown) == (Policy.DIE, 1)


def test_die_means_the_lines_end_too() -> None:
    with running(SLEEPER, Policy.DIE) as (init, host_pid):
        init.socket.close()
        assert init.end() == DIED
        assert not is_there(host_pid)


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [wire.SIGNAL_MAIN, 2])
def test_a_signal_to_the_program(target: int) -> None:
    with running(SLEEPER) as (init, _):
        init.say(wire.signal(1, signal.SIGUSR2, target))
        assert init.hear(wire.Exited).exit[:2] == (os.CLD_KILLED, signal.SIGUSR2)


def test_a_signal_to_everybody_inside() -> None:
    script = "sleep 1000 & echo; wait"
    with running(simple(*shell(script))) as (init, _):
        wait_readable(init.out)
        tree = tree_of(init.host_pid)
        assert len(tree) == 2
        init.say(wire.signal(1, signal.SIGTERM, wire.SIGNAL_ALL))
        assert init.hear(wire.Exited).exit[:2] == (os.CLD_KILLED, signal.SIGTERM)
        init.hear(wire.Empty)
        assert not any(map(is_there, tree))
        assert is_there(init.host_pid)


@pytest.mark.parametrize("target", [1, -2, -1000, 99999])
def test_signals_to_nobody_we_may_reach(target: int) -> None:
    with running(SLEEPER) as (init, host_pid):
        init.say(wire.signal(1, signal.SIGKILL, target))
        assert init.state(epoch=1).phase == Phase.RUNNING
        assert is_there(host_pid)


def test_a_signal_behind_go_is_for_the_program() -> None:
    """Said before the program is there, and not lost."""
    with ByHand() as init:
        init.stop()
        init.say_record(SLEEPER)
        init.say_go(Policy.KEEP)
        init.say(wire.signal(1, signal.SIGTERM, wire.SIGNAL_MAIN))
        init.go_on()
        init.hear(wire.Started)
        assert init.hear(wire.Exited).exit[:2] == (os.CLD_KILLED, signal.SIGTERM)


@pytest.mark.parametrize("when", ["before GO", "later"])
def test_a_signal_to_init_from_outside_is_for_the_program(when: str) -> None:
    with ByHand() as init:
        init.say_record(SLEEPER)
        init.state(epoch=1)
        if when == "before GO":
            signal.pidfd_send_signal(init.pidfd, signal.SIGTERM)
        init.say_go(Policy.KEEP)
        init.hear(wire.Started)
        if when == "later":
            signal.pidfd_send_signal(init.pidfd, signal.SIGTERM)
        assert init.hear(wire.Exited).exit[:2] == (os.CLD_KILLED, signal.SIGTERM)


def test_signals_to_init_from_inside_go_nowhere() -> None:
    script = "for n in 1 2 3 15 10 12 34 64; do kill -$n 1; done; kill -KILL 1; kill -STOP 1; echo still here"
    with running(simple(*shell(script))) as (init, _):
        assert init.hear(wire.Exited).exit[:2] == (os.CLD_EXITED, 0)
        assert init.state(epoch=1).phase == Phase.EMPTY
        assert init.output() == b"still here\n"


FLOOD = """
import os, signal, sys, threading
standard = [n for n in range(1, 32) if n not in (9, 19)]
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            for n in (1, 2, 3, 4, 5, 6, 7, 8, 10):
                os.kill(1, n)
os.write(1, b"x")
os._exit(7)
"""


def test_a_flood_of_signals_from_inside_hides_neither_the_end_nor_the_line() -> None:
    with running(python(FLOOD)) as (init, _):
        assert init.hear(wire.Exited).exit[:2] == (os.CLD_EXITED, 7)
        init.hear(wire.Empty)
        assert init.state(epoch=1).phase == Phase.EMPTY


def test_a_forged_signal_from_inside_is_not_taken_for_one_from_outside() -> None:
    """rt_sigqueueinfo(2) lets a process claim a sender's PID of 0, but not the code of kill(2)."""
    code = """
import ctypes, os, signal, struct
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"fooled"))
for code in (-1, -60):
    info = struct.pack("=iiiiii", signal.SIGUSR1, 0, code, 0, 0, 0).ljust(128, b"\\0")
    assert libc.syscall(129, 1, signal.SIGUSR1, info) == 0
for code in (0, 128, -6):
    info = struct.pack("=iiiiii", signal.SIGUSR1, 0, code, 0, 0, 0).ljust(128, b"\\0")
    assert libc.syscall(129, 1, signal.SIGUSR1, info) == -1
os.write(1, b"asked ")
while True: signal.pause()
"""
    if os.uname().machine != "x86_64":
        pytest.skip("knows the system call's number on x86_64 only")
    with running(python(code)) as (init, _):
        wait_readable(init.out)
        init.state(epoch=1)
        init.say(wire.signal(1, signal.SIGKILL, 0))
        init.hear(wire.Empty)
        init.say(wire.ack(1, 1))
        assert init.output() == b"asked "


# --- the end ---------------------------------------------------------------------------------------------------------


def test_under_keep_init_waits_for_its_ack() -> None:
    with running(simple(*shell("exit 3"))) as (init, _):
        assert init.hear(wire.Exited).exit[:2] == (os.CLD_EXITED, 3)
        init.hear(wire.Empty)
        state = init.state(epoch=1)
        assert (state.phase, state.exit.status) == (Phase.EMPTY, 3)
        init.say(wire.ack(1, 2))  # of another life
        init.say(wire.ack(0, 1))  # of another epoch
        assert init.state(epoch=1).unknown == 2
        init.say(wire.ack(1, 1))
        assert init.end() == GONE


def test_an_ack_before_the_end_is_none() -> None:
    with running(SLEEPER) as (init, host_pid):
        init.say(wire.ack(1, 1))
        assert init.state(epoch=1).phase == Phase.RUNNING
        assert is_there(host_pid)


def test_under_die_init_is_gone_without_an_ack() -> None:
    with running(simple(*shell("exit 3")), Policy.DIE) as (init, _):
        assert init.end() == GONE
        exited, empty = init.last_words()
        assert isinstance(exited, wire.Exited)
        assert exited.exit[:2] == (os.CLD_EXITED, 3)
        assert empty == wire.Empty(1)


@pytest.mark.parametrize("policy", list(Policy))
def test_a_failed_launch_ends_as_any_other(policy: Policy) -> None:
    with ByHand() as init:
        init.say_record(simple("/no/such/program"))
        init.say_go(policy)
        assert init.hear(wire.Failed) == wire.Failed(1, Step.EXEC, errno.ENOENT)
        init.hear(wire.Empty)
        if policy == Policy.KEEP:
            state = init.state(epoch=1)
            assert (state.phase, state.step, state.errno) == (Phase.FAILED, Step.EXEC, errno.ENOENT)
            init.say(wire.ack(1, 1))
        assert init.end()[0] == os.CLD_EXITED


def fill(init: ByHand) -> None:
    """Until the line takes no more from init: it answers, and nobody listens."""
    for _ in range(100):
        init.say(wire.ping(1) * 4)
        eventually(lambda: fcntl.ioctl(init.socket, termios.TIOCOUTQ, bytes(4)) == bytes(4))


def words_of(init: ByHand, last: type[wire.Message]) -> list[wire.Message]:
    init.hear(last)
    return [message for message, _ in init.heard if not isinstance(message, wire.State)]


@pytest.mark.parametrize("policy", list(Policy))
def test_a_full_line_loses_no_exit(policy: Policy) -> None:
    """What it refused is said when it has room."""
    with ByHand() as init:
        init.say_record(TRUE)
        fill(init)
        init.say_go(policy)
        assert init.output() == b""
        eventually(lambda: not tree_of(init.host_pid))
        assert [type(word) for word in words_of(init, wire.Empty)] == [wire.Exited]
        if policy == Policy.KEEP:
            init.say(wire.ack(1, 1))
        assert init.end() == GONE


def test_a_full_line_loses_no_start_and_no_failure() -> None:
    with ByHand() as init:
        init.say_record(SLEEPER)
        fill(init)
        init.say_go()
        assert program_of(init) == "sleep"
    with ByHand() as init:
        init.say_record(simple("/no/such/program"))
        fill(init)
        init.say_go()
        assert [type(word) for word in words_of(init, wire.Empty)] == [wire.Failed]


def test_orphans_are_reaped_while_the_program_runs() -> None:
    script = "i=0; while [ $i -lt 100 ]; do (sleep 0 &) ; i=$((i + 1)); done; echo; read line"
    with running(simple(*shell(script + " < /dev/zero"))) as (init, host_pid):
        wait_readable(init.out)
        eventually(lambda: tree_of(init.host_pid) == [host_pid])
        os.kill(host_pid, signal.SIGKILL)
        assert init.hear(wire.Exited).exit[:2] == KILLED


CODES = [0, 1, 2, 126, 127, 128, 137, 255]


@pytest.mark.parametrize("code", CODES)
def test_exit_codes_are_told_as_they_are(code: int) -> None:
    with running(simple(*shell(f"exit {code}")), Policy.DIE) as (init, _):
        assert init.hear(wire.Exited).exit[:2] == (os.CLD_EXITED, code)


def test_every_signal_that_ends_a_program_is_told_as_it_is() -> None:
    harmless = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
    stops = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
    default = (
        "import os, resource, signal, sys; n = int(sys.argv[1]); n in (13, 25) and signal.signal(n, signal.SIG_DFL)"
    )
    code = f"{default}; resource.setrlimit(4, (0, 0)); os.kill(os.getpid(), n); os._exit(99)"
    for signo in sorted({*range(1, 65)} - harmless - stops - {32, 33}):
        with running(python(code, str(signo)), Policy.DIE) as (init, _):
            assert init.hear(wire.Exited).exit[:2] == (os.CLD_KILLED, signo)


def test_the_exit_record() -> None:
    code = "import time\nx = bytearray(40 << 20)\nwhile time.process_time() < 0.05: pass\nraise SystemExit(5)"
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    with running(python(code), Policy.DIE) as (init, _):
        end = init.hear(wire.Exited).exit
    assert (end.code, end.status) == (os.CLD_EXITED, 5)
    assert 50_000 <= end.user_us + end.system_us < 5_000_000
    assert 40 << 20 <= end.max_rss_bytes < 1 << 30
    assert before < end.boottime_ns < time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def test_init_killed_from_outside_says_nothing() -> None:
    with running(SLEEPER) as (init, host_pid):
        init.kill()
        assert init.end() == KILLED
        assert not is_there(host_pid)
        assert init.last_words() == []


def test_a_stopped_init_can_be_killed() -> None:
    with running(SLEEPER) as (init, host_pid):
        init.stop()
        init.kill()
        assert init.end() == KILLED
        assert not is_there(host_pid)


def test_a_program_that_takes_inits_right_to_poll_away_ends_its_own_life() -> None:
    """prlimit(2) asks only for the same user. What must not be is an init that spins, deaf."""
    code = "import os, resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0)); os.kill(1, 34); os.read(0, 1)"
    code += "; import signal; signal.pause()"
    with running(python(code)) as (init, _):
        assert init.end() == DIED


# --- steps -----------------------------------------------------------------------------------------------------------

HOLDABLE = [step for step in Step if step >= Step.PID_ONE and step not in (Step.EXEC, Step.CLONE_WORKER)]


@pytest.mark.parametrize("step", HOLDABLE, ids=[step.name for step in HOLDABLE])
@pytest.mark.parametrize("with_init", [True, False])
def test_a_kill_at_any_step_leaves_nothing(step: Step, with_init: bool, holding: Path, canary: Path) -> None:
    with ByHand("mount", "uts", "ipc", init=holding) as init:
        options = record.options_of(plan_of("/bin/true")) & ~record.OPTION_INIT | step << 24
        options |= record.OPTION_INIT if with_init else 0
        plan = leaving(canary)
        encoded = encode(plan, TOKEN, root_mount_id())
        right = field(record.FIELD_OPTIONS, struct.pack("<I", record.options_of(plan)))
        assert right in encoded
        encoded = encoded.replace(right, field(record.FIELD_OPTIONS, struct.pack("<I", options)))
        init.say(wire.record_inline(encoded))
        init.say_go()
        assert init.hear(wire.State).step == step
        tree = tree_of(init.host_pid)
        assert len(tree) == (with_init and step >= Step.SESSION)
        init.kill()
        assert init.end() == KILLED
        assert not any(map(is_there, tree))
        assert not canary.exists()


def test_a_mount_needs_a_mount_namespace_of_its_own() -> None:
    """Whatever the record claims, and so the host's /proc is safe from our own mistakes."""
    before = Path("/proc/self/mountinfo").read_bytes()
    asked = plan_of("/bin/true")
    for plan, mount_id in (
        (asked._replace(namespaces=frozenset({"pid"}), proc=True), root_mount_id()),
        (asked, root_mount_id()),
        (asked, 0),
    ):
        with ByHand() as init:  # without a mount namespace
            init.say(wire.record_inline(encode(plan, TOKEN, mount_id)))
            init.say_go()
            assert init.hear(wire.Failed) == wire.Failed(1, Step.PROPAGATION, errno.EPERM)
    with ByHand("mount") as init:  # with one, and not told which it must not be
        init.say(wire.record_inline(encode(asked, TOKEN, 0)))
        init.say_go()
        assert init.hear(wire.Failed) == wire.Failed(1, Step.PROPAGATION, errno.EPERM)
    assert Path("/proc/self/mountinfo").read_bytes() == before
    assert status_of("self")["Pid"] == str(os.getpid())


# --- started by somebody else ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [(), (0,), (0, 1, 2)])
def test_run_by_hand_it_ends(closed: tuple[int, ...]) -> None:
    """With no line and not as PID 1, with and without descriptors 0-2, with any arguments."""
    redirections = " ".join(f"{fd}>&-" for fd in closed)
    for args in ([], ["x"] * 1000):
        done = subprocess.run(["sh", "-c", f'exec "$0" "$@" {redirections}', PACKAGE / "nssup-init", *args], timeout=20)
        assert done.returncode == 1


def test_run_as_the_program_of_a_life_it_ends() -> None:
    """/proc/self/exe of the process that execs it is nssup-init itself."""
    with ByHand("mount", "uts", "ipc") as init:
        init.say_record(plan_of("/proc/self/exe", namespaces=ISOLATED))
        init.say_go()
        assert init.hear(wire.Exited).exit[:2] == (os.CLD_EXITED, 1)
