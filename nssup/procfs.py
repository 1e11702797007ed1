"""What /proc tells of a process by its host PID. Every answer is None when the process is not there (any more).

A host PID can be recycled between two reads; callers ask about processes that they hold unreaped, or treat the answer
as display only. Source: proc(5).
"""

import os
import signal
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LARGEST_TREE = 10_000
_NAMESPACE_FILES = {"mount": "mnt"}


class Stat(NamedTuple):
    parent_host_pid: int
    cpu_seconds: float
    memory_bytes: int


def stat(host_pid: int) -> Stat | None:
    """Parent, CPU time of the process and its reaped children, resident memory."""
    try:
        with open(f"/proc/{host_pid}/stat", "rb") as file:
            data = file.read()
    except OSError:
        return None
    fields = data[data.rindex(b")") + 2 :].split()  # a name may hold anything, also ") "
    ticks = sum(int(field) for field in fields[11:15])
    return Stat(int(fields[1]), ticks / _TICKS, int(fields[21]) * _PAGE)


def drops(host_pid: int, signo: int) -> bool:
    """Whether the kernel drops the signal that is sent to the process, the PID 1 of a namespace: it is neither caught
    nor blocked. SIGKILL and SIGSTOP from outside never are."""
    if signo in (signal.SIGKILL, signal.SIGSTOP):
        return False
    try:
        with open(f"/proc/{host_pid}/status", "rb") as file:
            status = dict(line.split(b":", 1) for line in file.read().splitlines() if b":" in line)
    except OSError:
        return False
    heard = int(status.get(b"SigCgt", b"0"), 16) | int(status.get(b"SigBlk", b"0"), 16)
    return not heard >> (signo - 1) & 1


class Process(NamedTuple):
    """One process of a worker's tree. ns_pid: in the innermost PID namespace that it is in."""

    host_pid: int
    ns_pid: int
    parent_host_pid: int
    threads: int
    command: str
    cpu_seconds: float
    memory_bytes: int


def process(host_pid: int) -> Process | None:
    seen = stat(host_pid)
    try:
        with open(f"/proc/{host_pid}/status", "rb") as file:
            status = dict(line.split(b":", 1) for line in file.read().splitlines() if b":" in line)
        with open(f"/proc/{host_pid}/cmdline", "rb") as file:
            command = file.read().rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return None
    if seen is None:
        return None
    numbers = status.get(b"NSpid", b"0").split()
    command = command or f"[{status[b'Name'].strip().decode('utf-8', 'replace')}]"
    if status.get(b"State", b"").split()[:1] == [b"Z"]:
        command += " <defunct>"
    threads = int(status.get(b"Threads", b"1"))
    return Process(
        host_pid, int(numbers[-1]), seen.parent_host_pid, threads, command, seen.cpu_seconds, seen.memory_bytes
    )


def tree(root_host_pid: int) -> list[Process]:
    """The process and all its descendants, parents before children, children by age."""
    found: list[Process] = []
    todo = [root_host_pid]
    while todo and len(found) < _LARGEST_TREE:
        one = process(todo.pop())
        if one is not None:
            found.append(one)
            todo += reversed(children(one.host_pid))
    return found


def children(host_pid: int) -> list[int]:
    """Host PIDs of the children of all its threads; none where the kernel does not tell (CONFIG_PROC_CHILDREN)."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{host_pid}/task"):
            with open(f"/proc/{host_pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    except OSError:
        pass
    return sorted(found)


def namespace_ids(host_pid: int | str, names: tuple[str, ...]) -> dict[str, int]:
    """The inode numbers that identify the namespaces; those that cannot be read are left out."""
    found = {}
    for name in names:
        try:
            found[name] = os.stat(f"/proc/{host_pid}/ns/{_NAMESPACE_FILES.get(name, name)}").st_ino
        except OSError:
            continue
    return found


def pid_namespace(host_pid: int | str) -> int | None:
    """What identifies the PID namespace that the process lives in; None also where we may not ask. `self`: ours."""
    return namespace_ids(host_pid, ("pid",)).get("pid")


def ancestor_among(host_pid: int, wanted: dict[int, str]) -> str | None:
    """The value of the nearest ancestor-or-self of host_pid that is a key of wanted.

    Every process of a PID namespace descends from its init, whatever it forked and orphaned in between.
    """
    seen = 0
    while host_pid > 1 and seen < 4096:
        if host_pid in wanted:
            return wanted[host_pid]
        found = stat(host_pid)
        if found is None:
            return None
        host_pid = found.parent_host_pid
        seen += 1
    return None
