"""Config texts -> specs; and each kind of wrong config with the exact line that it is answered with."""

# ruff: noqa: E501 - the tables hold whole lines of output

from __future__ import annotations

import posixpath
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nssup import config, keys, locate, spec
from nssup.errors import ExitCode, Problem, SpecError
from nssup.record import Identity
from nssup.spec import (
    Backoff,
    ControlSpec,
    Intensity,
    LogSpec,
    PoolSpec,
    ReloadSpec,
    Requirement,
    RestartPolicy,
    Rule,
    StopStep,
    SupervisorSpec,
    User,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from nssup.config import Config

ROOT = Path(__file__).parent.parent


class Host:
    """A made-up machine: root on it, unless said otherwise."""

    def __init__(
        self,
        uid: int = 0,
        environ: dict[str, str] | None = None,
        capabilities: set[str] | None = None,
        files: set[str] | None = None,
    ) -> None:
        self.uid = uid
        self.gid = uid
        self.groups: tuple[int, ...] = (uid,)
        self.directory = "/here"
        self._environ = {"PATH": "/usr/bin:/bin"} if environ is None else environ
        self._capabilities = {"SETUID", "SETGID", "SYS_RESOURCE"} if capabilities is None else capabilities
        self._files = files or set()

    def variable(self, name: str) -> str | None:
        return self._environ.get(name)

    def user(self, name: str) -> User | None:
        users = [User("root", 0, 0, "/root", "/bin/sh"), User("app", 1000, 1000, "/home/app", "/bin/sh")]
        return next((user for user in users if name in (user.name, str(user.uid))), None)

    def group(self, name: str) -> int | None:
        return {"root": 0, "app": 1000, "video": 44}.get(name)

    def groups_of(self, user: User) -> tuple[int, ...]:
        return (user.gid, 44)

    def capable(self, capability: str) -> bool:
        return capability in self._capabilities

    def hard_limit(self, resource: str) -> int | None:
        return None if resource == "core" else 1000

    def lowest_port(self) -> int:
        return 1024

    def exists(self, path: str) -> bool:
        return path in self._files or self.is_executable(path)

    def is_directory(self, path: str) -> bool:
        return path in ("/", "/srv/0")

    def is_executable(self, path: str) -> bool:
        return posixpath.normpath(path) in ("/bin/app", "/bin/sh", "/srv/0/run")


def reader(files: dict[str, bytes]) -> config.Read:
    def read(pattern: str, relative_to: str) -> list[tuple[str, bytes]]:
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(relative_to), pattern))
        if wanted == "secret.toml":
            raise PermissionError(13, "Permission denied", wanted)
        return [
            (name, data)
            for name, data in sorted(files.items())
            if fnmatchcase(name, wanted) and name.count("/") == wanted.count("/")
        ]

    return read


def parse(text: str | bytes, host: Host | None = None, **files: str | bytes) -> Config:
    """files: web_toml="..." stands for web.toml, conf_d__a_toml for conf_d/a.toml."""
    texts = {
        name.replace("__", "/").replace("_toml", ".toml").replace("_env", ".env"): text for name, text in files.items()
    }
    encoded = {name: text.encode() if isinstance(text, str) else text for name, text in texts.items()}
    data = text.encode() if isinstance(text, str) else text
    return config.parse("n.toml", data, reader(encoded), host or Host())


def wrong(text: str | bytes, host: Host | None = None, **files: str | bytes) -> list[str]:
    with pytest.raises(SpecError) as refused:
        parse(text, host, **files)
    assert refused.value.exit_code == ExitCode.CONFIG
    assert list(refused.value.problems) == sorted(refused.value.problems)
    return [str(problem) for problem in refused.value.problems]


def pool(text: str, host: Host | None = None, **files: str | bytes) -> PoolSpec:
    """The pool whose keys are text."""
    return parse(f'version = 1\n[pool.p]\ncommand = ["app"]\n{text}', host, **files).pools["p"]


def wrong_pool(text: str, host: Host | None = None, **files: str | bytes) -> list[str]:
    """What is wrong with a pool whose keys are text; its first line is line 4 of the file."""
    return wrong(f'version = 1\n[pool.p]\ncommand = ["app"]\n{text}', host, **files)


def warned(text: str, host: Host | None = None) -> list[str]:
    return config.warning_lines(parse(f'version = 1\n[pool.p]\ncommand = ["app"]\n{text}', host))


# --- good configs ----------------------------------------------------------------------------------------------------

FULL = """
version = 1

[supervisor]
state_dir = "/var/lib/x"
runtime_dir = "/run/x"
log_dir = "/var/log/x"
socket = "/run/x.sock"

[pool.web]
command = ["app", "--port", "{index+9000}", "{{word}}", '{"json": 1}']
workers = 8
directory = "/srv/{index}"
user = "app"
group = "video"
groups = ["root", "44"]
umask = "027"
env = { INDEX = "{index:02}" }
env_inherit = ["AWS_*"]
type = "service"
essential = true
enabled = false
stdin = "null"
on_supervisor_death = "die"
init = false
namespaces = ["pid", "mount", "user"]
proc = false
stop = [{ signal = "INT", wait = "1m" }, { signal = 15, wait = "10s" }, "kill"]
reload = { signal = "HUP" }

[pool.web.restart]
policy = "on-failure"
success = [0, 3, "TERM"]
settle = "2s"
intensity = { deaths = 3, within = "1m", then = "fail-pool" }
rules = [{ exit = [75], then = "restart-now" }, { exit = [78], signal = ["SEGV", 6], then = "fail" }]
backoff = { first = "200ms", factor = 3, max = "1m", jitter = 0, reset_after = "1h" }

[pool.web.limits.rlimits]
nofile = 1024
core = "unlimited"
as = { soft = "1G", hard = "unlimited" }
cpu = "1m"
stack = "8M"

[pool.web.log]
merge = true
size = "1M"
age = "1d"
keep = 3
"""


def test_every_key() -> None:
    got = parse(FULL)
    assert got.supervisor == SupervisorSpec(
        state_dir="/var/lib/x", runtime_dir="/run/x", log_dir="/var/log/x", socket="/run/x.sock"
    )
    assert got.pools == {
        "web": PoolSpec(
            name="web",
            command=("app", "--port", "{index+9000}", "{{word}}", '{"json": 1}'),
            workers=8,
            directory="/srv/{index}",
            user="app",
            group="video",
            groups=("root", "44"),
            umask=0o027,
            env={"INDEX": "{index:02}"},
            env_inherit=("AWS_*",),
            essential=True,
            enabled=False,
            on_supervisor_death="die",
            init=False,
            namespaces=("pid", "mount", "user"),
            proc=False,
            stop=(StopStep(2, 60.0), StopStep(15, 10.0), StopStep(None)),
            reload=ReloadSpec(signal=1),
            restart=RestartPolicy(
                policy="on-failure",
                success=(0, 3, -15),
                settle=2.0,
                intensity=Intensity(deaths=3, within=60.0, then="fail-pool"),
                rules=(
                    Rule(then="restart-now", exit=(75,)),
                    Rule(then="fail", exit=(78,), signal=(11, 6)),
                ),
                backoff=Backoff(first=0.2, factor=3.0, max=60.0, jitter=0.0, reset_after=3600.0),
            ),
            rlimits={
                "nofile": (1024, 1024),
                "core": (None, None),
                "as": (1 << 30, None),
                "cpu": (60, 60),
                "stack": (8 << 20, 8 << 20),
            },
            log=LogSpec(merge=True, size=1 << 20, age=86400, keep=3),
        )
    }


