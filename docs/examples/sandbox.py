"""A sandbox for generated code: `python sandbox.py [--user NAME] < CODE`.

Runs Python code that nobody has read: in PID, mount, UTS, IPC and network namespaces of its own (so without a network),
with limits on time, memory, processes, files and output. However it behaves, it is gone when the verdict is there.
Namespaces alone keep no file from being read or written: as root, name a user that may do neither.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, dataclass

import nssup

MEMORY = 256 << 20
LIMITS: dict[str, tuple[int | None, int | None]] = {
    "data": (MEMORY, MEMORY),
    "cpu": (5, 6),
    "nproc": (64, 64),
    "nofile": (64, 64),
    "fsize": (1 << 20, 1 << 20),
    "core": (0, 0),
}


@dataclass
class Verdict:
    """how: `ok`, `failed`, `late`, `killed`."""

    how: str
    output: str
    errors: str
    reason: str


async def judge(code: str, seconds: float = 5.0, user: str | None = None) -> Verdict:
    """Runs the code and says what became of it."""
    result: nssup.Result[str] | nssup.Result[bytes]
    how = ""
    try:
        result = await nssup.run(
            [sys.executable, "-I", "-c", code],
            encoding="utf-8",
            errors="replace",
            env={"PATH": "/usr/bin:/bin", "HOME": "/", "LANG": "C.UTF-8"},
            directory="/",
            namespaces=("pid", "mount", "uts", "ipc", "net"),
            hostname="sandbox",
            user=user,
            rlimits=LIMITS,
            max_output="64K",
            timeout=seconds,
        )
    except nssup.RunTimeout as late:
        result, how = late.result, "late"
    how = how or ("ok" if result.returncode == 0 else "killed" if result.exit.signal else "failed")
    return Verdict(how, str(result.stdout), str(result.stderr), result.exit.reason)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="runs code that nobody has read")
    parser.add_argument("--user")
    print(json.dumps(asdict(asyncio.run(judge(sys.stdin.read(), user=parser.parse_args().user))), indent=1))
