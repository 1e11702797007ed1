"""Specs: the frozen description of a pool, in final units (seconds, bytes, signal numbers), defaults included.

Whoever builds a spec (config.parse, or Python directly) gets a valid one or a SpecError: `validate` says every problem.
Pure: names of users stay names here; whether they exist is asked of the host by whoever has the facts.
"""

import re
from typing import Literal, NamedTuple

import msgspec

from nssup.errors import Problem, SpecError

NAMESPACES = ("pid", "mount", "uts", "ipc", "net", "user", "cgroup", "time")
DEFAULT_NAMESPACES = ("pid", "mount", "uts", "ipc")
RLIMITS = (
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio",
    "sigpending", "stack",
)  # fmt: skip
POOL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,47}")
OWN_LOG = "nssup"  # LOG_DIR/nssup.jsonl
MOST_DEATHS = 1000  # that intensity counts; each is remembered
SIGTERM = 15
SIGKILL = 9


class ControlSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Who may steer besides root and the supervisor's own user; names or numbers of groups.

    group: whose the socket is. viewer, operator, admin: the groups whose members are that.
    """

    group: str | None = None
    viewer: tuple[str, ...] = ()
    operator: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()


class SupervisorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Where one supervisor keeps what it keeps; absolute paths (interface.md, [supervisor])."""

    state_dir: str
    runtime_dir: str
    log_dir: str
    socket: str
    control: ControlSpec = ControlSpec()


class User(NamedTuple):
    """One entry of the user database."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """Waits between launches: first * factor**n, at most max, times 1 +- jitter; forgotten after reset_after up."""

    first: float = 0.1
    factor: float = 2.0
    max: float = 30.0
    jitter: float = 0.1
    reset_after: float = 60.0


class Intensity(msgspec.Struct, frozen=True, kw_only=True):
    """How many deaths within how many seconds are too many, and what follows then.

    A death: the program ended by itself, however, and would be launched again. fail: the worker has failed. fail-pool:
    so have all workers of its pool that are to be up. shutdown: it has, and the supervisor ends. backoff: the next
    launch waits until there are fewer deaths within that time.
    """

    deaths: int
    within: float
    then: Literal["fail", "backoff", "fail-pool", "shutdown"] = "fail"


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What follows an end with one of these exit codes or signals (numbers), whatever the policy says.

    restart-now: the next life, at once. backoff: the next life, after a backoff wait. stop: none; it is stopped. fail:
    none; it has failed.
    """

    then: Literal["restart-now", "backoff", "stop", "fail"]
    exit: tuple[int, ...] = ()
    signal: tuple[int, ...] = ()


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a life that ended by itself is followed by another.

    success: ends that are good, exit codes, and signals as negative numbers (the way of subprocess). settle, in
    seconds: up that long, its first restart is immediate; every later one waits by backoff. rules: the first one that
    matches counts.
    """

    policy: Literal["always", "on-failure", "never"] = "always"
    success: tuple[int, ...] = (0,)
    settle: float = 1.0
    backoff: Backoff = Backoff()
    intensity: Intensity | None = None
    rules: tuple[Rule, ...] = ()


class StopStep(msgspec.Struct, frozen=True):
    """Send signal to the main program, or run command beside it, and give it wait seconds. Neither: kill the whole
    tree, as the last step. A command that fails is not waited for."""

    signal: int | None
    wait: float = 0.0
    command: tuple[str, ...] | None = None

    @property
    def kills(self) -> bool:
        return self.signal is None and self.command is None


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One question to a program, in exactly one of these ways; texts may hold fields (`expand`).

    notify: it says so itself, by sd_notify(3) or by a newline on descriptor fd. http: a GET of this URL answers 2xx or
    3xx; tcp: `host:port`, unix: a path, accept a connection; exec: a command inside ends with 0; log: a line of its
    output matches this regular expression. every: seconds from one try to the next, and timeout for each; so many
    failures, or successes, in a row change the answer. While the answer is awaited at the start, tries come sooner and
    failures count only where fatal: for `startup`, None means that start_timeout alone ends the wait.
    """

    notify: Literal["sd", "fd"] | None = None
    fd: int = 3
    http: str | None = None
    tcp: str | None = None
    unix: str | None = None
    exec: tuple[str, ...] | None = None
    log: str | None = None
    every: float = 2.0
    timeout: float = 2.0
    failures: int | None = None
    successes: int = 1

    @property
    def way(self) -> str:
        """The key that says how it is asked; "" for none."""
        return next((key for key in WAYS if getattr(self, key) is not None), "")


