"""The bytes of one stream -> log records, in batches: the pure-Python way, and the oracle of every faster one.

A record is one line of JSON (interface.md, Records), its keys in this order:

    ts worker generation stream host_pid ns_pid offset msg|data [partial] [nl] [msg_b64]

From the records of a stream its bytes can be rebuilt exactly (`content`), and where they were cut into reads changes
no record but for its `ts`. The rules:

- a record is a line without its newline; a carriage return before it is a byte like any other;
- a line longer than PART bytes is cut into parts, `partial: true` on all but the last, never inside a UTF-8 character
  of a well-formed line; `offset` counts the bytes of the stream before the part;
- a last line without a newline has `nl: false`;
- bytes that are no UTF-8: `msg` holds U+FFFD where they were, `msg_b64` the bytes themselves;
- a whole line that is a JSON object (`is_object`) is carried as `data`, in its own text.
"""

import base64
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import accumulate, count
from operator import add

import msgspec

PART = 16 * 1024  # bytes of a line in one record
MAX_DEPTH = 64  # of a JSON object carried as data: whoever reads records must be able to parse one level more
MAX_DIGITS = 300  # in a row: readers refuse, or lose, longer numbers (Python's json stops at 4300)

# Bytes that are kept when what needs a \u escape is looked for: all but the control characters; newlines are frames.
_PLAIN = bytes(byte for byte in range(256) if byte >= 0x20 or byte == 0x0A)
_SHORT = {0x08: "\\b", 0x09: "\\t", 0x0C: "\\f", 0x0D: "\\r"}
_ESCAPES = {byte: _SHORT.get(byte, f"\\u{byte:04x}") for byte in range(0x20) if byte != 0x0A}
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"|[][{}]')
_decode = msgspec.json.Decoder().decode