def test_the_defaults_are_the_specs() -> None:
    assert pool("") == PoolSpec(name="p", command=("app",))


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ('command = ["app", "", "a b"]', ("app", "", "a b")),
        ("command = \"app 'a b' c\\\\ d\"", ("app", "a b", "c d")),
        ('command = "app $HOME *"', ("app", "$HOME", "*")),
        ('command = "app $HOME | wc"\nshell = true', ("/bin/sh", "-c", "app $HOME | wc")),
        ('command = ["app"]\nshell = false', ("app",)),
    ],
)
def test_commands(text: str, command: tuple[str, ...]) -> None:
    assert parse(f"version = 1\n[pool.p]\n{text}").pools["p"].command == command


@pytest.mark.parametrize(
    ("text", "policy"),
    [("", "never"), ('restart.policy = "on-failure"', "on-failure"), ('restart.settle = "5s"', "never")],
)
def test_a_oneshot_is_not_restarted_by_itself(text: str, policy: str) -> None:
    assert pool('type = "oneshot"\n' + text).restart.policy == policy


def test_defaults_lie_under_every_pool() -> None:
    got = parse("""
version = 1
[defaults]
workers = 3
env = { A = "1", B = "1" }
stop = ["kill"]
restart = { settle = "5s", backoff = { first = "1s", factor = 5 } }
limits.rlimits = { nofile = 10, nproc = 10 }
log.merge = true
[pool.a]
command = ["app"]
[pool.b]
command = ["app"]
workers = 4
env = { B = "2" }
stop = [{ signal = "INT", wait = "1s" }, "kill"]
restart.backoff.first = "2s"
limits.rlimits.nofile = 20
""").pools
    assert got["a"].workers == 3
    assert got["a"].env == {"A": "1", "B": "1"}
    assert got["a"].restart == RestartPolicy(settle=5.0, backoff=Backoff(first=1.0, factor=5.0))
    assert got["b"].workers == 4
    assert got["b"].env == {"A": "1", "B": "2"}
    assert got["b"].stop == (StopStep(2, 1.0), StopStep(None))
    assert got["b"].restart == RestartPolicy(settle=5.0, backoff=Backoff(first=2.0, factor=5.0))
    assert got["b"].rlimits == {"nofile": (20, 20), "nproc": (10, 10)}
    assert got["b"].log.merge


def test_a_byte_order_mark_is_no_problem() -> None:
    assert parse(b"\xef\xbb\xbfversion = 1\r\n").pools == {}


# --- wrong values ----------------------------------------------------------------------------------------------------