WAYS = ("notify", "http", "tcp", "unix", "exec", "log")


class ReloadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a program is told to read its configuration again: one of signal, to the main program, and command."""

    signal: int | None = None
    command: tuple[str, ...] | None = None


DEFAULT_STOP = (StopStep(SIGTERM, 10.0), StopStep(None))


class Requirement(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool needs of another: that all workers wanted of it are `when` (dependencies.holds), each time one of its
    own is to be launched. lost: what becomes of those that are up when one of the other's is so no more."""

    when: Literal["started", "ready", "done", "stopped"] = "ready"
    lost: Literal["ignore", "restart", "stop"] = "ignore"


class LogSpec(msgspec.Struct, frozen=True, kw_only=True):
    """merge: stdout and stderr share one pipe (order between them kept, stream is `stdout`). size: bytes of a file at
    which it is set aside as `.1` and a new one begun, None: never; age: the same in seconds since its first record;
    keep: how many set aside stay."""

    merge: bool = False
    size: int | None = None
    age: float | None = None
    keep: int = 9


class SocketSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A socket that the supervisor holds for workers (interface.md, [socket.NAME]). listen: addresses, see `address`;
    each is a descriptor. They may hold {index}, {pool}, {id}, and then each worker has its own. backlog: connections
    that may wait, as far as net.core.somaxconn lets them. mode, user, group: of a path; None: the supervisor's own.
    reuse_port: each worker has its own socket on the same port, and the kernel shares connections out.
    """

    name: str
    listen: tuple[str, ...]
    mode: int = 0o660
    user: str | None = None
    group: str | None = None
    backlog: int = 4096
    reuse_port: bool = False


class PoolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A pool and how each of its workers runs. Field names are the config's keys (interface.md, Config).

    command, env, directory, hostname may hold {index} {pool} {id} {generation}, {index+9000}, {index:02}: see `expand`.
    user, group, groups: names or numbers as text; None means the supervisor's own. umask: an int. rlimits: a name
    of RLIMITS -> (soft, hard), None = unlimited. proc: mount a private /proc (needs pid and mount). requires: by the
    name of the other pool; what is wrong between pools, dependencies.problems says. sockets: what its programs
    listen at, in the order of their descriptors, from 3 on.
    """

    name: str
    command: tuple[str, ...]
    workers: int = 1
    requires: dict[str, Requirement] = {}
    directory: str = "/"
    user: str | None = None
    group: str | None = None
    groups: tuple[str, ...] | None = None
    umask: int = 0o022
    env: dict[str, str] = {}
    env_inherit: tuple[str, ...] = ()
    type: Literal["service", "oneshot"] = "service"
    essential: bool = False
    enabled: bool = True
    on_supervisor_death: Literal["keep", "die"] = "keep"
    init: bool = True
    namespaces: tuple[str, ...] = DEFAULT_NAMESPACES
    proc: bool = True
    hostname: str | None = None
    stop: tuple[StopStep, ...] = DEFAULT_STOP
    reload: ReloadSpec | None = None
    start_timeout: float = 90.0
    startup: Probe | None = None
    ready: Probe | None = None
    live: Probe | None = None
    watchdog: float | None = None
    restart: RestartPolicy = RestartPolicy()
    rlimits: dict[str, tuple[int | None, int | None]] = {}
    log: LogSpec = LogSpec()
    sockets: tuple[SocketSpec, ...] = ()


# A brace pair round one of our words, with arithmetic or a width; {{ and }} round a word are its literal braces.
_FIELD = re.compile(r"\{\{(\w+)\}\}|\{([a-z_]+)([+-]\d+)?(?::(0?\d+))?\}")
FIELDS = ("index", "pool", "id", "generation")


def unknown_fields(text: str) -> list[str]:
    """The {words} of text that `expand` does not know, in order (an error for the user: he may mean {{word}})."""
    return [m[2] for m in _FIELD.finditer(text) if m[2] and m[2] not in FIELDS]


