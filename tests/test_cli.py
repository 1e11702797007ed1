"""The command line as its users type it: what is printed where, and the exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from fake_supervisor import Supervisor

from nssup import cli as command_line
from nssup import client, fast
from nssup.__main__ import main
from nssup.ctl import ControlServer
from nssup.errors import ExitCode
from nssup.events import State, Stop
from nssup.routes import ROUTES
from nssup.verbs import COMMANDS, VERBS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

NSSUP = [sys.executable, str(Path(__file__).parent.parent / "scripts" / "nssup")]


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Somebody at a shell beside a supervisor."""

    def __init__(self, sup: Supervisor, socket: str, capfd: pytest.CaptureFixture[str]) -> None:
        self.sup = sup
        self.socket = socket
        self._capfd = capfd

    async def __call__(self, *words: str) -> Said:
        """`nssup ctl WORDS...`"""
        self._capfd.readouterr()
        code = await asyncio.to_thread(main, ["ctl", *words])
        return Said(code, *self._capfd.readouterr())

    async def running(self, worker_id: str) -> None:
        await self.until(worker_id, State.RUNNING)

    async def until(self, worker_id: str, state: State) -> None:
        there = asyncio.Event()

        def look(event: object = None) -> None:
            if self.sup.workers.workers[worker_id].state is state:
                there.set()

        unsubscribe = self.sup.subscribe(look)
        look()
        await there.wait()
        unsubscribe()


@pytest.fixture
async def shell(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Shell]:
    socket = str(tmp_path / "s.sock")
    monkeypatch.setenv("NSSUP_SOCKET", socket)
    sup = Supervisor(tmp_path)
    async with ControlServer(sup, socket):
        yield Shell(sup, socket, capfd)
    await sup.close()


def say(*words: str, capfd: pytest.CaptureFixture[str]) -> Said:
    """`nssup WORDS...`"""
    capfd.readouterr()
    return Said(main(list(words)), *capfd.readouterr())


# ctl, against a supervisor.


async def test_status(shell: Shell) -> None:
    shell.sup.add("web", workers=2)
    await shell.running("web/1")
    said = await shell("status")
    assert (said.code, said.err) == (0, "")
    assert [line.split()[:3] for line in said.out.splitlines()] == [
        ["NAME", "STATE", "READY"],
        ["web", "running", "2/2"],
    ]
    for words in (["-a"], ["web"], ["--all"], ["web/*"]):
        assert [line.split()[0] for line in (await shell("status", *words)).out.splitlines()] == [
            "NAME",
            "web/0",
            "web/1",
        ]
    document = json.loads((await shell("status", "--json", "web/1")).out)
    assert [w["id"] for w in document["workers"]] == ["web/1"]
    assert (await shell("stop", "web/0")).code == 0
    assert (await shell("status")).code == 3
    assert (await shell("status", "web/1", "-q")) == (0, "", "")
    assert (await shell("status", "wbe")) == (4, "", "nssup: 'wbe' is no pool or worker (did you mean web?)\n")
    failed = await shell("status", "wbe", "--json")
    assert (failed.code, failed.err) == (4, "")
    assert json.loads(failed.out)["error"]["code"] == "no-such-worker"


async def test_the_changing_verbs(shell: Shell) -> None:
    shell.sup.add("web", workers=2, enabled=False)
    assert await shell("start", "web") == (0, "web/0: running\nweb/1: running\n", "")
    assert await shell("restart", "web@1", "-q") == (0, "", "")
    assert await shell("scale", "web", "+1") == (0, "web/2: running\n", "")
    assert await shell("scale", "web", "-2") == (0, "web/1: removed\nweb/2: removed\n", "")
    assert await shell("kill", "web", "-s", "USR1") == (0, "", "")
    assert await shell("kill", "-USR1", "--tree", "web") == (0, "", "")
    assert [(signo, tree) for _, signo, tree in shell.sup.signals if signo == 10] == [(10, False), (10, True)]
    assert await shell("stop", "--all") == (0, "web/0: stopped\n", "")
    first, second = [json.loads((await shell("stop", "--all", "--json", *more)).out) for more in ([], ["--no-wait"])]
    assert first["results"] == second["results"]