NO_DURATION = 'write a number and its unit (us, ms, s, m, h, d), such as "10s" or "1h30m"'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # unknown keys
        ("wokers = 1", "4:1: pool.p.wokers: unknown key: did you mean workers?"),
        ("cwd = '/'", "4:1: pool.p.cwd: unknown key: did you mean directory?"),
        ("nofile = 1", "4:1: pool.p.nofile: unknown key: did you mean limits.rlimits.nofile?"),
        ("limits.nofile = 1", "4:8: pool.p.limits.nofile: unknown key: did you mean rlimits.nofile?"),
        ("log.marge = true", "4:5: pool.p.log.marge: unknown key: did you mean merge?"),
        ("restart.x = 1", "4:9: pool.p.restart.x: unknown key: the keys here are policy, success, settle, backoff, intensity, rules"),
        ('"a b" = 1', '4:1: pool.p."a b": unknown key: the keys here are ' + ", ".join(n for n, k in keys.POOL.items() if k.kind)),
        # types
        ("workers = '3'", "4:1: pool.p.workers: must be a whole number, not a text"),
        ("workers = 3.0", "4:1: pool.p.workers: must be a whole number, not 3.0"),
        ("workers = true", "4:1: pool.p.workers: must be a whole number, not true or false"),
        ("workers = -1", "4:1: pool.p.workers: must be from 0 to 1000000"),
        ("essential = 'yes'", "4:1: pool.p.essential: must be true or false, not a text"),
        ("directory = 1979-05-27", "4:1: pool.p.directory: must be a text, not a date or time"),
        ("directory = ''", "4:1: pool.p.directory: is empty"),
        ("directory = 'srv'", "4:1: pool.p.directory: must be an absolute path: start it with /"),
        ("env = 'A=1'", '4:1: pool.p.env: must be a table, not a text: write env = { NAME = "value" }'),
        ("env.A = 8080", '4:5: pool.p.env.A: must be a text, not a number: write "8080"'),
        ("env.A = true", "4:5: pool.p.env.A: must be a text, not true or false"),
        ('env."A=B" = "1"', '4:5: pool.p.env."A=B": cannot be a variable\'s name: it must not be empty or hold "=" or NUL'),
        ('env.A = "x\\u0000"', "4:5: pool.p.env.A: holds a NUL byte, which no program can receive"),
        ("env_inherit = 'AWS_*'", "4:1: pool.p.env_inherit: must be a list, not a text: put it between [ and ]"),
        ("groups = ['app', 1]", '4:18: pool.p.groups.1: must be a text, not a number: write "1"'),
        ("restart = 'always'", '4:1: pool.p.restart: must be a table, not a text: write restart = { policy = "..." }'),
        ("umask = 22", '4:1: pool.p.umask: must be a text of octal digits, such as "022"'),
        ("umask = '089'", '4:1: pool.p.umask: must be a text of octal digits, such as "022"'),
        ("type = 'oneshoot'", '4:1: pool.p.type: "oneshoot" is none of service, oneshot: did you mean oneshot?'),
        ("on_supervisor_death = 'run'", '4:1: pool.p.on_supervisor_death: "run" is none of keep, die'),
        # units
        ("restart.settle = 10", '4:9: pool.p.restart.settle: 10 has no unit: write "10s" for seconds (or us, ms, m, h, d)'),
        ("restart.settle = '10'", '4:9: pool.p.restart.settle: 10 has no unit: write "10s" for seconds (or us, ms, m, h, d)'),
        ("restart.settle = 'soon'", f'4:9: pool.p.restart.settle: "soon" is no duration: {NO_DURATION}'),
        ("restart.settle = -1", f'4:9: pool.p.restart.settle: "-1" is no duration: {NO_DURATION}'),
        ("restart.settle = []", '4:9: pool.p.restart.settle: must be a duration, such as "10s", not a list'),
        ("limits.rlimits.core = 0", '4:16: pool.p.limits.rlimits.core: 0 has no unit: write "0B" for bytes (or K, M, G, T)'),
        ("limits.rlimits.as = nan", '4:16: pool.p.limits.rlimits.as: "nan" is no size: write a number and its unit (B, K, M, G, T; powers of 1024), such as "64M"'),
        # rules of one key
        ("restart.policy = 'alwys'", '4:9: pool.p.restart.policy: "alwys" is none of always, on-failure, never: did you mean always?'),
        ("restart.success = [0, 256]", "4:23: pool.p.restart.success.1: must be from 0 to 255"),
        ("restart.success = [-15]", "4:20: pool.p.restart.success.0: must be from 0 to 255"),
        ("restart.success = ['TREM']", '4:20: pool.p.restart.success.0: "TREM" is no signal: write its name, such as "TERM", or its number'),
        ("restart.intensity = 5", '4:9: pool.p.restart.intensity: must be a table, not a number: write intensity = { deaths = 5, within = "60s" }'),
        ("restart.intensity = { deaths = 5 }", '4:9: pool.p.restart.intensity.within: is missing: write intensity = { deaths = 5, within = "60s" }'),
        ("restart.intensity = { deaths = 0, within = '1s' }", "4:23: pool.p.restart.intensity.deaths: must be from 1 to 1000"),
        ("restart.intensity = { deaths = 1, within = '0s' }", "4:35: pool.p.restart.intensity.within: must be longer than nothing"),
        ("restart.rules = { exit = [1] }", "4:9: pool.p.restart.rules: must be a list, not a table: put it between [ and ]"),
        ("restart.rules = [{ exit = [1] }]", '4:18: pool.p.restart.rules.0.then: is missing: write { exit = [75], then = "restart-now" }'),
        ("restart.rules = [{ then = 'fail' }]", '4:18: pool.p.restart.rules.0: matches nothing: give exit = [75] or signal = ["SEGV"]'),
        ("restart.rules = [{ exit = [1], then = 'halt' }]", '4:32: pool.p.restart.rules.0.then: "halt" is none of restart-now, backoff, stop, fail'),
        ("restart.backoff.factor = 0.5", "4:17: pool.p.restart.backoff.factor: must be from 1 to 1000"),
        ("restart.backoff.jitter = nan", "4:17: pool.p.restart.backoff.jitter: must be from 0 to 1"),
        ("restart.backoff.first = '1h'", "4:17: pool.p.restart.backoff.first: is longer than max, which is 30 s"),
        ("limits.rlimits.cpu = '1500ms'", "4:16: pool.p.limits.rlimits.cpu: must be whole seconds: the kernel counts no parts of them"),
        ("limits.rlimits.nproc = { soft = 1 }", "4:16: pool.p.limits.rlimits.nproc.hard: is missing: give soft and hard"),
        ("limits.rlimits.nproc = { soft = 2, hard = 1 }", "4:16: pool.p.limits.rlimits.nproc: has a soft limit above the hard one"),
        ("limits.rlimits.nofle = 1", "4:16: pool.p.limits.rlimits.nofle: unknown key: did you mean nofile?"),
        ("stop = 'kill'", "4:1: pool.p.stop: must be a list, not a text: put it between [ and ]"),
        ("stop = []", '4:1: pool.p.stop: is empty: the shortest sequence is ["kill"]'),
        ("stop = ['TERM', 'kill']", '4:9: pool.p.stop.0: must be { signal = "TERM", wait = "10s" } or "kill"'),
        ("stop = [{ signal = 'TERM' }, 'kill']", '4:9: pool.p.stop.0.wait: is missing: write { signal = "TERM", wait = "10s" }'),
        ("stop = [{ signal = 'FOO', wait = '1s' }, 'kill']", '4:11: pool.p.stop.0.signal: "FOO" is no signal: write its name, such as "TERM", or its number'),
        ("stop = [{ signal = 'TERM', wait = 10 }, 'kill']", '4:28: pool.p.stop.0.wait: 10 has no unit: write "10s" for seconds (or us, ms, m, h, d)'),
        ("stop = [{ signal = 'TERM', wait = '1s' }]", '4:1: pool.p.stop: must end with "kill", or a worker could survive its stop'),
        ("stop = ['kill', 'kill']", '4:9: pool.p.stop.0: "kill" ends the sequence: nothing can come after it'),
        # namespaces
        ("namespaces = ['pid', 'mnt']", '4:22: pool.p.namespaces.1: "mnt" is none of pid, mount, uts, ipc, user: did you mean mount?'),
        ("namespaces = ['pid', 'mount', 'net']", '4:31: pool.p.namespaces.2: "net" is not in this version (0.1.0): leave it out'),
        ("namespaces = ['mount']", "4:1: pool.p.namespaces: must hold pid: without it a stop could leave processes behind"),
        ("namespaces = ['pid']", "4:1: pool.p.namespaces: a private /proc needs a private mount namespace, or it would replace the host's: add mount, or set proc = false"),
        ("namespaces = ['pid', 'mount']\nhostname = 'x'", "5:1: pool.p.hostname: needs the uts namespace, or it would rename the host: add uts to namespaces"),
        # fields
        ("hostname = 'web-{idx}'", "4:1: pool.p.hostname: unknown field {idx}: for a literal brace write {{idx}}"),
        ("env = { A = 'x', B = '{home}' }", "4:18: pool.p.env.B: unknown field {home}: for a literal brace write {{home}}"),
        # between keys
        ("shell = true", "3:1: pool.p.command: is a list, but shell = true takes a text: join it, or leave out shell"),
        ("type = 'oneshot'\nrestart.policy = 'always'", '5:9: pool.p.restart.policy: a oneshot is meant to end, "always" would not let it: use "never" or "on-failure"'),
        # the host
        ("user = 'nobody-here'", '4:1: pool.p.user: there is no user "nobody-here" on this host: make it, or name another'),
        ("user = 1000", '4:1: pool.p.user: must be a text, not a number: write "1000"'),
        ("user = '4242'", "4:1: pool.p.user: 4242 is in no user database, so its group is unknown: give group too"),
        ("group = 'wheels'", '4:1: pool.p.group: there is no group "wheels" on this host: make it, or name another'),
        ("groups = ['app', 'wheels']", '4:18: pool.p.groups.1: there is no group "wheels" on this host: make it, or name another'),
    ],
)  # fmt: skip
def test_one_wrong_key(text: str, line: str) -> None:
    assert wrong_pool(text) == ["n.toml:" + line]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("command = []", "is empty: name the program to run"),
        ('command = ""', "is empty: name the program to run"),
        ('command = "  "', "is empty: name the program to run"),
        ('command = ["", "x"]', "is empty: name the program to run"),
        ("command = \"''\"", "is empty: name the program to run"),
        ('command = " "\nshell = true', "is empty: name the program to run"),
        ('command = "app \'x"', "cannot be split: no closing quotation; give it as a list"),
        ("command = 1", 'must be a list of texts, such as ["app", "--port", "80"], or a text, not a number'),
    ],
)
def test_a_wrong_command(text: str, why: str) -> None:
    assert wrong(f"version = 1\n[pool.p]\n{text}") == [f"n.toml:3:1: pool.p.command: {why}"]


def test_a_missing_command_points_at_the_header() -> None:
    why = 'is missing: name the program to run, such as command = ["app", "--flag"]'
    assert wrong("version = 1\n[pool.web.restart]\n\n[pool.web]\nworkers = 2") == [
        f"n.toml:4:7: pool.web.command: {why}"
    ]


def test_a_misspelt_command_is_not_missing_as_well() -> None:
    assert wrong('version = 1\n[pool.p]\ncomand = "app"') == [
        "n.toml:3:1: pool.p.comand: unknown key: did you mean command?"
    ]


def test_a_field_in_a_command_points_at_its_word() -> None:
    assert wrong('version = 1\n[pool.p]\ncommand = [\n  "app",\n  "{port}",\n]') == [
        "n.toml:5:3: pool.p.command.1: unknown field {port}: for a literal brace write {{port}}"
    ]


@pytest.mark.parametrize("name", ["Web", "-web", "w" * 49, "a.b", ""])
def test_a_wrong_pool_name(name: str) -> None:
    shown = locate.dotted(("pool", name))
    assert wrong(f'version = 1\n[pool."{name}"]\ncommand = ["app"]') == [
        f"n.toml:2:7: {shown}: {name!r} is no pool name: use [a-z0-9][a-z0-9_-]{{0,47}}"
    ]


LATER = [(keys.TOP, ""), (keys.SUPERVISOR, "supervisor."), (keys.POOL, "pool.p."), (keys.RESTART, "pool.p.restart."),
         (keys.LIMITS, "pool.p.limits."), (keys.LOG, "pool.p.log.")]  # fmt: skip


