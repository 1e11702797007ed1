"""Positions in TOML: every path that tomllib knows has one, and it is the right one."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nssup.locate import dotted, find_duplicate, locate, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nssup.locate import Path


def flattened(value: object, path: Path = ()) -> Iterator[Path]:
    inner: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    for key, below in inner:
        yield (*path, key)
        yield from flattened(below, (*path, key))


SAMPLE = """\
version = 1 # a comment with [brackets] and "quotes
include = [
  "a.toml", # "inside = a comment
  'b.toml',
]
point.x = { a = 1, 'b' = [ 2, {c = 3} ], "d\\u0041" = "}" }

[pool.web.restart]
policy = "always"
[pool.web]
text = \"\"\"
[not.a.table]
key = "\\\"\"\" \\\\\"\"\"\"\"
literal = ''' '' " [x] '''''
when = 1979-05-27 07:32:00
[[fruit]]
name = "apple"
[[fruit.variety]]
name = "red"
[[fruit.variety]]
name = "green"
[[fruit]]
[fruit.physical]
color = "x"
"""

PLACES = {
    ("version",): (1, 1),
    ("include",): (2, 1),
    ("include", 0): (3, 3),
    ("include", 1): (4, 3),
    ("point",): (6, 1),
    ("point", "x"): (6, 7),
    ("point", "x", "a"): (6, 13),
    ("point", "x", "b"): (6, 20),
    ("point", "x", "b", 0): (6, 28),
    ("point", "x", "b", 1): (6, 31),
    ("point", "x", "b", 1, "c"): (6, 32),
    ("point", "x", "dA"): (6, 42),
    ("pool",): (8, 2),
    ("pool", "web"): (10, 7),  # its own header, not the first mention
    ("pool", "web", "restart"): (8, 11),
    ("pool", "web", "restart", "policy"): (9, 1),
    ("pool", "web", "text"): (11, 1),
    ("pool", "web", "literal"): (14, 1),
    ("pool", "web", "when"): (15, 1),
    ("fruit",): (16, 3),
    ("fruit", 0): (16, 3),
    ("fruit", 0, "name"): (17, 1),
    ("fruit", 0, "variety"): (18, 9),
    ("fruit", 0, "variety", 0): (18, 9),
    ("fruit", 0, "variety", 0, "name"): (19, 1),
    ("fruit", 0, "variety", 1): (20, 9),
    ("fruit", 0, "variety", 1, "name"): (21, 1),
    ("fruit", 1): (22, 3),
    ("fruit", 1, "physical"): (23, 8),
    ("fruit", 1, "physical", "color"): (24, 1),
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_path_has_its_place(newline: str) -> None:
    assert locate(SAMPLE.replace("\n", newline)) == PLACES


def test_the_sample_is_what_tomllib_reads() -> None:
    assert set(flattened(tomllib.loads(SAMPLE))) == set(PLACES)


def test_inline_tables_of_toml_1_1_are_read_too() -> None:
    assert locate("a = {\n  b = 1, # why\n  c = 2,\n}\nd = 1") == {
        ("a",): (1, 1),
        ("a", "b"): (2, 3),
        ("a", "c"): (3, 3),
        ("d",): (5, 1),
    }


def test_columns_are_characters() -> None:
    assert locate('"é" = { a = "ü", b = 1 }')[("é", "b")] == (1, 18)


@pytest.mark.parametrize("text", ["", "\n", "# only a comment", "   \n\t# x\n"])
def test_a_text_without_keys_has_no_places(text: str) -> None:
    assert locate(text) == {}


def test_nesting_costs_no_stack() -> None:
    assert len(locate("a = " + "[" * 5000 + "]" * 5000)) == 5000


# --- every document that tomllib accepts ---------------------------------------------------------------------------

BLANK = st.sampled_from(["", " ", "\t", "  "])
COMMENT = st.sampled_from(["", "", " # note", ' # [x] "y', "#'''"])
GAP = st.sampled_from(["", " ", "\n", " # x\n", "\n\n  ", "\n# ]}\n"])
NAME = st.sampled_from(
    ["a", "b", "c-d", "1", '"a"', "'b'", '"a b"', '"x.y"', '""', "''", '"\\""', '"\\u00e9\\n"', "'\\'", '"#"']
)
SCALAR = st.sampled_from(
    [
        "1", "0x1f", "1_000", "3.14", "-inf", "nan", "1e5", "true", "false",
        "1979-05-27", "07:32:00", "1979-05-27 07:32:00.5", "1979-05-27T07:32:00-07:00",
        '""', "''", '"x"', "'x'", '"a # b"', '"\\"]}\\\\"', "'\\'", '"a,b"', "'[k]'",
        '""""""', "''''''", '"""\n[k]\n"""', "'''\nk = 1\n'''", '""" "" """', '"""x"""""', "'''x'''''",
        '"""\\"""\\\n  """', '"""\\\\"""',
    ]
)  # fmt: skip


@st.composite
def keys(draw: st.DrawFn) -> str:
    parts = draw(st.lists(NAME, min_size=1, max_size=3))
    dot = draw(BLANK) + "." + draw(BLANK)
    return dot.join(parts)


