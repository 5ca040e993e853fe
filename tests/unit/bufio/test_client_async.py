"""A client whose engine is asynchronous: what overlaps with the caller's work, and what waits."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from bufio import AsyncEngine, Client
from tests.support.bufio import (
    DEADLINE,
    FEW,
    FEW_BYTES,
    NR_BLOCKS,
    SIZE,
    content,
    dirty,
    on_device,
    read,
    result_of,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bufio.testing import Call
    from tests.support.bufio import Threads
    from tests.support.devices import FaultyMemory


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    with AsyncEngine() as engine:
        yield engine


@pytest.fixture
def client(device: FaultyMemory, engine: AsyncEngine) -> Iterator[Client]:
    client = Client(device, SIZE, engine=engine)
    yield client
    device.clear()
    client.discard_all()


@pytest.fixture
def few(device: FaultyMemory, engine: AsyncEngine) -> Iterator[Client]:
    client = Client(device, SIZE, cache_bytes=FEW_BYTES, engine=engine)
    yield client
    device.clear()
    client.discard_all()


# Reading ahead


def test_prefetch_returns_while_the_device_reads(device: FaultyMemory, client: Client, threads: Threads) -> None:
    with device.on("read").gate(DEADLINE) as gate:
        for block in (1, 3, 5):
            client.prefetch(block)
        gate.wait_for(3)
        assert client.get(3) is None
        assert client.peek(3) is None, "an owner that looks without a lock must not see a block before its content"
        reader = threads.submit(read, client, 3)
        wait_until(lambda: client.stats.waits == 1)
        gate.open()
        assert result_of(reader) == content(3)
    assert [read(client, block) for block in (1, 3, 5)] == [content(block) for block in (1, 3, 5)]
    assert len(device.ops("read")) == 3


def test_reader_goes_on_when_its_block_is_there_whatever_else_is_on_its_way(
    device: FaultyMemory, client: Client
) -> None:
    with device.on("read", blocks=[9]).gate(DEADLINE) as gate:
        client.prefetch(9)
        client.prefetch(1)
        assert read(client, 1) == content(1)
        gate.wait_for(1)
        gate.open()


def test_reader_whose_block_is_on_its_way_reads_what_nobody_has_begun(device: FaultyMemory, threads: Threads) -> None:
    with AsyncEngine(max_in_flight=1) as engine, Client(device, SIZE, engine=engine) as client:
        with device.on("read", blocks=[1]).gate(DEADLINE) as gate:
            for block in (1, 3, 5, 7):
                client.prefetch(block)
            gate.wait_for(1)
            reader = threads.submit(read, client, 1)
            wait_until(lambda: client.stats.waits == 1)
            # The last of them is left to the engine's thread, which must not be idle.
            assert [client.get(block) is not None for block in (1, 3, 5, 7)] == [False, True, True, False]
            gate.open()
            assert result_of(reader) == content(1)
        assert read(client, 7) == content(7)
        assert len(device.ops("read")) == 4
        client.discard_all()


def test_interrupt_while_reading_something_else_leaves_nothing_to_wait_for(device: FaultyMemory) -> None:
    def interrupt(_: Call) -> None:
        raise KeyboardInterrupt

    with AsyncEngine(max_in_flight=1) as engine, Client(device, SIZE, engine=engine) as client:
        with device.on("read", blocks=[1]).gate(DEADLINE) as gate:
            device.on("read", blocks=[3], times=1).call(interrupt)
            for block in (1, 3, 5):
                client.prefetch(block)
            gate.wait_for(1)
            with pytest.raises(KeyboardInterrupt):
                client.read(1)
            gate.open()
        assert [read(client, block) for block in (1, 3, 5)] == [content(block) for block in (1, 3, 5)]
        assert client.stats.held == 0


def test_new_of_a_block_that_is_read_ahead_waits_for_it(device: FaultyMemory, client: Client, threads: Threads) -> None:
    with device.on("read").gate(DEADLINE) as gate:
        client.prefetch(3)
        gate.wait_for(1)
        new = threads.submit(client.new, 3)
        wait_until(lambda: client.stats.waits == 1)
        gate.open()
        buffer = result_of(new)
    assert buffer.data == content(3)
    buffer.release()


def test_failed_prefetch_is_tried_again_by_the_reader_that_waited_for_it(
    device: FaultyMemory, client: Client, threads: Threads
) -> None:
    with device.on("read", times=1).gate(DEADLINE) as gate:
        device.on("read", times=1).fail()
        client.prefetch(3)
        reader = threads.submit(read, client, 3)
        gate.open()
        assert result_of(reader) == content(3)


def test_reset_waits_for_what_is_on_its_way(device: FaultyMemory, client: Client, threads: Threads) -> None:
    with device.on("read").gate(DEADLINE) as gate:
        client.prefetch(3)
        gate.wait_for(1)
        reset = threads.submit(client.reset)
        wait_until(lambda: client.stats.waits == 1)
        assert not reset.done()
        gate.open()
        result_of(reset)
    assert client.stats.cached == 0


# Writing behind


def test_write_returns_while_the_device_writes(device: FaultyMemory, client: Client, threads: Threads) -> None:
    with device.on("write").gate(DEADLINE) as gate:
        for block in (1, 3):
            dirty(client, block, 100)
        client.write_dirty_buffers_async()
        gate.wait_for(2)
        assert client.stats.dirty == 2, "not written yet"
        dirty(client, 5, 100)
        writing = threads.submit(client.write_dirty_buffers)
        gate.wait_for(3)
        assert not writing.done()
        assert device.ops("flush") == []
        gate.open()
        result_of(writing)
    assert [on_device(device, block) for block in (1, 3, 5)] == [100] * 3
    assert [call.kind for call in device.log] == ["write"] * 3 + ["flush"]


def test_error_of_an_asynchronous_write_is_kept_for_the_next_write(device: FaultyMemory, client: Client) -> None:
    device.on("write", times=1).fail(errno.ENOSPC)
    dirty(client, 1, 100)
    client.write_dirty_buffers_async()
    wait_until(lambda: client._core.nr_writing == 0)
    assert client.stats.dirty == 1
    with pytest.raises(OSError, match="write") as caught:
        client.write_dirty_buffers()
    assert caught.value.errno == errno.ENOSPC
    client.write_dirty_buffers()
    assert on_device(device, 1) == 100


def test_buffer_changed_while_it_is_on_its_way_is_written_again(device: FaultyMemory, client: Client) -> None:
    with device.on("write", times=1).gate(DEADLINE) as gate:
        dirty(client, 1, 100)
        client.write_dirty_buffers_async()
        gate.wait_for(1)
        dirty(client, 1, 101)
        gate.open()
    client.write_dirty_buffers()
    assert on_device(device, 1) == 101
    assert len(device.ops("write")) == 2


def test_part_changed_while_a_write_is_on_its_way_that_fails(device: FaultyMemory, client: Client) -> None:
    """What was to be written then must be written yet, and not only the part that was changed since."""
    with device.on("write", times=1).gate(DEADLINE) as gate:
        device.on("write", times=1).fail()
        buffer = client.read(1)
        buffer.data[:10] = b"a" * 10
        buffer.mark_dirty(0, 10)
        client.write_dirty_buffers_async()
        gate.wait_for(1)
        buffer.data[20:30] = b"b" * 10
        buffer.mark_dirty(20, 30)
        buffer.release()
        gate.open()
    with pytest.raises(OSError, match="write"):
        client.write_dirty_buffers()
    client.write_dirty_buffers()
    changed = device.contents()[SIZE : SIZE + 30]
    assert (changed[:10], changed[20:30]) == (b"a" * 10, b"b" * 10)


def test_move_of_a_buffer_that_is_being_written_waits(device: FaultyMemory, client: Client, threads: Threads) -> None:
    with device.on("write", times=1).gate(DEADLINE) as gate:
        dirty(client, 1, 100)
        client.write_dirty_buffers_async()
        gate.wait_for(1)
        buffer = client.read(1)

        def move() -> None:
            buffer.release_move(20)

        moving = threads.submit(move)
        wait_until(lambda: client.stats.waits == 1)
        assert not moving.done()
        gate.open()
        result_of(moving)
    assert client.get(1) is None
    assert on_device(device, 1) == 100
    assert on_device(device, 20) == content(20)[0]
    client.write_dirty_buffers()
    assert on_device(device, 20) == 100


def test_shortage_of_memory_starts_writing_and_does_not_wait_for_it(device: FaultyMemory, few: Client) -> None:
    """From the threshold on; only at the limit, with nothing clean left, there is nothing else to be done."""
    few.set_minimum_buffers(16)
    with device.on("write").gate(DEADLINE) as gate:
        read(few, 40)
        for block in range(0, 28, 2):
            dirty(few, block, 100)
        gate.wait_for(1)
        assert few.stats.waits == 0
        gate.open()


def test_limit_is_kept_while_writes_are_on_their_way(device: FaultyMemory, few: Client, threads: Threads) -> None:
    with device.on("write").gate(DEADLINE) as gate:

        def use() -> int:
            for block in range(NR_BLOCKS):
                dirty(few, block, 100)
            return few.stats.cached

        using = threads.submit(use)
        gate.wait_for(1)
        wait_until(lambda: few.stats.waits > 0)
        assert few.stats.cached <= FEW
        gate.open()
        assert result_of(using) <= FEW
    few.write_dirty_buffers()
    assert [on_device(device, block) for block in range(NR_BLOCKS)] == [100] * NR_BLOCKS


def test_close_waits_for_writes_and_reports_their_error(
    device: FaultyMemory, engine: AsyncEngine, threads: Threads
) -> None:
    client = Client(device, SIZE, engine=engine)
    with device.on("write", times=1).gate(DEADLINE) as gate:
        device.on("write", times=1).fail()
        dirty(client, 1, 100)
        client.write_dirty_buffers_async()
        gate.wait_for(1)
        closing = threads.submit(client.close)
        wait_until(lambda: client.stats.waits > 0)
        assert not closing.done()
        gate.open()
        with pytest.raises(OSError, match="write"):
            result_of(closing)


def test_one_engine_serves_several_clients(device: FaultyMemory, engine: AsyncEngine) -> None:
    with Client(device, SIZE, engine=engine) as one, Client(device, SIZE, engine=engine) as two:
        one.prefetch(0, 10)
        two.prefetch(10, 10)
        assert [read(one, block) for block in range(10)] == [content(block) for block in range(10)]
        assert [read(two, block) for block in range(10, 20)] == [content(block) for block in range(10, 20)]
