"""Blocks read ahead: the same content in fewer reads, and errors only for those who take the block."""

from __future__ import annotations

import pytest

from bufio import MemoryDevice
from bufio.testing import FaultyDevice
from persistent_data.block_reader import BlockReader
from persistent_data.layout import BLOCK_SIZE
from persistent_data.read_ahead import ReadAhead

NR_BLOCKS = 100


def numbered(block: int) -> bytes:
    return block.to_bytes(2, "little") * (BLOCK_SIZE // 2)


@pytest.fixture
def device() -> FaultyDevice[MemoryDevice]:
    return FaultyDevice(MemoryDevice(b"".join(map(numbered, range(NR_BLOCKS)))))


@pytest.fixture
def ahead(device: FaultyDevice[MemoryDevice]) -> ReadAhead:
    return ReadAhead(BlockReader(device))


def test_what_was_fetched_is_not_read_again(ahead: ReadAhead, device: FaultyDevice[MemoryDevice]) -> None:
    ahead.fetch([12, 10, 11])
    assert [ahead.take(block) for block in (10, 11, 12)] == [numbered(10), numbered(11), numbered(12)]
    assert len(device.log) == 1


def test_what_was_not_fetched_is_read(ahead: ReadAhead) -> None:
    assert ahead.take(7) == numbered(7)


def test_fetching_again_reads_only_what_is_new(ahead: ReadAhead, device: FaultyDevice[MemoryDevice]) -> None:
    ahead.fetch([10, 11])
    device.log.clear()
    ahead.fetch([11, 12])
    assert [(call.offset, call.length) for call in device.log] == [(12 * BLOCK_SIZE, BLOCK_SIZE)]
    device.log.clear()
    ahead.take(10)
    assert len(device.log) == 1, "10 was not wanted any more, and made room"


def test_blocks_that_are_not_there_are_for_those_who_take_them(ahead: ReadAhead) -> None:
    ahead.fetch([-1, 5, NR_BLOCKS, 1 << 63])
    assert ahead.take(5) == numbered(5)
    with pytest.raises(ValueError, match="outside the device"):
        ahead.take(NR_BLOCKS)


def test_errors_are_for_those_who_take_the_block(ahead: ReadAhead, device: FaultyDevice[MemoryDevice]) -> None:
    device.on("read", blocks=[6]).fail()
    ahead.fetch([5, 6, 7])
    assert ahead.take(5) == numbered(5)
    assert ahead.take(7) == numbered(7)
    with pytest.raises(OSError, match="read"):
        ahead.take(6)
