"""Devices in memory: a large one that takes little room, and one that fails as it is told."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from bufio import MemoryDevice
from bufio.testing import FaultyDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bufio.device import ReadableBuffer, WritableBuffer

BLOCK_SIZE = 4096


class SparseDevice:
    """A large device in memory that takes room only for the blocks that were written; whole blocks only."""

    name = "sparse"
    read_only = False

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.blocks: dict[int, bytes] = {}

    def grow(self, size_bytes: int) -> None:
        """Make the device larger, with zeros."""
        self.size_bytes = size_bytes

    def readinto(self, buffer: WritableBuffer, offset: int) -> None:
        """Read one block."""
        memoryview(buffer)[:] = self.blocks.get(offset // BLOCK_SIZE, bytes(BLOCK_SIZE))

    def preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        """Read neighbouring blocks."""
        for at, buffer in enumerate(buffers):
            self.readinto(buffer, offset + at * BLOCK_SIZE)

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        """Write one block."""
        block = bytes(data)
        assert len(block) == BLOCK_SIZE
        assert offset % BLOCK_SIZE == 0
        assert offset < self.size_bytes
        self.blocks[offset // BLOCK_SIZE] = block

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        """Write neighbouring blocks."""
        for at, buffer in enumerate(buffers):
            self.pwrite(buffer, offset + at * BLOCK_SIZE)

    def flush(self) -> None:
        """Do nothing."""

    def discard(self, offset: int, length: int) -> None:
        """Refuse, as some devices do."""
        raise OSError(errno.EOPNOTSUPP, "cannot discard", self.name)

    def close(self) -> None:
        """Do nothing."""


class FaultyMemory(FaultyDevice[MemoryDevice]):
    """Memory that fails as it is told, without the words in between."""

    def __init__(self, contents: int | ReadableBuffer, *, seed: int = 0) -> None:
        super().__init__(MemoryDevice(contents), seed=seed)

    def contents(self) -> bytes:
        """Return a copy of everything on the device, whatever the rules."""
        return self.inner.contents()

    def grow(self, size_bytes: int) -> None:
        """Make the device larger, with zeros."""
        self.inner.grow(size_bytes)

    def ops(self, kind: str) -> list[tuple[int, int]]:
        """Offset and length of the calls of one kind so far."""
        return [(call.offset, call.length) for call in self.log if call.kind == kind]
