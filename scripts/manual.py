"""Writes the manual pages in docs/man from the tables of verbs and keys; --check says whether they are up to date."""

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from config_reference import TABLES

from nssup.cli import EXIT_CODES
from nssup.verbs import COMMANDS, COMMON, OPTIONS, SELECTORS, VERBS, Option, Verb

PAGES = Path(__file__).parent.parent / "docs" / "man"
DATE = "November 23, 2026"


def escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("`", "").replace("**", "")
    text = text.replace(" -- ", " \\-\\- ")
    return text if text[:1] not in (".", "'") else "\\&" + text


def word(text: str) -> str:
    """text as an argument of a macro."""
    text = escaped(text).replace('"', '""')
    return f'"{text}"' if " " in text or '"' in text or not text else text


def sentences(text: str) -> list[str]:
    """A line for each sentence, as mdoc wants it."""
    parts = re.split(r"(?<=[.:;!?]) +", " ".join(text.replace("**", "").split()))
    return [escaped(line) for part in parts for line in textwrap.wrap(part, 76, break_long_words=False)]


def sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", ":", "?")) else text + "."


def head(name: str, section: int, what: str) -> list[str]:
    title = name.upper().replace("-", "-")
    return [f".Dd {DATE}", f".Dt {title} {section}", ".Os", ".Sh NAME", f".Nm {name}", f".Nd {what}"]


def flag(option: Option) -> str:
    value = f" Ar {word(option.metavar or option.kind)}" if option.takes_value else ""
    names = [f"Fl {word(name[1:])}" for name in option.names]
    return f"{' , '.join(names)}{value}"


def listed(options: Iterable[Option]) -> Iterator[str]:
    options = list(options)
    if not options:
        return
    yield ".Bl -tag -width Ds"
    for option in options:
        yield f".It {flag(option)}"
        choices = f" One of {', '.join(option.choices)}." if option.choices else ""
        yield from sentences(sentence(option.help) + choices)
    yield ".El"


def operands(verb: Verb) -> list[str]:
    known = {
        "": [],
        "SEL*": [".Op Ar SEL ..."],
        "SEL+": [".Ar SEL ..."],
        "POOL* N": [".Ar POOL ...", ".Ar N"],
        "HOST_PID": [".Ar HOST_PID"],
    }
    return known.get(verb.operands) or ([f".Ar {verb.operands}"] if verb.operands else [])


def nssup() -> list[str]:
    lines = head("nssup", 1, "supervise processes, each in namespaces of its own")
    lines.append(".Sh SYNOPSIS")
    for name in COMMANDS:
        lines += [".Nm", f".Cm {name}"]
        lines += [".Op Ar option ..."] if OPTIONS[name] else []
        lines += {"ctl": [".Ar verb", ".Op Ar option ...", ".Op Ar SEL ..."], "run": [".Fl -", ".Ar command ..."],
                  "check": [".Op Ar file"], "completion": [".Ar shell"]}.get(name, [])  # fmt: skip
        lines.append(".Pp") if name != list(COMMANDS)[-1] else None
    lines += [".Sh DESCRIPTION", ".Nm"]
    lines += sentences(
        "launches workers, each the child of its own PID 1 in its own PID namespace; watches them, writes their output "
        "as structured logs, restarts and stops them, and may die itself without harm to them."
    )
    lines += [".Pp", "The commands are as follows:", ".Bl -tag -width Ds"]
    for name, summary in COMMANDS.items():
        lines += [f".It Cm {name}", *sentences(sentence(summary))]
        if name == "ctl":
            lines += ["See", ".Xr nssup-ctl 1 ."]
        lines += list(listed(OPTIONS[name]))
    lines += [".El", ".Sh ENVIRONMENT", ".Bl -tag -width Ds"]
    lines += [".It Ev NSSUP_CONFIG", "The config file, where none is named."]
    lines += [".It Ev NSSUP_SOCKET", "The control socket, where none is named."]
    lines += [".It Ev NO_COLOR", "When set and not empty, nothing is coloured.", ".El"]
    lines += [".Sh FILES", ".Bl -tag -width Ds", ".It Pa nssup.toml"]
    lines += sentences("The config: in this directory, else in ~/.config/nssup, else in /etc/nssup.")
    lines += [".It Pa /run/nssup/nssup.sock", "The control socket.", ".El"]
    lines += [*exit_status(), ".Sh SEE ALSO", ".Xr nssup-ctl 1 ,", ".Xr nssup.toml 5"]
    return lines


