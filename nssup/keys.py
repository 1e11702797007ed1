"""The config's keys: one table, from which the parser, the suggestions and the reference pages are all made.

A kind turns one TOML value into final units (seconds, bytes, signal numbers) or says everything that is wrong with it.
Nothing here knows of files, positions or other keys: rules between keys are spec.problems, positions are config's.
"""

import re
from collections.abc import Callable
from datetime import date, datetime, time
from typing import Any, NamedTuple, NoReturn, TypeGuard, TypeVar

from nssup import __version__, units
from nssup.locate import Path, quoted

NOT_YET = f"not in this version ({__version__}): leave it out"

_N = TypeVar("_N", int, float)
Found = list[tuple[Path, str]]  # below the value: where, and what is wrong


class Wrong(Exception):  # carries findings up to config, which makes a SpecError of all of them
    """What is wrong with one value, in all its places. rest: the value without that, where it still means something."""

    def __init__(self, found: Found, rest: dict[str, Any] | None = None) -> None:
        super().__init__(found)
        self.found = found
        self.rest = rest


class Kind(NamedTuple):
    """A kind of value. name: for the reference; take: TOML value -> final value, or Wrong; keys: of a table."""

    name: str
    take: Callable[[object], Any]
    keys: "dict[str, Key] | None" = None


class Key(NamedTuple):
    """One key. kind None: promised, but not in this version. default: as one would write it, "" for none."""

    kind: Kind | None
    default: str
    doc: str


def later(doc: str) -> Key:
    return Key(None, "", doc)


def convert(keys: dict[str, Key], table: dict[str, Any]) -> tuple[dict[str, Any], Found]:
    """The good values of table in final units, and everything wrong with the others."""
    values: dict[str, Any] = {}
    found: Found = []
    for name, value in table.items():
        key = keys.get(name)
        if key is None:
            found.append(((name,), unknown(name, keys)))
        elif key.kind is None:
            found.append(((name,), NOT_YET))
        else:
            try:
                values[name] = key.kind.take(value)
            except Wrong as wrong:
                found += [((name, *path), why) for path, why in wrong.found]
                if wrong.rest is not None:
                    values[name] = wrong.rest
    return values, found


# What the same thing is called elsewhere, and keys written one table too high.
_ELSEWHERE = {
    "autorestart": "restart.policy",
    "autostart": "enabled",
    "cmd": "command",
    "cwd": "directory",
    "environment": "env",
    "exec": "command",
    "gid": "group",
    "instances": "workers",
    "name": "[pool.NAME]",
    "numprocs": "workers",
    "processes": "workers",
    "replicas": "workers",
    "nofile": "limits.rlimits.nofile",
    "rlimits": "limits.rlimits",
    "backoff": "restart.backoff",
    "cpu": "limits.cpu",
    "memory": "limits.memory",
    "pids": "limits.pids",
    "settle": "restart.settle",
    "uid": "user",
    "workdir": "directory",
    "working_dir": "directory",
}
_LIMITS_ELSEWHERE = {name: f"rlimits.{name}" for name in ("as", "core", "fsize", "memlock", "nofile", "nproc", "stack")}


def unknown(name: str, keys: dict[str, Key]) -> str:
    """The message for a name that is none of keys, with the one that was probably meant."""
    from difflib import get_close_matches  # only a file with errors pays for it

    word = name.lower().replace("-", "_")
    elsewhere = _ELSEWHERE if keys is POOL else _LIMITS_ELSEWHERE if keys is LIMITS else {}
    near = get_close_matches(word, keys, n=1)
    if meant := elsewhere.get(word) or (near[0] if near else None):
        return f"unknown key: did you mean {meant}?"
    return f"unknown key: the keys here are {', '.join(name for name, key in keys.items() if key.kind)}"


# --- kinds ---------------------------------------------------------------------------------------------------------


def _fail(why: str, *path: str | int) -> NoReturn:
    raise Wrong([(path, why)])


_NAMES: tuple[tuple[Any, str], ...] = (
    (bool, "true or false"),
    (str, "a text"),
    ((int, float), "a number"),
    (list, "a list"),
    (dict, "a table"),
    ((datetime, date, time), "a date or time"),
)


