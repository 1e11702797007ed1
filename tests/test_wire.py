"""Golden bytes of every message, the same numbers and sizes as wire.h, and no byte that decode would choke on."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nssup import record, wire
from nssup.wire import (
    VERSION,
    Done,
    Empty,
    Exit,
    Exited,
    Failed,
    Flag,
    Notified,
    Notify,
    Phase,
    Policy,
    Started,
    State,
    Step,
    Type,
    decode,
    failure_reason,
    message,
)

if TYPE_CHECKING:
    from enum import Enum

HEADER = Path(wire.__file__).with_name("native") / "wire.h"
TOKEN = bytes(range(16))
SENDER = 4711

# --- golden bytes ---------------------------------------------------------------------------------------------------

SPOKEN = {
    "hello": (wire.hello(7, Policy.DIE), "4e53010108000000 07000000 01000000"),
    "record inline": (wire.record_inline(b"abc"), "4e53010203000000 6162630000000000"),
    "record in a memfd": (wire.record_in_memfd(40000), "4e53010208000000 409c000000000000"),
    "go": (wire.go(7, Policy.KEEP, TOKEN), "4e53010318000000 07000000 00000000 000102030405060708090a0b0c0d0e0f"),
    "signal the program": (
        wire.signal(7, 15, wire.SIGNAL_MAIN),
        "4e53010710000000 07000000 0f000000 00000000 00000000",
    ),
    "signal all": (wire.signal(7, 9, wire.SIGNAL_ALL), "4e53010710000000 07000000 09000000 ffffffff 00000000"),
    "spawn": (
        wire.spawn(7, 5, b"A" * 9, b"B" * 8, timeout_ms=1500, stop_steps=1),
        "4e53010830000000 07000000 05000000 01000000 dc050000 09000000 08000000"
        "414141414141414141 00000000000000 4242424242424242",
    ),
    "cancel": (wire.cancel(7, 5), "4e53011008000000 07000000 05000000"),
    "policy": (wire.policy_change(7, Policy.DIE), "4e53010908000000 07000000 01000000"),
    "ack": (wire.ack(7, 3), "4e53010c08000000 07000000 03000000"),
    "socket": (wire.socket(), "4e53010f00000000"),
    "ping": (wire.ping(7), "4e53010e08000000 07000000 00000000"),
}

EXIT = "02000000 0b000000 d204000000000000 2e16000000000000 0010000000000000 15cd5b0700000000"
EXIT_VALUE = Exit(2, 11, 1234, 5678, 4096, 123456789)
NOTIFIED = (
    "05000000 09000000 02000000 01000000 03000000 04000000 06000000 01000000 11000000 05000000"
    "15cd5b0700000000 16cd5b0700000000 80841e0000000000 17cd5b0700000000 18cd5b0700000000"
    "05000000 00000000" + b"busy\xff".ljust(120, b"\0").hex() + "18cd5b0700000000"
)
NOTIFIED_VALUE = Notified(
    Flag.READY | Flag.RELOADING,
    *(9, 2, 1),
    *(3, 4, 6, 1),
    *(17, 5),
    *(123456789, 123456790, 2000000, 123456791, 123456792),
    b"busy\xff",
    123456792,
)
STATE = "03000000 07000000 04000000 01000000 02000000 00000000 00000000 05000000 " + EXIT
STATE_VALUE = State(3, 7, Phase.EXITED, Policy.DIE, 2, 0, 0, 5, EXIT_VALUE)
HEARD = {
    "state": ("4e53010420010000 " + STATE + NOTIFIED, STATE_VALUE._replace(notified=NOTIFIED_VALUE)),
    "notify": ("4e53010de0000000 03000000 00000000 " + NOTIFIED, Notify(3, NOTIFIED_VALUE)),
    "started": ("4e53010508000000 03000000 02000000", Started(3, 2, SENDER)),
    "failed": ("4e53010610000000 03000000 14000000 01000000 00000000", Failed(3, Step.MOUNT_PROC, errno.EPERM)),
    "exited": ("4e53010a30000000 03000000 00000000 " + EXIT, Exited(3, EXIT_VALUE)),
    "done": (
        "4e53011140000000 03000000 07000000 05000000 01000000 2b000000 02000000 " + EXIT,
        Done(3, 7, 5, 1, Step.EXEC, errno.ENOENT, EXIT_VALUE),
    ),
    "empty": ("4e53010b08000000 03000000 00000000", Empty(3)),
}
ALL_HEARD = b"".join(bytes.fromhex(data) for data, _ in HEARD.values())


@pytest.mark.parametrize("name", SPOKEN)
def test_what_the_supervisor_says(name: str) -> None:
    said, golden = SPOKEN[name]
    assert said.hex() == golden.replace(" ", "")


@pytest.mark.parametrize("name", HEARD)
def test_what_init_says(name: str) -> None:
    golden, meant = HEARD[name]
    assert decode(bytes.fromhex(golden), SENDER) == ([meant], 0)


def test_a_datagram_holds_several_messages() -> None:
    assert decode(ALL_HEARD, SENDER) == ([meant for _, meant in HEARD.values()], 0)


def test_only_started_is_from_somebody() -> None:
    assert decode(bytes.fromhex(HEARD["started"][0]), 0) == ([Started(3, 2, 0)], 0)


@pytest.mark.parametrize("length", range(17))
def test_messages_are_padded_to_eight(length: int) -> None:
    said = message(Type.RECORD, b"x" * length)
    assert len(said) % 8 == 0
    assert said[8:].rstrip(b"\0") == b"x" * length
    assert struct.unpack_from("<I", said, 4) == (length,)


# --- versions, lengths, the unknown ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spoken", [VERSION - 1, VERSION])
def test_this_version_and_the_one_before_are_understood(spoken: int) -> None:
    assert decode(message(Type.EMPTY, struct.pack("<II", 3, 0), spoken), SENDER) == ([Empty(3)], 0)


@pytest.mark.parametrize("spoken", [VERSION + 1, VERSION + 7, 255])
def test_later_versions_are_skipped_and_counted(spoken: int) -> None:
    strange = message(Type.EMPTY, struct.pack("<II", 3, 0), spoken)
    assert decode(strange + ALL_HEARD + strange, SENDER) == ([meant for _, meant in HEARD.values()], 2)


def test_two_versions_back_is_too_old() -> None:
    old = message(Type.EMPTY, struct.pack("<II", 3, 0), 3)
    assert decode(old, SENDER, version=4) == ([Empty(3)], 0)
    assert decode(old, SENDER, version=5) == ([], 1)


@pytest.mark.parametrize(
    "kind",
    [
        0,
        Type.HELLO,
        Type.RECORD,
        Type.GO,
        Type.SIGNAL,
        Type.SPAWN,
        Type.POLICY,
        Type.ACK,
        Type.PING,
        15,
        255,
    ],
)
def test_unknown_types_and_our_own_words_are_skipped_and_counted(kind: int) -> None:
    strange = message(kind, b"whatever it may hold")
    assert decode(strange + message(Type.EMPTY, bytes(8)) + strange, SENDER) == ([Empty(0)], 2)


def test_the_state_of_who_has_nothing_to_notify() -> None:
    """As it was before there was anything: the version before says the same."""
    assert decode(bytes.fromhex("4e53010448000000 " + STATE), SENDER) == ([STATE_VALUE], 0)
    assert STATE_VALUE.notified == Notified()


@pytest.mark.parametrize(("length", "status"), [(0, b""), (4, b"busy"), (121, b"busy\xff"), (2**32 - 1, b"busy\xff")])
def test_no_status_is_longer_than_there_is_room(length: int, status: bytes) -> None:
    golden = HEARD["notify"][0].replace("05000000 00000000", struct.pack("<II", length, 0).hex())
    said, unknown = decode(bytes.fromhex(golden), SENDER)
    assert unknown == 0
    assert isinstance(said[0], Notify)
    assert len(said[0].notified.status) <= wire.STATUS_SIZE
    assert said[0].notified.status.rstrip(b"\0") == status


def test_a_shorter_payload_ends_in_zeroes() -> None:
    assert decode(message(Type.FAILED, struct.pack("<II", 3, 20)), SENDER) == ([Failed(3, 20, 0)], 0)
    assert decode(message(Type.FAILED, b"\x03"), SENDER) == ([Failed(3, 0, 0)], 0)
    assert [decode(message(kind, b""), SENDER)[0][0] for kind in (Type.STATE, Type.EXITED, Type.NOTIFY)] == [
        State(0, 0, 0, 0, 0, 0, 0, 0, Exit()),
        Exited(0, Exit()),
        Notify(0, Notified()),
    ]
    assert [decode(message(kind, b""), SENDER)[0][0] for kind in (Type.STARTED, Type.EMPTY)] == [
        Started(0, 0, SENDER),
        Empty(0),
    ]


@pytest.mark.parametrize("name", HEARD)
def test_a_longer_payload_is_cut(name: str) -> None:
    golden, meant = HEARD[name]
    payload = bytes.fromhex(golden)[8:] + b"a field of a later version"
    kind = Type[name.upper()]
    assert decode(message(kind, payload) + message(Type.EMPTY, bytes(8)), SENDER) == ([meant, Empty(0)], 0)


@pytest.mark.parametrize(
    "broken",
    [
        b"NS",
        b"NS\x01\x0b\0\0\0",
        b"XX\x01\x0b\x08\0\0\0" + bytes(8),
        b"NS\x01\x0b\x09\0\0\0" + bytes(8),
        b"NS\x01\x0b\xff\xff\xff\xff" + bytes(8),
    ],
)
def test_what_follows_a_broken_header_is_one_unknown(broken: bytes) -> None:
    assert decode(broken, SENDER) == ([], 1)
    assert decode(ALL_HEARD + broken, SENDER) == ([meant for _, meant in HEARD.values()], 1)


def test_padding_may_be_missing_at_the_end() -> None:
    assert decode(message(Type.EMPTY, b"\x03")[:9], SENDER) == ([Empty(3)], 0)


MESSAGES = st.builds(message, st.integers(0, 255), st.binary(max_size=100), st.integers(0, 255))


@given(st.binary(max_size=300) | st.builds(lambda *parts: b"".join(parts), MESSAGES, MESSAGES, st.binary(max_size=20)))
@example(b"")
@example(ALL_HEARD)
@example(b"NS\x01\x0b\xff\xff\xff\xff")
def test_decode_never_raises(datagram: bytes) -> None:
    found, unknown = decode(datagram, SENDER)
    assert len(found) + unknown <= len(datagram) // 8 + 1
    assert bool(found or unknown) == bool(datagram)


@given(st.lists(MESSAGES, max_size=5), st.integers(0, 600))
def test_a_cut_datagram_loses_its_end_only(messages: list[bytes], cut: int) -> None:
    whole = b"".join(messages)
    found, _ = decode(whole[:cut], SENDER)
    # Padding that was cut off may have been all that was missing, so the last one need not be of the same length.
    assert found == decode(whole, SENDER)[0][: len(found)]


@pytest.mark.parametrize(
    ("step", "number", "reason"),
    [
        (Step.EXEC, errno.ENOENT, "exec-failed:ENOENT"),
        (Step.MOUNT_PROC, errno.EPERM, "setup-failed:mount_proc:EPERM"),
        (Step.CLONE_WORKER, 99999, "setup-failed:clone_worker:99999"),
        (4242, errno.EIO, "setup-failed:4242:EIO"),
        (4242, -1, "setup-failed:4242:-1"),
    ],
)
def test_reasons(step: int, number: int, reason: str) -> None:
    assert failure_reason(step, number) == reason


# --- wire.h ---------------------------------------------------------------------------------------------------------


def without_comments(source: str) -> str:
    return re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)


SOURCE = without_comments(HEADER.read_text())


def constants() -> dict[str, int]:
    found: dict[str, int] = {}
    for body in re.findall(r"\benum\b[^{;]*\{(.*?)\}", SOURCE, re.DOTALL):
        for name, value in re.findall(r"(\w+)\s*=\s*(-?(?:0x)?[0-9a-fA-F]+)", body):
            found[name] = int(value, 0)
    return found


CONSTANTS = constants()
SIZES = {"uint8_t": 1, "uint16_t": 2, "uint32_t": 4, "int32_t": 4, "uint64_t": 8}
ENUMS: dict[str, type[Enum]] = {
    "FD_": wire.Fd,
    "WIRE_": wire.Type,
    "POLICY_": wire.Policy,
    "PHASE_": wire.Phase,
    "STEP_": wire.Step,
    "NOTIFIED_": wire.Flag,
}
NOT_A_TYPE = {"WIRE_MAGIC", "WIRE_VERSION", "WIRE_SPOKEN"}
# Under another name here, or of no use to this side.
ONLY_THERE = {"GO_DEADLINE_MS", "FIELD_MUST", "RECORD_INLINE_MAX", "RECORD_MAX", *NOT_A_TYPE}
LAYOUTS = {
    "wire_header": wire._HEADER,
    "wire_hello": wire._TWO,
    "wire_record": wire._SIZE,
    "wire_go": wire._GO,
    "wire_signal": wire._SIGNAL,
    "wire_policy_change": wire._TWO,
    "wire_ack": wire._TWO,
    "wire_ping": wire._TWO,
    "wire_started": wire._STARTED,
    "wire_failed": wire._FAILED,
    "wire_exit": struct.Struct("<iiQQQQ"),
    "wire_exited": wire._EXITED,
    "wire_empty": wire._TWO,
    "wire_spawn": wire._SPAWN,
    "wire_cancel": wire._TWO,
    "wire_done": wire._DONE,
    "wire_notified": wire._NOTIFIED,
    "wire_notify": wire._NOTIFY,
    "wire_state": wire._STATE,
    "record_head": record._HEAD,
    "record_field": record._FIELD,
    "record_rlimit": record._RLIMIT,
    "record_notify": record._NOTIFY,
    "record_sockets": record._SOCKETS,
}


def fields_of(name: str) -> list[tuple[str, int]]:
    """(type, how many) of each field of a struct in wire.h."""
    body = re.search(rf"struct {name} \{{(.*?)\}};", SOURCE, re.DOTALL)
    assert body, name
    return [
        (kind, CONSTANTS[count] if count else 1)
        for kind, count in re.findall(r"((?:struct )?\w+) \w+(?:\[(\w+)\])?;", body[1])
    ]


def size_of(name: str) -> int:
    """With what the compiler would add: there must be no holes, so a field that is not aligned is an error."""
    at = widest = 0
    for kind, count in fields_of(name):
        struct_name = kind.removeprefix("struct ")
        size = SIZES.get(kind) or size_of(struct_name)
        align = SIZES.get(kind) or 8
        assert at % align == 0, f"{name}: a hole before {kind}"
        at, widest = at + size * count, max(widest, align)
    assert at % widest == 0, f"{name}: a hole at its end"
    return at


def codes_of(name: str) -> str:
    letters = {"uint8_t": "B", "uint16_t": "H", "uint32_t": "I", "int32_t": "i", "uint64_t": "Q"}
    return "".join(
        f"{count}s" if kind == "uint8_t" and count > 1 else letters.get(kind) or codes_of(kind.removeprefix("struct "))
        for kind, count in fields_of(name)
    )


def test_every_struct_of_the_header_has_a_twin() -> None:
    assert set(re.findall(r"struct (\w+) \{", SOURCE)) == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sizes_and_fields_are_those_of_the_header(name: str) -> None:
    assert LAYOUTS[name].size == size_of(name)
    assert LAYOUTS[name].format.removeprefix("<") == codes_of(name)


@pytest.mark.parametrize("prefix", ENUMS)
def test_enums_are_those_of_the_header(prefix: str) -> None:
    there = {name: value for name, value in CONSTANTS.items() if name.startswith(prefix) and name not in NOT_A_TYPE}
    assert there == {prefix + member.name: member.value for member in ENUMS[prefix]}


def test_constants_are_those_of_the_header() -> None:
    there = (CONSTANTS["WIRE_MAGIC"], CONSTANTS["WIRE_VERSION"], CONSTANTS["WIRE_SPOKEN"])
    assert there == (wire.MAGIC, wire.VERSION, wire.SPOKEN)
    assert VERSION - 1 <= wire.SPOKEN <= VERSION
    for name in ("TOKEN_SIZE", "SIGNAL_MAIN", "SIGNAL_ALL", "RECORD_INLINE_MAX", "RECORD_MAX", "STATUS_SIZE"):
        assert getattr(wire, name) == CONSTANTS[name], name
    assert CONSTANTS["FIELD_MUST"] == record.MUST


@pytest.mark.parametrize("prefix", ["FIELD_", "OPTION_", "RECORD_", "WISH_"])
def test_record_constants_are_those_of_the_header(prefix: str) -> None:
    here = {name: value for name, value in vars(record).items() if name.startswith(prefix)}
    assert here == {k: v for k, v in CONSTANTS.items() if k.startswith(prefix) and k not in ONLY_THERE}


def test_the_magic_is_readable() -> None:
    assert struct.pack("<H", wire.MAGIC) == b"NS"
    assert struct.pack("<I", record.RECORD_MAGIC) == b"NSLR"
    assert struct.pack("<I", record.SLOT_MAGIC) == b"NSSL"
