"""TOML texts and host facts -> specs, or every problem of the whole config at once, each with its line.

Pure: files come through `read`; users, directories and the environment through `facts`. The keys and their values are
keys.py's, rules between keys spec.problems', positions locate's (worked out only when a message needs one).
"""

import posixpath
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec

from nssup import __version__, dependencies, document, envfile, keys, sockets
from nssup.document import Document, Table
from nssup.errors import ExitCode, Problem, SpecError
from nssup.locate import Path, dotted, quoted
from nssup.record import DEFAULT_PATH, Identity, candidates
from nssup.spec import ControlSpec, PoolSpec, SocketSpec, SupervisorSpec, User, expand, problems

Read = Callable[[str, str], list[tuple[str, bytes]]]

SOCKET_PATH_BYTES = 107  # sun_path of unix(7) is 108 with its NUL
LARGEST_ID = (1 << 32) - 2  # -1 means "unchanged" to setuid(2)
NOBODYS_GROUP = -1  # of a user who is in no database
_DEEPEST_INCLUDE = 16


class Facts(Protocol):
    """What config asks of the host. facts.Host is the real one."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def groups(self) -> tuple[int, ...]:
        """Supplementary groups of this process."""

    @property
    def directory(self) -> str:
        """The working directory, absolute."""

    def variable(self, name: str) -> str | None:
        """An environment variable of this process."""

    def user(self, name: str) -> User | None:
        """By name, or by number as text."""

    def group(self, name: str) -> int | None:
        """The gid of the group of that name."""

    def groups_of(self, user: User) -> tuple[int, ...]:
        """The supplementary groups that a login of user would have."""

    def capable(self, capability: str) -> bool:
        """Whether this process has an effective capability, such as "SETUID"."""

    def hard_limit(self, resource: str) -> int | None:
        """This process's hard limit (a name of spec.RLIMITS), None for unlimited."""

    def lowest_port(self) -> int:
        """The lowest port that needs no right to be listened at."""

    def exists(self, path: str) -> bool: ...
    def is_directory(self, path: str) -> bool: ...
    def is_executable(self, path: str) -> bool:
        """A file that this process may execute."""


class Config(msgspec.Struct, frozen=True):
    """A whole valid config. origins: ("pool", "web", "workers") -> the "file:line" that says so."""

    supervisor: SupervisorSpec
    pools: dict[str, PoolSpec]
    origins: Mapping[Path, str]
    warnings: tuple[Problem, ...] = ()


def parse(name: str, data: bytes, read: Read, facts: Facts) -> Config:
    """The config whose main file is `name`, with the bytes data.

    read(pattern, relative_to) gives (name, bytes) of the files that match pattern, seen from the file relative_to,
    sorted; none when there are none; raises OSError when one cannot be read.
    Raises SpecError, and nothing else, with every problem found, sorted by file and position.
    """
    reading = _Reading(read)
    main = reading.open(name, data)
    if main is None or not _understood(reading, main, required=True):
        raise reading.refusal()
    reading.defaults = _section(reading, main, "defaults")
    _take(reading, main, main, chain=())
    supervisor = _supervisor(reading, main, facts)
    for path, why in keys.convert(keys.POOL, reading.defaults)[1]:
        reading.blame(main, ("defaults", *path), why)
    for each in reading.sockets.values():
        _socket(reading, each, facts)
    specs = [_pool(reading, pool, facts) for pool in reading.pools.values()]
    _between(reading, specs)
    if reading.problems:
        raise reading.refusal()
    warnings = {warning for spec in specs for warning in _warnings(reading.pools[spec.name], spec, facts)}
    warnings |= {
        warning for each in reading.sockets.values() for warning in _socket_warnings(reading, each, specs, facts)
    }
    return Config(supervisor, {spec.name: spec for spec in specs}, _Origins(reading, main), tuple(sorted(warnings)))


def _between(reading: "_Reading", specs: list[PoolSpec]) -> None:
    """What is wrong with pools that are right by themselves goes to reading."""
    for name, needed, why in dependencies.problems({spec.name: spec for spec in specs}):
        reading.blame_pool(reading.pools[name], ("requires", needed), why)
    for clash in sockets.clashes(specs) if not reading.problems else ():
        reading.blame_pool(reading.pools[clash.pool], ("sockets", clash.number), clash.why)


