"""The rules of the house kept by machine: layers, purity, banned calls, names. A new module gets a row in ROWS."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).parent.parent / "nssup"

# A module imports from the rows above it in this table, never from its own.
ROWS = [
    "errors units locate verbs address",
    "spec events record wire keys document envfile handover",
    "machine restart history explain readiness dependencies rollout schedule adopt lines config diff render selection "
    "plan openapi access audit probing sockets scenario",
    "screen effective metrics completion frames",
    "workers",
    "backlog clone custody watch probe logs cgroup network sandbox doctor facts terminal procfs lives listener staging "
    "snapshot logfile logread logpool intake follower framing journal desired systemd reexec notify commands "
    "prober interpreter held",
    "loop sim pipes hub",
    "process foreground http operation playback",
    "crew api pools tasks executor",
    "desk",
    "seeing doing following reviewing",
    "routes",
    "ctl client",
    "inside top",
    "__main__ cli fast up",
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names.split()}
LAST_PURE_ROW = ROW["workers"]
# The few that may look sideways, importer first; one direction only.
WITHIN_ROW = {
    ("machine", "restart"),
    ("dependencies", "machine"),
    ("config", "dependencies"),
    ("adopt", "machine"),
    ("readiness", "machine"),
    ("probing", "machine"),
    ("probing", "readiness"),
    ("commands", "clone"),
    ("probe", "follower"),
    ("prober", "probe"),
    ("prober", "follower"),
    ("adopt", "restart"),
    ("history", "machine"),
    ("history", "render"),
    ("explain", "machine"),
    ("explain", "dependencies"),
    ("explain", "restart"),
    ("explain", "render"),
    ("plan", "sockets"),
    ("config", "sockets"),
    ("custody", "clone"),
    ("custody", "desired"),
    ("custody", "lives"),
    ("__main__", "fast"),
    ("__main__", "cli"),
    ("cli", "fast"),
    ("cli", "up"),
    ("logs", "intake"),
    ("logs", "logpool"),
    ("logs", "logfile"),
    ("logs", "logread"),
    ("logs", "follower"),
    ("logs", "staging"),
    ("logs", "framing"),
    ("logpool", "intake"),
    ("logpool", "logfile"),
    ("logpool", "framing"),
    ("logpool", "staging"),
    ("logfile", "framing"),
    ("logfile", "logread"),
    ("logfile", "staging"),
    ("staging", "framing"),
    ("follower", "logread"),
    ("journal", "backlog"),
    ("backlog", "logfile"),
    ("backlog", "logread"),
    ("backlog", "snapshot"),
    ("journal", "logs"),
    ("journal", "snapshot"),
    ("hub", "pipes"),
    ("executor", "crew"),
}

# `signal` is not here: the pure rows need the names of signals.
IMPURE = frozenset(
    "_socket aiofiles asyncio concurrent ctypes fcntl grp io logging mmap multiprocessing os posix pwd random resource "
    "secrets select selectors shutil socket ssl structlog subprocess tempfile termios threading time urllib "
    "uvloop".split()
)
IMPURE_CALLS = frozenset({"open", "input", "print", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"})

# Tasks live in a TaskGroup; what runs without one can be lost or cancelled half-way.
TASK_STARTERS = frozenset({"create_task", "ensure_future", "gather", "wait_for"})
# A number may be someone else by now: signals go by pidfd, children are clone's, exits come from waitid(P_PIDFD).
NUMBER_CALLS = frozenset(f"os.{name}" for name in "fork forkpty kill killpg wait wait3 wait4 waitpid".split())

HEAVY = frozenset({"aiofiles", "asyncio", "h11", "msgspec", "re", "socket", "structlog", "subprocess", "uvloop"})


@dataclass(frozen=True)
class Module:
    name: str  # dotted, without the leading "nssup."
    tree: ast.Module
    path: Path

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    @property
    def package(self) -> list[str]:
        parts = ["nssup", *self.name.split(".")]
        return parts if self.path.name == "__init__.py" else parts[:-1]

    def at(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 1)}"


@dataclass(frozen=True)
class Import:
    target: str  # absolute and dotted
    node: ast.stmt
    typing_only: bool


def parse(path: Path) -> Module:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if len(parts) > 1 and parts[-1] == "__init__":
        parts = parts[:-1]
    return Module(".".join(parts), ast.parse(path.read_text(), str(path)), path)


MODULES = [parse(path) for path in sorted(PACKAGE.rglob("*.py"))]
LAYERED = [module for module in MODULES if module.name != "__init__"]


def dotted(node: ast.AST) -> str:
    """`a.b.c` for names and attributes; calls in between are looked through: `get_running_loop().create_task`."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{dotted(node.value)}.{node.attr}"
        case ast.Call():
            return dotted(node.func)
        case _:
            return "?"


