from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nssup import lines

if TYPE_CHECKING:
    from collections.abc import Iterable

TS = "2026-11-23T12:00:00.000000Z"
KEYS = ["ts", "worker", "generation", "stream", "host_pid", "ns_pid", "offset"]
decode = msgspec.json.Decoder(lines.Record).decode


def framed(*reads: bytes, end: bool = True) -> list[bytes]:
    framer = lines.Framer("web/3", 4, "stdout")
    out = b"".join([framer.feed(read, TS, 5151, 2) for read in reads])
    if end:
        out += framer.end(TS, 5151, 2)
    assert out == b"" or out.endswith(b"\n")
    return out.split(b"\n")[:-1]


def one(line: bytes) -> dict[str, object]:
    """The record of line, without what is the same in all of them."""
    (record,) = framed(line + b"\n")
    found: dict[str, object] = json.loads(record)
    return {key: value for key, value in found.items() if key not in KEYS}


def rebuild(records: Iterable[bytes]) -> dict[tuple[str | None, int | None, str], bytes]:
    """The streams that records came from. Each record must be readable by two parsers and continue its stream."""
    streams: dict[tuple[str | None, int | None, str], bytes] = {}
    for line in records:
        json.loads(line)
        record = decode(line)
        key = (record.worker, record.generation, record.stream)
        before = streams.get(key, b"")
        assert record.offset == len(before)
        streams[key] = before + lines.content(record)
    return streams


def test_a_record_byte_for_byte() -> None:
    assert framed(b"hello\n") == [
        b'{"ts":"2026-11-23T12:00:00.000000Z","worker":"web/3","generation":4,"stream":"stdout",'
        b'"host_pid":5151,"ns_pid":2,"offset":0,"msg":"hello"}'
    ]


def test_all_keys_come_in_their_order() -> None:
    long = b"\xff" * (lines.PART + 1)
    first, second = framed(long)
    assert list(json.loads(first)) == [*KEYS, "msg", "partial", "msg_b64"]
    assert list(json.loads(second)) == [*KEYS, "msg", "nl", "msg_b64"]
    assert list(json.loads(framed(b"{}\n")[0])) == [*KEYS, "data"]


def test_pids_are_null_until_they_are_known() -> None:
    framer = lines.Framer("web/0", 1, "stderr")
    record = json.loads(framer.feed(b"early\n", TS, None, None))
    assert (record["host_pid"], record["ns_pid"]) == (None, None)


def test_a_stamp_has_microseconds_and_sorts_as_text() -> None:
    assert lines.stamp(0) == "1970-01-01T00:00:00.000000Z"
    assert lines.stamp(1_795_435_200.25) == "2026-11-23T12:00:00.250000Z"
    assert len(lines.stamp(1e9)) == 27


@pytest.mark.parametrize(
    ("line", "record"),
    [
        (b"", {"msg": ""}),
        (b'say "hi" \\o/', {"msg": 'say "hi" \\o/'}),
        (b"tab\there", {"msg": "tab\there"}),
        (b"carriage\r", {"msg": "carriage\r"}),
        (b"nul\0 bell\a esc\x1b[0m del\x7f", {"msg": "nul\0 bell\a esc\x1b[0m del\x7f"}),
        ("grün \u2028 \U0001f600".encode(), {"msg": "grün \u2028 \U0001f600"}),
        (b"a\xffb", {"msg": "a\ufffdb", "msg_b64": base64.b64encode(b"a\xffb").decode()}),
        (b"\xed\xa0\x80", {"msg": "\ufffd\ufffd\ufffd", "msg_b64": base64.b64encode(b"\xed\xa0\x80").decode()}),
        (b"100%d %s {0} %%", {"msg": "100%d %s {0} %%"}),
        (b'{"level":"info","n":[1,2]}', {"data": {"level": "info", "n": [1, 2]}}),
    ],
)
def test_a_line_becomes(line: bytes, record: dict[str, object]) -> None:
    assert one(line) == record
    # Not otherwise in company that needs no care, or other care.
    for company in (b"plain", b'{"a":1}', b"\xff", b'q"'):
        assert rebuild(framed(company + b"\n" + line + b"\n" + company + b"\n")) == {
            ("web/3", 4, "stdout"): company + b"\n" + line + b"\n" + company + b"\n"
        }


def test_data_keeps_its_own_text() -> None:
    text = b'{ "b" : 1.50, "b":2, "e":1E3,\t"u":"\\u00e9\\/" }'
    assert framed(text + b"\n")[0].endswith(b'"data":' + text + b"}")


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"}",
        b"{}}",
        b"{} {}",
        b" {}",
        b"{} ",
        b"{}\r",
        b"[1]",
        b'"{}"',
        b"{,}",
        b'{"a":1,}',
        b"{'a':1}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":01}',
        b'{"a":"\\ud800"}',
        b'{"a":"\\x41"}',
        b'{"a":"\t"}',
        b'{"a":"\xff"}',
        b'{"a\xff":1}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":1\0}',
        b'{"msg":"x"},"worker":{"forged":1}',
        b'{"a":' + b"1" * (lines.MAX_DIGITS + 1) + b"}",
        b'{"a":' + b"[" * lines.MAX_DEPTH + b"]" * lines.MAX_DEPTH + b"}",
        b'{"a":' + b"[" * 8000 + b"]" * 8000 + b"}",
    ],
)
def test_what_only_looks_like_an_object_is_a_message(line: bytes) -> None:
    assert not lines.is_object(line)
    assert "data" not in one(line)


