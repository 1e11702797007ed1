"""The whole command line: what `fast` does not match by hand, help, and mistakes.

Nothing heavy is imported before it is known to be needed; `run` is parsed by hand as well: its users feel its start.
"""

from nssup import client, fast
from nssup.client import FAILED, OK, USAGE, Options
from nssup.verbs import COMMANDS, COMMON, OPTIONS, SELECTORS, SHELLS, VERBS, Option, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from nssup.foreground import Options as RunOptions

REEXEC_PATIENCE = 60.0  # seconds for an answer: the new code is tried out before
EXIT_CODES = """exit codes: 0 ok, 1 failed, 2 usage, 3 status: something selected is not running, 4 no such pool or
worker, 69 no supervisor at the socket, 77 not permitted, 78 bad config, 124 timed out; run: the command's own, 128+n
for signals, 125 nssup failed, 126 not executable, 127 not found"""


def main(argv: list[str]) -> int:
    """The exit code of `nssup ARGV...`."""
    if argv and argv[0] == "run":
        options = parse_run(argv[1:])
        if options is not None:
            return _run(options)
    if argv in (["version"], ["--version"]):
        return client.guarded(_version)
    if len(argv) > 1 and argv[0] == "ctl" and not argv[1].startswith("-") and argv[1] not in VERBS:
        return _unknown("verb", argv[1], VERBS)
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        return _unknown("command", argv[0], COMMANDS)
    argv, command = _split_command(argv)
    try:
        arguments = _parser().parse_args(_split_signals(argv))
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else USAGE
    if command is not None:
        arguments.command = command
    action: Callable[[Namespace], int] = arguments.action
    return client.guarded(lambda: action(arguments))


def _unknown(what: str, word: str, known: "Iterable[str]") -> int:
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
    client.complain(f"unknown {what} {word!r} ({hint})")
    return USAGE


def _split_command(argv: list[str]) -> "tuple[list[str], list[str] | None]":
    """`ctl exec web/3 -- CMD...`: what is ours, and the command, None where there is none of that kind."""
    if argv[:2] != ["ctl", "exec"] or "--" not in argv:
        return argv, None
    end = argv.index("--")
    return argv[:end], argv[end + 1 :]


def _split_signals(argv: list[str]) -> list[str]:
    """`kill -9` as `kill -s 9`, which argparse understands."""
    if argv[:2] != ["ctl", "kill"]:
        return argv
    return [part for word in argv for part in (["-s", word[1:]] if fast.is_signal_option(word) else [word])]


# --- the parsers ---------------------------------------------------------------------------------------------------


def _parser() -> "ArgumentParser":
    import argparse

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="nssup",
        description="An asyncio process supervisor: every worker in namespaces of its own.",
        epilog=EXIT_CODES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version="", help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, action: "Callable[[Namespace], int]") -> "ArgumentParser":
        sub = commands.add_parser(name, help=COMMANDS[name], description=COMMANDS[name], allow_abbrev=False)
        sub.set_defaults(action=action, **{option.field: None for option in OPTIONS[name]})
        for option in OPTIONS[name]:
            _add_option(sub, option)
        return sub

    up = command("up", _up)
    up.add_argument("--rehearse", action="store_true", help=_suppress())  # asked by `ctl reexec`
    check = command("check", _check)
    check.add_argument("file", nargs="?", metavar="FILE", help="default: as for up")
    sim = command("sim", _sim)
    sim.add_argument("scenario", metavar="SCENARIO", help="a TOML file: docs/sim.md")
    command("version", lambda arguments: _version())
    completion = command("completion", _completion)
    completion.add_argument("shell", choices=SHELLS)
    _add_run(command("run", _run_parsed))
    ctl = command("ctl", lambda arguments: OK)
    ctl.epilog, ctl.formatter_class = f"SEL: {SELECTORS}\n\n{EXIT_CODES}", raw
    verbs = ctl.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS.values():
        sub = verbs.add_parser(
            verb.name,
            help=verb.summary,
            description=f"{verb.summary}. {verb.details}" if verb.details else verb.summary,
            allow_abbrev=False,
            argument_default=_suppress(),
        )
        sub.set_defaults(action=_ctl, verb=verb)
        _add_operands(sub, verb.operands)
        for option in (*COMMON, *verb.options):
            _add_option(sub, option)
    return parser


def _suppress() -> str:
    from argparse import SUPPRESS

    return SUPPRESS


