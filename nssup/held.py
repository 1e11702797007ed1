"""Listening sockets that a supervisor holds for its workers: taken over from whoever has them, else bound.

Each is held once, whoever has copies: the workers' programs, and their inits, from which the next supervisor takes them
when this one dies. So nobody who connects is refused while any of them lives. They block, as systemd's do: a program
that wants it otherwise says so, for all that share the socket. Source: socket(7), ip(7), unix(7), sd_listen_fds(3).
"""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from typing import NamedTuple

from nssup.address import Address
from nssup.errors import ControlError, ExitCode
from nssup.sockets import Key, Spare, Wanted
from nssup.spec import SocketSpec

_FAMILIES = {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}
_IPV6_PROTOCOL = 41
_HINTS = {
    errno.EADDRINUSE: "another program listens there: `ss -lntup` shows which",
    errno.EADDRNOTAVAIL: "no network interface of this host has that address",
    errno.EEXIST: "move it away, or choose another path",
    errno.EACCES: "it has not the right: ports below 1024 take CAP_NET_BIND_SERVICE, a path takes its directory",
    errno.EPERM: "it has not the right to give the file to that user or group",
}


class Listed(NamedTuple):
    """A socket as others see it. address: as bound. worker: whose alone it is, "" if it is shared."""

    name: str
    address: str
    worker: str


class _Held:
    __slots__ = ("address", "file", "made", "others", "pools", "sock")

    def __init__(self, wanted: Wanted, sock: socket.socket, made: bool, others: bool) -> None:
        self.sock = sock
        self.made = made
        self.others = others  # whether somebody else may have it too
        self.address = str(bound_address(sock) or wanted.address)
        self.pools: set[str] = set()
        self.file = (
            (wanted.address.place, _identity(wanted.address.place)) if made and wanted.address.kind == "unix" else None
        )

    def close(self, keep_file: bool = False) -> None:
        """Removes its file, if that is still the one made for it. keep_file: not if others may listen there."""
        keep = keep_file and self.others
        if self.file is not None and not keep and None is not self.file[1] == _identity(self.file[0]):
            with contextlib.suppress(OSError):
                os.unlink(self.file[0])
        self.sock.close()


