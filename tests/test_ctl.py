"""The API over a real Unix socket, on a supervisor whose workers are played."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from fake_supervisor import Supervisor
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nssup import desk, http, operation, render
from nssup.api import Reply
from nssup.ctl import ControlServer
from nssup.custody import Orphan
from nssup.errors import ControlError
from nssup.events import Exit, State, Stop
from nssup.routes import ROUTES
from nssup.spec import Backoff, Intensity, ReloadSpec, RestartPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nssup.access import Role

pytestmark = pytest.mark.both_loops


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401 - a document
        return json.loads(self.body)

    @property
    def exit(self) -> int:
        return int(self.headers["nssup-exit"])

    @property
    def texts(self) -> tuple[str, str]:
        """(stdout, stderr)."""
        cut = len(self.body) - int(self.headers["nssup-stderr"])
        return self.body[:cut].decode(), self.body[cut:].decode()

    @property
    def error(self) -> tuple[str, str, str]:
        found = self.json["error"]
        return found["code"], found["message"], found["hint"]

    @property
    def outcome(self) -> dict[str, tuple[str, bool]]:
        return {r["id"]: (r["state"], r["ok"]) for r in self.json["results"]}


class Stream:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.lines: list[Any] = []

    async def next(self) -> Any:  # noqa: ANN401 - a document
        """The next line; None at the end."""
        while not self.lines:
            size = int(await self.reader.readline(), 16)
            data = (await self.reader.readexactly(size + 2))[:-2]
            if not size:
                return None
            self.lines = [json.loads(line) for line in data.splitlines()]
        return self.lines.pop(0)

    async def rest(self) -> list[Any]:
        found = []
        while (line := await self.next()) is not None:
            found.append(line)
        return found


class Site:
    """A supervisor with its control socket, and somebody who asks."""

    def __init__(self, sup: Supervisor, server: ControlServer) -> None:
        self.sup = sup
        self.server = server
        self.writers: list[asyncio.StreamWriter] = []

    async def close(self) -> None:
        for writer in self.writers:
            writer.close()
            await writer.wait_closed()

    async def send(
        self, method: str, target: str, body: object = None, *, text: bool = False
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(self.server.path)
        self.writers.append(writer)
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        accept = "text/plain" if text else "*/*"
        head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        return reader, writer

    async def head(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        return int(first.split()[1]), {
            name.lower(): value for name, _, value in (x.partition(": ") for x in lines[:-2])
        }

    async def ask(self, method: str, target: str, body: object = None, *, text: bool = False) -> Answer:
        reader, writer = await self.send(method, target, body, text=text)
        status, headers = await self.head(reader)
        data = await reader.readexactly(int(headers["content-length"]))
        writer.close()
        await writer.wait_closed()
        return Answer(status, headers, data)

    async def get(self, target: str, *, text: bool = False) -> Answer:
        return await self.ask("GET", target, text=text)

    async def post(self, verb: str, *select: str, text: bool = False, **fields: object) -> Answer:
        return await self.ask("POST", f"/v1/{verb}", {"select": select, **fields}, text=text)

    async def stream(self, target: str) -> Stream:
        reader, writer = await self.send("GET", target)
        assert (await self.head(reader))[0] == 200
        return Stream(reader, writer)

    async def until(self, worker_id: str, *states: State) -> None:
        """Wait for the event that brings the worker there."""
        there = asyncio.Event()

        def look(event: object = None) -> None:
            if self.sup.workers.workers[worker_id].state in states:
                there.set()

        unsubscribe = self.sup.subscribe(look)
        look()
        await there.wait()
        unsubscribe()

    def states(self) -> dict[str, str]:
        return {w.id: w.state.value for w in self.sup.workers.workers.values()}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    sup = Supervisor(tmp_path)
    async with ControlServer(sup, str(tmp_path / "s.sock")) as server:
        site = Site(sup, server)
        yield site
        await site.close()
    await sup.close()
    assert sup.subscribers == 0


# Seeing.

STATUS_KEYS = {
    "id", "pool", "index", "state", "reason", "ready", "desired", "enabled", "paused", "draining", "adopted",
    "host_pid", "ns_pid", "init_host_pid", "namespaces", "generation", "restarts", "started_at", "uptime_seconds",
    "next_at", "spec_hash", "cpu_seconds", "memory_bytes", "log_dropped_bytes", "status_text", "notified",
    "probes", "last_exit",
}  # fmt: skip


async def test_status_is_the_promised_document(site: Site) -> None:
    site.sup.add("web", workers=2)
    await site.until("web/1", State.RUNNING)
    site.sup.time += 12.5
    answer = await site.get("/v1/status")
    assert (answer.status, answer.exit, answer.headers["content-type"]) == (200, 0, "application/json")
    found = answer.json
    assert found["api"] == 1
    assert found["supervisor"] == {
        "host_pid": os.getpid(),
        "version": "0.1.0",
        "started_at": "2027-01-15T08:00:00.000000Z",
        "epoch": 7,
    }
    assert found["pools"] == [
        {"name": "web", "wanted": 2, "running": 2, "ready": 2, "state": "running", "rollout": None, "sockets": []}
    ]
    worker = found["workers"][1]
    assert set(worker) == STATUS_KEYS
    assert len(worker.pop("spec_hash")) == 16
    assert worker == {
        "id": "web/1", "pool": "web", "index": 1, "state": "running", "reason": None, "ready": True,
        "desired": "up", "enabled": True, "paused": False, "draining": False, "adopted": False,
        "host_pid": 5005, "ns_pid": 2, "init_host_pid": 5004, "namespaces": {"pid": 4026532201, "mount": 4026532200},
        "generation": 1, "restarts": 0, "started_at": "2027-01-15T08:01:40.000000Z", "uptime_seconds": 12.5,
        "next_at": None, "cpu_seconds": 0.125, "memory_bytes": 3 << 20, "log_dropped_bytes": 0, "last_exit": None,
        "status_text": None, "probes": {},
        "notified": {"reloading": False, "stopping": False, "main_ns_pid": None, "errno": None},
    }  # fmt: skip


async def test_an_exit_is_told_whole(site: Site) -> None:
    site.sup.add("web")
    await site.until("web/0", State.RUNNING)
    site.sup.die("web/0", Exit(reason="signal:SIGKILL", signal=9, cpu_seconds=0.1, max_rss_bytes=123))
    await site.until("web/0", State.BACKOFF)
    worker = (await site.get("/v1/workers/web/0")).json
    assert worker["last_exit"] == {
        "code": None, "signal": "SIGKILL", "core": False, "oom": False, "timed_out": False,
        "reason": "signal:SIGKILL", "at": "2027-01-15T08:01:40.000000Z", "cpu_seconds": 0.1, "max_rss_bytes": 123,
    }  # fmt: skip
    assert (worker["state"], worker["reason"], worker["host_pid"]) == ("backoff", "signal:SIGKILL", None)
    assert worker["next_at"].startswith("2027-01-15T08:01:40.")


async def test_the_spec_hash_is_of_what_a_life_is_made_of(site: Site) -> None:
    site.sup.add("a", env={"X": "1", "Y": "2"})
    site.sup.add("b", "job")
    before = {w["id"]: w["spec_hash"] for w in (await site.get("/v1/status")).json["workers"]}
    await site.post("scale", "a", n=2)
    after = {w["id"]: w["spec_hash"] for w in (await site.get("/v1/status")).json["workers"]}
    assert after["a/0"] == after["a/1"] == before["a/0"] != before["b/0"]


async def test_status_as_text_is_rendered_here(site: Site) -> None:
    site.sup.add("web", workers=2)
    site.sup.add("db")
    await site.until("db/0", State.RUNNING)
    folded = await site.get("/v1/status", text=True)
    assert [line.split()[0] for line in folded.body.decode().splitlines()] == ["NAME", "web", "db/0"]
    assert folded.headers["content-type"].startswith("text/plain")
    for target in ("/v1/status?unfold=1", "/v1/status?select=web&select=db"):
        unfolded = await site.get(target, text=True)
        assert [line.split()[0] for line in unfolded.body.decode().splitlines()] == ["NAME", "web/0", "web/1", "db/0"]
    assert b"\x1b[" in (await site.get("/v1/status?format=text&color=1")).body
    narrow = await site.get("/v1/status?format=text&width=30")
    assert max(map(len, narrow.body.decode().splitlines())) == 30


async def test_a_table_of_many_is_made_without_a_document_of_each(site: Site) -> None:
    """And says the same."""
    site.sup.add("web", workers=64)
    site.sup.add("one")
    site.sup.add("bad", "crash", workers=2)
    site.sup.add("none", workers=0)
    await site.until("web/63", State.RUNNING)
    await site.until("bad/1", State.BACKOFF)
    site.sup.die("web/3", Exit(reason="signal:SIGSEGV", signal=11, core=True))
    await site.until("web/3", State.STARTING, State.BACKOFF)
    quick = (await site.get("/v1/status", text=True)).body.decode().splitlines()
    document = (await site.get("/v1/status")).json
    document["workers"] = [{**w, "cpu_seconds": None, "memory_bytes": None} for w in document["workers"]]
    assert quick == render.table(document).splitlines()
    assert (await site.get("/v1/status", text=True)).exit == 3


async def test_status_exits_0_3_or_4(site: Site) -> None:
    site.sup.add("web")
    site.sup.add("job", "job", type="oneshot")
    await site.until("web/0", State.RUNNING)
    await site.until("job/0", State.DONE)
    assert (await site.get("/v1/status")).exit == 0
    await site.post("stop", "web", wait=True)
    for text in (False, True):
        assert (await site.get("/v1/status", text=text)).exit == 3
        assert (await site.get("/v1/status?select=job", text=text)).exit == 0
        unknown = await site.get("/v1/status?select=wbe", text=text)
        assert (unknown.status, unknown.exit) == (404, 4)
    assert unknown.texts == ("", "nssup: 'wbe' is no pool or worker (did you mean web?)\n")


async def test_cpu_and_memory_of_many_only_when_asked(site: Site) -> None:
    site.sup.add("web", workers=65)
    await site.until("web/64", State.RUNNING)
    assert {w["cpu_seconds"] for w in (await site.get("/v1/status")).json["workers"]} == {None}
    assert site.sup.stats_read == 0
    assert {w["cpu_seconds"] for w in (await site.get("/v1/status?stats=1")).json["workers"]} == {0.125}
    assert {w["memory_bytes"] for w in (await site.get("/v1/status?select=web/[0-5]")).json["workers"]} == {3 << 20}


async def test_pools_and_workers_by_themselves(site: Site) -> None:
    site.sup.add("web", workers=2)
    site.sup.add("db", "slow")
    await site.until("web/1", State.RUNNING)
    assert [p["name"] for p in (await site.get("/v1/pools")).json["pools"]] == ["web", "db"]
    pool = (await site.get("/v1/pools/web")).json
    assert (pool["running"], [w["id"] for w in pool["workers"]]) == (2, ["web/0", "web/1"])
    assert (await site.get("/v1/pools/wbe")).error[2] == "did you mean web?"

    async def ids(query: str) -> list[str]:
        return [w["id"] for w in (await site.get(f"/v1/workers?{query}")).json["workers"]]

    assert await ids("") == ["web/0", "web/1", "db/0"]
    assert await ids("pool=db") == ["db/0"]
    assert await ids("state=running&select=*/0") == ["web/0"]
    assert (await site.get("/v1/workers/web/7")).error[2] == "web has web/0 to web/1"
    assert (await site.get("/v1/workers/web/*")).status == 400


async def test_which_and_pid(site: Site) -> None:
    site.sup.add("web", workers=2)
    await site.until("web/1", State.RUNNING)
    assert (await site.get("/v1/which/5005")).json == {"host_pid": 5005, "id": "web/1"}
    assert (await site.get("/v1/which/5005", text=True)).texts == ("web/1\n", "")
    assert (await site.get("/v1/which/99")).exit == 4
    assert (await site.get("/v1/which/x")).exit == 2
    assert (await site.get("/v1/status?select=web&format=host_pid")).body == b"5003\n5005\n"
    assert (await site.get("/v1/status?select=host:5005&format=ns_pid")).body == b"2\n"
    await site.post("stop", "web/0", wait=True)
    gone = await site.get("/v1/status?select=web&format=host_pid")
    assert (gone.body, gone.exit) == (b"5005\n", 3)


async def test_show_tells_what_holds_and_where_it_was_said(tmp_path: Path) -> None:
    sup = Supervisor(tmp_path)
    sup.add("web", workers=3)
    sup.configured["web"] = 2
    origins: dict[tuple[str | int, ...], str] = {
        ("pool", "web", "workers"): "n.toml:4",
        ("pool", "web", "command"): "n.toml:3",
    }
    async with ControlServer(sup, str(tmp_path / "s.sock"), origins=origins) as server:
        site = Site(sup, server)
        (pool,) = (await site.get("/v1/show?select=web")).json["pools"]
        found = {s["key"]: (s["value"], s["origin"]) for s in pool["settings"]}
        assert found["workers"] == (3, "scale (the config says 2: n.toml:4)")
        assert found["command"] == (["good"], "n.toml:3")
        assert found["umask"] == (0o022, "default")
        text = (await site.get("/v1/show", text=True)).body.decode()
        assert text.startswith('[pool.web]\ncommand = ["good"]')
        assert (await site.get("/v1/show?select=nosuch")).exit == 4
        await site.close()
    await sup.close()


async def test_env_tells_sources_and_no_secrets(site: Site) -> None:
    site.sup.add("web", workers=2, env={"TOKEN": "hush", "A": "1"})
    workers = (await site.get("/v1/env?select=web/1")).json["workers"]
    assert [w["id"] for w in workers] == ["web/1"]
    found = {v["name"]: (v["value"], v["origin"]) for v in workers[0]["env"]}
    assert found == {
        "TOKEN": ("******", "env"), "A": ("1", "env"), "PATH": ("/bin", "supervisor"), "HOME": ("/root", "user"),
        "NSSUP_INDEX": ("1", "nssup"),
    }  # fmt: skip
    assert b"hush" not in (await site.get("/v1/env", text=True)).body
    assert b"hush" not in (await site.get("/v1/show")).body


async def test_tree_and_stats_are_of_all_processes(site: Site) -> None:
    site.sup.add("web")
    site.sup.add("off", enabled=False)
    await site.until("web/0", State.RUNNING)
    text = (await site.get("/v1/tree", text=True)).body.decode()
    assert text == (
        "web/0\n     5002       1  nssup-init\n     5003       2    app\n     6003       3      app \\x1b[2J\n"
        "off/0: no processes\n"
    )
    (worker,) = (await site.get("/v1/tree?select=host:5003")).json["workers"]
    assert [(p["host_pid"], p["ns_pid"], p["parent_host_pid"]) for p in worker["processes"]] == [
        (5002, 1, 1), (5003, 2, 5002), (6003, 3, 5003),
    ]  # fmt: skip
    web, off = (await site.get("/v1/stats")).json["workers"]
    assert (web["processes"], web["threads"], web["cpu_seconds"], web["memory_bytes"]) == (3, 5, 0.75, 6 << 20)
    assert (off["processes"], off["cpu_seconds"], off["memory_bytes"]) == (0, None, None)
    assert (await site.get("/v1/stats", text=True)).body.split()[:4] == [b"NAME", b"STATE", b"PROCS", b"THREADS"]


async def test_a_signal_to_one_process_inside(site: Site) -> None:
    site.sup.add("web", workers=2)
    await site.until("web/1", State.RUNNING)
    assert (await site.post("kill", "web/1", ns_pid=7, signal="HUP")).exit == 0
    assert site.sup.inside == [("web/1", 7, 1)]
    for bad in ({"select": ["web"], "ns_pid": 7}, {"select": ["web/1"], "ns_pid": 7, "tree": True}):
        assert (await site.ask("POST", "/v1/kill", bad)).exit == 2
    assert (await site.ask("POST", "/v1/kill", {"select": ["web/1"], "ns_pid": 1})).status == 400, "init itself"


async def test_healthz(site: Site) -> None:
    assert (await site.get("/healthz")).json["status"] == "ok"
    assert (await site.get("/healthz", text=True)).body.startswith(b"pong: nssup 0.1.0, host PID ")


async def test_metrics_are_what_prometheus_reads(site: Site) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    site.sup.add("web", workers=2)
    site.sup.add("bad", "crash")
    await site.until("web/1", State.RUNNING)
    await site.until("bad/0", State.BACKOFF)
    answer = await site.get("/metrics")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    families = list(text_string_to_metric_families(answer.body.decode()))
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }
    assert found["nssup_info", ("epoch", "7"), ("version", "0.1.0")] == 1
    assert found["nssup_pool_wanted_workers", ("pool", "web")] == 2
    assert found["nssup_pool_ready_workers", ("pool", "web")] == 2
    assert found["nssup_pool_workers", ("pool", "bad"), ("state", "backoff")] == 1
    assert found["nssup_pool_workers", ("pool", "bad"), ("state", "failed")] == 0
    assert found["nssup_worker_up", ("pool", "web"), ("worker", "web/1")] == 1
    assert found["nssup_worker_cpu_seconds_total", ("pool", "web"), ("worker", "web/1")] == 0.125
    assert found["nssup_exits_total", ("pool", "bad"), ("reason", "exit:3")] >= 1
    assert found["nssup_events_total", ("event", "started")] >= 3


async def test_readyz_is_200_only_when_all_are(site: Site) -> None:
    assert (await site.get("/readyz")).json == {"status": "ready", "not_ready": []}
    site.sup.add("web", "slow")
    site.sup.add("off", enabled=False)
    site.sup.add("job", "job", type="oneshot")
    await site.until("job/0", State.DONE)
    answer = await site.get("/readyz")
    assert (answer.status, answer.json) == (503, {"status": "not-ready", "not_ready": ["web/0"]})
    assert (await site.get("/readyz", text=True)).body == b"not ready: web/0\n"


# Doing.


async def test_start_stop_restart_wait_for_the_result(site: Site) -> None:
    site.sup.add("web", workers=2, enabled=False)
    assert site.states() == {"web/0": "stopped", "web/1": "stopped"}
    started = await site.post("start", "web", wait=True)
    assert (started.exit, started.outcome) == (0, {"web/0": ("running", True), "web/1": ("running", True)})
    assert started.json["seq"] == site.sup.workers.seq - 1, "its own note comes behind it"
    assert started.json["results"][0]["host_pid"] == 5003
    again = await site.post("start", "web/0", wait=True)
    assert again.outcome == {"web/0": ("running", True)}, "it is already"
    restarted = await site.post("restart", "web@1", wait=True)
    assert restarted.outcome == {"web/1": ("running", True)}
    assert restarted.json["results"][0]["generation"] == 2
    stopped = await site.post("stop", all=True, wait=True)
    assert stopped.outcome == {"web/0": ("stopped", True), "web/1": ("stopped", True)}
    assert (await site.post("stop", "web", wait=True)).exit == 0, "it is already"
    assert (await site.post("restart", "web/0", wait=True)).outcome == {"web/0": ("running", True)}


async def test_without_wait_the_answer_comes_at_once(site: Site) -> None:
    site.sup.add("web", "slow", enabled=False)
    assert (await site.post("start", "web")).outcome == {"web/0": ("starting", True)}


async def test_texts_of_commands(site: Site) -> None:
    site.sup.add("web", workers=2)
    await site.until("web/1", State.RUNNING)
    assert (await site.post("restart", "web", wait=True, text=True)).texts == ("web/0: running\nweb/1: running\n", "")


async def test_a_start_that_fails_says_why_and_what_was_written_last(site: Site) -> None:
    site.sup.add("bad", "crash", enabled=False, restart=_never_restart())
    site.sup.add("gone", "missing", enabled=False)
    answer = await site.post("start", "gone", wait=True)
    assert (answer.exit, answer.outcome) == (1, {"gone/0": ("backoff", False)})
    assert answer.json["results"][0]["reason"] == "exec-failed:ENOENT"
    wait = await site.post("wait", "bad", "gone", wait="done", timeout=0)
    assert wait.exit == 124
    told = await site.post("start", "bad", wait="done", text=True)
    assert (told.exit, told.texts) == (1, ("", "bad/0: start: failed: exit:3\n  | cannot go on\n"))


def _never_restart() -> RestartPolicy:
    return RestartPolicy(policy="never")


async def test_a_oneshot_started_is_well_when_it_ran_or_is_done(site: Site) -> None:
    site.sup.add("job", "job", type="oneshot", enabled=False, restart=_never_restart())
    assert (await site.post("start", "job", wait="done")).outcome == {"job/0": ("done", True)}


async def test_time_out(site: Site) -> None:
    site.sup.add("web", "slow", workers=2, enabled=False)
    answer = await site.post("start", "web", wait=True, timeout=0.01)
    assert (answer.status, answer.exit) == (200, 124)
    assert answer.outcome == {"web/0": ("starting", False), "web/1": ("starting", False)}
    assert [r["timed_out"] for r in answer.json["results"]] == [True, True]
    text = await site.post("start", "web/0", wait=True, timeout=0, text=True)
    assert text.texts == ("", "web/0: start: still starting when the time was up\n")


async def test_a_client_gone_stops_waiting_and_the_operation_goes_on(site: Site) -> None:
    site.sup.add("web", "stubborn")
    await site.until("web/0", State.RUNNING)
    listening = site.sup.subscribers
    _, writer = await site.send("POST", "/v1/stop", {"select": ["web"], "wait": True})
    await site.until("web/0", State.STOPPING)
    assert site.sup.subscribers == listening + 1
    writer.close()
    await writer.wait_closed()
    while site.sup.subscribers > listening:
        await site.get("/healthz")
    site.sup.advance(11)
    await site.until("web/0", State.STOPPED)


async def test_somebody_else_may_undo_what_is_waited_for(site: Site) -> None:
    site.sup.add("web", "stubborn")
    await site.until("web/0", State.RUNNING)
    reader, _ = await site.send("POST", "/v1/stop", {"select": ["web"], "wait": True})
    await site.until("web/0", State.STOPPING)
    await site.post("start", "web")
    site.sup.advance(11)
    _, headers = await site.head(reader)
    assert headers["nssup-exit"] == "1"


async def test_many_workers_are_fed_in_turns(site: Site) -> None:
    site.sup.add("web", workers=200, enabled=False)
    turns: list[int] = []
    feed = site.sup.feed

    def counted(worker_id: str, event: Any) -> None:  # noqa: ANN401
        if len(site.sup.fed) % operation.BATCH == 0:
            asyncio.get_running_loop().call_soon(turns.append, len(site.sup.fed))
        feed(worker_id, event)

    site.sup.feed = counted  # type: ignore[method-assign]
    answer = await site.post("start", "web", wait=True, text=True)
    assert answer.texts == ("web: 200 running\n", "")
    assert len(turns) == 7


async def test_changing_verbs_want_to_be_told_what(site: Site) -> None:
    site.sup.add("web", enabled=False)
    for verb in ("stop", "restart", "kill"):
        answer = await site.post(verb)
        assert (answer.status, answer.exit, answer.error[0]) == (400, 2, "usage")
        assert f"nssup ctl {verb} --all" in answer.error[2]
    assert (await site.post("scale", n=1)).exit == 2
    assert (await site.post("stop", "web", all=True)).exit == 2
    assert (await site.post("stop", "wbe")).exit == 4
    assert site.sup.fed == []
    assert (await site.post("start", wait=True)).outcome == {"web/0": ("running", True)}, "of everything"


async def test_kill_sends_a_signal_and_waits_for_nothing(site: Site) -> None:
    site.sup.add("web", workers=2)
    site.sup.add("idle", enabled=False)
    await site.until("web/1", State.RUNNING)
    assert (await site.post("kill", "web/0", signal="USR1", text=True)).texts == ("", "")
    await site.post("kill", "web/1", signal=10, tree=True)
    await site.get("/healthz")
    assert site.sup.signals == [("web/0", 10, False), ("web/1", 10, True)]
    for wrong in ("NOPE", 0, 99):
        assert (await site.post("kill", "web", signal=wrong)).exit == 2
    nobody = await site.post("kill", "idle")
    assert (nobody.exit, nobody.outcome) == (1, {"idle/0": ("stopped", False)})
    assert (await site.post("kill", "web", signal="KILL", wait="stopped", timeout=0)).exit == 124


async def test_kill_is_term_by_default(site: Site) -> None:
    site.sup.add("web")
    await site.until("web/0", State.RUNNING)
    await site.post("kill", "web/0")
    await site.until("web/0", State.BACKOFF)
    assert site.sup.signals == [("web/0", 15, False)]


async def test_scale_up_and_down(site: Site) -> None:
    site.sup.add("web", workers=2)
    await site.until("web/1", State.RUNNING)
    up = await site.post("scale", "web", n=4, wait=True)
    assert up.outcome == {"web/2": ("running", True), "web/3": ("running", True)}
    down = await site.post("scale", "web", n="-3", wait=True)
    assert down.outcome == {f"web/{i}": ("removed", True) for i in (1, 2, 3)}
    assert (await site.post("scale", "web", n="+1", wait=True)).outcome == {"web/1": ("running", True)}
    assert (await site.post("scale", "web", n=2, wait=True)).outcome == {}
    for wrong in ("x", "-9", -1, 10**9, "", "1.5"):
        assert (await site.post("scale", "web", n=wrong)).exit == 2, wrong
    assert (await site.post("scale", "web/1", n=1)).exit == 2
    assert (await site.post("scale", "wbe", n=1)).exit == 4


async def test_scale_of_a_pool_that_is_down(site: Site) -> None:
    site.sup.add("web", enabled=False)
    assert (await site.post("scale", "web", n=2, wait=True)).outcome == {"web/1": ("stopped", True)}


@pytest.mark.parametrize(
    ("command", "goal", "code"),
    [("good", "ready", 0), ("good", "running", 0), ("job", "done", 0), ("crash", "done", 1), ("job", "stopped", 0)],
)
async def test_wait_for_a_goal(site: Site, command: str, goal: str, code: int) -> None:
    site.sup.add("x", command, restart=_never_restart(), type="oneshot" if command == "job" else "service")
    assert (await site.post("wait", "x", wait=goal)).exit == code


async def test_wait_outlasts_a_backoff(site: Site) -> None:
    site.sup.add("web", "missing")
    await site.until("web/0", State.BACKOFF)
    reader, writer = await site.send("POST", "/v1/wait", {"select": ["web"], "wait": "running", "timeout": 50})
    await site.get("/healthz")
    site.sup.workers.pools["web"] = replace(site.sup.workers.pools["web"], command=("good",))
    site.sup.advance(60)
    assert (await site.head(reader))[1]["nssup-exit"] == "0"
    writer.close()
    await writer.wait_closed()


async def test_reset_forgets_failures(site: Site) -> None:
    site.sup.add("bad", "crash", restart=_never_restart())
    site.sup.add("web")
    await site.until("bad/0", State.FAILED)
    answer = await site.post("reset")
    assert answer.outcome == {"bad/0": ("stopped", True), "web/0": ("running", True)}
    assert (await site.post("reset", "bad", text=True)).texts == ("bad/0: stopped\n", "")
    assert (await site.post("reset", "nobody")).exit == 4


async def test_enable_and_disable_are_about_pools(site: Site) -> None:
    site.sup.add("web", workers=2)
    site.sup.add("off", enabled=False)
    await site.until("web/1", State.RUNNING)
    answer = await site.post("disable", "web")
    assert (answer.exit, answer.outcome) == (0, {"web/0": ("running", True), "web/1": ("running", True)})
    assert (await site.post("disable", "web", text=True)).texts[
        0
    ] == "web: disabled; its workers go on (--now stops them)\n"
    assert (await site.post("enable", "off", text=True)).texts[0].startswith("off: enabled; nothing is started before")
    status = (await site.get("/v1/status")).json["workers"]
    assert [(w["enabled"], w["state"]) for w in status] == [(False, "running")] * 2 + [(True, "stopped")]
    await site.post("disable", "off")
    both = await site.post("disable", all=True, now=True, wait=True)
    assert both.outcome == {"web/0": ("stopped", True), "web/1": ("stopped", True), "off/0": ("stopped", True)}
    assert (await site.post("disable", "web", text=True)).texts[0] == "web: disabled\n"
    up = await site.post("enable", "w*", now=True, wait=True, text=True)
    assert up.texts == ("web: enabled\nweb/0: running\nweb/1: running\n", "")
    for wrong, code in ((["web/1"], 2), (["nobody"], 4), ([], 2)):
        assert (await site.post("enable", *wrong)).exit == code
    names = [e["event"] for e in await (await site.stream("/v1/events?follow=0&n=100")).rest()]
    assert (names.count("enabled"), names.count("disabled")) == (2, 2)


async def test_reload_is_done_by_whoever_knows_how(site: Site) -> None:
    site.sup.add("web", reload=ReloadSpec(signal=10), workers=2)
    site.sup.add("db")
    await site.until("db/0", State.RUNNING)
    assert (await site.post("reload", "web", text=True)).texts == ("web/0: running\nweb/1: running\n", "")
    await asyncio.sleep(0)
    assert site.sup.signals == [("web/0", 10, False), ("web/1", 10, False)]
    refused = await site.post("reload", "db")
    assert (refused.status, refused.exit, refused.error[0]) == (409, 1, "no-reload")
    assert (await site.post("reload", all=True)).outcome == {"web/0": ("running", True), "web/1": ("running", True)}
    await site.post("stop", "web/1", wait=True)
    assert (await site.post("reload", "web")).outcome == {"web/0": ("running", True), "web/1": ("stopped", False)}
    assert (await site.post("reload")).exit == 2


async def test_explain_and_history_of_what_was_selected(site: Site) -> None:
    policy = RestartPolicy(backoff=Backoff(jitter=0.0), intensity=Intensity(deaths=5, within=60.0))
    site.sup.add("bad", "crash", restart=policy)
    site.sup.add("web", restart=RestartPolicy(backoff=Backoff(jitter=0.0)))
    await site.until("bad/0", State.BACKOFF)
    site.sup.advance(0.1)
    await site.until("bad/0", State.BACKOFF)
    (bad,) = (await site.get("/v1/explain?select=bad")).json["workers"]
    assert (bad["id"], bad["state"], bad["deaths"]["count"]) == ("bad/0", "backoff", 2)
    assert [each["wait_seconds"] for each in bad["attempts"]] == pytest.approx([0.2, 0.4, 0.8])
    assert bad["after_attempts"] == "failed"
    assert bad["next_at"] == bad["attempts"][0]["at"] == bad["until"]
    text = (await site.get("/v1/explain?select=web&select=bad&n=1", text=True)).texts[0].splitlines()
    assert text[0] == "bad/0: backoff: its last life ended (exit:3), and it is to be launched again"
    assert text[-2:] == ["web/0: running: its program runs", "  if it failed now, and so on: 0.10s, ..."]
    (bad, web) = (await site.get("/v1/history")).json["workers"]
    assert web == {"id": "web/0", "lives": []}
    assert [life["wait_seconds"] for life in bad["lives"]] == pytest.approx([0.1, 0.2])
    assert [life["last_lines"] for life in bad["lives"]] == [["cannot go on"]] * 2
    assert bad["lives"][1]["exit"]["code"] == 3
    text = (await site.get("/v1/history?n=1", text=True)).texts[0].splitlines()
    assert text[0].startswith("bad/0 generation 2: ")
    assert text[0].endswith("exit:3, again after 200 ms")
    assert text[1:] == ["  | cannot go on", "web/0: no life of it is over"]
    for wrong in ("explain?n=0", "explain?n=101", "history?n=-1", "history?x=1"):
        assert (await site.get(f"/v1/{wrong}")).exit == 2
    assert (await site.get("/v1/explain?select=nobody")).exit == 4


async def test_shutdown_tells_when_everything_is_down(site: Site) -> None:
    site.sup.add("web", workers=2)
    await site.until("web/1", State.RUNNING)
    reader, writer = await site.send("POST", "/v1/shutdown", {"wait": True}, text=True)
    await site.sup.asked_to_end.wait()
    for worker_id in ("web/0", "web/1"):
        site.sup.feed(worker_id, Stop())
    status, headers = await site.head(reader)
    assert (status, headers["nssup-exit"]) == (200, "0")
    assert await reader.readexactly(int(headers["content-length"])) == b"web/0: stopped\nweb/1: stopped\n"
    writer.close()
    await writer.wait_closed()


async def test_closing_ends_what_is_waited_for(tmp_path: Path) -> None:
    sup = Supervisor(tmp_path)
    async with ControlServer(sup, str(tmp_path / "s.sock")) as server:
        site = Site(sup, server)
        sup.add("web", "slow")
        reader, _ = await site.send("POST", "/v1/wait", {"wait": "running"})
        events = await site.stream("/v1/events")
        logs = await site.stream("/v1/logs?follow=1")
        await site.get("/healthz")
    assert (await site.head(reader))[1]["nssup-exit"] == "1"
    assert [e["event"] for e in await events.rest()] == ["snapshot"]
    assert await logs.rest() == []
    await site.close()
    await sup.close()


# Streams.


async def test_events_begin_with_a_snapshot(site: Site) -> None:
    site.sup.add("web")
    await site.until("web/0", State.RUNNING)
    stream = await site.stream("/v1/events")
    first = await stream.next()
    assert (first["event"], first["epoch"], first["seq"]) == ("snapshot", 7, site.sup.workers.seq)
    assert first["status"]["workers"][0]["state"] == "running"
    await site.post("stop", "web", wait=True)
    told = [await stream.next(), await stream.next()]
    assert [e["seq"] for e in told] == [first["seq"] + 1, first["seq"] + 2]
    assert told[0] == {
        "v": 1, "ts": "2027-01-15T08:01:40.000000Z", "epoch": 7, "seq": first["seq"] + 1, "event": "stop_begun",
        "worker": "web/0", "from": "running", "to": "stopping", "reason": "operator", "generation": 1,
        "host_pid": 5003, "ns_pid": 2, "detail": {"signal": 15, "tree": False},
    }  # fmt: skip
    assert (told[1]["to"], told[1]["exit"]["signal"]) == ("stopped", "SIGTERM")


async def test_past_events_and_a_resume(site: Site) -> None:
    site.sup.add("web")
    await site.until("web/0", State.RUNNING)
    past = await (await site.stream("/v1/events?follow=0&n=100")).rest()
    assert [e["event"] for e in past] == ["pool_added", "launched", "started"]
    assert [e["event"] for e in await (await site.stream("/v1/events?follow=0&n=1")).rest()] == ["started"]
    assert await (await site.stream("/v1/events?follow=0&n=0")).rest() == []
    stream = await site.stream("/v1/events?since=7:1")
    assert [(await stream.next())["seq"] for _ in range(2)] == [2, 3]
    site.sup.scale_pools({"web": 2})
    assert (await stream.next())["event"] == "scaled"
    for gone in ("6:1", "7:99"):
        answer = await site.get(f"/v1/events?since={gone}")
        assert (answer.status, answer.error[0]) == (410, "gone")
    assert (await site.get("/v1/events?since=x")).status == 400


async def test_events_too_old_are_gone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.sup.add("web", enabled=False)
    for n in range(2, 2 * desk.EVENTS_KEPT):
        site.sup.scale_pools({"web": n % 2})
    assert (await site.get("/v1/events?since=7:1")).status == 410


async def test_events_of_what_was_selected(site: Site) -> None:
    site.sup.add("web", workers=2, enabled=False)
    site.sup.add("db", enabled=False)
    pool, one = await site.stream("/v1/events?select=web"), await site.stream("/v1/events?select=web/1")
    assert len((await pool.next())["status"]["workers"]) == 2
    assert len((await one.next())["status"]["workers"]) == 1
    await site.post("start", "db", "web/1", "web/0", wait=True)
    await site.post("scale", "web", n=3, wait=True)
    assert [(await one.next())["worker"] for _ in range(2)] == ["web/1", "web/1"]
    seen = [await pool.next() for _ in range(7)]
    assert {e.get("worker") for e in seen} == {"web/0", "web/1", "web/2", None}
    assert {e.get("pool") for e in seen} == {"web", None}


async def test_a_follower_that_is_too_slow_is_told_what_it_lost(site: Site) -> None:
    follower = desk.Followed(lambda event: True)
    for n in range(desk.EVENTS_BEHIND + 5):
        follower.put(b"%d\n" % n)
    follower.end()
    batches = [batch async for batch in follower.batches()]
    lines = b"".join(batches).splitlines()
    assert json.loads(lines[-1]) == {"event": "events_lost", "detail": {"lost": 5}}
    assert lines[-2] == b"%d" % (desk.EVENTS_BEHIND - 1)


async def test_logs_last_and_following(site: Site) -> None:
    site.sup.add("web", workers=2)
    site.sup.add("db")
    await site.until("db/0", State.RUNNING)
    stream = await site.stream("/v1/logs?follow=1&select=web&n=2")
    for number in range(3):
        site.sup.write("web/0", f"line {number}\n")
        record = await stream.next()
        assert (record["worker"], record["msg"], record["stream"]) == ("web/0", f"line {number}", "stdout")
        assert (record["host_pid"], record["ns_pid"]) == (5003, 2)
    site.sup.write("db/0", "not for web\n")
    site.sup.write("web/1", '{"a": 1}\n')
    assert (await stream.next())["data"] == {"a": 1}
    last = await (await site.stream("/v1/logs?select=web&n=2")).rest()
    assert [(r["worker"], r.get("msg")) for r in last] == [("web/0", "line 2"), ("web/1", None)]
    assert len(await (await site.stream("/v1/logs")).rest()) == 5
    assert [r["msg"] for r in await (await site.stream("/v1/logs?select=db/0")).rest()] == ["not for web"]
    resumed = await site.stream("/v1/logs?follow=1&n=1&select=web/1")
    assert (await resumed.next())["worker"] == "web/1"
    site.sup.write("web/0", "other\n")
    site.sup.write("web/1", "mine\n")
    assert (await resumed.next())["msg"] == "mine"


# Bad input.


async def test_unknown_paths_and_methods(site: Site) -> None:
    assert (await site.get("/v1/nothing")).error[0] == "no-such-path"
    answer = await site.ask("POST", "/v1/status")
    assert (answer.status, answer.headers["allow"]) == (405, "GET")
    assert (await site.ask("DELETE", "/v1/stop")).headers["allow"] == "POST"
    _, says = (await site.get("/v1/nothing", text=True)).texts
    assert says.startswith("nssup: there is nothing at /v1/nothing (this supervisor is nssup 0.1.0: ")


@pytest.mark.parametrize(
    ("target", "body", "says"),
    [
        ("/v1/stop", b"{", "body: Input data was truncated"),
        ("/v1/stop", b"\xff\xfe", "body: "),
        ("/v1/stop", b'{"select": ["\xff"]}', "body: "),
        ("/v1/stop", b"[]", "Expected `object`, got `array`"),
        ("/v1/stop", {"selct": []}, "unknown field `selct`"),
        ("/v1/stop", {"select": "web"}, "at `$.select`"),
        ("/v1/stop", {"select": ["web"], "wait": "sometime"}, "at `$.wait`"),
        ("/v1/stop", {"select": ["web"], "timeout": -1}, "at `$.timeout`"),
        ("/v1/stop", b'{"select": ["web"], "timeout": NaN}', "body: "),
        ("/v1/scale", {"select": ["web"]}, "missing required field `n`"),
        ("/v1/shutdown", {"select": ["web"]}, "unknown field `select`"),
    ],
)
async def test_a_bad_body_is_refused_with_its_place(site: Site, target: str, body: object, says: str) -> None:
    answer = await site.ask("POST", target, body)
    assert (answer.status, answer.error[0]) == (400, "bad-request")
    assert says in answer.error[1]
    assert not site.sup.asked_to_end.is_set()


@pytest.mark.parametrize(
    "query", ["nosuch=1", "width=x", "width=-1", "stats=maybe", "format=xml", "n=5", "select=", "%ff=%ff"]
)
async def test_a_bad_query_is_refused(site: Site, query: str) -> None:
    assert (await site.get(f"/v1/status?{query}")).status in (400, 404)


async def test_shutdown_may_leave_who_can_go_on(site: Site) -> None:
    site.sup.add("keep", workers=2)
    site.sup.add("die", on_supervisor_death="die")
    site.sup.add("down", enabled=False)
    await site.until("die/0", State.RUNNING)
    asking = site.ask("POST", "/v1/shutdown", {"wait": True, "leave_running": True})
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(asking)
        await site.sup.asked_to_end.wait()
        assert site.sup.left
        site.sup.feed("die/0", Stop())
    answer = asked.result()
    assert (answer.status, answer.exit) == (200, 0)
    assert (answer.json["left"], answer.json["stopped"]) == (["keep/0", "keep/1"], ["die/0"])
    assert answer.outcome == {"keep/0": ("running", True), "keep/1": ("running", True), "die/0": ("stopped", True)}


async def test_orphans(site: Site) -> None:
    assert (await site.get("/v1/orphans")).json == {"orphans": [], "set_aside": []}
    assert (await site.get("/v1/orphans", text=True)).texts == ("", "")
    site.sup.lost = [Orphan("web/0", 3, 50, 51, "lost:EPERM"), Orphan("web/1", 1, None, None, "lost:unproven")]
    site.sup.strange = ["slot 3 is torn"]
    answer = await site.get("/v1/orphans", text=True)
    assert (answer.exit, *answer.texts) == (
        0,
        "web/0 generation 3: init's host PID 50, its program's 51: lost:EPERM\n"
        "web/1 generation 1: init's host PID -, its program's -: lost:unproven\n"
        "slot 3 is torn\n",
        "",
    )
    assert (await site.get("/v1/orphans")).json["orphans"][1] == {
        "worker": "web/1",
        "generation": 1,
        "init_host_pid": None,
        "host_pid": None,
        "reason": "lost:unproven",
    }


async def test_who_is_lost_is_not_told_as_if_it_were_ours(site: Site) -> None:
    site.sup.add("web")
    await site.until("web/0", State.RUNNING)
    there = site.sup.workers.workers
    there["web/0"] = replace(there["web/0"], state=State.LOST, alive=False, reason="lost:unproven")
    worker = (await site.get("/v1/status")).json["workers"][0]
    assert [worker[key] for key in ("host_pid", "ns_pid", "init_host_pid", "uptime_seconds")] == [None] * 4
    for tree in (False, True):
        answer = await site.post("kill", "web", tree=tree)
        assert (answer.exit, answer.outcome) == (1, {"web/0": ("lost", False)})
    assert site.sup.signals == []


async def test_a_supervisor_inside_a_program_cannot_exec(site: Site) -> None:
    answer = await site.ask("POST", "/v1/reexec", {})
    assert (answer.status, answer.error[0]) == (409, "not-possible")


class Upgrade:
    """The host of a supervisor that would exec."""

    failed: str | None = None

    def __init__(self) -> None:
        self.begun = 0
        self.refusal: ControlError | None = None

    async def rehearse(self) -> str:
        if self.refusal is not None:
            raise self.refusal
        return "9.9"

    def begin(self) -> None:
        self.begun += 1


async def test_reexec_answers_before_it_happens(tmp_path: Path) -> None:
    sup, upgrade = Supervisor(tmp_path), Upgrade()
    async with ControlServer(sup, str(tmp_path / "s.sock"), upgrade=upgrade) as server:
        site = Site(sup, server)
        answer = await site.ask("POST", "/v1/reexec", {})
        assert (answer.status, upgrade.begun) == (200, 1)
        assert (answer.json["supervisor"]["epoch"], answer.json["version"]) == (7, "9.9")
        upgrade.refusal = ControlError("refused", "no", http_status=409)
        assert (await site.ask("POST", "/v1/reexec", {})).error[:2] == ("refused", "no")
        assert upgrade.begun == 1
        assert "reexec_failed" not in (await site.get("/healthz")).json
        upgrade.failed = "cannot exec"
        assert (await site.get("/healthz")).json["reexec_failed"] == "cannot exec"
        await site.close()
    await sup.close()


async def test_a_peer_that_has_ended_is_refused(site: Site) -> None:
    """It may have been anybody."""
    request = http.Request("GET", "/v1/status", "", {}, b"", http.Peer(os.getpid(), os.geteuid(), 0))
    assert _status(site, request) == 200
    assert _status(site, request._replace(peer=request.peer._replace(ended=True))) == 403
    pidfd = await asyncio.to_thread(_ended)
    assert _status(site, request._replace(peer=http.Peer(os.getpid(), os.geteuid(), 0, pidfd))) == 403
    os.close(pidfd)
    # One that cannot be seen from here is in no namespace of our workers: these can.
    assert _status(site, request._replace(peer=http.Peer(0, os.geteuid(), 0))) == 200


def _ended() -> int:
    """A pidfd of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        return os.pidfd_open(process.pid)


