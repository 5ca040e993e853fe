"""A superblock that was written and whose flush failed: whichever of two commits a power cut leaves, it is sound.

What is read back after a failed flush need not be durable.  As long as it is not, the blocks that only the other
superblock refers to must stay as they are.
"""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import pytest

from bufio import MemoryDevice
from tests.support.pools import assert_sound, content_of
from thinpool import PoolMetadata, ThinDevice, ThinError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bufio.device import ReadableBuffer
    from tests.support.pools import Content

BLOCK = 4096
NR_METADATA_BLOCKS = 512
NR_DATA_BLOCKS = 10000
AFTER_SUPERBLOCK = 1
"""The second flush of a commit."""


class CuttableDevice(MemoryDevice):
    """Keeps apart what is durable and what was written since; flushes numbered in ``failing`` are I/O errors."""

    def __init__(self, contents: int | ReadableBuffer) -> None:
        super().__init__(contents)
        self.durable = bytearray(self.contents())
        self.pending: list[tuple[int, bytes]] = []
        self.failing: set[int] = set()
        self.refusing = False
        """Writes are errors as well."""
        self._nr_flushes = 0

    def fail(self, *numbers: int) -> None:
        """Let flushes fail, counted from 0, the next one."""
        self.failing = {self._nr_flushes + number for number in numbers}

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        """Write, not durably."""
        if self.refusing:
            raise OSError(errno.EIO, "write failed as told")
        super().pwrite(data, offset)
        self.pending.append((offset, bytes(data)))

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        """Write several, each by itself."""
        for buffer in buffers:
            self.pwrite(buffer, offset)
            offset += memoryview(buffer).nbytes

    def flush(self) -> None:
        """Make durable, or fail and leave it open."""
        number = self._nr_flushes
        self._nr_flushes += 1
        if number in self.failing:
            raise OSError(errno.EIO, "flush failed as told")
        for offset, data in self.pending:
            self.durable[offset : offset + len(data)] = data
        self.pending.clear()

    def after_cut(self, lost: frozenset[int]) -> MemoryDevice:
        """What a power cut leaves when the pending writes of those numbers are lost."""
        image = bytearray(self.durable)
        for number, (offset, data) in enumerate(self.pending):
            if number not in lost:
                image[offset : offset + len(data)] = data
        return MemoryDevice(image)

    def cuts(self) -> Iterator[MemoryDevice]:
        """Images that a cut may leave: all, nothing, everything but the superblock, nothing but it, and by chance."""
        numbers = frozenset(range(len(self.pending)))
        superblock = frozenset(number for number in numbers if self.pending[number][0] == 0)
        chance = random.Random(len(numbers))
        subsets = [frozenset(n for n in numbers if chance.random() < 0.5) for _ in range(8)]
        for lost in (frozenset[int](), numbers, superblock, numbers - superblock, *subsets):
            yield self.after_cut(lost)


def begun(seed: int = 0) -> tuple[CuttableDevice, PoolMetadata, ThinDevice, Content, Content]:
    """A pool with hardly any cache and a transaction that frees much; what was committed, and what would be."""
    device = CuttableDevice(NR_METADATA_BLOCKS * BLOCK)
    pool = PoolMetadata.format(device, 128, NR_DATA_BLOCKS, cache_bytes=1)
    pool.create_thin(0)
    thin = pool.open_thin_device(0)
    thin.provision(0, 3000)
    pool.commit()
    old = content_of(device.contents())
    thin.remove_range(0, 1500 + seed)
    with PoolMetadata.open(MemoryDevice(device.durable)) as twin, twin.open_thin_device(0) as other:
        other.remove_range(0, 1500 + seed)
        twin.commit()
        new = content_of(twin._device.contents())  # type: ignore[attr-defined]
    return device, pool, thin, old, new


def work(pool: PoolMetadata, thin: ThinDevice) -> None:
    """More than the cache has room for, so that much of it is written early, to blocks that look free."""
    for block in range(5000, 6000):
        thin.insert_block(block * 7 % 100000, pool.alloc_data_block())