class Sockets:
    """The sockets of one supervisor. spares: descriptors that others left for it; what nobody wants is closed."""

    def __init__(self, spares: Iterable[Spare] = ()) -> None:
        self._spares = list(spares)
        self._held: dict[Key, _Held] = {}

    # --- having ------------------------------------------------------------------------------------------------------

    def open(
        self,
        pool: str,
        wanted: Iterable[Wanted],
        owner: Callable[[Wanted], tuple[int, int]],
        kept: Callable[[], Generator[tuple[str, int], None, None]] | None = None,
    ) -> None:
        """Have all that a pool wants: what is held, else what others left, else bound.

        owner: (uid, gid) for the file of one, -1 to leave it. kept: (worker id, copy of a socket that its init keeps),
        each ours; asked only when something is missing.
        Raises Unusable naming the socket, OSError when copies cannot be had; then nothing that was not held before is.
        """
        wanted = list(wanted)
        missing = [each for each in wanted if each.key not in self._held]
        new: list[Key] = []
        try:
            for each in missing:
                self._take_spare(each, new)
            missing = [each for each in missing if each.key not in self._held]
            if missing and kept is not None:
                with contextlib.closing(kept()) as copies:
                    self._take_kept(missing, copies, new)
            for each in missing:
                if each.key not in self._held:
                    self._add(each, _bound(each, owner(each)), new, others=False)
        except BaseException:
            for key in new:
                self._held.pop(key).close(keep_file=True)
            raise
        for each in wanted:
            self._held[each.key].pools.add(pool)

    def _add(
        self, wanted: Wanted, sock: socket.socket, new: list[Key], *, others: bool = True, made: bool = True
    ) -> None:
        if others and made and sock.type == socket.SOCK_STREAM:
            sock.listen(wanted.spec.backlog)  # it may be another one now
        self._held[wanted.key] = _Held(wanted, sock, made, others)
        new.append(wanted.key)

    def _take_spare(self, wanted: Wanted, new: list[Key]) -> None:
        for spare in [spare for spare in self._spares if spare.may_be(wanted)]:
            anywhere = spare.any_address or spare.listen is not None  # what it is, is known without its address
            sock = _taken(spare.fd, wanted, anywhere=anywhere)
            if sock is not None:
                self._spares.remove(spare)
                self._add(wanted, sock, new, made=spare.made)
                return

    def _take_kept(self, missing: Collection[Wanted], kept: Iterator[tuple[str, int]], new: list[Key]) -> None:
        left = {each.key for each in missing}
        of_worker: dict[str, list[Wanted]] = {}
        for each in missing:
            of_worker.setdefault(each.key.worker, []).append(each)
        alone: dict[Address | None, Wanted] = {each.address: each for each in missing if _is_alone(each)}
        for worker, fd in kept:
            there = alone.get(_address_of(fd))
            for each in [*of_worker.get(worker, ()), *of_worker.get("", ()), *([there] if there else ())]:
                sock = _taken(fd, each) if each.key in left else None
                if sock is not None:
                    self._add(each, sock, new)
                    left.remove(each.key)
                    break
            else:
                os.close(fd)
            if not left:
                return

    def hold_rest(self, pool: str, kept: Iterable[tuple[str, int]]) -> None:
        """Hold copies of what a pool has that is on its way out, but for what is held already: so the file of a socket
        goes with the last of its workers."""
        there = {os.fstat(held.sock.fileno()).st_ino for held in self._held.values()}
        for _, fd in kept:
            sock = None if os.fstat(fd).st_ino in there else _opened(fd)
            at = None if sock is None else bound_address(sock)
            if sock is None or at is None or at.kind != "unix":
                os.close(fd if sock is None else sock.detach())
                continue
            there.add(os.fstat(fd).st_ino)
            key = Key("", str(at), pool)
            self._held[key] = _Held(Wanted(key, SocketSpec(name="", listen=()), at), sock, made=True, others=True)
            self._held[key].pools.add(pool)

    def descriptors(self, wanted: Iterable[Wanted]) -> tuple[int, ...]:
        """Of sockets that are held, ours; for somebody who gets copies."""
        found = [self._held[each.key] for each in wanted]
        for held in found:
            held.others = True
        return tuple(held.sock.fileno() for held in found)

    def has(self, wanted: Iterable[Wanted]) -> bool:
        return all(each.key in self._held for each in wanted)

    def listed(self, pool: str) -> list[Listed]:
        return [
            Listed(key.name, held.address, key.worker)
            for key, held in self._held.items()
            if pool in held.pools and key.name
        ]

    # --- letting go --------------------------------------------------------------------------------------------------

    def close_spares(self) -> None:
        """All is there that was wanted: what else was left to us is nobody's any more."""
        while self._spares:
            _drop(self._spares.pop())

    def close_worker(self, worker: str) -> None:
        """The worker is forgotten."""
        for key in [key for key in self._held if key.worker == worker]:
            self._held.pop(key).close()

    def close_pool(self, pool: str) -> None:
        """The pool is no more."""
        for key, held in list(self._held.items()):
            held.pools.discard(pool)
            if not held.pools:
                self._held.pop(key).close()

    def close(self, *, keep_files: bool) -> None:
        """keep_files: others still listen."""
        while self._held:
            self._held.popitem()[1].close(keep_files)
        while self._spares:
            os.close(self._spares.pop().fd)

    def left(self) -> list[Spare]:
        """All that are held, for whoever is to have them next; the descriptors stay ours."""
        return [
            Spare(held.sock.fileno(), key.name, key.worker, key.listen, made=held.made)
            for key, held in self._held.items()
        ]

    def pass_on(self) -> list[Spare]:
        """As `left`, and they are the caller's from here on."""
        spares = self.left()
        for held in self._held.values():
            held.sock.detach()
        self._held.clear()
        return spares


# --- one socket ------------------------------------------------------------------------------------------------------


def bound_address(sock: socket.socket) -> Address | None:
    """Where a socket is bound; None for kinds that are none of ours."""
    if sock.family not in _FAMILIES or sock.type not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        return None
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        is_path = isinstance(name, str) and name.startswith("/")
        return Address("unix", name) if is_path and sock.type == socket.SOCK_STREAM else None
    return Address("tcp" if sock.type == socket.SOCK_STREAM else "udp", *name[:2])


def _taken(fd: int, wanted: Wanted, *, anywhere: bool = False) -> socket.socket | None:
    """The socket in fd, ours from here on, if it is what is wanted; else None, and fd is as before."""
    sock = _opened(fd)
    if sock is None:
        return None
    try:
        if _listens(sock) and (anywhere or _fits(sock, wanted.address)):
            return sock
    except OSError:
        pass
    sock.detach()
    return None


