"""Threads that meet, writes that fail, callbacks that raise: what a review found in the buffer client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bufio import Client, HoldError, WouldDeadlock, parameters
from bufio.testing import Call
from persistent_data.block_manager import BlockManager, Validator
from persistent_data.errors import CorruptMetadata
from tests.support.bufio import (
    DEADLINE,
    FEW,
    FEW_BYTES,
    NR_BLOCKS,
    SIZE,
    Threads,
    allocated_bytes,
    content,
    dirty,
    on_device,
    read,
    result_of,
    wait_until,
)
from tests.support.devices import FaultyMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bufio import Buffer
    from bufio.device import ReadableBuffer


class CopyingDevice(FaultyMemory):
    """Takes the data when it is asked to write, before the script holds it up, as a disk's own cache does."""

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        super().pwrite(bytes(data), offset)

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        super().pwritev([bytes(buffer) for buffer in buffers], offset)


class DirectDevice(FaultyMemory):
    """As a device opened with O_DIRECT: whole sectors only, at a multiple of them."""

    direct = True

    def __init__(self, contents: bytes) -> None:
        super().__init__(contents)
        self.on("read", "write").call(self._check)

    @staticmethod
    def _check(call: Call) -> None:
        assert call.offset % 512 == 0
        assert call.length % 512 == 0


# Writing


def test_buffer_dirtied_again_while_another_thread_writes_it_is_written_by_write_dirty_buffers(
    threads: Threads,
) -> None:
    """What was on its way had the old content: it was waited for, flushed, and reported as everything."""
    device = CopyingDevice(NR_BLOCKS * SIZE)
    client = Client(device, SIZE)
    dirty(client, 3, 99)
    gate = device.on("write").gate(DEADLINE)
    early = threads.submit(client.write_dirty_buffers_async)
    gate.wait_for()
    dirty(client, 3, 111)
    writer = threads.submit(client.write_dirty_buffers)
    wait_until(lambda: client.stats.waits >= 1)
    gate.open()
    result_of(early)
    result_of(writer)
    assert on_device(device, 3) == 111
    assert client.stats.dirty == 0
    assert device.log == [Call("write", 3 * SIZE, SIZE), Call("write", 3 * SIZE, SIZE), Call("flush")]


def test_cache_full_of_blocks_that_cannot_be_written_raises_the_write_error(
    device: FaultyMemory, few: Client, threads: Threads
) -> None:
    """Nobody holds anything, so nobody gives anything back: it waited for ever."""
    device.on("write").fail()

    def fill() -> None:
        for block in range(30):
            dirty(few, block, 100)

    with pytest.raises(OSError, match="as told"):
        result_of(threads.submit(fill))
    dirtied = few.stats.dirty
    assert FEW <= dirtied < 30
    device.clear()
    with pytest.raises(OSError, match="as told"):
        few.write_dirty_buffers()
    few.write_dirty_buffers()
    assert [on_device(device, block) for block in range(dirtied)] == [100] * dirtied


def test_block_cached_while_others_could_not_be_written_has_one_buffer(device: FaultyMemory, threads: Threads) -> None:
    """The lock is given up for the write, and then another thread may have brought the block in."""
    client = Client(device, SIZE, reserved_buffers=2, cache_bytes=FEW_BYTES)
    device.on("write").fail()
    for block in range(FEW):
        dirty(client, block, 100)
    other = client.new(41)
    device.log.clear()
    # All together, then one by one, for want of clean buffers; then the same again for want of any.
    device.clear()
    gate = device.on("write", skip=FEW + 1).gate(DEADLINE)
    device.on("write").fail()
    one = threads.submit(client.new, 40)
    gate.wait_for()
    other.release_move(40)
    gate.open()
    assert result_of(one) is other
    assert client.stats.cached == FEW + 1


def test_part_of_a_block_is_written_whole_to_a_direct_device() -> None:
    """Four changed bytes are no sector: with O_DIRECT their write was EINVAL."""
    device = DirectDevice(b"".join(content(block) for block in range(NR_BLOCKS)))
    with Client(device, SIZE) as client:
        for block in (3, 4, 9):
            buffer = client.read(block)
            buffer.data[10:14] = b"abcd"
            buffer.mark_dirty(10, 14)
            buffer.release()
    assert device.ops("write") == [(3 * SIZE, 2 * SIZE), (9 * SIZE, SIZE)]
    for block in (3, 4, 9):
        expected = bytearray(content(block))
        expected[10:14] = b"abcd"
        assert device.contents()[block * SIZE : (block + 1) * SIZE] == expected


# mark_dirty