@pytest.mark.parametrize(
    "path", [prefix + name for table, prefix in LATER for name, key in table.items() if key.kind is None]
)
def test_what_comes_later_is_refused_by_name(path: str) -> None:
    assert wrong(f'version = 1\npool.p.command = "app"\n{path} = {{}}') == [
        f"n.toml:3:{path.rfind('.') + 2}: {path}: not in this version (0.1.0): leave it out"
    ]


def test_what_comes_later_is_what_interface_promises() -> None:
    """The keys that people may write by the promised interface: each is there, or refused as not yet there."""
    for path in (
        "rolling recycle isolation credentials "
        "limits.memory limits.cpu limits.pids limits.io limits.oom "
        "log.total log.compress log.fsync log.multiline log.rate log.sink log.overflow log.on_error"
    ).split():
        assert "not in this version" in wrong_pool(f"{path} = 1")[0]
    assert "not in this version" in wrong_pool('stdin = "pty"')[0]


def test_all_problems_come_at_once_and_sorted() -> None:
    text = """\
version = 1
sock = 1
[defaults]
restart.policy = "alwys"
[pool.b]
comand = "app"
workers = "3"
env = { A = 1, B = "{x}" }
[pool.a]
command = ["app"]
user = "nobody-here"
restart = { settle = 1, backoff = { first = 5, max = "1x" } }
directory = "x"
[supervisor]
socket = 5
"""
    assert wrong(text) == [
        "n.toml:2:1: sock: unknown key: did you mean socket?",
        'n.toml:4:9: defaults.restart.policy: "alwys" is none of always, on-failure, never: did you mean always?',
        "n.toml:6:1: pool.b.comand: unknown key: did you mean command?",
        "n.toml:7:1: pool.b.workers: must be a whole number, not a text",
        'n.toml:8:9: pool.b.env.A: must be a text, not a number: write "1"',
        "n.toml:8:16: pool.b.env.B: unknown field {x}: for a literal brace write {{x}}",
        'n.toml:11:1: pool.a.user: there is no user "nobody-here" on this host: make it, or name another',
        'n.toml:12:13: pool.a.restart.settle: 1 has no unit: write "1s" for seconds (or us, ms, m, h, d)',
        'n.toml:12:37: pool.a.restart.backoff.first: 5 has no unit: write "5s" for seconds (or us, ms, m, h, d)',
        f'n.toml:12:48: pool.a.restart.backoff.max: "1x" is no duration: {NO_DURATION}',
        "n.toml:13:1: pool.a.directory: must be an absolute path: start it with /",
        'n.toml:15:1: supervisor.socket: must be a text, not a number: write "5"',
    ]


def test_what_is_wrong_in_defaults_is_said_once_and_there() -> None:
    pools = '[pool.a]\ncommand = ["app"]\n[pool.b]\ncommand = ["app"]\n'
    assert wrong(f"version = 1\n[defaults]\nworkers = 'x'\n{pools}") == [
        "n.toml:3:1: defaults.workers: must be a whole number, not a text"
    ]
    assert wrong("version = 1\n[defaults]\nworkrs = 1") == [
        "n.toml:3:1: defaults.workrs: unknown key: did you mean workers?"
    ]


def test_a_rule_broken_through_defaults_names_the_pool_and_points_there() -> None:
    text = 'version = 1\n[defaults]\nhostname = "x"\n[pool.a]\ncommand = ["app"]\nnamespaces = ["pid", "mount"]\n[pool.b]\ncommand = ["app"]'
    why = "needs the uts namespace, or it would rename the host: add uts to namespaces"
    assert wrong(text) == [f"n.toml:3:1: pool.a.hostname: {why}"]


def test_a_pools_own_value_is_not_sought_in_defaults() -> None:
    text = 'version = 1\n[defaults]\ncommand = ["app", "x"]\n[pool.a]\ncommand = "app {port}"'
    assert wrong(text) == ["n.toml:5:1: pool.a.command.1: unknown field {port}: for a literal brace write {{port}}"]


# --- the file as a whole -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "1:1: version: is missing: write version = 1 at the top"),
        (b"version = 2\nsock = 1", "1:1: version: 2 is not known to this nssup (0.1.0): the only version is 1"),
        (b"version = '1'", '1:1: version: "1" is not known to this nssup (0.1.0): the only version is 1'),
        (b"version = 1.0", "1:1: version: 1.0 is not known to this nssup (0.1.0): the only version is 1"),
        (b"version = true", "1:1: version: true is not known to this nssup (0.1.0): the only version is 1"),
        (b"version = 0x" + b"f" * 5000, "1:1: version: ... is not known to this nssup (0.1.0): the only version is 1"),
        (b"version = 1\nx = \xff", "2:5: byte 0xff is not UTF-8: save the file as UTF-8"),
        (b"# \xc3\xa4\xc3\xa4 \xe4", "1:6: byte 0xe4 is not UTF-8: save the file as UTF-8"),
        (b"\xff\xfev\0e\0", "1:1: byte 0xff is not UTF-8: save the file as UTF-8"),
        (b"version = 1\n[pool.a]\n[pool.a]\n", "3:7: pool.a: is defined already, in line 2: keep one of them"),
        (b"version = 1\r\n[pool.a]\r\n[pool.a]\r\n", "3:7: pool.a: is defined already, in line 2: keep one of them"),
        (b"[pool.a]\nuser='x'\nuser='y'\n", "3:1: pool.a.user: is defined already, in line 2: keep one of them"),
        (b"version = 1\nversion = 1", "2:1: version: is defined already, in line 1: keep one of them"),
        (b"x = { a = 1, a = 2 }", "1:14: x.a: is defined already, in line 1: keep one of them"),
        (b"x = 1\n[x.y]", "2:4: x: is defined already, in line 1: keep one of them"),
        (b"version = one", "1:11: is no TOML: invalid value: a text needs quotes"),
        (b"version = 1\n= 2", "2:1: is no TOML: invalid statement: write key = value, or [table]"),
        (b"[pool.a\nx = 1", "1:8: is no TOML: expected ']' at the end of a table declaration"),
        (b"x = [1,\n2\n", "2:2: is no TOML: unclosed array: the file ends before something is complete"),
        (b'x = "a\n', "1:7: is no TOML: illegal character '\\n': close the text with its quote on the same line"),
        (b"x = 1 y = 2", "1:7: is no TOML: expected newline or end of document after a statement: write one key = value a line; a text needs quotes"),
        (b"x = " + b"1" * 5000, "1:5: is no TOML: a number is too long"),
        (b"x = " + b"[" * 100_000, "1:1: is nested too deeply"),
        (b"version = 1\npool = 1", "2:1: pool: must be a table: write [pool.NAME]"),
        (b"version = 1\n[[pool]]", "2:3: pool: must be a table: write [pool.NAME]"),
        (b"version = 1\n[pool]\ncommand = 'x'", "3:1: pool.command: must be a table: write [pool.NAME] and its keys below"),
        (b"version = 1\ndefaults = 1", "2:1: defaults: must be a table: write [defaults]"),
        (b"version = 1\nsupervisor = 1", "2:1: supervisor: must be a table: write [supervisor]"),
        (b"version = 1\npools = 1", "2:1: pools: unknown key: did you mean pool?"),
        (b"version = 1\n[supervisor]\nstate = 'x'", "3:1: supervisor.state: unknown key: did you mean state_dir?"),
        (b"version = 1\ninclude = 'x'", "2:1: include: must be a list, not a text: put it between [ and ]"),
    ],
)  # fmt: skip
def test_a_wrong_file(data: bytes, line: str) -> None:
    assert wrong(data) == ["n.toml:" + line]


