"""Programs that people run, ready when they say so or when they answer; and not ready when they do not."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from live import Json, Up, needs_namespaces, needs_root, pool_text
from test_programs import APP, found, port

pytestmark = needs_namespaces

__all__ = ["port"]  # the fixture


def connects(address: tuple[str, int] | str) -> None:
    """At the first try: whoever is ready may be relied upon."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.connect(address)


def ready(up: Up) -> Json:
    up.wait("started", "web/0")
    worker = up.worker("web/0")
    assert worker["ready"]
    return worker


def test_nginx_by_http(tmp_path: Path, port: int) -> None:
    nginx = found("nginx")
    (tmp_path / "ready").write_text("yes\n")
    config = tmp_path / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    server = f"server {{ listen 127.0.0.1:{port}; root {tmp_path}; }}"
    config.write_text(
        f"{user} worker_processes 1; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {server} }}\n"
    )
    command = [nginx, "-e", "stderr", "-p", str(tmp_path), "-c", str(config), "-g", "daemon off;"]
    probe = f'{{ http = "http://localhost:{port}/ready", every = "20ms" }}'
    with Up(tmp_path, pool_text("web", *command, ready=probe)) as up:
        ready(up)
        connects(("127.0.0.1", port))
        (tmp_path / "ready").unlink()
        up.wait("became_unready", "web/0")
        assert up.worker("web/0")["probes"] == {"ready": "HTTP status 404"}
        (tmp_path / "ready").touch()
        up.wait("became_ready", "web/0")


def test_redis_by_unix_socket_and_its_own_client(tmp_path: Path) -> None:
    """Its liveness is what it answers: a client finds out that it hangs."""
    redis, client = found("redis-server"), found("redis-cli")
    with tempfile.TemporaryDirectory() as short:
        path = f"{short}/redis.sock"
        command = [redis, "--port", "0", "--unixsocket", path, "--dir", short, "--save", ""]
        live = f'{{ exec = ["{client}", "-s", "{path}", "ping"], every = "50ms", timeout = "1s", failures = 2 }}'
        stop = f'[{{ command = ["{client}", "-s", "{path}", "shutdown", "nosave"], wait = "5s" }}, "kill"]'
        keys = {"ready": f'{{ unix = "{path}" }}', "live": live, "stop": stop}
        with Up(tmp_path, pool_text("web", *command, **keys)) as up:
            ready(up)
            connects(path)
            assert up.ctl("stop", "web").code == 0
            ended = up.worker("web/0")["last_exit"]
            assert (ended["reason"], ended["timed_out"]) == ("exit:0", False)
            assert up.ctl("start", "web").code == 0
            assert up.ctl("kill", "-s", "STOP", "web").code == 0
            begun = up.wait("stop_begun", "web/0", reason="probe-failed")
            up.wait("started", "web/0", after=begun["seq"], generation=3)
            assert up.worker("web/0")["last_exit"]["reason"] == "probe-failed"


def test_gunicorn_by_sd_notify(tmp_path: Path, port: int) -> None:
    """As its systemd unit has it."""
    gunicorn = found("gunicorn")
    (tmp_path / "app.py").write_text(APP)
    command = [gunicorn, "--workers", "2", "--bind", f"127.0.0.1:{port}", "--chdir", str(tmp_path), "app:app"]
    with Up(tmp_path, pool_text("web", *command, ready='{ notify = "sd" }')) as up:
        assert "arbiter booted" in ready(up)["status_text"]
        connects(("127.0.0.1", port))


@needs_root
def test_postgres_by_its_own_client_as_its_user(port: int) -> None:
    places = tuple(map(str, Path("/usr/lib/postgresql").glob("*/bin")))
    initdb, is_ready = found("initdb", *places), found("pg_isready", *places)
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
        binaries = Path(initdb).resolve()
        options = [f"-cport={port}", f"-cunix_socket_directories={data}", "-clisten_addresses=", "-cfsync=off"]
        pool = pool_text(
            "web",
            str(binaries.with_name("postgres")),
            "-D",
            str(data),
            *options,
            user='"postgres"',
            startup='{ log = "database system is ready to accept connections" }',
            ready=f'{{ exec = ["{is_ready}", "-q", "-h", "{data}", "-p", "{port}"], every = "50ms" }}',
            stop=f'[{{ command = ["{binaries.with_name("pg_ctl")}", "-D", "{data}", "-W", "-m", "fast", "stop"], '
            'wait = "30s" }, "kill"]',
        )
        with Up(here, pool) as up:
            ready(up)
            connects(f"{data}/.s.PGSQL.{port}")
            assert up.ctl("stop", "web").code == 0
            assert up.worker("web/0")["last_exit"]["reason"] == "exit:0"
