"""A CI-like runner: `python ci.py JOBS.toml [--at-once N]` runs jobs with limits and time-outs, and says how each went.

    [job.lint]
    command = "ruff check ."
    timeout = 60.0

    [job.tests]
    command = "pytest -q"
    needs = ["lint"]
    memory = "2G"

Each job is in namespaces of its own: what it leaves running ends with it, and so does one that hangs. A job whose needs
have failed is skipped. Exit code 1 when one did not pass.
"""

import argparse
import asyncio
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import nssup
from nssup.units import size

LINES = 10  # of what a job wrote, shown when it failed


class Runner:
    """Runs jobs, each as soon as those that it needs have passed."""

    def __init__(self, jobs: dict[str, dict[str, Any]], at_once: int) -> None:
        self._jobs = jobs
        self._room = asyncio.Semaphore(at_once)
        self._over = {name: asyncio.Event() for name in jobs}
        self.results: dict[str, str] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name in self._jobs:
                group.create_task(self._job(name))

    async def _job(self, name: str) -> None:
        job = self._jobs[name]
        for needed in job.get("needs", []):
            await self._over[needed].wait()
        if any(self.results[needed] != "passed" for needed in job.get("needs", [])):
            self.results[name] = "skipped"
        else:
            async with self._room:
                self.results[name] = await self._attempt(name, job)
        self._over[name].set()

    async def _attempt(self, name: str, job: dict[str, Any]) -> str:
        start = time.monotonic()
        memory = size(job["memory"]) if "memory" in job else None
        try:
            result: nssup.Result[str] = await nssup.run(
                job["command"],
                encoding="utf-8",
                errors="replace",
                stderr="stdout",
                timeout=job.get("timeout", 600.0),
                rlimits={"data": (memory, memory), "core": (0, 0)},
            )
            outcome, output = ("passed" if result.returncode == 0 else result.exit.reason), result.stdout
        except nssup.RunTimeout as late:
            outcome, output = "timed out", str(late.result.stdout)
        except nssup.LaunchError as error:
            outcome, output = "not started", str(error)
        print(f"{name}: {outcome} after {time.monotonic() - start:.1f} s", flush=True)
        if outcome != "passed":
            print("".join(f"  | {line}\n" for line in output.splitlines()[-LINES:]), end="", flush=True)
        return outcome


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description="runs jobs with limits and time-outs")
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--at-once", type=int, default=4)
    arguments = parser.parse_args(args)
    runner = Runner(tomllib.loads(arguments.jobs.read_text())["job"], arguments.at_once)
    asyncio.run(runner.run())
    passed = sum(result == "passed" for result in runner.results.values())
    print(f"{passed} of {len(runner.results)} passed")
    return 0 if passed == len(runner.results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
