"""What `nssup ctl` shows of real workers: settings, environment, processes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from live import Up, needs_namespaces, nssup

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_namespaces

POOL = """
[pool.web]
command = ["sh", "-c", "sleep 1000 & exec sleep 1001"]
env = { TOKEN = "hush", SHOWN = "{index}" }
restart.settle = "2s"
"""


def test_show_env_tree_stats(tmp_path: Path) -> None:
    with Up(tmp_path, POOL) as up:

        def ctl(*words: str) -> str:
            done = nssup("ctl", *words, "--socket", str(up.socket))
            assert (done.code, done.err) == (0, "")
            return done.out

        ctl("wait", "web", "--for", "running")
        line = next(n for n, text in enumerate(up.config.read_text().splitlines(), 1) if "settle" in text)
        assert 'restart.settle = "2s"' in ctl("show", "web")
        assert f"# {up.config}:{line}\n" in ctl("show", "web")
        (worker,) = json.loads(ctl("env", "web/0", "--json"))["workers"]
        found = {v["name"]: (v["value"], v["origin"].rpartition(":")[0]) for v in worker["env"]}
        assert found["TOKEN"] == ("******", str(up.config))
        assert found["SHOWN"] == ("0", str(up.config))
        assert found["NSSUP_ID"] == ("web/0", "")
        (status,) = json.loads(ctl("status", "web", "--json"))["workers"]
        (tree,) = json.loads(ctl("tree", "web", "--json"))["workers"]
        processes = {p["ns_pid"]: p for p in tree["processes"]}
        assert processes[1]["host_pid"] == status["init_host_pid"]
        assert (processes[2]["host_pid"], processes[2]["parent_host_pid"]) == (
            status["host_pid"],
            status["init_host_pid"],
        )
        assert len(processes) == 3
        (stats,) = json.loads(ctl("stats", "web", "--json"))["workers"]
        assert stats["processes"] == 3
        assert stats["memory_bytes"] > 0
        child = next(p for p in processes.values() if p["command"] == "sleep 1000")
        assert ctl("kill", "web/0", "--ns-pid", str(child["ns_pid"]), "-s", "KILL") == ""
        while "sleep 1000" in (seen := ctl("tree", f"host:{status['host_pid']}")):
            pass
        assert "<defunct>" in seen, "nobody reaps it but its parent, which does not"
        assert json.loads(ctl("status", "web", "--json"))["workers"][0]["host_pid"] == status["host_pid"]
        up.end()