# --- includes ----------------------------------------------------------------------------------------------------------

POOL_A = '[pool.a]\ncommand = ["app"]\n'
POOL_B = '[pool.b]\ncommand = ["app"]\n'


def test_includes_are_relative_sorted_and_may_include() -> None:
    got = parse(
        'version = 1\ninclude = ["conf/*.toml"]\n[defaults]\nworkers = 2\n',
        conf__b_toml=POOL_B,
        conf__a_toml='version = 1\ninclude = ["more/c.toml"]\n' + POOL_A,
        conf__more__c_toml='[pool.c]\ncommand = ["app"]\n',
    )
    assert {name: spec.workers for name, spec in got.pools.items()} == {"a": 2, "c": 2, "b": 2}
    assert list(got.pools) == ["a", "c", "b"]
    assert got.origins["pool", "c", "command"] == "conf/more/c.toml:2"


def test_a_pattern_may_match_nothing() -> None:
    assert parse('version = 1\ninclude = ["conf/*.toml"]').pools == {}


@pytest.mark.parametrize(
    ("include", "files", "line"),
    [
        ("'a.toml'", {}, 'n.toml:2:12: include.0: there is no file "a.toml": make it, or leave it out'),
        ("'secret.toml'", {}, 'n.toml:2:12: include.0: cannot read "secret.toml": permission denied'),
        ("'n.toml'", {"n_toml": ""}, "n.toml:2:12: include.0: goes in a circle: n.toml -> n.toml: leave one out"),
        ("'a.toml'", {"a_toml": "include = ['b.toml']", "b_toml": "include = ['./a.toml']"},
         "b.toml:1:12: include.0: goes in a circle: a.toml -> b.toml -> a.toml: leave one out"),
        ("'a.toml', '*.toml'", {"a_toml": POOL_A}, "n.toml:2:22: include.1: a.toml is included already: leave one out"),
        ("'a.toml'", {"a_toml": "version = 3\nx = 1"},
         "a.toml:1:1: version: 3 is not known to this nssup (0.1.0): the only version is 1"),
        ("'a.toml'", {"a_toml": "[defaults]"},
         "a.toml:1:2: defaults: belongs in the main file, n.toml: an included one has pools and sockets"),
        ("'a.toml'", {"a_toml": "[supervisor]"},
         "a.toml:1:2: supervisor: belongs in the main file, n.toml: an included one has pools and sockets"),
        ("'a.toml'", {"a_toml": "x ="}, "a.toml:1:4: is no TOML: invalid value: the file ends before something is complete"),
        ("'a.toml'", {"a_toml": b"\xff"}, "a.toml:1:1: byte 0xff is not UTF-8: save the file as UTF-8"),
        ("'a.toml'", {"a_toml": POOL_A + "wrkers = 1"}, "a.toml:3:1: pool.a.wrkers: unknown key: did you mean workers?"),
    ],
)  # fmt: skip
def test_a_wrong_include(include: str, files: dict[str, str | bytes], line: str) -> None:
    assert wrong(f"version = 1\ninclude = [{include}]", None, **files) == [line]


def test_a_pool_defined_in_two_files() -> None:
    assert wrong('version = 1\ninclude = ["a.toml"]\n' + POOL_A, a_toml="# moved\n" + POOL_A) == [
        "a.toml:2:7: pool.a: is defined already, at n.toml:3: rename one of them"
    ]


def test_problems_of_all_files_come_together() -> None:
    lines = wrong('version = 1\ninclude = ["*.toml"]\nx = 1', a_toml="y = 1", b_toml="z =")
    assert [line.split(": ")[0] for line in lines] == ["a.toml:1:1", "b.toml:1:4", "n.toml:3:1"]


def test_includes_do_not_go_deeper_than_makes_sense() -> None:
    def read(pattern: str, relative_to: str) -> list[tuple[str, bytes]]:
        return [(posixpath.join(posixpath.dirname(relative_to), pattern), b"include = ['deeper/n.toml']")]

    with pytest.raises(SpecError, match="files are nested deeper than 16: include them higher up"):
        config.parse("n.toml", b"version = 1\ninclude = ['deeper/n.toml']", read, Host())


# --- env files -----------------------------------------------------------------------------------------------------------


def test_env_files() -> None:
    got = pool(
        'env_file = ["a.env", "?none.env", "b.env"]\nenv = { C = "3" }',
        a_env="A=1\nB=1\nC=1\n",
        b_env='B="2 {index}"\n',
    )
    assert got.env == {"A": "1", "B": "2 {index}", "C": "3"}
    assert pool('env_file = "a.env"', a_env="A=1").env == {"A": "1"}


def test_env_files_are_relative_to_the_file_that_names_them() -> None:
    got = parse("version = 1\ninclude = ['x/a.toml']", x__a_toml=POOL_A + 'env_file = "a.env"', x__a_env="A=1")
    assert got.pools["a"].env == {"A": "1"}
    assert got.origins["pool", "a", "env", "A"] == "x/a.env:1"


@pytest.mark.parametrize(
    ("text", "files", "line"),
    [
        ('env_file = "a.env"', {}, 'n.toml:4:1: pool.p.env_file: there is no file "a.env": make it, or leave it out'),
        ('env_file = ["a.env"]', {}, 'n.toml:4:13: pool.p.env_file.0: there is no file "a.env": make it, or leave it out'),
        ('env_file = "a.env"', {"a_env": "A=1\nB"}, "a.env:2:1: is no variable: write NAME=value, or # before a comment"),
        ('env_file = "a.env"', {"a_env": b"A=\xff"}, "a.env:1:3: byte 0xff is not UTF-8: save the file as UTF-8"),
        ('env_file = "a.env"', {"a_env": "A=1\nB={x}"},
         "a.env:2:1: pool.p.env.B: unknown field {x}: for a literal brace write {{x}}"),
        ('env_file = "a.env"\nenv.B = "{x}"', {"a_env": "B={y}"},
         "n.toml:5:5: pool.p.env.B: unknown field {x}: for a literal brace write {{x}}"),
        ("env_file = 1", {}, 'n.toml:4:1: pool.p.env_file: must be a list, not a number: put it between [ and ]'),
    ],
)  # fmt: skip
def test_a_wrong_env_file(text: str, files: dict[str, str | bytes], line: str) -> None:
    assert wrong_pool(text, None, **files) == [line]


# --- whom workers run as ------------------------------------------------------------------------------------------------

HOME = {"HOME": "/home/app"}
XDG = HOME | {"XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r", "XDG_CONFIG_HOME": "/c"}
PLAIN = Host(uid=1000, capabilities=set())


@pytest.mark.parametrize(
    ("text", "host", "identity"),
    [
        ("", Host(), None),
        ("user = 'app'", Host(), Identity(1000, 1000, (1000, 44))),
        ("user = '1000'", Host(), Identity(1000, 1000, (1000, 44))),
        ("user = 'app'\ngroup = 'video'", Host(), Identity(1000, 44, (1000, 44))),
        ("user = 'app'\ngroup = '7'\ngroups = []", Host(), Identity(1000, 7, ())),
        ("user = '4242'\ngroup = '7'", Host(), Identity(4242, 7, ())),
        ("group = 'video'", Host(), Identity(0, 44, (0,))),
        ("user = 'app'", PLAIN, None),
        ("user = '1000'\ngroup = 'app'", PLAIN, None),
    ],
)
def test_identities(text: str, host: Host, identity: Identity | None) -> None:
    assert config.resolve(pool(text, host), host) == (identity, [])


