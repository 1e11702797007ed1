"""The verbs of `nssup ctl`: the one table of which requests, access, help, completion and manuals are made.

Imports nothing: the quick way of the command line reads it too.
"""

GOALS = ("ready", "running", "stopped", "done")
SELECTORS = "web (a pool), web/3 (a worker), globs as 'web/*', host:5151 (by host PID)"


class Option:
    """One option of a verb.

    names: as it is typed. field: of client.Options. sent: its name in the request, "" where it is none of the
    supervisor's business. kind: what it takes: `on` and `off` nothing, else `text`, `seconds`, `number`, `signal`,
    `list` (may be given again), or `choice` of choices.
    """

    __slots__ = ("choices", "field", "help", "kind", "metavar", "names", "sent")

    def __init__(
        self,
        names: str,
        help: str,  # noqa: A002 - argparse's word
        *,
        field: str = "",
        sent: "str | None" = None,
        kind: str = "on",
        metavar: str = "",
        choices: "tuple[str, ...]" = (),
    ) -> None:
        self.names = tuple(names.split())
        self.help = help
        self.field = field or self.names[-1].lstrip("-").replace("-", "_")
        self.sent = self.field if sent is None else sent
        self.kind = kind
        self.metavar = metavar
        self.choices = choices

    @property
    def takes_value(self) -> bool:
        return self.kind not in ("on", "off")


class Verb:
    """One verb.

    request: method and path. access: see (nothing changes), operate, admin (amounts to root). operands: `SEL*` (none
    means all), `SEL+` (at least one), `POOL* N`, `HOST_PID`, `SEL CMD...`, or "". streams: the answer has no end
    of its own. wide: its text depends on the terminal. details: what the manual says beyond the summary.
    """

    __slots__ = ("access", "details", "method", "name", "operands", "options", "path", "streams", "summary", "wide")

    def __init__(
        self,
        name: str,
        request: str,
        access: str,
        summary: str,
        *,
        operands: str = "",
        options: "tuple[Option, ...]" = (),
        streams: bool = False,
        wide: bool = False,
        details: str = "",
    ) -> None:
        self.name = name
        self.method, self.path = request.split()
        self.access = access
        self.summary = summary
        self.operands = operands
        self.options = options
        self.streams = streams
        self.wide = wide
        self.details = details

    @property
    def waits(self) -> bool:
        """Whether its answer may take as long as it takes."""
        return self.name == "wait" or any(option.field == "wait" for option in self.options)


# What every verb understands.
COMMON = (
    Option("--socket", "default: $NSSUP_SOCKET, or this user's", sent="", kind="text", metavar="PATH"),
    Option("--json", "what the supervisor answers, as it is", sent=""),
    Option("-q --quiet", "say nothing but errors", sent=""),
)
ALL = Option("--all", "all there are")
NO_WAIT = Option("--no-wait", "do not wait for the result", field="wait", kind="off")
TIMEOUT = Option("--timeout", "wait at most so long (exit 124)", kind="seconds", metavar="S")
CHANGING = (ALL, NO_WAIT, TIMEOUT)
FOLLOW = "-f --follow"


def _changing(name: str, summary: str, *more: Option, details: str = "") -> Verb:
    """A verb that tells workers to be otherwise, and waits until they are."""
    return Verb(
        name, f"POST /v1/{name}", "operate", summary, operands="SEL*", options=(*CHANGING, *more), details=details
    )