def _add_option(sub: "ArgumentParser", option: Option) -> None:
    action = _ACTIONS.get(option.kind, "store")
    if not option.takes_value:
        sub.add_argument(*option.names, dest=option.field, action=action, default=_suppress(), help=option.help)
        return
    how: dict[str, Any] = {"dest": option.field, "action": action, "default": _suppress(), "help": option.help}
    if option.kind in _TYPES:
        how["type"] = _TYPES[option.kind]
    if option.choices:
        how["choices"] = option.choices
    else:
        how["metavar"] = option.metavar
    sub.add_argument(*option.names, **how)


_ACTIONS = {"on": "store_true", "off": "store_false", "list": "append"}


def _add_operands(sub: "ArgumentParser", operands: str) -> None:
    if operands == "HOST_PID":
        sub.add_argument("selectors", nargs=1, metavar="HOST_PID")
    elif operands == "SEL CMD...":
        sub.usage = "nssup ctl exec [-it] SEL -- CMD..."
        sub.add_argument("selectors", nargs=1, metavar="SEL", help="one worker")
        sub.add_argument("command", nargs="*", metavar="CMD", help="what to run, and its arguments")
    elif operands == "POOL* N":
        sub.add_argument("selectors", nargs="*", metavar="POOL")
        sub.add_argument("n", metavar="N", help="N, +N or -N")
    elif operands:
        sub.add_argument("selectors", nargs=operands[-1], metavar="SEL", help=SELECTORS)


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def _seconds(text: str) -> float:
    seconds = fast.duration(text)
    if seconds is None:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text!r} is no time: write seconds, or 500ms, 10s, 5m, 1h")
    return seconds


_TYPES: "dict[str, Callable[[str], object]]" = {"seconds": _seconds, "number": _whole}


# --- up, check, version --------------------------------------------------------------------------------------------


def _version() -> int:
    from nssup import __version__

    try:
        from nssup import _frame  # noqa: F401 - not nssup.framing, which takes longer to import
    except ImportError:
        slow = " (without nssup._frame: logs are framed in Python, some 50 times slower)"
    else:
        slow = ""
    client.write(1, f"nssup {__version__}{slow}\n".encode())
    return OK


