"""Golden bytes of the launch record and of the life slot, and what a slot that is torn reads as."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nssup import record
from nssup.record import SLOT_SIZE, Identity, Notify, Plan, Slot, decode_slot, encode, encode_slot

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = bytes(range(16))
MOUNT_ID = 27

# --- launch record ----------------------------------------------------------------------------------------------------


LEAST_PLAN = Plan(
    generation=3,
    argv=(b"sh", b"-c", b""),
    env=(b"A=1",),
    candidates=(b"/bin/sh",),
    namespaces=frozenset({"pid", "mount"}),
)


LEAST = (
    "4e534c52 0100 0000 d0000000 03000000"  # magic, version, length 208, generation
    "0100 0100 10000000" + TOKEN.hex() + "0200 0100 04000000 07000000 00000000"  # options: init, mount ns, proc
    "0b00 0100 08000000 1b00000000000000"  # the root mount
    "0300 0100 2f000000 03000000 00000000 2800000000000000 2b00000000000000 2e00000000000000 0000000000000000"
    "7368 00 2d63 00 00 00"  # sh -c '' and padding
    "0400 0100 1c000000 01000000 00000000 1800000000000000 0000000000000000 413d31 00 00000000"
    "0500 0100 20000000 01000000 00000000 1800000000000000 0000000000000000 2f62696e2f7368 00"
)
MORE = (
    "0600 0100 05000000 2f737276 00 000000"  # directory /srv
    "0700 0100 07000000 696e73696465 00 00"  # hostname inside
    "0800 0100 14000000 e8030000 e9030000 02000000 05000000 06000000 00000000"  # identity
    "0900 0100 04000000 3f000000 00000000"  # umask 077
    "0a00 0100 30000000 07000000 00000000 4000000000000000 8000000000000000"
    "04000000 00000000 0000000000000000 ffffffffffffffff"  # rlimits: nofile 64:128, core 0:unlimited
    "1000 0100 0f000000 03000000 05000000 2f72756e2f7800 00"  # notify: a socket in /run/x, 5 is the ready pipe
)
FULL: dict[str, Any] = {
    "directory": b"/srv",
    "hostname": b"inside",
    "identity": Identity(1000, 1001, (5, 6)),
    "umask": 0o077,
    "rlimits": ((7, 64, 128), (4, 0, record.UNLIMITED)),
    "notify": Notify(b"/run/x", 5),
}


def golden(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


def test_the_least_record() -> None:
    assert encode(LEAST_PLAN, TOKEN, MOUNT_ID).hex() == golden(LEAST).hex()


def test_a_full_record() -> None:
    said = encode(LEAST_PLAN._replace(**FULL), TOKEN, MOUNT_ID)
    assert said.hex() == golden("4e534c52 0100 0000 70010000 03000000" + LEAST.replace(" ", "")[32:] + MORE).hex()


@pytest.mark.parametrize(
    ("notify", "data"),
    [
        (Notify(b"/run/x"), "01000000 00000000 2f72756e2f7800"),
        (Notify(ready_fd=3), "02000000 03000000 00"),
        (Notify(), "00000000 00000000 00"),
    ],
)
def test_ways_to_notify(notify: Notify, data: str) -> None:
    found = {kind: data for kind, _, data in fields(encode(LEAST_PLAN._replace(notify=notify), TOKEN, MOUNT_ID))}
    assert found[record.FIELD_NOTIFY].hex() == golden(data).hex()


@pytest.mark.parametrize(("init", "data"), [(True, "02000000 02000000"), (False, "02000000 01000000")])
def test_listening_sockets(init: bool, data: str) -> None:
    plan = LEAST_PLAN._replace(sockets=2, init=init)
    found = {kind: (flags, data) for kind, flags, data in fields(encode(plan, TOKEN, MOUNT_ID))}
    assert found[record.FIELD_SOCKETS] == (record.MUST, golden(data))


def test_where_the_socket_is() -> None:
    assert Notify(b"/run/x", 5).socket == b"/run/x/notify"
    assert Notify(ready_fd=5).socket is None


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, 7),
        ({"init": False}, 6),
        ({"proc": False}, 3),
        ({"namespaces": frozenset({"pid"}), "proc": False}, 1),
        ({"tty": True}, 15),
        ({"namespaces": frozenset({"pid", "mount", "user"})}, 23),
    ],
)
def test_options(changes: dict[str, Any], options: int) -> None:
    assert record.options_of(LEAST_PLAN._replace(**changes)) == options


def fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(kind, flags, data) as a reader that trusts nothing finds them."""
    magic, version, reserved, length, _ = struct.unpack_from("<IHHII", data)
    assert (magic, version, reserved, length) == (record.RECORD_MAGIC, record.RECORD_VERSION, 0, len(data))
    at = 16
    while at < length:
        kind, flags, size = struct.unpack_from("<HHI", data, at)
        at += 8
        assert at + size <= length
        yield kind, flags, data[at : at + size]
        end, at = at + size, at + (size + 7 & ~7)
        assert data[end:at] == bytes(at - end)
    assert at == length