def check(name: str, data: bytes, read: Read, facts: Facts) -> tuple[list[str], ExitCode]:
    """What `nssup check` prints, and its exit code. Warnings do not make a config bad."""
    try:
        config = parse(name, data, read, facts)
    except SpecError as error:
        return [str(problem) for problem in error.problems], error.exit_code
    workers = sum(pool.workers for pool in config.pools.values())
    ok = f"{name}: ok, {_counted(len(config.pools), 'pool')}, {_counted(workers, 'worker')}"
    return [*warning_lines(config), ok], ExitCode.OK


def warning_lines(config: Config) -> list[str]:
    """`FILE:LINE:COL: warning: key: what, and what to do`."""
    return [str(problem._replace(key=f"warning: {problem.key}")) for problem in config.warnings]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# --- where things are ------------------------------------------------------------------------------------------------


def searched(facts: Facts) -> list[str]:
    """Where a config is looked for when none is named, in order."""
    if named := facts.variable("NSSUP_CONFIG"):
        return [named]
    home = _home(facts)
    own = _absolute(facts.variable("XDG_CONFIG_HOME")) or (home and posixpath.join(home, ".config"))
    return ["nssup.toml", *([posixpath.join(own, "nssup/nssup.toml")] if own else []), "/etc/nssup/nssup.toml"]


def find_config(facts: Facts) -> str | None:
    """The config to use when none is named: what $NSSUP_CONFIG names, there or not; else the first that exists."""
    places = searched(facts)
    return places[0] if len(places) == 1 else next(filter(facts.exists, places), None)


def default_directories(facts: Facts, state_dir: str | None = None) -> dict[str, str]:
    """state_dir, runtime_dir, log_dir where not given; a key is missing when the host has no place for it.

    state_dir: the one that was given; the run-time directory then lies in it.
    """
    if facts.uid == 0:
        found = {"state_dir": "/var/lib/nssup", "runtime_dir": "/run/nssup", "log_dir": "/var/log/nssup"}
    else:
        found = _user_directories(facts)
    if state_dir is not None:
        found["state_dir"] = state_dir
    if "state_dir" in found and (state_dir is not None or "runtime_dir" not in found):
        found["runtime_dir"] = posixpath.join(found["state_dir"], "run")
    return found


def _user_directories(facts: Facts) -> dict[str, str]:
    """By the XDG Base Directory Specification; its variables count only when absolute."""
    found = {}
    home = _home(facts)
    if state := _absolute(facts.variable("XDG_STATE_HOME")) or (home and posixpath.join(home, ".local/state")):
        found["state_dir"] = posixpath.join(state, "nssup")
        found["log_dir"] = posixpath.join(state, "nssup/log")
    if runtime := _absolute(facts.variable("XDG_RUNTIME_DIR")):
        found["runtime_dir"] = posixpath.join(runtime, "nssup")
    return found


def _home(facts: Facts) -> str | None:
    if home := _absolute(facts.variable("HOME")):
        return home
    user = facts.user(str(facts.uid))
    return _absolute(user.home) if user else None


def _absolute(path: str | None) -> str | None:
    return path if path and path.startswith("/") else None


def _supervisor(reading: "_Reading", main: Document, facts: Facts) -> SupervisorSpec:
    """Its problems go to reading; what is returned then is of no use."""
    given, found = keys.convert(keys.SUPERVISOR, _section(reading, main, "supervisor"))
    for path, why in found:
        reading.blame(main, ("supervisor", *path), why)
    control = _control(reading, main, given.pop("control", {}), facts)
    base = posixpath.join(facts.directory, posixpath.dirname(main.name))
    given = {key: posixpath.normpath(posixpath.join(base, path)) for key, path in given.items()}
    places = default_directories(facts, given.get("state_dir")) | given
    for key in ("state_dir", "runtime_dir", "log_dir"):
        if key not in places:
            reading.blame(main, ("supervisor", key), "has no default, as neither HOME nor XDG_* is set: give it")
            places[key] = "/"
    places.setdefault("socket", posixpath.join(places["runtime_dir"], "nssup.sock"))
    length = len(places["socket"].encode("utf-8", "surrogateescape"))
    if length > SOCKET_PATH_BYTES:
        culprit = next((key for key in ("socket", "runtime_dir", "state_dir") if key in given), "socket")
        why = f"the socket's path would have {length} bytes, {SOCKET_PATH_BYTES} are possible: give a shorter one"
        reading.blame(main, ("supervisor", culprit), why)
    return SupervisorSpec(**places, control=control)


