"""Handlers that look at a worker's own story: why it is as it is, and how its last lives ended."""

from collections import defaultdict
from collections.abc import Callable

import msgspec

from nssup import explain as explaining
from nssup import history as histories
from nssup.api import Answer, Call, ExplainQuery, HistoryQuery, json_reply, text_reply
from nssup.desk import Desk
from nssup.lines import stamp
from nssup.operation import line_of
from nssup.snapshot import exit_document

LAST_LINES = 3  # of each life
RECORDS_READ = 200  # of each worker, for those lines: the loop waits for that
LINES_OF = 8  # workers at most


def explain(desk: Desk, call: Call) -> Answer:
    query: ExplainQuery = call.query
    workers, now = desk.supervisor.workers, desk.supervisor.now()
    found, stamps = [], _stamp(desk)
    for worker_id in desk.select(query.select).workers:
        explanation = workers.explain(worker_id, now, query.n)
        last = explanation.worker.last_exit
        spec = workers.pools[explanation.worker.pool]
        ended = exit_document(last) if last else None
        found.append(explaining.document(explanation, spec, stamps, ended, desk.supervisor.probes(worker_id)))
    if call.text:
        return text_reply("".join(map(explaining.text, found)))
    return json_reply({"workers": found})


def history(desk: Desk, call: Call) -> Answer:
    query: HistoryQuery = call.query
    found: list[histories.HistoryDocument] = []
    stamps = _stamp(desk)
    chosen = desk.select(query.select).workers
    for worker_id in chosen:
        lives = desk.supervisor.workers.lives(worker_id)
        lines = _last_lines(desk, worker_id) if len(chosen) <= LINES_OF and lives else defaultdict(list)
        shown = lives[max(len(lives) - query.n, 0) :]
        found.append(
            {
                "id": worker_id,
                "lives": [
                    histories.document(past, stamps, exit_document(past.exit), lines[past.generation]) for past in shown
                ],
            }
        )
    if call.text:
        return text_reply(histories.text(found))
    return json_reply({"workers": found})


def _stamp(desk: Desk) -> Callable[[float], str]:
    """RFC 3339 of moments of the one clock, as the wall clock is set now."""
    shift = desk.supervisor.wall(0.0)
    return lambda at: stamp(shift + at)


class _Written(msgspec.Struct):
    generation: int | None = None


_decode = msgspec.json.Decoder(_Written).decode


def _last_lines(desk: Desk, worker_id: str) -> defaultdict[int, list[str]]:
    """generation -> what that life wrote last, as far as it is in memory."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for record in desk.supervisor.logs.last_records(worker_id, RECORDS_READ):
        generation = _decode(record).generation
        if generation is not None:
            found[generation] = [*found[generation], line_of(record)][-LAST_LINES:]
    return found
