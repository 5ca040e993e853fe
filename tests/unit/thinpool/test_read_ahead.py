"""Walks ask for what comes next before they come to it: nothing is read twice, or in vain, or one after the other."""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING

import pytest

from bufio import AsyncEngine, MemoryDevice, SyncEngine
from tests.support.devices import FaultyMemory
from tests.support.pools import assert_sound, content_of
from thinpool import PoolMetadata, delta

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bufio.engine import Engine
    from bufio.testing import Call

BLOCK = 4096
NR_MAPPINGS = 30_000
NR_CHANGED = 40
STEP = 1000
"""Thin blocks between two mappings: none goes on from the one before."""
FEW_BYTES = 40 * (BLOCK + 1024)
"""A cache that holds a part of the tree."""

ENGINES = {"synchronous": SyncEngine, "asynchronous": AsyncEngine}


def build(order: Iterable[int]) -> bytes:
    """Device 0 with a few hundred leaves, device 1 with all but a few of them."""
    device = MemoryDevice(4 << 20)
    with PoolMetadata.format(device, 128, 2 * NR_MAPPINGS) as pool:
        pool.create_thin(0)
        with pool.open_thin_device(0) as thin:
            for block in order:
                thin.insert_block(block * STEP, pool.alloc_data_block())
        pool.create_snap(1, 0)
        with pool.open_thin_device(1) as thin:
            for block in range(0, NR_MAPPINGS, NR_MAPPINGS // NR_CHANGED):
                thin.insert_block(block * STEP, pool.alloc_data_block())
    return device.contents()


@pytest.fixture(scope="module")
def image() -> bytes:
    """Leaves that follow each other lie side by side, as one that is written from its beginning has them."""
    return build(range(NR_MAPPINGS))


@pytest.fixture(scope="module")
def scattered() -> bytes:
    """Leaves that follow each other lie anywhere."""
    prime = 7919
    return build(number * prime % NR_MAPPINGS for number in range(NR_MAPPINGS))


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = ENGINES[request.param]()
    yield engine
    engine.close()


def blocks_read(device: FaultyMemory) -> list[int]:
    return [
        block for offset, length in device.ops("read") for block in range(offset // BLOCK, (offset + length) // BLOCK)
    ]


class InFlight:
    """Counts the reads that are in flight at a time, each of which takes a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = 0
        self.most = 0

    def __call__(self, _: Call) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(0.004)
        with self._lock:
            self._now -= 1


def iterate(pool: PoolMetadata) -> int:
    with pool.open_thin_device(0) as thin:
        return sum(run.length for run in thin.mappings())


def compare(pool: PoolMetadata) -> int:
    with pool.open_thin_device(0) as left, pool.open_thin_device(1) as right:
        return sum(difference.length for difference in delta(left, right))


def delete(pool: PoolMetadata) -> int:
    pool.delete_thin_device(1)
    pool.delete_thin_device(0)
    return len(list(pool.devices()))


def discard(pool: PoolMetadata) -> int:
    with pool.open_thin_device(1) as thin:
        thin.remove_range(0, NR_MAPPINGS * STEP)
        return thin.mapped_count


WALKS: dict[str, tuple[Callable[[PoolMetadata], int], int]] = {
    "iterate": (iterate, NR_MAPPINGS),
    "compare": (compare, NR_CHANGED),
    "delete": (delete, 0),
    "discard": (discard, 0),
}


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("cache_bytes", [None, FEW_BYTES], ids=["", "small cache"])
def test_walk_reads_nothing_twice(image: bytes, engine: Engine, walk: str, cache_bytes: int | None) -> None:
    call, expected = WALKS[walk]
    device = FaultyMemory(image)
    with PoolMetadata.open(device, engine=engine, cache_bytes=cache_bytes) as pool:
        device.log.clear()
        assert call(pool) == expected
        read = blocks_read(device)
    if cache_bytes is None:
        assert len(read) == len(set(read))
    else:
        # Space maps and inner nodes may have to come back, leaves not.
        assert len(read) <= 1.2 * len(set(read))
    assert_sound(device)


def test_what_a_walk_leaves_behind_does_not_depend_on_the_engine(image: bytes) -> None:
    contents = []
    for make in ENGINES.values():
        device = FaultyMemory(image)
        engine = make()
        with PoolMetadata.open(device, engine=engine, cache_bytes=FEW_BYTES) as pool:
            discard(pool)
            pool.commit()
            pool.delete_thin_device(0)
        engine.close()
        contents.append(device.contents())
    assert contents[0] == contents[1]
    assert content_of(contents[0]).mappings == {1: {}}


@pytest.mark.parametrize("walk", WALKS)
def test_several_reads_are_in_flight(scattered: bytes, walk: str) -> None:
    call, expected = WALKS[walk]
    device = FaultyMemory(scattered)
    in_flight = InFlight()
    with AsyncEngine() as engine, PoolMetadata.open(device, engine=engine) as pool:
        device.on("read").call(in_flight)
        assert call(pool) == expected
    assert in_flight.most >= 4


def test_neighbours_are_read_together(image: bytes) -> None:
    device = FaultyMemory(image)
    with PoolMetadata.open(device) as pool:
        iterate(pool)
    assert len(device.ops("read")) < len(blocks_read(device)) / 4


def test_walk_over_a_part_reads_no_more_than_that(image: bytes, engine: Engine) -> None:
    device = FaultyMemory(image)
    with PoolMetadata.open(device, engine=engine) as pool, pool.open_thin_device(0) as thin:
        before = len(blocks_read(device))
        assert sum(run.length for run in thin.mappings(1000 * STEP, 1500 * STEP)) == 500
        per_leaf = 126  # as insertion in ascending order leaves them
        edges = 4  # the way down, and the neighbours on both sides
        assert len(blocks_read(device)) - before <= 500 // per_leaf + 1 + edges


def test_deleting_a_snapshot_does_not_read_what_it_shares(image: bytes, engine: Engine) -> None:
    device = FaultyMemory(image)
    with PoolMetadata.open(device, engine=engine) as pool:
        before = len(blocks_read(device))
        pool.delete_thin_device(1)
        assert len(blocks_read(device)) - before <= NR_CHANGED + 8


def test_comparing_does_not_read_what_both_share(image: bytes, engine: Engine) -> None:
    device = FaultyMemory(image)
    with PoolMetadata.open(device, engine=engine) as pool:
        before = len(blocks_read(device))
        assert compare(pool) == NR_CHANGED
        assert len(blocks_read(device)) - before <= 2 * NR_CHANGED + 8


@pytest.mark.parametrize("lasting", [False, True])
def test_failed_read_ahead_is_tried_again_when_the_walk_comes_there(
    image: bytes, engine: Engine, lasting: bool
) -> None:
    device = FaultyMemory(image)
    with PoolMetadata.open(device) as pool:
        device.log.clear()
        iterate(pool)
        leaf = blocks_read(device)[-20]
    device = FaultyMemory(image)
    with PoolMetadata.open(device, engine=engine) as pool, pool.open_thin_device(0) as thin:
        alone = 0

        def fail(call: Call) -> None:
            """Every read of several blocks, and the first of this one alone: the read ahead, whatever it came with."""
            nonlocal alone
            alone += call.length == BLOCK
            if lasting or call.length > BLOCK or alone == 1:
                raise OSError(errno.EIO, "read failed as told")

        rule = device.on("read", blocks=[leaf]).call(fail)
        runs = thin.mappings()
        if lasting:
            with pytest.raises(OSError, match="read"):
                list(runs)
        else:
            assert sum(run.length for run in runs) == NR_MAPPINGS
        assert rule.hits >= 2
        assert lasting or alone == 2