def _status(site: Site, request: http.Request) -> int:
    answer = site.server.app(request)
    assert isinstance(answer, Reply)
    return answer.status


async def test_strangers_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.sup.add("web")
    request = http.Request("GET", "/v1/status", "", {}, b"", http.Peer(1, 65534, 65534))
    control = site.server.app
    answer = control(request)
    assert isinstance(answer, Reply)
    assert (answer.status, dict(answer.headers)["Nssup-Exit"]) == (403, "77")
    me = request._replace(peer=http.Peer(1, os.geteuid(), 0))
    allowed = control(me)
    assert isinstance(allowed, Reply)
    assert allowed.status == 200


def _request(method: str, path: str, uid: int, *gids: int) -> http.Request:
    """From somebody else's process that cannot be seen from here, so that it need not be there."""
    return http.Request(method, path, "", {}, b"{}", http.Peer(0, uid, gids[0], groups=gids[1:]))


ROLES: dict[int, Role] = {2001: "viewer", 2002: "operator", 2003: "admin"}


@pytest.mark.parametrize(
    ("gids", "allowed"),
    [
        ((9,), set()),
        ((2001,), {"/v1/status"}),
        ((9, 2001, 2002), {"/v1/status", "/v1/stop"}),
        ((9, 2003), {"/v1/status", "/v1/stop", "/v1/reexec"}),
    ],
)
async def test_groups_have_roles(tmp_path: Path, gids: tuple[int, ...], allowed: set[str]) -> None:
    sup = Supervisor(tmp_path)
    sup.add("web")
    bodies = {"/v1/status": b"", "/v1/stop": b'{"all": true}', "/v1/reexec": b"{}"}
    async with ControlServer(sup, str(tmp_path / "s.sock"), upgrade=Upgrade(), roles=ROLES) as server:

        async def status(path: str, body: bytes) -> int:
            answer = server.app(_request("POST" if body else "GET", path, 65533, *gids)._replace(body=body))
            reply = await answer if asyncio.iscoroutine(answer) else answer
            assert isinstance(reply, Reply)
            return reply.status

        found = {path: await status(path, body) for path, body in bodies.items()}
        assert found == {path: 200 if path in allowed else 403 for path in bodies}
    await sup.close()