def _say(lines: "Sequence[str]", fd: int) -> None:
    client.write(fd, "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))


def _check(arguments: "Namespace") -> int:
    from nssup import facts
    from nssup.errors import SpecError

    try:
        lines, code = facts.check(facts.find(arguments.file))
    except SpecError as e:
        lines, code = [str(problem) for problem in e.problems], e.exit_code
    _say(lines, 1 if code == OK else 2)
    return code


def _sim(arguments: "Namespace") -> int:
    """1 when something is not as expected."""
    import os

    import msgspec

    from nssup import facts, playback, scenario
    from nssup.errors import SpecError

    try:
        with open(arguments.scenario, "rb") as file:
            found = scenario.parse(arguments.scenario, file.read())
        if found.config is not None and arguments.config is None:
            arguments.config = os.path.join(os.path.dirname(arguments.scenario), found.config)
        if arguments.until is not None:
            found = msgspec.structs.replace(found, until=arguments.until)
        if arguments.seed is not None:
            found = msgspec.structs.replace(found, seed=arguments.seed)
        anywhere = facts.Anywhere()
        played = playback.play(facts.load(facts.find(arguments.config, anywhere), anywhere).pools, found)
    except SpecError as e:
        _say([str(problem) for problem in e.problems], 2)
        return e.exit_code
    except OSError as e:
        client.complain(f"{e.filename}: {e.strerror}")
        return FAILED
    if arguments.json:
        lines = [msgspec.json.encode(each).decode() for each in playback.documents(played)]
    else:
        lines = playback.text(played)
    _say(lines, 1)
    return OK if played.held else FAILED


def _completion(arguments: "Namespace") -> int:
    from nssup import completion

    client.write(1, completion.script(arguments.shell, COMMANDS, OPTIONS).encode())
    return OK


def _up(arguments: "Namespace") -> int:
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until there is something to stop, Ctrl-C just ends us: no KeyboardInterrupt in the middle of an import.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from nssup import config, facts, up
    from nssup.errors import NssupError, SpecError

    try:
        found = facts.load(facts.find(arguments.config))
        if arguments.rehearse:
            _say([up.rehearsal(found)], 1)
            return OK
        _say(config.warning_lines(found), 2)
        return up.serve(found, arguments.for_seconds)
    except SpecError as e:
        _say([str(problem) for problem in e.problems], 2)
        return e.exit_code
    except NssupError as e:
        client.complain(str(e))
        return e.exit_code
    except OSError as e:
        client.complain(f"{e.filename}: {e.strerror}" if e.filename else str(e))
        return FAILED


# --- run -----------------------------------------------------------------------------------------------------------

_RUN_SWITCHES = {
    "-t": ("tty", True),
    "--tty": ("tty", True),
    "--no-tty": ("tty", False),
    "-i": ("", None),  # docker's habit; stdin is passed through anyway
    "-it": ("tty", True),
    "-ti": ("tty", True),
    "--init": ("init", True),
    "--no-init": ("init", False),
    "--proc": ("proc", True),
    "--no-proc": ("proc", False),
    "-v": ("verbose", True),
    "--verbose": ("verbose", True),
}
_RUN_VALUES = {
    "-e": "env",
    "--env": "env",
    "-w": "workdir",
    "--workdir": "workdir",
    "--ns": "namespaces",
    "--hostname": "hostname",
    "--user": "user",
    "-u": "user",
    "--timeout": "timeout",
}


def parse_run(argv: list[str]) -> "RunOptions | None":
    """The options of `run ARGV...`, or None when argparse should see them: help, or a mistake."""
    found: dict[str, object] = {}
    env: list[str] = []
    rest = list(reversed(argv))
    while rest:
        word = rest.pop()
        name, equals, value = word.partition("=")
        if word == "--" or not word.startswith("-"):
            rest += [word] if word != "--" else []
            break
        if word in _RUN_SWITCHES:
            found.update([_RUN_SWITCHES[word]])
        elif name in _RUN_VALUES and (equals or (word == name and rest)):
            _take_value(found, env, _RUN_VALUES[name], value if equals else rest.pop())
        else:
            return None
    found.pop("", None)
    if not rest or found.get("timeout", 0) is None:
        return None
    from nssup.foreground import Options as RunOptions

    return RunOptions(command=tuple(reversed(rest)), env=tuple(env), **found)  # type: ignore[arg-type]


def _take_value(found: dict[str, object], env: list[str], name: str, value: str) -> None:
    if name == "env":
        env.append(value)
    elif name == "namespaces":
        found[name] = tuple(part.strip() for part in value.split(",") if part.strip())
    elif name == "timeout":
        found[name] = fast.duration(value)
    else:
        found[name] = value


def _run(options: "RunOptions") -> int:
    from nssup import foreground

    return foreground.run(options)


def _add_run(run: "ArgumentParser") -> None:
    """For help and mistakes; what is right never comes here but in odd spellings."""
    run.usage = "nssup run [OPTIONS] -- CMD..."
    run.add_argument("command", nargs="...", metavar="CMD", help="what to run, and its arguments")


def _run_parsed(arguments: "Namespace") -> int:
    from nssup.foreground import Options as RunOptions

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        client.complain("run: what? nssup run [OPTIONS] -- CMD...")
        return USAGE
    given = vars(arguments)
    names = ("tty", "workdir", "hostname", "user", "init", "proc", "timeout", "verbose")
    found: dict[str, object] = {name: given[name] for name in names if given[name] is not None}
    if arguments.namespaces is not None:
        _take_value(found, [], "namespaces", arguments.namespaces)
    return _run(RunOptions(command=tuple(command), env=tuple(arguments.env or ()), **found))  # type: ignore[arg-type]


# --- ctl -----------------------------------------------------------------------------------------------------------


def _ctl(arguments: "Namespace") -> int:
    """What fast would have done with the same words better put; or a stream."""
    verb: Verb = arguments.verb
    o = fast.defaults(verb)
    for name, value in vars(arguments).items():
        setattr(o, name, value)
    if verb.streams:
        return _stream(verb.name, o, bool(o.get("follow")), bool(o.get("raw")))
    if verb.name == "reexec":
        return _reexec(o)
    if verb.name == "exec":
        return _exec(o)
    if verb.name == "top" and not o.json:
        from nssup import top

        return top.run(o.socket or client.default_socket(), o.selectors, getattr(o, "every", None))
    return client.perform(verb, o)


def _exec(o: Options) -> int:
    from nssup import inside

    command: list[str] = getattr(o, "command", [])
    if not command:
        client.complain("exec: what? nssup ctl exec [-it] SEL -- CMD...")
        return USAGE
    path = o.socket or client.default_socket()
    tty, interactive = bool(o.get("tty")), bool(o.get("interactive"))
    return inside.execute(path, o.selectors, command, tty=tty, interactive=interactive)


def _reexec(o: Options) -> int:
    """Asks for it, and waits for whoever answers next."""
    import msgspec

    path = o.socket or client.default_socket()
    sock, answer = client.ask(path, client.request("POST", "/v1/reexec", "{}"), REEXEC_PATIENCE)
    try:
        body = answer.body()
        told = msgspec.json.decode(body)
        if answer.status >= 400:
            error = told["error"]
            text = f"nssup: {error['message']}" + (f" ({error['hint']})" if error["hint"] else "") + "\n"
            client.write(1 if o.json else 2, body if o.json else text.encode())
            return answer.exit_code()
        before = told["supervisor"]
        if o.wait:
            client.wait_hung_up(sock)
    finally:
        sock.close()
    health = _next_supervisor(path, before["epoch"], o.timeout or client.PATIENCE) if o.wait else {}
    after = health.get("supervisor", {"version": told["version"]})
    if o.json:
        client.write(1, msgspec.json.encode({"from": before, "to": after}) + b"\n")
    elif not o.quiet:
        client.write(1, f"{_named(before)} -> {_named(after)}\n".encode())
    if "reexec_failed" in health:
        client.complain(f"still the code of before: {health['reexec_failed']}")
        return FAILED
    return OK


def _named(supervisor: "dict[str, Any]") -> str:
    epoch = f" (epoch {supervisor['epoch']}, host PID {supervisor['host_pid']})" if "epoch" in supervisor else ""
    return f"nssup {supervisor['version']}{epoch}"


def _next_supervisor(path: str, epoch: int, patience: float) -> "dict[str, Any]":
    """What the supervisor after that of epoch says of itself. ClientError when there is none."""
    import msgspec

    while True:
        # Its socket has been listening all the time: whoever connects is answered, or the process is gone.
        sock, answer = client.ask(path, client.request("GET", "/healthz"), patience)
        try:
            health: dict[str, Any] = msgspec.json.decode(answer.body())
        finally:
            sock.close()
        if answer.status >= 400:
            raise client.ClientError(FAILED, health["error"]["message"])
        if health["supervisor"]["epoch"] != epoch:
            return health


def _stream(verb: str, o: Options, follow: bool, raw: bool) -> int:
    """Copies or renders the lines of a stream until it ends."""
    n = o.n or {"logs": "100", "events": "1000"}[verb] if not follow else o.n or "10"
    pairs = [("select", each) for each in o.selectors] + [("follow", "1" if follow else "0"), ("n", n)]
    path = o.socket or client.default_socket()
    accept = "application/json" if o.json else "text/plain"
    data = client.request("GET", f"/v1/{verb}{client.query(pairs)}", None, accept)
    sock, answer = client.ask(path, data, client.PATIENCE)
    try:
        if answer.status >= 400:
            client.write(1 if o.json else 2, answer.body())
            return answer.exit_code()
        sock.settimeout(None)
        show = _shower(verb, o.json, raw)
        for chunk in answer.chunks():
            client.write(1, show(chunk))
    finally:
        sock.close()
    return OK


def _shower(verb: str, json: bool, raw: bool) -> "Callable[[bytes], bytes]":
    """Makes of a batch of lines what is to be written."""
    if json:
        return lambda chunk: chunk
    one = _event_text if verb == "events" else _record_bytes if raw else _record_text()
    return lambda chunk: b"".join([one(line) for line in chunk.splitlines() if line])


def _event_text(line: bytes) -> bytes:
    import msgspec

    from nssup import render

    return render.event(msgspec.json.decode(line)).encode() + b"\n"


def _record_bytes(line: bytes) -> bytes:
    """What the worker wrote, byte for byte; nothing of what nssup noted in the log."""
    import msgspec

    from nssup.lines import Record, content

    record = msgspec.json.decode(line, type=Record)
    return b"" if record.stream == "nssup" else content(record)


def _record_text() -> "Callable[[bytes], bytes]":
    import msgspec

    from nssup import render
    from nssup.lines import Record

    decode = msgspec.json.Decoder(Record).decode
    terminal = client.is_terminal(1)
    color = terminal and client.may_color()

    def one(line: bytes) -> bytes:
        r = decode(line)
        text = bytes(r.data).decode() if r.msg is None else r.msg
        text = render.visible(text) if terminal else text
        return render.record(r.ts, r.worker, r.stream, text, color=color).encode() + b"\n"

    return one
