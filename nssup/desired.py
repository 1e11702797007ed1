"""What an operator wants for good, whatever the config says and across reboots: STATE_DIR/desired.json.

    {"version": 1, "pools": {"web": {"scale": 5, "enabled": false}}}

`scale`: how many workers `ctl scale` asked for. `enabled`: what `ctl enable` and `ctl disable` said. Written only when
an operator changes it: to a file beside it that is synced and takes its place, so that at every instant the one or the
other is there whole.
`start` and `stop` are for now, not for good: they are in the notes of lives (lives.py).
"""

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec.structs import replace

from nssup.errors import errno_name
from nssup.spec import PoolSpec

VERSION = 1
MOST_WORKERS = 100_000


class _Pool(msgspec.Struct):
    scale: Annotated[int, msgspec.Meta(ge=0, le=MOST_WORKERS)] | None = None
    enabled: bool | None = None


class _File(msgspec.Struct):
    """Pools as they were written, so that what a later version put there is kept."""

    version: int
    pools: dict[str, dict[str, Any]] = {}


class Desired:
    """The file, read once. strange: lines on what could not be read and was set aside; then nothing is desired."""

    def __init__(self, path: Path, epoch: int) -> None:
        """epoch: a number for the name of what is set aside, never used before. Never raises for what is there."""
        self.path = path
        self._pools: dict[str, dict[str, Any]] = {}
        self.strange: list[str] = []
        try:
            self._pools = _decode(path.read_bytes())
        except FileNotFoundError:
            pass
        except OSError as error:
            self.strange.append(f"{path} cannot be read: {errno_name(error.errno or 0)}; the config counts")
        except (msgspec.MsgspecError, ValueError) as error:
            self._set_aside(epoch, str(error))

    def _set_aside(self, epoch: int, why: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.bad-{epoch}")
        try:
            self.path.rename(aside)
            what = f"set aside as {aside.name}"
        except OSError as error:
            what = f"left in place: {errno_name(error.errno or 0)}"
        self.strange.append(f"{self.path} means nothing ({why}): {what}; the config counts")

    def applied_to(self, spec: PoolSpec) -> PoolSpec:
        """A pool of the config, as an operator wants it."""
        workers, enabled = self.scale(spec.name), self.enabled(spec.name)
        return replace(
            spec,
            workers=spec.workers if workers is None else workers,
            enabled=spec.enabled if enabled is None else enabled,
        )

    def scale(self, pool: str) -> int | None:
        """How many workers an operator asked for; None: as the config says."""
        found: int | None = self._pools.get(pool, {}).get("scale")
        return found

    def enabled(self, pool: str) -> bool | None:
        """Whether an operator wants the pool started with the supervisor; None: as the config says."""
        found: bool | None = self._pools.get(pool, {}).get("enabled")
        return found

    def set_scales(self, wanted: Mapping[str, int | None]) -> None:
        """Keep these numbers; None: as the config says again. Raises OSError, and then nothing is changed."""
        self._set("scale", wanted)

    def set_enabled(self, wanted: Mapping[str, bool | None]) -> None:
        """Keep these words; None: as the config says again. Raises OSError, and then nothing is changed."""
        self._set("enabled", wanted)

    def _set(self, field: str, wanted: Mapping[str, int | None]) -> None:
        pools = {name: dict(entry) for name, entry in self._pools.items()}
        for name, value in wanted.items():
            entry = pools.setdefault(name, {})
            if value is None:
                entry.pop(field, None)
            else:
                entry[field] = value
        self._replace({name: entry for name, entry in pools.items() if entry})

    def all(self) -> dict[str, dict[str, Any]]:
        """Everything, for `set_all`."""
        return self._pools

    def set_all(self, pools: dict[str, dict[str, Any]]) -> None:
        """Have it as it was. Raises OSError, and then nothing is changed."""
        self._replace(pools)

    def keep_only(self, pools: Collection[str]) -> None:
        """Forget what was desired of other pools. Raises OSError, and then nothing is changed."""
        self._replace({name: entry for name, entry in self._pools.items() if name in pools})

    def _replace(self, pools: dict[str, dict[str, Any]]) -> None:
        if pools == self._pools:
            return
        document = msgspec.json.encode({"version": VERSION, "pools": dict(sorted(pools.items()))})
        write_durably(self.path, msgspec.json.format(document) + b"\n")
        self._pools = pools


def _decode(data: bytes) -> dict[str, dict[str, Any]]:
    """Raises MsgspecError, ValueError."""
    found = msgspec.json.decode(data, type=_File)
    if found.version != VERSION:
        raise ValueError(f"version {found.version}, and this nssup knows version {VERSION}")
    msgspec.convert(found.pools, dict[str, _Pool])
    return found.pools


def write_durably(path: Path, data: bytes) -> None:
    """path holds data, also after a power cut; or what it held before, and OSError."""
    fresh = path.with_name(f"{path.name}.new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Where a file system cannot, the new name is as durable as it gets."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
