"""Metadata blocks by the hundred: read in few transfers, and handed out as the rows of one array.

Only for programs with thousands of blocks to read: importing numpy takes as long as checking 1,500 nodes one by one.
"""

from __future__ import annotations

from itertools import pairwise
from mmap import mmap
from typing import TYPE_CHECKING

import numpy as np

from persistent_data.block_reader import MAX_GAP, WINDOW_BLOCKS
from persistent_data.checksum import crc32c, xor_of
from persistent_data.layout import BLOCK_SIZE, CHECKSUM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from bufio.device import Device

    Words = NDArray[np.uint64]
    Numbers = NDArray[np.int64]
    Flags = NDArray[np.bool_]


class NotClean(Exception):
    """Something is wrong, or merely unusual, at or below metadata block *block*; the plain code knows what."""

    def __init__(self, block: int) -> None:
        super().__init__(f"metadata block {block}")
        self.block = block


def require(clean: Flags, blocks: Numbers) -> None:
    """Raise :class:`NotClean` for the first of *blocks* that is not *clean*."""
    if not clean.all():
        raise NotClean(int(blocks[clean.argmin()]))


class Window:
    """Room for blocks, one in each row.

    :ivar rows: u1, shape (WINDOW_BLOCKS, 4096)
    """

    def __init__(self) -> None:
        # Anonymous maps begin at a page, as devices opened with O_DIRECT demand.
        self._memory = memoryview(mmap(-1, WINDOW_BLOCKS * BLOCK_SIZE))
        self._covered = [
            self._memory[row * BLOCK_SIZE + CHECKSUM.size : (row + 1) * BLOCK_SIZE] for row in range(WINDOW_BLOCKS)
        ]
        """What the checksum of each row is of."""
        self.rows = np.frombuffer(self._memory, np.uint8).reshape(WINDOW_BLOCKS, BLOCK_SIZE)

    def buffer(self, begin: int, end: int) -> memoryview:
        """Return the rows *begin* to *end* - 1 as one buffer."""
        return self._memory[begin * BLOCK_SIZE : end * BLOCK_SIZE]

    def checksums(self, count: int, salt: int) -> NDArray[np.uint32]:
        """Return the checksums that the first *count* rows must carry if they are of the kind of *salt*."""
        checksums = np.fromiter(map(crc32c, self._covered[:count]), np.uint32, count)
        checksums ^= np.uint32(xor_of(salt))
        return checksums


class BlockBatches:
    """Reads blocks of *device*, up to :data:`~persistent_data.block_reader.WINDOW_BLOCKS` of them at a time.

    Memory: one window of a mebibyte, or two.

    :param ahead: read the next window in a thread of its own while the present one is looked at.  Blocks are then read
        for one purpose at a time: an iteration ends before the next one begins
    :ivar nr_blocks: whole blocks on the device
    :ivar windows: where blocks are read to
    """

    def __init__(self, device: Device, *, ahead: bool = False) -> None:
        self.device = device
        self.nr_blocks = device.size_bytes // BLOCK_SIZE
        self.windows = [Window() for _ in range(2 if ahead else 1)]
        self._gap = memoryview(mmap(-1, MAX_GAP * BLOCK_SIZE))
        """Where unwanted blocks are read to."""

    def fetch(self, blocks: Numbers) -> Iterator[tuple[int, Numbers, int]]:
        """Read *blocks* in the order given, a windowful at a time.

        The device is read in ascending order within a window, so ascending *blocks* are read in ascending order.

        :return: for each windowful how many blocks came before, which are in the rows, and the number of the window
        :raises NotClean: one of them is outside the device, cannot be read, or is asked for twice in a window
        """
        parts = [blocks[begin : begin + WINDOW_BLOCKS] for begin in range(0, len(blocks), WINDOW_BLOCKS)]
        if len(self.windows) > 1 and len(parts) > 1:
            yield from self._fetch_ahead(parts)
            return
        for number, part in enumerate(parts):
            self._fill(self.windows[0], part)
            yield number * WINDOW_BLOCKS, part, 0

    def _fetch_ahead(self, parts: list[Numbers]) -> Iterator[tuple[int, Numbers, int]]:
        """Fetch *parts*, each while the one before is looked at."""
        # Here, because who has no thread shall not wait for them to be loaded.
        from queue import SimpleQueue
        from threading import Thread

        wanted: SimpleQueue[tuple[Window, Numbers] | None] = SimpleQueue()
        outcomes: SimpleQueue[BaseException | None] = SimpleQueue()

        def work() -> None:
            while (job := wanted.get()) is not None:
                try:
                    self._fill(*job)
                except BaseException as error:  # whatever it is belongs to whoever waits for the blocks
                    outcomes.put(error)
                else:
                    outcomes.put(None)

        thread = Thread(target=work, name="read ahead", daemon=True)
        thread.start()
        try:
            wanted.put((self.windows[0], parts[0]))
            for number, part in enumerate(parts):
                error = outcomes.get()
                if error is not None:
                    raise error
                if number + 1 < len(parts):
                    wanted.put((self.windows[(number + 1) % 2], parts[number + 1]))
                yield number * WINDOW_BLOCKS, part, number % 2
        finally:
            wanted.put(None)
            thread.join()

    def _fill(self, window: Window, blocks: Numbers) -> None:
        """Read *blocks*, at most as many as *window* has rows, each to its row."""
        order = np.argsort(blocks)
        ascending = blocks[order]
        if ascending[0] < 0 or ascending[-1] >= self.nr_blocks:
            raise NotClean(int(ascending[0] if ascending[0] < 0 else ascending[-1]))
        steps = np.diff(ascending)
        if not steps.all():
            raise NotClean(int(ascending[steps.argmin()]))
        # Stretches of neighbours that go to neighbouring rows; several of them, and the gaps between, are one read.
        breaks = np.flatnonzero((steps != 1) | (np.diff(order) != 1)) + 1
        buffers: list[memoryview] = []
        start = following = 0
        for begin, end in pairwise([0, *breaks.tolist(), len(blocks)]):
            first, row = int(ascending[begin]), int(order[begin])
            gap = first - following
            if buffers and gap > MAX_GAP:
                self._read(buffers, start)
                buffers = []
            if not buffers:
                start = first
            elif gap:
                buffers.append(self._gap[: gap * BLOCK_SIZE])
            buffers.append(window.buffer(row, row + end - begin))
            following = first + end - begin
        self._read(buffers, start)

    def _read(self, buffers: list[memoryview], block: int) -> None:
        try:
            if len(buffers) == 1:
                self.device.readinto(buffers[0], block * BLOCK_SIZE)
            else:
                self.device.preadv(buffers, block * BLOCK_SIZE)
        except OSError as error:
            raise NotClean(block) from error
