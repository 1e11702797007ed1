"""The service manager above us, as systemd's protocols have it: what we tell it, and what it keeps and gives us.

Source: sd_notify(3), sd_pid_notify_with_fds(3), sd_listen_fds(3), sd_watchdog_enabled(3), systemd.exec(5).
"""

import array
import contextlib
import os
import select
import socket
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

from nssup.sockets import Spare

# What it tells us is ours: no worker is to inherit it, and to answer in our name.
VARIABLES = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "FDSTORE",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDNAMES",
)
# These hold as long as the process, also after an exec; descriptors are passed once.
LASTING = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE")
CONTROL = "nssup-control"  # the name of the control socket among the descriptors it keeps for us
_SOCKET = "nssup-socket."  # how the names of workers' sockets begin there
FIRST_FD = 3
PATIENCE = 1000  # milliseconds that it may keep us waiting, when its queue is full
_SOCK_TYPE = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK


class Given(NamedTuple):
    """A descriptor that we were started with. name: `unknown` where it has none."""

    name: str
    fd: int


def stored_name(spare: Spare) -> str:
    """What a worker's socket is called among the descriptors that it keeps for us."""
    return f"{_SOCKET}{spare.name}" + (f".{spare.worker}" if spare.worker else "")


def spare_of(given: Given) -> Spare:
    """A socket that it kept for us; or one that it has made itself, by FileDescriptorName= of its unit."""
    if not given.name.startswith(_SOCKET):
        return Spare(given.fd, given.name, any_address=True, made=False)
    name, _, worker = given.name.removeprefix(_SOCKET).partition(".")
    return Spare(given.fd, name, worker)


class Manager:
    """Whoever listens at NOTIFY_SOCKET; nobody when there is none, and then telling does nothing.

    watchdog_seconds: it wants to hear of us at least that often; None: it does not. keeps_fds: it offers to keep
    descriptors over our death. environment: the variables that told us, for whoever comes after us in this process.
    """

    def __init__(self, environment: dict[str, str], host_pid: int) -> None:
        self.environment = environment
        self.watchdog_seconds = _watchdog(environment, host_pid)
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self.keeps_fds = bool(self._address) and _number(environment.get("FDSTORE", "")) > 0
        self._socket: socket.socket | None = None

    @property
    def listens(self) -> bool:
        return bool(self._address)

    def tell(self, *lines: str, fds: Sequence[int] = (), patient: bool = True) -> None:
        """One message of NAME=VALUE lines, with descriptors to keep. A manager that is gone or deaf is no error.

        patient: wait, but not for long, until there is room for it.
        """
        if not self._address:
            return
        with contextlib.suppress(OSError):
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, _SOCK_TYPE)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            data = "\n".join(lines).encode("utf-8", "replace")
            try:
                self._socket.sendmsg([data], rights, 0, self._address)
            except BlockingIOError:
                if not patient:
                    return
                room = select.poll()
                room.register(self._socket, select.POLLOUT)
                room.poll(PATIENCE)
                self._socket.sendmsg([data], rights, 0, self._address)

    def keep(self, name: str, fd: int) -> None:
        """Have it keep a copy of fd for the next of us, if it offers that."""
        if self.keeps_fds:
            self.tell("FDSTORE=1", f"FDNAME={name}", fds=[fd])

    def forget(self, name: str) -> None:
        if self.keeps_fds:
            self.tell("FDSTOREREMOVE=1", f"FDNAME={name}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def take(environ: MutableMapping[str, str], host_pid: int) -> tuple[Manager, list[Given]]:
    """The manager that environ tells of, and the descriptors it passed; environ tells of neither any more.

    host_pid: of this process; what was meant for another one is not for us.
    """
    found = {name: environ.pop(name) for name in VARIABLES if name in environ}
    return Manager({name: found[name] for name in LASTING if name in found}, host_pid), _given(found, host_pid)


def _given(found: dict[str, str], host_pid: int) -> list[Given]:
    count = _number(found.get("LISTEN_FDS", ""))
    if _number(found.get("LISTEN_PID", "")) != host_pid:
        return []
    names = found.get("LISTEN_FDNAMES", "").split(":")
    given = []
    for number in range(count):
        name = names[number] if number < len(names) and names[number] else "unknown"
        with contextlib.suppress(OSError):
            os.set_inheritable(FIRST_FD + number, False)
            given.append(Given(name, FIRST_FD + number))
    return given


def _address(text: str) -> str:
    """A path, or an abstract name behind a NUL byte; empty for kinds that are no Unix sockets."""
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else ""


def _watchdog(environment: dict[str, str], host_pid: int) -> float | None:
    usec = _number(environment.get("WATCHDOG_USEC", ""))
    meant = environment.get("WATCHDOG_PID")
    if usec <= 0 or (meant is not None and _number(meant) != host_pid):
        return None
    return usec / 1e6


def _number(text: str) -> int:
    """0 for what is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
