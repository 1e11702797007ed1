"""Writes the tables of docs/config.md from nssup/keys.py, and those of docs/sim.md from nssup/scenario.py; --check only
says whether they are up to date."""

import sys
from pathlib import Path

from nssup import keys, scenario

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- tables: scripts/config_reference.py -->\n", "<!-- end of tables -->\n"
TABLES = (
    ("Top level", keys.TOP),
    ("`[supervisor]`", keys.SUPERVISOR),
    ("`[supervisor.control]`", keys.CONTROL),
    ("`[supervisor.control.roles]`", keys.ROLES),
    ("`[pool.NAME]` and `[defaults]`", keys.POOL),
    ("`[pool.NAME.requires]`, of each other pool", keys.REQUIREMENT),
    ("`[pool.NAME.restart]`", keys.RESTART),
    ("`[pool.NAME.restart.backoff]`", keys.BACKOFF),
    ("`[pool.NAME.restart.intensity]`", keys.INTENSITY),
    ("`[[pool.NAME.restart.rules]]`", keys.RULE),
    ("`[pool.NAME.startup]`", keys.STARTUP),
    ("`[pool.NAME.ready]`", keys.READY),
    ("`[pool.NAME.live]`", keys.LIVE),
    ("`[pool.NAME.reload]`", keys.RELOAD),
    ("`[pool.NAME.limits]`", keys.LIMITS),
    ("`[pool.NAME.limits.rlimits]`", keys.RLIMITS),
    ("`[pool.NAME.log]`", keys.LOG),
    ("`[socket.NAME]`", keys.SOCKET),
)

SIM_TABLES = (
    ("Top level", scenario.TOP),
    ("`[[life]]`", scenario.LIFE),
    ("`[[step]]`", scenario.STEP),
    ("`[[expect]]`", scenario.EXPECT),
)
PAGES = {"config.md": TABLES, "sim.md": SIM_TABLES}


def rows(table: dict[str, keys.Key]) -> list[str]:
    known = [(name, key, key.kind) for name, key in table.items()]
    later = ", ".join(f"`{name}`" for name, _, kind in known if kind is None)
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {kind.name} | {shown(key.default)} | {key.doc} |" for name, key, kind in known if kind]
    return [*lines, *(["", f"Not in this version: {later}."] if later else [])]


def shown(default: str) -> str:
    return default if not default or "`" in default or default.endswith(("'s", "own")) else f"`{default}`"


def tables(of: tuple[tuple[str, dict[str, keys.Key]], ...]) -> str:
    return "".join("\n".join([f"### {title}", "", *rows(table), "", ""]) for title, table in of)


def page(text: str, of: tuple[tuple[str, dict[str, keys.Key]], ...]) -> str:
    """text with its tables as they should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + tables(of) + END + after


def main() -> int:
    stale = 0
    for name, of in PAGES.items():
        path = DOCS / name
        text = path.read_text()
        stale += text != page(text, of)
        if "--check" not in sys.argv:
            path.write_text(page(text, of))
    import manual  # the manual page has the same tables

    return int("--check" in sys.argv and stale > 0) or manual.main()


if __name__ == "__main__":
    sys.exit(main())