def _control(reading: "_Reading", main: Document, given: Table, facts: Facts) -> ControlSpec:
    """Who else may steer. Groups that are not there go to reading."""
    group, roles = given.get("group"), given.get("roles")
    named: list[tuple[Path, str]] = [(("group",), group)] if group is not None else []
    named += [(("roles", role, n), name) for role, names in (roles or {}).items() for n, name in enumerate(names)]
    for path, name in named:
        if gid(name, facts) is None:
            why = f"there is no group {quoted(name)} on this host: make it, or name another"
            reading.blame(main, ("supervisor", "control", *path), why)
    if roles is None:
        roles = {"operator": (group,)} if group is not None else {}
    return ControlSpec(group=group, **roles)


def gid(name: str, facts: Facts) -> int | None:
    """The group of that name or number."""
    found = facts.group(name)
    return _id(name) if found is None else found


# --- files -----------------------------------------------------------------------------------------------------------


class _Pool(NamedTuple):
    """[pool.NAME] as written. table: with the defaults merged in. elsewhere: places in env files."""

    name: str
    file: Document
    own: Table
    table: Table
    defaults: Document
    elsewhere: dict[Path, tuple[str, int, int]]

    def origin(self, path: Path) -> tuple[Document, Path]:
        """The file that says what holds for path, and the path there."""
        own: Any = self.own
        for depth, part in enumerate(path, 1):
            if not isinstance(own, dict):
                break
            if part not in own:
                default: Path = ("defaults", *path[:depth])
                if document.has(self.defaults.table, default):
                    return self.defaults, ("defaults", *path)
                break
            own = own[part]
        return self.file, ("pool", self.name, *path)

    def place(self, path: Path) -> tuple[str, int, int]:
        if path in self.elsewhere:
            return self.elsewhere[path]
        file, there = self.origin(path)
        return file.place(there)


class _Socket(NamedTuple):
    """[socket.NAME] as written."""

    name: str
    file: Document
    own: Table

    def place(self, path: Path) -> tuple[str, int, int]:
        return self.file.place(("socket", self.name, *path))


class _Reading:
    """What has been read of one config so far, and what is wrong with it."""

    def __init__(self, read: Read) -> None:
        self.read = read
        self.problems: set[Problem] = set()
        self.files: dict[str, Document] = {}
        self.pools: dict[str, _Pool] = {}
        self.sockets: dict[str, _Socket] = {}
        self.socket_specs: dict[str, SocketSpec] = {}  # those that are right
        self.defaults: Table = {}

    def refusal(self) -> SpecError:
        return SpecError(*sorted(self.problems))

    def blame(self, file: Document, path: Path, why: str) -> None:
        self.problems.add(Problem(*file.place(path), dotted(path), why))

    def blame_pool(self, pool: _Pool, path: Path, why: str) -> None:
        self.problems.add(Problem(*pool.place(path), dotted(("pool", pool.name, *path)), why))

    def open(self, name: str, data: bytes) -> Document | None:
        found = document.decode(name, data)
        if isinstance(found, Problem):
            self.problems.add(found)
            return None
        self.files[posixpath.normpath(name)] = found
        return found

    def bytes_of(self, file: Document, place: Path, pattern: str, optional: bool = False) -> list[tuple[str, bytes]]:
        """The files that pattern, written at place in file, means; none when that is a problem."""
        try:
            found = self.read(pattern, file.name)
        except FileNotFoundError:
            found = []
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.blame(file, place, f"cannot read {quoted(pattern)}: {why[:1].lower()}{why[1:]}")
            return []
        if not (found or optional or any(wildcard in pattern for wildcard in "*?[")):
            self.blame(file, place, f"there is no file {quoted(pattern)}: make it, or leave it out")
        return found


def _section(reading: _Reading, main: Document, name: str) -> Table:
    section = main.table.get(name, {})
    if isinstance(section, dict):
        return section
    reading.blame(main, (name,), f"must be a table: write [{name}{'.NAME' if name == 'pool' else ''}]")
    return {}