async def test_all_is_to_be_said(shell: Shell) -> None:
    shell.sup.add("web")
    for verb in ("stop", "restart", "kill"):
        said = await shell(verb)
        assert (said.code, said.out) == (2, "")
        assert f"nssup ctl {verb} --all" in said.err
    assert (await shell("scale", "3")).code == 2
    assert (await shell("scale", "web")).code == 2
    assert (await shell("scale", "web", "many")).code == 2


async def test_a_failure_says_why_on_stderr(shell: Shell) -> None:
    shell.sup.add("web", "missing", enabled=False)
    assert await shell("start", "web") == (1, "", "web/0: start: backoff: exec-failed:ENOENT\n")


async def test_time_out(shell: Shell) -> None:
    shell.sup.add("web", "slow")
    said = await shell("wait", "web", "--for=running", "--timeout", "10ms")
    assert said == (124, "", "web/0: wait: still starting when the time was up\n")


async def test_wait_which_ping_pid(shell: Shell) -> None:
    shell.sup.add("web")
    await shell.running("web/0")
    assert (await shell("wait", "web", "--for", "running")).code == 0
    assert await shell("which", "5003") == (0, "web/0\n", "")
    assert (await shell("which", "99")).code == 4
    assert (await shell("which", "a/b?c")).code == 2
    assert (await shell("ping")).out == f"pong: nssup 0.1.0, host PID {os.getpid()}\n"
    assert await shell("pid", "web") == (0, "5003\n", "")
    assert await shell("pid", "web", "--ns") == (0, "2\n", "")


async def test_shutdown_comes_back_when_the_supervisor_hung_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LAST_STEPS", 0)  # this process goes on
    sup = Supervisor(tmp_path)
    socket = str(tmp_path / "s.sock")
    async with ControlServer(sup, socket):
        shell = Shell(sup, socket, capfd)
        sup.add("web")
        await shell.running("web/0")
        asked = asyncio.get_running_loop().run_in_executor(None, main, ["ctl", "shutdown", "--socket", socket])
        await sup.asked_to_end.wait()
        sup.feed("web/0", Stop())
        await shell.until("web/0", State.STOPPED)
        assert not asked.done(), "it has yet to hang up"
    assert await asked == 0
    assert capfd.readouterr().out == "web/0: stopped\n"
    await sup.close()


async def test_logs(shell: Shell) -> None:
    shell.sup.add("web")
    await shell.running("web/0")
    shell.sup.write("web/0", 'plain \x1b[31mred\n{"a": [1]}\nno newline')
    shell.sup._close_pipe("web/0")
    said = await shell("logs", "web")
    assert said.out.splitlines() == [
        "2027-01-15T08:01:40.000000Z web/0 stdout | plain \x1b[31mred",
        '2027-01-15T08:01:40.000000Z web/0 stdout | {"a": [1]}',
        "2027-01-15T08:01:40.000000Z web/0 stdout | no newline",
    ]
    assert (await shell("logs", "--raw")).out == 'plain \x1b[31mred\n{"a": [1]}\nno newline'
    records = [json.loads(line) for line in (await shell("logs", "--json", "-n", "2")).out.splitlines()]
    assert [r.get("msg") for r in records] == [None, "no newline"]
    assert (await shell("logs", "wbe")).code == 4
    assert (await shell("logs", "-n", "x")).code == 2


async def test_raw_logs_are_the_bytes(shell: Shell, tmp_path: Path) -> None:
    shell.sup.add("web")
    await shell.running("web/0")
    wrote = b"\xff\xfe\x00 bytes\r\n" + b"long " * 10000 + b"\n"
    os.write(shell.sup._pipes["web/0"][0], wrote)
    shell.sup._close_pipe("web/0")
    process = await asyncio.to_thread(
        subprocess.run, [*NSSUP, "ctl", "logs", "--raw"], capture_output=True, check=True, timeout=20
    )
    assert process.stdout == wrote


