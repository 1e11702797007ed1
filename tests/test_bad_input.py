"""What a user gets wrong, typed as he types it: one clear message, the right exit code, and nothing half-started."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from live import NSSUP, Result, Up, config_text, locked_by, marked, needs_namespaces, needs_root, nssup

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = needs_namespaces

SLEEPER = '[pool.web]\ncommand = ["sleep", "1000"]\n'
HEAD = config_text(Path("/"), "").count("\n")  # lines of the config before what a test writes


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path


def up(here: Path, pools: str, *, supervisor: str = "", prefix: Sequence[str] = ()) -> Result:
    """`nssup up` with a config that will not do, and that it left nothing but directories."""
    (here / "nssup.toml").write_text(config_text(here, pools, supervisor))
    return started(here, prefix=prefix)


def started(here: Path, *options: str, prefix: Sequence[str] = ()) -> Result:
    done = subprocess.run(
        [*prefix, *NSSUP, "up", "--for", "1", *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=here,
        timeout=20,
        check=False,
    )
    assert left_in(here) == []
    assert marked(here) == []
    assert done.stdout == b""
    return Result(done.returncode, "", done.stderr.decode())


def left_in(here: Path) -> list[str]:
    """Sockets, locks that are held, and records of workers that have run."""
    found = [str(path) for path in here.rglob("*") if path.is_socket()]
    found += [str(path) for path in here.rglob("lock") if path.is_file() and locked_by(path) is not None]
    return found + [str(path) for path in here.rglob("*.jsonl") if path.is_file() and path.stat().st_size]


# --- the config: where, what, and 78; up says what check says --------------------------------------------------------

REFUSED = {
    "unknown key": ('[pool.web]\ncomand = ["true"]\n', ["2:1: pool.web.comand: unknown key: did you mean command?"]),
    "wrong type": (
        SLEEPER + 'workers = "three"\n',
        ["3:1: pool.web.workers: must be a whole number, not a text"],
    ),
    "missing unit": (
        SLEEPER + "restart = { settle = 1 }\n",
        ['3:13: pool.web.restart.settle: 1 has no unit: write "1s" for seconds (or us, ms, m, h, d)'],
    ),
    "duplicate pool": (SLEEPER + SLEEPER, [f"3:7: pool.web: is defined already, in line {HEAD + 1}: keep one of them"]),
    "empty command": (
        "[pool.web]\ncommand = []\n[pool.db]\ncommand = ''\n",
        [
            "2:1: pool.web.command: is empty: name the program to run",
            "4:1: pool.db.command: is empty: name the program to run",
        ],
    ),
    "unknown user": (
        SLEEPER + 'user = "nobdy"\n',
        ['3:1: pool.web.user: there is no user "nobdy" on this host: make it, or name another'],
    ),
    "a /proc for nobody": (
        SLEEPER + 'namespaces = ["pid"]\n',
        [
            "3:1: pool.web.namespaces: a private /proc needs a private mount namespace, or it would replace the "
            "host's: add mount, or set proc = false"
        ],
    ),
    "all of them": (
        '[pool.web]\ncommand = []\nworkers = -1\numask = 7\n[pool.Web]\ncommand = ["true"]\n',
        [
            "2:1: pool.web.command: is empty: name the program to run",
            "3:1: pool.web.workers: must be from 0 to 1000000",
            '4:1: pool.web.umask: must be a text of octal digits, such as "022"',
            "5:7: pool.Web: 'Web' is no pool name: use [a-z0-9][a-z0-9_-]{0,47}",
        ],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_will_not_do(here: Path, case: str) -> None:
    text, wanted = REFUSED[case]
    done = up(here, text)
    checked = nssup("check", cwd=here)
    assert done.code == checked.code == 78
    assert done.err == checked.err
    assert checked.out == ""
    lines = done.err.splitlines()
    for each in wanted:
        line, _, rest = each.partition(":")
        assert f"nssup.toml:{int(line) + HEAD}:{rest}" in lines
    assert len(lines) == len(wanted)
    assert not (here / "s").exists()


def test_a_config_that_is_no_utf_8(here: Path) -> None:
    (here / "nssup.toml").write_bytes(b"version = 1\n# caf\xe9\n")
    done = started(here)
    assert (done.code, done.err) == (78, "nssup.toml:2:6: byte 0xe9 is not UTF-8: save the file as UTF-8\n")
    assert nssup("check", "nssup.toml", cwd=here) == done


@pytest.mark.parametrize("command", ["up", "check"])
def test_a_config_that_is_not_there(here: Path, command: str) -> None:
    options = ["-c", "gone.toml"] if command == "up" else ["gone.toml"]
    done = nssup(command, *options, cwd=here)
    assert (done.code, done.out, done.err) == (78, "", "gone.toml: cannot be read: no such file or directory\n")


def test_no_config_at_all(here: Path) -> None:
    done = nssup("up", cwd=here, env={"HOME": str(here), "XDG_CONFIG_HOME": "", "NSSUP_CONFIG": ""})
    if Path("/etc/nssup/nssup.toml").exists():
        pytest.skip("needs a host without /etc/nssup/nssup.toml")
    assert done.code == 78
    assert done.err.startswith("no config file: looked for nssup.toml, ")
    assert done.err.endswith("name one with -c FILE\n")


def test_a_socket_path_too_long(here: Path) -> None:
    path = here / ("x" * 100 + ".sock")
    done = up(here, SLEEPER, supervisor=f'socket = "{path}"')
    size = len(str(path))
    why = f"the socket's path would have {size} bytes, 107 are possible: give a shorter one"
    assert (done.code, done.err) == (78, f"nssup.toml:5:1: supervisor.socket: {why}\n")


# --- what the config cannot know: said by check as a warning, by up as it happens, by run with its own code ----------


def warned(pool: str, warning: str, reason: str) -> None:
    """check warns, with 0; up warns and tries again and again, by its policy, and says why."""
    # Not in tmp_path: messages shorten what is long.
    with tempfile.TemporaryDirectory() as short, Up(Path(short), f"[pool.web]\n{pool}\n") as running:
        backed_off = running.wait("backed_off", "web/0")
        assert backed_off["reason"] == backed_off["exit"]["reason"] == reason
        assert backed_off["exit"]["code"] is None
        assert running.wait("relaunched", "web/0")["reason"] == reason
        line = running.config.read_text().splitlines().index(pool.splitlines()[-1]) + 1
        assert running.said == [f"{running.config}:{line}:1: warning: {warning}"]
        assert running.ctl("status", "web").code == 3
        assert reason in running.ctl("status", "web").out
        assert running.ctl("start", "web").code == 1
        done = nssup("check", str(running.config))
        assert (done.code, done.err) == (0, "")
        assert done.out.splitlines()[0] == running.said[0]
        assert running.end() == 0
        assert not running.records("web")


def test_a_command_that_does_not_exist() -> None:
    command = "/not/here"
    why = f'there is no program "{command}" on this host: install it, or correct the name'
    warned(f'command = ["{command}"]', f"pool.web.command: {why}", "exec-failed:ENOENT")
    done = nssup("run", "--", command)
    assert (done.code, done.out) == (127, "")
    assert command in done.err


def test_a_command_that_is_not_in_path() -> None:
    why = 'there is no program "nothing-like-it" in PATH: install it, or correct the name'
    warned('command = ["nothing-like-it"]', f"pool.web.command: {why}", "exec-failed:ENOENT")
    assert nssup("run", "--", "nothing-like-it").code == 127


def test_a_command_that_is_not_executable() -> None:
    command = "/etc/passwd"
    why = f'"{command}" is not executable: chmod +x it, or name another'
    warned(f'command = ["{command}"]', f"pool.web.command: {why}", "exec-failed:EACCES")
    done = nssup("run", "--", command)
    assert (done.code, done.out) == (126, "")
    assert command in done.err


def test_a_command_that_is_no_program(here: Path) -> None:
    """Executable, but neither a binary nor a script: no shell is tried behind the user's back."""
    command = here / "text"
    command.write_text("echo hello\n")
    command.chmod(0o755)
    with Up(here, f'[pool.web]\ncommand = ["{command}"]\n') as running:
        assert running.wait("backed_off", "web/0")["reason"] == "exec-failed:ENOEXEC"
    assert nssup("run", "--", str(command)).code == 126


