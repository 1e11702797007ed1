"""Somebody who reads records as they come: bounded, and cut where he is too slow."""

import asyncio
from collections import deque
from collections.abc import Callable, Container

from nssup.lines import mark
from nssup.logread import timestamp


class Follower:
    """Records as they come: iterate over it for chunks of whole records, and close it.

    Who does not read is cut: beyond max_bytes nothing is kept for him; when he reads again, a mark of nssup's (stream
    `nssup`) stands where the records are missing. Iteration ends when either side closes.
    """

    def __init__(
        self,
        pools: frozenset[str] | None,
        workers: Container[str] | None,
        limit: int,
        leave: Callable[["Follower"], object],
    ) -> None:
        """leave: told once this follower is closed."""
        self._leave = leave
        self._pools = pools
        self._workers = workers
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._cut = 0  # bytes of records that could not be kept after _chunks
        self._cut_ts = ""
        self._closed = False
        self._reader: asyncio.Future[None] | None = None
        self.missed = 0  # bytes of records cut so far

    def follows(self, pool: str) -> bool:
        """Whether any records of that pool's workers are asked for."""
        return self._pools is None or pool in self._pools

    def offer(self, pool: str, worker_id: str | None, records: bytes, size: int) -> None:
        """Records of a pool's worker, or of no worker, of that many bytes; taken if they are asked for, and all are
        here."""
        if (worker_id is None) if self._pools is None else (pool not in self._pools):
            return
        if self._workers is not None and (worker_id is None or worker_id not in self._workers):
            return
        if len(records) < size or (self._chunks and self._size + size > self._limit):
            self._cut += size
            self.missed += size
            self._cut_ts = timestamp(records)
            self._wake()
            return
        self._mark_cut()
        self._chunks.append(records)
        self._size += len(records)
        self._wake()

    def _mark_cut(self) -> None:
        if self._cut:
            self._chunks.append(
                mark(self._cut_ts, None, None, f"{self._cut} bytes of log skipped: the reader is too slow")
            )
            self._size += len(self._chunks[-1])
            self._cut = 0

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def close(self) -> None:
        """Ends the iteration once what is here was read. May be called more than once."""
        self._closed = True
        self._leave(self)
        self._wake()

    def __aiter__(self) -> "Follower":
        return self

    async def __anext__(self) -> bytes:
        while True:
            if not self._chunks:
                self._mark_cut()
            if self._chunks:
                records = self._chunks.popleft()
                self._size -= len(records)
                return records
            if self._closed:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
