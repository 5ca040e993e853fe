"""What a review of the caches found that the other tests had let pass.

Each heading tells what went wrong, and each wait has a deadline.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import bufio.engine
from bufio import AsyncEngine, Bcache, Block, BlocksNotWritten, Client, FileDevice, GetFlags, MemoryDevice, parameters
from bufio.core import BUFFER_OVERHEAD_BYTES
from bufio.testing import FaultyDevice
from tests.support.bufio import DEADLINE, FEW_BYTES, SIZE, Threads, allocated_bytes, result_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from bufio.device import ReadableBuffer, WritableBuffer
    from bufio.testing.faulty import Call

NR_BLOCKS = 16
SECTORS = SIZE // 512


def filled(value: int) -> bytes:
    return bytes([value]) * SIZE


@pytest.fixture
def memory() -> MemoryDevice:
    return MemoryDevice(filled(7) * NR_BLOCKS)


@pytest.fixture
def device(memory: MemoryDevice) -> FaultyDevice[MemoryDevice]:
    return FaultyDevice(memory)


def change(client: Client, block: int, value: int) -> None:
    buffer = client.new(block)
    buffer.data[:] = filled(value)
    buffer.mark_dirty()
    buffer.release()


def change_in(cache: Bcache, device: FaultyDevice[MemoryDevice], index: int, value: int) -> None:
    block = cache.get(device, index, GetFlags.ZERO)
    block.data[:] = filled(value)
    block.put()


def kinds(device: FaultyDevice[MemoryDevice]) -> list[str]:
    return [call.kind for call in device.log]


# Errors


def test_block_that_was_written_at_the_second_try_is_not_in_error_any_more(device: FaultyDevice[MemoryDevice]) -> None:
    """It kept the error of the first: it was never written early again, and a full cache of such blocks gave up."""
    cache = Bcache(SECTORS, 2)
    rule = device.on("write").fail()
    for index in (0, 1):
        change_in(cache, device, index, 1)
    with pytest.raises(BlocksNotWritten):
        cache.flush()
    rule.remove()
    cache.flush()
    for index in (0, 1):
        change_in(cache, device, index, 2)
    cache.get(device, 5).put()
    cache.close()


class SlowFailure:
    """The first flush of a device is held up, and fails; those after it succeed."""

    def __init__(self, device: FaultyDevice[MemoryDevice]) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        device.on("flush", times=1).call(self)

    def __call__(self, _call: Call) -> None:
        self.begun.set()
        assert self.go_on.wait(DEADLINE)
        raise OSError(5, "the flush failed")


def in_vain(first: Future[Any], second: Future[Any], slow: SlowFailure) -> None:
    """Check that *second*, which began while *first* was flushing, neither overtook it nor took it for a success."""
    assert not second.done()
    slow.go_on.set()
    for future in (first, second):
        with pytest.raises(OSError, match="the flush failed"):
            result_of(future)


@pytest.mark.parametrize("second", [Client.write_dirty_buffers, Client.drop_buffers, Client.close])
def test_failed_flush_is_everybodys_who_waits_for_it(
    device: FaultyDevice[MemoryDevice], threads: Threads, second: Callable[[Client], None]
) -> None:
    """A device tells of a failure once: whoever flushed beside the one that was told took its blocks for durable."""
    client = Client(device, SIZE)
    change(client, 1, 1)
    slow = SlowFailure(device)
    writer = threads.submit(client.write_dirty_buffers)
    assert slow.begun.wait(DEADLINE)
    other = threads.submit(second, client)
    wait_until(lambda: client.stats.waits == 1 or other.done())
    in_vain(writer, other, slow)
    client.discard_all()


@pytest.mark.parametrize("second", [Bcache.flush, Bcache.close])
def test_bcache_does_not_take_for_durable_what_another_thread_is_flushing(
    device: FaultyDevice[MemoryDevice], threads: Threads, second: Callable[[Bcache], object]
) -> None:
    """What a flush covers was not known to anybody else, so that others returned at once, and close forgot it."""
    cache = Bcache(SECTORS, 4)
    change_in(cache, device, 0, 1)
    slow = SlowFailure(device)
    flusher = threads.submit(cache.flush)
    assert slow.begun.wait(DEADLINE)
    other = threads.submit(second, cache)
    wait_until(lambda: cache.stats.waits == 1 or other.done())
    in_vain(flusher, other, slow)
    assert cache.stats.dirty == 1
    cache.close()


def test_close_flushes_what_was_written_before(device: FaultyDevice[MemoryDevice]) -> None:
    """With nothing dirty left it did not, and what memory pressure had written was not durable."""
    client = Client(device, SIZE)
    change(client, 1, 1)
    client.write_dirty_buffers_async()
    client.close()
    assert kinds(device) == ["write", "flush"]


def test_device_is_not_given_up_with_writes_that_nobody_flushes(
    device: FaultyDevice[MemoryDevice], threads: Threads
) -> None:
    """What others changed during the flush was written after it, and the device forgotten."""
    cache = Bcache(SECTORS, 4)
    change_in(cache, device, 0, 1)
    with device.on("flush", times=1).gate() as gate:
        giving_up = threads.submit(cache.invalidate_device, device)
        gate.wait_for()
        change_in(cache, device, 1, 2)
    assert result_of(giving_up)
    assert kinds(device) == ["write", "flush", "write", "flush"]
    cache.close()


# What is read ahead


class LateDevice(MemoryDevice):
    """Reads at once, and says so later."""

    def __init__(self, contents: bytes) -> None:
        super().__init__(contents)
        self.nr_waiting = 0
        self.go_on = threading.Event()

    def readinto(self, buffer: WritableBuffer, offset: int) -> None:
        super().readinto(buffer, offset)
        self.nr_waiting += 1
        assert self.go_on.wait(DEADLINE)

    def preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        for buffer in buffers:
            super().readinto(buffer, offset)
            offset += memoryview(buffer).nbytes
        self.nr_waiting += 1
        assert self.go_on.wait(DEADLINE)

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        super().pwrite(data, offset)


def test_discarded_block_is_not_cached_by_a_read_that_began_before(threads: Threads) -> None:
    late = LateDevice(filled(7) * NR_BLOCKS)
    with AsyncEngine() as engine, Client(late, SIZE, engine=engine) as client:
        client.prefetch(0, 4)
        wait_until(lambda: late.nr_waiting == 1)
        discarding = threads.submit(client.issue_discard, 0, 4)
        wait_until(lambda: client.stats.waits == 1 or discarding.done())
        late.go_on.set()
        result_of(discarding)
        buffer = client.read(0)
        assert bytes(buffer.data) == bytes(SIZE)
        buffer.release()


def test_dropped_cache_is_empty_whatever_was_on_its_way(threads: Threads) -> None:
    late = LateDevice(filled(7) * NR_BLOCKS)
    with AsyncEngine() as engine, Client(late, SIZE, engine=engine) as client:
        client.prefetch(0, 4)
        wait_until(lambda: late.nr_waiting == 1)
        dropping = threads.submit(client.drop_buffers)
        wait_until(lambda: client.stats.waits == 1 or dropping.done())
        late.go_on.set()
        result_of(dropping)
        engine.drain()
        assert client.stats.cached == 0


# Others who never stop


def busy_readers(threads: Threads, read: Callable[[int], None]) -> tuple[threading.Event, list[Future[None]]]:
    """Have four threads read misses, so that something is on its way at all times, until the event is set."""
    stop = threading.Event()

    def work(block: int) -> None:
        while not stop.is_set():
            read(block % 2000)
            block += 7

    return stop, [threads.submit(work, number) for number in range(4)]


def test_flush_does_not_wait_for_what_others_begin_meanwhile(threads: Threads) -> None:
    device = FaultyDevice(MemoryDevice(2000 * SIZE))
    device.on("read").delay(latency_seconds=0.001)
    cache = Bcache(SECTORS, 20)
    stop, readers = busy_readers(threads, lambda index: cache.get(device, index).put())
    try:
        wait_until(lambda: cache.stats.reads > 4)
        result_of(threads.submit(cache.flush))
    finally:
        stop.set()
    for reader in readers:
        result_of(reader)
    cache.close()


def test_reset_does_not_wait_for_what_others_begin_meanwhile(threads: Threads) -> None:
    device = FaultyDevice(MemoryDevice(2000 * SIZE))
    device.on("read").delay(latency_seconds=0.001)
    client = Client(device, SIZE, cache_bytes=FEW_BYTES)
    stop, readers = busy_readers(threads, lambda block: client.read(block).release())
    try:
        wait_until(lambda: client.stats.reads > 4)
        result_of(threads.submit(client.reset))
    finally:
        stop.set()
    for reader in readers:
        result_of(reader)
    client.close()


# Threads


def test_work_does_not_wait_for_a_thread_that_is_about_to_end(
    memory: MemoryDevice, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had left the list of the idle, and was counted all the same: nobody was started in its place."""
    monkeypatch.setattr(bufio.engine, "_IDLE_SECONDS", 0.001)
    engine = AsyncEngine(max_in_flight=1)
    ending, go_on = threading.Event(), threading.Event()
    next_job = engine._next_job

    def hold_up(wake: threading.Lock) -> object:
        job = next_job(wake)
        if job is None:
            ending.set()
            assert go_on.wait(DEADLINE)
        return job

    monkeypatch.setattr(engine, "_next_job", hold_up)
    client = Client(memory, SIZE, engine=engine)
    client.prefetch(0)
    assert ending.wait(DEADLINE)
    client.prefetch(1)
    go_on.set()
    result_of(threads.submit(lambda: client.read(1).release()))
    client.close()
    engine.close()


