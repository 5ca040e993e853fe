"""Threads that meet, writes that fail, callbacks that raise: what a review found in the buffer client."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import pytest

from bufio import Client, HoldError, WouldDeadlock, parameters
from bufio.core import BUFFER_OVERHEAD_BYTES
from persistent_data.block_manager import BlockManager, Validator
from persistent_data.errors import CorruptMetadata
from tests.support.devices import Op, ScriptedDevice, fail_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bufio import Buffer
    from bufio.device import ReadableBuffer

T = TypeVar("T")

SIZE = 4096
NR_BLOCKS = 64
DEADLINE = 20  # seconds
FEW = 8
"""Buffers of a client that is given hardly any memory."""
FEW_BYTES = FEW * (SIZE + BUFFER_OVERHEAD_BYTES)


def content(block: int) -> bytes:
    return bytes([block + 1]) * SIZE


@pytest.fixture
def device() -> ScriptedDevice:
    return ScriptedDevice(b"".join(content(block) for block in range(NR_BLOCKS)))


@pytest.fixture
def client(device: ScriptedDevice) -> Iterator[Client]:
    client = Client(device, SIZE)
    yield client
    device.script = None
    client.discard_all()


@pytest.fixture
def few(device: ScriptedDevice) -> Iterator[Client]:
    """A client with room for eight buffers and one in reserve."""
    client = Client(device, SIZE, cache_bytes=FEW_BYTES)
    yield client
    device.script = None
    client.discard_all()


class Threads:
    """Runs calls in threads of their own, which do not keep a test from ending when one of them hangs."""

    def submit(self, call: Callable[..., T], *args: object) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call(*args))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


@pytest.fixture
def threads() -> Threads:
    return Threads()


def result_of(future: Future[T]) -> T:
    return future.result(DEADLINE)


class Gate:
    """Holds up calls of one kind (that concern one block) until it is opened."""

    def __init__(self, kind: str, block: int | None = None) -> None:
        self._kind = kind
        self._block = block
        self._reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, op: Op) -> None:
        if op.kind == self._kind and (self._block is None or op.covers(self._block)):
            self._reached.set()
            assert self._open.wait(DEADLINE)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(DEADLINE)

    def open(self) -> None:
        self._open.set()


def wait_until(condition: Callable[[], bool]) -> None:
    """Let other threads go on until *condition* holds; each look takes the client's lock, so they get their turn."""
    deadline = threading.Event()
    timer = threading.Timer(DEADLINE, deadline.set)
    timer.start()
    try:
        while not condition():
            assert not deadline.is_set()
    finally:
        timer.cancel()


def read(client: Client, block: int) -> bytes:
    """Read a block and let go of it."""
    buffer = client.read(block)
    try:
        return bytes(buffer.data)
    finally:
        buffer.release()


def dirty(client: Client, block: int, value: int) -> None:
    """Change a block and let go of it."""
    buffer = client.new(block)
    buffer.data[:] = bytes([value]) * SIZE
    buffer.mark_dirty()
    buffer.release()


def on_device(device: ScriptedDevice, block: int) -> int:
    """The byte that a block of the device is full of."""
    found = set(device.contents()[block * SIZE : (block + 1) * SIZE])
    assert len(found) == 1
    return found.pop()


class CopyingDevice(ScriptedDevice):
    """Takes the data when it is asked to write, before the script holds it up, as a disk's own cache does."""

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        super().pwrite(bytes(data), offset)

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        super().pwritev([bytes(buffer) for buffer in buffers], offset)


class DirectDevice(ScriptedDevice):
    """As a device opened with O_DIRECT: whole sectors only, at a multiple of them."""

    direct = True

    def _ask(self, kind: str, offset: int = 0, length: int = 0) -> None:
        assert offset % 512 == 0
        assert length % 512 == 0
        super()._ask(kind, offset, length)


# Writing


def test_buffer_dirtied_again_while_another_thread_writes_it_is_written_by_write_dirty_buffers(
    threads: Threads,
) -> None:
    """What was on its way had the old content: it was waited for, flushed, and reported as everything."""
    device = CopyingDevice(NR_BLOCKS * SIZE)
    client = Client(device, SIZE)
    dirty(client, 3, 99)
    gate = device.script = Gate("write")
    early = threads.submit(client.write_dirty_buffers_async)
    gate.wait_until_reached()
    dirty(client, 3, 111)
    writer = threads.submit(client.write_dirty_buffers)
    wait_until(lambda: client.stats.waits >= 1)
    gate.open()
    result_of(early)
    result_of(writer)
    assert on_device(device, 3) == 111
    assert client.stats.dirty == 0
    assert device.log == [Op("write", 3 * SIZE, SIZE), Op("write", 3 * SIZE, SIZE), Op("flush")]