def exit_status() -> list[str]:
    codes = EXIT_CODES.removeprefix("exit codes: ").replace("\n", " ")
    return [".Sh EXIT STATUS", *sentences(sentence(codes))]


def nssup_ctl() -> list[str]:
    lines = head("nssup-ctl", 1, "steer a running nssup supervisor")
    lines += [".Sh SYNOPSIS", ".Nm nssup ctl", ".Ar verb", ".Op Ar option ...", ".Op Ar SEL ...", ".Sh DESCRIPTION"]
    lines += sentences(
        f"Every verb asks the supervisor at its control socket. SEL is one of {SELECTORS}. Verbs that see mean "
        "everything where nothing is selected; those that change something want to be told, or --all."
    )
    lines += [".Pp", "Every verb understands:", *listed(COMMON), ".Sh VERBS"]
    for verb in VERBS.values():
        lines += [f".Ss {verb.name}", f".Nm nssup ctl {verb.name}"]
        lines += [".Op Ar option ..."] if verb.options else []
        lines += [*operands(verb), ".Pp", *sentences(sentence(verb.summary))]
        lines += sentences(sentence(verb.details)) if verb.details else []
        needs = {"operate": "Takes the role operator.", "admin": "Takes the role admin."}.get(verb.access)
        lines += [needs] if needs else []
        lines += list(listed(verb.options))
    lines += [".Sh ENVIRONMENT", ".Bl -tag -width Ds", ".It Ev NSSUP_SOCKET", "The control socket.", ".El"]
    lines += [*exit_status(), ".Sh SEE ALSO", ".Xr nssup 1 ,", ".Xr nssup.toml 5"]
    return lines


def heading(title: str) -> str:
    """Without the brackets, and what is said beside the table's name."""
    return re.sub(r"[`\[\]]", "", title).partition(",")[0].upper().replace("POOL.NAME", "pool.NAME")


def nssup_toml() -> list[str]:
    lines = head("nssup.toml", 5, "config of the nssup supervisor")
    lines += [".Sh DESCRIPTION"]
    lines += sentences(
        "One TOML file says where a supervisor keeps its things and which pools it runs. An unknown key is an error. "
        "Durations and sizes are texts with units."
    )
    for title, table in TABLES:
        known = [(name, key, key.kind) for name, key in table.items() if key.kind is not None]
        lines += [f".Sh {heading(title)}", ".Bl -tag -width Ds"]
        for name, key, kind in known:
            lines += [f".It Cm {word(name)} No = Ar {word(kind.name.replace(chr(92) + '|', 'or'))}"]
            said = sentences(key.doc) if key.doc else []
            said += sentences(f"The default is {key.default}.") if key.default else []
            lines += said or ["See above."]
        lines += [".El"]
    lines += [".Sh EXAMPLES", ".Bd -literal", "version = 1", "", "[pool.web]"]
    lines += ['command = ["python3", "-m", "http.server", "{index+9000}"]', "workers = 3", ".Ed"]
    lines += [".Sh SEE ALSO", ".Xr nssup 1 ,", ".Xr nssup-ctl 1"]
    return lines


def pages() -> dict[str, str]:
    made = {"nssup.1": nssup(), "nssup-ctl.1": nssup_ctl(), "nssup.toml.5": nssup_toml()}
    note = '.\\" Made by scripts/manual.py from the tables of verbs and keys.'
    return {name: "\n".join([note, *lines]) + "\n" for name, lines in made.items()}


def main() -> int:
    made = pages()
    if "--check" in sys.argv:
        there = {path.name: path.read_text() for path in PAGES.glob("*")}
        return int(there != made)
    PAGES.mkdir(exist_ok=True)
    for name, text in made.items():
        (PAGES / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