def _opened(fd: int) -> socket.socket | None:
    """None when it is no socket; then it is still the caller's."""
    try:
        return socket.socket(fileno=fd)
    except OSError:
        return None


def _address_of(fd: int) -> Address | None:
    sock = _opened(fd)
    if sock is None:
        return None
    try:
        return bound_address(sock)
    finally:
        sock.detach()


def _drop(spare: Spare) -> None:
    sock = _opened(spare.fd)
    if sock is None:
        os.close(spare.fd)
        return
    with sock:
        at = bound_address(sock)
        if spare.made and at is not None and at.kind == "unix":
            with contextlib.suppress(OSError):
                os.unlink(at.place)


def _is_alone(wanted: Wanted) -> bool:
    """Whether no other socket can have its address: then whoever has that has this one."""
    return not wanted.spec.reuse_port and (wanted.address.kind == "unix" or wanted.address.port != 0)


def _listens(sock: socket.socket) -> bool:
    return sock.type == socket.SOCK_DGRAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


def _fits(sock: socket.socket, wanted: Address) -> bool:
    """Whether it is bound there, and can be reached there."""
    at = bound_address(sock)
    if at is None or at.kind != wanted.kind:
        return False
    if at.kind == "unix":
        return at.place == wanted.place and stat.S_ISSOCK(os.lstat(at.place).st_mode)
    same_port = wanted.port in (0, at.port)
    return at.is_v6 == wanted.is_v6 and same_port and _packed(at) == _packed(wanted)


def _packed(address: Address) -> bytes:
    family = socket.AF_INET6 if address.is_v6 else socket.AF_INET
    return socket.inet_pton(family, address.place.partition("%")[0])


def _bound(wanted: Wanted, owner: tuple[int, int]) -> socket.socket:
    """A new one. Raises Unusable."""
    address, spec = wanted.address, wanted.spec
    try:
        if address.kind == "unix":
            return _bound_to_path(address.place, spec.mode, owner, spec.backlog)
        return _bound_to_port(address, spec.reuse_port, spec.backlog)
    except OSError as error:
        raise Unusable(wanted, error) from None


class Unusable(ControlError):
    """A socket is not to be had. errno: why."""

    def __init__(self, wanted: Wanted, error: OSError) -> None:
        self.errno = error.errno or errno.EIO
        super().__init__(
            "socket-unusable",
            f"socket {wanted.key.name}: cannot listen at {wanted.address}: {error.strerror or error}",
            hint=_HINTS.get(self.errno, ""),
            exit_code=ExitCode.FAILED,
        )


def _bound_to_port(address: Address, reuse_port: bool, backlog: int) -> socket.socket:
    family = socket.AF_INET6 if address.is_v6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if address.kind == "tcp" else socket.SOCK_DGRAM)
    try:
        if address.kind == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if address.is_v6:  # who wants both says so, and can then
            sock.setsockopt(_IPV6_PROTOCOL, socket.IPV6_V6ONLY, 1)
        (*_, place), *_ = socket.getaddrinfo(
            address.place, address.port, family, sock.type, flags=socket.AI_NUMERICHOST
        )
        sock.bind(place)
        if address.kind == "tcp":
            sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _bound_to_path(path: str, mode: int, owner: tuple[int, int], backlog: int) -> socket.socket:
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    _make_room(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made = False
    try:
        os.fchmod(sock.fileno(), 0o600 & mode)  # what its file is made with: never open to others before it is theirs
        sock.bind(path)
        made = True
        _give(path, mode, owner)
        sock.listen(backlog)
    except BaseException:
        if made:
            os.unlink(path)
        sock.close()
        raise
    return sock


def _give(path: str, mode: int, owner: tuple[int, int]) -> None:
    """By descriptor: who may write the directory must not have us open another file to somebody."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.ESTALE, "somebody replaced its file")
        os.chown(f"/proc/self/fd/{fd}", *owner)
        os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


def _make_room(path: str) -> None:
    """Removes the file of a socket on which nobody listens, and nothing else."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(there.st_mode):
        raise OSError(errno.EEXIST, "there is something that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(path)
    if code == errno.ECONNREFUSED:
        os.unlink(path)
    elif code != errno.ENOENT:  # EAGAIN: its queue is full, so it is alive
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _identity(path: str) -> tuple[int, int] | None:
    """Device and inode of what is at path now."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
