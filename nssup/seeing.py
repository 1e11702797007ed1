"""Handlers that only look: request -> document."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from nssup import effective, procfs, render
from nssup import metrics as numbers
from nssup.api import (
    Answer,
    Call,
    MetricsQuery,
    Orphans,
    Reply,
    Selection,
    StatusQuery,
    WorkersQuery,
    bad,
    json_reply,
    text_reply,
    usage,
)
from nssup.desk import Desk
from nssup.errors import ExitCode
from nssup.events import State
from nssup.selection import select_pools
from nssup.snapshot import STATS_ROWS, Snapshot, by_pool, members

NAMED = 8  # workers that a text names
TREES_A_TURN = 8  # read in one turn of the loop: about a millisecond


def status(desk: Desk, call: Call) -> Answer:
    query: StatusQuery = call.query
    chosen = desk.select(query.select)
    wanted = query.format or ("text" if call.text else "json")
    stats = wanted in ("json", "text") and (query.stats or len(chosen.workers) <= STATS_ROWS)
    if wanted == "text" and not stats and not query.unfold and not query.select:
        return _folded(desk, query)
    snapshot = Snapshot(desk.supervisor, stats=stats, detailed=wanted == "json")
    document = snapshot.status(chosen.pools, chosen.workers)
    specs = desk.supervisor.workers.pools
    code = render.exit_code(document["workers"], {name for name in chosen.pools if specs[name].type == "oneshot"})
    if wanted == "json":
        return json_reply(document, code=code)
    if wanted == "text":
        unfold = query.unfold or bool(query.select)
        return text_reply(render.table(document, unfold=unfold, color=query.color, width=query.width), code=code)
    numbers = [w["host_pid"] if wanted == "host_pid" else w["ns_pid"] for w in document["workers"]]
    there = [f"{number}\n" for number in numbers if number is not None]
    return text_reply("".join(there), code=0 if len(there) == len(numbers) else ExitCode.NOT_RUNNING)


def _folded(desk: Desk, query: StatusQuery) -> Answer:
    """The table of many workers, where pools of many are one line: made without a document of each worker."""
    workers = desk.supervisor.workers
    there = by_pool(workers)
    snapshot = Snapshot(desk.supervisor, stats=False, detailed=False)
    folds = {name: snapshot.fold(found) for name, found in there.items() if len(found) > 1}
    document = snapshot.status(
        workers.pools, [w.id for name, found in there.items() if name not in folds for w in found]
    )
    text = render.table(document, color=query.color, width=query.width, folds=folds)
    fine = all(
        w.state is State.RUNNING or (w.state is State.DONE and workers.pools[name].type == "oneshot")
        for name, found in there.items()
        for w in found
    )
    return text_reply(text, code=ExitCode.OK if fine else ExitCode.NOT_RUNNING)


def pools(desk: Desk, call: Call) -> Answer:
    snapshot = Snapshot(desk.supervisor, stats=False)
    return json_reply({"pools": snapshot.pools(desk.supervisor.workers.pools)})


def pool(desk: Desk, call: Call) -> Answer:
    (name,) = call.arguments
    there = members(desk.supervisor.workers)
    (pool,) = select_pools([name], {name: there[name]} if name in there else there)
    snapshot = Snapshot(desk.supervisor, stats=len(there[pool]) <= STATS_ROWS)
    return json_reply({**snapshot.pools([pool])[0], "workers": [snapshot.worker(each) for each in there[pool]]})


def workers(desk: Desk, call: Call) -> Answer:
    query: WorkersQuery = call.query
    found = [
        w
        for w in map(desk.supervisor.workers.workers.__getitem__, desk.select(query.select).workers)
        if query.pool in (None, w.pool) and query.state in (None, w.state)
    ]
    snapshot = Snapshot(desk.supervisor, stats=query.stats or len(found) <= STATS_ROWS)
    return json_reply({"workers": [snapshot.worker(w.id) for w in found]})


def worker(desk: Desk, call: Call) -> Answer:
    worker_id = "/".join(call.arguments)
    if worker_id not in desk.supervisor.workers.workers:
        desk.select([worker_id])  # says what there is instead
        raise bad(f"{worker_id!r} means more than one worker")
    return json_reply(Snapshot(desk.supervisor, stats=True).worker(worker_id))


def which(desk: Desk, call: Call) -> Answer:
    (text,) = call.arguments
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise usage(f"{text!r} is no host PID")
    chosen = desk.select([f"host:{text}"])
    if call.text:
        return text_reply(f"{chosen.workers[0]}\n")
    return json_reply({"host_pid": int(text), "id": chosen.workers[0]})


def healthz(desk: Desk, call: Call) -> Answer:
    source = Snapshot(desk.supervisor, stats=False).supervisor()
    if call.text:
        return text_reply(f"pong: nssup {source['version']}, host PID {source['host_pid']}\n")
    failed = {"reexec_failed": desk.upgrade.failed} if desk.upgrade and desk.upgrade.failed else {}
    return json_reply({"status": "ok", "supervisor": source, **failed})


def names(desk: Desk, call: Call) -> Answer:
    """A pool, then its workers: what completion offers."""
    found = [name for pool, ids in members(desk.supervisor.workers).items() for name in (pool, *ids)]
    return text_reply("".join([f"{name}\n" for name in found])) if call.text else json_reply({"names": found})


def show(desk: Desk, call: Call) -> Answer:
    query: Selection = call.query
    supervisor = desk.supervisor
    found = {
        name: effective.settings(supervisor.workers.pools[name], desk.origins, supervisor.configured_workers(name))
        for name in desk.select(query.select).pools
    }
    if call.text:
        return text_reply("\n".join(effective.show(name, settings) for name, settings in found.items()))
    return json_reply(
        {
            "pools": [
                {"name": name, "settings": [{"key": s.key, "value": s.value, "origin": s.origin} for s in settings]}
                for name, settings in found.items()
            ]
        }
    )


def env(desk: Desk, call: Call) -> Answer:
    query: Selection = call.query
    workers = desk.supervisor.workers
    found = {}
    for worker_id in desk.select(query.select).workers:
        pairs = [pair.decode("utf-8", "replace") for pair in desk.supervisor.environment(worker_id)]
        spec = workers.pools[workers.workers[worker_id].pool]
        found[worker_id] = effective.variables(spec, pairs, desk.origins)
    if call.text:
        return text_reply("\n".join(effective.show_env(each, variables) for each, variables in found.items()))
    return json_reply(
        {"workers": [{"id": each, "env": [v._asdict() for v in variables]} for each, variables in found.items()]}
    )


async def tree(desk: Desk, call: Call) -> Reply:
    query: Selection = call.query
    found = [(each, processes) async for each, processes in _trees(desk, query.select)]
    if call.text:
        return text_reply("".join([render.tree(each, processes, width=query.width) for each, processes in found]))
    return json_reply(
        {"workers": [{"id": each, "processes": [p._asdict() for p in processes]} for each, processes in found]}
    )


async def stats(desk: Desk, call: Call) -> Reply:
    query: Selection = call.query
    found: list[render.StatsDocument] = []
    async for each, processes in _trees(desk, query.select):
        worker = desk.supervisor.workers.workers.get(each)
        dropped = Snapshot(desk.supervisor, stats=False).worker(each)["log_dropped_bytes"] if worker else 0
        found.append(
            {
                "id": each,
                "state": worker.state.value if worker else "removed",
                "processes": len(processes),
                "threads": sum(p.threads for p in processes),
                "cpu_seconds": round(sum(p.cpu_seconds for p in processes), 2) if processes else None,
                "memory_bytes": sum(p.memory_bytes for p in processes) if processes else None,
                "restarts": worker.restarts if worker else 0,
                "log_dropped_bytes": dropped,
            }
        )
    if call.text:
        return text_reply(render.stats(found, color=query.color, width=query.width))
    return json_reply({"workers": found})


async def _trees(desk: Desk, selectors: list[str]) -> AsyncIterator[tuple[str, Sequence[procfs.Process]]]:
    """The processes of each selected worker, with a turn for everybody else after each few."""
    for number, each in enumerate(desk.select(selectors).workers, 1):
        if each in desk.supervisor.workers.workers:
            yield each, desk.supervisor.tree(each)
        if number % TREES_A_TURN == 0:
            await asyncio.sleep(0)


def metrics(desk: Desk, call: Call) -> Answer:
    query: MetricsQuery = call.query
    supervisor = desk.supervisor
    workers = supervisor.workers
    there = [each for ids in members(workers).values() for each in ids]
    snapshot = Snapshot(supervisor, stats=query.stats or len(there) <= STATS_ROWS, detailed=False)
    dropped = {name: _dropped(desk, name) for name in workers.pools}
    counts = numbers.Counts(desk.counts, desk.exits, dropped)
    text = numbers.text(snapshot.status(workers.pools, there), counts, supervisor.started_at)
    return Reply(200, [("Content-Type", numbers.CONTENT_TYPE), ("Nssup-Exit", "0")], text.encode())


def _dropped(desk: Desk, pool: str) -> int:
    try:
        return desk.supervisor.logs.dropped_bytes(pool)
    except KeyError:
        return 0


def readyz(desk: Desk, call: Call) -> Answer:
    """Ready: each worker that is wanted up is ready, or done and meant to be."""
    waited_for = [
        w.id for w in desk.supervisor.workers.workers.values() if w.want_up and not (w.ready or w.state is State.DONE)
    ]
    status, code = (200, ExitCode.OK) if not waited_for else (503, ExitCode.NOT_RUNNING)
    if call.text:
        said = f"not ready: {', '.join(waited_for[:NAMED])}{' ...' if len(waited_for) > NAMED else ''}"
        return text_reply(f"{said if waited_for else 'ready'}\n", status=status, code=code)
    document = {"status": "not-ready" if waited_for else "ready", "not_ready": waited_for}
    return json_reply(document, status=status, code=code)


def orphans(desk: Desk, call: Call) -> Answer:
    found = Orphans([orphan._asdict() for orphan in desk.supervisor.orphans()], [*desk.supervisor.set_aside()])
    if not call.text:
        return json_reply(found)
    lines = [
        f"{o.worker} generation {o.generation}: init's host PID {o.init_host_pid or '-'}, "
        f"its program's {o.host_pid or '-'}: {o.reason}"
        for o in desk.supervisor.orphans()
    ]
    return text_reply("".join([f"{line}\n" for line in [*lines, *found.set_aside]]))
