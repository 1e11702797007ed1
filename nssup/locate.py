"""Where each key of a TOML document stands: tomllib forgets positions, and an error without a line helps nobody.

A tokeniser that trusts its text: it is run only on what tomllib has accepted (`locate`), or up to the place where
tomllib stopped (`find_duplicate`), and only when a message needs a position. Rules: toml.io v1.0.0; line breaks and
trailing commas in inline tables (v1.1) are read too.
"""

import bisect
import contextlib
import re
import tomllib
from typing import NamedTuple, NoReturn

Path = tuple[str | int, ...]
Position = tuple[int, int]  # line, column; both from 1, columns in characters

_BARE = re.compile(r"[A-Za-z0-9_-]{1,80}")
_BLANK = re.compile(r"[ \t]*+")
_GAP = re.compile(r"(?:[ \t\n]++|#[^\n]*+)*+")
_KEY = re.compile(r"""[A-Za-z0-9_-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+'""")
_SCALAR = re.compile(
    r'''"""(?:[^"\\]|\\[\s\S]|"(?!""))*+"{3,5}'''
    r"""|'''(?:[^']|'(?!''))*+'{3,5}"""
    r'''|"(?:[^"\\\n]|\\.)*+"'''
    r"""|'[^'\n]*+'"""
    r"""|[^,\]}#\n"']++"""
)


def quoted(text: str) -> str:
    """text as TOML would show it, on one line and cut where it is long."""
    shown = text if len(text) <= 40 else text[:39] + "…"
    escaped = shown.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'


def dotted(path: Path) -> str:
    """("pool", "web", "env", "a b") -> pool.web.env."a b"."""
    return ".".join(str(part) if _BARE.fullmatch(str(part)) else quoted(str(part)) for part in path)


class Duplicate(NamedTuple):
    """A key or table defined a second time."""

    path: Path
    second: Position
    first: Position


def locate(text: str) -> dict[Path, Position]:
    """The position of every key, table and list element of text, a document that tomllib accepts.

    A table stands where its header names it ([a.b] has a.b at `b`), or else where it was first mentioned.
    """
    text = text.replace("\r\n", "\n")
    scanner = _Scanner(text)
    scanner.run()
    places: dict[Path, int] = {}
    named: set[Path] = set()
    for mark in scanner.marks:
        if mark.path not in places or (mark.names and mark.path not in named):
            places[mark.path] = mark.offset
        if mark.names:
            named.add(mark.path)
    lines = _Lines(text)
    return {path: lines.position(offset) for path, offset in places.items()}


def find_duplicate(text: str, line: int, col: int) -> Duplicate | None:
    """The definition at fault when tomllib refused text at (line, col) because something is defined twice."""
    text = text.replace("\r\n", "\n")
    lines = _Lines(text)
    stop = lines.offset(line, col)
    scanner = _Scanner(text)
    with contextlib.suppress(_Stuck):  # behind what tomllib complained about; the marks before it are good
        scanner.run()
    mentioned: dict[Path, int] = {}
    named: set[Path] = set()
    last: Duplicate | None = None
    for mark in scanner.marks:
        if mark.offset > stop:
            break
        first = mentioned.setdefault(mark.path, mark.offset)
        if not mark.names and not mark.repeatable:
            continue
        path = mark.path
        if first == mark.offset:  # then it may be a table inside something that is no table
            path = next((path[:end] for end in range(len(path) - 1, 0, -1) if path[:end] in named), ())
        last = Duplicate(path, lines.position(mark.offset), lines.position(mentioned[path])) if path else None
        if mark.path in named:
            break
        if mark.names:
            named.add(mark.path)
    return last


class _Stuck(Exception):  # no error of anybody's: the tokeniser left the part that is TOML
    """The text is not what tomllib would accept."""


class _Mark(NamedTuple):
    """One mention of a path. names: the last part of a key or header; repeatable: [[path]], which may come again."""

    path: Path
    offset: int
    names: bool
    repeatable: bool = False


class _Lines:
    """Offsets <-> positions of one text."""

    def __init__(self, text: str) -> None:
        self._starts = [0, *(found.end() for found in re.finditer("\n", text))]

    def position(self, offset: int) -> Position:
        line = bisect.bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

    def offset(self, line: int, col: int) -> int:
        return self._starts[min(line, len(self._starts)) - 1] + col - 1


