"""Bcache where a script of tests/unit/bufio/cache_scripts/bcache cannot say it: errors, threads, ends, figures."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from bufio import AsyncEngine, Bcache, BlocksNotWritten, GetFlags, HoldError, SyncEngine, WouldDeadlock, parameters
from tests.support.bufio import NR_BLOCKS, SIZE, allocated_bytes, content, on_device, result_of, wait_until
from tests.support.devices import FaultyMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bufio.engine import Engine
    from tests.support.bufio import Threads

SECTORS = SIZE // 512
NR_CACHED = 12

ENGINES = {"synchronous": SyncEngine, "asynchronous": AsyncEngine}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = ENGINES[request.param]()
    yield engine
    engine.close()


@pytest.fixture
def cache(engine: Engine) -> Bcache:
    return Bcache(SECTORS, NR_CACHED, engine)


@pytest.fixture
def other() -> FaultyMemory:
    return FaultyMemory(b"".join(content(block + 100) for block in range(NR_BLOCKS)))


def change(cache: Bcache, device: FaultyMemory, index: int, value: int, flags: int = GetFlags.ZERO) -> None:
    block = cache.get(device, index, flags)
    block.data[:] = bytes([value]) * SIZE
    block.put()


def look(cache: Bcache, device: FaultyMemory, index: int) -> int:
    block = cache.get(device, index)
    try:
        assert block.data == bytes([block.data[0]]) * SIZE
        return block.data[0]
    finally:
        block.put()


@pytest.mark.parametrize(("sectors", "blocks"), [(0, 4), (-8, 4), (8, 0), (8, -1)])
def test_impossible_size_is_refused(sectors: int, blocks: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Bcache(sectors, blocks)


def test_memory_is_taken_at_the_beginning_and_given_back_at_the_end(device: FaultyMemory) -> None:
    before = allocated_bytes()
    cache = Bcache(SECTORS, NR_CACHED)
    taken = parameters.current_allocated_bytes - before
    assert taken >= NR_CACHED * SIZE
    for index in range(NR_BLOCKS):
        look(cache, device, index)
    assert parameters.current_allocated_bytes - before == taken
    assert cache.stats.cached == NR_CACHED == cache.nr_cache_blocks
    cache.close()
    assert parameters.current_allocated_bytes == before


def test_devices_share_the_blocks_and_keep_their_contents(
    cache: Bcache, device: FaultyMemory, other: FaultyMemory
) -> None:
    for index in range(NR_BLOCKS):
        change(cache, device, index, index + 50)
        change(cache, other, index, index + 120)
    for index in range(NR_BLOCKS):
        assert look(cache, device, index) == index + 50
        assert look(cache, other, index) == index + 120
    cache.close()
    assert [on_device(device, index) for index in range(NR_BLOCKS)] == [index + 50 for index in range(NR_BLOCKS)]
    assert [on_device(other, index) for index in range(NR_BLOCKS)] == [index + 120 for index in range(NR_BLOCKS)]


def test_block_knows_where_it_belongs(cache: Bcache, device: FaultyMemory) -> None:
    block = cache.get(device, 5)
    assert (block.device, block.index, block.hold_count) == (device, 5, 1)
    block.put()


# Holding


@pytest.mark.parametrize("first", [0, GetFlags.DIRTY, GetFlags.ZERO])
@pytest.mark.parametrize("second", [0, GetFlags.DIRTY, GetFlags.ZERO])
def test_only_readers_share(cache: Bcache, device: FaultyMemory, first: int, second: int) -> None:
    block = cache.get(device, 5, first)
    before = bytes(block.data)
    if first or second:
        with pytest.raises(HoldError, match="block 5 of memory is held for " + ("changing" if first else "reading")):
            cache.get(device, 5, second)
        assert block.data == before
    else:
        assert cache.get(device, 5, second) is block
        block.put()
    block.put()
    with pytest.raises(HoldError, match="more often"):
        block.put()


def test_refusal_is_the_same_in_another_thread(cache: Bcache, device: FaultyMemory, threads: Threads) -> None:
    block = cache.get(device, 5, GetFlags.DIRTY)
    with pytest.raises(HoldError):
        result_of(threads.submit(cache.get, device, 5))
    block.put()
    result_of(threads.submit(look, cache, device, 5))


def test_block_may_be_held_for_changing_again_when_it_was_put(cache: Bcache, device: FaultyMemory) -> None:
    for value in (1, 2, 3):
        change(cache, device, 5, value, GetFlags.DIRTY)
    assert look(cache, device, 5) == 3


def test_block_being_written_is_not_handed_out_for_changing(device: FaultyMemory, threads: Threads) -> None:
    with AsyncEngine() as engine, Bcache(SECTORS, NR_CACHED, engine) as cache:
        gate = device.on("write").gate()
        for index in range(NR_CACHED):
            change(cache, device, index, 7)
        gate.wait_for(1)
        changing = threads.submit(change, cache, device, 0, 8, GetFlags.DIRTY)
        reading = threads.submit(look, cache, device, 0)
        assert result_of(reading) == 7
        wait_until(lambda: cache.stats.waits > 0)
        assert not changing.done()
        gate.open()
        result_of(changing)
        assert look(cache, device, 0) == 8


def test_cache_with_every_block_held_says_so(cache: Bcache, device: FaultyMemory) -> None:
    held = [cache.get(device, index) for index in range(NR_CACHED)]
    with pytest.raises(WouldDeadlock) as caught:
        cache.get(device, 40)
    assert caught.value.blocks == tuple(range(NR_CACHED))
    held.pop().put()
    cache.get(device, 40).put()
    for block in held:
        block.put()


def test_get_waits_for_another_thread_to_put(cache: Bcache, device: FaultyMemory, threads: Threads) -> None:
    held = [cache.get(device, index) for index in range(NR_CACHED)]
    getting = threads.submit(look, cache, device, 40)
    wait_until(lambda: cache.stats.waits > 0)
    assert not getting.done()
    held.pop().put()
    assert result_of(getting) == content(40)[0]
    for block in held:
        block.put()


# Reading


def test_concurrent_gets_cause_one_read(cache: Bcache, device: FaultyMemory, threads: Threads) -> None:
    gate = device.on("read").gate()
    readers = [threads.submit(look, cache, device, 5) for _ in range(6)]
    gate.wait_for(1)
    wait_until(lambda: cache.stats.waits == 5)
    gate.open()
    assert [result_of(reader) for reader in readers] == [content(5)[0]] * 6
    assert device.ops("read") == [(5 * SIZE, SIZE)]


def test_failed_read_leaves_nothing_behind(cache: Bcache, device: FaultyMemory) -> None:
    device.on("read", times=1).fail()
    with pytest.raises(OSError, match="read") as caught:
        cache.get(device, 5)
    assert caught.value.errno == errno.EIO
    assert cache.stats.cached == 0
    assert look(cache, device, 5) == content(5)[0]
    for index in range(NR_CACHED):
        cache.get(device, index)  # every one of the blocks is there to be had


def test_failed_prefetch_is_tried_again_by_get(cache: Bcache, device: FaultyMemory) -> None:
    device.on("read", times=1).fail()
    cache.prefetch(device, 5)
    assert look(cache, device, 5) == content(5)[0]


@pytest.mark.parametrize("index", [-1, NR_BLOCKS])
def test_block_that_the_device_does_not_have(cache: Bcache, device: FaultyMemory, index: int) -> None:
    for flags in (0, GetFlags.ZERO):
        with pytest.raises(OSError, match=f"block {index} is beyond the end") as caught:
            cache.get(device, index, flags)
        assert caught.value.errno == errno.EIO
    cache.prefetch(device, index)
    assert cache.stats.prefetches == 0


def test_prefetch_returns_while_the_device_reads(device: FaultyMemory) -> None:
    with AsyncEngine() as engine, Bcache(SECTORS, NR_CACHED, engine) as cache:
        gate = device.on("read").gate()
        for index in (1, 3, 5):
            cache.prefetch(device, index)
        gate.wait_for(3)
        gate.open()
        assert [look(cache, device, index) for index in (1, 3, 5)] == [content(index)[0] for index in (1, 3, 5)]
        assert len(device.ops("read")) == 3


def test_no_more_reads_ahead_are_in_flight_than_allowed(device: FaultyMemory) -> None:
    with AsyncEngine() as engine, Bcache(SECTORS, NR_CACHED, engine) as cache:
        cache.max_prefetches = 4
        gate = device.on("read").gate()
        for index in range(0, 20, 2):
            cache.prefetch(device, index)
        gate.wait_for(4)
        assert cache.stats.prefetches == 4
        gate.open()
        for index in range(0, 20, 2):
            assert look(cache, device, index) == content(index)[0]


def test_prefetch_evicts_nothing_that_is_held_or_dirty(cache: Bcache, device: FaultyMemory) -> None:
    held = [cache.get(device, index, GetFlags.DIRTY if index % 2 else 0) for index in range(NR_CACHED)]
    cache.prefetch(device, 40)
    assert cache.stats.prefetches == 0
    for block in held:
        block.put()


# The end of the device


@pytest.mark.parametrize("tail", [512, 1536, SIZE - 512])
def test_last_block_may_be_cut_short(engine: Engine, tail: int) -> None:
    """What is beyond the end reads as zeros, is not written, and the device is not made larger."""
    device = FaultyMemory(bytes([9]) * (3 * SIZE + tail))
    with Bcache(SECTORS, NR_CACHED, engine) as cache:
        block = cache.get(device, 3, GetFlags.DIRTY)
        assert block.data == bytes([9]) * tail + bytes(SIZE - tail)
        block.data[:] = bytes([8]) * SIZE
        block.put()
        change(cache, device, 2, 7)
    assert device.contents() == bytes([9]) * 2 * SIZE + bytes([7]) * SIZE + bytes([8]) * tail
    with Bcache(SECTORS, NR_CACHED, engine) as cache:
        cache.prefetch(device, 3)
        assert cache.read_bytes(device, 3 * SIZE, tail) == bytes([8]) * tail
        with pytest.raises(OSError, match="beyond the end"):
            cache.read_bytes(device, 3 * SIZE, tail + 1)
        device.log.clear()
        cache.write_bytes(device, 3 * SIZE, bytes([6]) * tail)
        assert device.ops("read") == [], "all there is of the block was written"
    assert device.contents()[3 * SIZE :] == bytes([6]) * tail


def test_incomplete_sector_of_a_direct_device_is_beyond_its_end(engine: Engine) -> None:
    """With O_DIRECT its transfer is EINVAL."""

    class DirectDevice(FaultyMemory):
        direct = True

    device = DirectDevice(bytes([9]) * (SIZE + 1024 + 100))
    with Bcache(SECTORS, NR_CACHED, engine) as cache:
        change(cache, device, 1, 8)
        with pytest.raises(OSError, match="beyond the end"):
            cache.read_bytes(device, SIZE + 1024, 1)
    assert device.contents() == bytes([9]) * SIZE + bytes([8]) * 1024 + bytes([9]) * 100


def test_size_is_looked_at_again_when_the_device_was_given_up(cache: Bcache) -> None:
    device = FaultyMemory(bytes(SIZE + 512))
    change(cache, device, 1, 5)
    assert cache.invalidate_device(device)
    device.grow(3 * SIZE)
    assert cache.read_bytes(device, SIZE, 1024) == bytes([5]) * 512 + bytes(512)
    change(cache, device, 2, 6)
    cache.close()
    assert device.contents()[2 * SIZE :] == bytes([6]) * SIZE


# Writing


def test_flush_makes_durable_what_it_wrote(cache: Bcache, device: FaultyMemory, other: FaultyMemory) -> None:
    change(cache, device, 1, 5)
    look(cache, other, 1)
    assert cache.flush() == []
    assert [call.kind for call in device.log] == ["write", "flush"]
    assert [call.kind for call in other.log] == ["read"], "nothing was written there"


def test_flush_skips_what_is_held_and_says_so(cache: Bcache, device: FaultyMemory) -> None:
    change(cache, device, 1, 5)
    held = cache.get(device, 2, GetFlags.ZERO)
    assert cache.flush() == [held]
    assert (on_device(device, 1), on_device(device, 2)) == (5, content(2)[0])
    held.put()
    assert cache.flush() == []
    assert on_device(device, 2) == 0


def test_blocks_in_error_are_named_kept_and_tried_again(
    cache: Bcache, device: FaultyMemory, other: FaultyMemory
) -> None:
    device.on("write", blocks=[1, 3]).fail()
    for index in range(5):
        change(cache, device, index, 60 + index)
    change(cache, other, 1, 70)
    for _ in range(2):
        with pytest.raises(
            BlocksNotWritten, match="block 1 of memory, block 3 of memory could not be written"
        ) as caught:
            cache.flush()
        assert caught.value.errno == errno.EIO
        assert [block.index for block in caught.value.blocks] == [1, 3]
        assert isinstance(caught.value.__cause__, OSError)
    assert [on_device(device, index) for index in (0, 2, 4)] == [60, 62, 64]
    assert on_device(other, 1) == 70
    assert cache.stats.dirty == 2
    for index in range(20, 20 + 2 * NR_CACHED):
        look(cache, device, index)
    assert [look(cache, device, index) for index in (1, 3)] == [61, 63], "neither evicted nor read again"
    device.clear()
    assert cache.flush() == []
    assert [on_device(device, index) for index in (1, 3)] == [61, 63]


def test_cache_full_of_what_cannot_be_written_says_so(cache: Bcache, device: FaultyMemory) -> None:
    device.on("write").fail()
    for index in range(NR_CACHED):
        change(cache, device, index, 60 + index)
    with pytest.raises(BlocksNotWritten):
        cache.get(device, 40)
    device.clear()
    cache.flush()
    assert look(cache, device, 40) == content(40)[0]


def test_blocks_in_error_are_tried_again_when_nothing_else_can_be_had(cache: Bcache, device: FaultyMemory) -> None:
    held = cache.get(device, 50)
    device.on("write").fail()
    for index in range(NR_CACHED - 1):
        change(cache, device, index, 60 + index)
    with pytest.raises(WouldDeadlock):
        cache.get(device, 40)
    device.clear()
    assert look(cache, device, 40) == content(40)[0]
    held.put()
    cache.flush()
    assert [on_device(device, index) for index in range(NR_CACHED - 1)] == [60 + n for n in range(NR_CACHED - 1)]


def test_failed_barrier_of_one_device_does_not_keep_the_others_from_theirs(
    cache: Bcache, device: FaultyMemory, other: FaultyMemory
) -> None:
    change(cache, device, 1, 5)
    change(cache, other, 1, 6)
    device.on("flush", times=1).fail()
    with pytest.raises(OSError, match="flush"):
        cache.flush()
    assert [call.kind for call in other.log] == ["write", "flush"]
    assert cache.stats.dirty == 1


def test_what_was_written_before_an_abort_is_made_durable_by_the_next_flush(
    cache: Bcache, device: FaultyMemory
) -> None:
    change(cache, device, 1, 5)
    cache.invalidate(device, 1)
    cache.abort_device(device)
    assert device.ops("flush") == []
    cache.flush()
    assert len(device.ops("flush")) == 1
    cache.flush()
    assert len(device.ops("flush")) == 1


def test_failed_barrier_makes_dirty_again_what_it_covered(cache: Bcache, device: FaultyMemory) -> None:
    change(cache, device, 1, 5)
    device.on("flush", times=1).fail()
    with pytest.raises(OSError, match="flush"):
        cache.flush()
    assert cache.stats.dirty == 1
    device.log.clear()
    cache.flush()
    assert [call.kind for call in device.log] == ["write", "flush"]


def test_writing_starts_early_when_few_blocks_are_available() -> None:
    """Below a third of clean ones so many are written that it is two thirds."""
    device = FaultyMemory(200 * SIZE)
    with Bcache(SECTORS, 100) as cache:
        for index in range(67):
            change(cache, device, index, 5)
        assert cache.stats.writes == 0
        change(cache, device, 67, 5)
        assert (cache.stats.writes, cache.stats.dirty) == (34, 34)
        assert device.ops("write") == [(0, 34 * SIZE)], "the oldest, in one call"


# Dropping


def test_invalidate_writes_and_forgets(cache: Bcache, device: FaultyMemory) -> None:
    change(cache, device, 1, 5)
    look(cache, device, 2)
    assert cache.invalidate(device, 1)
    assert cache.invalidate(device, 2)
    assert cache.invalidate(device, 3), "it is not cached in the first place"
    assert on_device(device, 1) == 5
    assert cache.stats.cached == 0


def test_held_block_is_not_invalidated(cache: Bcache, device: FaultyMemory) -> None:
    change(cache, device, 1, 5)
    held = cache.get(device, 1)
    assert not cache.invalidate(device, 1)
    assert not cache.invalidate_device(device)
    assert held.data == bytes([5]) * SIZE
    held.put()
    assert cache.invalidate_device(device)
    assert on_device(device, 1) == 5


def test_invalidating_a_device_leaves_the_others(cache: Bcache, device: FaultyMemory, other: FaultyMemory) -> None:
    for index in range(3):
        change(cache, device, index, 5)
        change(cache, other, index, 6)
    assert cache.invalidate_device(device)
    assert [call.kind for call in device.log] == ["write", "flush"]
    assert cache.stats.cached == 3
    assert other.ops("write") == []


def test_block_that_cannot_be_written_is_not_invalidated(cache: Bcache, device: FaultyMemory) -> None:
    change(cache, device, 1, 5)
    change(cache, device, 2, 6)
    device.on("write", blocks=[1]).fail()
    with pytest.raises(BlocksNotWritten, match="block 1 "):
        cache.invalidate(device, 1)
    with pytest.raises(BlocksNotWritten, match="block 1 "):
        cache.invalidate_device(device)
    assert look(cache, device, 1) == 5
    assert on_device(device, 2) == 6
    device.clear()
    assert cache.invalidate_device(device)
    assert on_device(device, 1) == 5


def test_aborted_device_is_as_it_was(cache: Bcache, device: FaultyMemory, other: FaultyMemory) -> None:
    change(cache, device, 1, 5)
    change(cache, other, 1, 6)
    held = cache.get(device, 2, GetFlags.ZERO)
    with pytest.raises(HoldError, match=r"blocks \[2\] are held"):
        cache.abort_device(device)
    assert look(cache, device, 1) == 5, "nothing was forgotten"
    held.put()
    cache.abort_device(device)
    cache.abort_device(device)
    assert device.ops("write") == []
    assert look(cache, device, 1) == content(1)[0]
    assert look(cache, other, 1) == 6


# Bytes


@pytest.mark.parametrize("offset", [0, 1, 511, SIZE - 1, SIZE, 3 * SIZE + 7])
@pytest.mark.parametrize("length", [0, 1, 2, SIZE - 1, SIZE, SIZE + 1, 5 * SIZE])
def test_ranges_of_bytes(cache: Bcache, device: FaultyMemory, offset: int, length: int) -> None:
    expected = bytearray(device.contents())
    assert cache.read_bytes(device, offset, length) == expected[offset : offset + length]
    data = bytes(at % 251 for at in range(length))
    cache.write_bytes(device, offset, data)
    expected[offset : offset + length] = data
    assert cache.read_bytes(device, 0, 10 * SIZE) == expected[: 10 * SIZE]
    cache.set_bytes(device, offset, length, 0xA5)
    expected[offset : offset + length] = b"\xa5" * length
    cache.flush()
    assert device.contents() == expected
    cache.zero_bytes(device, offset, length)
    expected[offset : offset + length] = bytes(length)
    cache.close()
    assert device.contents() == expected


def test_blocks_that_are_written_whole_are_not_read(cache: Bcache, device: FaultyMemory) -> None:
    cache.write_bytes(device, SIZE - 1, bytes(2 * SIZE + 2))
    assert sorted(device.ops("read")) == [(0, SIZE), (3 * SIZE, SIZE)]


def test_neighbours_are_read_in_one_call(cache: Bcache, device: FaultyMemory) -> None:
    assert cache.read_bytes(device, 0, 8 * SIZE) == b"".join(content(block) for block in range(8))
    assert device.ops("read") == [(0, 8 * SIZE)]


def test_range_longer_than_the_cache(cache: Bcache, device: FaultyMemory) -> None:
    assert cache.read_bytes(device, 0, NR_BLOCKS * SIZE) == device.contents()
    cache.set_bytes(device, 0, NR_BLOCKS * SIZE, 3)
    cache.close()
    assert device.contents() == bytes([3]) * NR_BLOCKS * SIZE


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1)])
def test_range_that_is_none(cache: Bcache, device: FaultyMemory, offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="no range"):
        cache.read_bytes(device, offset, length)
    with pytest.raises(ValueError, match="no range"):
        cache.zero_bytes(device, offset, length)


def test_range_beyond_the_end(cache: Bcache, device: FaultyMemory) -> None:
    end = NR_BLOCKS * SIZE
    for call in (lambda: cache.read_bytes(device, end - 1, 2), lambda: cache.write_bytes(device, end - 1, b"ab")):
        with pytest.raises(OSError, match="beyond the end") as caught:
            call()
        assert caught.value.errno == errno.EIO
    cache.close()
    assert device.ops("write") == []


@pytest.mark.parametrize("value", [-1, 256])
def test_value_that_is_no_byte(cache: Bcache, device: FaultyMemory, value: int) -> None:
    with pytest.raises(ValueError, match="256"):
        cache.set_bytes(device, 0, 10, value)


def test_range_with_a_held_block_is_refused(cache: Bcache, device: FaultyMemory) -> None:
    held = cache.get(device, 1)
    with pytest.raises(HoldError):
        cache.zero_bytes(device, 0, 3 * SIZE)
    assert cache.read_bytes(device, SIZE, SIZE) == content(1)
    held.put()


# Counting, closing


def test_counters_of_bcache(device: FaultyMemory) -> None:
    with Bcache(SECTORS, NR_CACHED) as cache:
        look(cache, device, 1)
        look(cache, device, 1)
        change(cache, device, 1, 5, GetFlags.DIRTY)
        change(cache, device, 2, 5, GetFlags.DIRTY)
        change(cache, device, 3, 5, GetFlags.ZERO)
        change(cache, device, 3, 6, GetFlags.ZERO)
        cache.prefetch(device, 4)
        cache.prefetch(device, 4)
        stats = cache.stats
    assert (stats.read_hits, stats.read_misses) == (1, 1)
    assert (stats.write_hits, stats.write_misses, stats.write_zeroes) == (2, 2, 2)
    assert (stats.hits, stats.misses, stats.prefetches, stats.reads) == (3, 3, 1, 3)
    assert (stats.cached, stats.dirty, stats.held) == (4, 3, 0)
    assert "write_zeroes=2" in repr(stats)
    assert stats.as_dict()["prefetches"] == 1


def test_close_names_what_is_held_and_stays_usable(cache: Bcache, device: FaultyMemory) -> None:
    held = cache.get(device, 3, GetFlags.ZERO)
    with pytest.raises(HoldError, match="held: 3 of memory"):
        cache.close()
    held.put()
    cache.close()
    cache.close()
    assert on_device(device, 3) == 0
    with pytest.raises(HoldError, match="was closed"):
        cache.get(device, 3)


def test_close_that_cannot_write_can_be_tried_again(cache: Bcache, device: FaultyMemory) -> None:
    device.on("write", times=1).fail()
    change(cache, device, 3, 5)
    with pytest.raises(BlocksNotWritten):
        cache.close()
    assert look(cache, device, 3) == 5
    cache.close()
    assert on_device(device, 3) == 5
