from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, LoopFactory]:
    factories: dict[str, LoopFactory] = {"uvloop": uvloop.new_event_loop}
    if item.get_closest_marker("both_loops"):
        factories["asyncio"] = asyncio.new_event_loop
    return factories


def open_fds() -> set[tuple[int, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:  # the listing's own
            continue
    return found


def child_processes() -> set[str]:
    found: set[str] = set()
    for children in Path("/proc/self/task").glob("*/children"):
        try:
            found.update(children.read_text().split())
        except OSError:  # the thread is gone
            continue
    return found


def named(host_pid: str) -> str:
    try:
        status = Path(f"/proc/{host_pid}/status").read_text().splitlines()
    except OSError:
        return host_pid
    fields = dict(line.partition(":\t")[::2] for line in status)
    return f"{host_pid} ({fields['Name']}, {fields['State']})"


@pytest.fixture(scope="session")
def warm_loops() -> None:
    """libuv opens its process-wide fds with the first loop and keeps them: that is no leak of the first test."""
    for factory in (uvloop.new_event_loop, asyncio.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.sleep(0))


@pytest.fixture(autouse=True)
def fds(warm_loops: None) -> Iterator[None]:
    """Fails a test that leaves a file descriptor open or a child process behind."""
    fds_before, children_before = open_fds(), child_processes()
    yield
    if open_fds() - fds_before or child_processes() - children_before:
        gc.collect()  # what only waits for the collector is no leak
    leaked = sorted(f"open fd {fd} -> {target}" for fd, target in open_fds() - fds_before)
    left = sorted(f"child process {named(host_pid)}" for host_pid in child_processes() - children_before)
    if leaked or left:
        pytest.fail("the test left behind: " + ", ".join(leaked + left), pytrace=False)