@pytest.mark.parametrize(
    ("text", "host", "home"),
    [
        ("", Host(), "/root"),
        ("user = 'app'", Host(), "/home/app"),
        ("user = '4242'\ngroup = '7'", Host(), "/"),
        ("group = 'video'", Host(), "/root"),
        ("", Host(4242, HOME), None),
    ],
)
def test_accounts(text: str, host: Host, home: str | None) -> None:
    made = pool(text, host)
    identity, user = config.account(made, host)
    assert identity == config.resolve(made, host)[0]
    assert (user.home if user else None) == home


def test_an_account_that_is_not_there() -> None:
    with pytest.raises(SpecError, match=r'^pool.p.user: there is no user "x" on this host'):
        config.account(PoolSpec(name="p", command=("app",), user="x"), Host())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("user = 'root'", "n.toml:4:1: pool.p.user: this supervisor cannot switch to it, it has no CAP_SETUID: run it as root, or leave user out"),
        ("group = 'video'", "n.toml:4:1: pool.p.group: this supervisor cannot switch to it, it has no CAP_SETGID: run it as root, or leave group out"),
        ("groups = []", "n.toml:4:1: pool.p.groups: this supervisor cannot switch to it, it has no CAP_SETGID: run it as root, or leave groups out"),
    ],
)  # fmt: skip
def test_only_root_can_switch(text: str, line: str) -> None:
    assert wrong_pool(text, PLAIN) == [line]


# --- directories --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "places"),
    [
        ("", Host(), ("/var/lib/nssup", "/run/nssup", "/var/log/nssup", "/run/nssup/nssup.sock")),
        ("", Host(0, XDG), ("/var/lib/nssup", "/run/nssup", "/var/log/nssup", "/run/nssup/nssup.sock")),
        ("state_dir = '/x'", Host(), ("/x", "/x/run", "/var/log/nssup", "/x/run/nssup.sock")),
        ("runtime_dir = '/x'", Host(), ("/var/lib/nssup", "/x", "/var/log/nssup", "/x/nssup.sock")),
        ("state_dir = '/x'\nruntime_dir = '/y'", Host(), ("/x", "/y", "/var/log/nssup", "/y/nssup.sock")),
        ("state_dir = 'x/../y/'\nsocket = 's'", Host(), ("/here/y", "/here/y/run", "/var/log/nssup", "/here/s")),
        ("", Host(1000, XDG), ("/s/nssup", "/r/nssup", "/s/nssup/log", "/r/nssup/nssup.sock")),
        ("", Host(1000, HOME), (
            "/home/app/.local/state/nssup", "/home/app/.local/state/nssup/run", "/home/app/.local/state/nssup/log",
            "/home/app/.local/state/nssup/run/nssup.sock")),
        ("", Host(1000, {}), (
            "/home/app/.local/state/nssup", "/home/app/.local/state/nssup/run", "/home/app/.local/state/nssup/log",
            "/home/app/.local/state/nssup/run/nssup.sock")),
        ("", Host(1000, HOME | {"XDG_STATE_HOME": "rel", "XDG_RUNTIME_DIR": ""}), (
            "/home/app/.local/state/nssup", "/home/app/.local/state/nssup/run", "/home/app/.local/state/nssup/log",
            "/home/app/.local/state/nssup/run/nssup.sock")),
        ("state_dir = '/x'", Host(1000, XDG), ("/x", "/x/run", "/s/nssup/log", "/x/run/nssup.sock")),
    ],
)  # fmt: skip
def test_directories(text: str, host: Host, places: tuple[str, str, str, str]) -> None:
    got = parse(f"version = 1\n[supervisor]\n{text}", host).supervisor
    assert (got.state_dir, got.runtime_dir, got.log_dir, got.socket) == places


def test_no_home_at_all() -> None:
    why = "has no default, as neither HOME nor XDG_* is set: give it"
    assert wrong("version = 1\n[supervisor]", Host(4242, {})) == [
        f"n.toml:2:2: supervisor.{key}: {why}" for key in ("log_dir", "runtime_dir", "state_dir")
    ]


@pytest.mark.parametrize(
    ("text", "key", "length"),
    [
        ("socket = '/" + "x" * 107 + "'", "socket", 108),
        ("socket = '/" + "ä" * 60 + "'", "socket", 121),
        ("runtime_dir = '/" + "x" * 97 + "'", "runtime_dir", 109),
        ("state_dir = '/" + "x" * 97 + "'", "state_dir", 113),
    ],
)
def test_a_socket_path_that_is_too_long(text: str, key: str, length: int) -> None:
    assert wrong(f"version = 1\n[supervisor]\n{text}") == [
        f"n.toml:3:1: supervisor.{key}: the socket's path would have {length} bytes, 107 are possible: give a shorter one"
    ]


def test_a_socket_path_that_just_fits() -> None:
    assert len(parse("version = 1\n[supervisor]\nsocket = '/" + "x" * 106 + "'").supervisor.socket) == 107


@pytest.mark.parametrize(
    ("files", "environ", "found"),
    [
        ({"nssup.toml", "/etc/nssup/nssup.toml"}, HOME, "nssup.toml"),
        ({"/home/app/.config/nssup/nssup.toml", "/etc/nssup/nssup.toml"}, HOME, "/home/app/.config/nssup/nssup.toml"),
        ({"/c/nssup/nssup.toml", "/home/app/.config/nssup/nssup.toml"}, XDG, "/c/nssup/nssup.toml"),
        ({"/etc/nssup/nssup.toml"}, HOME, "/etc/nssup/nssup.toml"),
        ({"/etc/nssup/nssup.toml"}, HOME | {"NSSUP_CONFIG": "/x.toml"}, "/x.toml"),
        (set(), HOME, None),
    ],
)
def test_which_config_is_found(files: set[str], environ: dict[str, str], found: str | None) -> None:
    assert config.find_config(Host(1000, environ, files=files)) == found


# --- warnings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("directory = '/nowhere'", '4:1: warning: pool.p.directory: there is no directory "/nowhere" on this host: make it'),
        ("init = false", "4:1: warning: pool.p.init: without init nobody reaps orphans or keeps exits for the next supervisor: only for programs that are inits"),
        ("env.PATH = '/sbin'", '3:1: warning: pool.p.command: there is no program "app" in PATH: install it, or correct the name'),
    ],
)  # fmt: skip
def test_warnings(text: str, line: str) -> None:
    assert warned(text) == ["n.toml:" + line]


def test_keep_needs_an_init() -> None:
    assert warned("on_supervisor_death = 'keep'") == []
    lines = warned("on_supervisor_death = 'keep'\ninit = false")
    assert [line.split(": ")[2] for line in lines] == ["pool.p.on_supervisor_death", "pool.p.init"]


@pytest.mark.parametrize(
    ("command", "files", "why"),
    [
        ("nope", (), 'there is no program "nope" in PATH: install it, or correct the name'),
        ("/opt/nope", (), 'there is no program "/opt/nope" on this host: install it, or correct the name'),
        ("/opt/nope", ("/opt/nope",), '"/opt/nope" is not executable: chmod +x it, or name another'),
        ("nope", ("/usr/bin/nope",), '"/usr/bin/nope" is not executable: chmod +x it, or name another'),
        ("app", (), None),
        ("/bin/app", (), None),
    ],
)
def test_a_program_that_cannot_run(command: str, files: tuple[str, ...], why: str | None) -> None:
    got = parse(f"version = 1\n[pool.p]\ncommand = ['{command}']", Host(files=set(files)))
    assert config.warning_lines(got) == ([f"n.toml:3:1: warning: pool.p.command: {why}"] if why else [])