async def test_every_changing_request_is_noted(site: Site) -> None:
    site.sup.add("web")
    site.sup.add("bad", "missing", enabled=False, restart=_never_restart())
    await site.until("web/0", State.RUNNING)
    web = await site.stream("/v1/events?select=web&n=0")
    everything = await site.stream("/v1/events?n=0")
    before = site.sup.workers.seq
    await site.post("stop", "web", wait=True)
    await site.post("stop", "nosuch")
    await site.post("start", "bad", wait=True)
    await site.ask("POST", "/v1/scale", b"nonsense")
    await site.post("wait", "web", wait="stopped")
    await site.post("stop", "web")
    told: list[tuple[str, dict[str, Any]]] = []
    while len(told) < 5:
        event = await everything.next()
        if event["event"] == "requested":
            told.append((event["reason"], event["detail"]))
    assert [(reason, detail["request"]) for reason, detail in told] == [
        ("ok", "stop"),
        ("no-such-worker", "stop"),
        ("failed", "start"),
        ("bad-request", "scale"),
        ("ok", "stop"),
    ], "seeing is not noted, neither is waiting"
    me = {"uid": os.geteuid(), "host_pid": os.getpid(), "role": "admin"}
    assert told[0][1] == {"request": "stop", **me, "after": before, "select": ["web"], "wait": True}
    assert (await web.next())["event"] == "stop_begun"
    assert (await web.next())["event"] == "stopped", "who follows workers hears of them alone"