def _enabling(name: str, summary: str, now: str) -> Verb:
    return Verb(
        name,
        f"POST /v1/{name}",
        "operate",
        summary,
        operands="SEL*",
        options=(*CHANGING, Option("--now", now)),
        details="SEL are pools. It outlasts supervisors and reboots, until it is said otherwise.",
    )


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "status",
            "GET /v1/status",
            "see",
            "pools and workers, and how they are",
            operands="SEL*",
            options=(
                Option("-a --all", "a line for each worker", field="unfold"),
                Option("--stats", "CPU and memory also of many workers"),
            ),
            wide=True,
            details="A pool of many is one line unless it is selected. Exits with 3 when something selected is not "
            "running; a oneshot that is done counts as running.",
        ),
        Verb(
            "events",
            "GET /v1/events",
            "see",
            "what happens, a JSON object a line: first a snapshot, then each change",
            operands="SEL*",
            options=(
                Option(FOLLOW, "go on with what happens"),
                Option("-n", "the last N (1000; with -f 10)", kind="text", metavar="N"),
            ),
            streams=True,
        ),
        Verb(
            "logs",
            "GET /v1/logs",
            "see",
            "what workers write, a record a line",
            operands="SEL*",
            options=(
                Option(FOLLOW, "go on with what is written"),
                Option("-n", "the last N records (100; with -f 10)", kind="text", metavar="N"),
                Option("--raw", "only what was written, byte for byte", sent=""),
            ),
            streams=True,
        ),
        Verb("names", "GET /v1/names", "see", "the names of all pools and workers, a line each"),
        Verb(
            "show",
            "GET /v1/show",
            "see",
            "every setting that holds for a pool, and the file and line that says so",
            operands="SEL*",
        ),
        Verb(
            "env",
            "GET /v1/env",
            "see",
            "the environment of workers, and where each variable comes from",
            operands="SEL*",
            details="What is a secret by its name, and passwords in URLs, is masked.",
        ),
        Verb(
            "tree",
            "GET /v1/tree",
            "see",
            "every process of workers, with its host PID and its namespace PID",
            operands="SEL*",
            wide=True,
        ),
        Verb(
            "stats",
            "GET /v1/stats",
            "see",
            "what whole workers use: processes, CPU time, memory",
            operands="SEL*",
            wide=True,
        ),
        Verb(
            "explain",
            "GET /v1/explain",
            "see",
            "why workers are as they are, what they wait for, and when they are launched again",
            operands="SEL*",
            options=(Option("-n", "how many launches to come (5)", kind="count", metavar="N"),),
        ),
        Verb(
            "history",
            "GET /v1/history",
            "see",
            "how the last lives of workers ended, and how long was waited after each",
            operands="SEL*",
            options=(Option("-n", "the last N of each (10, which are all)", kind="count", metavar="N"),),
        ),
        Verb(
            "top",
            "GET /v1/status",
            "see",
            "workers on the full screen, live, by what they use",
            operands="SEL*",
            options=(Option("-d --every", "look so often (2s)", sent="", kind="seconds", metavar="S"),),
            details="On no terminal: one look, as a table.",
        ),
        Verb(
            "pid",
            "GET /v1/status",
            "see",
            "host PIDs, or namespace PIDs, of workers",
            operands="SEL+",
            options=(Option("--ns", "the PID in the worker's own namespace", sent=""),),
        ),
        Verb(
            "which",
            "GET /v1/which/{host_pid}",
            "see",
            "the worker whose tree holds a host PID",
            operands="HOST_PID",
        ),
        Verb("ping", "GET /healthz", "see", "whether the supervisor answers"),
        _changing("start", "start workers"),
        _changing("stop", "stop workers by their stop sequence"),
        _changing("restart", "stop workers and start them again"),
        Verb(
            "kill",
            "POST /v1/kill",
            "operate",
            "send a signal to workers",
            operands="SEL*",
            options=(
                ALL,
                Option("-s --signal", "name or number (TERM); -9 and -HUP too", kind="signal", metavar="SIG"),
                Option("--tree", "to every process of the worker"),
                Option(
                    "--ns-pid", "to that process of the one worker, by its PID in there", kind="number", metavar="N"
                ),
            ),
        ),
        Verb(
            "scale",
            "POST /v1/scale",
            "operate",
            "have another number of workers, for good",
            operands="POOL* N",
            options=CHANGING,
        ),
        _enabling("enable", "have pools started with the supervisor, for good", "start them now as well"),
        _enabling("disable", "have pools not started with the supervisor, for good", "stop them now as well"),
        Verb(
            "reset",
            "POST /v1/reset",
            "operate",
            "forget failures: who has failed is stopped, who waits waits no longer than for the first time",
            operands="SEL*",
            options=(ALL,),
        ),
        Verb(
            "reload",
            "POST /v1/reload",
            "operate",
            "have programs read their configuration again, in the way their pool says",
            operands="SEL*",
            options=(ALL,),
        ),
        Verb(
            "wait",
            "POST /v1/wait",
            "see",
            "wait until workers are as wanted",
            operands="SEL*",
            options=(
                TIMEOUT,
                Option(
                    "--for", "default: ready", field="goal", sent="wait", kind="choice", metavar="GOAL", choices=GOALS
                ),
            ),
        ),
        Verb(
            "shutdown",
            "POST /v1/shutdown",
            "admin",
            "stop everything and end the supervisor",
            options=(
                NO_WAIT,
                TIMEOUT,
                Option("--leave-running", "stop only workers that end with the supervisor; the others go on"),
            ),
        ),
        Verb(
            "exec",
            "POST /v1/exec",
            "admin",
            "run a command inside a worker: its namespaces, its user, its environment",
            operands="SEL CMD...",
            options=(
                Option("-i --interactive", "pass stdin on", sent=""),
                Option("-t --tty", "on a terminal of its own", sent=""),
            ),
            details="nssup ctl exec -it web/3 -- bash. The worker's init is its parent and kills it when the worker, "
            "or this command, ends. Exits with the command's own code, 128+n for a signal, 125 when it could not be "
            "run, 126 and 127 as a shell does.",
        ),
        Verb(
            "reexec",
            "POST /v1/reexec",
            "admin",
            "have the supervisor become the code that is installed now; workers go on",
            options=(
                Option("--no-wait", "do not wait for the result", field="wait", sent="", kind="off"),
                Option("--timeout", "wait at most so long (exit 124)", sent="", kind="seconds", metavar="S"),
            ),
        ),
        Verb(
            "orphans",
            "GET /v1/orphans",
            "see",
            "what an earlier supervisor left that cannot be proven to be its own",
        ),
    )
}
# Those that ask more than once, or read an answer that has no end: left to cli.
LONG = frozenset(name for name, verb in VERBS.items() if verb.streams or name in ("reexec", "exec", "top"))