def assert_any_cut_is_sound(device: CuttableDevice, *allowed: Content) -> None:
    """Whatever a power cut leaves is one of the commits."""
    for image in device.cuts():
        assert_sound(image)
        assert content_of(image.contents()) in allowed


def test_work_after_an_abort_spares_the_blocks_of_both_commits() -> None:
    """The abort found the new superblock, and let blocks be overwritten that the durable, old one still needed."""
    device, pool, thin, old, new = begun()
    device.fail(AFTER_SUPERBLOCK)
    with pytest.raises(ThinError) as caught:
        pool.commit()
    assert caught.value.errno == errno.EIO
    assert_any_cut_is_sound(device, old, new)
    pool.abort()
    assert_any_cut_is_sound(device, old, new)
    assert thin.mapped_count == len(new.mappings[0])
    work(pool, thin)
    assert device.pending
    assert_any_cut_is_sound(device, new)
    pool.commit()
    assert_sound(MemoryDevice(device.durable))
    assert len(content_of(bytes(device.durable)).mappings[0]) == thin.mapped_count


def test_abort_that_cannot_flush_either_leaves_only_close() -> None:
    """Which superblock is durable stays unknown, so nothing more may be written at all."""
    device, pool, thin, old, new = begun()
    device.fail(*range(AFTER_SUPERBLOCK, 50))
    with pytest.raises(ThinError):
        pool.commit()
    with pytest.raises(ThinError) as caught:
        pool.abort()
    assert caught.value.errno == errno.EIO
    device.failing.clear()
    for call in (pool.abort, pool.commit, pool.devices, lambda: thin.provision(0, 1), lambda: pool.create_thin(1)):
        with pytest.raises(ThinError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    thin.close()
    pool.close()
    assert_any_cut_is_sound(device, old, new)


def test_read_only_pool_settles_the_superblock_when_it_may_write_again() -> None:
    """An abort in read-only mode may not write; what it left open is made up for before the first change."""
    device, pool, thin, old, new = begun()
    device.fail(AFTER_SUPERBLOCK)
    with pytest.raises(ThinError):
        pool.commit()
    pool.set_read_only()
    nr_pending = len(device.pending)
    pool.abort()
    assert len(device.pending) == nr_pending
    device.refusing = True
    with pytest.raises(ThinError) as caught:
        pool.set_read_write()
    assert caught.value.errno == errno.EIO
    assert pool.is_read_only
    device.refusing = False
    pool.set_read_write()
    assert not device.pending
    work(pool, thin)
    assert_any_cut_is_sound(device, new)
    assert old.mappings[0].keys() > new.mappings[0].keys()
    pool.commit()
    assert_sound(MemoryDevice(device.durable))


def test_second_abort_settles_what_an_interrupted_one_left_open() -> None:
    device, pool, thin, old, new = begun()
    device.fail(AFTER_SUPERBLOCK)
    with pytest.raises(ThinError):
        pool.commit()
    flush = device.flush

    def impatient() -> None:
        raise KeyboardInterrupt

    device.flush = impatient  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        pool.abort()
    device.flush = flush  # type: ignore[method-assign]
    assert_any_cut_is_sound(device, old, new)
    pool.abort()
    work(pool, thin)
    assert_any_cut_is_sound(device, new)


@pytest.mark.parametrize("seed", range(4))
def test_two_failed_flushes_in_a_row_leave_one_of_the_commits(seed: int) -> None:
    """A commit after the abort fails in the same way: now it is between that and the one before."""
    device, pool, thin, old, new = begun(seed)
    device.fail(AFTER_SUPERBLOCK)
    with pytest.raises(ThinError):
        pool.commit()
    pool.abort()
    work(pool, thin)
    device.fail(AFTER_SUPERBLOCK)
    with pytest.raises(ThinError):
        pool.commit()
    newest = content_of(device.contents())
    assert_any_cut_is_sound(device, new, newest)
    pool.abort()
    thin.remove_range(0, 1 << 64)
    thin.provision(0, 500)
    assert_any_cut_is_sound(device, newest)
    assert old not in (new, newest)
