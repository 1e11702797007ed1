"""What /proc tells of a process by its host PID. Every answer is None when the process is not there (any more).

A host PID can be recycled between two reads; callers ask about processes that they hold unreaped, or treat the answer
as display only. Source: proc(5).
"""

import os
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
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
