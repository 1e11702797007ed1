"""The table of everything that can be asked over HTTP. Dispatch, access and the OpenAPI document are made from it."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec

from nssup import doing, following, render, seeing
from nssup.api import (
    Accepted,
    Answer,
    Become,
    Call,
    Command,
    EventsQuery,
    KillCommand,
    LogsQuery,
    Nothing,
    Orphans,
    ScaleCommand,
    Shutdown,
    StatusQuery,
    WorkersQuery,
    json_reply,
)
from nssup.desk import Desk


def _openapi(desk: Desk, call: Call) -> Answer:
    from nssup.openapi import document  # built when it is asked for

    return json_reply(document(ROUTES, desk.supervisor.version))


class Route(NamedTuple):
    """One thing that can be asked. access: see (nothing changes), operate, admin (amounts to root). verb: of the CLI.
    query, body: what the request may carry. answer: type of the document, or what a stream's lines are."""

    method: str
    path: str
    access: Literal["see", "operate", "admin"]
    summary: str
    handler: Callable[[Desk, Call], Answer]
    verb: str | None = None
    query: type[msgspec.Struct] = Nothing
    body: type[msgspec.Struct] | None = None
    answer: Any = None


# fmt: off
ROUTES = (
    Route("GET", "/v1/status", "see", "pools and workers, and how they are",
          seeing.status, "status", StatusQuery, answer=render.StatusDocument),
    Route("GET", "/v1/pools", "see", "all pools", seeing.pools),
    Route("GET", "/v1/pools/{pool}", "see", "one pool and its workers", seeing.pool),
    Route("GET", "/v1/workers", "see", "workers, chosen by selector, pool or state",
          seeing.workers, None, WorkersQuery),
    Route("GET", "/v1/workers/{pool}/{index}", "see", "one worker",
          seeing.worker, answer=render.WorkerDocument),
    Route("GET", "/v1/which/{host_pid}", "see", "the worker whose tree holds a host PID", seeing.which, "which"),
    Route("GET", "/v1/events", "see", "what happens, a JSON object a line: first a snapshot, then each change",
          following.events, "events", EventsQuery, answer="stream"),
    Route("GET", "/v1/logs", "see", "what workers write, a record a line",
          following.logs, "logs", LogsQuery, answer="stream"),
    Route("GET", "/v1/orphans", "see", "what may be ours and cannot be proven so, and what was set aside",
          seeing.orphans, "orphans", answer=Orphans),
    Route("GET", "/v1/openapi.json", "see", "this document", _openapi),
    Route("GET", "/healthz", "see", "whether the supervisor answers", seeing.healthz, "ping"),
    Route("POST", "/v1/start", "operate", "start workers",
          doing.start, "start", body=Command, answer=Accepted),
    Route("POST", "/v1/stop", "operate", "stop workers by their stop sequence",
          doing.stop, "stop", body=Command, answer=Accepted),
    Route("POST", "/v1/restart", "operate", "stop workers and start them again",
          doing.restart, "restart", body=Command, answer=Accepted),
    Route("POST", "/v1/kill", "operate", "send a signal to workers",
          doing.kill, "kill", body=KillCommand, answer=Accepted),
    Route("POST", "/v1/scale", "operate", "have another number of workers",
          doing.scale, "scale", body=ScaleCommand, answer=Accepted),
    Route("POST", "/v1/wait", "see", "wait until workers are as wanted",
          doing.wait, "wait", body=Command, answer=Accepted),
    Route("POST", "/v1/shutdown", "admin", "stop everything, or only what cannot go on, and end the supervisor",
          doing.shutdown, "shutdown", body=Shutdown, answer=Accepted),
    Route("POST", "/v1/reexec", "admin", "become the code that is installed now, without ending a worker",
          doing.reexec, "reexec", body=Nothing, answer=Become),
)
# fmt: on