def _is(value: object) -> str:
    return next(name for type_, name in _NAMES if isinstance(value, type_))


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _digits(value: float) -> str:
    """A number as written, or nearly; Python refuses to print the longest."""
    return str(value) if abs(value) < 1e18 else f"{value:.0e}" if isinstance(value, float) else "..."


def shown(value: object) -> str:
    """value for a message."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return str(value).lower()
    return _digits(value) if _is_number(value) else _is(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        _fail(f"must be a text, not {_is(value)}" + (f': write "{_digits(value)}"' if _is_number(value) else ""))
    if "\0" in value:
        _fail("holds a NUL byte, which no program can receive")
    return value


def _filled(value: object) -> str:
    return _text(value) or _fail("is empty")


def _flag(value: object) -> bool:
    return value if isinstance(value, bool) else _fail(f"must be true or false, not {_is(value)}")


def _whole(value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        _fail(f"must be a whole number, not {value if isinstance(value, float) else _is(value)}")
    if not low <= value <= high:
        _fail(f"must be from {low} to {high}")
    return value


def _number(value: object, low: float, high: float) -> float:
    if not _is_number(value):
        _fail(f"must be a number, not {_is(value)}")
    if not low <= value <= high:  # as nan never is
        _fail(f"must be from {low:g} to {high:g}")
    return float(value)


def _united(value: object, what: str, read: Callable[[str], _N]) -> _N:
    """A text with a unit, read by one of the functions of units; for a bare number they say what to write."""
    if not isinstance(value, str) and not _is_number(value):
        _fail(f"must be {what}, not {_is(value)}")
    text = value if isinstance(value, str) else _digits(value)
    try:
        taken = read(text)
    except ValueError as error:
        why = str(error)
    else:
        return taken
    _fail(why if "no unit" in why else f"{quoted(text)} {why}")


def _one_of(value: object, words: tuple[str, ...], not_yet: tuple[str, ...]) -> str:
    word = _text(value)
    if word in words:
        return word
    if word in not_yet:
        _fail(f"{quoted(word)} is {NOT_YET}")
    from difflib import get_close_matches  # as in unknown()

    near = get_close_matches(word.lower(), words, n=1)
    _fail(f"{quoted(word)} is none of {', '.join(words)}" + (f": did you mean {near[0]}?" if near else ""))


def _list(value: object, item: Kind) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _fail(f"must be a list, not {_is(value)}: put it between [ and ]")
    taken: list[Any] = []
    found: Found = []
    for index, element in enumerate(value):
        try:
            taken.append(item.take(element))
        except Wrong as wrong:
            found += [((index, *path), why) for path, why in wrong.found]
    if found:
        raise Wrong(found)
    return tuple(taken)


def _table(value: object, keys: dict[str, Key], hint: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(f"must be a table, not {_is(value)}" + (f": write {hint}" if hint else ""))
    values, found = convert(keys, value)
    if found:
        raise Wrong(found, values)
    return values


def whole(low: int, high: int) -> Kind:
    return Kind("whole number", lambda value: _whole(value, low, high))


def number(low: float, high: float) -> Kind:
    return Kind("number", lambda value: _number(value, low, high))


def one_of(*words: str, not_yet: tuple[str, ...] = ()) -> Kind:
    return Kind(" \\| ".join(f'`"{word}"`' for word in words), lambda value: _one_of(value, words, not_yet))


def list_of(item: Kind, name: str = "") -> Kind:
    return Kind(name or f"list of {item.name}s", lambda value: _list(value, item))


def table(keys: dict[str, Key], hint: str = "") -> Kind:
    return Kind("table", lambda value: _table(value, keys, hint), keys)


TEXT = Kind("text", _filled)
FLAG = Kind("true or false", _flag)
DURATION = Kind("duration", lambda value: _united(value, 'a duration, such as "10s"', units.duration))
SIZE = Kind("size", lambda value: _united(value, 'a size, such as "64M"', units.size))
TEXTS = list_of(TEXT)
TEXT_OR_LIST = Kind("text or list of texts", lambda value: (TEXT if isinstance(value, str) else TEXTS).take(value))


# --- kinds of one key ----------------------------------------------------------------------------------------------


def _command(value: object) -> str | tuple[str, ...]:
    """A text stays one: only config knows whether `shell` stands beside it."""
    if isinstance(value, list):
        words = _list(value, Kind("text", _text))
        return words if words and words[0] else _fail("is empty: name the program to run")
    if not isinstance(value, str):
        _fail(f'must be a list of texts, such as ["app", "--port", "80"], or a text, not {_is(value)}')
    return _text(value) if value.strip() else _fail("is empty: name the program to run")


def _umask(value: object) -> int:
    if not isinstance(value, str) or not re.fullmatch("0?[0-7]{1,3}", value):
        _fail('must be a text of octal digits, such as "022"')
    return int(value, 8)


def is_variable(name: str) -> bool:
    """Whether name can name an environment variable: anything but nothing, = and NUL, as the kernel has it."""
    return bool(name) and "=" not in name and "\0" not in name


def _env(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        _fail(f'must be a table, not {_is(value)}: write env = {{ NAME = "value" }}')
    found: Found = []
    for name, text in value.items():
        try:
            if not is_variable(name):
                _fail('cannot be a variable\'s name: it must not be empty or hold "=" or NUL')
            _text(text)
        except Wrong as wrong:
            found += [((name, *path), why) for path, why in wrong.found]
    bad = {path[0] for path, _ in found}
    good = {name: text for name, text in value.items() if name not in bad}
    if found:
        raise Wrong(found, good)
    return good


def _signal(value: object) -> int:
    text = _digits(value) if _is_number(value) else _text(value)
    try:
        return units.signal_number(text)
    except ValueError as error:
        why = str(error)
    _fail(f"{quoted(text)} {why}")


SIGNAL = Kind("signal", _signal)
CODE = whole(0, 255)


def _ending(value: object) -> int:
    """An exit code, or a signal as a negative number."""
    return -_signal(value) if isinstance(value, str) else int(CODE.take(value))


WORDS = Kind("list of texts", lambda value: _list(value, Kind("text", _text)) or _fail("is empty: name a program"))
RELOAD = {
    "signal": Key(SIGNAL, "", "What to send to the main program: `HUP`, `SIGHUP`, `1`, `RTMIN+3`."),
    "command": Key(WORDS, "", "What to run in the worker's namespaces, as its user, in its directory."),
}
STEP = {
    "signal": Key(SIGNAL, "", "What to send to the main program: `TERM`, `SIGTERM`, `15`, `RTMIN+3`."),
    "command": Key(WORDS, "", "Instead: what to run in the worker's namespaces. One that fails is not waited for."),
    "wait": Key(DURATION, "", "How long the program may take to end before the next step."),
}


def _deed(value: object, keys: dict[str, Key], example: str, instead: str = "") -> dict[str, Any]:
    """A signal or a command, and all else that keys have. instead: what else may stand in its place."""
    if not isinstance(value, dict):
        _fail(f"must be {example}{instead}")
    values, found = convert(keys, value)
    if ("signal" in value) == ("command" in value):
        found.append(((), f"must have one of signal and command: write {example}"))
    found += [((name,), f"is missing: write {example}") for name in keys if name == "wait" and name not in value]
    if found:
        raise Wrong(found)
    return values


def _step(value: object) -> dict[str, Any]:
    if value == "kill":
        return {"signal": None}
    return {"signal": None} | _deed(value, STEP, '{ signal = "TERM", wait = "10s" }', ' or "kill"')


def _reload(value: object) -> dict[str, Any]:
    return _deed(value, RELOAD, '{ signal = "HUP" } or { command = ["app", "reload"] }')


def _some_time(value: object) -> float:
    seconds: float = DURATION.take(value)
    return seconds if seconds > 0 else _fail("must be longer than nothing")


PERIOD = Kind("duration", _some_time)


_WHEN = one_of("started", "ready", "done", "stopped")
REQUIREMENT = {
    "when": Key(
        _WHEN,
        '"ready"',
        "What each worker wanted of the other pool must be: its program runs; ready too; it ended well; nothing of it "
        "is left. `done` counts as started and ready.",
    ),
    "lost": Key(
        one_of("ignore", "restart", "stop"),
        '"ignore"',
        "When one of them is so no more: nothing; stop, and start when they are so again; stop, and stay down.",
    ),
}


def _requires(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(f'must be a table, not {_is(value)}: write requires = {{ db = "ready" }}')
    taken: dict[str, Any] = {}
    found: Found = []
    for name, wish in value.items():
        try:
            if isinstance(wish, dict):
                taken[name] = _table(wish, REQUIREMENT, "")
            else:
                taken[name] = {"when": _WHEN.take(wish)}
        except Wrong as wrong:
            found += [((name, *path), why) for path, why in wrong.found]
    if found:
        raise Wrong(found, taken)
    return taken


UNLIMITED = "unlimited"
LIMIT = {
    "soft": Key(None, "", "What holds; the process may change it up to hard."),
    "hard": Key(None, "", "What only a privileged process may raise."),
}


def _limit(value: object, kind: Kind) -> tuple[object, object]:
    """(soft, hard), None for unlimited."""
    if not isinstance(value, dict):
        one = _limit_value(value, kind)
        return one, one
    keys = {
        name: key._replace(kind=Kind(kind.name, lambda limit: _limit_value(limit, kind))) for name, key in LIMIT.items()
    }
    pair, found = convert(keys, value)
    found += [((name,), "is missing: give soft and hard") for name in keys if name not in value]
    if found:
        raise Wrong(found)
    return pair["soft"], pair["hard"]


def _limit_value(value: object, kind: Kind) -> object:
    return None if value == UNLIMITED else kind.take(value)


def _cpu_seconds(value: object) -> int:
    seconds: float = DURATION.take(value)
    return (
        int(seconds) if seconds == int(seconds) else _fail("must be whole seconds: the kernel counts no parts of them")
    )


COUNT = whole(0, (1 << 63) - 1)
_RLIMITS: tuple[tuple[str, Kind, str], ...] = (
    ("as", SIZE, "Address space."),
    ("core", SIZE, 'Core file; `"0B"` for none.'),
    ("cpu", Kind("duration", _cpu_seconds), "CPU time, in whole seconds; SIGXCPU after it."),
    ("data", SIZE, "Heap and data."),
    ("fsize", SIZE, "Files written; SIGXFSZ beyond it."),
    ("locks", COUNT, "File locks; Linux ignores it."),
    ("memlock", SIZE, "Memory locked into RAM."),
    ("msgqueue", SIZE, "POSIX message queues of the user."),
    ("nice", COUNT, "20 minus the lowest nice value it may take."),
    ("nofile", COUNT, "Highest file descriptor, plus one."),
    ("nproc", COUNT, "Processes and threads of the user."),
    ("rss", SIZE, "Resident memory; Linux ignores it."),
    ("rtprio", COUNT, "Highest real-time priority."),
    ("sigpending", COUNT, "Queued signals of the user."),
    ("stack", SIZE, "Main thread's stack."),
)


def _rlimit(kind: Kind) -> Kind:
    return Kind(f'{kind.name}, `"unlimited"` or `{{ soft, hard }}`', lambda value: _limit(value, kind))


RLIMITS = {name: Key(_rlimit(kind), "", doc) for name, kind, doc in _RLIMITS}

# --- the tables ----------------------------------------------------------------------------------------------------

BACKOFF = {
    "first": Key(DURATION, '"100ms"', "The first wait."),
    "factor": Key(number(1, 1000), "2.0", "Each wait is this many times the one before."),
    "max": Key(DURATION, '"30s"', "No wait is longer (but for jitter)."),
    "jitter": Key(number(0, 1), "0.1", "Each wait is longer or shorter by up to this share of it."),
    "reset_after": Key(DURATION, '"60s"', "Up that long, a worker's earlier failures are forgotten."),
}

INTENSITY = {
    "deaths": Key(whole(1, 1000), "", "**Required.** So many ends of its program by itself,"),
    "within": Key(DURATION, "", "**Required.** in so long a time,"),
    "then": Key(
        one_of("fail", "backoff", "fail-pool", "shutdown"),
        '"fail"',
        "and the worker has failed; or waits until there were fewer; or all its pool has failed; or `nssup up` ends.",
    ),
}

RULE = {
    "exit": Key(list_of(CODE), "[]", "Exit codes."),
    "signal": Key(list_of(SIGNAL), "[]", "Signals that ended the program."),
    "then": Key(
        one_of("restart-now", "backoff", "stop", "fail"),
        "",
        "**Required.** The next life, at once (if they do not settle, ten times in a row), or after a `backoff` "
        "wait; or none: it is `stopped`, or has `failed`.",
    ),
}


def _required(keys: dict[str, Key], hint: str, *names: str) -> Kind:
    """A table in which these keys must be."""

    def take(value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            _fail(f"must be a table, not {_is(value)}: write {hint}")
        taken, found = convert(keys, value)
        found += [((name,), f"is missing: write {hint}") for name in names if name not in value]
        if found:
            raise Wrong(found)
        return taken

    return Kind("table", take, keys)


RESTART = {
    "policy": Key(
        one_of("always", "on-failure", "never"),
        '"always"',
        'When a life that ended is followed by another. A oneshot: `"never"` (its default) or `"on-failure"`.',
    ),
    "success": Key(
        list_of(Kind("exit code or signal", _ending), "list of exit codes and signals"),
        "[0]",
        'Exit codes, and signals (`"TERM"`), that count as a good end.',
    ),
    "settle": Key(
        DURATION,
        '"1s"',
        "The first restart of a life that was up that long is immediate; every later one waits by `backoff`.",
    ),
    "backoff": Key(table(BACKOFF, 'backoff = { first = "100ms" }'), "", "Waits before launches."),
    "intensity": Key(
        _required(INTENSITY, 'intensity = { deaths = 5, within = "60s" }', "deaths", "within"),
        "",
        "When it dies too often; none by default. A launch that failed before the program ran is no death.",
    ),
    "rules": Key(
        list_of(_required(RULE, '{ exit = [75], then = "restart-now" }', "then"), "list of tables"),
        "[]",
        "What follows an end with these codes or signals, whatever `policy` says; the first that matches counts.",
    ),
}

LIMITS = {
    "rlimits": Key(
        table(RLIMITS, "rlimits = { nofile = 1024 }"), "", "Resource limits, setrlimit(2), of each process."
    ),
    **{name: later("Control group limits.") for name in ("memory", "cpu", "pids", "io", "oom")},
}


def at_least(kind: Kind, least: float, text: str) -> Kind:
    """text: least, as one would write it."""

    def take(value: object) -> float:
        taken: float = kind.take(value)
        if taken < least:
            _fail(f"{value!r} is too little: write {text} or more")
        return taken

    return Kind(kind.name, take)


LOG = {
    "merge": Key(FLAG, "false", "stdout and stderr share one pipe: their order is kept, every record says `stdout`."),
    "size": Key(
        at_least(SIZE, 64 * 1024, '"64K"'),
        "",
        "A file that is as large is set aside: POOL.jsonl becomes POOL.jsonl.1, that .2, and so on. Without: never.",
    ),
    "age": Key(
        at_least(DURATION, 1, '"1s"'),
        "",
        "The same for a file whose first record is as old, when the next one comes. Without: never.",
    ),
    "keep": Key(whole(1, 9999), "9", "How many files that were set aside stay."),
    **{
        name: later("Log files and sinks.")
        for name in (
            "total", "compress", "fsync", "multiline", "rate", "sink", "overflow", "on_error",
        )
    },
}  # fmt: skip

PROBE = {
    "http": Key(TEXT, "", "A GET of this URL is answered with 2xx or 3xx: `http://127.0.0.1:{index+9000}/ready`."),
    "tcp": Key(TEXT, "", "This `host:port` takes a connection. The host is an address, or `localhost`."),
    "unix": Key(TEXT, "", "The socket at this path takes a connection."),
    "exec": Key(WORDS, "", "This command, run in the worker's namespaces as its user, ends with 0."),
    "every": Key(PERIOD, '"2s"', "From one try to the next. While a start is awaited they come sooner at first."),
    "timeout": Key(PERIOD, '"2s"', "How long a try may take."),
    "failures": Key(whole(1, 1_000_000), "3", "So many in a row change the answer."),
    "successes": Key(whole(1, 1_000_000), "1", "So many in a row change it back."),
}
LIVE = PROBE
READY = {
    "notify": Key(
        one_of("sd", "fd"),
        "",
        'The program says so itself: `"sd"`, by sd_notify(3), or `"fd"`, by a newline on descriptor `fd`.',
    ),
    "fd": Key(whole(3, 1_000_000), "3", 'With `notify = "fd"`.'),
    **PROBE,
    "log": Key(TEXT, "", "A line of its output matches this regular expression (Python's, anywhere in the line)."),
}
STARTUP = READY | {
    "failures": Key(whole(1, 1_000_000), "none", "So many in a row end the worker before `start_timeout` does.")
}

POOL = {
    "command": Key(
        Kind("list of texts, or text", _command),
        "",
        "**Required.** The program and its arguments. A text is split as a shell would, but no shell runs.",
    ),
    "shell": Key(FLAG, "false", "`command` is a text for `/bin/sh -c`."),
    "workers": Key(whole(0, 1_000_000), "1", "How many of them."),
    "requires": Key(
        Kind('table of `"when"` or `{ when, lost }`', _requires),
        "{}",
        "By name, the pools that must be as described first, whenever a worker of this one is to be launched.",
    ),
    "directory": Key(TEXT, '"/"', "Working directory; absolute."),
    "user": Key(
        TEXT, "the supervisor's", "Name, or number as a text. Sets the group and the supplementary groups too."
    ),
    "group": Key(TEXT, "the user's", "Name, or number as a text."),
    "groups": Key(TEXTS, "the user's", "Supplementary groups, all of them."),
    "umask": Key(Kind("octal text", _umask), '"022"', ""),
    "env": Key(Kind("table of texts", _env), "{}", "Environment variables; beats `env_file` and `env_inherit`."),
    "env_file": Key(
        TEXT_OR_LIST,
        "[]",
        "Files of `NAME=value` lines, relative to the config file; the last one wins; `?` in front: may be missing.",
    ),
    "env_inherit": Key(TEXTS, "[]", 'Variables passed on from the supervisor, with wildcards: `["AWS_*"]`.'),
    "type": Key(one_of("service", "oneshot"), '"service"', "A oneshot is meant to end; `done` when it ended well."),
    "essential": Key(FLAG, "false", "When it ends for good, `nssup up` ends with its exit code."),
    "enabled": Key(FLAG, "true", "Started with the supervisor."),
    "stdin": Key(one_of("null", not_yet=("pty",)), '"null"', "`/dev/null`."),
    "on_supervisor_death": Key(
        one_of("keep", "die"),
        '"keep"',
        "When the supervisor dies: go on until the next one takes them over, or end too. Without `init` they end.",
    ),
    "init": Key(
        FLAG,
        "true",
        "Whether nssup-init is PID 1 of the namespace. With `false` the program is, with a PID 1's duties; "
        "a signal that it does not handle does not reach it, and a stop step with such a signal is not waited for.",
    ),
    "namespaces": Key(
        list_of(one_of("pid", "mount", "uts", "ipc", "user", not_yet=("net", "cgroup", "time")), "list of names"),
        '["pid", "mount", "uts", "ipc"]',
        "The worker's own namespaces: `pid`, `mount`, `uts`, `ipc`, `user`. `pid` is a must.",
    ),
    "proc": Key(FLAG, "true", "A `/proc` of its own, which shows its processes only; needs `mount`."),
    "hostname": Key(TEXT, "the host's", "In the worker's own `uts` namespace."),
    "stop": Key(
        list_of(Kind("step", _step), 'list of `{ signal, wait }`, `{ command, wait }` or `"kill"`'),
        '[{ signal = "TERM", wait = "10s" }, "kill"]',
        "Signals to the main program, or commands run beside it, each with the time it has to end, then "
        '`"kill"` for the whole tree.',
    ),
    "reload": Key(
        Kind("`{ signal }` or `{ command }`", _reload),
        "",
        'How its programs read their configuration again: `{ signal = "HUP" }` or `{ command = [...] }`.',
    ),
    "start_timeout": Key(
        PERIOD, '"90s"', "How long a worker may take to be ready, where `startup` or `ready` asks for that."
    ),
    "startup": Key(table(STARTUP, 'startup = { tcp = "localhost:80" }'), "", "See below."),
    "ready": Key(table(READY, 'ready = { notify = "sd" }'), "", "See below."),
    "live": Key(table(LIVE, 'live = { tcp = "localhost:80" }'), "", "See below."),
    "watchdog": Key(
        PERIOD, "", "Once it is ready, the program has to say `WATCHDOG=1` by sd_notify(3) at least that often."
    ),
    "restart": Key(table(RESTART, 'restart = { policy = "..." }'), "", "See below."),
    "limits": Key(table(LIMITS, "limits = { rlimits = { nofile = 1024 } }"), "", "See below."),
    "log": Key(table(LOG, "log = { merge = true }"), "", "See below."),
    "credentials": later("Secret files."),
    "sockets": Key(
        TEXTS, "[]", "Names of `[socket.NAME]`: what the program listens at, as descriptors 3, 4, ... in this order."
    ),
    "rolling": later("Rolling restarts."),
    "recycle": later("Recycling by age or memory."),
    "isolation": later("Mounts, capabilities, seccomp, network."),
}

ROLES = {
    "viewer": Key(TEXTS, "[]", "Groups whose members may look: status, logs, events."),
    "operator": Key(TEXTS, "[]", "Those may also start, stop, restart, kill, scale."),
    "admin": Key(TEXTS, "[]", "Those may everything, which amounts to being the supervisor's user."),
}

CONTROL = {
    "group": Key(TEXT, "none", "Group of the control socket. Without `roles` its members are operators."),
    "roles": Key(table(ROLES, 'roles = { operator = ["wheel"] }'), "", "See below."),
}

SOCKET = {
    "listen": Key(
        TEXT_OR_LIST,
        "",
        "**Required.** `tcp://127.0.0.1:8080`, `tcp://[::1]:8080`, `udp://...`, `unix:///run/app.sock`, or several. "
        "With `{index}`, `{pool}` or `{id}` in it each worker has its own.",
    ),
    "mode": Key(Kind("octal text", _umask), '"0660"', "Of a `unix` socket's file."),
    "user": Key(TEXT, "the supervisor's", "Whose file it is: name, or number as a text."),
    "group": Key(TEXT, "the supervisor's", "The file's group: name, or number as a text."),
    "backlog": Key(whole(1, (1 << 31) - 1), "4096", "Connections that may wait; `net.core.somaxconn` is a limit too."),
    "reuse_port": Key(FLAG, "false", "Each worker has a socket of its own on the same port; the kernel shares out."),
}

SUPERVISOR = {
    "state_dir": Key(TEXT, "`/var/lib/nssup`; not root: `$XDG_STATE_HOME/nssup`", "What the operator wants."),
    "runtime_dir": Key(
        TEXT,
        "`/run/nssup`; not root: `$XDG_RUNTIME_DIR/nssup`; `STATE_DIR/run` when only `state_dir` is given",
        "Lives, lock, socket.",
    ),
    "log_dir": Key(TEXT, "`/var/log/nssup`; not root: `$XDG_STATE_HOME/nssup/log`", "Records of workers and events."),
    "socket": Key(TEXT, "`RUNTIME_DIR/nssup.sock`", "The control socket, mode 0660; at most 107 bytes long."),
    "control": Key(table(CONTROL, 'control = { group = "wheel" }'), "", "Who else may steer. See below."),
}


def _no_check(value: object) -> object:
    """For the top level, whose tables config takes apart itself."""
    return value


TOP = {
    "version": Key(Kind("`1`", _no_check), "", "**Required.** Of this format; `1` is the only one."),
    "include": Key(
        TEXTS,
        "[]",
        "More files, relative to this one, with wildcards; in sorted order. They may hold pools, sockets and includes.",
    ),
    "supervisor": Key(Kind("table", _no_check, SUPERVISOR), "", "Directories and socket."),
    "defaults": Key(Kind("table", _no_check, POOL), "", "Any pool key, for every pool."),
    "pool": Key(
        Kind("table", _no_check, POOL), "", "`[pool.NAME]`: one pool each; NAME is `[a-z0-9][a-z0-9_-]{0,47}`."
    ),
    "socket": Key(
        Kind("table", _no_check, SOCKET), "", "`[socket.NAME]`: one listening socket each; NAME as a pool's."
    ),
    "timer": later("Timers."),
    "group": later("Groups of pools."),
}