def _understood(reading: _Reading, file: Document, required: bool) -> bool:
    """Whether file is of the version that this module knows; if not, the rest of it means nothing."""
    if "version" not in file.table:
        if required:
            reading.blame(file, ("version",), "is missing: write version = 1 at the top")
        return True
    version = file.table["version"]
    if type(version) is int and version == 1:
        return True
    why = f"{keys.shown(version)} is not known to this nssup ({__version__}): the only version is 1"
    reading.blame(file, ("version",), why)
    return False


def _take(reading: _Reading, main: Document, file: Document, chain: tuple[str, ...]) -> None:
    """The pools of file and of its includes. chain: the files that led to it, none for the main file."""
    for name in file.table:
        key = keys.TOP.get(name)
        if key is None:
            reading.blame(file, (name,), keys.unknown(name, keys.TOP))
        elif key.kind is None:
            reading.blame(file, (name,), keys.NOT_YET)
        elif chain and name in ("supervisor", "defaults"):
            reading.blame(
                file, (name,), f"belongs in the main file, {main.name}: an included one has pools and sockets"
            )
    for kind, there in (("pool", reading.pools), ("socket", reading.sockets)):
        for name, own in _section(reading, file, kind).items():
            if not isinstance(own, dict):
                reading.blame(file, (kind, name), f"must be a table: write [{kind}.NAME] and its keys below")
            elif name in there:
                first, line, _ = there[name].place(())
                reading.blame(file, (kind, name), f"is defined already, at {first}:{line}: rename one of them")
            elif kind == "pool":
                reading.pools[name] = _Pool(name, file, own, document.merged(reading.defaults, own), main, {})
            else:
                reading.sockets[name] = _Socket(name, file, own)
    _follow(reading, main, file, (*chain, file.name))


def _follow(reading: _Reading, main: Document, file: Document, chain: tuple[str, ...]) -> None:
    """The includes of file, the last of chain."""
    try:
        patterns = keys.TEXTS.take(file.table.get("include", []))
    except keys.Wrong as wrong:
        for path, why in wrong.found:
            reading.blame(file, ("include", *path), why)
        return
    if patterns and len(chain) > _DEEPEST_INCLUDE:
        reading.blame(file, ("include",), f"files are nested deeper than {_DEEPEST_INCLUDE}: include them higher up")
        return
    for index, pattern in enumerate(patterns):
        place: Path = ("include", index)
        for name, data in reading.bytes_of(file, place, pattern):
            if why := _repeated(reading, chain, name):
                reading.blame(file, place, why)
            else:
                included = reading.open(name, data)
                if included is not None and _understood(reading, included, required=False):
                    _take(reading, main, included, chain)


def _repeated(reading: _Reading, chain: tuple[str, ...], name: str) -> str:
    """Why a file must not be included (again), "" when it may."""
    plain = posixpath.normpath(name)
    above = [posixpath.normpath(file) for file in chain]
    if plain in above:
        return f"goes in a circle: {' -> '.join([*chain[above.index(plain) :], name])}: leave one out"
    return f"{name} is included already: leave one out" if plain in reading.files else ""


class _Origins(Mapping[Path, str]):
    """Worked out on the first look: who shows none pays nothing."""

    def __init__(self, reading: _Reading, main: Document) -> None:
        self._reading = reading
        self._main = main
        self._found: dict[Path, str] | None = None

    def _all(self) -> dict[Path, str]:
        if self._found is None:
            self._found = dict(self._work_out())
        return self._found

    def _work_out(self) -> Iterator[tuple[Path, str]]:
        for path in document.paths(self._main.table.get("supervisor", {}), ("supervisor",)):
            file, line, _ = self._main.place(path)
            yield path, f"{file}:{line}"
        for socket in self._reading.sockets.values():
            for path in document.paths(socket.own):
                file, line, _ = socket.place(path)
                yield ("socket", socket.name, *path), f"{file}:{line}"
        for pool in self._reading.pools.values():
            for path in ((), *document.paths(pool.table), *pool.elsewhere):
                file, line, _ = pool.place(path)
                yield ("pool", pool.name, *path), f"{file}:{line}"

    def __getitem__(self, path: Path) -> str:
        return self._all()[path]

    def __iter__(self) -> Iterator[Path]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


# --- pools -----------------------------------------------------------------------------------------------------------


