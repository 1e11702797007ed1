from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nssup import envfile


@pytest.mark.parametrize(
    ("text", "env"),
    [
        ("", {}),
        ("\n  \n# A=1\n   # B=2\n", {}),
        ("A=1\nB=2", {"A": "1", "B": "2"}),
        ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
        ("A=\n", {"A": ""}),
        ("  A = x y  \n", {"A": "x y"}),
        ("A=x # no comment", {"A": "x # no comment"}),
        ("A=a=b=c", {"A": "a=b=c"}),
        ('A="x # y"', {"A": "x # y"}),
        (r'A="a\nb\t\"q\" \\ \$X"', {"A": 'a\nb\t"q" \\ $X'}),
        (r"A='a\nb $X'", {"A": r"a\nb $X"}),
        ('A=""', {"A": ""}),
        ('A=x"y"', {"A": 'x"y"'}),
        ('A={"json": 1}', {"A": '{"json": 1}'}),
        ("A=1\nA=2", {"A": "2"}),
        ("a.b-c=é", {"a.b-c": "é"}),
    ],
)
def test_variables(text: str, env: dict[str, str]) -> None:
    variables, problems = envfile.parse("x.env", text)
    assert {name: variable.text for name, variable in variables.items()} == env
    assert problems == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A", "x.env:1:1: is no variable: write NAME=value, or # before a comment"),
        ("\n  what is this", "x.env:2:3: is no variable: write NAME=value, or # before a comment"),
        ("export A=1", "x.env:1:1: is no variable's name: leave out export, no shell reads this"),
        ("1A=1", "x.env:1:1: is no variable's name: use A-Z a-z 0-9 _ . - and no digit in front"),
        ("=1", "x.env:1:1: is no variable's name: use A-Z a-z 0-9 _ . - and no digit in front"),
        ("A B=1", "x.env:1:1: is no variable's name: use A-Z a-z 0-9 _ . - and no digit in front"),
        ('A="x', "x.env:1:1: the quotes of A do not match: close them at the end of the line"),
        ('A="x" # y', "x.env:1:1: the quotes of A do not match: close them at the end of the line"),
        ("A='it's'", "x.env:1:1: the quotes of A do not match: close them at the end of the line"),
        ("A=x\0y", "x.env:1:1: A holds a NUL byte, which no program can receive"),
    ],
)
def test_what_is_no_variable(text: str, line: str) -> None:
    variables, problems = envfile.parse("x.env", text + "\nGOOD=1\n")
    assert [str(problem) for problem in problems] == [line]
    assert list(variables) == ["GOOD"]


def test_a_variable_knows_its_place() -> None:
    variables, _ = envfile.parse("x.env", "# note\n\n  A = 1\n")
    assert variables["A"] == envfile.Variable("1", "x.env", 3, 3)


@settings(derandomize=True, deadline=None)
@given(st.text(alphabet="AB=\"'\\ #\n1é\0", max_size=40))
def test_each_line_is_skipped_taken_or_refused(text: str) -> None:
    variables, problems = envfile.parse("x.env", text)
    lines = [line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")]
    assert len(variables) + len(problems) <= len(lines)
    assert bool(variables or problems) == bool(lines)