async def test_a_client_that_hangs_up_is_noted_too(site: Site) -> None:
    site.sup.add("web", "slow", enabled=False)
    events = await site.stream("/v1/events?n=0")
    _, writer = await site.send("POST", "/v1/start", {"select": ["web"], "wait": True})
    assert (await events.next())["event"] == "launched"
    writer.close()
    told = await events.next()
    assert (told["event"], told["reason"]) == ("requested", "client-gone")


async def test_a_refused_change_is_noted(site: Site) -> None:
    answer = site.server.app(_request("POST", "/v1/shutdown", 65533, 9))
    assert isinstance(answer, Reply)
    (event,) = await (await site.stream("/v1/events?follow=0&n=1")).rest()
    assert (event["event"], event["reason"]) == ("requested", "not-permitted")
    assert event["detail"] == {"request": "shutdown", "uid": 65533, "host_pid": 0, "role": None, "after": 0}


async def test_events_as_server_sent_events(site: Site) -> None:
    site.sup.add("web", enabled=False)
    reader, writer = await asyncio.open_unix_connection(site.server.path)
    site.writers.append(writer)
    writer.write(b"GET /v1/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\nLast-Event-ID: 7:0\r\n\r\n")
    status, headers = await site.head(reader)
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    size = int(await reader.readline(), 16)
    told = (await reader.readexactly(size)).decode().splitlines()
    assert told[:2] == ["id: 7:1", "event: pool_added"]
    assert json.loads(told[2].removeprefix("data: "))["pool"] == "web"
    assert told[3] == ""