def is_typing_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and dotted(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def targets(module: Module, node: ast.stmt) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            base = module.package[: len(module.package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            return [f"{source}.{alias.name}" for alias in node.names] if source == "nssup" else [source]
        case _:
            return []


def imports(module: Module, node: ast.AST | None = None, typing_only: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node or module.tree):
        if isinstance(child, ast.Import | ast.ImportFrom):
            for target in targets(module, child):
                yield Import(target, child, typing_only)
        elif isinstance(child, ast.If) and is_typing_guard(child):
            for statement in child.body:
                yield from imports(module, ast.Module([statement], []), typing_only=True)
            yield from imports(module, ast.Module(child.orelse, []), typing_only)
        else:
            yield from imports(module, child, typing_only)


def own_row(module: Module) -> int:
    assert module.top in ROW, (
        f"nssup/{module.path.relative_to(PACKAGE)} has no row: put {module.top!r} into ROWS of tests/test_house.py "
        "(and into the table of the architecture page), in the lowest row that its imports allow"
    )
    return ROW[module.top]


def wrong_layer(module: Module, found: Import) -> str | None:
    """What is wrong about an import of our own."""
    row = own_row(module)
    target = found.target.split(".")[1] if "." in found.target else ""
    if target == "__version__" or target == module.top or (module.top, target) in WITHIN_ROW:
        return None
    if target in ("_clone", "_frame", "_pidfd"):
        return None if row > LAST_PURE_ROW else "the pure rows do not import native code"
    if target not in ROW:
        return "import from the module that defines it; if it is one, give it a row in ROWS"
    if ROW[target] < row or (found.typing_only and ROW[target] == row):
        return None
    return f"row {row} may not import from row {ROW[target]}"


def layer_errors(module: Module) -> list[str]:
    errors = []
    for found in imports(module):
        what = None
        if found.target.partition(".")[0] == "nssup":
            what = wrong_layer(module, found)
        elif own_row(module) <= LAST_PURE_ROW and not found.typing_only and found.target.partition(".")[0] in IMPURE:
            what = f"row {own_row(module)} is pure"
        if what:
            errors.append(f"{module.at(found.node)}: imports {found.target}: {what}")
    return errors


def calls(module: Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def impure_calls(module: Module) -> list[str]:
    if own_row(module) > LAST_PURE_ROW:
        return []
    return [
        f"{module.at(node)}: {name}() in a pure module: pass in what it would return"
        for name, node in calls(module)
        if name in IMPURE_CALLS or ".".join(name.split(".")[-2:]) in IMPURE_CALLS
    ]


def is_banned_use(name: str) -> bool:
    receiver, _, method = name.rpartition(".")
    starts_a_task = method in TASK_STARTERS and (receiver == "asyncio" or receiver.endswith("loop"))
    return starts_a_task or name in NUMBER_CALLS


def banned_uses(module: Module) -> list[str]:
    errors = []
    for node in ast.walk(module.tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [dotted(node)]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        errors += [f"{module.at(node)}: {name}" for name in names if is_banned_use(name)]
    return errors


def identifiers(node: ast.AST) -> list[str | None]:
    match node:
        case ast.Name():
            return [node.id]
        case ast.Attribute():
            return [node.attr]
        case ast.arg() | ast.keyword():
            return [node.arg]
        case ast.alias():
            return [node.asname or node.name]
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.MatchAs() | ast.MatchStar():
            return [node.name]
        case ast.MatchClass():
            return [*node.kwd_attrs]
        case _:
            return []


def bare_pids(module: Module) -> list[str]:
    return [module.at(node) for node in ast.walk(module.tree) if "pid" in identifiers(node)]


def by_name(module: Module) -> str:
    return module.name


@pytest.mark.parametrize("module", LAYERED, ids=by_name)
def test_a_module_imports_from_lower_rows_only(module: Module) -> None:
    assert layer_errors(module) == []


@pytest.mark.parametrize("module", LAYERED, ids=by_name)
def test_pure_modules_call_nothing_impure(module: Module) -> None:
    assert impure_calls(module) == []


@pytest.mark.parametrize("module", MODULES, ids=by_name)
def test_tasks_live_in_groups_and_processes_are_not_numbers(module: Module) -> None:
    assert banned_uses(module) == []


@pytest.mark.parametrize("module", MODULES, ids=by_name)
def test_a_pid_says_whose_it_is(module: Module) -> None:
    assert bare_pids(module) == [], "host_pid or ns_pid"


def test_a_module_has_one_row() -> None:
    assert sum(len(names.split()) for names in ROWS) == len(ROW)


def test_a_module_has_a_subject() -> None:
    assert {module.path.name for module in MODULES} & {
        "utils.py",
        "util.py",
        "helpers.py",
        "common.py",
        "misc.py",
    } == set()


@pytest.mark.parametrize("statement", ["import nssup", "import nssup.__main__"])
def test_importing_is_light(statement: str) -> None:
    script = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY.intersection(loaded) == set()


# The rules themselves, tried on small sources.


def judged(tmp_path: Path, name: str, source: str) -> Module:
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    return Module(name, ast.parse(source), PACKAGE / path.name)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("machine", "from nssup.spec import Spec"),
        ("machine", "from .errors import Refused"),
        ("machine", "import signal, msgspec"),
        ("machine", "if TYPE_CHECKING:\n    from nssup.dependencies import Graph\n    import asyncio"),
        ("clone", "import os\nfrom nssup import _clone"),
        ("loop", "from . import clone, workers"),
        ("__main__", "def main():\n    from nssup import cli"),
        ("cli", "from nssup import __version__"),
    ],
)
def test_the_layer_rule_allows(tmp_path: Path, name: str, source: str) -> None:
    assert layer_errors(judged(tmp_path, name, source)) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("spec", "import nssup.loop"),
        ("spec", "from nssup.record import Life"),
        ("spec", "from nssup import machine"),
        ("spec", "from . import machine"),
        ("spec", "from .machine import step"),
        ("spec", "def f():\n    from nssup.loop import Supervisor"),
        ("spec", "if TYPE_CHECKING:\n    from nssup.loop import Supervisor"),
        ("spec", "if TYPE_CHECKING:\n    pass\nelse:\n    import os"),
        ("spec", "import os.path"),
        ("workers", "from asyncio import Queue"),
        ("workers", "from nssup import _clone"),
        ("loop", "from nssup import Supervisor"),
        ("fast", "from nssup import cli"),
    ],
)
def test_the_layer_rule_refuses(tmp_path: Path, name: str, source: str) -> None:
    assert len(layer_errors(judged(tmp_path, name, source))) == 1


def test_the_layer_rule_wants_a_row_for_each_module(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="put 'novelty' into ROWS"):
        layer_errors(judged(tmp_path, "novelty", "import nssup.errors"))


@pytest.mark.parametrize(
    "source",
    [
        "import asyncio\nasyncio.create_task(f())",
        "from asyncio import gather",
        "loop.create_task(f())",
        "asyncio.get_running_loop().create_task(f())",
        "import os\nstop = os.kill",
        "from os import killpg",
        "os.waitpid(-1, 0)",
    ],
)
def test_the_ban_bites(tmp_path: Path, source: str) -> None:
    assert len(banned_uses(judged(tmp_path, "loop", source))) == 1


@pytest.mark.parametrize(
    "source",
    ["group.create_task(f())", "asyncio.TaskGroup().create_task(f())", "os.waitid(os.P_PIDFD, fd, 0)", "run(x)"],
)
def test_the_ban_spares(tmp_path: Path, source: str) -> None:
    assert banned_uses(judged(tmp_path, "loop", source)) == []


@pytest.mark.parametrize(
    "source",
    ["pid = 1", "def f(pid): ...", "f(pid=1)", "x.pid", "import x as pid", "def pid(): ...", "class A:\n    pid: int"],
)
def test_a_bare_pid_is_seen(tmp_path: Path, source: str) -> None:
    assert len(bare_pids(judged(tmp_path, "loop", source))) == 1


@pytest.mark.parametrize("source", ["host_pid = 1", 'kinds = ["pid"]', "os.getpid()", "P_PIDFD"])
def test_a_qualified_pid_is_fine(tmp_path: Path, source: str) -> None:
    assert bare_pids(judged(tmp_path, "loop", source)) == []


@pytest.mark.parametrize("source", ["open(p)", "datetime.now()", "datetime.datetime.now(UTC)", "print(1)"])
def test_an_impure_call_is_seen(tmp_path: Path, source: str) -> None:
    assert len(impure_calls(judged(tmp_path, "lines", source))) == 1