def test_objects_up_to_the_limits_are_data() -> None:
    depth = lines.MAX_DEPTH - 1
    assert lines.is_object(b'{"a":' + b"[" * depth + b"]" * depth + b"}")
    assert lines.is_object(b'{"a":"' + b"[{" * 500 + b'\\"[[","b":[]}')
    assert lines.is_object(b'{"a":' + b"1" * lines.MAX_DIGITS + b"}")
    assert lines.is_object(b'{"a":"' + b"x" * (lines.PART - 8) + b'"}')


def test_a_line_of_exactly_a_part_is_whole() -> None:
    (record,) = framed(b"x" * lines.PART + b"\n")
    assert "partial" not in json.loads(record)


def test_a_long_line_is_cut_into_marked_parts() -> None:
    records = [json.loads(record) for record in framed(b"x" * (2 * lines.PART + 5) + b"\nnext\n")]
    assert [(r["offset"], len(r["msg"]), r.get("partial")) for r in records] == [
        (0, lines.PART, True),
        (lines.PART, lines.PART, True),
        (2 * lines.PART, 5, None),
        (2 * lines.PART + 6, 4, None),
    ]


def test_the_last_part_of_a_long_line_is_never_data() -> None:
    for reads in ([b"x" * lines.PART, b"{}\n"], [b"x" * lines.PART + b"{}", b"\n"], [b"x" * lines.PART + b"{}\n"]):
        records = [json.loads(record) for record in framed(*reads)]
        assert [record["msg"][-2:] for record in records] == ["xx", "{}"]


@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_cut_leaves_a_character_whole(back: int) -> None:
    line = b"x" * (lines.PART - back) + "\U0001f600".encode() + b"y"
    records = framed(line + b"\n")
    assert [len(json.loads(record)["msg"]) for record in records] == [lines.PART - back, 2]
    assert not any(b"msg_b64" in record for record in records)


def test_a_cut_without_a_character_to_spare_is_at_the_limit() -> None:
    first, _ = framed(b"\x80" * (lines.PART + 1))
    assert len(base64.b64decode(json.loads(first)["msg_b64"])) == lines.PART


def test_a_last_line_without_newline_says_so() -> None:
    first, second = framed(b"a\n{}")
    assert "nl" not in json.loads(first)
    assert json.loads(second)["nl"] is False
    assert json.loads(second)["msg"] == "{}"  # a torn object could look whole
    assert framed(b"a\n", end=True) == [first]


def test_only_a_part_is_held_of_a_line_that_never_ends() -> None:
    framer = lines.Framer("web/0", 1, "stdout")
    for _ in range(50):
        framer.feed(b"x" * 65536, TS, 1, 1)
    assert framer.offset >= 50 * 65536 - lines.PART


def test_a_mark_is_a_record_like_the_others() -> None:
    record = decode(lines.mark(TS, "web/3", 4, '5 bytes of log dropped: ENOSPC "," [')[:-1])
    assert (record.worker, record.generation, record.stream) == ("web/3", 4, "nssup")
    assert (record.msg, record.offset) == ('5 bytes of log dropped: ENOSPC "," [', None)
    assert decode(lines.mark(TS, None, None, "x")).worker is None


NOISE = st.sampled_from(
    [
        b"\n",
        b"{",
        b"}",
        b'"',
        b"\\",
        b"\r\n",
        b"\0",
        b'{"a":1}',
        b"\n{}\n",
        b"\xc3",
        b"\xa9",
        b"\xf0\x9f\x98",
        b"x" * 5000,
    ]
)
CHUNKS = st.lists(st.binary(max_size=40) | NOISE | st.text(max_size=10).map(str.encode), max_size=30)


@given(CHUNKS)
@example([b"x" * lines.PART, b"\n"])
@example([b"x" * lines.PART, b"\xc3", b"\xa9{}\n{}"])
@example([b"y" * 9, b"x" * lines.PART * 3, b"\n\n", b"\xff" * lines.PART * 2])
def test_the_stream_can_be_rebuilt_and_reads_change_nothing(chunks: list[bytes]) -> None:
    stream = b"".join(chunks)
    records = framed(*chunks)
    assert rebuild(records) == ({("web/3", 4, "stdout"): stream} if stream else {})
    assert records == framed(stream)
    if len(stream) < 500:
        assert records == framed(*[stream[at : at + 1] for at in range(len(stream))])


@given(st.text(max_size=100).map(lambda text: text.replace("\n", "")))
def test_text_is_encoded_as_the_standard_library_does(text: str) -> None:
    record = framed(text.encode("utf-8", "replace") + b"\n")[0]
    if not lines.is_object(text.encode("utf-8", "replace")):
        clean = text.encode("utf-8", "replace").decode()
        assert record.endswith(b'"msg":' + json.dumps(clean, ensure_ascii=False).encode() + b"}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.booleans())
def test_any_object_is_carried_as_data(value: dict[str, object], ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    record = one(text)
    assert record.get("data") == value
