"""The native framer against its oracle, lines.Framer: the same bytes, whatever comes and however it is cut."""

from __future__ import annotations

import base64
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nssup import framing, lines
from nssup.framing import NativeFramer, PlainFramer, Sheet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

pytestmark = pytest.mark.skipif(not framing.NATIVE, reason="nssup._frame is not built")
if framing.NATIVE:
    from nssup import _frame

TS = "2026-11-23T12:00:00.000000Z"
WHO = TS, 5151, None
decode = msgspec.json.Decoder(lines.Record).decode
FRAGMENTS = [
    *(b"\n", b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\r\n", b"\0", b"\x1b[0m", b"\x7f", b"\n\n\n"),
    *(b'{"a":1}', b"\n{}\n", b'\n{"k":[1,2.5e3,"\\u00e9\\ud83d\\ude00"]}\n', b'{"a":1e999}\n', b'\n{"a":"\\ud800"}\n'),
    *("é".encode(), "\u20ac".encode(), "\U0001f600".encode(), "grün ".encode() * 200),
    *(b"\xc3", b"\xa9", b"\xf0\x9f\x98", b"\xe0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xff", b"\xc0\xaf"),
    *(b"x" * 31, b"x" * 32, b"x" * 33, b"x" * 5000, b"y" * (lines.PART - 1), b"z" * lines.PART, b"\x80" * lines.PART),
    b"a line that is longer than what is looked at at once\n",
]
READS = st.lists(
    st.lists(
        st.sampled_from(FRAGMENTS) | st.binary(max_size=40) | st.text(max_size=10).map(str.encode), max_size=12
    ).map(b"".join),
    max_size=8,
)


def fuzzed(seed: int) -> list[bytes]:
    chance = random.Random(seed)
    return [
        b"".join(
            chance.choice(FRAGMENTS) if chance.random() < 0.8 else chance.randbytes(chance.randrange(30))
            for _ in range(chance.randrange(30))
        )
        for _ in range(chance.randrange(1, 8))
    ]


def framers() -> tuple[PlainFramer, PlainFramer]:
    return PlainFramer("web/3", 4, "stdout"), NativeFramer("web/3", 4, "stdout")


def same(reads: Iterable[bytes]) -> None:
    oracle, native = framers()
    for read in reads:
        assert native.feed(read, *WHO) == oracle.feed(read, *WHO)
        assert native.reached() == oracle.reached()
    assert native.end(*WHO) == oracle.end(*WHO)
    assert native.reached() == oracle.reached()


@given(READS)
@example([b"x" * lines.PART, b"\n"])
@example([b"x" * lines.PART, b"\xc3", b"\xa9{}\n{}"])
@example([b"x" * (lines.PART - 1) + b"\xf0\x9f", b"\x98\x80" + b"\x80" * 9 + b"\n"])
@example([b"y" * 9, b"x" * lines.PART * 3, b"\n\n", b"\xff" * lines.PART * 2])
def test_native_records_are_the_oracles_byte_for_byte(reads: list[bytes]) -> None:
    same(reads)


def test_and_over_a_corpus() -> None:
    for seed in range(300):
        same(fuzzed(seed))


@pytest.mark.parametrize("kind", [PlainFramer, NativeFramer])
@given(READS, st.integers(0, 5000))
def test_sheets_hold_the_same_and_the_stream_can_be_rebuilt(
    kind: Callable[[str, int, str], PlainFramer], reads: list[bytes], fill: int
) -> None:
    oracle = lines.Framer("web/3", 4, "stdout")
    expected = b"".join([*[oracle.feed(read, *WHO) for read in reads], oracle.end(*WHO)])
    found = b""
    framer = kind("web/3", 4, "stdout")
    sheet = Sheet(fill)

    def empty() -> None:
        nonlocal found
        found += sheet.memory[: sheet.size]
        sheet.size = 0

    for read in reads:
        start = 2
        while (start := framer.fill(sheet, b"##" + read + b"##\n", start, len(read) + 2, *WHO)) < len(read) + 2:
            empty()
    while not framer.finish(sheet, *WHO):
        empty()
    empty()
    assert found == expected
    records = [decode(line) for line in found.splitlines()] if found else []
    assert b"".join(map(lines.content, records)) == b"".join(reads)


DIGITS = st.integers(0, 10**9).map(str)
NUMBERS = st.tuples(
    st.sampled_from(["", "-", "+"]),
    st.sampled_from(["0", "1", "01", "1" + "0" * 290, "9" * 300, "1" * 301]) | DIGITS,
    st.sampled_from(["", ".", ".0", "." + "0" * 290 + "1"]) | DIGITS.map(".{}".format),
    st.sampled_from(["", "e", "E+308", "e309", "e-400", "e18"]) | st.integers(-700, 700).map("e{}".format),
).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SNIPPETS = [
    *b'{ } [ ] , : "a" " 1 - true false null "\\u12 \\ud800 \\udc00 \\" \\n "k": e . 0'.split(),
    *("é".encode(), b"\xff", b"\0", b"\x1f", b"\t", b" ", b"[" * 30, b"]" * 30, b"1" * 150),
]
TOKENS = st.lists(st.sampled_from(SNIPPETS), max_size=12).map(b"".join)


@given(NUMBERS.map(str.encode))
@example(b"1.7976931348623158e308")
@example(b"1.7976931348623159e308")
@example(b"0.00017976931348623159e312")
@example(b"17976931348623159" + b"0" * 100 + b"e192")
@example(b"0e99999999999999999999")
@example(b"1e-99999999999999999999")
@pytest.mark.parametrize("less", [0, 1])
def test_numbers_are_refused_where_readers_would_lose_them(less: int, number: bytes) -> None:
    limit = str(2**1024 - 2**970 - less).encode()
    for text in (number, limit[:150] + b"." + limit[150:] + b"e159", limit[:1] + b"." + limit[1:290] + b"e308"):
        line = b'{"a":' + text + b"}"
        assert _frame.is_object(line) == lines.is_object(line)


@given(TOKENS)
def test_what_looks_like_an_object_is_one_to_both(tokens: bytes) -> None:
    for line in (b"{" + tokens + b"}", b'{"a":' + tokens + b"}"):
        assert _frame.is_object(line) == lines.is_object(line)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.binary(max_size=2), st.integers(0, 200))
def test_an_object_with_a_scratch_is_judged_alike(value: dict[str, object], scratch: bytes, at: int) -> None:
    line = msgspec.json.encode(value)
    assert _frame.is_object(line)
    at %= len(line)
    line = line[:at] + scratch + line[at + len(scratch) :]
    assert _frame.is_object(line) == lines.is_object(line)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
@pytest.mark.parametrize("depth", range(60, 68))
def test_depth_is_judged_alike(opening: bytes, depth: int) -> None:
    line = b'{"a":' + opening * depth + b"1" + (b"]" if opening == b"[" else b"}") * depth + b"}"
    assert _frame.is_object(line) == lines.is_object(line)


def test_memory_that_is_too_small_or_numbers_out_of_range_are_refused() -> None:
    room = bytearray(_frame.RECORD_MOST + 10)
    for args in (
        (bytearray(9), 0, b"", 0, 0, b"{", 0, b"", False, False),
        (room, -1, b"", 0, 0, b"{", 0, b"", False, False),
        (room, len(room) + 1, b"", 0, 0, b"{", 0, b"", False, False),
        (room, 0, b"ab", 1, 3, b"{", 0, b"", False, False),
        (room, 0, b"ab", -1, 1, b"{", 0, b"", False, False),
        (room, 0, b"ab", 2, 1, b"{", 0, b"", False, False),
        (room, 0, b"", 0, 0, b"{" * 20, 0, b"", False, False),
        (room, 0, b"", 0, 0, b"{", 0, b"x" * (lines.PART + 1), False, False),
    ):
        with pytest.raises(ValueError, match="out of range"):
            _frame.frame(*args)
    with pytest.raises(TypeError):
        _frame.frame(b"read-only", 0, b"", 0, 0, b"{", 0, b"", False, False)


def test_without_it_logs_are_framed_in_python_and_version_says_so() -> None:
    program = (
        "import sys; sys.modules['nssup._frame'] = None\n"
        "from nssup import framing, cli; print(framing.Framer.__name__, flush=True); cli.main(['version'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("PlainFramer\nnssup ")
    assert "without nssup._frame" in done.stdout
    assert framing.Framer is NativeFramer


# --- under sanitizers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The framer of that name as a program in which a byte too far, or what C leaves undefined, is the end."""
    place = tmp_path_factory.mktemp("sanitized")
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    here = Path(__file__).parent

    def build(lines_by: str) -> Path:
        program = place / lines_by
        flags = ["-O1", "-g", "-std=gnu11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        choice = [f"-DSHORT_LINES={lines_by}"]
        done = subprocess.run(
            [*compiler.split(), *flags, *choice, "-o", str(program), str(here / "framing_sanitized.c")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            pytest.skip(f"needs the address and undefined behaviour sanitizers: {done.stderr.strip()[-200:]}")
        return program

    return build


def _has(feature: str) -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and feature in cpu.read_text().split()


@pytest.mark.parametrize("lines_by", ["short_lines_any", "short_lines_sse2", "short_lines_avx2"])
def test_no_byte_too_far(sanitized: Callable[[str], Path], lines_by: str) -> None:
    if lines_by != "short_lines_any" and not _has(lines_by.removeprefix("short_lines_")):
        pytest.skip(f"needs a CPU with {lines_by.removeprefix('short_lines_')}")
    program = sanitized(lines_by)
    for seed in range(12):
        reads = [read for more in range(seed * 100, seed * 100 + 40) for read in fuzzed(more)]
        framer = lines.Framer("web/3", 4, "stdout")
        expected = b"".join([*[framer.feed(read, *WHO) for read in reads], framer.end(*WHO)])
        job = struct.pack("=I", seed * seed * 500)
        job += b"".join(struct.pack("=I", len(read)) + read for read in reads) + struct.pack("=I", 0xFFFFFFFF)
        done = subprocess.run([program], input=job, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        assert [line.partition(b'"offset":')[2] for line in done.stdout.split(b"\n")] == [
            line.partition(b'"offset":')[2] for line in expected.split(b"\n")
        ]


def test_odd_bytes_come_back_from_base64() -> None:
    for size in range(5):
        line = b"\xff" * (size + 1)
        record = decode(NativeFramer("w/0", 1, "stdout").feed(line + b"\n", *WHO))
        assert base64.b64decode(record.msg_b64 or "") == line