def _pool(reading: _Reading, pool: _Pool, facts: Facts) -> PoolSpec:
    """The pool's spec. What is wrong goes to reading; the spec then holds defaults in its place."""
    values, found = keys.convert(keys.POOL, pool.table)
    for path, why in found:
        if pool.origin(path)[1][0] != "defaults":  # where it has been said already
            reading.blame_pool(pool, path, why)
    if "command" not in pool.table and not any(why.endswith("did you mean command?") for _, why in found):
        why = 'is missing: name the program to run, such as command = ["app", "--flag"]'
        reading.blame_pool(pool, ("command",), why)
    fields = {"name": pool.name, "command": ("-",), **_fields(reading, pool, values)}
    spec = msgspec.convert(fields, PoolSpec)
    for key, why in [*problems(spec), *sockets.pool_problems(spec), *resolve(spec, facts)[1]]:
        rule = _path(key)
        if not any(path == rule[: len(path)] or rule == path[: len(rule)] != () for path, _ in found):
            reading.blame_pool(pool, rule, why)
    return spec


def _path(key: str) -> Path:
    """A key of spec.problems as a path in the pool's table; what is wrong with a name is the table's own."""
    field, _, inner = key.partition(".")
    if field == "name":
        return ()
    if field == "env":
        return field, inner
    return field, *(int(part) if part.isdigit() else part for part in inner.split(".") if part)


def _fields(reading: _Reading, pool: _Pool, values: Table) -> Table:
    """Values of the pool's keys -> fields of PoolSpec."""
    fields = {
        key: value for key, value in values.items() if key not in ("command", "shell", "stdin", "env_file", "limits")
    }
    if "command" in values:
        command = _command(values["command"], values.get("shell", False))
        if isinstance(command, tuple):
            fields["command"] = command
        else:
            reading.blame_pool(pool, ("command",), command)
    if "limits" in values:
        fields["rlimits"] = values["limits"].get("rlimits", {})
    if values.get("type") == "oneshot":
        fields["restart"] = {"policy": "never"} | values.get("restart", {})
    if "env_file" in values:
        fields["env"] = _env_files(reading, pool, values["env_file"]) | values.get("env", {})
    if "sockets" in values:
        fields["sockets"] = _sockets_of(reading, pool, values["sockets"])
    return fields


def _sockets_of(reading: _Reading, pool: _Pool, names: tuple[str, ...]) -> tuple[SocketSpec, ...]:
    for number, name in enumerate(names):
        if name not in reading.sockets:
            from difflib import get_close_matches  # only a file with errors pays for it

            near = get_close_matches(name, reading.sockets, n=1)
            meant = f"did you mean {near[0]}?" if near else f"write [socket.{name}] and its keys"
            reading.blame_pool(pool, ("sockets", number), f"there is no socket {quoted(name)}: {meant}")
    return tuple(reading.socket_specs[name] for name in names if name in reading.socket_specs)


def _command(command: str | tuple[str, ...], shell: bool) -> tuple[str, ...] | str:
    """The words to run, or what is wrong."""
    if isinstance(command, tuple):
        return "is a list, but shell = true takes a text: join it, or leave out shell" if shell else command
    if shell:
        return "/bin/sh", "-c", command
    from shlex import split  # most commands are lists

    try:
        words = tuple(split(command))
    except ValueError as error:
        return f"cannot be split: {str(error).lower()}; give it as a list"
    return words if words and words[0] else "is empty: name the program to run"


def _env_files(reading: _Reading, pool: _Pool, files: str | tuple[str, ...]) -> dict[str, str]:
    """The variables of a pool's env files; the last file wins. Their places go to pool.elsewhere."""
    env: dict[str, str] = {}
    for index, name in enumerate((files,) if isinstance(files, str) else files):
        file, place = pool.origin(("env_file",) if isinstance(files, str) else ("env_file", index))
        optional = name.startswith("?")
        for found, data in reading.bytes_of(file, place, name.removeprefix("?"), optional):
            text = document.decode_text(found, data)
            variables, wrong = ({}, [text]) if isinstance(text, Problem) else envfile.parse(found, text)
            reading.problems.update(wrong)
            for variable, value in variables.items():
                env[variable] = value.text
                pool.elsewhere["env", variable] = value[1:]
    for variable in pool.table["env"] if isinstance(pool.table.get("env"), dict) else ():
        pool.elsewhere.pop(("env", variable), None)
    return env


# --- sockets ---------------------------------------------------------------------------------------------------------


