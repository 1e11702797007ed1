"""The scenario of a simulation: a TOML text -> what becomes of lives, what happens when, and what is to be so. Pure.

The keys are tables as in keys.py, strict in the same way; every problem comes with its line. docs/sim.md is their page.
"""

import re
from typing import Any, NoReturn, TypeVar

import msgspec

from nssup import document
from nssup.document import Document
from nssup.errors import Problem, SpecError
from nssup.events import State
from nssup.keys import DURATION, FLAG, SIGNAL, TEXT, TEXTS, Key, Kind, Wrong, convert, list_of, one_of, table, whole
from nssup.locate import Path, dotted, quoted

FOREVER = float("inf")
UNTIL = 600.0  # seconds that are played where nothing else is said

Place = tuple[str, int, int]


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of lives number `first` to `last` of the workers that `of` means. Times in seconds."""

    of: str
    lives: tuple[int, int] = (1, 1 << 60)
    launch: float = 0.001
    fails: str | None = None
    ready: float = 0.0
    runs: float = FOREVER
    exit: int | None = None
    signal: int | None = None
    leaves: float = 0.0
    stops: float = 0.01
    silent: float = FOREVER
    place: Place = ("", 0, 0)


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator does at a time, or what becomes of programs then. what: a word of STEPS, done to `of`."""

    at: float
    what: str
    of: str
    to: int | None = None
    exit: int | None = None
    signal: int | None = None
    tree: bool = False
    place: Place


