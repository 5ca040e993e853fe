"""One contract for the engines: what was asked for is done, once, and one bad place costs one view."""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING

import pytest

from bufio import AsyncEngine, SyncEngine
from bufio.engine import MAX_COALESCED_BYTES, coalesce, split
from bufio.testing import Call
from tests.support.devices import FaultyMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bufio.engine import Done, Engine, Extent

    Join = Callable[[int, list[memoryview], int], list[Extent]]
    from bufio.testing import Kind

SIZE = 4096
NR_BLOCKS = 4096
CONTENT = b"".join(block.to_bytes(4, "little") * (SIZE // 4) for block in range(NR_BLOCKS))
DEADLINE = 20  # seconds


def coalesce_blocks(start: int, views: list[memoryview], size: int) -> list[Extent]:
    return coalesce([start + size * number for number in range(len(views))], views)


WAYS_TO_JOIN = pytest.mark.parametrize("joined", [split, coalesce_blocks])
BOTH = {"synchronous": SyncEngine, "asynchronous": AsyncEngine}


@pytest.fixture(params=BOTH)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = BOTH[request.param]()
    yield engine
    engine.close()


@pytest.fixture(params=[False, True], ids=["", "waiting"])
def waiting(request: pytest.FixtureRequest) -> bool:
    waiting: bool = request.param
    return waiting


@pytest.fixture
def device() -> FaultyMemory:
    return FaultyMemory(CONTENT)


class Results:
    """What an engine reported of each view."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()
        self._all = threading.Event()
        self.errors: list[OSError | str | None] = ["never reported"] * count

    def done(self, first: int, results: list[OSError | None]) -> None:
        with self._lock:
            for at, error in enumerate(results, first):
                assert self.errors[at] == "never reported"
                self.errors[at] = error
            self._left -= len(results)
            if not self._left:
                self._all.set()

    def wait(self) -> list[int | None]:
        assert self._all.wait(DEADLINE)
        return [error.errno if isinstance(error, OSError) else None for error in self.errors]


def extents_of(blocks: list[int], content: Callable[[int], bytes] | None = None) -> list[Extent]:
    views = [memoryview(bytearray(bytes(SIZE) if content is None else content(block))) for block in blocks]
    return coalesce([block * SIZE for block in blocks], views)


def carry_out(
    start: Callable[..., None], device: FaultyMemory, extents: list[Extent], *, waiting: bool
) -> list[int | None]:
    results = Results(sum(len(views) for _, views in extents))
    start(device, extents, results.done, waiting=waiting)
    return results.wait()


def views_of(extents: list[Extent]) -> list[memoryview]:
    return [view for _, views in extents for view in views]


def marked(block: int) -> bytes:
    return bytes([block % 251 + 1]) * SIZE


def test_reading_fills_every_view(engine: Engine, device: FaultyMemory, waiting: bool) -> None:
    blocks = [0, 1, 2, 7, 9, 10, 500, *range(1000, 2000)]
    extents = extents_of(blocks)
    assert carry_out(engine.start_read, device, extents, waiting=waiting) == [None] * len(blocks)
    for block, view in zip(blocks, views_of(extents), strict=True):
        assert view == CONTENT[block * SIZE : (block + 1) * SIZE]


def test_writing_writes_every_view_and_nothing_else(engine: Engine, device: FaultyMemory, waiting: bool) -> None:
    blocks = [3, 4, 8, *range(100, 700), NR_BLOCKS - 1]
    extents = extents_of(blocks, marked)
    assert carry_out(engine.start_write, device, extents, waiting=waiting) == [None] * len(blocks)
    expected = bytearray(CONTENT)
    for block in blocks:
        expected[block * SIZE : (block + 1) * SIZE] = marked(block)
    assert device.contents() == expected


def test_an_extent_is_one_call(engine: Engine, device: FaultyMemory, waiting: bool) -> None:
    carry_out(engine.start_read, device, extents_of([1, 2, 3, 5, 7, 8]), waiting=waiting)
    assert sorted(device.log) == [
        Call("read", 1 * SIZE, 3 * SIZE),
        Call("read", 5 * SIZE, SIZE),
        Call("read", 7 * SIZE, 2 * SIZE),
    ]
    assert engine.calls == 3


@pytest.mark.parametrize("kind", ["read", "write"])
def test_bad_block_does_not_take_its_neighbours_with_it(
    engine: Engine, device: FaultyMemory, waiting: bool, kind: Kind
) -> None:
    device.on(kind, blocks=[12]).fail()
    extents = extents_of([11, 12, 13, 20], marked)
    start = engine.start_read if kind == "read" else engine.start_write
    assert carry_out(start, device, extents, waiting=waiting) == [None, errno.EIO, None, None]
    if kind == "write":
        contents = device.contents()
        assert contents[11 * SIZE : 12 * SIZE] == marked(11)
        assert contents[12 * SIZE : 13 * SIZE] == CONTENT[12 * SIZE : 13 * SIZE]
        assert contents[13 * SIZE : 14 * SIZE] == marked(13)


def test_what_lies_beyond_the_end_is_an_error_of_its_own(engine: Engine, device: FaultyMemory, waiting: bool) -> None:
    extents = extents_of([NR_BLOCKS - 1, NR_BLOCKS])
    assert carry_out(engine.start_read, device, extents, waiting=waiting) == [None, errno.EIO]


def test_drain_returns_when_everything_is_reported(engine: Engine, device: FaultyMemory) -> None:
    device.on("read", "write").delay(latency_seconds=0.002)
    results = [Results(1) for _ in range(100)]
    for block, result in enumerate(results):
        engine.start_read(device, extents_of([2 * block]), result.done)
    engine.drain()
    assert [result.errors for result in results] == [[None]] * 100


def test_engine_serves_several_threads_and_devices(engine: Engine) -> None:
    devices = [FaultyMemory(CONTENT) for _ in range(3)]
    failures: list[BaseException] = []

    def use(number: int) -> None:
        try:
            for turn in range(40):
                device = devices[(number + turn) % 3]
                blocks = list(range(number * 400 + turn, number * 400 + turn + 300, 1 + turn % 3))
                extents = extents_of(blocks)
                assert carry_out(engine.start_read, device, extents, waiting=bool(turn % 2)) == [None] * len(blocks)
                for block, view in zip(blocks, views_of(extents), strict=True):
                    assert view == CONTENT[block * SIZE : (block + 1) * SIZE]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


# Joining neighbours


@WAYS_TO_JOIN
def test_extents_are_bounded(joined: Join) -> None:
    views = [memoryview(bytearray(SIZE)) for _ in range(1000)]
    extents = joined(7 * SIZE, views, SIZE)
    assert max(sum(view.nbytes for view in views) for _, views in extents) == MAX_COALESCED_BYTES
    assert [offset // SIZE for offset, _ in extents] == [7, 263, 519, 775]
    assert views_of(extents) == views


def test_extents_with_gaps_are_bounded_too() -> None:
    extents = extents_of([0, *range(2, 700)])
    assert [(offset // SIZE, len(views)) for offset, views in extents] == [(0, 1), (2, 256), (258, 256), (514, 186)]


@WAYS_TO_JOIN
def test_view_longer_than_the_bound_is_an_extent_of_its_own(joined: Join) -> None:
    size = 2 * MAX_COALESCED_BYTES
    views = [memoryview(bytearray(size)) for _ in range(3)]
    assert joined(0, views, size) == [(0, views[:1]), (size, views[1:2]), (2 * size, views[2:])]


def test_parts_of_blocks_join_where_they_touch() -> None:
    parts = [memoryview(bytearray(length)) for length in (100, 412, 512, 10)]
    extents = coalesce([412, 512, 924, 1500], parts)
    assert extents == [(412, parts[:3]), (1500, parts[3:])]


# What only the asynchronous one has


def test_several_transfers_are_in_flight_at_a_time(device: FaultyMemory) -> None:
    """A barrier that as many as the engine's limit must reach together, or it breaks."""
    together = threading.Barrier(4)
    device.on("read").call(lambda _: together.wait(DEADLINE))
    with AsyncEngine(max_in_flight=4) as engine:
        blocks = [2 * number for number in range(8)]
        assert carry_out(engine.start_read, device, extents_of(blocks), waiting=False) == [None] * 8


def test_no_more_transfers_are_in_flight_than_allowed(device: FaultyMemory) -> None:
    lock = threading.Lock()
    now = most = 0

    def count(_: Call) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.001)
        with lock:
            now -= 1

    device.on("read").call(count)
    with AsyncEngine(max_in_flight=3) as engine:
        carry_out(engine.start_read, device, extents_of([2 * number for number in range(60)]), waiting=False)
    assert most == 3


def test_start_returns_while_the_device_is_busy(device: FaultyMemory) -> None:
    free = threading.Event()
    device.on("read").call(lambda _: free.wait(DEADLINE))
    results = Results(1)
    with AsyncEngine() as engine:
        engine.start_read(device, extents_of([1]), results.done)
        assert results.errors == ["never reported"]
        free.set()
        assert results.wait() == [None]


class Backlog:
    """An engine with one thread, which the device holds up in block 0, and reads of blocks that nobody has begun."""

    def __init__(self, device: FaultyMemory, queued: list[Extent]) -> None:
        self.free = threading.Event()
        self.begun = threading.Event()
        device.on("read", blocks=[0]).call(self._hold_up)
        self.engine = AsyncEngine(max_in_flight=1)
        self.first = Results(1)
        self.engine.start_read(device, extents_of([0]), self.first.done)
        assert self.begun.wait(DEADLINE)
        self.results = Results(sum(len(views) for _, views in queued))
        self.engine.start_read(device, queued, self.results.done)

    def _hold_up(self, _: Call) -> None:
        self.begun.set()
        assert self.free.wait(DEADLINE)

    def end(self) -> list[int | None]:
        self.free.set()
        self.engine.close()
        assert self.first.wait() == [None]
        return self.results.wait()


def test_who_waits_carries_out_the_oldest_read_that_can_be_spared(device: FaultyMemory) -> None:
    backlog = Backlog(device, extents_of([2, 4, 6]))
    assert backlog.engine.assist(device)
    assert backlog.results.errors == [None, "never reported", "never reported"]
    assert backlog.engine.assist(device)
    # The last one is for the thread.
    assert not backlog.engine.assist(device)
    assert backlog.results.errors == [None, None, "never reported"]
    assert backlog.end() == [None] * 3


def test_nobody_assists_with_another_device_or_long_reads_or_writes(device: FaultyMemory) -> None:
    backlog = Backlog(device, extents_of([2, 3, 6, 7, 10]))
    assert not backlog.engine.assist(FaultyMemory(CONTENT))
    assert not backlog.engine.assist(device)
    assert backlog.end() == [None] * 5
    backlog = Backlog(device, [])
    written = Results(3)
    backlog.engine.start_write(device, extents_of([2, 4, 6], marked), written.done)
    assert not backlog.engine.assist(device)
    backlog.free.set()
    assert written.wait() == [None] * 3
    backlog.engine.close()


def test_read_that_fails_is_reported_by_who_assists(device: FaultyMemory) -> None:
    device.on("read", blocks=[2]).fail(errno.EIO)
    backlog = Backlog(device, extents_of([2, 4]))
    assert backlog.engine.assist(device)
    assert backlog.end() == [errno.EIO, None]


def test_interrupt_of_who_assists_is_reported_for_what_it_read(device: FaultyMemory) -> None:
    def interrupt(_: Call) -> None:
        raise KeyboardInterrupt

    device.on("read", blocks=[2]).call(interrupt)
    backlog = Backlog(device, extents_of([2, 4]))
    with pytest.raises(KeyboardInterrupt):
        backlog.engine.assist(device)
    assert backlog.end() == [errno.EIO, None]


def test_drain_waits_for_who_assists(device: FaultyMemory) -> None:
    slow = threading.Event()
    begun = threading.Event()

    def hold_up(_: Call) -> None:
        begun.set()
        assert slow.wait(DEADLINE)

    device.on("read", blocks=[2]).call(hold_up)
    backlog = Backlog(device, extents_of([2, 4]))
    helper = threading.Thread(target=backlog.engine.assist, args=(device,), daemon=True)
    helper.start()
    assert begun.wait(DEADLINE)
    drained = threading.Event()

    def drain() -> None:
        backlog.engine.drain()
        drained.set()

    drainer = threading.Thread(target=drain, daemon=True)
    drainer.start()
    backlog.free.set()
    assert not drained.wait(0.05)
    slow.set()
    assert drained.wait(DEADLINE)
    helper.join(DEADLINE)
    drainer.join(DEADLINE)
    assert backlog.end() == [None, None]


def test_exception_of_another_kind_reaches_whoever_waits(device: FaultyMemory) -> None:
    """In a thread nobody would see it, and its views would be in flight for ever."""

    def broken(_: Call) -> None:
        raise ValueError("not a device error")

    device.on("read").call(broken)
    results = Results(2)
    with AsyncEngine() as engine:
        engine.start_read(device, extents_of([1, 2]), results.done)
        assert results.wait() == [errno.EIO] * 2
        assert isinstance(results.errors[0], OSError)
        assert "not a device error" in str(results.errors[0])


def test_close_ends_the_threads_and_the_engine_can_be_used_again(device: FaultyMemory) -> None:
    before = threading.active_count()
    engine = AsyncEngine()
    for _ in range(3):
        carry_out(engine.start_read, device, extents_of([2 * n for n in range(20)]), waiting=False)
        engine.close()
        assert threading.active_count() <= before


@pytest.mark.parametrize("limit", [0, -1])
def test_an_engine_needs_something_in_flight(limit: int) -> None:
    with pytest.raises(ValueError, match=str(limit)):
        AsyncEngine(max_in_flight=limit)


def test_system_without_threads_to_spare_is_told_before_anything_is_begun(
    device: FaultyMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: Done = lambda first, results: pytest.fail("nothing was begun")  # noqa: E731
    engine = AsyncEngine()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            engine.start_read(device, extents_of([1]), done)
        engine.drain()
    assert carry_out(engine.start_read, device, extents_of([1]), waiting=False) == [None]
    engine.close()