def _socket(reading: _Reading, socket: _Socket, facts: Facts) -> None:
    """Its spec goes to reading, or what is wrong with it."""
    values, found = keys.convert(keys.SOCKET, socket.own)
    is_text = isinstance(values.get("listen"), str)
    if is_text:
        values["listen"] = (values["listen"],)
    if "listen" not in socket.own:
        found.append((("listen",), 'is missing: name an address, such as listen = "tcp://127.0.0.1:8080"'))
    if not found:
        spec = SocketSpec(name=socket.name, **values)
        for key, why in [*sockets.problems(spec), *socket_owner(spec, facts)[1]]:
            path = _path(key)
            found.append((path[:1] if is_text else path, why))
        if not found:
            reading.socket_specs[socket.name] = spec
    for path, why in found:
        reading.problems.add(Problem(*socket.place(path), dotted(("socket", socket.name, *path)), why))


def socket_owner(spec: SocketSpec, facts: Facts) -> tuple[tuple[int, int], list[tuple[str, str]]]:
    """(uid, gid) that the file of a socket is to have, -1 to leave it; and (key, why) of what is wrong."""
    found: list[tuple[str, str]] = []
    uid = gid = -1
    if spec.user is not None:
        user = facts.user(spec.user)
        number = user.uid if user else _id(spec.user)
        if number is None:
            found.append(("user", f"there is no user {quoted(spec.user)} on this host: make it, or name another"))
        else:
            uid = number
    if spec.group is not None:
        gid = _gid("group", spec.group, facts, found)
    return (uid, gid), found


def _socket_warnings(reading: _Reading, socket: _Socket, pools: list[PoolSpec], facts: Facts) -> Iterator[Problem]:
    spec = reading.socket_specs[socket.name]
    users = [pool for pool in pools if spec in pool.sockets]
    if not users:
        why = f'no pool has it, and it is not made: write sockets = ["{socket.name}"] in one, or leave it out'
        yield Problem(*socket.place(()), dotted(("socket", socket.name)), why)
    for pool in users[:1]:
        for wanted in sockets.of_worker(pool, 0):
            port = wanted.address.port
            if wanted.spec is spec and 0 < port < facts.lowest_port() and not facts.capable("NET_BIND_SERVICE"):
                why = f"port {port} takes CAP_NET_BIND_SERVICE, which this supervisor has not: choose a higher one"
                yield Problem(*socket.place(("listen",)), dotted(("socket", socket.name, "listen")), why)


# --- what the host says ----------------------------------------------------------------------------------------------


def account(spec: PoolSpec, facts: Facts) -> tuple[Identity | None, User | None]:
    """What a launch needs: whom to become (None: nobody else), and whose HOME, USER, LOGNAME, SHELL to have.

    The user is None when the supervisor's own is in no user database. Raises SpecError as resolve finds fault.
    """
    identity, found = resolve(spec, facts)
    if found:
        raise SpecError(*(Problem("", 0, 0, f"pool.{spec.name}.{key}", why) for key, why in found))
    user = _user(spec, facts)
    return identity, user if isinstance(user, User) else facts.user(str(facts.uid))


def resolve(spec: PoolSpec, facts: Facts) -> tuple[Identity | None, list[tuple[str, str]]]:
    """Whom the pool's workers run as, None for the supervisor's own identity; and (key, why) of what is wrong.

    user alone brings its group and groups with it, as a login does.
    """
    own = Identity(facts.uid, facts.gid, facts.groups)
    if spec.user is None and spec.group is None and spec.groups is None:
        return None, []
    found: list[tuple[str, str]] = []
    uid, gid, groups = own
    user = _user(spec, facts)
    if isinstance(user, str):
        found.append(("user", user))
    elif user is not None:
        uid, gid, groups = user.uid, user.gid, _login_groups(user, own, facts)
    if spec.group is not None:
        gid = _gid("group", spec.group, facts, found)
    if spec.groups is not None:
        groups = tuple(_gid(f"groups.{index}", name, facts, found) for index, name in enumerate(spec.groups))
    if found:
        return None, found
    wanted = Identity(uid, gid, groups)
    return (None, []) if wanted == own else (wanted, _rights(spec, wanted, own, facts))


