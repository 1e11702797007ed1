"""Who asked for a change, and what was answered: one `requested` event for each request that is not only about seeing.

The event comes with the answer (or when the client is gone); `after` is the number of the last event before the
request, so what happened because of it lies between the two.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from nssup.errors import ControlError

EVENT = "requested"
CLIENT_GONE = "client-gone"
_UNSAID: tuple[object, ...] = (None, False, [], "")


class Book(Protocol):
    """What takes the note, as workers.WorkerSet does."""

    @property
    def seq(self) -> int: ...
    def note(
        self, event: str, now: float, *, reason: str | None = None, detail: dict[str, Any] | None = None
    ) -> None: ...


class Who(Protocol):
    @property
    def uid(self) -> int: ...
    @property
    def host_pid(self) -> int: ...


def result_of(error: ControlError | None, exit_code: int = 0) -> str:
    """`ok`, or why not: the code of the refusal, or `failed` where some of it did not come about."""
    if error is not None:
        return error.code
    return {0: "ok", 124: "timed-out"}.get(exit_code, "failed")


def note(
    book: Book, now: float, what: str, who: Who, said: Mapping[str, object], result: str, after: int, role: str | None
) -> None:
    """what: the route, such as `restart`. said: what the request held; what is as by default is left out."""
    detail: dict[str, Any] = {"request": what, "uid": who.uid, "host_pid": who.host_pid, "role": role, "after": after}
    detail |= {name: value for name, value in said.items() if value not in _UNSAID}
    book.note(EVENT, now, reason=result, detail=detail)