def test_a_program_is_looked_for_from_the_first_workers_directory() -> None:
    assert parse("version = 1\n[pool.p]\ncommand = ['./run']\ndirectory = '/srv/{index}'").warnings == ()


def test_limits_above_the_supervisors_own() -> None:
    text = "limits.rlimits = { nofile = 1000, nproc = 1001, as = 'unlimited', core = 'unlimited' }"
    why = "is above this supervisor's own hard limit, 1000, and it has no CAP_SYS_RESOURCE: ask for less"
    assert warned(text) == []
    assert warned(text, Host(capabilities=set())) == [
        f"n.toml:4:35: warning: pool.p.limits.rlimits.nproc: {why}",
        f"n.toml:4:49: warning: pool.p.limits.rlimits.as: {why}",
    ]


def check(text: str, host: Host | None = None) -> tuple[list[str], ExitCode]:
    return config.check("n.toml", text.encode(), reader({}), host or Host())


def test_check() -> None:
    assert check("version = 1") == (["n.toml: ok, 0 pools, 0 workers"], ExitCode.OK)
    assert check("version = 1\n" + POOL_A) == (["n.toml: ok, 1 pool, 1 worker"], ExitCode.OK)
    lines, code = check("version = 1\n" + POOL_A + "workers = 3\ninit = false\n" + POOL_B)
    assert lines[0].startswith("n.toml:5:1: warning: pool.a.init: ")
    assert (lines[1:], code) == (["n.toml: ok, 2 pools, 4 workers"], ExitCode.OK)
    assert check("version = 1\nx = 1\ny = 2")[1] == ExitCode.CONFIG
    assert len(check("version = 1\nx = 1\ny = 2")[0]) == 2


# --- origins ------------------------------------------------------------------------------------------------------------


def test_origins() -> None:
    origins = parse("""\
version = 1
[supervisor]
state_dir = "/x"
[defaults]
workers = 2
restart.backoff.first = "1s"
[pool.a]
command = ["app"]
restart.backoff.max = "2s"
""").origins
    assert dict(origins) == {
        ("supervisor", "state_dir"): "n.toml:3",
        ("pool", "a"): "n.toml:7",
        ("pool", "a", "workers"): "n.toml:5",
        ("pool", "a", "command"): "n.toml:8",
        ("pool", "a", "restart"): "n.toml:9",
        ("pool", "a", "restart", "backoff"): "n.toml:9",
        ("pool", "a", "restart", "backoff", "first"): "n.toml:6",
        ("pool", "a", "restart", "backoff", "max"): "n.toml:9",
    }
    assert len(origins) == 8


# --- promises about the whole -------------------------------------------------------------------------------------------


def refused_or_taken(data: bytes, host: Host, read: config.Read) -> None:
    problems: tuple[Problem, ...] | None = None
    try:
        config.parse("n.toml", data, read, host)
    except SpecError as error:
        problems = error.problems
    assert problems != ()
    for problem in problems or ():
        assert "\n" not in str(problem)
        assert len(str(problem)) < 2000
        assert (problem.line, problem.col) >= (1, 1)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(alphabet="pol.[]{}=,\"'#\n \r1\\x\0é", max_size=60).map(str.encode)))
def test_any_bytes_are_taken_or_refused(data: bytes) -> None:
    refused_or_taken(data, Host(), reader({}))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good config with a few pieces cut, doubled or overwritten."""
    data = FULL.encode()
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 30)))
        piece = draw(
            st.sampled_from([b"", data[start:end] * 2, b"\xff", b"[", b"]", b'"', b"=", b"1", b"\n", b"{x}", b"nan"])
        )
        data = data[:start] + piece + data[end:]
    return data


@settings(derandomize=True, max_examples=300, deadline=None)
@given(damaged())
def test_a_damaged_config_is_taken_or_refused(data: bytes) -> None:
    refused_or_taken(data, Host(), reader({}))


def every_key(table: dict[str, keys.Key]) -> list[str]:
    found = []
    for name, key in table.items():
        found.append(name)
        if key.kind and key.kind.keys:
            found += [f"{name}.{inner}" for inner in every_key(key.kind.keys)]
    return found


ODD = ["1", "-1", "0", "1.5", "nan", "-inf", "true", '""', '"x"', '"10s"', '"64M"', '"{index}"', '"{no}"', '"\\u0000"', "[]", "{}", "[[]]",
       "[1]", '["pid"]', '["kill"]', "[{}]", "{ a = 1 }", '{ soft = 1, hard = "1M" }', "1979-05-27", "07:00:00", "0x" + "f" * 5000,
       '"' + "y" * 300 + '"', '[{ signal = "TERM", wait = "1s" }]']  # fmt: skip


@settings(derandomize=True, max_examples=400, deadline=None)
@given(
    st.dictionaries(st.sampled_from(every_key(keys.POOL)), st.sampled_from(ODD), max_size=5),
    st.dictionaries(st.sampled_from(every_key(keys.POOL)), st.sampled_from(ODD), max_size=5),
    st.dictionaries(st.sampled_from(every_key(keys.SUPERVISOR)), st.sampled_from(ODD), max_size=2),
    st.sampled_from([Host(), PLAIN, Host(4242, {})]),
)
def test_odd_values_are_taken_or_refused(
    defaults: dict[str, str], own: dict[str, str], supervisor: dict[str, str], host: Host
) -> None:
    tables = {"supervisor": supervisor, "defaults": defaults, "pool.p": own}
    text = "".join(
        f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in table.items()) for name, table in tables.items()
    )
    refused_or_taken(f"version = 1\n{text}".encode(), host, reader({"x": b"A=1\n{index}=2\n"}))


def test_deep_tables_of_no_meaning_are_refused() -> None:
    deep = "x." * 2000 + "x = 1\n"
    lines = wrong(f"version = 1\n[defaults]\nenv.{deep}log.{deep}[pool.p]\ncommand = 'app'\nenv.{deep}log.{deep}")
    assert len(lines) == 4


def test_a_good_config_is_never_located(monkeypatch: pytest.MonkeyPatch) -> None:
    def locate_nothing(text: str) -> dict[Any, Any]:
        raise AssertionError(text)

    monkeypatch.setattr(locate, "locate", locate_nothing)
    assert parse(FULL.replace("init = false", "").replace("/srv/{index}", "/")).warnings == ()


def test_a_good_config_needs_few_modules(tmp_path: Path) -> None:
    path = tmp_path / "n.toml"
    path.write_text("".join(line for line in FULL.splitlines(keepends=True) if not line.startswith(("user", "group"))))
    script = """
import sys
before = set(sys.modules)
from nssup import facts
facts.load(sys.argv[1])
print(*set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert {"difflib", "fnmatch", "glob", "pathlib", "shlex", "shutil"}.isdisjoint(done.stdout.split())


# --- the table of keys --------------------------------------------------------------------------------------------------


def test_the_table_has_a_key_for_every_field_of_a_spec() -> None:
    def fields(struct: type[msgspec.Struct]) -> set[str]:
        return set(struct.__struct_fields__)

    assert fields(PoolSpec) - {"name", "rlimits"} <= set(keys.POOL)
    assert fields(RestartPolicy) <= set(keys.RESTART)
    assert fields(Backoff) == set(keys.BACKOFF)
    assert fields(Intensity) == set(keys.INTENSITY)
    assert fields(Rule) == set(keys.RULE)
    assert fields(ReloadSpec) == set(keys.RELOAD)
    assert fields(LogSpec) <= set(keys.LOG)
    assert fields(SupervisorSpec) <= set(keys.SUPERVISOR)
    assert tuple(keys.RLIMITS) == spec.RLIMITS


@pytest.mark.parametrize(
    ("table", "prefix"),
    [(keys.POOL, ""), (keys.RESTART, "restart."), (keys.BACKOFF, "restart.backoff."), (keys.LOG, "log.")],
)
def test_the_defaults_that_the_table_tells_are_true(table: dict[str, keys.Key], prefix: str) -> None:
    told = {name: key.default for name, key in table.items() if key.default and not key.default.startswith("the ")}
    assert pool("".join(f"{prefix}{name} = {value}\n" for name, value in told.items())) == pool("")


def test_the_reference_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "config_reference.py"), "--check"], cwd=ROOT, check=False
    )
    assert done.returncode == 0, "run scripts/config_reference.py"


