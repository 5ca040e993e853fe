"""A device in memory that writes down what is asked of it, and does what a script says: fail, wait, count."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from bufio import MemoryDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


class Op(NamedTuple):
    """One call of the device; a vectored one is one."""

    kind: str
    """``read``, ``write``, ``flush`` or ``discard``."""
    offset: int = 0
    length: int = 0

    def covers(self, block: int) -> bool:
        """Whether any byte of metadata block *block* is concerned."""
        return self.offset < (block + 1) * BLOCK_SIZE and block * BLOCK_SIZE < self.offset + self.length


class ScriptedDevice(MemoryDevice):
    """``log`` has every call; ``script`` sees each of them before it is done, and may raise or wait."""

    def __init__(self, contents: int | ReadableBuffer, name: str = "scripted") -> None:
        super().__init__(contents, name)
        self.log: list[Op] = []
        self.script: Callable[[Op], None] | None = None

    def _ask(self, kind: str, offset: int = 0, length: int = 0) -> None:
        op = Op(kind, offset, length)
        self.log.append(op)
        if self.script is not None:
            self.script(op)

    def ops(self, kind: str) -> list[tuple[int, int]]:
        """Offset and length of the calls of one kind so far."""
        return [(op.offset, op.length) for op in self.log if op.kind == kind]

    def readinto(self, buffer: WritableBuffer, offset: int) -> None:
        """Read, as the script allows."""
        self._ask("read", offset, memoryview(buffer).nbytes)
        super().readinto(buffer, offset)

    def preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        """Read into several buffers, as the script allows."""
        self._ask("read", offset, sum(memoryview(b).nbytes for b in buffers))
        for buffer in buffers:
            super().readinto(buffer, offset)
            offset += memoryview(buffer).nbytes

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        """Write, as the script allows."""
        self._ask("write", offset, memoryview(data).nbytes)
        super().pwrite(data, offset)

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        """Write several buffers, as the script allows."""
        self._ask("write", offset, sum(memoryview(b).nbytes for b in buffers))
        for buffer in buffers:
            super().pwrite(buffer, offset)
            offset += memoryview(buffer).nbytes

    def flush(self) -> None:
        """Flush, as the script allows."""
        self._ask("flush")

    def discard(self, offset: int, length: int) -> None:
        """Discard, as the script allows."""
        self._ask("discard", offset, length)
        super().discard(offset, length)


def fail_at(kind: str, number: int) -> Callable[[Op], None]:
    """A script: call *number* of that kind, counted from 0, is an I/O error, the others are done."""
    left = number

    def script(op: Op) -> None:
        nonlocal left
        if op.kind == kind:
            left -= 1
            if left == -1:
                raise OSError(errno.EIO, f"{kind} {number} failed as told")

    return script


def fail_from(kind: str, number: int) -> Callable[[Op], None]:
    """A script: call *number* of that kind, counted from 0, is an I/O error, and so are all that follow."""
    left = number

    def script(op: Op) -> None:
        nonlocal left
        if op.kind == kind:
            left -= 1
            if left < 0:
                raise OSError(errno.EIO, f"{kind} {number} failed as told")

    return script


def fail_blocks(kind: str, *blocks: int) -> Callable[[Op], None]:
    """A script: calls of that kind that concern one of *blocks* are I/O errors, as often as they come."""

    def script(op: Op) -> None:
        if op.kind == kind and any(op.covers(block) for block in blocks):
            raise OSError(errno.EIO, f"{kind} of {blocks} failed as told")

    return script


def fail_all(kind: str) -> Callable[[Op], None]:
    """A script: every call of that kind is an I/O error."""

    def script(op: Op) -> None:
        if op.kind == kind:
            raise OSError(errno.EIO, f"{kind} failed as told")

    return script