class Expectation(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be so: of workers at a time (None: at the end), or of what was published between two."""

    of: str = ""
    at: float | None = None
    state: tuple[str, ...] | None = None
    reason: str | None = None
    ready: bool | None = None
    lives: int | None = None
    restarts: int | None = None
    event: str | None = None
    times: int | None = None
    after: float = 0.0
    before: float = FOREVER
    order: tuple[str, ...] = ()
    place: Place


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """config: the file of the config, relative to the scenario's; None: the usual one."""

    config: str | None = None
    until: float = UNTIL
    seed: str = ""
    lives: tuple[Life, ...] = ()
    steps: tuple[Step, ...] = ()
    expectations: tuple[Expectation, ...] = ()


# --- kinds ---------------------------------------------------------------------------------------------------------


def _fail(why: str) -> NoReturn:
    raise Wrong([((), why)])


def _duration_or(word: str) -> Kind:
    def take(value: object) -> float:
        return FOREVER if value == word else float(DURATION.take(value))

    return Kind(f'duration or `"{word}"`', take)


def _lives(value: object) -> tuple[int, int]:
    """`3`, `"2-4"`, `"5-"`."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value, value
    found = re.fullmatch(r"([1-9]\d*)(-)?([1-9]\d*)?", value) if isinstance(value, str) else None
    if found is None or (found[3] and not found[2]):
        _fail('must be a number from 1 on, or a text: "2-4", "5-"')
    first = int(found[1])
    last = int(found[3]) if found[3] else (1 << 60 if found[2] else first)
    return (first, last) if first <= last else _fail("ends before it begins")


_REASON = re.compile(r"exec-failed:[A-Z0-9]+|setup-failed:[a-z_]+:[A-Z0-9]+")


def _failure(value: object) -> str:
    text: str = TEXT.take(value)
    if not _REASON.fullmatch(text):
        _fail('must be "exec-failed:ERRNO" or "setup-failed:STEP:ERRNO", such as "exec-failed:ENOENT"')
    return text


_STATE = one_of(*(state.value for state in State))
_STATES = Kind(
    "state, or list of states",
    lambda value: (list_of(_STATE) if isinstance(value, list) else Kind("", lambda one: (_STATE.take(one),))).take(
        value
    ),
)
_CODE = whole(0, 255)
_COUNT = whole(0, 1_000_000)

LIFE = {
    "of": Key(TEXT, "", "**Required.** Whose: a pool, a worker, a glob; as for `nssup ctl`."),
    "lives": Key(
        Kind("number or text", _lives),
        "all",
        'Which of its lives: `1`, `"2-4"`, `"5-"`. The first `[[life]]` that fits counts.',
    ),
    "launch": Key(DURATION, '"1ms"', "From the launch until the program runs."),
    "fails": Key(
        Kind("reason", _failure), "", 'It never runs: `"exec-failed:ENOENT"`, `"setup-failed:mount_proc:EPERM"`.'
    ),
    "ready": Key(_duration_or("never"), '"0s"', "From there until it is ready, where the config asks for that."),
    "runs": Key(
        _duration_or("forever"), '`"forever"`; a oneshot: `"1s"`', "From when it runs until it ends by itself."
    ),
    "exit": Key(_CODE, "0", "Its exit code then."),
    "signal": Key(SIGNAL, "", "Or the signal that ends it."),
    "leaves": Key(DURATION, '"0s"', "From there until what it has left behind is gone too."),
    "stops": Key(
        _duration_or("never"), '"10ms"', 'How long it takes to end on a signal; `"never"`: deaf to all but KILL.'
    ),
    "silent": Key(_duration_or("never"), '"never"', "From when it runs until it feeds its watchdog no more."),
}
STEPS = {
    "start": "An operator starts workers.",
    "stop": "An operator stops workers.",
    "restart": "An operator restarts workers.",
    "reset": "An operator resets workers.",
    "scale": "An operator has a pool have `to` workers.",
    "kill": "An operator sends `signal` (TERM), to the `tree` if that is true.",
    "end": "Programs end by themselves, with `exit` or `signal`.",
    "ready": "Programs are ready again.",
    "unready": "Programs are not ready any more.",
}
STEP = {
    "at": Key(DURATION, "", "**Required.** When."),
    **{name: Key(TEXT, "", doc) for name, doc in STEPS.items()},
    "to": Key(_COUNT, "", "For `scale`."),
    "exit": Key(_CODE, "", "For `end`."),
    "signal": Key(SIGNAL, "", "For `end` and `kill`."),
    "tree": Key(FLAG, "false", "For `kill`."),
}
EXPECT = {
    "of": Key(TEXT, "", "Of whom: a pool, a worker, a glob; each of them has to be so."),
    "at": Key(DURATION, "the end", "When."),
    "state": Key(_STATES, "", "The state, or one of a list."),
    "reason": Key(TEXT, "", "The reason; with `event`, that of the event."),
    "ready": Key(FLAG, "", "Whether it is ready."),
    "lives": Key(_COUNT, "", "How often it has been launched."),
    "restarts": Key(_COUNT, "", "How many of these were restarts since an operator started it."),
    "event": Key(TEXT, "", "Instead: an event was published (docs/states.md) about `of`."),
    "times": Key(_COUNT, "at least once", "How often."),
    "after": Key(DURATION, '"0s"', "Not before this."),
    "before": Key(DURATION, "the end", "And not later than this."),
    "order": Key(TEXTS, "", 'Instead: these first happened in this order: `["db/0 started", "web/0 launched"]`.'),
}
TOP = {
    "config": Key(TEXT, "as for `up`", "The config, relative to this file; `-c FILE` beats it."),
    "until": Key(DURATION, '"10m"', "How long to play."),
    "seed": Key(TEXT, '""', "Of the jitter: the same seed gives the same times."),
    "life": Key(list_of(table(LIFE)), "[]", "`[[life]]`: what becomes of lives. Without one they run for ever."),
    "step": Key(list_of(table(STEP)), "[]", "`[[step]]`: what happens at a time."),
    "expect": Key(list_of(table(EXPECT)), "[]", "`[[expect]]`: what has to be so, or `nssup sim` ends with 1."),
}


# --- the whole -----------------------------------------------------------------------------------------------------


class _Reading:
    def __init__(self, file: Document) -> None:
        self.file = file
        self.problems: set[Problem] = set()

    def blame(self, path: Path, why: str) -> None:
        self.problems.add(Problem(*self.file.place(path), dotted(path), why))


def parse(name: str, data: bytes) -> Scenario:
    """Raises SpecError with everything that is wrong."""
    file = document.decode(name, data)
    if isinstance(file, Problem):
        raise SpecError(file)
    reading = _Reading(file)
    values, found = convert(TOP, file.table)
    for path, why in found:
        reading.blame(path, why)
    if reading.problems:
        raise SpecError(*sorted(reading.problems))
    scenario = Scenario(
        config=values.get("config"),
        until=values.get("until", UNTIL),
        seed=values.get("seed", ""),
        lives=tuple(_life(reading, number, each) for number, each in enumerate(values.get("life", ()))),
        steps=tuple(_step(reading, number, each) for number, each in enumerate(values.get("step", ()))),
        expectations=tuple(_expectation(reading, number, each) for number, each in enumerate(values.get("expect", ()))),
    )
    if reading.problems:
        raise SpecError(*sorted(reading.problems))
    return scenario


def _life(reading: _Reading, number: int, values: dict[str, Any]) -> Life:
    path: Path = ("life", number)
    if "of" not in values:
        reading.blame(path, 'of is missing: say whose life it is, such as of = "web/0"')
    if "exit" in values and "signal" in values:
        reading.blame((*path, "signal"), "it ends with exit or signal, not with both: leave one out")
    return _made(Life, {"of": "", **values, "place": reading.file.place(path)})


def _step(reading: _Reading, number: int, values: dict[str, Any]) -> Step:
    path: Path = ("step", number)
    named = [name for name in STEPS if name in values]
    if "at" not in values:
        reading.blame(path, 'at is missing: say when, such as at = "10s"')
    if len(named) != 1:
        reading.blame(path, f"must be one of {', '.join(STEPS)}" + (f", not {' and '.join(named)}" if named else ""))
        return Step(at=0.0, what="", of="", place=reading.file.place(path))
    what = named[0]
    fits = {"scale": {"to"}, "kill": {"signal", "tree"}, "end": {"exit", "signal"}}.get(what, set())
    for other in {"to", "exit", "signal", "tree"} & values.keys() - fits:
        reading.blame((*path, other), f"means nothing to {what}: leave it out")
    if what == "scale" and "to" not in values:
        reading.blame(path, "to is missing: say how many workers")
    if "exit" in values and "signal" in values:
        reading.blame((*path, "signal"), "it ends with exit or signal, not with both: leave one out")
    fields = {"at": 0.0, **values, "what": what, "of": values.pop(what), "place": reading.file.place(path)}
    fields.pop(what, None)
    return _made(Step, fields)


def _expectation(reading: _Reading, number: int, values: dict[str, Any]) -> Expectation:
    path: Path = ("expect", number)
    if "order" in values:
        used, allowed = "order", {"order"}
        for each in values["order"]:
            if len(each.split()) != 2:
                reading.blame((*path, "order"), f'{quoted(each)} is no "WORKER EVENT", such as "db/0 started"')
    elif "event" in values:
        used, allowed = "event", {"event", "of", "reason", "times", "after", "before"}
    else:
        used, allowed = "a state", {"of", "at", "state", "reason", "ready", "lives", "restarts"}
        if not values.keys() & (allowed - {"of", "at"}):
            reading.blame(path, "expects nothing: say state, reason, ready, lives, restarts, event or order")
        if "of" not in values:
            reading.blame(path, 'of is missing: say whose state it is, such as of = "web/0"')
    for other in sorted(values.keys() - allowed):
        reading.blame((*path, other), f"does not go with {used}: leave it out")
    return _made(Expectation, {**values, "place": reading.file.place(path)})


_S = TypeVar("_S", Life, Step, Expectation)


def _made(kind: type[_S], fields: dict[str, Any]) -> _S:
    return kind(**{name: value for name, value in fields.items() if name in kind.__struct_fields__})
