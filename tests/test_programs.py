"""Programs that people run, as they come: started, talked to, killed, restarted and stopped cleanly."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from live import Up, needs_namespaces, needs_root, pool_text, shell, wait_listening

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_namespaces


def found(name: str, *places: str) -> str:
    """The program's path, or a skip that names it."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", *places]))
    if path is None:
        pytest.skip(f"needs {name}")
    return path


@pytest.fixture
def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        number: int = sock.getsockname()[1]
        return number


def ask(port: int, question: bytes, wanted: bytes) -> None:
    """The server at the port answers with that, among other things."""
    wait_listening("127.0.0.1", port)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(question)
        answer = b""
        while wanted not in answer:
            more = sock.recv(4096)
            assert more, f"no {wanted!r} in {answer!r}"
            answer += more


def lives_and_dies(
    up: Up, works: Callable[[], None], *, end: str, stopped_by: tuple[str, ...] = ("stop", "web")
) -> None:
    """It works; after a kill -9 of its main program all of it is gone and it works again; it stops in its own way."""
    (first,) = up.wait_running("web/0")
    works()
    os.kill(first["host_pid"], signal.SIGKILL)
    up.wait("started", "web/0", generation=2)
    works()
    assert up.worker("web/0")["restarts"] == 1
    done = up.ctl(*stopped_by)
    assert (done.code, done.err) == (0, "")
    up.status()
    assert up.pid_namespaces.processes() == []
    ended = up.worker("web/0")["last_exit"]
    assert (ended["reason"], ended["timed_out"]) == (end, False)


def test_a_shell_that_forks_daemons(tmp_path: Path) -> None:
    script = '(setsid sh -c "while :; do sleep 1000; done" &); (sh -c "sleep 1000" & exec setsid sleep 1000 &); '
    with Up(tmp_path, pool_text("web", *shell(script + "echo ready; exec sleep 1000"))) as up:
        lives_and_dies(up, lambda: None, end="signal:SIGTERM")


def test_nginx(tmp_path: Path, port: int) -> None:
    nginx = found("nginx")
    (tmp_path / "index.html").write_text("hello from inside\n")
    config = tmp_path / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    server = f"server {{ listen 127.0.0.1:{port}; root {tmp_path}; }}"
    config.write_text(
        f"{user} worker_processes 2; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log /dev/stdout; {server} }}\n"
    )
    command = [nginx, "-e", "stderr", "-p", str(tmp_path), "-c", str(config), "-g", "daemon off;"]
    with Up(tmp_path, pool_text("web", *command, stop='[{ signal = "QUIT", wait = "10s" }, "kill"]')) as up:

        def works() -> None:
            ask(port, b"GET / HTTP/1.0\r\n\r\n", b"hello from inside")
            up.wait_record("web", lambda record: "GET / HTTP/1.0" in record.get("msg", ""))

        lives_and_dies(up, works, end="exit:0")
        assert up.ctl("start", "web").code == 0
        works()
        assert up.ctl("kill", "-HUP", "web").code == 0  # reloads
        works()
        assert up.worker("web/0")["generation"] == 3


def test_redis(tmp_path: Path, port: int) -> None:
    redis = found("redis-server")
    command = [redis, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", ""]
    with Up(tmp_path, pool_text("web", *command)) as up:

        def works() -> None:
            ask(port, b"PING\r\n", b"+PONG\r\n")

        lives_and_dies(up, works, end="exit:0")
        up.wait_record("web", lambda record: "bye bye" in record.get("msg", ""))


APP = """
import os
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} of {os.environ['NSSUP_ID']}".encode()]
"""


def test_gunicorn(tmp_path: Path, port: int) -> None:
    gunicorn = found("gunicorn")
    (tmp_path / "app.py").write_text(APP)
    command = [gunicorn, "--workers", "3", "--bind", f"127.0.0.1:{port}", "--chdir", str(tmp_path), "app:app"]
    with Up(tmp_path, pool_text("web", *command)) as up:

        def works() -> None:
            ask(port, b"GET / HTTP/1.0\r\n\r\n", b" of web/0")

        lives_and_dies(up, works, end="exit:0")


@needs_root
def test_postgres_as_its_user(port: int) -> None:
    initdb = found("initdb", *map(str, Path("/usr/lib/postgresql").glob("*/bin")))
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("needs the user postgres")
    with tempfile.TemporaryDirectory() as short:
        here, data = Path(short), Path(short, "data")
        here.chmod(0o755)
        data.mkdir()
        os.chown(data, user.pw_uid, user.pw_gid)
        run = ["setpriv", "--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]
        subprocess.run([*run, initdb, "-D", str(data), "-A", "trust", "--no-sync"], check=True, capture_output=True)
        postgres = str(Path(initdb).resolve().with_name("postgres"))
        options = [f"-cport={port}", f"-cunix_socket_directories={data}", "-clisten_addresses=127.0.0.1", "-cfsync=off"]
        psql = [str(Path(initdb).resolve().with_name("psql")), "-h", str(data), "-p", str(port), "-U", "postgres"]
        stop = '[{ signal = "INT", wait = "30s" }, "kill"]'
        pool = pool_text("web", postgres, "-D", str(data), *options, user='"postgres"', stop=stop)
        with Up(here, pool) as up:

            def works() -> None:
                up.wait_record("web", lambda record: ready(record, up.worker("web/0")["generation"]))
                done = subprocess.run([*psql, "-Atc", "select 6 * 7"], capture_output=True, text=True, check=True)
                assert done.stdout == "42\n"

            lives_and_dies(up, works, end="exit:0")


def ready(record: dict[str, object], generation: int) -> bool:
    said = "database system is ready to accept connections"
    return record["generation"] == generation and said in str(record.get("msg"))


@needs_root
def test_another_user_may_open_stdout_by_its_path(tmp_path: Path) -> None:
    """As many do that log to /dev/stdout, which is a pipe made by somebody else."""
    script = "echo one > /dev/stdout; echo two > /dev/stderr; echo three >> /proc/self/fd/1; exec sleep 1000"
    for merge in (False, True):
        log = f"{{ merge = {json.dumps(merge)} }}"
        with Up(tmp_path, pool_text("web", *shell(script), user='"nobody"', log=log)) as up:
            up.wait_record("web", lambda record: record["msg"] == "three")
            assert {record["msg"] for record in up.tail("web")} == {"one", "two", "three"}
        shutil.rmtree(tmp_path / "l")