async def test_logs_follow_until_the_reader_goes(shell: Shell) -> None:
    shell.sup.add("web")
    await shell.running("web/0")
    process = await asyncio.to_thread(subprocess.Popen, [*NSSUP, "ctl", "logs", "-f", "web"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for number in range(3):
        shell.sup.write("web/0", f"line {number}\n")
        line = await asyncio.to_thread(process.stdout.readline)
        assert line.endswith(b"| line %d\n" % number)
    process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(process.wait, 20) == -signal.SIGINT, "130 to a shell"
    process.stdout.close()


def test_ctrl_c_in_the_middle_of_an_import_says_nothing(tmp_path: Path) -> None:
    package = tmp_path / "nssup"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys; print('importing', flush=True); sys.stdin.read(); main = exit\n")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    pipe = subprocess.PIPE
    with subprocess.Popen([*NSSUP, "up"], env=environ, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT
        assert process.stderr is not None
        assert process.stderr.read() == b""


async def test_a_pipe_closed_early_is_no_complaint(shell: Shell) -> None:
    shell.sup.add("web")
    await shell.running("web/0")
    read_end, write_end = os.pipe()
    command = [*NSSUP, "ctl", "logs", "-f", "web"]
    process = await asyncio.to_thread(subprocess.Popen, command, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    os.close(read_end)
    shell.sup.write("web/0", "nobody reads this\n")
    _, err = await asyncio.to_thread(process.communicate, timeout=20)
    assert (process.returncode, err) == (141, b"")


@pytest.mark.parametrize(
    ("redirect", "code", "says"),
    [(">&-", 0, b""), (">&- 2>&-", 0, b""), ("> /dev/full", 1, b"nssup: cannot write: No space left on device\n")],
)
async def test_a_stdout_that_takes_nothing(shell: Shell, redirect: str, code: int, says: bytes) -> None:
    script = f"{NSSUP[0]} {NSSUP[1]} ctl ping {redirect}"
    process = await asyncio.to_thread(subprocess.run, ["sh", "-c", script], capture_output=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (code, b"", says)


async def test_events(shell: Shell) -> None:
    shell.sup.add("web")
    await shell.running("web/0")
    lines = (await shell("events")).out.splitlines()
    assert lines == [
        "2027-01-15T08:01:40.000000Z pool_added web workers=1",
        "2027-01-15T08:01:40.000000Z launched web/0 stopped -> starting",
        "2027-01-15T08:01:40.000000Z started web/0 starting -> running host PID 5003",
    ]
    assert [json.loads(line)["seq"] for line in (await shell("events", "--json", "-n", "2")).out.splitlines()] == [2, 3]


async def test_what_goes_through_argparse_says_the_same(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.sup.add("web", workers=2)
    await shell.running("web/1")
    commands = [
        ["status", "-a"],
        ["status", "web", "--json"],
        ["stop"],
        ["stop", "web/0"],
        ["restart", "web", "--timeout=5s"],
        ["kill", "-10", "web"],
        ["scale", "web", "-1"],
        ["scale", "web", "2"],
        ["wait", "web", "--for", "running"],
        ["pid", "web/0", "--ns"],
        ["which", "99"],
        ["ping"],
        ["orphans"],
        ["orphans", "--json"],
        ["shutdown", "--leave-running", "--no-wait"],
    ]
    quick = [await shell(*words) for words in commands]
    monkeypatch.setattr(fast, "parse", lambda argv: None)
    slow = [await shell(*words) for words in commands]
    for words, one, other in zip(commands, quick, slow, strict=True):
        assert one.code == other.code, words
        assert one.err == other.err, words
        assert one.out[:40] == other.out[:40], words


async def test_orphans_and_leave_running(shell: Shell) -> None:
    shell.sup.add("web")
    await shell.running("web/0")
    assert await shell("orphans") == (0, "", "")
    shell.sup.strange = ["slot 3 is torn"]
    assert await shell("orphans") == (0, "slot 3 is torn\n", "")
    assert await shell("shutdown", "--leave-running", "--no-wait") == (0, "web/0: left running\n", "")
    assert shell.sup.left


async def test_reexec_where_there_is_nothing_to_exec(shell: Shell) -> None:
    assert await shell("reexec") == (1, "", "nssup: this supervisor is part of another program\n")
    said = await shell("reexec", "--json")
    assert (said.code, json.loads(said.out)["error"]["code"]) == (1, "not-possible")


# Nobody there, or not for us.


def test_no_supervisor(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "none.sock"
    for verb in ("status", "logs", "reexec"):
        said = say("ctl", verb, "--socket", str(path), capfd=capfd)
        assert (said.code, said.out) == (69, "")
        assert said.err.startswith(f"nssup: no supervisor at {path}: No such file or directory (")
    monkeypatch.setenv("NSSUP_SOCKET", str(tmp_path / ("x" * 200)))
    assert "AF_UNIX path too long" in say("ctl", "ping", capfd=capfd).err


@pytest.mark.parametrize(
    ("uid", "environment", "path"),
    [
        (0, {"XDG_RUNTIME_DIR": "/run/user/0"}, "/run/nssup/nssup.sock"),
        (1000, {"XDG_RUNTIME_DIR": "/run/user/1000"}, "/run/user/1000/nssup/nssup.sock"),
        (1000, {"XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "relative"}, "/s/nssup/run/nssup.sock"),
        (1000, {"HOME": "/home/me"}, "/home/me/.local/state/nssup/run/nssup.sock"),
        (1000, {"NSSUP_SOCKET": "here"}, "here"),
    ],
)
def test_where_the_socket_is(uid: int, environment: dict[str, str], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NSSUP_SOCKET", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert client.default_socket() == path


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
async def test_strangers_exit_77(shell: Shell) -> None:
    os.chmod(shell.socket, 0o666)
    for folder in Path(shell.socket).parents:
        if folder.stat().st_uid == os.geteuid() and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    code = "import sys; sys.path[:0] = [%r]; from nssup.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = ["/usr/bin/env", "python3", "-c", code % str(Path(client.__file__).parent.parent), "ctl", "ping"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--socket", shell.socket], capture_output=True, text=True, check=False, user=65534, group=65534,
            extra_groups=[], env={"PATH": "/usr/bin:/bin"}, timeout=20,
        )  # fmt: skip

    said = await asyncio.to_thread(run)
    if "No module named" in said.stderr or said.returncode == 127:
        pytest.skip("needs a checkout that user nobody can read")
    assert (said.returncode, said.stderr[:28]) == (77, "nssup: user 65534 may not st")
    os.chmod(shell.socket, 0o600)
    assert (await asyncio.to_thread(run)).returncode == 77


class Scripted:
    """A server that says what it is told to, once."""

    def __init__(self, path: Path, answer: bytes) -> None:
        self.path = path
        self.answer = answer

    async def __aenter__(self) -> Scripted:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.answer)
            writer.close()

        self._server = await asyncio.start_unix_server(answer, self.path)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        await self._server.wait_closed()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    ],
)
async def test_a_supervisor_that_dies_in_the_middle(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], answer: bytes
) -> None:
    async with Scripted(tmp_path / "s.sock", answer):
        code = await asyncio.to_thread(main, ["ctl", "ping", "--socket", str(tmp_path / "s.sock")])
    assert code == 69
    assert "went away" in capfd.readouterr().err


@pytest.mark.parametrize(("verb", "code"), [("ping", 0), ("start", 69)])
async def test_who_was_hung_up_on_without_a_word_asks_once_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], verb: str, code: int
) -> None:
    """What changes nothing: of the rest nobody knows whether it was heard."""
    asked = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi\n")
        writer.close()

    server = await asyncio.start_unix_server(answer, tmp_path / "s.sock")
    assert await asyncio.to_thread(main, ["ctl", verb, "--socket", str(tmp_path / "s.sock")]) == code
    assert (asked, capfd.readouterr().out) == ((2, "hi\n") if code == 0 else (1, ""))
    server.close()
    await server.wait_closed()


async def test_a_supervisor_that_does_not_answer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.01)
    import socket

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s.sock"))
        silent.listen()
        code = await asyncio.to_thread(main, ["ctl", "ping", "--socket", str(tmp_path / "s.sock")])
    assert (code, "does not answer" in capfd.readouterr().err) == (124, True)


async def test_an_error_of_http_itself_is_passed_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = b'{"error":{"code":"too-many-connections"}}\n'
    head = b"HTTP/1.1 503 x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with Scripted(tmp_path / "s.sock", head + body):
        code = await asyncio.to_thread(main, ["ctl", "status", "--socket", str(tmp_path / "s.sock")])
    assert (code, *capfd.readouterr()) == (1, "", body.decode())


# The rest of the command line.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["upp"], "did you mean up?"),
        (["frobnicate"], "there are: up, ctl, run, check, sim, completion, version"),
        (["ctl", "staus"], "did you mean status?"),
        (["ctl", "frob"], "there are: status"),
        (["ctl", "status", "--nosuch"], "unrecognized arguments: --nosuch"),
        (["ctl", "stop", "web", "--timeout", "soon"], "'soon' is no time"),
        (["ctl", "wait", "--for", "ever"], "invalid choice: 'ever'"),
        (["ctl"], "the following arguments are required: VERB"),
        ([], "the following arguments are required: COMMAND"),
        (["run"], "run: what?"),
        (["run", "-e"], "expected one argument"),
        (["run", "--nosuch", "--", "true"], "unrecognized arguments"),
    ],
)
def test_mistakes_exit_2_with_a_word_on_what_to_do(
    words: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    said = say(*words, capfd=capfd)
    assert (said.code, said.out) == (2, "")
    assert says in said.err


def test_help_names_every_command_and_verb(capfd: pytest.CaptureFixture[str]) -> None:
    said = say("--help", capfd=capfd)
    assert said.code == 0
    assert all(name in said.out for name in COMMANDS)
    said = say("ctl", "-h", capfd=capfd)
    assert all(name in said.out for name in VERBS)
    for verb in VERBS:
        assert "--socket" in say("ctl", verb, "--help", capfd=capfd).out


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert say("version", capfd=capfd) == say("--version", capfd=capfd) == (0, "nssup 0.1.0\n", "")


def test_the_api_and_the_command_line_have_the_same_verbs() -> None:
    of_api = {route.verb for route in ROUTES if route.verb}
    assert of_api | {"pid", "top"} == set(VERBS)


def test_the_exit_codes_are_those_of_the_package() -> None:
    for name in ("OK", "FAILED", "USAGE", "UNAVAILABLE", "NOT_PERMITTED", "TIMED_OUT"):
        assert getattr(client, name) == ExitCode[name]


def test_check_and_up_refuse_a_bad_config(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('version = 1\n[pool.web]\ncommnd = ["true"]\nworkers = "many"\n')
    for words in (["check", str(bad)], ["up", "-c", str(bad)]):
        said = say(*words, capfd=capfd)
        assert (said.code, said.out) == (78, "")
        assert f"{bad}:3:1: " in said.err
        assert f"{bad}:4:" in said.err
    missing = say("check", str(tmp_path / "none.toml"), capfd=capfd)
    assert (missing.code, "none.toml" in missing.err) == (78, True)


def test_check_takes_a_good_config(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "good.toml"
    good.write_text('version = 1\n[pool.web]\ncommand = ["sleep", "9"]\n')
    said = say("check", str(good), capfd=capfd)
    assert (said.code, "1 pool" in said.out) == (0, True)


# run: only what its options mean; what it does is tested where it is done.


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--", "ls", "-l"], {"command": ("ls", "-l")}),
        (["ls", "--", "-t"], {"command": ("ls", "--", "-t")}),
        (["-t", "--no-init", "--hostname", "inside", "--", "bash"], {"tty": True, "init": False, "hostname": "inside"}),
        (["-it", "bash"], {"tty": True, "command": ("bash",)}),
        (["-e", "A=1", "--env=B=2=3", "-w", "/tmp", "x"], {"env": ("A=1", "B=2=3"), "workdir": "/tmp"}),
        (["--ns", "pid,mount", "--no-proc", "--user=nobody", "x"], {"namespaces": ("pid", "mount"), "proc": False}),
        (["--timeout", "1.5s", "-v", "x"], {"timeout": 1.5, "verbose": True}),
    ],
)
@pytest.mark.parametrize("parser", ["by hand", "argparse"])
def test_the_options_of_run(
    words: list[str], meant: dict[str, object], parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nssup import foreground

    asked: list[foreground.Options] = []

    def run(options: foreground.Options) -> int:
        asked.append(options)
        return 0

    monkeypatch.setattr(foreground, "run", run)
    if parser == "argparse":
        monkeypatch.setattr(command_line, "parse_run", lambda argv: None)
        words = [word for word in words if word != "-it"] if "-it" not in words else ["-i", "-t", *words[1:]]
    assert main(["run", *words]) == 0
    for name, value in meant.items():
        assert getattr(asked[0], name) == value


# What starting costs.

ALLOWED = {"nssup", "nssup.__main__", "nssup.fast", "nssup.client", "nssup.verbs", "_socket"}


@pytest.fixture
def loaded() -> Callable[..., set[str]]:
    def modules(script: str) -> set[str]:
        code = f"import sys; before = set(sys.modules); {script}; sys.stderr.write(' '.join(set(sys.modules) - before))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20)
        return set(done.stderr.split())

    return modules


async def test_a_hot_verb_imports_next_to_nothing(shell: Shell, loaded: Callable[[str], set[str]]) -> None:
    shell.sup.add("web")
    await shell.running("web/0")
    for words in (["status"], ["stop", "web"], ["status", "-a", "--json"], ["ping"], ["start"]):
        argv = ["ctl", *words]
        script = f"from nssup.__main__ import main; main({argv!r})"
        assert await asyncio.to_thread(loaded, script) - ALLOWED == set(), words


def test_run_is_parsed_with_next_to_nothing(loaded: Callable[[str], set[str]]) -> None:
    heavy = {"argparse", "asyncio", "dataclasses", "inspect", "json", "msgspec.json", "socket", "uvloop"}
    script = "from nssup import cli; cli.parse_run(['-t', '--', 'bash'])"
    assert loaded(script) & heavy - _foreground_needs(loaded) == set()


def _foreground_needs(loaded: Callable[[str], set[str]]) -> set[str]:
    return loaded("import nssup.foreground")


def test_the_public_names_are_found_when_used(loaded: Callable[[str], set[str]]) -> None:
    assert loaded("import nssup; nssup.__version__; dir(nssup)") == {"nssup"}
    import nssup

    assert nssup.SpecError.__module__ == "nssup.errors"
    assert nssup.PoolSpec.__module__ == "nssup.spec"
    with pytest.raises(AttributeError, match="nosuch"):
        _ = nssup.nosuch  # type: ignore[attr-defined]
    assert set(nssup.__all__) <= set(dir(nssup))


# Small parts.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 10), ("2.5", 2.5), ("500ms", 0.5), ("10s", 10), ("5m", 300), ("1h", 3600), ("x", None), ("", None),
     ("-1", None), ("1e9", None), ("s", None), ("nan", None), ("²", None)],
)  # fmt: skip
def test_times_on_the_command_line(text: str, seconds: float | None) -> None:
    assert fast.duration(text) == seconds


@pytest.mark.parametrize("text", ["plain", 'a"b\\c', "tab\tnew\nline\x00", "é…", "\x1b[2J"])
def test_what_is_said_in_json_is_what_was_typed(text: str) -> None:
    assert json.loads(client.json_string(text)) == text


def test_what_is_no_utf_8_can_be_said() -> None:
    assert json.loads(client.json_string("a\udcff")) == "a?"
    assert client.quote("a\udcff b&c=d/é") == "a%FF%20b%26c%3Dd/%C3%A9"


@pytest.mark.parametrize(
    "words",
    [["status", "-h"], ["logs"], ["nosuch"], [], ["stop", "--timeout"], ["stop", "--timeout", "x"], ["status", "-aq"],
     ["ping", "web"], ["pid"], ["which"], ["which", "1", "2"], ["scale", "1"], ["wait", "--for", "ever"],
     ["orphans", "web"], ["reexec"], ["shutdown", "--leave"],
     ["stop", "-9"], ["status", "--socket="], ["status", "--json=1"], ["scale", "web", "-x"]],
)  # fmt: skip
def test_what_is_odd_is_left_to_argparse(words: list[str]) -> None:
    assert fast.parse(words) is None