# --- the commands ----------------------------------------------------------------------------------------------------

COMMANDS = {
    "up": "supervise in the foreground what a config file says",
    "ctl": "steer a running supervisor",
    "run": "run one command in fresh namespaces",
    "check": "validate a config file without starting anything",
    "sim": "play a scenario on the pools of a config, in no time: what would be done, and whether that is as expected",
    "completion": "a completion script for bash, zsh or fish",
    "version": "print the version",
}
SHELLS = ("bash", "zsh", "fish")

OPTIONS: "dict[str, tuple[Option, ...]]" = {
    "up": (
        Option("-c --config", "default: ./nssup.toml, the user's, /etc/nssup/nssup.toml", kind="text", metavar="FILE"),
        Option("--for", "end by itself after so long", field="for_seconds", kind="seconds", metavar="SECONDS"),
    ),
    "ctl": (),
    "run": (
        Option("-t --tty", "a pty (by itself on a terminal)"),
        Option("--no-tty", "no pty", field="tty", kind="off"),
        Option("-i", "no effect: stdin is passed through anyway", field="interactive"),
        Option("-e --env", "set a variable", kind="list", metavar="K=V"),
        Option("-w --workdir", "where to start", kind="text", metavar="DIR"),
        Option("--ns", "pid,mount,uts,ipc and net,user,cgroup,time", field="namespaces", kind="text", metavar="LIST"),
        Option("--hostname", "in the namespace", kind="text", metavar="NAME"),
        Option("-u --user", "run as", kind="text", metavar="USER[:GROUP]"),
        Option("--init", "nssup's own PID 1 above the command"),
        Option("--no-init", "without it", field="init", kind="off"),
        Option("--proc", "a private /proc"),
        Option("--no-proc", "without it", field="proc", kind="off"),
        Option("--timeout", "kill it all after so long (exit 124)", kind="seconds", metavar="S"),
        Option("-v --verbose", "its PIDs to stderr"),
    ),
    "check": (),
    "sim": (
        Option("-c --config", "default: what the scenario names, or as for up", kind="text", metavar="FILE"),
        Option("--until", "play so long", kind="seconds", metavar="SECONDS"),
        Option("--seed", "of the jitter of restarts", kind="text", metavar="TEXT"),
        Option("--json", "a JSON object a line"),
    ),
    "completion": (),
    "version": (),
}