def test_a_directory_that_is_not_there() -> None:
    why = 'there is no directory "/not/here" on this host: make it'
    pool = 'command = ["true"]\ndirectory = "/not/here"'
    warned(pool, f"pool.web.directory: {why}", "setup-failed:directory:ENOENT")
    done = nssup("run", "-w", "/not/here", "--", "true")
    assert done.code == 125
    assert "/not/here" in done.err


# --- directories and sockets -----------------------------------------------------------------------------------------


def test_a_second_supervisor_on_the_same_directories(here: Path) -> None:
    with Up(here, SLEEPER) as first:
        before = first.wait_running("web/0")
        second = nssup("up", "-c", str(first.config), "--for", "1")
        assert (second.code, second.out) == (1, "")
        assert second.err == (
            f"nssup: another supervisor has {here}/s: host PID {first.host_pid} "
            "(stop it, or give this one its own state_dir and runtime_dir)\n"
        )
        assert first.worker("web/0")["host_pid"] == before[0]["host_pid"]
        assert first.ctl("ping").code == 0
        assert locked_by(here / "s" / "lock") == first.host_pid
        assert len(marked(here)) == 1


@pytest.mark.parametrize("shared", ["state_dir", "runtime_dir"])
def test_one_directory_shared_with_another_supervisor_is_enough(here: Path, shared: str) -> None:
    with Up(here, SLEEPER) as first:
        own = {"state_dir": f"{here}/s", "runtime_dir": f"{here}/s/run"}
        own |= {name: f"{here}/other/{name}" for name in own if name != shared}
        other = here / "other.toml"
        lines = [f'{name} = "{path}"' for name, path in own.items()]
        other.write_text("\n".join(["version = 1", "[supervisor]", f'log_dir = "{here}/l"', *lines, SLEEPER]))
        second = nssup("up", "-c", str(other), "--for", "1")
        assert second.code == 1
        assert f"another supervisor has {own[shared]}: host PID {first.host_pid} " in second.err
        assert locked_by(here / "s" / "lock") == locked_by(here / "s" / "run" / "lock") == first.host_pid


