"""The C half of the build: small extensions, and beside them the executable nssup-init."""

import os
import shlex
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FAILPOINTS = ["-DNSSUP_FAILPOINTS"] if os.environ.get("NSSUP_FAILPOINTS") == "1" else []
STRICT = ["-std=gnu11", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror", *FAILPOINTS]
# -isystem: Python's own headers are not held to our warnings.
FLAGS = ["-O2", *STRICT, "-isystem", sysconfig.get_path("include")]
INIT_FLAGS = [
    *("-Os", *STRICT, "-ffreestanding", "-fno-builtin", "-fno-stack-protector", "-fno-pie"),
    *("-fno-asynchronous-unwind-tables", "-static", "-nostdlib", "-nostartfiles", "-s"),
    *("-Wl,--build-id=none", "-Wl,-z,noseparate-code"),
]


class BuildNative(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # time stamps do not see a changed flag, and they are small files

    def run(self) -> None:
        super().run()
        init = self.init_path()
        fresh = init.with_name("nssup-init.new")  # renamed over: the old one may be running
        compiler = os.environ.get("NSSUP_INIT_CC") or os.environ.get("CC") or "cc"
        self.spawn([*shlex.split(compiler), *INIT_FLAGS, "-o", str(fresh), "nssup/native/init.c"])
        fresh.replace(init)

    def init_path(self) -> Path:
        return Path(self.get_ext_fullpath("nssup._clone")).with_name("nssup-init")

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self.init_path())]


def extension(name: str) -> Extension:
    made = Extension(f"nssup._{name}", [f"nssup/native/{name}.c"], py_limited_api=True)
    made.define_macros = [("Py_LIMITED_API", "0x030b0000")]
    made.extra_compile_args = FLAGS
    return made


setup(
    ext_modules=[extension(name) for name in ("clone", "frame", "pidfd")],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