@pytest.mark.parametrize(("start", "end"), [(3000, 2000), (-1, 10), (0, SIZE + 1), (SIZE + 1, None), (-10, SIZE)])
def test_impossible_range_cannot_be_marked_dirty(
    device: FaultyMemory, client: Client, start: int, end: int | None
) -> None:
    """Each once was accepted, and failed, or wrote nothing, when the block was written."""
    buffer = client.read(3)
    with pytest.raises(ValueError, match=str(start)):
        buffer.mark_dirty(start, end)
    assert not buffer.dirty
    buffer.release()
    client.write_dirty_buffers()
    assert not device.ops("write")


@pytest.mark.parametrize("at", [0, 10, SIZE])
def test_empty_range_makes_nothing_dirty(device: FaultyMemory, client: Client, at: int) -> None:
    buffer = client.read(3)
    buffer.mark_dirty(at, at)
    assert not buffer.dirty
    buffer.release()
    client.write_dirty_buffers()
    assert not device.ops("write")


def test_buffer_that_nobody_holds_cannot_be_marked_dirty(client: Client) -> None:
    buffer = client.read(3)
    buffer.release()
    with pytest.raises(HoldError, match="3"):
        buffer.mark_dirty()
    assert client.stats.dirty == 0


# release_move


def test_change_of_the_old_block_while_a_move_waits_is_not_lost(
    device: FaultyMemory, client: Client, threads: Threads
) -> None:
    """The mover waited for the new block, and then re-keyed what another thread had written to the old one."""
    target = client.read(40)
    mover = threads.submit(lambda: client.read(3).release_move(40))
    wait_until(lambda: client.stats.waits == 1)
    dirty(client, 3, 111)
    target.release()
    result_of(mover)
    assert on_device(device, 3) == 111
    client.write_dirty_buffers()
    assert (on_device(device, 3), on_device(device, 40)) == (111, 111)


def test_reader_of_the_new_block_waits_for_the_copy(device: FaultyMemory, client: Client, threads: Threads) -> None:
    """It read the device while the copy was on its way, and kept the old content of the new block."""
    kept, given = client.read(3), client.read(3)
    gate = device.on("write", blocks=[40]).gate(DEADLINE)
    mover = threads.submit(given.release_move, 40)
    gate.wait_for()
    reader = threads.submit(read, client, 40)
    wait_until(lambda: client.stats.waits >= 1 or reader.done())
    assert not reader.done()
    gate.open()
    result_of(mover)
    assert result_of(reader) == content(3)
    assert on_device(device, 40) == 4
    kept.release()


def test_copy_that_cannot_be_written_leaves_the_new_block_as_it_was(device: FaultyMemory, client: Client) -> None:
    kept, given = client.read(3), client.read(3)
    device.on("write").fail()
    with pytest.raises(OSError, match="as told"):
        given.release_move(40)
    device.clear()
    assert (kept.block_number, kept.hold_count) == (3, 2)
    assert read(client, 40) == content(40)
    given.release_move(40)
    assert read(client, 40) == content(3)
    kept.release()


def test_copy_is_completed_by_the_write_callback(device: FaultyMemory) -> None:
    """The checksum of a block that a move copied was that of its old place."""
    completed: list[int] = []

    def complete(buffer: Buffer) -> None:
        completed.append(buffer.block_number)
        buffer.data[0] = buffer.block_number

    with Client(device, SIZE, write_callback=complete) as client:
        kept, given = client.read(3), client.read(3)
        given.release_move(40)
        assert completed == [40]
        assert kept.data[0] == 4
        kept.release()
    assert device.contents()[40 * SIZE : 40 * SIZE + 2] == bytes([40, 4])


# Owners with epochs


def test_limit_that_another_thread_changes_does_not_evict_what_an_owner_borrowed(
    device: FaultyMemory, threads: Threads
) -> None:
    """A borrowed buffer carries no hold; when it had been read in an earlier epoch the trim took it away at once."""
    before = parameters.max_cache_size_bytes
    client = Client(device, SIZE)
    client.epoch = 10
    for block in range(20):
        read(client, block)
    client.epoch += 1
    buffers = [client.peek(block) for block in range(20)]
    try:
        result_of(threads.submit(setattr, parameters, "max_cache_size_bytes", FEW_BYTES))
        # An owner that was between its peek and its mark when the other thread came.
        assert [client.peek(block) for block in range(20)] == buffers
        for buffer in buffers:
            assert buffer is not None
            buffer.referenced = client.epoch
        assert [bytes(buffer.data) for buffer in buffers if buffer is not None] == [content(b) for b in range(20)]
        client.epoch += 1
        for block in range(20, 30):
            read(client, block)
        assert client.stats.cached <= FEW
    finally:
        parameters.max_cache_size_bytes = before
        client.discard_all()