def strings(data: bytes) -> tuple[bytes, ...]:
    count, zero, *offsets = struct.unpack_from(f"<II{struct.unpack_from('<I', data)[0] + 1}Q", data)
    assert (zero, offsets[count]) == (0, 0)
    return tuple(data[at : data.index(b"\0", at)] for at in offsets[:count])


ITEMS = st.lists(st.binary(max_size=12).map(lambda item: item.replace(b"\0", b"0")), max_size=5).map(tuple)


@given(argv=ITEMS, env=ITEMS, candidates=ITEMS)
def test_lists_come_back(argv: tuple[bytes, ...], env: tuple[bytes, ...], candidates: tuple[bytes, ...]) -> None:
    plan = LEAST_PLAN._replace(argv=argv, env=env, candidates=candidates)
    found = {kind: data for kind, _, data in fields(encode(plan, TOKEN, MOUNT_ID))}
    kinds = (record.FIELD_ARGV, record.FIELD_ENV, record.FIELD_EXEC)
    assert tuple(strings(found[kind]) for kind in kinds) == (argv, env, candidates)


def test_every_field_must_be_understood() -> None:
    """A launch without one of them would not be the launch that was asked for."""
    assert {flags for _, flags, _ in fields(encode(LEAST_PLAN._replace(**FULL), TOKEN, MOUNT_ID))} == {record.MUST}


# --- life slot --------------------------------------------------------------------------------------------------------

FULL_SLOT = Slot(
    step=record.SLOT_RELEASED,
    sequence=9,
    boot_id=bytes(range(16)),
    epoch=4,
    generation=3,
    worker="web/3",
    pidns_inode=0xF0000123,
    init_start_time=777,
    pidfd_inode=888,
    init_host_pid=41871,
    handle=b"\x01\x02\x03\x04\x05\x06\x07\x08",
    spec_hash=b"\xa0\xa1\xa2\xa3\xa4\xa5\xa6\xa7",
    body=b"\x93\x01\x02\xc0",
)
GOLDEN_SLOT = (
    "4e53534c 0100 0200 0900000000000000 000102030405060708090a0b0c0d0e0f 04000000 03000000"
    "230100f000000000 0903000000000000 7803000000000000 a0a1a2a3a4a5a6a7 8fa30000 0800 0400"
    + "0102030405060708".ljust(128, "0")
    + b"web/3".hex().ljust(128, "0")
    + "930102c0"
)
STEPS = [record.SLOT_SPAWNING, record.SLOT_RELEASED, record.SLOT_STOPPING, record.SLOT_OVER]


def sealed(body: bytes) -> bytes:
    """body with a checksum that is right."""
    return body + struct.pack("<I", zlib.crc32(body))


def test_golden_slot() -> None:
    body = golden(GOLDEN_SLOT).ljust(508, b"\0")
    assert encode_slot(FULL_SLOT).hex() == sealed(body).hex()
    assert encode_slot(FULL_SLOT)[-4:].hex() == "0bbd4621"


