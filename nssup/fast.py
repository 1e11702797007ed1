"""The hot verbs of `nssup ctl`, matched by hand: no argparse, nothing imported but the client.

Whatever is not plainly one of them (help, a mistake, a verb that does more than ask and print) is left to cli.
"""

from nssup import client
from nssup.client import Options

_SWITCHES = {
    "--json": ("json", True),
    "-q": ("quiet", True),
    "--quiet": ("quiet", True),
}
_CHANGING = {"--all": ("all", True), "--no-wait": ("wait", False), **_SWITCHES}
_STATUS = {"-a": ("unfold", True), "--all": ("unfold", True), "--stats": ("stats", True), **_SWITCHES}
# verb -> (switches, options with a value)
VERBS = {
    "status": (_STATUS, {"--socket": "socket"}),
    "ping": (_SWITCHES, {"--socket": "socket"}),
    "which": (_SWITCHES, {"--socket": "socket"}),
    "pid": ({"--ns": ("ns", True), **_SWITCHES}, {"--socket": "socket"}),
    "start": (_CHANGING, {"--socket": "socket", "--timeout": "timeout"}),
    "stop": (_CHANGING, {"--socket": "socket", "--timeout": "timeout"}),
    "restart": (_CHANGING, {"--socket": "socket", "--timeout": "timeout"}),
    "scale": (_CHANGING, {"--socket": "socket", "--timeout": "timeout"}),
    "kill": (
        {"--all": ("all", True), "--tree": ("tree", True), **_SWITCHES},
        {"--socket": "socket", "-s": "signal", "--signal": "signal"},
    ),
    "wait": (_SWITCHES, {"--socket": "socket", "--timeout": "timeout", "--for": "goal"}),
    "orphans": (_SWITCHES, {"--socket": "socket"}),
    "shutdown": (
        {"--no-wait": ("wait", False), "--leave-running": ("leave_running", True), **_SWITCHES},
        {"--socket": "socket", "--timeout": "timeout"},
    ),
}
GOALS = ("ready", "running", "stopped", "done")


def parse(argv: list[str]) -> "tuple[str, Options] | None":
    """(verb, options) of the arguments after `ctl`, or None when they are for cli."""
    if not argv or argv[0] not in VERBS:
        return None
    verb = argv[0]
    switches, valued = VERBS[verb]
    o = Options()
    rest = iter(argv[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        if word in switches:
            setattr(o, *switches[word])
        elif name in valued and (equals or word == name):
            given = value if equals else next(rest, None)
            if given is None or not _set(o, valued[name], given):
                return None
        elif verb == "kill" and is_signal_option(word):
            o.signal = word[1:]
        elif word.startswith("-") and not (verb == "scale" and word[1:].isdigit()):
            return None
        else:
            o.selectors.append(word)
    return (verb, o) if _complete(verb, o) else None


def _set(o: Options, name: str, value: str) -> bool:
    """Whether the value is one for this option."""
    if name == "timeout":
        seconds = duration(value)
        if seconds is None:
            return False
        o.timeout = seconds
        return True
    if not value or (name == "goal" and value not in GOALS):
        return False
    setattr(o, name, value)
    return True


def _complete(verb: str, o: Options) -> bool:
    if verb == "scale":
        if len(o.selectors) < (1 if o.all else 2):
            return False
        o.n = o.selectors.pop()
        return o.n.lstrip("+-").isdigit()
    if verb in ("ping", "shutdown", "orphans"):
        return not o.selectors
    if verb == "pid":
        return bool(o.selectors)
    return len(o.selectors) == 1 if verb == "which" else True


def is_signal_option(word: str) -> bool:
    """`-9`, `-HUP`, `-SIGUSR1`, as kill(1) takes them."""
    name = word[1:]
    return word[:1] == "-" and (name.isdigit() or (name.isupper() and name.isalnum() and len(name) > 1))


def duration(text: str) -> "float | None":
    """Seconds of `10`, `2.5`, `500ms`, `10s`, `5m`, `1h`; None when it is none of these."""
    for unit, seconds in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("", 1.0)):
        number = text[: len(text) - len(unit)]
        if text.endswith(unit) and number.replace(".", "", 1).isdigit() and number.isascii():
            return float(number) * seconds
    return None


def run(argv: list[str]) -> "int | None":
    """The exit code of `nssup ctl ARGV...`, or None when it is for cli."""
    found = parse(argv)
    return None if found is None else client.perform(*found)
