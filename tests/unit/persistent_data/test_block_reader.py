"""Blocks by number: range-checked, in windows, in the order asked for."""

from __future__ import annotations

import pytest

from bufio.device import MemoryDevice
from persistent_data.block_reader import MAX_GAP, WINDOW_BLOCKS, BlockReader

BLOCK = 4096
NR_BLOCKS = 700


class LoggingDevice(MemoryDevice):
    """Remembers each read as (first block, number of blocks); fails those that touch a block of *bad*."""

    def __init__(self, contents: bytes, bad: frozenset[int] = frozenset()) -> None:
        super().__init__(contents)
        self.log: list[tuple[int, int]] = []
        self.bad = bad

    def readinto(self, buffer: bytearray | memoryview, offset: int) -> None:
        first, count = offset // BLOCK, memoryview(buffer).nbytes // BLOCK
        self.log.append((first, count))
        if self.bad & {*range(first, first + count)}:
            raise OSError(5, "Input/output error")
        super().readinto(buffer, offset)


def numbered(block: int) -> bytes:
    return block.to_bytes(8, "little") * (BLOCK // 8)


CONTENT = b"".join(numbered(block) for block in range(NR_BLOCKS))


@pytest.fixture
def device() -> LoggingDevice:
    return LoggingDevice(CONTENT)


def test_read_returns_the_block(device: LoggingDevice) -> None:
    assert BlockReader(device).read(7) == numbered(7)


@pytest.mark.parametrize("block", [-1, NR_BLOCKS, 1 << 60])
def test_read_refuses_blocks_that_are_not_there(device: LoggingDevice, block: int) -> None:
    with pytest.raises(ValueError, match="outside the device"):
        BlockReader(device).read(block)
    assert device.log == []


def test_a_partial_block_at_the_end_is_not_there() -> None:
    assert BlockReader(MemoryDevice(3 * BLOCK + 100)).nr_blocks == 3


def test_read_many_reads_neighbours_at_once(device: LoggingDevice) -> None:
    wanted = [5, 6, 7, 7 + MAX_GAP, 8 + 2 * MAX_GAP]
    found = [
        (block, bytes(view)) for block, view in BlockReader(device).read_many(wanted) if not isinstance(view, OSError)
    ]
    assert found == [(block, numbered(block)) for block in wanted]
    assert device.log == [(5, 3 + MAX_GAP), (8 + 2 * MAX_GAP, 1)], "through the first gap, not the second"


def test_read_many_reads_no_more_than_a_window(device: LoggingDevice) -> None:
    wanted = list(range(600))
    assert [block for block, _ in BlockReader(device).read_many(wanted)] == wanted
    assert max(count for _, count in device.log) == WINDOW_BLOCKS


def test_one_bad_block_is_alone_in_its_misfortune() -> None:
    device = LoggingDevice(CONTENT, frozenset({11}))
    found = dict(BlockReader(device).read_many([10, 11, 12]))
    assert isinstance(found[11], OSError)
    assert not isinstance(found[10], OSError)
    assert not isinstance(found[12], OSError)


def test_read_in_order_keeps_the_order_and_allows_repetition(device: LoggingDevice) -> None:
    wanted = [9, 3, 3, 650, 4]
    assert list(BlockReader(device).read_in_order(wanted)) == [(block, numbered(block)) for block in wanted]
    assert device.log == [(3, 7), (650, 1)]


def test_read_in_order_passes_errors_on() -> None:
    with pytest.raises(OSError, match="Input/output"):
        list(BlockReader(LoggingDevice(CONTENT, frozenset({3}))).read_in_order([1, 3]))
