"""A superblock that was written and whose flush failed: whichever of two commits a power cut leaves, it is sound.

What is read back after a failed flush need not be durable.  As long as it is not, the blocks that only the other
superblock refers to must stay as they are.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from bufio import MemoryDevice
from bufio.testing import CrashDevice, CrashImage
from tests.support.pools import assert_sound, content_of
from thinpool import PoolMetadata, ThinDevice, ThinError

if TYPE_CHECKING:
    from tests.support.pools import Content

BLOCK = 4096
NR_METADATA_BLOCKS = 512
NR_DATA_BLOCKS = 10000
AFTER_SUPERBLOCK = 1
"""The second flush of a commit."""


def begun(seed: int = 0) -> tuple[CrashDevice, PoolMetadata, ThinDevice, Content, Content]:
    """A pool with hardly any cache and a transaction that frees much; what was committed, and what would be."""
    device = CrashDevice(NR_METADATA_BLOCKS * BLOCK)
    pool = PoolMetadata.format(device, 128, NR_DATA_BLOCKS, cache_bytes=1)
    pool.create_thin(0)
    thin = pool.open_thin_device(0)
    thin.provision(0, 3000)
    pool.commit()
    twin_device = MemoryDevice(device.contents())
    old = content_of(device.contents())
    thin.remove_range(0, 1500 + seed)
    with PoolMetadata.open(twin_device) as twin, twin.open_thin_device(0) as other:
        other.remove_range(0, 1500 + seed)
        twin.commit()
    return device, pool, thin, old, content_of(twin_device.contents())


def cuts(device: CrashDevice) -> list[CrashImage]:
    """What a power cut may leave now: the corners, torn writes, and some by chance."""
    return list(device.images(begin=device.position, exhaustive=3, samples=4, seed=device.position))


def is_all_durable(device: CrashDevice) -> bool:
    return len(cuts(device)) == 1


def assert_sound_when_stopped(device: CrashDevice) -> None:
    """All is durable, and sound."""
    assert is_all_durable(device)
    assert_sound(device)


def refuse(*_: object) -> None:
    raise OSError(errno.EIO, "write failed as told")


def work(pool: PoolMetadata, thin: ThinDevice) -> None:
    """More than the cache has room for, so that much of it is written early, to blocks that look free."""
    for block in range(5000, 6000):
        thin.insert_block(block * 7 % 100000, pool.alloc_data_block())


def assert_any_cut_is_sound(device: CrashDevice, *allowed: Content) -> None:
    """Whatever a power cut leaves is one of the commits."""
    for image in cuts(device):
        left = image.device()
        assert_sound(left)
        assert content_of(left.contents()) in allowed, image


def test_work_after_an_abort_spares_the_blocks_of_both_commits() -> None:
    """The abort found the new superblock, and let blocks be overwritten that the durable, old one still needed."""
    device, pool, thin, old, new = begun()
    device.fail_flushes(AFTER_SUPERBLOCK)
    with pytest.raises(ThinError) as caught:
        pool.commit()
    assert caught.value.errno == errno.EIO
    assert_any_cut_is_sound(device, old, new)
    pool.abort()
    assert_any_cut_is_sound(device, old, new)
    assert thin.mapped_count == len(new.mappings[0])
    work(pool, thin)
    assert not is_all_durable(device)
    assert_any_cut_is_sound(device, new)
    pool.commit()
    assert_sound_when_stopped(device)
    assert len(content_of(device.contents()).mappings[0]) == thin.mapped_count


def test_abort_that_cannot_flush_either_leaves_only_close() -> None:
    """Which superblock is durable stays unknown, so nothing more may be written at all."""
    device, pool, thin, old, new = begun()
    device.fail_flushes(*range(AFTER_SUPERBLOCK, 50))
    with pytest.raises(ThinError):
        pool.commit()
    with pytest.raises(ThinError) as caught:
        pool.abort()
    assert caught.value.errno == errno.EIO
    device.fail_flushes()
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
    device.fail_flushes(AFTER_SUPERBLOCK)
    with pytest.raises(ThinError):
        pool.commit()
    pool.set_read_only()
    position = device.position
    pool.abort()
    assert device.position == position
    refusal = pytest.MonkeyPatch()
    refusal.setattr(device, "pwritev", refuse)
    with pytest.raises(ThinError) as caught:
        pool.set_read_write()
    assert caught.value.errno == errno.EIO
    assert pool.is_read_only
    refusal.undo()
    pool.set_read_write()
    assert is_all_durable(device)
    work(pool, thin)
    assert_any_cut_is_sound(device, new)
    assert old.mappings[0].keys() > new.mappings[0].keys()
    pool.commit()
    assert_sound_when_stopped(device)


def test_second_abort_settles_what_an_interrupted_one_left_open() -> None:
    device, pool, thin, old, new = begun()
    device.fail_flushes(AFTER_SUPERBLOCK)
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
    device.fail_flushes(AFTER_SUPERBLOCK)
    with pytest.raises(ThinError):
        pool.commit()
    pool.abort()
    work(pool, thin)
    device.fail_flushes(AFTER_SUPERBLOCK)
    with pytest.raises(ThinError):
        pool.commit()
    newest = content_of(device.contents())
    assert_any_cut_is_sound(device, new, newest)
    pool.abort()
    thin.remove_range(0, 1 << 64)
    thin.provision(0, 500)
    assert_any_cut_is_sound(device, newest)
    assert old not in (new, newest)
