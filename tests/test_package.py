"""What a user installs: the wheel made from the sdist, and the editable checkout that scripts/test makes."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

import nssup

ROOT = Path(__file__).parent.parent
NOT_SOURCES = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "nssup-init")
BUILD_SDIST = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
# Pip must neither ask an index nor look for a newer pip.
PIP = ("-I", "-m", "pip", "--disable-pip-version-check", "--quiet")


def out(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def is_executable(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IXUSR)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("sdist")
    # Built from a copy: an sdist writes into its tree, and others may be building there.
    tree = shutil.copytree(ROOT, base / "tree", ignore=NOT_SOURCES)
    name = out(sys.executable, "-I", "-c", BUILD_SDIST, base, cwd=tree).splitlines()[-1]
    return base / name


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", sdist.parent)
    out(sys.executable, *PIP, "wheel", *options, sdist)
    (wheel,) = sdist.parent.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a fresh venv with the wheel and nothing else."""
    venv = tmp_path_factory.mktemp("venv")
    out(sys.executable, "-I", "-m", "venv", "--without-pip", venv)
    out(sys.executable, *PIP, "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    return venv


def test_the_sdist_has_what_it_is_built_from(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"nssup/native/{name}" for name in ("wire.h", "clone.c", "init.c")}
    assert sources | {"setup.py", "LICENSE", "CHANGELOG.md", "scripts/nssup", "tests/test_package.py"} <= names
    assert not [name for name in names if name.endswith((".so", "nssup-init"))]


def test_the_wheel_is_for_every_python_from_3_11_on(wheel: Path) -> None:
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("cp311", "abi3")
    assert platform.startswith("linux_")


def test_the_wheel_has_both_binaries_and_no_sources_of_them(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    assert {"nssup/_clone.abi3.so", "nssup/py.typed", "nssup/__init__.py"} <= modes.keys()
    assert modes["nssup/nssup-init"] & stat.S_IXUSR
    assert not [name for name in modes if name.endswith((".c", ".h")) or name.startswith(("tests/", "config/"))]


def test_the_wheel_works_in_a_fresh_venv(installed: Path) -> None:
    where = Path(out(installed / "bin" / "python", "-I", "-c", "import nssup._clone as c; print(c.__file__)").strip())
    assert where.is_relative_to(installed)
    assert is_executable(where.with_name("nssup-init"))


def test_the_command_starts_without_what_it_does_not_need(installed: Path) -> None:
    command = installed / "bin" / "nssup"
    assert distribution("nssup").version in out(command, "version")
    traced = subprocess.run(
        [installed / "bin" / "python", "-X", "importtime", command, "version"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in traced.stderr.splitlines()}
    assert "nssup.__main__" in loaded
    assert loaded.isdisjoint({"re", "importlib.metadata", "argparse", "asyncio"})


def test_nssup_init_needs_no_library(installed: Path) -> None:
    (init,) = installed.glob("lib/python*/site-packages/nssup/nssup-init")
    content = init.read_bytes()
    assert content.startswith(b"\x7fELF")
    assert b"ld-linux" not in content
    assert len(content) < 65536


@pytest.mark.parametrize("failpoints", ["0", "1"])
def test_failpoints_are_a_build_of_their_own(tmp_path: Path, failpoints: str) -> None:
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=NOT_SOURCES)
    command = [sys.executable, "-I", "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "NSSUP_FAILPOINTS": failpoints}
    built = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert is_executable(tree / "nssup" / "nssup-init")
    compilations = built.stdout.count(" nssup/native/")
    assert built.stdout.count("-DNSSUP_FAILPOINTS") == compilations * int(failpoints)


def test_the_editable_install_is_the_checkout() -> None:
    assert nssup.__file__ is not None
    package = Path(nssup.__file__).parent
    assert package == ROOT / "nssup"
    assert (package / "_clone.abi3.so").exists()
    assert is_executable(package / "nssup-init")


def test_the_editable_install_costs_no_import_hook() -> None:
    files = [str(file) for file in distribution("nssup").files or []]
    assert [file for file in files if file.endswith(".pth")]
    assert not [file for file in files if "finder" in file]


def test_the_editable_command_runs_with_the_checkout() -> None:
    command = Path(sys.executable).with_name("nssup")
    assert os.access(command, os.X_OK)
    assert "nssup.__main__" in command.read_text()