def expand(text: str, pool: str, index: int, generation: int) -> str:
    """text with its fields filled in: {index} {pool} {id} {generation} {index+9000} {index:02}; {{word}} gives {word}.

    Braces round anything else are literal. Never raises for text in which unknown_fields found nothing.
    """
    if "{" not in text:
        return text
    values: dict[str, int | str] = {"index": index, "pool": pool, "id": f"{pool}/{index}", "generation": generation}

    def fill(m: re.Match[str]) -> str:
        if m[1]:
            return "{" + m[1] + "}"
        value = values.get(m[2])
        if value is None:
            return m[0]
        if isinstance(value, int):
            value = value + int(m[3] or 0)
        return format(value, m[4] or "")

    return _FIELD.sub(fill, text)


def validate(spec: PoolSpec) -> PoolSpec:
    """spec itself, or SpecError with every rule it breaks that one value alone cannot show."""
    found = [Problem("", 0, 0, f"pool.{spec.name}.{key}", why) for key, why in problems(spec)]
    if found:
        raise SpecError(*found)
    return spec


def problems(spec: PoolSpec) -> list[tuple[str, str]]:
    """(key, why) for every rule that spec breaks; key is a field, or a field, a dot and what is inside it."""
    found = []
    if not POOL_NAME.fullmatch(spec.name):
        found.append(("name", f"{spec.name!r} is no pool name: use [a-z0-9][a-z0-9_-]{{0,47}}"))
    if spec.name == OWN_LOG:
        found.append(("name", f"{OWN_LOG} is the name of the supervisor's own log: choose another"))
    if not spec.command or not spec.command[0]:
        found.append(("command", "is empty: name the program to run"))
    if spec.workers < 0:
        found.append(("workers", "cannot be negative"))
    found += [
        (f"requires.{name}", 'must be a spec.Requirement, such as Requirement(when="ready")')
        for name, requirement in spec.requires.items()
        if not isinstance(requirement, Requirement)
    ]
    for key, text in spec_texts(spec):
        if "\0" in text:
            found.append((key, "holds a NUL byte, which no program can receive"))
        found += [
            (key, f"unknown field {{{word}}}: for a literal brace write {{{{{word}}}}}")
            for word in unknown_fields(text)
        ]
    found += [
        ("namespaces", f"unknown namespace {ns!r}: use {', '.join(NAMESPACES)}")
        for ns in spec.namespaces
        if ns not in NAMESPACES
    ]
    if not spec.directory.startswith("/"):
        found.append(("directory", "must be an absolute path: start it with /"))
    if not 0 <= spec.umask <= 0o777:
        found.append(("umask", "must be from 0 to 0o777"))
    return (
        found
        + _namespace_problems(spec)
        + _env_problems(spec)
        + _restart_problems(spec)
        + _stop_problems(spec)
        + _reload_problems(spec)
        + _probe_problems(spec)
        + _rlimit_problems(spec)
    )


def _env_problems(spec: PoolSpec) -> list[tuple[str, str]]:
    bad = [name for name in spec.env if not name or "=" in name or "\0" in name]
    return [(f"env.{name}", 'cannot be a variable\'s name: it must not be empty or hold "=" or NUL') for name in bad]


def _restart_problems(spec: PoolSpec) -> list[tuple[str, str]]:
    found = []
    restart = spec.restart
    if spec.type == "oneshot" and restart.policy == "always":
        found.append(
            ("restart.policy", 'a oneshot is meant to end, "always" would not let it: use "never" or "on-failure"')
        )
    if restart.settle < 0:
        found.append(("restart.settle", "cannot be negative"))
    found += [
        ("restart.success", f"{code} is no exit code: they go from 0 to 255, and signals from -1 to -64")
        for code in restart.success
        if not -64 <= code <= 255
    ]
    backoff = restart.backoff
    found += [
        (f"restart.backoff.{name}", "cannot be negative")
        for name in ("first", "max", "reset_after")
        if getattr(backoff, name) < 0
    ]
    if backoff.factor < 1:
        found.append(("restart.backoff.factor", "cannot be less than 1: waits do not shrink"))
    if not 0 <= backoff.jitter <= 1:
        found.append(("restart.backoff.jitter", "must be from 0 to 1"))
    if backoff.first > backoff.max:
        found.append(("restart.backoff.first", f"is longer than max, which is {backoff.max:g} s"))
    return found + _intensity_problems(restart.intensity) + _rule_problems(restart.rules)