def test_read_of_a_borrowed_buffer_keeps_it_borrowed(device: FaultyMemory, few: Client) -> None:
    """A read marked it as used in no epoch, and the next buffers pushed it out in the middle of the owner's call."""
    for take in (few.read, few.get):
        few.epoch += 10
        few.read(0).release()
        borrowed = few.peek(0)
        assert borrowed is not None
        borrowed.referenced = few.epoch
        again = take(0)
        assert again is borrowed
        again.release()
        assert borrowed.referenced == few.epoch
        for block in range(1, 30):
            read(few, block)
        assert few.peek(0) is borrowed
        assert bytes(borrowed.data) == content(0)


# Callbacks that raise


def failing_at(*numbers: int) -> Callable[[Buffer], None]:
    """An alloc_callback whose calls of these numbers, counted from 0, raise."""
    made: list[int] = []

    def set_up(buffer: Buffer) -> None:
        made.append(buffer.block_number)
        if len(made) - 1 in numbers:
            raise MemoryError("as told")

    return set_up


@pytest.mark.parametrize("take", ["read", "new", "prefetch"])
def test_alloc_callback_that_raises_leaves_nothing_cached(device: FaultyMemory, take: str) -> None:
    """The buffer stayed in the cache with undefined contents, as if they were the block's."""
    before = allocated_bytes()
    with Client(device, SIZE, alloc_callback=failing_at(0)) as client:
        with pytest.raises(MemoryError):
            getattr(client, take)(3)
        assert client.stats.cached == 0
        assert parameters.current_allocated_bytes == before
        assert read(client, 3) == content(3)


def test_alloc_callback_that_raises_while_reading_ahead_leaves_no_block_being_read(device: FaultyMemory) -> None:
    """Blocks before the one that could not be set up are waiting for a read that nobody does."""
    with Client(device, SIZE, alloc_callback=failing_at(2)) as client:
        with pytest.raises(MemoryError):
            client.prefetch(3, 4)
        assert [read(client, block) for block in range(3, 7)] == [content(block) for block in range(3, 7)]


# Waiting


def test_reader_waits_while_another_threads_read_is_in_flight(
    device: FaultyMemory, few: Client, threads: Threads
) -> None:
    """The other thread will have a buffer to give back as soon as its read is done: that is no deadlock."""
    mine = [few.read(block) for block in range(FEW)]
    gate = device.on("read", blocks=[50]).gate(DEADLINE)
    other = threads.submit(read, few, 50)
    gate.wait_for()
    # The holds belong to this thread: it is the one that has to wait.

    def open_when_it_waits() -> None:
        wait_until(lambda: few.stats.waits >= 1)
        gate.open()

    helper = threads.submit(open_when_it_waits)
    assert read(few, 60) == content(60)
    result_of(helper)
    assert result_of(other) == content(50)
    extra = few.read(61)
    with pytest.raises(WouldDeadlock):
        few.read(62)
    for buffer in [*mine, extra]:
        buffer.release()


class Kind(Validator):
    """Takes everything."""

    def check(self, data: memoryview, block: int) -> None:
        """Accept it."""


ONE, OTHER = Kind("one", 1), Kind("other", 2)


@pytest.mark.parametrize("lock", ["read_lock", "write_lock"])
def test_block_that_becomes_another_kind_while_a_reader_waits_is_an_error_not_a_hang(
    device: FaultyMemory, threads: Threads, lock: str
) -> None:
    """The reader waited for the lock of a view that the writer had replaced, and that nobody would ever unlock."""
    bm = BlockManager(device)
    bm.unlock(bm.write_lock_zero(3, ONE))
    first = bm.write_lock(3, ONE)
    writer = threads.submit(bm.write_lock_zero, 3, OTHER)
    wait_until(lambda: first.buffer.hold_count == 2)

    def lock_and_unlock() -> str:
        try:
            bm.unlock(getattr(bm, lock)(3, ONE))
        except CorruptMetadata as error:
            return str(error)
        return "came before the writer"

    reader = threads.submit(lock_and_unlock)
    wait_until(lambda: first.buffer.hold_count == 3)
    bm.unlock(first)
    bm.unlock(result_of(writer))
    assert any(word in result_of(reader) for word in ("expected a one, found a other", "came before the writer"))
    view = bm.read_lock(3, OTHER)
    assert bm.lock_count(view) == 1
    assert view.buffer.hold_count == 1
    bm.unlock(view)
    bm.close(write=False)


# After the end


def test_closed_client_refuses_to_cache_anything(device: FaultyMemory) -> None:
    """It did as if nothing had happened, and what was changed then was lost."""
    client = Client(device, SIZE)
    dirty(client, 3, 99)
    client.close()
    calls: list[Callable[[], object]] = [lambda: client.read(3), lambda: client.new(3), lambda: client.prefetch(3)]
    for call in calls:
        with pytest.raises(HoldError, match="closed"):
            call()
    assert client.get(3) is None
    assert client.stats.cached == 0
    client.close()
    assert on_device(device, 3) == 99
