"""The table of everything that can be asked over HTTP. Dispatch, access and the OpenAPI document are made from it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from nssup import doing, following, render, reviewing, seeing
from nssup.api import (
    Accepted,
    Answer,
    Become,
    Call,
    Command,
    EnableCommand,
    EventsQuery,
    ExecCommand,
    Executed,
    ExplainQuery,
    HistoryQuery,
    KillCommand,
    LogsQuery,
    MetricsQuery,
    Nothing,
    Orphans,
    ScaleCommand,
    Selection,
    Shutdown,
    StatusQuery,
    WorkersQuery,
    json_reply,
)
from nssup.desk import Desk
from nssup.verbs import VERBS


def _openapi(desk: Desk, call: Call) -> Answer:
    from nssup.openapi import document  # built when it is asked for

    return json_reply(document(ROUTES, desk.supervisor.version))


class Route(NamedTuple):
    """One thing that can be asked. access: see (nothing changes), operate, admin (amounts to root). verb: of the CLI.
    query, body: what the request may carry. answer: type of the document, or what a stream's lines are."""

    method: str
    path: str
    access: str
    summary: str
    handler: Callable[[Desk, Call], Answer]
    verb: str | None = None
    query: type[msgspec.Struct] = Nothing
    body: type[msgspec.Struct] | None = None
    answer: Any = None


def _verb(
    name: str,
    handler: Callable[[Desk, Call], Answer],
    *,
    query: type[msgspec.Struct] = Nothing,
    body: type[msgspec.Struct] | None = None,
    answer: Any = None,  # noqa: ANN401 - any type
) -> Route:
    verb = VERBS[name]
    return Route(verb.method, verb.path, verb.access, verb.summary, handler, name, query, body, answer)


ROUTES = (
    _verb("status", seeing.status, query=StatusQuery, answer=render.StatusDocument),
    Route("GET", "/v1/pools", "see", "all pools", seeing.pools),
    Route("GET", "/v1/pools/{pool}", "see", "one pool and its workers", seeing.pool),
    Route(
        "GET",
        "/v1/workers",
        "see",
        "workers, chosen by selector, pool or state",
        seeing.workers,
        query=WorkersQuery,
    ),
    Route("GET", "/v1/workers/{pool}/{index}", "see", "one worker", seeing.worker, answer=render.WorkerDocument),
    _verb("which", seeing.which),
    _verb("events", following.events, query=EventsQuery, answer="stream"),
    _verb("logs", following.logs, query=LogsQuery, answer="stream"),
    _verb("names", seeing.names),
    _verb("show", seeing.show, query=Selection),
    _verb("env", seeing.env, query=Selection),
    _verb("tree", seeing.tree, query=Selection),
    _verb("stats", seeing.stats, query=Selection),
    _verb("explain", reviewing.explain, query=ExplainQuery),
    _verb("history", reviewing.history, query=HistoryQuery),
    _verb("orphans", seeing.orphans, answer=Orphans),
    Route("GET", "/v1/openapi.json", "see", "this document", _openapi),
    Route(
        "GET",
        "/metrics",
        "see",
        "numbers, in the text format of Prometheus",
        seeing.metrics,
        query=MetricsQuery,
        answer="text",
    ),
    _verb("ping", seeing.healthz),
    Route("GET", "/readyz", "see", "whether every worker that is wanted is ready (200, else 503)", seeing.readyz),
    _verb("start", doing.start, body=Command, answer=Accepted),
    _verb("stop", doing.stop, body=Command, answer=Accepted),
    _verb("restart", doing.restart, body=Command, answer=Accepted),
    _verb("kill", doing.kill, body=KillCommand, answer=Accepted),
    _verb("exec", doing.execute, body=ExecCommand, answer=Executed),
    _verb("scale", doing.scale, body=ScaleCommand, answer=Accepted),
    _verb("enable", doing.enable, body=EnableCommand, answer=Accepted),
    _verb("disable", doing.disable, body=EnableCommand, answer=Accepted),
    _verb("reset", doing.reset, body=Command, answer=Accepted),
    _verb("reload", doing.reload, body=Command, answer=Accepted),
    _verb("wait", doing.wait, body=Command, answer=Accepted),
    _verb("shutdown", doing.shutdown, body=Shutdown, answer=Accepted),
    _verb("reexec", doing.reexec, body=Nothing, answer=Become),
)