@pytest.mark.parametrize("step", STEPS)
def test_a_slot_comes_back(step: int) -> None:
    slot = FULL_SLOT._replace(step=step)
    assert decode_slot(encode_slot(slot)) == slot


def test_the_emptiest_slot_comes_back() -> None:
    slot = Slot(record.SLOT_SPAWNING, 0, bytes(16), 0, 0, "a/0")
    data = encode_slot(slot)
    assert len(data) == SLOT_SIZE
    assert decode_slot(data) == slot


@given(
    worker=st.text("abcxyz0123456789_-/", min_size=1, max_size=64),
    handle=st.binary(max_size=64),
    spec_hash=st.binary(min_size=8, max_size=8),
    sequence=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    body=st.binary(max_size=record.BODY_MAX),
)
def test_any_slot_comes_back(
    worker: str, handle: bytes, spec_hash: bytes, sequence: int, epoch: int, body: bytes
) -> None:
    slot = FULL_SLOT._replace(
        worker=worker, handle=handle, spec_hash=spec_hash, sequence=sequence, epoch=epoch, body=body
    )
    assert decode_slot(encode_slot(slot)) == slot


@given(st.integers(0, SLOT_SIZE * 8 - 1))
def test_a_flipped_bit_is_seen(bit: int) -> None:
    data = bytearray(encode_slot(FULL_SLOT))
    data[bit // 8] ^= 1 << bit % 8
    assert decode_slot(bytes(data)) is None


@given(st.integers(1, SLOT_SIZE - 1))
def test_a_torn_slot_is_seen(at: int) -> None:
    old, new = (
        encode_slot(FULL_SLOT),
        encode_slot(FULL_SLOT._replace(sequence=10, step=record.SLOT_OVER, init_start_time=99)),
    )
    assert decode_slot(new[:at] + old[at:]) in (None, FULL_SLOT, decode_slot(new))
    assert decode_slot(new[:100] + old[100:]) is None


def with_version(version: int) -> bytes:
    data = bytearray(encode_slot(FULL_SLOT)[:-4])
    struct.pack_into("<H", data, 4, version)
    return sealed(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(SLOT_SIZE),
        encode_slot(FULL_SLOT)[:-1],
        encode_slot(FULL_SLOT) + b"\0",
        sealed(bytes(508)),
        sealed(b"\xff" * 508),
        with_version(record.SLOT_VERSION + 1),
        encode_slot(FULL_SLOT._replace(step=record.SLOT_FREE)),
        sealed(encode_slot(FULL_SLOT)[:-4].replace(b"web/3", b"web\xff3")),
    ],
)
def test_no_slot(data: bytes) -> None:
    assert decode_slot(data) is None


def test_the_version_before_is_read() -> None:
    assert decode_slot(with_version(record.SLOT_VERSION - 1)) == FULL_SLOT


def test_fields_of_later_versions_are_ignored() -> None:
    data = encode_slot(FULL_SLOT)[:-4]
    assert decode_slot(sealed(data[:-8] + b"tomorrow")) == FULL_SLOT


@given(st.binary(min_size=SLOT_SIZE, max_size=SLOT_SIZE) | st.binary(max_size=SLOT_SIZE + 8))
def test_decode_slot_never_raises(data: bytes) -> None:
    assert decode_slot(data) is None
    head = struct.pack("<IHH", record.SLOT_MAGIC, record.SLOT_VERSION, record.SLOT_RELEASED)
    decode_slot(sealed((head + data).ljust(508, b"\0")[:508]))


@pytest.mark.parametrize(
    "changes",
    [
        {"worker": "x" * 65},
        {"handle": bytes(65)},
        {"body": bytes(297)},
        {"spec_hash": bytes(9)},
        {"boot_id": bytes(15)},
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="life slot"):
        encode_slot(FULL_SLOT._replace(**changes))