def containers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(arrays(inner), inline_tables(inner))


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[str]) -> str:
    items = [draw(GAP) + item + draw(GAP) for item in draw(st.lists(inner, max_size=3))]
    comma = draw(st.sampled_from(["", "," + draw(GAP)])) if items else draw(GAP)
    return "[" + ",".join(items) + comma + "]"


@st.composite
def inline_tables(draw: st.DrawFn, inner: st.SearchStrategy[str]) -> str:
    values = draw(st.lists(inner, max_size=3))
    pairs = [draw(BLANK) + draw(keys()) + draw(BLANK) + "=" + draw(BLANK) + value for value in values]
    return "{" + ",".join(pairs) + draw(BLANK) + "}"


VALUES = st.recursive(SCALAR, containers, max_leaves=5)


@st.composite
def statements(draw: st.DrawFn) -> str:
    blank, end = draw(BLANK), draw(BLANK) + draw(COMMENT)
    kind = draw(st.sampled_from(["pair", "pair", "pair", "table", "array", "nothing"]))
    if kind == "nothing":
        return end
    key = blank + draw(keys()) + draw(BLANK)
    if kind == "table":
        return f"{blank}[{key}]{end}"
    if kind == "array":
        return f"{blank}[[{key}]]{end}"
    return f"{key}={draw(BLANK)}{draw(VALUES)}{end}"


def accepted(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


@st.composite
def documents(draw: st.DrawFn) -> str:
    """Statement by statement, each kept only if tomllib takes it: deep documents without throwing most away."""
    text = ""
    for statement in draw(st.lists(statements(), max_size=8)):
        longer = text + statement + "\n"
        if accepted(longer):
            text = longer
    text = text if draw(st.booleans()) else text.removesuffix("\n")
    return text.replace("\n", "\r\n") if draw(st.booleans()) else text


@settings(derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents())
def test_the_paths_are_tomllibs(text: str) -> None:
    assert set(locate(text)) == set(flattened(tomllib.loads(text)))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(documents())
def test_the_place_of_a_key_shows_its_name(text: str) -> None:
    lines = text.replace("\r\n", "\n").split("\n")
    for path, (line, col) in locate(text).items():
        here = lines[line - 1][col - 1 :]
        name = next(part for part in reversed(path) if isinstance(part, str))
        if isinstance(path[-1], str):
            assert here.startswith((name, '"', "'")), (path, here)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(alphabet="ab=[]{},.\"'#\n 1\\é", max_size=40), st.integers(1, 3), st.integers(1, 20))
def test_any_text_can_be_searched_for_a_duplicate(text: str, line: int, col: int) -> None:
    find_duplicate(text, line, col)


# --- duplicates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "second", "first"),
    [
        ("[a]\n[b]\n[a]\n", ("a",), (3, 2), (1, 2)),
        ("a = 1\na = 2", ("a",), (2, 1), (1, 1)),
        ("a = {x = 1}\na = {x = 2}\n", ("a",), (2, 1), (1, 1)),
        ("a = {b = 1, b = 2}", ("a", "b"), (1, 13), (1, 6)),
        ("a.b = 1\n[a]\n", ("a",), (2, 2), (1, 1)),
        ("a = 1\n[a]\n", ("a",), (2, 2), (1, 1)),
        ("a = 1\n[a.b]\n", ("a",), (2, 4), (1, 1)),
        ("[[a]]\nx = 1\n[a]\n", ("a",), (3, 2), (1, 3)),
        ("[a]\n[[a]]\n", ("a",), (2, 3), (1, 2)),
        ("[[a]]\n[a.b]\n[[a]]\n[a.b]\n[a.b]\n", ("a", 1, "b"), (5, 4), (4, 4)),
        ('[p."a b"]\n[p."a b"]\n', ("p", "a b"), (2, 4), (1, 4)),
        ("[a]\nb = 1\n\n[a]\nb = [", ("a",), (4, 2), (1, 2)),
    ],
)
def test_a_duplicate_is_found_with_its_first_place(
    text: str, path: Path, second: tuple[int, int], first: tuple[int, int]
) -> None:
    with pytest.raises(tomllib.TOMLDecodeError) as refused:
        tomllib.loads(text)
    assert any(word in str(refused.value) for word in ("Cannot", "Duplicate"))
    found = find_duplicate(text, *error_place(str(refused.value), text))
    assert found == (path, second, first)


def error_place(message: str, text: str) -> tuple[int, int]:
    if "end of document" in message:
        lines = text.rstrip().split("\n")
        return len(lines), len(lines[-1]) + 1
    _, _, place = message.rpartition("(at line ")
    line, _, col = place.removesuffix(")").partition(", column ")
    return int(line), int(col)


# --- shown paths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (("pool", "web", "command", 0), "pool.web.command.0"),
        (("env", "a.b"), 'env."a.b"'),
        (("", "é", "a\nb", 'x"y\\'), r'"".' + '"é".' + r'"a\u000ab"."x\"y\\"'),
    ],
)
def test_a_path_is_shown_as_one_would_write_it(path: Path, shown: str) -> None:
    assert dotted(path) == shown


def test_long_texts_are_cut() -> None:
    assert quoted("x" * 1000) == '"' + "x" * 39 + '…"'