def _login_groups(user: User, own: Identity, facts: Facts) -> tuple[int, ...]:
    if user.uid == own.uid != 0:  # an ordinary user cannot set groups, but as himself he has them already
        return own.groups
    return facts.groups_of(user) if user.gid != NOBODYS_GROUP else ()


def _user(spec: PoolSpec, facts: Facts) -> User | str | None:
    """The user that spec names, or what is wrong with it."""
    if spec.user is None:
        return None
    if user := facts.user(spec.user):
        return user
    number = _id(spec.user)
    if number is None:
        return f"there is no user {quoted(spec.user)} on this host: make it, or name another"
    if spec.group is None:
        return f"{spec.user} is in no user database, so its group is unknown: give group too"
    return User(spec.user, number, NOBODYS_GROUP, "/", "/bin/sh")


def _gid(key: str, name: str, facts: Facts, found: list[tuple[str, str]]) -> int:
    number = gid(name, facts)
    if number is None:
        found.append((key, f"there is no group {quoted(name)} on this host: make it, or name another"))
        return 0
    return number


def _id(text: str) -> int | None:
    """The number of a user or group that is given as one."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= LARGEST_ID else None


def _rights(spec: PoolSpec, wanted: Identity, own: Identity, facts: Facts) -> list[tuple[str, str]]:
    """What this supervisor may not do of the change."""
    key = "user" if spec.user is not None else "group" if spec.group is not None else "groups"
    needs = [("SETUID", wanted.uid != own.uid), ("SETGID", (wanted.gid, wanted.groups) != (own.gid, own.groups))]
    lacking = next((f"CAP_{name}" for name, needed in needs if needed and not facts.capable(name)), None)
    why = f"this supervisor cannot switch to it, it has no {lacking}: run it as root, or leave {key} out"
    return [(key, why)] if lacking else []


def _warnings(pool: _Pool, spec: PoolSpec, facts: Facts) -> list[Problem]:
    """What will not work on this host, or not yet, although the config is right."""
    found = [
        *_command_warnings(spec, facts),
        *_limit_warnings(spec, facts),
        *_custody_warnings(pool, spec),
    ]
    directory = _expanded(spec, spec.directory)
    if not facts.is_directory(directory):
        found.append((("directory",), f"there is no directory {quoted(directory)} on this host: make it"))
    return [Problem(*pool.place(path), dotted(("pool", pool.name, *path)), why) for path, why in found]


def _expanded(spec: PoolSpec, text: str) -> str:
    """text as the pool's first worker sees it."""
    return expand(text, spec.name, 0, 1)


def _command_warnings(spec: PoolSpec, facts: Facts) -> list[tuple[Path, str]]:
    program = _expanded(spec, spec.command[0])
    search = _expanded(spec, spec.env.get("PATH") or facts.variable("PATH") or DEFAULT_PATH)
    directory = _expanded(spec, spec.directory)
    paths = [posixpath.join(directory, path) for path in candidates(program, search)]
    if any(map(facts.is_executable, paths)):
        return []
    there = next(filter(facts.exists, paths), None)
    if there is None:
        where = "on this host" if "/" in program else "in PATH"
        return [(("command",), f"there is no program {quoted(program)} {where}: install it, or correct the name")]
    return [(("command",), f"{quoted(there)} is not executable: chmod +x it, or name another")]


def _limit_warnings(spec: PoolSpec, facts: Facts) -> list[tuple[Path, str]]:
    if not spec.rlimits or facts.capable("SYS_RESOURCE"):
        return []
    found: list[tuple[Path, str]] = []
    for name, (_, hard) in spec.rlimits.items():
        own = facts.hard_limit(name)
        if own is not None and (hard is None or hard > own):
            why = f"is above this supervisor's own hard limit, {own}, and it has no CAP_SYS_RESOURCE: ask for less"
            found.append((("limits", "rlimits", name), why))
    return found


def _custody_warnings(pool: _Pool, spec: PoolSpec) -> list[tuple[Path, str]]:
    if spec.init:
        return []
    found: list[tuple[Path, str]] = []
    if spec.on_supervisor_death == "keep" and "on_supervisor_death" in pool.table:
        why = 'without init nobody keeps a life for the next supervisor, and it ends with this one: "die" says so'
        found.append((("on_supervisor_death",), why))
    why = "without init nobody reaps orphans or keeps exits for the next supervisor: only for programs that are inits"
    found.append((("init",), why))
    return found
