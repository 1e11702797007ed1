"""The examples of docs/examples, run as users run them; and their types."""

from __future__ import annotations

import contextlib
import http.server
import json
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from live import PATIENCE, needs_namespaces

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
pytestmark = [needs_namespaces, pytest.mark.timeout(180)]


def example(name: str, *args: str, given: str = "") -> tuple[int, str]:
    """Exit code and output of one of them."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *args],
        input=given,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


def test_all_are_typed() -> None:
    files = sorted(map(str, EXAMPLES.glob("*.py")))
    assert len(files) == 4
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--scripts-are-modules", *files],
        cwd=EXAMPLES.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


# --- sandbox ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "how", "output"),
    [
        ("print(6 * 7)", "ok", "42\n"),
        ("print('begun', flush=True)\nwhile True: pass", "late|killed", "begun\n"),
        ("import sys; sys.exit(3)", "failed", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed", ""),
        ("x = bytearray(1 << 30)", "failed", ""),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", "failed", ""),
        ("import os\nprint(len(list(filter(str.isdigit, os.listdir('/proc')))))", "ok", "2\n"),
        ("print('x' * 1000000)", "ok", "x" * 65536),
        ("open('DIRECTORY/x', 'w').write('x' * (2 << 20))", "failed", ""),
    ],
)
def test_the_sandbox(tmp_path: Path, code: str, how: str, output: str) -> None:
    returncode, printed = example("sandbox", given=code.replace("DIRECTORY", str(tmp_path)))
    verdict = json.loads(printed)
    assert returncode == 0
    assert verdict["how"] in how.split("|"), verdict
    assert verdict["output"] == output


# --- ci --------------------------------------------------------------------------------------------------------------


def test_the_ci_runner(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(
        "[job.good]\ncommand = 'true'\n"
        "[job.after]\ncommand = 'sh -c \"echo after\"'\nneeds = ['good']\n"
        "[job.bad]\ncommand = 'sh -c \"echo why; exit 3\"'\nneeds = ['after']\n"
        "[job.never]\ncommand = 'true'\nneeds = ['bad']\n"
        "[job.hangs]\ncommand = 'sh -c \"trap : TERM; echo here; while :; do sleep 1000; done\"'\ntimeout = 3.0\n"
        "[job.eats]\ncommand = 'sh -c \"head -c 300000000 /dev/zero | tail\"'\nmemory = '64M'\n"
        "[job.missing]\ncommand = 'no-such-program'\n"
    )
    returncode, printed = example("ci", str(jobs), "--at-once", "3")
    assert returncode == 1
    assert printed.endswith("2 of 7 passed\n")
    for line in ("bad: exit:3", "  | why", "hangs: timed out", "  | here", "eats: exit:1", "missing: not started"):
        assert line in printed, printed
    assert "never:" not in printed
    jobs.write_text("[job.good]\ncommand = 'true'\n")
    assert example("ci", str(jobs))[0] == 0


# --- crawler ---------------------------------------------------------------------------------------------------------

PAGES = {
    "/": '<a href="/a">a</a> <a href="b#part">b</a> <a href="http://elsewhere.invalid/">x</a> <a href="/hangs">h</a>',
    "/a": '<a href="/">back</a> <a href="/none">none</a>',
    "/b": '<a href="/a">a</a>',
}


@contextlib.contextmanager
def website() -> Iterator[str]:
    """Its address. /hangs never answers."""
    over = threading.Event()

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/hangs":
                over.wait(PATIENCE * 5)
                return
            body = PAGES.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            over.set()
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_the_crawler() -> None:
    with website() as address:
        returncode, printed = example("crawler", f"{address}/", "--workers", "2", "--seconds", "10")
    assert returncode == 0
    pages = {page["url"].removeprefix(address): page for page in map(json.loads, printed.splitlines())}
    assert {path: page["status"] for path, page in pages.items()} == {
        "/": 200,
        "/a": 200,
        "/b": 200,
        "/none": 404,
        "/hangs": None,
    }
    assert "10 s" in pages["/hangs"]["error"]


# --- prefork ---------------------------------------------------------------------------------------------------------


def test_the_prefork_server() -> None:
    """A rolling restart in the middle of requests, and none is refused."""
    with subprocess.Popen(
        [sys.executable, EXAMPLES / "prefork.py", "--workers", "2"], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout
        port = server.stdout.readline().removeprefix("port ").strip()

        def ask() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE) as answer:
                return str(answer.read().decode())

        assert "life 1" in ask()
        over = threading.Event()
        answers: list[str] = []
        failures: list[Exception] = []

        def go_on() -> None:
            while not over.is_set():
                try:
                    answers.append(ask())
                except Exception as error:
                    failures.append(error)

        asking = threading.Thread(target=go_on)
        asking.start()
        server.send_signal(signal.SIGHUP)
        said = server.stdout.readline()
        over.set()
        asking.join()
        last = ask()
        server.terminate()
        assert server.wait(PATIENCE) == 0
    assert said == "restarted\n"
    assert failures == []
    assert answers
    assert "life 2" in last