def _intensity_problems(intensity: Intensity | None) -> list[tuple[str, str]]:
    if intensity is None:
        return []
    found = []
    if not 1 <= intensity.deaths <= MOST_DEATHS:
        found.append(("restart.intensity.deaths", f"must be from 1 to {MOST_DEATHS}"))
    if not intensity.within > 0:
        found.append(("restart.intensity.within", "must be longer than nothing"))
    return found


def _rule_problems(rules: tuple[Rule, ...]) -> list[tuple[str, str]]:
    found = []
    for index, rule in enumerate(rules):
        if not rule.exit and not rule.signal:
            found.append((f"restart.rules.{index}", 'matches nothing: give exit = [75] or signal = ["SEGV"]'))
        bad = [str(code) for code in rule.exit if not 0 <= code <= 255]
        bad += [f"signal {signo}" for signo in rule.signal if not 1 <= signo <= 64]
        if bad:
            found.append((f"restart.rules.{index}", f"{', '.join(bad)}: codes go from 0 to 255, signals from 1 to 64"))
    return found


def _stop_problems(spec: PoolSpec) -> list[tuple[str, str]]:
    if not spec.stop:
        return [("stop", 'is empty: the shortest sequence is ["kill"]')]
    found = []
    if not spec.stop[-1].kills:
        found.append(("stop", 'must end with "kill", or a worker could survive its stop'))
    for index, step in enumerate(spec.stop):
        if step.kills and index < len(spec.stop) - 1:
            found.append((f"stop.{index}", '"kill" ends the sequence: nothing can come after it'))
        if step.command is not None and step.signal is not None:
            found.append((f"stop.{index}", "has a signal and a command: make two steps of it"))
        if step.command is not None and not spec.init:
            found.append((f"stop.{index}.command", NEEDS_INIT))
        if step.signal is not None and not 1 <= step.signal <= 64:
            found.append((f"stop.{index}", f"{step.signal} is no signal: they go from 1 to 64"))
        if step.wait < 0:
            found.append((f"stop.{index}", "cannot wait a negative time"))
    return found


def _reload_problems(spec: PoolSpec) -> list[tuple[str, str]]:
    if spec.reload is None:
        return []
    if (spec.reload.signal is None) == (spec.reload.command is None):
        return [("reload", "must have one of signal and command")]
    if spec.reload.command is not None and not spec.init:
        return [("reload.command", NEEDS_INIT)]
    return []


NEEDS_INIT = "needs nssup-init inside the worker: leave out init = false"
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9.]+|localhost):(\d{1,5})")
URL = re.compile(r"http://(\[[0-9A-Fa-f:.]+\]|[0-9.]+|localhost)(?::(\d{1,5}))?(/[!-~]*)?")
UNIX_PATH_BYTES = 107  # sun_path of unix(7) is 108 with its NUL


def _probe_problems(spec: PoolSpec) -> list[tuple[str, str]]:
    found = []
    if spec.start_timeout <= 0:
        found.append(("start_timeout", "must be longer than nothing"))
    if spec.watchdog is not None:
        if spec.watchdog <= 0:
            found.append(("watchdog", "must be longer than nothing"))
        found += [("watchdog", why) for why in _notify_problems(spec, "sd")]
    for name, probe in (("startup", spec.startup), ("ready", spec.ready), ("live", spec.live)):
        if probe is not None:
            found += [(f"{name}.{key}" if key else name, why) for key, why in _one_probe_problems(spec, name, probe)]
    if spec.startup is not None and spec.ready is not None and spec.startup.notify and spec.ready.notify:
        found.append(("startup.notify", "a program says only once that it is ready: leave it to ready"))
    return found


def _notify_problems(spec: PoolSpec, how: str) -> list[str]:
    if not spec.init:
        return [NEEDS_INIT]
    if how == "sd" and "mount" not in spec.namespaces:
        return ["needs the mount namespace, in which the program finds its socket: add mount to namespaces"]
    return []


def _one_probe_problems(spec: PoolSpec, name: str, probe: Probe) -> list[tuple[str, str]]:
    given = [key for key in WAYS if getattr(probe, key) is not None]
    if len(given) != 1:
        return [("", f"must say in one way how to ask: give one of {', '.join(WAYS)}")]
    found = [(key, "must be longer than nothing") for key in ("every", "timeout") if getattr(probe, key) <= 0]
    found += [(key, "must be at least 1") for key in ("failures", "successes") if (getattr(probe, key) or 1) < 1]
    return found + [(probe.way, why) for why in _way_problems(spec, name, probe)]