def test_interrupt_while_a_thread_is_started_leaves_an_engine_that_closes(
    memory: MemoryDevice, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread ran all the same, and was taken off the count twice."""
    engine = AsyncEngine(max_in_flight=1)
    start = threading.Thread.start

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    client = Client(memory, SIZE, engine=engine)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.prefetch(0)
    for _ in range(2):
        result_of(threads.submit(engine.close))
        wait_until(lambda: not any(thread.name == "bufio" for thread in threading.enumerate()))
    client.prefetch(0)
    client.read(0).release()
    client.close()
    result_of(threads.submit(engine.close))


def test_no_thread_to_look_at_ages_is_no_reason_not_to_read(
    memory: MemoryDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read failed, its memory was lost, and no thread was ever tried for again."""

    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(parameters._ageing, "running", False)
    monkeypatch.setattr(parameters, "_retain_bytes", 0)
    with Client(memory, SIZE) as client:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            client.read(0).release()
        assert not parameters.ageing
        client.read(1).release()
        assert parameters.ageing


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_ages_are_looked_at_in_a_forked_process_too(memory: MemoryDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """It believed that it had its parent's thread."""
    monkeypatch.setattr(parameters, "_retain_bytes", 0)
    with Client(memory, SIZE) as client:
        client.read(0).release()
        assert parameters.ageing
        child = os.fork()
        if not child:
            try:
                had = parameters.ageing
                client.read(1).release()
                os._exit(0 if parameters.ageing and not had else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_thread_that_nobody_woke_after_all_works_again(
    memory: MemoryDevice, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt came after it was taken off the list of the idle: it waited for ever, and whoever drained too."""
    monkeypatch.setattr(bufio.engine, "_IDLE_SECONDS", 0.05)
    engine = AsyncEngine(max_in_flight=1)
    client = Client(memory, SIZE, engine=engine)
    client.prefetch(0)
    wait_until(lambda: bool(engine._idle))
    with engine._lock:
        engine._idle.pop()
    result_of(threads.submit(engine.drain))
    client.prefetch(1)
    client.read(1).release()
    client.close()
    result_of(threads.submit(engine.close))


def test_interrupt_when_a_read_has_the_lock_again_leaves_nothing_to_wait_for(
    memory: MemoryDevice, threads: Threads
) -> None:
    client = Client(memory, SIZE)
    take_again = client._core.take_again
    interrupts = iter([KeyboardInterrupt])

    def interrupted(me: tuple[int, int]) -> None:
        take_again(me)
        for interrupt in interrupts:
            raise interrupt

    client._core.take_again = interrupted
    with pytest.raises(KeyboardInterrupt):
        client.read(1)
    result_of(threads.submit(lambda: client.read(1).release()))
    assert client.stats.cached == 1
    client.close()


def test_interrupt_while_a_read_waits_for_the_lock_waits_too(
    device: FaultyDevice[MemoryDevice], threads: Threads
) -> None:
    """The waiting ended without the lock, and at the end of the call that of another thread was given back."""
    client = Client(device, SIZE)
    taken = threading.Event()
    main = threading.get_ident()

    def take_the_lock_and_interrupt() -> None:
        with client._lock:
            taken.set()
            time.sleep(0.02)
            signal.pthread_kill(main, signal.SIGUSR1)
            time.sleep(0.02)

    others = []

    def hand_over(_: Call) -> None:
        others.append(threads.submit(take_the_lock_and_interrupt))
        assert taken.wait(DEADLINE)

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    device.on("read", times=1).call(hand_over)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            client.read(1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    result_of(others[0])
    result_of(threads.submit(lambda: client.read(1).release()))
    client.close()


def test_interrupted_read_ahead_of_a_bcache_leaves_nothing_to_wait_for(
    device: FaultyDevice[MemoryDevice], threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks before the one at which it was interrupted were expected for ever."""
    cache = Bcache(SECTORS, 8)

    def interrupt(_block: Block) -> None:
        if cache._core.nr_reading == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_zero_tail", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.prefetch_bytes(device, 0, 8 * SIZE)
    result_of(threads.submit(cache.flush))
    cache.get(device, 1).put()
    cache.close()


# Memory


@pytest.mark.parametrize("make", [lambda device: Client(device, SIZE), lambda _: Bcache(SECTORS, 8)])
def test_cache_that_nobody_closed_is_taken_out_of_the_account(
    memory: MemoryDevice, make: Callable[[MemoryDevice], Client | Bcache]
) -> None:
    gc.collect()
    before = allocated_bytes()
    cache = make(memory)
    if isinstance(cache, Client):
        for block in range(8):
            cache.read(block).release()
    assert parameters.current_allocated_bytes == before + 8 * (SIZE + BUFFER_OVERHEAD_BYTES)
    del cache
    gc.collect()
    assert parameters.current_allocated_bytes == before


def test_list_of_what_to_evict_does_not_keep_memory_alive(memory: MemoryDevice) -> None:
    with Client(memory, SIZE, cache_bytes=FEW_BYTES) as client:
        for block in range(NR_BLOCKS):
            client.read(block).release()
        listed = list(client._core._hand)
        assert listed
        client.drop_buffers()
        assert {buffer.data.nbytes for buffer in listed} == {0}


# Misuse


def test_nothing_lies_before_the_first_block(memory: MemoryDevice) -> None:
    """With a sector offset there is something: it was overwritten, or discarded."""
    with Client(memory, SIZE) as client:
        client.set_sector_offset(SECTORS)
        for wrong in (lambda: client.new(-1), lambda: client.issue_discard(-1, 1)):
            with pytest.raises(OSError, match="there is no block -1"):
                wrong()
        buffer = client.read(0)
        with pytest.raises(OSError, match="there is no block -1"):
            buffer.release_move(-1)
        buffer.release()
    assert memory.contents() == filled(7) * NR_BLOCKS


def test_numbers_below_zero_are_refused(memory: MemoryDevice) -> None:
    with pytest.raises(ValueError, match="reserved_buffers"):
        Client(memory, SIZE, reserved_buffers=-1)
    with Client(memory, SIZE) as client:
        with pytest.raises(ValueError, match="minimum"):
            client.set_minimum_buffers(-1)
        with pytest.raises(ValueError, match="sector offset"):
            client.set_sector_offset(-8)


def test_bytes_of_a_block_cut_short_are_counted_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(bytes(2 * SIZE + 1000))
    with FileDevice(path) as device, Bcache(SECTORS, 4) as cache:
        cache.zero_bytes(device, 2 * SIZE, 1000)
        cache.flush()
        assert cache.stats.bytes_written == 1000
