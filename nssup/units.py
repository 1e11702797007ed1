"""Durations, sizes and signals as people write them. Pure; every refusal is a ValueError that says what to write.

A number without its unit is refused everywhere: `10` could be seconds or milliseconds, and only its writer knows.
"""

import re
import signal as _signal

SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
BYTES = {"T": 1 << 40, "G": 1 << 30, "M": 1 << 20, "K": 1 << 10, "B": 1}
LONGEST = 100 * 365 * SECONDS["d"]  # far beyond any use, well inside what the kernel's timers take
LARGEST = (1 << 63) - 1

_LONGEST_TEXT = 60  # longer ones are no numbers that anybody means, and int() refuses thousands of digits
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(us|ms|s|m|h|d) ?(?=[0-9]|$)", re.ASCII)
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])?(?:iB|(B))?")
_REALTIME = re.compile(r"RT(MIN|MAX)(?:([+-])([0-9]{1,2}))?")


def duration(text: str) -> float:
    """Seconds in text: `10s`, `1.5h`, `1h30m`, `250ms`; units d h m s ms us, the larger before the smaller."""
    text = text.strip()
    if len(text) <= _LONGEST_TEXT and _NUMBER.fullmatch(text):
        raise ValueError(f'{text} has no unit: write "{text}s" for seconds (or us, ms, m, h, d)')
    seconds, end, smallest = 0.0, 0, float("inf")
    for part in _PART.finditer(text):
        unit = SECONDS[part[2]]
        if part.start() != end or unit >= smallest:
            break
        seconds, end, smallest = seconds + float(part[1]) * unit, part.end(), unit
    if not text or end != len(text) or len(text) > _LONGEST_TEXT:
        raise ValueError('is no duration: write a number and its unit (us, ms, s, m, h, d), such as "10s" or "1h30m"')
    if seconds > LONGEST:
        raise ValueError("is longer than a hundred years")
    return seconds


def size(text: str) -> int:
    """Bytes in text: `64M`, `1.5G`, `512K`, `100B`; K M G T (or KiB ...) are powers of 1024."""
    text = text.strip()
    if len(text) <= _LONGEST_TEXT and _NUMBER.fullmatch(text):
        raise ValueError(f'{text} has no unit: write "{text}B" for bytes (or K, M, G, T)')
    match = _SIZE.fullmatch(text)
    if match is None or len(text) > _LONGEST_TEXT or (match[2] and match[3]) or (not match[2] and not match[3]):
        raise ValueError('is no size: write a number and its unit (B, K, M, G, T; powers of 1024), such as "64M"')
    unit = BYTES[match[2] or "B"]
    bytes_ = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit
    if bytes_ > LARGEST:
        raise ValueError("is more than 2**63 bytes")
    if bytes_ != int(bytes_):
        raise ValueError("is no whole number of bytes")
    return int(bytes_)


def signal_number(text: str) -> int:
    """The number of `TERM`, `SIGTERM`, `15`, `RTMIN+3`, `SIGRTMAX`."""
    word = text.strip().upper()
    if word.isascii() and word.isdigit() and len(word) <= 2 and 1 <= int(word) <= _signal.SIGRTMAX:
        return int(word)
    name = word.removeprefix("SIG")
    if realtime := _REALTIME.fullmatch(name):
        base = _signal.SIGRTMIN if realtime[1] == "MIN" else _signal.SIGRTMAX
        number = base + int((realtime[2] or "+") + (realtime[3] or "0"))
        if _signal.SIGRTMIN <= number <= _signal.SIGRTMAX:
            return number
    elif name.isalnum() and (found := _signal.Signals.__members__.get("SIG" + name)):
        return int(found)
    raise ValueError('is no signal: write its name, such as "TERM", or its number')