def _way_problems(spec: PoolSpec, name: str, probe: Probe) -> list[str]:
    way = probe.way
    value = getattr(probe, way)
    if way in ("notify", "log") and name == "live":
        return [f"{way} says something once, and cannot tell that it still is so: use watchdog"]
    if way == "notify":
        return _notify_problems(spec, value) + (_fd_problems(spec, probe.fd) if value == "fd" else [])
    if way == "log":
        return _pattern_problems(value)
    if way == "exec":
        return [] if spec.init else [NEEDS_INIT]
    if way != "unix" and "net" in spec.namespaces:
        return ["cannot reach into a network namespace of the worker's own: use exec"]
    return [] if unknown_fields(value) else _place_problems(way, expand(value, spec.name, 0, 1))


def _fd_problems(spec: PoolSpec, fd: int) -> list[str]:
    free = 3 + sum(len(each.listen) for each in spec.sockets)
    if fd >= free:
        return []
    return [f"fd must be {free} or more" + (", as its sockets are 3 and what follows" if spec.sockets else "")]


def _pattern_problems(pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return [f"is no regular expression: {error}"]
    return []


def _place_problems(way: str, place: str) -> list[str]:
    if way == "unix":
        if not place.startswith("/"):
            return ["must be an absolute path: start it with /"]
        long = len(place.encode("utf-8", "surrogateescape")) > UNIX_PATH_BYTES
        return [f"is longer than the {UNIX_PATH_BYTES} bytes that a socket's path can have"] if long else []
    found = (URL if way == "http" else ADDRESS).fullmatch(place)
    if found is None:
        form = "http://ADDRESS:PORT/PATH" if way == "http" else "ADDRESS:PORT"
        return [f"must be {form}, where ADDRESS is an IP address or localhost: the worker itself is asked"]
    if not 1 <= int(found[2] or 80) <= 65535:
        return ["has a port that is none: they go from 1 to 65535"]
    return []


def _rlimit_problems(spec: PoolSpec) -> list[tuple[str, str]]:
    found = []
    for name, (soft, hard) in spec.rlimits.items():
        if name not in RLIMITS:
            found.append((f"limits.rlimits.{name}", f"is no resource limit: use {', '.join(RLIMITS)}"))
        elif hard is not None and (soft is None or soft > hard):
            found.append((f"limits.rlimits.{name}", "has a soft limit above the hard one"))
    return found


def _namespace_problems(spec: PoolSpec) -> list[tuple[str, str]]:
    found = []
    if "pid" not in spec.namespaces:
        found.append(("namespaces", "must hold pid: without it a stop could leave processes behind"))
    if spec.proc and "mount" not in spec.namespaces:
        found.append(
            (
                "namespaces",
                "a private /proc needs a private mount namespace, or it would replace the host's: "
                "add mount, or set proc = false",
            )
        )
    if spec.hostname is not None and "uts" not in spec.namespaces:
        found.append(("hostname", "needs the uts namespace, or it would rename the host: add uts to namespaces"))
    if spec.hostname is not None and len(spec.hostname) > 64:
        found.append(("hostname", "is longer than the 64 bytes Linux takes"))
    return found


def spec_texts(spec: PoolSpec) -> list[tuple[str, str]]:
    """(key, text) of everything that `expand` is applied to."""
    texts = [(f"command.{i}", text) for i, text in enumerate(spec.command)]
    texts += [(f"env.{name}", text) for name, text in spec.env.items()]
    texts.append(("directory", spec.directory))
    if spec.hostname is not None:
        texts.append(("hostname", spec.hostname))
    return texts + _command_texts(spec)


def _command_texts(spec: PoolSpec) -> list[tuple[str, str]]:
    commands = [(f"stop.{i}.command", step.command) for i, step in enumerate(spec.stop)]
    commands += [("reload.command", spec.reload.command)] if spec.reload is not None else []
    texts = []
    for name, probe in (("startup", spec.startup), ("ready", spec.ready), ("live", spec.live)):
        if probe is not None:
            commands.append((f"{name}.exec", probe.exec))
            asked = (("http", probe.http), ("tcp", probe.tcp), ("unix", probe.unix))
            texts += [(f"{name}.{key}", text) for key, text in asked if text is not None]
    return texts + [(f"{key}.{i}", word) for key, command in commands for i, word in enumerate(command or ())]
