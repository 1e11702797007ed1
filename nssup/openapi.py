"""The OpenAPI 3.1 document of a table of routes. Pure.

Each route has method, path, access, summary, query and body (msgspec Structs), and answer: a type, `stream`, `text`, or
None for a document without a schema of its own.
"""

import re
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

_REF = "#/components/schemas/{name}"
_ARGUMENT = re.compile(r"\{(\w+)\}")


class Route(Protocol):
    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def access(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def query(self) -> type[msgspec.Struct]: ...
    @property
    def body(self) -> type[msgspec.Struct] | None: ...
    @property
    def answer(self) -> Any: ...  # noqa: ANN401 - any type


class ErrorText(msgspec.Struct, frozen=True):
    """code: a closed set of words. hint: what to do, may be empty."""

    code: str
    message: str
    hint: str


class Error(msgspec.Struct, frozen=True):
    error: ErrorText


def document(routes: Sequence[Route], version: str) -> dict[str, Any]:
    kinds: list[Any] = [Error, *(route.query for route in routes)]
    kinds += [route.body for route in routes if route.body is not None]
    kinds += [route.answer for route in routes if _has_schema(route)]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    schema_of = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        query = components[route.query.__name__]["properties"]
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, query, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "nssup", "version": version, "description": "HTTP/1.1 on the supervisor's Unix socket."},
        "paths": paths,
        "components": {"schemas": components},
    }


def _has_schema(route: Route) -> bool:
    return route.answer is not None and route.answer not in ("stream", "text")


def _operation(route: Route, query: dict[str, Any], schema_of: dict[Any, Any]) -> dict[str, Any]:
    schema = schema_of[route.answer] if _has_schema(route) else {}
    operation: dict[str, Any] = {
        "operationId": "_".join(_words(route)),
        "summary": route.summary,
        "x-access": route.access,
        "parameters": _arguments(route) + [_parameter(name, "query", schema) for name, schema in query.items()],
        "responses": {
            "200": {"description": "the answer", "content": _content(route.answer, schema)},
            "default": {
                "description": "an error, with what to do about it",
                "content": {"application/json": {"schema": schema_of[Error]}},
            },
        },
    }
    if route.body is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": schema_of[route.body]}}}
    return operation


def _content(answer: Any, schema: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - any type
    """By media type, as Accept asks."""
    text = {"schema": {"type": "string"}}
    if answer == "text":
        return {"text/plain": text}
    if answer == "stream":
        return {"application/x-ndjson": {"schema": schema}, "text/event-stream": text}
    return {"application/json": {"schema": schema}, "text/plain": text}


def _words(route: Route) -> list[str]:
    return [route.method.lower(), *re.findall(r"\w+", route.path.removeprefix("/v1"))]


def _arguments(route: Route) -> list[dict[str, Any]]:
    return [_parameter(name, "path", {"type": "string"}) for name in _ARGUMENT.findall(route.path)]


def _parameter(name: str, place: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}