def test_problems_are_shown_one_a_line() -> None:
    error = SpecError(Problem("a", 1, 2, "k", "w"), Problem("", 0, 0, "", "v"))
    assert str(error) == "a:1:2: k: w\nv"


# --- spec.problems ------------------------------------------------------------------------------------------------------

GOOD = PoolSpec(name="p", command=("app",))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda: {"umask": 0o1000}, "umask"),
        (lambda: {"env": {"A=B": "1"}}, "env.A=B"),
        (lambda: {"rlimits": {"nofle": (1, 1)}}, "limits.rlimits.nofle"),
        (lambda: {"rlimits": {"nofile": (None, 1)}}, "limits.rlimits.nofile"),
        (lambda: {"stop": (StopStep(99, 1.0), StopStep(None))}, "stop.0"),
        (lambda: {"stop": (StopStep(15, -1.0), StopStep(None))}, "stop.0"),
        (lambda: {"restart": RestartPolicy(settle=-1.0)}, "restart.settle"),
        (lambda: {"restart": RestartPolicy(success=(256,))}, "restart.success"),
        (lambda: {"restart": RestartPolicy(success=(-65,))}, "restart.success"),
        (lambda: {"restart": RestartPolicy(rules=(Rule(then="fail", exit=(256,)),))}, "restart.rules.0"),
        (lambda: {"restart": RestartPolicy(rules=(Rule(then="fail", signal=(0,)),))}, "restart.rules.0"),
        (lambda: {"restart": RestartPolicy(intensity=Intensity(deaths=0, within=1.0))}, "restart.intensity.deaths"),
        (lambda: {"restart": RestartPolicy(intensity=Intensity(deaths=1, within=0.0))}, "restart.intensity.within"),
        (lambda: {"restart": RestartPolicy(backoff=Backoff(factor=0.5))}, "restart.backoff.factor"),
        (lambda: {"restart": RestartPolicy(backoff=Backoff(first=-1.0))}, "restart.backoff.first"),
        (lambda: {"restart": RestartPolicy(backoff=Backoff(jitter=2.0))}, "restart.backoff.jitter"),
        (lambda: {"type": "oneshot"}, "restart.policy"),
    ],
)
def test_rules_for_specs_that_no_config_made(change: Callable[[], dict[str, Any]], key: str) -> None:
    broken = PoolSpec(**{"name": "p", "command": ("app",), **change()})
    assert [found for found, _ in spec.problems(broken)] == [key]
    with pytest.raises(SpecError):
        spec.validate(broken)
    assert spec.validate(GOOD) is GOOD


def test_who_else_may_steer() -> None:
    def control(text: str) -> ControlSpec:
        return parse(f"version = 1\n[supervisor.control]\n{text}\n").supervisor.control

    assert control("group = 'app'") == ControlSpec(group="app", operator=("app",))
    assert control("group = 'app'\nroles = { viewer = ['app'], admin = ['7'] }") == ControlSpec(
        group="app", viewer=("app",), admin=("7",)
    )
    with pytest.raises(SpecError) as refused:
        control("group = 'apq'\nroles = { operator = ['app', 'wheels'] }")
    assert [str(problem) for problem in refused.value.problems] == [
        'n.toml:3:1: supervisor.control.group: there is no group "apq" on this host: make it, or name another',
        'n.toml:4:30: supervisor.control.roles.operator.1: there is no group "wheels" on this host: make it, or name another',
    ]


# --- between pools ---------------------------------------------------------------------------------------------------


def test_what_a_pool_requires() -> None:
    text = """\
version = 1
pool.db.command = "app"
pool.migrate = { command = "app", type = "oneshot", requires = { db = "started" } }
[pool.web]
command = "app"
requires = { db = "ready", migrate = { when = "done", lost = "restart" }, old = { lost = "stop" } }
[pool.old]
command = "app"
"""
    pools = parse(text).pools
    assert pools["web"].requires == {
        "db": Requirement(when="ready", lost="ignore"),
        "migrate": Requirement(when="done", lost="restart"),
        "old": Requirement(when="ready", lost="stop"),
    }
    assert pools["migrate"].requires == {"db": Requirement(when="started")}
    assert pools["db"].requires == {}


@pytest.mark.parametrize(
    ("pools", "problems"),
    [
        (
            'web = { command = "app", requires = { dbs = "ready" } }\ndb.command = "app"',
            ["n.toml:3:39: pool.web.requires.dbs: there is no pool dbs: did you mean db?"],
        ),
        (
            'web = { command = "app", requires = { mail = "ready" } }',
            ["n.toml:3:39: pool.web.requires.mail: there is no pool mail: define it, or leave it out"],
        ),
        (
            'a = { command = "app", requires = { b = "ready" } }\n'
            'b = { command = "app", requires = { c = "ready" } }\n'
            'c = { command = "app", requires = { b = "ready" } }',
            ["n.toml:4:37: pool.b.requires.c: goes in a circle: b -> c -> b: leave one out"],
        ),
        (
            'a = { command = "app", requires = { a = "stopped" } }',
            ["n.toml:3:37: pool.a.requires.a: goes in a circle: a -> a: leave one out"],
        ),
        (
            'a = { command = "app", requires = { b = "done" } }\nb.command = "app"',
            [
                "n.toml:3:37: pool.a.requires.b: a service that is restarted always is never done: "
                'give b type = "oneshot"'
            ],
        ),
        (
            'a = { command = "app", requires = { b = "up", c = { when = "dead", lost = "panic", then = 1 }, d = 7 } }',
            [
                'n.toml:3:37: pool.a.requires.b: "up" is none of started, ready, done, stopped',
                'n.toml:3:53: pool.a.requires.c.when: "dead" is none of started, ready, done, stopped: did you mean ready?',
                'n.toml:3:68: pool.a.requires.c.lost: "panic" is none of ignore, restart, stop',
                "n.toml:3:84: pool.a.requires.c.then: unknown key: did you mean when?",
                'n.toml:3:96: pool.a.requires.d: must be a text, not a number: write "7"',
            ],
        ),
        (
            'a = { command = "app", requires = ["b"] }\nb.command = "app"',
            ['n.toml:3:24: pool.a.requires: must be a table, not a list: write requires = { db = "ready" }'],
        ),
    ],
)
def test_requirements_that_cannot_be(pools: str, problems: list[str]) -> None:
    found = wrong(f"version = 1\n[pool]\n{pools}")
    assert [line for line in found if "there is no pool" not in line or line in problems] == problems


def test_a_circle_over_two_files_is_told_where_it_begins() -> None:
    main = 'version = 1\ninclude = ["web.toml"]\npool.db = { command = "app", requires = { web = "ready" } }'
    assert wrong(main, web_toml='pool.web = { command = "app", requires = { db = "ready" } }') == [
        "n.toml:3:43: pool.db.requires.web: goes in a circle: db -> web -> db: leave one out"
    ]
