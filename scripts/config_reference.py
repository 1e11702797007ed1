"""Writes the tables of docs/config.md from nssup/keys.py; --check only says whether they are up to date."""

import sys
from pathlib import Path

from nssup import keys

PAGE = Path(__file__).parent.parent / "docs" / "config.md"
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


def rows(table: dict[str, keys.Key]) -> list[str]:
    known = [(name, key, key.kind) for name, key in table.items()]
    later = ", ".join(f"`{name}`" for name, _, kind in known if kind is None)
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {kind.name} | {shown(key.default)} | {key.doc} |" for name, key, kind in known if kind]
    return [*lines, *(["", f"Not in this version: {later}."] if later else [])]


def shown(default: str) -> str:
    return default if not default or "`" in default or default.endswith(("'s", "own")) else f"`{default}`"


def tables() -> str:
    return "".join("\n".join([f"### {title}", "", *rows(table), "", ""]) for title, table in TABLES)


def page(text: str) -> str:
    """text with its tables as they should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + tables() + END + after


def main() -> int:
    text = PAGE.read_text()
    if "--check" in sys.argv:
        return int(text != page(text))
    PAGE.write_text(page(text))
    import manual  # the manual page has the same tables

    return manual.main()


if __name__ == "__main__":
    sys.exit(main())