async def test_exec_takes_descriptors_and_ends_with_its_client(site: Site) -> None:
    site.sup.add("web", workers=2)
    read_end, write_end = os.pipe()
    answer = await site.ask("POST", "/v1/exec", {"select": ["web/1"], "argv": ["id"], "stdio": [0, write_end]})
    assert (answer.exit, answer.json) == (7, {"code": 7, "signal": None, "error": None})
    assert os.read(read_end, 100) == b"web/1 id"
    for body, code in (({"select": ["web"], "argv": ["id"]}, 2), ({"select": ["web/0"], "argv": []}, 2)):
        assert (await site.ask("POST", "/v1/exec", body)).exit == code
    refused = await site.ask("POST", "/v1/exec", {"select": ["web/1"], "argv": ["id"], "stdio": [0, 1, 1 << 20]})
    assert (refused.status, refused.error[0]) == (403, "descriptors")
    _, writer = await site.send("POST", "/v1/exec", {"select": ["web/1"], "argv": ["sleep"], "stdio": [write_end]})
    events = await site.stream("/v1/events?n=0")
    writer.close()
    while (await events.next()).get("reason") != "client-gone":
        pass
    os.close(write_end)
    os.set_blocking(read_end, False)
    assert os.read(read_end, 1) == b"", "nobody has kept a copy"
    os.close(read_end)


