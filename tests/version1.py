"""Version 1 of all that passes between two supervisors, or a supervisor and an init: an encoder that is never changed.

It is the first version there was. It stands by itself, on struct and nothing of nssup, and says in bytes what docs/
contracts.md (a), (b), (c), (j) and (l) say in words. version1.golden holds its bytes; test_versions.py has today's code
read them, and write them for as long as it is that version which today's code writes.

    python tests/version1.py > tests/version1.golden        as it was made
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

TOKEN = bytes(range(16))


# --- (a) the line ----------------------------------------------------------------------------------------------------


def message(kind: int, payload: bytes, version: int = 1) -> bytes:
    return struct.pack("<HBBI", 0x534E, version, kind, len(payload)) + payload + bytes(-len(payload) % 8)


EXIT = struct.pack("<iiQQQQ", 2, 11, 1234, 5678, 4096, 123456789)
NOTIFIED = struct.pack(
    "<10I5QII120s",
    *(5, 9, 2, 1, 3, 4, 6, 1, 17, 5),
    *(123456789, 123456790, 2000000, 123456791, 123456792),
    *(4, 0, b"busy"),
)


def spoken() -> dict[str, bytes]:
    """What a supervisor says: epoch 7, generation 3."""
    return {
        "HELLO": message(1, struct.pack("<II", 7, 1)),
        "RECORD": message(2, launch_record()),
        "RECORD in a memfd": message(2, struct.pack("<Q", 40000)),
        "GO": message(3, struct.pack("<II16s", 7, 0, TOKEN)),
        "SIGNAL": message(7, struct.pack("<IiiI", 7, 15, 0, 1)),
        "POLICY": message(9, struct.pack("<II", 7, 1)),
        "ACK": message(12, struct.pack("<II", 7, 3)),
        "PING": message(14, struct.pack("<II", 7, 0)),
    }


def heard() -> dict[str, bytes]:
    """What an init says."""
    return {
        "STATE": message(4, struct.pack("<IIIIiIiI", 3, 7, 4, 1, 2, 0, 0, 5) + EXIT + NOTIFIED),
        "STARTED": message(5, struct.pack("<Ii", 3, 2)),
        "FAILED": message(6, struct.pack("<IIiI", 3, 20, 1, 0)),
        "EXITED": message(10, struct.pack("<II", 3, 0) + EXIT),
        "EMPTY": message(11, struct.pack("<II", 3, 0)),
        "NOTIFY": message(13, struct.pack("<II", 3, 0) + NOTIFIED),
    }


# --- (b) the launch record -------------------------------------------------------------------------------------------


def field(kind: int, data: bytes) -> bytes:
    return struct.pack("<HHI", kind, 1, len(data)) + data + bytes(-len(data) % 8)


def a_list(*items: bytes) -> bytes:
    at, offsets = 8 + 8 * (len(items) + 1), []
    for item in items:
        offsets.append(at)
        at += len(item) + 1
    return struct.pack(f"<II{len(items) + 1}Q", len(items), 0, *offsets, 0) + b"".join(item + b"\0" for item in items)


def launch_record(
    generation: int = 3, options: int = 1, argv: tuple[bytes, ...] = (b"sh", b"-c", b"echo $A"), version: int = 1
) -> bytes:
    body = (
        field(1, TOKEN)
        + field(2, struct.pack("<I", options))
        + field(11, struct.pack("<Q", 27))
        + field(3, a_list(*argv))
        + field(4, a_list(b"A=b"))
        + field(5, a_list(b"/bin/sh"))
        + field(9, struct.pack("<I", 0o077))
        + field(10, struct.pack("<IIQQ", 7, 0, 64, 128))
    )
    return struct.pack("<IHHII", 0x524C534E, version, 0, 16 + len(body), generation) + body


# --- (c) the life slot -----------------------------------------------------------------------------------------------

# A worker that runs: the fields that there were, as MessagePack.
BODY = bytes.fromhex(
    "dc0017a772756e6e696e67c0c3c2c203009200c2cb408f440000000000cb408f4a0000000000c0c0cd141ecd141f02cd141f02c3c2c0c0c0c0"
)


def slot(version: int = 1) -> bytes:
    head = struct.pack(
        "<IHHQ16sIIQQQ8siHH64s64s296s4x",
        *(0x4C53534E, version, 2, 41, bytes(range(16, 32)), 7, 3),
        *(4026531836, 0, 3141, b"spechash", 5150, 8, len(BODY), b"a handle", b"web/3", BODY),
    )
    return head + struct.pack("<I", zlib.crc32(head))


# --- (j) the staging memory ------------------------------------------------------------------------------------------

STREAMS, HALF, ENTRIES, TAIL = 2, 4096, 4, 16384
STAGED = b"one\ntwo\nhalf"
WALL = 1795435200.25


def pages(size: int) -> int:
    return -(-size // 4096) * 4096


def staging(version: int = 1) -> tuple[bytes, int]:
    """(a memfd's content, its position): of worker 3's third life, whose first bytes were staged and not written."""
    table, states = 4096, 4096 + 2 * pages(24 * ENTRIES)
    tails = pages(states + 2 * 64 * STREAMS)
    first = tails + 2 * TAIL * STREAMS
    memory = bytearray(first + 2 * (pages(HALF) + 4096))
    struct.pack_into("=QIIQII48s", memory, 0, 0x454741545353534E, version, STREAMS, HALF, ENTRIES, TAIL, b"web")
    struct.pack_into("=Q", memory, 1024, 1)  # committed
    struct.pack_into("=QQ", memory, 1088, 2, 1)  # the first half: batch, entries
    struct.pack_into("=IIQd", memory, table, 0, 0, first, WALL)
    struct.pack_into("=QQIIIIIIII", memory, states, 1, 0, 0, 0, 3, 3, 0, 0, 5151, 2)
    memory[first : first + len(STAGED)] = STAGED
    return bytes(memory), first + len(STAGED)


# --- (l) the inheritance ---------------------------------------------------------------------------------------------


def inheritance(host_pid: int = 4242, version: int = 1, **more: object) -> bytes:
    lives = [["web/3", 3, 5150, True, 11, 12, 13, -1, [40, 0]]]
    fields = {"version": version, "host_pid": host_pid, "from_version": "0.1.0", "epoch": 7, "listener": 9}
    rest = {"locks": [7, 8], "lives": lives, "ends_at": None, "failed": None, "soft_limit": 1024}
    return json.dumps({**fields, **rest, **more}, separators=(",", ":")).encode()


# --- golden bytes ----------------------------------------------------------------------------------------------------


def everything() -> dict[str, bytes]:
    memory, position = staging()
    return {
        **spoken(),
        **heard(),
        "launch record": launch_record(),
        "life slot": slot(),
        "staging": memory + struct.pack("<Q", position),
        "inheritance": inheritance(),
    }


def squeezed(data: bytes) -> str:
    """Hexadecimal; `*N ` is a run of N zero bytes."""
    parts = re.split(rb"(\0{9,})", data)
    return "".join(f"*{len(part)} " if len(part) > 8 and not any(part) else part.hex() for part in parts).strip()


def golden() -> dict[str, str]:
    lines = Path(__file__).with_name("version1.golden").read_text().splitlines()
    return dict(line.partition(": ")[::2] for line in lines)


if __name__ == "__main__":
    for name, data in everything().items():
        print(f"{name}: {squeezed(data)}")