def listening(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_a_stale_socket_is_replaced(here: Path) -> None:
    path = here / "s" / "run" / "nssup.sock"
    path.parent.parent.mkdir(mode=0o700)
    listening(path).close()
    with Up(here, SLEEPER) as running:
        assert running.ctl("ping").code == 0
        assert path.stat().st_mode & 0o777 == 0o660


def test_a_socket_somebody_listens_on(here: Path) -> None:
    path = here / "other.sock"
    with listening(path):
        (here / "nssup.toml").write_text(config_text(here, SLEEPER, f'socket = "{path}"'))
        done = nssup("up", "--for", "1", cwd=here)
        assert (done.code, done.err) == (
            1,
            f"nssup: socket {path}: another program listens there (another supervisor? set supervisor.socket)\n",
        )
        assert path.is_socket()
    assert marked(here) == []
    assert not (here / "l" / "web.jsonl").exists() or not (here / "l" / "web.jsonl").stat().st_size
    assert locked_by(here / "s" / "lock") is None


def test_a_socket_path_that_is_something_else(here: Path) -> None:
    path = here / "precious"
    path.write_text("kept\n")
    done = up(here, SLEEPER, supervisor=f'socket = "{path}"')
    assert (done.code, done.err) == (
        1,
        f"nssup: socket {path}: is there and is no socket (move it away, or set supervisor.socket to another path)\n",
    )
    assert path.read_text() == "kept\n"


def test_a_socket_in_a_place_that_cannot_be_made(here: Path) -> None:
    (here / "file").write_text("")
    done = up(here, SLEEPER, supervisor=f'socket = "{here}/file/nssup.sock"')
    assert done.code == 1
    assert done.err.startswith(f"nssup: socket {here}/file/nssup.sock: cannot listen: ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("name", ["state_dir", "runtime_dir", "log_dir"])
def test_a_directory_that_is_a_file(here: Path, name: str) -> None:
    file = here / "file"
    file.write_text("kept\n")
    own = {"state_dir": f"{here}/s", "log_dir": f"{here}/l"} | {name: str(file)}
    lines = [f'{key} = "{path}"' for key, path in own.items()]
    (here / "nssup.toml").write_text("\n".join(["version = 1", "[supervisor]", *lines, SLEEPER]))
    done = started(here)
    assert (done.code, done.err) == (1, f"nssup: cannot make {file}: is no directory\n")
    assert file.read_text() == "kept\n"


def test_a_state_directory_that_others_may_write(here: Path) -> None:
    (here / "s").mkdir()
    (here / "s").chmod(0o777)
    done = up(here, SLEEPER)
    assert done.code == 1
    assert done.err.startswith(f"nssup: cannot use {here}/s: it belongs to uid {os.geteuid()} and has mode 0777 (")


@needs_root
@pytest.mark.parametrize("name", ["s", "l"])
def test_directories_that_cannot_be_written(here: Path, name: str) -> None:
    """Read-only for root too: a mount, in a namespace of the test's own."""
    (here / name).mkdir(mode=0o700)
    script = f'mount --bind {here}/{name} {here}/{name} && mount -o remount,bind,ro {here}/{name} && exec "$@"'
    done = up(here, SLEEPER, prefix=["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"])
    assert done.code == 1
    file = "lock" if name == "s" else "nssup.jsonl"
    assert done.err == f"nssup: cannot open {here}/{name}/{file}: Read-only file system\n"


def test_a_log_that_cannot_be_opened(here: Path) -> None:
    """Said before the pools in front of it are started."""
    log = here / "l" / "web.jsonl"
    log.mkdir(parents=True)
    done = up(here, '[pool.first]\ncommand = ["echo", "hello"]\n' + SLEEPER)
    assert (done.code, done.err) == (1, f"nssup: cannot open {log}: Is a directory\n")


# Root without any capability: what it does not own it cannot get at, like anybody else.
POWERLESS = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")


@needs_root
def test_directories_of_somebody_else(here: Path) -> None:
    """Where we may not write: not permitted. Where others may: no, thanks."""
    theirs = here / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    text = config_text(here, SLEEPER)
    for wanted, code, path in (
        (f"nssup: cannot make {theirs}/s: Permission denied", 77, theirs / "s"),
        (f"nssup: cannot use {theirs}: it belongs to uid 65534 and has mode 0755 (", 1, theirs),
    ):
        (here / "nssup.toml").write_text(text.replace(f'state_dir = "{here}/s"', f'state_dir = "{path}"'))
        done = started(here, prefix=POWERLESS)
        assert done.code == code
        assert done.err.startswith(wanted)
        assert done.err.count("\n") == 1
        assert list(theirs.iterdir()) == []


@needs_root
def test_not_permitted_to_talk_to_it(here: Path) -> None:
    theirs = here / "theirs"
    theirs.mkdir(mode=0o700)
    with listening(theirs / "nssup.sock"):
        os.chown(theirs, 65534, 65534)
        command = [*POWERLESS, *NSSUP, "ctl", "status", "--socket", str(theirs / "nssup.sock")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr == f"nssup: not permitted to connect to {theirs}/nssup.sock\n"


# --- steering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stale", [False, True])
def test_no_supervisor(here: Path, stale: bool) -> None:
    path = here / "nssup.sock"
    if stale:
        listening(path).close()
    for words in (["status"], ["ping"], ["stop", "--all"], ["logs", "-f"], ["events"]):
        done = nssup("ctl", *words, env={"NSSUP_SOCKET": str(path)})
        why = "Connection refused" if stale else "No such file or directory"
        hint = "is one running? name its socket with --socket or $NSSUP_SOCKET"
        assert (done.code, done.out, done.err) == (69, "", f"nssup: no supervisor at {path}: {why} ({hint})\n")


def test_words_that_mean_nothing_to_a_supervisor(here: Path) -> None:
    pools = SLEEPER + '[pool.website]\ncommand = ["sleep", "1000"]\nenabled = false\n'
    with Up(here, pools) as running:
        before = running.wait_running("web/0")
        for words, code, said in (
            ("status wbe", 4, "did you mean web"),
            ("stop web/7", 4, "web/7"),
            ("kill host:1", 4, "1"),
            ("which 999999", 4, "999999"),
            ("scale nope 3", 4, "nope"),
            ("scale web -- -5", 2, ""),
            ("scale web many", 2, "many"),
            ("kill -s NOPE web", 2, "NOPE"),
            ("stop", 2, "--all"),
            ("restart", 2, "--all"),
            ("kill", 2, "--all"),
            ("wait web --for nonsense", 2, "nonsense"),
            ("stpo web", 2, "stop"),
            ("status website", 3, "stopped"),
            ("wait website --for running --timeout 0.05", 124, "website/0"),
        ):
            done = running.ctl(*words.split())
            assert (words, done.code) == (words, code)
            assert said in done.out + done.err
            if code in (2, 4):
                assert done.out == ""
        assert running.worker("web/0")["host_pid"] == before[0]["host_pid"]
        assert running.worker("web/0")["generation"] == 1
        assert running.worker("website/0")["state"] == "stopped"