VERBS_OF_CLIENTS = st.sampled_from(["start", "stop", "restart", "kill", "scale", "reset", "status"])
CLIENTS = st.lists(st.lists(VERBS_OF_CLIENTS, min_size=1, max_size=4), min_size=5, max_size=5)


@settings(max_examples=25, deadline=None)
@given(clients=CLIENTS, command=st.sampled_from(["good", "job", "crash", "missing"]))
def test_five_clients_on_one_worker(clients: list[list[str]], command: str) -> None:
    """Whatever they ask of it at the same time, each is answered, and the worker ends in a state that lasts."""
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(_play(Path(directory), clients, command))


async def _play(directory: Path, clients: list[list[str]], command: str) -> None:
    sup = Supervisor(directory)
    sup.add("web", command, restart=_never_restart())
    async with ControlServer(sup, str(directory / "s.sock")) as server:
        site = Site(sup, server)

        async def play(verbs: list[str]) -> None:
            for verb in verbs:
                if verb == "status":
                    answer = await site.get("/v1/status")
                elif verb == "scale":
                    answer = await site.post("scale", "web", n=1, wait=True)
                else:
                    fields = {"signal": "KILL"} if verb == "kill" else {} if verb == "reset" else {"wait": True}
                    answer = await site.post(verb, "web", **fields)
                assert answer.status == 200, answer.body

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for verbs in clients:
                group.create_task(play(verbs))
        for _ in range(20):  # what was begun without being waited for
            await asyncio.sleep(0)
        assert site.states()["web/0"] in {"running", "stopped", "done", "failed"}
        await site.close()
    await sup.close()


