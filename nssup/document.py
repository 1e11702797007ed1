"""One TOML file: its bytes to tables that remember where they stand, or the one problem that keeps it from being TOML.

Syntax errors and double definitions come out as FILE:LINE:COL too; tomllib's own words are kept where they are clear.
"""

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from nssup import locate
from nssup.errors import Problem
from nssup.locate import Path

Table = dict[str, Any]

_DEEPEST = 4  # restart.backoff.first is 3 deep; what lies deeper is no key of ours and need not be merged


class Document:
    """A file that is TOML."""

    def __init__(self, name: str, text: str, table: Table) -> None:
        self.name = name
        self.table = table
        self._text = text
        self._places: dict[Path, locate.Position] | None = None

    def place(self, path: Path) -> tuple[str, int, int]:
        """File, line and column of path, or of the nearest table around it."""
        if self._places is None:
            self._places = locate.locate(self._text)
        while path and path not in self._places:
            path = path[:-1]
        return (self.name, *(self._places[path] if path else (1, 1)))


def decode(name: str, data: bytes) -> Document | Problem:
    text = decode_text(name, data)
    if isinstance(text, Problem):
        return text
    try:
        return Document(name, text, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        return _syntax_problem(name, text, str(error))
    except RecursionError:
        return Problem(name, 1, 1, "", "is nested too deeply")
    except ValueError:  # int() refuses thousands of digits
        found = re.search(r"\d[\d_]{4000}", text)
        return Problem(name, *_position(text, found.start() if found else 0), "", "is no TOML: a number is too long")


def decode_text(name: str, data: bytes) -> str | Problem:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        line = data.count(b"\n", 0, error.start) + 1
        col = len(data[start : error.start].decode("utf-8")) + 1
        return Problem(name, line, col, "", f"byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8")


def has(table: Table, path: Path) -> bool:
    """Whether path leads through tables of table to something."""
    value: object = table
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


# Of these only one is meant: who says another takes back the one below.
_INSTEAD = (frozenset({"notify", "http", "tcp", "unix", "exec", "log"}), frozenset({"signal", "command"}))


def merged(below: Table, above: Table, depth: int = _DEEPEST) -> Table:
    """above over below: tables are merged, everything else is replaced."""
    for instead in _INSTEAD:
        if depth < _DEEPEST and instead & above.keys():
            below = {key: value for key, value in below.items() if key not in instead}
    both = below | above
    if depth:
        for key in below.keys() & above.keys():
            if isinstance(below[key], dict) and isinstance(above[key], dict):
                both[key] = merged(below[key], above[key], depth - 1)
    return both


def paths(table: Table, path: Path = (), depth: int = _DEEPEST) -> Iterator[Path]:
    """The paths of every key in table."""
    for key, value in table.items():
        yield (*path, key)
        if depth and isinstance(value, dict):
            yield from paths(value, (*path, key), depth - 1)


def _position(text: str, offset: int) -> locate.Position:
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


_MESSAGE = re.compile(r"(.*?) \(at (?:line ([0-9]+), column ([0-9]+)|end of document)\)", re.DOTALL)
_TWICE = ("Cannot declare", "Cannot overwrite", "Cannot mutate", "Cannot redefine", "Duplicate")
_ADVICE = (
    ("Invalid value", ": a text needs quotes"),
    ("Invalid statement", ": write key = value, or [table]"),
    ("Illegal character '\\n'", ": close the text with its quote on the same line"),
    ("Expected newline", ": write one key = value a line; a text needs quotes"),
    ("Expected '='", ": write key = value; a key needs quotes where it is not of A-Z a-z 0-9 _ -"),
    ("Unclosed", ": close it"),
    ("Unterminated", ": close it with its quote"),
    ("Unescaped", ": write two for one, or put the text in single quotes"),
)


def _syntax_problem(name: str, text: str, message: str) -> Problem:
    """tomllib's refusal, with its position; where something is defined twice, with both."""
    found = _MESSAGE.fullmatch(message)
    what, line, col = found.groups() if found else (message, None, None)
    place = (int(line), int(col)) if line and col else _position(text, len(text.rstrip()))
    if what.startswith(_TWICE):
        if twice := locate.find_duplicate(text, *place):
            why = f"is defined already, in line {twice.first[0]}: keep one of them"
            return Problem(name, *twice.second, locate.dotted(twice.path), why)
        what = "something is defined twice: keep one of them"
    advice = next((advice for start, advice in _ADVICE if what.startswith(start)), "")
    if not line:
        advice = ": the file ends before something is complete"
    return Problem(name, *place, "", f"is no TOML: {what[:1].lower()}{what[1:]}{advice}".replace("\n", " "))
