"""The directory over which a program's init mounts its notify socket, inside: one that is there and that all can reach.

What is in it is hidden from the program. The supervisor's own run-time directory is the best place: nobody misses its
control socket inside. Where other users cannot get there, or there is none, it is an empty one made for the purpose.
"""

import os
import stat
import tempfile
from pathlib import Path

SHARED = Path("/run/nssup.notify")  # root's; empty and left there


class Place:
    """Finds the directory when it is first asked for; `close` removes one that was made for us alone."""

    def __init__(self, runtime_dir: str | None) -> None:
        self._runtime_dir = runtime_dir
        self._found: str | None = None
        self._made: str | None = None

    def directory(self) -> str:
        """Absolute. Raises OSError when there is none to be had."""
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> str:
        own, root = self._runtime_dir, os.geteuid() == 0
        if own is not None and (not root or _reachable(Path(own).parent)):
            return own
        if root and _shared():
            return str(SHARED)
        self._made = tempfile.mkdtemp(prefix="nssup-")
        os.chmod(self._made, 0o755)
        return self._made

    def close(self) -> None:
        if self._made is not None:
            os.rmdir(self._made)
            self._made = self._found = None


def _reachable(path: Path) -> bool:
    """Whether any user may pass through path and all above it."""
    return all(os.stat(place).st_mode & stat.S_IXOTH for place in (path, *path.parents))


def _shared() -> bool:
    try:
        SHARED.mkdir(mode=0o755, exist_ok=True)
        found = os.lstat(SHARED)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == 0
