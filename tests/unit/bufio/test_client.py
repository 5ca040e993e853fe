"""The calls of a buffer client, one claim each, on a device that keeps a log."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import pytest

from bufio import Client, HoldError, WouldDeadlock, parameters
from bufio.core import BUFFER_OVERHEAD_BYTES
from bufio.engine import MAX_COALESCED_BYTES
from bufio.testing import Call
from tests.support.bufio import (
    DEADLINE,
    FEW,
    FEW_BYTES,
    NR_BLOCKS,
    SIZE,
    Threads,
    content,
    dirty,
    on_device,
    read,
    result_of,
    wait_until,
)
from tests.support.devices import FaultyMemory

if TYPE_CHECKING:
    from bufio import Buffer


# Making one


@pytest.mark.parametrize("size", [0, -512, 1, 256, 511, 513, 4095])
def test_impossible_block_size_is_a_value_error(device: FaultyMemory, size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        Client(device, size)


@pytest.mark.parametrize("size", [512, 1536, 4096, 65536])
def test_block_is_as_large_as_asked(device: FaultyMemory, size: int) -> None:
    with Client(device, size) as client:
        assert client.block_size == size
        assert client.device_size == NR_BLOCKS * SIZE // size
        buffer = client.read(1)
        assert bytes(buffer.data) == device.contents()[size : 2 * size]
        buffer.release()


def test_callbacks_and_aux(device: FaultyMemory) -> None:
    made: list[int] = []
    written: list[int] = []

    def complete(buffer: Buffer) -> None:
        written.append(buffer.block_number)
        buffer.data[0] = 0xEE

    with Client(
        device,
        SIZE,
        aux_size=3,
        alloc_callback=lambda buffer: made.append(buffer.block_number),
        write_callback=complete,
    ) as client:
        buffer = client.read(5)
        assert buffer.aux == bytes(3)
        assert buffer.client is client
        assert buffer.block_number == 5
        buffer.release()
        assert read(client, 5) == content(5)
        assert made == [5]
        dirty(client, 5, 77)
        assert written == []
        client.write_dirty_buffers()
        assert written == [5]
    assert device.contents()[5 * SIZE : 5 * SIZE + 2] == bytes([0xEE, 77])


# read


def test_read_reads_once(device: FaultyMemory, client: Client) -> None:
    assert read(client, 3) == content(3)
    assert read(client, 3) == content(3)
    assert device.log == [Call("read", 3 * SIZE, SIZE)]
    assert (client.stats.hits, client.stats.misses, client.stats.reads) == (1, 1, 1)


def test_holds_are_counted(client: Client) -> None:
    first, second = client.read(3), client.read(3)
    assert first is second
    assert first.hold_count == 2
    assert client.stats.held == 1
    first.release()
    first.release()
    assert client.stats.held == 0
    with pytest.raises(HoldError, match="3"):
        first.release()


def test_concurrent_readers_of_one_block_cause_one_read(device: FaultyMemory, client: Client, threads: Threads) -> None:
    gate = device.on("read").gate(DEADLINE)
    readers = [threads.submit(read, client, 3) for _ in range(4)]
    gate.wait_for()
    wait_until(lambda: client.stats.waits == 3)
    gate.open()
    assert [result_of(reader) for reader in readers] == [content(3)] * 4
    assert device.log == [Call("read", 3 * SIZE, SIZE)]


def test_failed_read_is_everybodys_error_and_is_tried_again(
    device: FaultyMemory, client: Client, threads: Threads
) -> None:
    gate = device.on("read").gate(DEADLINE)
    device.on("read").fail()
    readers = [threads.submit(read, client, 3) for _ in range(3)]
    gate.wait_for()
    wait_until(lambda: client.stats.waits == 2)
    gate.open()
    for reader in readers:
        error = reader.exception(DEADLINE)
        assert isinstance(error, OSError)
        assert error.errno == errno.EIO
    assert len(device.log) == 1
    assert client.stats.cached == 0
    device.clear()
    assert read(client, 3) == content(3)


@pytest.mark.parametrize("block", [-1, NR_BLOCKS, 1 << 50])
def test_block_beyond_the_device_is_an_io_error(device: FaultyMemory, client: Client, block: int) -> None:
    with pytest.raises(OSError, match="beyond the end") as caught:
        client.read(block)
    assert caught.value.errno == errno.EIO
    assert device.log == []


def test_device_that_grows_is_read_further(device: FaultyMemory, client: Client) -> None:
    device.grow((NR_BLOCKS + 1) * SIZE)
    assert client.device_size == NR_BLOCKS + 1
    assert read(client, NR_BLOCKS) == bytes(SIZE)


# get and new


def test_get_does_no_io(device: FaultyMemory, client: Client) -> None:
    assert client.get(3) is None
    assert device.log == []
    held = client.read(3)
    found = client.get(3)
    assert found is held
    assert found.hold_count == 2
    assert len(device.log) == 1


def test_get_does_not_wait_for_a_read(device: FaultyMemory, client: Client, threads: Threads) -> None:
    gate = device.on("read").gate(DEADLINE)
    reader = threads.submit(read, client, 3)
    gate.wait_for()
    assert client.get(3) is None
    gate.open()
    assert result_of(reader) == content(3)
    assert client.get(3) is not None


def test_new_does_not_read(device: FaultyMemory, client: Client) -> None:
    dirty(client, 3, 99)
    assert device.log == []
    assert on_device(device, 3) == 4
    client.write_dirty_buffers()
    assert on_device(device, 3) == 99


def test_new_returns_a_cached_buffer_as_it_is(device: FaultyMemory, client: Client) -> None:
    assert read(client, 3) == content(3)
    buffer = client.new(3)
    assert bytes(buffer.data) == content(3)
    buffer.release()
    assert len(device.log) == 1


def test_new_waits_for_a_read_that_is_under_way(device: FaultyMemory, client: Client, threads: Threads) -> None:
    gate = device.on("read").gate(DEADLINE)
    reader = threads.submit(read, client, 3)
    gate.wait_for()
    writer = threads.submit(client.new, 3)
    wait_until(lambda: client.stats.waits == 1)
    gate.open()
    result_of(reader)
    assert bytes(result_of(writer).data) == content(3)


# prefetch


def test_prefetch_issues_one_read_of_neighbours(device: FaultyMemory, client: Client) -> None:
    client.prefetch(3, 4)
    assert device.log == [Call("read", 3 * SIZE, 4 * SIZE)]
    assert [read(client, block) for block in range(3, 7)] == [content(block) for block in range(3, 7)]
    assert len(device.log) == 1
    assert client.stats.held == 0


def test_prefetch_leaves_out_what_is_cached_or_beyond_the_end(device: FaultyMemory, client: Client) -> None:
    read(client, 5)
    device.log.clear()
    client.prefetch(4, 3)
    assert device.ops("read") == [(4 * SIZE, SIZE), (6 * SIZE, SIZE)]
    device.log.clear()
    client.prefetch(NR_BLOCKS - 1, 100)
    client.prefetch(NR_BLOCKS + 5, 2)
    assert device.ops("read") == [((NR_BLOCKS - 1) * SIZE, SIZE)]


def test_error_of_a_prefetch_surfaces_at_the_read_of_that_block_alone(device: FaultyMemory, client: Client) -> None:
    device.on("read", blocks=[4]).fail()
    client.prefetch(3, 3)
    assert client.get(4) is None
    assert read(client, 3) == content(3)
    assert read(client, 5) == content(5)
    with pytest.raises(OSError, match="as told"):
        client.read(4)
    device.clear()
    assert read(client, 4) == content(4)


def test_prefetch_stops_quietly_when_everything_is_held(device: FaultyMemory, few: Client) -> None:
    held = [few.read(block) for block in range(FEW)]
    device.log.clear()
    few.prefetch(20, 5)
    assert device.log == []
    assert [bytes(buffer.data) for buffer in held] == [content(block) for block in range(FEW)]


def test_prefetch_gets_through_although_the_cache_is_full_of_dirty_buffers(device: FaultyMemory, few: Client) -> None:
    """Found by test_pool_model: a lookup without I/O was never answered, however often prefetches were issued."""
    for block in range(FEW - 1):
        read(few, block)
    for block in range(FEW - 2):
        buffer = few.get(block)
        assert buffer is not None
        buffer.data[:] = bytes([200 + block]) * SIZE
        buffer.mark_dirty()
        buffer.release()
    assert few.stats.dirty == FEW - 2
    few.prefetch(20, 3)
    for block in (20, 21, 22):
        if few.peek(block) is None:
            few.prefetch(block)
    assert [block for block in cached(few) if block >= 20] == [20, 21, 22]
    for block in range(FEW - 2):
        assert read(few, block) == bytes([200 + block]) * SIZE


# Dirty buffers


def test_dirty_buffers_are_written_in_order_neighbours_together_then_flushed(
    device: FaultyMemory, client: Client
) -> None:
    for block in (9, 3, 8, 4, 20):
        dirty(client, block, 100 + block)
    assert client.stats.dirty == 5
    client.write_dirty_buffers()
    assert device.log == [
        Call("write", 3 * SIZE, 2 * SIZE),
        Call("write", 8 * SIZE, 2 * SIZE),
        Call("write", 20 * SIZE, SIZE),
        Call("flush"),
    ]
    assert [on_device(device, block) for block in (3, 4, 8, 9, 20)] == [103, 104, 108, 109, 120]
    assert client.stats.dirty == 0
    assert client.stats.coalesced_writes == 2
    device.log.clear()
    client.write_dirty_buffers()
    assert device.log == [Call("flush")]


def test_long_run_beside_others_is_written_in_parts() -> None:
    device = FaultyMemory(300 * SIZE)
    longest = MAX_COALESCED_BYTES // SIZE
    with Client(device, SIZE, cache_bytes=4 << 20) as client:
        for block in (0, *range(2, 2 + longest + 1), 290):
            dirty(client, block, 1)
        client.write_dirty_buffers()
    assert device.ops("write") == [
        (0, SIZE),
        (2 * SIZE, longest * SIZE),
        ((2 + longest) * SIZE, SIZE),
        (290 * SIZE, SIZE),
    ]


def test_only_the_changed_part_is_written(device: FaultyMemory, client: Client) -> None:
    buffer = client.read(3)
    buffer.data[100:110] = bytes(10)
    buffer.mark_dirty(100, 110)
    buffer.data[300:310] = bytes(10)
    buffer.mark_dirty(300, 310)
    buffer.release()
    device.log.clear()
    client.write_dirty_buffers()
    assert device.ops("write") == [(3 * SIZE + 100, 210)]
    expected = bytearray(content(3))
    expected[100:110] = expected[300:310] = bytes(10)
    assert device.contents()[3 * SIZE : 4 * SIZE] == expected
    buffer = client.read(3)
    buffer.mark_dirty(5, 6)
    buffer.mark_dirty()
    buffer.release()
    device.log.clear()
    client.write_dirty_buffers()
    assert device.ops("write") == [(3 * SIZE, SIZE)]


def test_asynchronous_write_does_not_flush(device: FaultyMemory, client: Client) -> None:
    dirty(client, 3, 99)
    client.write_dirty_buffers_async()
    client.write_dirty_buffers()
    assert device.log == [Call("write", 3 * SIZE, SIZE), Call("flush")]


def test_write_error_is_reported_once_and_nothing_is_lost(device: FaultyMemory, client: Client) -> None:
    for block in (3, 4, 5):
        dirty(client, block, 100 + block)
    device.on("write", blocks=[4]).fail()
    client.write_dirty_buffers_async()
    assert client.stats.dirty == 1
    assert (on_device(device, 3), on_device(device, 4), on_device(device, 5)) == (103, 5, 105)
    device.clear()
    with pytest.raises(OSError, match="as told") as caught:
        client.write_dirty_buffers()
    assert caught.value.errno == errno.EIO
    client.write_dirty_buffers()
    assert on_device(device, 4) == 104


def test_write_error_of_a_synchronous_write_leaves_it_dirty(device: FaultyMemory, client: Client) -> None:
    dirty(client, 3, 99)
    device.on("write").fail()
    for _ in range(2):
        with pytest.raises(OSError, match="as told"):
            client.write_dirty_buffers()
        assert client.stats.dirty == 1
        assert read(client, 3) == bytes([99]) * SIZE
    device.clear()
    client.write_dirty_buffers()
    assert on_device(device, 3) == 99


def test_what_can_be_written_is_durable_although_something_else_cannot(device: FaultyMemory, client: Client) -> None:
    device.on("write", blocks=[3]).fail()
    for block in (1, 3, 5):
        dirty(client, block, 100)
    with pytest.raises(OSError, match="write"):
        client.write_dirty_buffers()
    assert device.log[-1].kind == "flush"
    assert client.stats.dirty == 1


def test_failed_flush_leaves_everything_dirty(device: FaultyMemory, client: Client) -> None:
    for block in (3, 4):
        dirty(client, block, 99)
    device.on("flush", times=1).fail()
    with pytest.raises(OSError, match="as told"):
        client.write_dirty_buffers()
    assert client.stats.dirty == 2
    device.log.clear()
    client.write_dirty_buffers()
    assert device.log == [Call("write", 3 * SIZE, 2 * SIZE), Call("flush")]


def test_buffer_changed_while_it_is_written_stays_dirty(device: FaultyMemory, client: Client, threads: Threads) -> None:
    dirty(client, 3, 99)
    gate = device.on("write").gate(DEADLINE)
    writer = threads.submit(client.write_dirty_buffers)
    gate.wait_for()
    dirty(client, 3, 111)
    gate.open()
    result_of(writer)
    device.clear()
    client.write_dirty_buffers()
    assert on_device(device, 3) == 111


# release_move


def test_move_writes_nothing_and_leaves_the_old_block_alone(device: FaultyMemory, client: Client) -> None:
    buffer = client.read(3)
    device.log.clear()
    buffer.release_move(40)
    assert device.log == []
    assert client.get(3) is None
    moved = client.get(40)
    assert moved is buffer
    assert moved.block_number == 40
    moved.release()
    assert read(client, 3) == content(3)
    client.write_dirty_buffers()
    assert (on_device(device, 3), on_device(device, 40)) == (4, 4)


def test_move_of_a_dirty_buffer_writes_the_old_block_first(device: FaultyMemory, client: Client) -> None:
    dirty(client, 3, 99)
    client.read(3).release_move(40)
    assert device.log == [Call("write", 3 * SIZE, SIZE)]
    assert (on_device(device, 3), on_device(device, 40)) == (99, 41)
    client.write_dirty_buffers()
    assert (on_device(device, 3), on_device(device, 40)) == (99, 99)


def test_move_beside_other_holders_copies_on_the_device(device: FaultyMemory, client: Client) -> None:
    kept, given = client.read(3), client.read(3)
    given.release_move(40)
    assert kept.block_number == 3
    assert kept.hold_count == 1
    assert (on_device(device, 3), on_device(device, 40)) == (4, 4)
    assert read(client, 40) == content(3)
    kept.release()
    assert client.stats.held == 0


def test_move_drops_what_was_cached_for_the_new_block(device: FaultyMemory, client: Client) -> None:
    dirty(client, 40, 111)
    client.read(3).release_move(40)
    client.write_dirty_buffers()
    assert on_device(device, 40) == 4
    assert 111 not in device.contents()


def test_move_waits_for_the_holder_of_the_new_block(device: FaultyMemory, client: Client, threads: Threads) -> None:
    held = client.read(40)
    mover = threads.submit(lambda: client.read(3).release_move(40))
    wait_until(lambda: client.stats.waits == 1)
    assert not mover.done()
    held.release()
    result_of(mover)
    assert read(client, 40) == content(3)


def test_move_to_a_block_that_the_same_thread_holds_is_an_error_not_a_hang(client: Client) -> None:
    held = client.read(40)
    source = client.read(3)
    with pytest.raises(WouldDeadlock) as caught:
        source.release_move(40)
    assert caught.value.blocks == (40,)
    assert caught.value.errno == errno.EDEADLK
    assert source.hold_count == 1
    held.release()
    source.release_move(40)


def test_move_that_cannot_write_the_old_block_changes_nothing(device: FaultyMemory, client: Client) -> None:
    dirty(client, 3, 99)
    buffer = client.read(3)
    device.on("write").fail()
    with pytest.raises(OSError, match="as told"):
        buffer.release_move(40)
    assert (buffer.block_number, buffer.hold_count, buffer.dirty) == (3, 1, True)
    device.clear()
    buffer.release_move(40)
    assert on_device(device, 3) == 99


def test_move_needs_a_hold_and_another_place(client: Client) -> None:
    buffer = client.read(3)
    with pytest.raises(HoldError):
        buffer.release_move(3)
    buffer.release()
    with pytest.raises(HoldError):
        buffer.release_move(40)


# Dropping


def test_forget_drops_clean_and_dirty_but_not_held(device: FaultyMemory, client: Client) -> None:
    read(client, 3)
    dirty(client, 4, 99)
    held = client.read(5)
    for block in (3, 4, 5, 6):
        client.forget(block)
    assert client.stats.cached == 1
    client.write_dirty_buffers()
    assert on_device(device, 4) == 5
    assert client.get(5) is held


@pytest.mark.parametrize("n", [3, 1 << 40])
def test_forget_buffers_takes_a_range(client: Client, n: int) -> None:
    for block in range(10):
        read(client, block)
    client.forget_buffers(5, n)
    cached = [block for block in range(10) if client.get(block) is not None]
    assert cached == [block for block in range(10) if not 5 <= block < 5 + n]


def test_drop_buffers_writes_and_empties(device: FaultyMemory, client: Client) -> None:
    read(client, 3)
    dirty(client, 4, 99)
    client.drop_buffers()
    assert client.stats.cached == 0
    assert on_device(device, 4) == 99


def test_reset_gives_up_changes_and_errors(device: FaultyMemory, client: Client) -> None:
    dirty(client, 4, 99)
    device.on("write").fail()
    client.write_dirty_buffers_async()
    device.clear()
    held = client.read(5)
    client.reset()
    assert client.stats.cached == 1
    assert on_device(device, 4) == 5
    client.write_dirty_buffers()
    assert read(client, 4) == content(4)
    held.release()


def test_discard_reaches_the_device_and_forgets_clean_copies(device: FaultyMemory, client: Client) -> None:
    read(client, 3)
    dirty(client, 4, 99)
    held = client.read(5)
    device.log.clear()
    client.issue_discard(3, 3)
    assert device.log == [Call("discard", 3 * SIZE, 3 * SIZE)]
    assert read(client, 3) == bytes(SIZE)
    assert read(client, 4) == bytes([99]) * SIZE
    assert bytes(held.data) == content(5)


def test_sector_offset_moves_block_zero(device: FaultyMemory, client: Client) -> None:
    client.set_sector_offset(16)
    assert client.device_size == NR_BLOCKS - 2
    assert read(client, 0) == content(2)
    dirty(client, 1, 99)
    client.write_dirty_buffers()
    assert on_device(device, 3) == 99
    with pytest.raises(HoldError):
        client.set_sector_offset(0)
    client.drop_buffers()
    client.set_sector_offset(0)
    assert read(client, 3) == bytes([99]) * SIZE


# Closing


def test_close_with_held_buffers_names_them(device: FaultyMemory, client: Client) -> None:
    held = [client.read(block) for block in (7, 3)]
    dirty(client, 4, 99)
    with pytest.raises(HoldError, match=r"\[3, 7\]"):
        client.close()
    for buffer in held:
        buffer.release()
    client.close()
    assert on_device(device, 4) == 99
    client.close()


def test_close_reports_what_could_not_be_written_and_closes(device: FaultyMemory, client: Client) -> None:
    dirty(client, 4, 99)
    device.on("write").fail()
    with pytest.raises(OSError, match="as told"):
        client.close()
    client.close()


def test_context_manager_writes(device: FaultyMemory) -> None:
    with Client(device, SIZE) as client:
        dirty(client, 4, 99)
    assert on_device(device, 4) == 99


# Memory


def cached(client: Client) -> list[int]:
    found = []
    for block in range(NR_BLOCKS):
        buffer = client.peek(block)
        if buffer is not None:
            found.append(block)
    return found


def test_limit_is_kept_and_the_least_recently_used_goes_first(few: Client) -> None:
    for block in range(30):
        read(few, block)
        assert few.stats.cached <= FEW
    kept = cached(few)
    assert len(kept) >= FEW - 1
    assert kept == list(range(30 - len(kept), 30))
    assert few.stats.evictions == 30 - len(kept)
    read(few, 40)  # gives each buffer its second chance, and takes the first
    assert cached(few) == [*kept[1:], 40]
    read(few, kept[1])  # used again
    read(few, 41)
    assert cached(few) == [kept[1], *kept[3:], 40, 41]


def test_held_buffers_are_not_evicted(few: Client) -> None:
    held = [few.read(block) for block in range(3)]
    for block in range(10, 30):
        read(few, block)
    assert cached(few)[:3] == [0, 1, 2]
    assert [bytes(buffer.data) for buffer in held] == [content(block) for block in range(3)]


def test_dirty_buffers_are_written_when_memory_is_short(device: FaultyMemory, few: Client) -> None:
    for block in range(40):
        dirty(few, block, 100 + block)
        assert few.stats.cached <= FEW
    assert device.ops("write")
    assert not device.ops("flush")
    few.write_dirty_buffers()
    assert [on_device(device, block) for block in range(40)] == [100 + block for block in range(40)]


def test_write_error_under_memory_pressure_is_reported_by_the_next_write(device: FaultyMemory, few: Client) -> None:
    device.on("write", blocks=[0]).fail()
    for block in range(30):
        dirty(few, block, 100 + block)
    device.clear()
    assert 0 in cached(few)
    with pytest.raises(OSError, match="as told"):
        few.write_dirty_buffers()
    few.write_dirty_buffers()
    assert [on_device(device, block) for block in range(30)] == [100 + block for block in range(30)]


def test_wait_that_cannot_end_is_an_error_naming_the_blocks(few: Client) -> None:
    held = [few.read(block) for block in range(FEW + 1)]  # the limit, and the one in reserve
    with pytest.raises(WouldDeadlock) as caught:
        few.read(20)
    assert caught.value.errno == errno.EDEADLK
    assert caught.value.blocks == tuple(range(FEW + 1))
    assert str(list(range(FEW + 1))) in str(caught.value)
    held.pop().release()
    assert read(few, 20) == content(20)


def test_two_threads_that_wait_for_each_other_are_told(few: Client, threads: Threads) -> None:
    started = threading.Barrier(2, timeout=DEADLINE)

    def hoard(first: int, count: int) -> list[int] | WouldDeadlock:
        mine = [few.read(block) for block in range(first, first + count)]
        started.wait()
        try:
            few.read(40 + first).release()
        except WouldDeadlock as error:
            return error
        finally:
            for buffer in mine:
                buffer.release()
        return []

    results = [result_of(t) for t in [threads.submit(hoard, 0, 5), threads.submit(hoard, 20, 4)]]
    # One is told, and what it releases lets the other one through.
    assert sorted(type(result).__name__ for result in results) == ["WouldDeadlock", "list"]


def test_reader_waits_for_a_release_by_another_thread(few: Client, threads: Threads) -> None:
    held = [few.read(block) for block in range(FEW)]

    def use_two() -> bytes:
        with_reserve = few.read(19)
        second = read(few, 20)
        with_reserve.release()
        return second

    reader = threads.submit(use_two)
    wait_until(lambda: few.stats.waits >= 1)
    assert not reader.done()
    held.pop().release()
    assert result_of(reader) == content(20)


def test_thread_that_holds_nothing_never_depends_on_the_others(few: Client, threads: Threads) -> None:
    """They may have taken the reserve as well."""
    held = [few.read(block) for block in range(FEW + 1)]
    assert result_of(threads.submit(read, few, 20)) == content(20)
    assert few.stats.waits == 0
    for buffer in held:
        buffer.release()


def test_reserved_buffers_keep_a_thread_going_at_the_limit(device: FaultyMemory, threads: Threads) -> None:
    client = Client(device, SIZE, reserved_buffers=3, cache_bytes=FEW_BYTES)
    held = [client.read(block) for block in range(FEW)]

    def use_three() -> list[bytes]:
        mine = [client.read(block) for block in (20, 21, 22)]
        contents = [bytes(buffer.data) for buffer in mine]
        for buffer in mine:
            buffer.release()
        return contents

    assert result_of(threads.submit(use_three)) == [content(block) for block in (20, 21, 22)]
    for buffer in held:
        buffer.release()
    client.close()


def test_minimum_of_buffers_overrides_the_limit(few: Client) -> None:
    few.set_minimum_buffers(20)
    held = [few.read(block) for block in range(20)]
    assert few.stats.cached == 20
    for buffer in held:
        buffer.release()
    few.set_minimum_buffers(0)
    assert few.stats.cached == FEW


def test_change_of_the_process_wide_limit_reaches_clients_that_exist(device: FaultyMemory) -> None:
    before = parameters.max_cache_size_bytes
    with Client(device, SIZE) as client:
        for block in range(40):
            dirty(client, block, 100 + block)
        allocated = parameters.current_allocated_bytes
        assert allocated >= 40 * SIZE
        try:
            parameters.max_cache_size_bytes = 10 * (SIZE + BUFFER_OVERHEAD_BYTES)
            assert client.stats.cached <= 10
            assert parameters.current_allocated_bytes < allocated
            assert parameters.peak_allocated_bytes >= allocated
        finally:
            parameters.max_cache_size_bytes = before
        for block in range(40):
            assert read(client, block) == bytes([100 + block]) * SIZE


def test_many_threads_on_few_buffers_agree_with_the_device(device: FaultyMemory, few: Client, threads: Threads) -> None:
    def work(number: int) -> None:
        for turn in range(60):
            block = 8 * (turn * 5 % 8) + number
            buffer = few.read(block)
            assert buffer.data[0] == buffer.data[-1]
            value = buffer.data[0] + 1 & 0xFF
            buffer.data[:] = bytes([value]) * SIZE
            buffer.mark_dirty()
            buffer.release()

    for done in [threads.submit(work, number) for number in range(8)]:
        result_of(done)
    few.write_dirty_buffers()
    turns = [sum(1 for turn in range(60) if turn * 5 % 8 == at) for at in range(8)]
    assert [on_device(device, block) for block in range(NR_BLOCKS)] == [
        block + 1 + turns[block // 8] for block in range(NR_BLOCKS)
    ]


# Epochs: for an owner that serialises its calls


def test_buffer_of_the_present_epoch_stays_and_is_not_written(device: FaultyMemory, few: Client) -> None:
    few.epoch = 10
    dirty(few, 0, 99)
    buffer = few.peek(0)
    assert buffer is not None
    buffer.referenced = few.epoch
    for block in range(1, 40):
        few.read(block).release()
    assert few.peek(0) is buffer
    assert not device.ops("write")
    few.epoch += 1
    for block in range(40, 60):
        dirty(few, block, 1)
    assert on_device(device, 0) == 99


def test_owner_may_borrow_more_than_the_limit_within_one_epoch(few: Client) -> None:
    few.epoch = 10
    borrowed = []
    for block in range(30):
        buffer = few.read(block)
        buffer.release()
        buffer.referenced = few.epoch
        borrowed.append(buffer)
    assert [bytes(buffer.data) for buffer in borrowed] == [content(block) for block in range(30)]
    few.epoch += 1
    read(few, 40)
    assert few.stats.cached <= FEW


def test_unheld_move_keeps_the_buffer_and_its_old_place_on_the_device(device: FaultyMemory, few: Client) -> None:
    few.epoch = 10
    few.read(3).release()
    buffer = few.peek(3)
    assert buffer is not None
    few.move(buffer, 40)
    assert few.peek(40) is buffer
    assert few.peek(3) is None
    assert buffer.dirty
    assert not device.ops("write")
    held = few.read(5)
    with pytest.raises(HoldError):
        few.move(held, 41)


def test_statistics_add_up(device: FaultyMemory, client: Client) -> None:
    for block in (1, 1, 2):
        read(client, block)
    dirty(client, 2, 9)
    held = client.read(1)
    client.write_dirty_buffers()
    stats = client.stats
    assert (stats.hits, stats.misses, stats.reads, stats.writes) == (2, 2, 2, 1)
    assert (stats.bytes_read, stats.bytes_written) == (2 * SIZE, SIZE)
    assert (stats.flushes, stats.evictions, stats.waits) == (1, 0, 0)
    assert (stats.dirty, stats.held, stats.cached) == (0, 1, 2)
    assert "hits=2" in repr(stats)
    held.release()