# The table.


async def test_openapi_tells_every_route(site: Site) -> None:
    found = (await site.get("/v1/openapi.json")).json
    told = {(method.upper(), path) for path, methods in found["paths"].items() for method in methods}
    assert told == {(route.method, route.path) for route in ROUTES}
    status = found["paths"]["/v1/status"]["get"]
    assert {p["name"] for p in status["parameters"]} == {"select", "stats", "format", "unfold", "color", "width"}
    assert set(found["components"]["schemas"]["WorkerDocument"]["required"]) == STATUS_KEYS
    refs = set(_refs(found))
    assert refs <= {f"#/components/schemas/{name}" for name in found["components"]["schemas"]}


def _refs(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [ref for value in node.values() for ref in _refs(value)]
    return [ref for value in node for ref in _refs(value)] if isinstance(node, list) else []


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_speaks_it(site: Site) -> None:
    site.sup.add("web")
    await site.until("web/0", State.RUNNING)

    async def curl(*arguments: str) -> tuple[int, bytes]:
        command = ["curl", "-sS", "--unix-socket", site.server.path, *arguments]
        process = await asyncio.to_thread(_run, command)
        return process

    assert json.loads((await curl("http://nssup/v1/status"))[1])["workers"][0]["id"] == "web/0"
    code, body = await curl("-d", '{"select": ["web"], "wait": true}', "http://nssup/v1/restart")
    assert (code, json.loads(body)["results"][0]["generation"]) == (0, 2)
    assert b"404" in (await curl("-o", "/dev/null", "-w", "%{http_code}", "http://nssup/x"))[1]
    assert (await curl("-I", "http://nssup/v1/events"))[1].startswith(b"HTTP/1.1 200")


def _run(command: list[str]) -> tuple[int, bytes]:
    done = subprocess.run(command, capture_output=True, check=False, timeout=20)
    return done.returncode, done.stdout