def test_cache_full_of_blocks_that_cannot_be_written_raises_the_write_error(
    device: ScriptedDevice, few: Client, threads: Threads
) -> None:
    """Nobody holds anything, so nobody gives anything back: it waited for ever."""
    device.script = fail_all("write")

    def fill() -> None:
        for block in range(30):
            dirty(few, block, 100)

    with pytest.raises(OSError, match="as told"):
        result_of(threads.submit(fill))
    dirtied = few.stats.dirty
    assert FEW <= dirtied < 30
    device.script = None
    with pytest.raises(OSError, match="as told"):
        few.write_dirty_buffers()
    few.write_dirty_buffers()
    assert [on_device(device, block) for block in range(dirtied)] == [100] * dirtied


def test_block_cached_while_others_could_not_be_written_has_one_buffer(
    device: ScriptedDevice, threads: Threads
) -> None:
    """The lock is given up for the write, and then another thread may have brought the block in."""
    client = Client(device, SIZE, reserved_buffers=2, cache_bytes=FEW_BYTES)
    device.script = fail_all("write")
    for block in range(FEW):
        dirty(client, block, 100)
    device.log.clear()
    gate = Gate("write")

    def script(op: Op) -> None:
        # All together, then one by one, for want of clean buffers; then the same again for want of any.
        if len(device.log) > FEW + 1:
            gate(op)
        raise OSError(errno.EIO, "as told")

    device.script = script
    one = threads.submit(client.new, 40)
    gate.wait_until_reached()
    other = client.new(40)
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
    device: ScriptedDevice, client: Client, start: int, end: int | None
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
def test_empty_range_makes_nothing_dirty(device: ScriptedDevice, client: Client, at: int) -> None:
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
    device: ScriptedDevice, client: Client, threads: Threads
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


def test_reader_of_the_new_block_waits_for_the_copy(device: ScriptedDevice, client: Client, threads: Threads) -> None:
    """It read the device while the copy was on its way, and kept the old content of the new block."""
    kept, given = client.read(3), client.read(3)
    gate = device.script = Gate("write", 40)
    mover = threads.submit(given.release_move, 40)
    gate.wait_until_reached()
    reader = threads.submit(read, client, 40)
    wait_until(lambda: client.stats.waits >= 1 or reader.done())
    assert not reader.done()
    gate.open()
    result_of(mover)
    assert result_of(reader) == content(3)
    assert on_device(device, 40) == 4
    kept.release()


def test_copy_that_cannot_be_written_leaves_the_new_block_as_it_was(device: ScriptedDevice, client: Client) -> None:
    kept, given = client.read(3), client.read(3)
    device.script = fail_all("write")
    with pytest.raises(OSError, match="as told"):
        given.release_move(40)
    device.script = None
    assert (kept.block_number, kept.hold_count) == (3, 2)
    assert read(client, 40) == content(40)
    given.release_move(40)
    assert read(client, 40) == content(3)
    kept.release()


def test_copy_is_completed_by_the_write_callback(device: ScriptedDevice) -> None:
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
    device: ScriptedDevice, threads: Threads
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


def test_read_of_a_borrowed_buffer_keeps_it_borrowed(device: ScriptedDevice, few: Client) -> None:
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
def test_alloc_callback_that_raises_leaves_nothing_cached(device: ScriptedDevice, take: str) -> None:
    """The buffer stayed in the cache with undefined contents, as if they were the block's."""
    before = parameters.current_allocated_bytes
    with Client(device, SIZE, alloc_callback=failing_at(0)) as client:
        with pytest.raises(MemoryError):
            getattr(client, take)(3)
        assert client.stats.cached == 0
        assert parameters.current_allocated_bytes == before
        assert read(client, 3) == content(3)


def test_alloc_callback_that_raises_while_reading_ahead_leaves_no_block_being_read(device: ScriptedDevice) -> None:
    """Blocks before the one that could not be set up are waiting for a read that nobody does."""
    with Client(device, SIZE, alloc_callback=failing_at(2)) as client:
        with pytest.raises(MemoryError):
            client.prefetch(3, 4)
        cached = [client.peek(block) for block in range(3, 7)]
        assert not any(buffer is not None and buffer.reading for buffer in cached)
        assert [read(client, block) for block in range(3, 7)] == [content(block) for block in range(3, 7)]


# Waiting


def test_reader_waits_while_another_threads_read_is_in_flight(
    device: ScriptedDevice, few: Client, threads: Threads
) -> None:
    """The other thread will have a buffer to give back as soon as its read is done: that is no deadlock."""
    mine = [few.read(block) for block in range(FEW)]
    gate = device.script = Gate("read", 50)
    other = threads.submit(read, few, 50)
    gate.wait_until_reached()
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
    device: ScriptedDevice, threads: Threads, lock: str
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


def test_closed_client_refuses_to_cache_anything(device: ScriptedDevice) -> None:
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
