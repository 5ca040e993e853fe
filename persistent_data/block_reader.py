"""Whole metadata blocks by number, from any device: range-checked, and in large reads where several are wanted.

For programs that read each block once.  There is no cache: memory is one window of :data:`WINDOW_BLOCKS` blocks.
"""

from __future__ import annotations

from mmap import mmap
from typing import TYPE_CHECKING

from persistent_data.layout import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bufio.device import Device

WINDOW_BLOCKS = 256
"""Blocks fetched by one read at most: 1 MiB."""
MAX_GAP = 16
"""Unwanted blocks between two wanted ones that are read through rather than skipped."""


class BlockReader:
    """Reads metadata blocks of *device*.

    :ivar nr_blocks: whole blocks on the device; a partial block at its end is out of reach
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.nr_blocks = device.size_bytes // BLOCK_SIZE
        # Anonymous maps begin at a page, as devices opened with O_DIRECT demand.
        self._window = memoryview(mmap(-1, WINDOW_BLOCKS * BLOCK_SIZE))

    def read(self, block: int) -> memoryview:
        """Return metadata block *block*; the view holds it until the next call of any method here.

        :raises OSError: the device cannot read it
        :raises ValueError: the device has no such block
        """
        if not 0 <= block < self.nr_blocks:
            raise ValueError(f"block {block} is outside the device of {self.nr_blocks} blocks")
        view = self._window[:BLOCK_SIZE]
        self.device.readinto(view, block * BLOCK_SIZE)
        return view

    def read_many(self, blocks: Sequence[int]) -> Iterator[tuple[int, memoryview | OSError]]:
        """Yield (number, content) for each of *blocks*, which ascend, all of them on the device.

        A view holds its block until the iterator moves on.  A block that cannot be read comes with the error in place
        of its content, and does not keep its neighbours from being read.
        """
        window = self._window
        start = 0
        while start < len(blocks):
            first = blocks[start]
            end = start + 1
            last = first
            while end < len(blocks) and blocks[end] - last <= MAX_GAP and blocks[end] - first < WINDOW_BLOCKS:
                last = blocks[end]
                end += 1
            try:
                self.device.readinto(window[: (last - first + 1) * BLOCK_SIZE], first * BLOCK_SIZE)
            except OSError:
                yield from self._one_by_one(blocks[start:end])
            else:
                for block in blocks[start:end]:
                    offset = (block - first) * BLOCK_SIZE
                    yield block, window[offset : offset + BLOCK_SIZE]
            start = end

    def _one_by_one(self, blocks: Sequence[int]) -> Iterator[tuple[int, memoryview | OSError]]:
        for block in blocks:
            try:
                yield block, self.read(block)
            except OSError as error:
                yield block, error

    def read_in_order(self, blocks: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Yield (number, copy of the content) for each of *blocks*, in the order given, reading up to a window ahead.

        :raises OSError: the device cannot read a block
        """
        batch: list[int] = []
        for block in blocks:
            batch.append(block)
            if len(batch) == WINDOW_BLOCKS:
                yield from self._batch(batch)
                batch = []
        yield from self._batch(batch)

    def _batch(self, batch: list[int]) -> Iterator[tuple[int, bytes]]:
        found: dict[int, bytes] = {}
        for block, content in self.read_many(sorted(set(batch))):
            if isinstance(content, OSError):
                raise content
            found[block] = bytes(content)
        for block in batch:
            yield block, found[block]