class _Open:
    """An array or inline table that is not closed yet."""

    __slots__ = ("closer", "count", "path")

    def __init__(self, closer: str, path: Path) -> None:
        self.closer = closer
        self.path = path
        self.count = 0


class _Scanner:
    """Collects the marks of a text, in order. Iterative, so that nesting costs no stack."""

    def __init__(self, text: str) -> None:
        self.marks: list[_Mark] = []
        self._text = text
        self._at = 0
        self._table: Path = ()
        self._last_index: dict[Path, int] = {}  # of each array of tables

    def run(self) -> None:
        while self._skip(_GAP):
            if self._take("[["):
                self._table = self._header(self._key(), element=True)
                self._need("]]")
            elif self._take("["):
                self._table = self._header(self._key(), element=False)
                self._need("]")
            else:
                self._value(self._pair(self._table))

    # --- tokens --------------------------------------------------------------------------------------------------

    def _skip(self, blank: re.Pattern[str]) -> str:
        """The character behind the blanks, "" at the end."""
        found = blank.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return self._text[self._at : self._at + 1]

    def _take(self, token: str) -> bool:
        if not self._text.startswith(token, self._at):
            return False
        self._at += len(token)
        return True

    def _need(self, token: str) -> None:
        self._skip(_BLANK)
        if not self._take(token):
            self._stuck()

    def _stuck(self) -> NoReturn:
        raise _Stuck(self._at)

    # --- keys ----------------------------------------------------------------------------------------------------

    def _key(self) -> list[tuple[str, int]]:
        """The parts of a dotted key with their offsets."""
        parts = []
        while True:
            self._skip(_BLANK)
            found = _KEY.match(self._text, self._at)
            if found is None:
                self._stuck()
            parts.append((_plain(found[0]), self._at))
            self._at = found.end()
            if self._skip(_BLANK) != ".":
                return parts
            self._at += 1

    def _header(self, parts: list[tuple[str, int]], element: bool) -> Path:
        """The path that [parts], or [[parts]], opens; a name of an array of tables means its last element."""
        path: Path = ()
        for name, offset in parts[:-1]:
            path = (*path, name)
            self.marks.append(_Mark(path, offset, names=False))
            if path in self._last_index:
                path = (*path, self._last_index[path])
        name, offset = parts[-1]
        path = (*path, name)
        self.marks.append(_Mark(path, offset, names=not element, repeatable=element))
        if element:
            self._last_index[path] = self._last_index.get(path, -1) + 1
            path = (*path, self._last_index[path])
            self.marks.append(_Mark(path, offset, names=True))
        return path

    def _pair(self, table: Path) -> Path:
        """Reads `key =`; the path of the key below table."""
        parts = self._key()
        path = table
        for name, offset in parts:
            path = (*path, name)
            self.marks.append(_Mark(path, offset, names=False))
        self.marks[-1] = self.marks[-1]._replace(names=True)
        self._need("=")
        return path

    # --- values --------------------------------------------------------------------------------------------------

    def _value(self, path: Path) -> None:
        """Reads one value and all that it holds."""
        containers: list[_Open] = []
        while True:
            self._skip(_BLANK)
            if self._take("["):
                containers.append(_Open("]", path))
            elif self._take("{"):
                containers.append(_Open("}", path))
            else:
                self._scalar()
            inner = self._next(containers)
            if inner is None:
                return
            path = inner

    def _next(self, containers: list[_Open]) -> Path | None:
        """Closes what ends here; the path of the next value inside what is still open, None when nothing is."""
        while containers:
            innermost = containers[-1]
            if self._skip(_GAP) == "," and innermost.count:
                self._at += 1
                self._skip(_GAP)
            if not self._take(innermost.closer):
                innermost.count += 1
                return self._inside(innermost)
            containers.pop()
        return None

    def _inside(self, container: _Open) -> Path:
        if container.closer == "}":
            return self._pair(container.path)
        path = (*container.path, container.count - 1)
        self.marks.append(_Mark(path, self._at, names=True))
        return path

    def _scalar(self) -> None:
        found = _SCALAR.match(self._text, self._at)
        if found is None:
            self._stuck()
        self._at = found.end()


def _plain(key: str) -> str:
    """One part of a key as the string it means."""
    if key[0] not in "\"'":
        return key
    if key[0] == "'" or "\\" not in key:
        return key[1:-1]
    try:
        value = tomllib.loads("key = " + key)["key"]
    except ValueError as error:
        raise _Stuck from error
    return str(value)
