"""Env files: lines of NAME=value -> variables with their positions, or what is wrong with which line.

Blank lines and lines that start with # are skipped. A value is taken as it stands, without the blanks around it;
"..." knows \\n, \\t, and \\ before anything else, '...' nothing. No shell reads it: no $VARIABLES, no `export`, and a #
later in a line is part of the value.
"""

import re
from typing import NamedTuple

from nssup.errors import Problem

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_DOUBLE = re.compile(r'"((?:[^"\\]|\\.)*+)"')
_SINGLE = re.compile(r"'([^']*)'")
_ESCAPE = re.compile(r"\\(.)")
_ESCAPES = {"n": "\n", "t": "\t"}


class Variable(NamedTuple):
    text: str
    file: str
    line: int
    col: int


def parse(file: str, text: str) -> tuple[dict[str, Variable], list[Problem]]:
    """The variables of an env file, the last definition of each; and every line that is none."""
    variables: dict[str, Variable] = {}
    problems = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = (part.strip(" \t") for part in line.partition("="))
        col = len(line) - len(line.lstrip(" \t")) + 1
        meant = _meant(value)
        why = _wrong(name, equals, meant)
        if meant is None or why:
            problems.append(Problem(file, number, col, "", why))
        else:
            variables[name] = Variable(meant, file, number, col)
    return variables, problems


def _wrong(name: str, equals: str, meant: str | None) -> str:
    if not equals:
        return "is no variable: write NAME=value, or # before a comment"
    if name.startswith("export "):
        return "is no variable's name: leave out export, no shell reads this"
    if not _NAME.fullmatch(name):
        return "is no variable's name: use A-Z a-z 0-9 _ . - and no digit in front"
    if meant is None:
        return f"the quotes of {name} do not match: close them at the end of the line"
    return f"{name} holds a NUL byte, which no program can receive" if "\0" in meant else ""


def _meant(value: str) -> str | None:
    """What the text behind = means; None when its quotes do not match."""
    if value.startswith('"'):
        found = _DOUBLE.fullmatch(value)
        return found and _ESCAPE.sub(lambda escape: _ESCAPES.get(escape[1], escape[1]), found[1])
    if value.startswith("'"):
        found = _SINGLE.fullmatch(value)
        return found and found[1]
    return value