def stamp(seconds: float) -> str:
    """Wall clock seconds since 1970 as the records' `ts`: always 27 characters, comparable as text."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def seconds(ts: str) -> float:
    """What `stamp` was made of."""
    return datetime.fromisoformat(ts).timestamp()


def _too_deep(line: bytes) -> bool:
    """Whether a valid JSON text nests deeper than MAX_DEPTH."""
    if line.count(b"[") + line.count(b"{") <= MAX_DEPTH:
        return False
    depth = deepest = 0
    for token in _STRING_OR_BRACKET.findall(line):
        if token in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token in b"]}":
            depth -= 1
    return deepest > MAX_DEPTH


def is_object(line: bytes) -> bool:
    """Whether line, byte for byte, is a JSON object that every JSON reader takes as part of a record.

    Strict RFC 8259 in UTF-8 without blanks around it, and no more than MAX_DEPTH levels, MAX_DIGITS digits in a row,
    no lone surrogate and no number outside a double's range.
    """
    if not (line.startswith(b"{") and line.endswith(b"}")) or (len(line) > MAX_DIGITS and _LONG_NUMBER.search(line)):
        return False
    try:
        _decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return not _too_deep(line)


def _escape(text: str, raw: bytes) -> str:
    """text ready to stand between quotes in JSON, its newlines left alone; raw: the same as bytes."""
    if b"\\" in raw:
        text = text.replace("\\", "\\\\")
    if b'"' in raw:
        text = text.replace('"', '\\"')
    for byte in set(raw.translate(None, _PLAIN)):  # as a rule empty, and few in any text
        text = text.replace(chr(byte), _ESCAPES[byte])
    return text


def _cut(line: bytes, start: int) -> int:
    """Where the part that begins at start ends: PART bytes on, or at the begin of the character that lies across."""
    end = start + PART
    for at in range(end, end - 4, -1):
        if line[at] & 0xC0 != 0x80:
            return at
    return end


class Framer:
    """Splits one stream of one life into records.

    offset: bytes of the stream that are in records already. At most PART bytes wait for the end of their line.
    """

    __slots__ = ("_cut", "_held", "_who", "offset")

    def __init__(self, worker: str, generation: int, stream: str) -> None:
        who = msgspec.json.encode(worker).decode()
        self._who = f'","worker":{who},"generation":{generation},"stream":"{stream}","host_pid":'
        self._held = b""
        self._cut = False  # parts of the line that _held continues were given out already
        self.offset = 0

    def feed(self, data: bytes, ts: str, host_pid: int | None, ns_pid: int | None) -> bytes:
        """The records that data completes, as one batch of lines; ts (see `stamp`) and the PIDs go into each."""
        block, newline, rest = data.rpartition(b"\n")
        if not newline:
            self._held += data
            if len(self._held) <= PART:
                return b""
            head = self._head(ts, host_pid, ns_pid)
            return "".join(self._parts(self._held, head, newline=None)).encode()
        if self._held:
            block = self._held + block
        self._held = b""
        head = self._head(ts, host_pid, ns_pid)
        out = ""
        if self._cut:
            first, newline, block = block.partition(b"\n")
            out += "".join(self._parts(first, head, newline=True))
        if newline:
            out += self._block(block, head)
        self._held = rest
        if len(rest) > PART:
            out += "".join(self._parts(rest, head, newline=None))
        return out.encode()

    def end(self, ts: str, host_pid: int | None, ns_pid: int | None) -> bytes:
        """The record of a last line without newline, if there is one. The stream is over."""
        if not self._held:
            return b""
        head = self._head(ts, host_pid, ns_pid)
        return "".join(self._parts(self._held, head, newline=False)).encode()

    def _head(self, ts: str, host_pid: int | None, ns_pid: int | None) -> str:
        host = "null" if host_pid is None else host_pid
        inside = "null" if ns_pid is None else ns_pid
        return f'{{"ts":"{ts}{self._who}{host},"ns_pid":{inside},"offset":'

    def _block(self, block: bytes, head: str) -> str:
        """The records of whole lines, joined (not ended) by newlines. This is the hot path: a few operations per block,
        one per line."""
        try:
            text = block.decode()
        except UnicodeDecodeError:
            return self._odd_block(block, head)
        escaped = _escape(text, block)
        lines = escaped.split("\n")
        lengths = [*map(len, lines if escaped is text and text.isascii() else block.split(b"\n"))]
        if max(lengths) > PART:
            return self._odd_block(block, head)
        # Where each line begins: the lengths so far, and one newline for each line so far.
        offsets = map(add, accumulate(lengths, initial=0), count(self.offset))
        self.offset += len(block) + 1
        if b"{" in block and (block.startswith(b"{") or b"\n{" in block):
            return "".join(_mixed(block.split(b"\n"), lines, offsets, head))
        return "".join([f'{head}{at},"msg":"{line}"}}\n' for line, at in zip(lines, offsets, strict=False)])

    def _odd_block(self, block: bytes, head: str) -> str:
        return "".join([record for line in block.split(b"\n") for record in self._parts(line, head, newline=True)])

    def _parts(self, line: bytes, head: str, *, newline: bool | None) -> Iterable[str]:
        """The records of one line, cut where it is too long; newline None: its end has not been seen, so hold the rest.

        For what is rare: long lines, odd bytes, last lines.
        """
        whole = not self._cut
        start = 0
        while len(line) - start > PART:
            end = _cut(line, start)
            yield self._one(line[start:end], head, ',"partial":true')
            start, whole = end, False
        last = line[start:]
        self._cut = newline is None
        self._held = b""
        if newline is None:
            self._held = last
        elif whole and newline and is_object(last):
            yield f'{head}{self.offset},"data":{last.decode()}}}\n'
            self.offset += len(last) + 1
        else:
            yield self._one(last, head, "" if newline else ',"nl":false')
            self.offset += newline

    def _one(self, part: bytes, head: str, marks: str) -> str:
        try:
            text = part.decode()
        except UnicodeDecodeError:
            text = part.decode("utf-8", "replace")
            marks += f',"msg_b64":"{base64.b64encode(part).decode()}"'
        at = self.offset
        self.offset += len(part)
        return f'{head}{at},"msg":"{_escape(text, part)}"{marks}}}\n'


def _mixed(raw: list[bytes], lines: list[str], offsets: Iterable[int], head: str) -> Iterable[str]:
    """Records of lines of which some may be JSON objects; lines: the same, escaped."""
    for source, line, at in zip(raw, lines, offsets, strict=False):
        if is_object(source):
            yield f'{head}{at},"data":{source.decode()}}}\n'
        else:
            yield f'{head}{at},"msg":"{line}"}}\n'


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A record as its readers see it. worker, generation, offset: None only in nssup's own marks (stream `nssup`).

    data: the line's own text where it is a JSON object, else empty. nl: the line ended with a newline.
    """

    ts: str
    worker: str | None
    generation: int | None
    stream: str
    host_pid: int | None
    ns_pid: int | None
    offset: int | None
    msg: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"")
    partial: bool = False
    nl: bool = True
    msg_b64: str | None = None


def content(record: Record) -> bytes:
    """The bytes of the stream that record stands for, its newline included."""
    if record.msg_b64 is not None:
        line = base64.b64decode(record.msg_b64)
    elif record.msg is not None:
        line = record.msg.encode()
    else:
        line = bytes(record.data)
    return line if record.partial or not record.nl else line + b"\n"


def mark(ts: str, worker: str | None, generation: int | None, text: str) -> bytes:
    """A record of nssup's own, written where something of the log is missing."""
    worker_json, generation_json, text_json = (
        msgspec.json.encode(value).decode() for value in (worker, generation, text)
    )
    return (
        f'{{"ts":"{ts}","worker":{worker_json},"generation":{generation_json},"stream":"nssup",'
        f'"host_pid":null,"ns_pid":null,"offset":null,"msg":{text_json}}}\n'
    ).encode()
