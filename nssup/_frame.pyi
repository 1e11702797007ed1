from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

RECORD_MOST: int

def frame(
    out: WriteableBuffer,
    position: int,
    data: ReadableBuffer,
    start: int,
    stop: int,
    head: bytes,
    offset: int,
    held: bytes,
    cut: bool,
    ending: bool,
    /,
) -> tuple[int, int, int, bytes, bool]: ...
def is_object(line: bytes, /) -> bool: ...
