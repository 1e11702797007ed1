"""What config asks of this machine, answered when asked: users, groups, environment, capabilities, limits, files.

Nothing is read or imported before it is needed (pathlib neither): most configs name no user, and starting up must stay
quick.
"""

import functools
import os

from nssup import config
from nssup.errors import ExitCode, Problem, SpecError
from nssup.spec import User

# include/uapi/linux/capability.h
CAPABILITIES = {"NET_BIND_SERVICE": 10, "SETGID": 6, "SETUID": 7, "SYS_ADMIN": 21, "SYS_RESOURCE": 24}
RLIMIT_LOCKS = 10  # asm-generic/resource.h; the resource module does not know it


class Host:
    """The real config.Facts. Answers may be remembered: make a new one for each reading of a config."""

    @functools.cached_property
    def uid(self) -> int:
        return os.geteuid()

    @functools.cached_property
    def gid(self) -> int:
        return os.getegid()

    @functools.cached_property
    def groups(self) -> tuple[int, ...]:
        return tuple(sorted(set(os.getgroups())))

    @functools.cached_property
    def directory(self) -> str:
        try:
            return os.getcwd()
        except OSError:  # it has been removed
            return "/"

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def user(self, name: str) -> User | None:
        import pwd  # only configs that name users pay for it

        try:
            entry = pwd.getpwnam(name)
        except (KeyError, UnicodeError, ValueError):
            try:
                entry = pwd.getpwuid(int(name) if name.isascii() else -1)
            except (KeyError, ValueError, OverflowError):
                return None
        return User(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir, entry.pw_shell)

    def group(self, name: str) -> int | None:
        import grp  # as pwd

        try:
            return grp.getgrnam(name).gr_gid
        except (KeyError, UnicodeError, ValueError):
            return None

    def groups_of(self, user: User) -> tuple[int, ...]:
        return tuple(sorted(set(os.getgrouplist(user.name, user.gid))))

    def capable(self, capability: str) -> bool:
        return bool(self._capabilities >> CAPABILITIES[capability] & 1)

    @functools.cached_property
    def _capabilities(self) -> int:
        with open("/proc/self/status") as status:
            return next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)

    def hard_limit(self, resource: str) -> int | None:
        import resource as limits  # only configs that set limits pay for it

        number = RLIMIT_LOCKS if resource == "locks" else getattr(limits, f"RLIMIT_{resource.upper()}")
        hard = limits.getrlimit(number)[1]
        return None if hard == limits.RLIM_INFINITY else hard

    def lowest_port(self) -> int:
        with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as setting:
            return int(setting.read())

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def is_directory(self, path: str) -> bool:
        return os.path.isdir(path)

    def is_executable(self, path: str) -> bool:
        return os.path.isfile(path) and os.access(path, os.X_OK, effective_ids=True)


class Anywhere(Host):
    """A machine on which a config may run, whatever users and rights it asks for: for who asks what would happen."""

    def user(self, name: str) -> User | None:
        return super().user(name) or User(name, 65534, 65534, "/", "/bin/sh")

    def group(self, name: str) -> int | None:
        found = super().group(name)
        return 65534 if found is None else found

    def groups_of(self, user: User) -> tuple[int, ...]:
        return ()

    def capable(self, capability: str) -> bool:
        return True

    def hard_limit(self, resource: str) -> int | None:
        return None

    def exists(self, path: str) -> bool:
        return True

    def is_directory(self, path: str) -> bool:
        return True

    def is_executable(self, path: str) -> bool:
        return True


def read(pattern: str, relative_to: str) -> list[tuple[str, bytes]]:
    """config.Read on the real files."""
    path = os.path.normpath(os.path.join(os.path.dirname(relative_to), pattern))
    if not any(wildcard in pattern for wildcard in "*?["):
        try:
            return [(path, _bytes(path))]
        except FileNotFoundError:
            return []
    from glob import glob  # costs a millisecond, and most configs include nothing

    return [(name, _bytes(name)) for name in sorted(glob(path)) if os.path.isfile(name)]


def _bytes(name: str) -> bytes:
    with open(name, "rb") as file:
        return file.read()


def load(name: str, facts: config.Facts | None = None) -> config.Config:
    """The config in the file `name`. Raises SpecError, also when it cannot be read."""
    return config.parse(name, _main_file(name), read, facts or Host())


def check(name: str, facts: config.Facts | None = None) -> tuple[list[str], ExitCode]:
    """What `nssup check FILE` prints, and its exit code."""
    try:
        data = _main_file(name)
    except SpecError as error:
        return [str(problem) for problem in error.problems], error.exit_code
    return config.check(name, data, read, facts or Host())


def find(named: str | None, facts: config.Facts | None = None) -> str:
    """The config file to use: the one named, or the first that is there. Raises SpecError when there is none."""
    facts = facts or Host()
    found = named or config.find_config(facts)
    if found is None:
        places = ", ".join(config.searched(facts))
        raise SpecError(Problem("", 0, 0, "", f"no config file: looked for {places}; name one with -c FILE"))
    return found


def _main_file(name: str) -> bytes:
    try:
        return _bytes(name)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SpecError(Problem(name, 0, 0, "", f"cannot be read: {why[:1].lower()}{why[1:]}")) from None
