"""The hot verbs of `nssup ctl`, matched by hand: no argparse, nothing imported but the client.

Whatever is not plainly one of them (help, a mistake, a verb that does more than ask and print) is left to cli.
"""

from nssup import client
from nssup.client import Options
from nssup.verbs import COMMON, LONG, VERBS, Option, Verb

GOAL = "ready"  # of `wait`


def parse(argv: list[str]) -> "tuple[Verb, Options] | None":
    """(verb, options) of the arguments after `ctl`, or None when they are for cli."""
    if not argv or argv[0] not in VERBS or argv[0] in LONG:
        return None
    verb = VERBS[argv[0]]
    known = {name: option for option in (*COMMON, *verb.options) for name in option.names}
    o = defaults(verb)
    rest = iter(argv[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        option = known.get(name)
        if option is not None and not option.takes_value and not equals:
            setattr(o, option.field, option.kind == "on")
        elif option is not None and option.takes_value:
            given = value if equals else next(rest, None)
            if given is None or not _set(o, option, given):
                return None
        elif verb.name == "kill" and is_signal_option(word):
            o.signal = word[1:]  # type: ignore[attr-defined]
        elif word.startswith("-") and not (verb.name == "scale" and word[1:].isdigit()):
            return None
        else:
            o.selectors.append(word)
    return (verb, o) if _complete(verb, o) else None


def defaults(verb: Verb) -> Options:
    """Options of a verb of which nothing was said."""
    o = Options()
    if verb.name == "wait":
        o.goal = GOAL  # type: ignore[attr-defined]
    return o


def _set(o: Options, option: Option, text: str) -> bool:
    """Whether the value is one for this option."""
    value: object = text
    if option.kind == "seconds":
        value = duration(text)
    elif option.kind == "number":
        value = int(text) if text.isascii() and text.isdigit() else None
    elif option.kind == "choice" and text not in option.choices:
        value = None
    if not text or value is None:
        return False
    setattr(o, option.field, value)
    return True


def _complete(verb: Verb, o: Options) -> bool:
    if verb.operands == "POOL* N":
        if len(o.selectors) < (1 if o.get("all") else 2):
            return False
        o.n = o.selectors.pop()
        return o.n.lstrip("+-").isdigit()
    if verb.operands == "HOST_PID":
        return len(o.selectors) == 1
    if not verb.operands:
        return not o.selectors
    return bool(o.selectors) or verb.operands == "SEL*"


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
