"""Nodes by the hundred: the same verdict as node by node, whatever is asked for and however it is read."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bufio import MemoryDevice
from persistent_data import format as declared
from persistent_data.block_batches import NotClean
from persistent_data.block_reader import MAX_GAP, WINDOW_BLOCKS
from persistent_data.checksum import BTREE_NODE_SALT, block_checksum
from persistent_data.layout import max_entries
from persistent_data.node_batches import NODE_DTYPE, NodeBatches
from persistent_data.node_check import check_node
from tests.support.declarations import field_names, offset_of
from tests.support.fixtures import image
from tests.support.surgeon import Surgeon, node_block

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bufio.device import WritableBuffer

BLOCK = 4096
FIXTURES = ["mixed", "random", "snapshot_chain", "deep", "many_devices"]
"""Nodes of all kinds, written by a real kernel."""


class LoggingDevice(MemoryDevice):
    """Remembers each read as (first block, number of blocks), and wants buffers that O_DIRECT could use."""

    def __init__(self, contents: bytes, bad: int = -1) -> None:
        super().__init__(contents)
        self.log: list[tuple[int, int]] = []
        self.bad = bad

    def _take(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        for buffer in buffers:
            assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % BLOCK == 0
            assert memoryview(buffer).nbytes % BLOCK == 0
        first, count = offset // BLOCK, sum(memoryview(buffer).nbytes for buffer in buffers) // BLOCK
        self.log.append((first, count))
        if first <= self.bad < first + count:
            raise OSError(5, "Input/output error")
        for buffer in buffers:
            super().readinto(buffer, offset)
            offset += memoryview(buffer).nbytes

    def preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        self._take(buffers, offset)

    def readinto(self, buffer: WritableBuffer, offset: int) -> None:
        self._take([buffer], offset)


def leaf(block: int, count: int = 84, value_size: int = 8) -> bytes:
    keys = [block * 1000 + i for i in range(count)]
    values = [key * 3 & 0xFFFFFFFF for key in keys]
    return node_block(block, keys, values, max_entries=max_entries(value_size), value_size=value_size)


def forest(nr_blocks: int) -> bytes:
    """A leaf in every block."""
    return b"".join(map(leaf, range(nr_blocks)))


@pytest.fixture(scope="module")
def content() -> bytes:
    return forest(2 * WINDOW_BLOCKS + 100)


def is_clean(device: MemoryDevice, blocks: Sequence[int], *, small: bool = False) -> bool:
    may_be_small = np.full(len(blocks), small)
    try:
        found = [batch.blocks for batch in NodeBatches(device).read(np.array(blocks, np.int64), may_be_small)]
    except NotClean:
        return False
    return [block for part in found for block in part] == blocks


# The format


def test_the_header_is_the_declared_one() -> None:
    assert NODE_DTYPE.names == field_names(declared.NodeHeader)
    assert NODE_DTYPE.itemsize == declared.NodeHeader.sizeof()
    for name in field_names(declared.NodeHeader):
        assert NODE_DTYPE.fields is not None
        assert NODE_DTYPE.fields[name][1] == offset_of(declared.NodeHeader, name)
        assert NODE_DTYPE[name].itemsize == getattr(declared.NodeHeader, name).sizeof()


@pytest.mark.parametrize("value_size", [8, 4])
def test_keys_and_values_are_where_the_declaration_has_them(value_size: int) -> None:
    block = leaf(0, 150, value_size)
    parsed = declared.Node.parse(block)
    (batch,) = NodeBatches(MemoryDevice(block), value_size).read(np.array([0]))
    assert batch.keys[0, :150].tolist() == list(parsed["keys"])
    assert [value.to_bytes(value_size, "little") for value in batch.values[0, :150].tolist()] == list(parsed["values"])
    assert batch.nr_entries.tolist() == [150]
    assert batch.is_leaf.tolist() == [True]
    assert batch.unused.sum() == max_entries(value_size) - 150
    keys, values = batch.entries()
    assert keys.tolist() == list(parsed["keys"])
    assert values.tolist() == batch.values[0, :150].tolist()


@pytest.mark.parametrize("value_size", [8, 4])
def test_children_are_where_the_declaration_has_them(value_size: int) -> None:
    block = node_block(0, range(100), range(1000, 1100), leaf=False)
    (batch,) = NodeBatches(MemoryDevice(block), value_size).read(np.array([0]))
    assert batch.is_leaf.tolist() == [False]
    keys, children = batch.pointers()
    assert keys.tolist() == list(range(100))
    assert children.tolist() == list(range(1000, 1100))


# The verdict


def mutate(rng: random.Random, block: bytearray) -> str:
    """Change one thing in a node, mostly with the checksum made right; return what."""
    nr_entries = int.from_bytes(block[16:20], "little")
    what = rng.choice(["flags", "blocknr", "nr_entries", "max_entries", "value_size", "padding", "key", "value", "bit"])
    if what == "bit":
        block[rng.randrange(BLOCK)] ^= 1 << rng.randrange(8)
        return what
    if what in ("key", "value"):
        at = 32 + 8 * rng.randrange(252) + (8 * 252 if what == "value" else 0)
        block[at : at + 8] = rng.choice([0, rng.getrandbits(64), rng.randrange(1000)]).to_bytes(8, "little")
        if what == "key" and nr_entries > 1 and rng.random() < 0.3:
            at = 32 + 8 * rng.randrange(min(nr_entries, 252) - 1)
            block[at + 8 : at + 16] = block[at : at + 8]
    else:
        offset, size = offset_of(declared.NodeHeader, what), NODE_DTYPE[what].itemsize
        near = [nr_entries, 0, 1, 2, 3, 4, 8, 83, 84, 85, 251, 252, 253, 255, 256, 336, 1 << 31, (1 << 32) - 1]
        block[offset : offset + size] = rng.choice(near).to_bytes(size, "little")
    block[:4] = block_checksum(block, BTREE_NODE_SALT).to_bytes(4, "little")
    return what


@pytest.mark.parametrize("name", FIXTURES)
def test_clean_is_what_the_plain_check_finds_nothing_in(name: str) -> None:
    """Nodes as the kernel wrote them, and each several times with something changed."""
    rng = random.Random(name)
    content = image(name)
    blocks = [content[begin : begin + BLOCK] for begin in range(0, len(content), BLOCK)]
    nodes = [block for block, node in enumerate(blocks) if any(node) and check_node(node, block, 8, True)[0]]
    seen: Counter[tuple[str, bool]] = Counter()
    for block in rng.sample(nodes, min(len(nodes), 40)):
        original = blocks[block]
        for number in range(25):
            changed = bytearray(original)
            what = mutate(rng, changed) if number else "nothing"
            small = rng.random() < 0.5
            node, faults = check_node(changed, block, 8, small)
            expected = node is not None and not faults and node.max_entries == 252
            device = MemoryDevice(bytes(block * BLOCK) + changed)
            assert is_clean(device, [block], small=small) == expected, (block, what, small)
            seen[what, expected] += 1
    assert all(seen[what, True] for what in ("nothing", "key", "value", "nr_entries"))
    assert all(seen[what, False] for what in ("flags", "blocknr", "max_entries", "value_size", "padding", "bit"))
    assert all(seen[what, False] for what in ("key", "nr_entries"))


@pytest.mark.parametrize("victim", [0, 1, WINDOW_BLOCKS - 1, WINDOW_BLOCKS, WINDOW_BLOCKS + 99])
def test_one_bad_node_among_many_is_named(content: bytes, victim: int) -> None:
    surgeon = Surgeon(content)
    surgeon.flip(victim)
    with pytest.raises(NotClean) as raised:
        list(NodeBatches(surgeon.device()).read(np.arange(WINDOW_BLOCKS + 100)))
    assert raised.value.block == victim


def test_keys_out_of_order_are_named_too(content: bytes) -> None:
    surgeon = Surgeon(content)
    surgeon.key(77, 83, 5)
    with pytest.raises(NotClean) as raised:
        list(NodeBatches(surgeon.device()).read(np.arange(100)))
    assert raised.value.block == 77


def test_only_those_that_may_be_small_may_be() -> None:
    blocks = np.arange(3)
    device = MemoryDevice(b"".join(leaf(block, 84 if block == 1 else 0) for block in range(3)))
    (batch,) = NodeBatches(device).read(blocks, np.array([True, False, True]))
    assert batch.nr_entries.tolist() == [0, 84, 0]
    with pytest.raises(NotClean):
        list(NodeBatches(device).read(blocks, np.array([True, True, False])))


# Reading


def firsts(device: MemoryDevice, blocks: Sequence[int], *, ahead: bool = False) -> list[int]:
    """The first key of each node, divided by what :func:`leaf` multiplies it by."""
    found = []
    for batch in NodeBatches(device, ahead=ahead).read(np.array(blocks, np.int64)):
        assert len(batch.blocks) <= WINDOW_BLOCKS
        found += (batch.keys[:, 0] // np.uint64(1000)).tolist()
    return found


@pytest.mark.parametrize("ahead", [False, True])
def test_nodes_come_in_the_order_asked_for(content: bytes, ahead: bool) -> None:
    blocks = list(range(len(content) // BLOCK))
    random.Random(1).shuffle(blocks)
    assert firsts(MemoryDevice(content), blocks, ahead=ahead) == blocks
    assert firsts(MemoryDevice(content), [], ahead=ahead) == []


def test_neighbours_are_one_read_in_any_order(content: bytes) -> None:
    device = LoggingDevice(content)
    blocks = [7, 5, 6, 4, 8]
    assert firsts(device, blocks) == blocks
    assert device.log == [(4, 5)]


def test_gaps_are_read_through_if_they_are_small(content: bytes) -> None:
    device = LoggingDevice(content)
    blocks = [3, 4, 5 + MAX_GAP, 7 + 2 * MAX_GAP]
    assert firsts(device, blocks) == blocks
    assert device.log == [(3, 3 + MAX_GAP), (7 + 2 * MAX_GAP, 1)], "through the first gap, not the second"


def test_no_more_than_a_window_is_read_at_once(content: bytes) -> None:
    device = LoggingDevice(content)
    blocks = list(range(len(content) // BLOCK))
    assert firsts(device, blocks) == blocks
    assert [count for _, count in device.log] == [WINDOW_BLOCKS, WINDOW_BLOCKS, 100]


@pytest.mark.parametrize("blocks", [[-1], [5, 600000], [3, 1, 3], [1 << 62]])
def test_what_is_not_there_or_wanted_twice_is_not_clean(content: bytes, blocks: list[int]) -> None:
    assert not is_clean(LoggingDevice(content), blocks)


def test_a_read_error_is_not_clean(content: bytes) -> None:
    assert is_clean(LoggingDevice(content, bad=9), [7, 8])
    with pytest.raises(NotClean) as raised:
        list(NodeBatches(LoggingDevice(content, bad=9)).read(np.array([7, 8, 9])))
    assert isinstance(raised.value.__cause__, OSError)


# Reading ahead


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "read ahead"]


def test_one_window_is_read_ahead_and_no_more(content: bytes) -> None:
    device = LoggingDevice(content)
    reading = NodeBatches(device, ahead=True).read(np.arange(2 * WINDOW_BLOCKS + 100))
    for number in range(3):
        batch = next(reading)
        first = number * WINDOW_BLOCKS
        assert batch.blocks[0] == first
        deadline = time.monotonic() + 10
        while len(device.log) < min(number + 2, 3):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert len(device.log) == min(number + 2, 3)
        assert batch.keys[0, 0] == first * 1000, "what was read meanwhile went elsewhere"
    assert readers() == ["read ahead"]
    assert next(reading, None) is None
    assert readers() == []


def test_a_reader_of_windows_ends_with_who_stops_listening(content: bytes) -> None:
    reading = NodeBatches(MemoryDevice(content), ahead=True).read(np.arange(2 * WINDOW_BLOCKS))
    next(reading)
    assert readers() == ["read ahead"]
    reading.close()
    assert readers() == []


def test_a_read_error_ahead_comes_in_its_turn(content: bytes) -> None:
    bad = 2 * WINDOW_BLOCKS
    reading = NodeBatches(LoggingDevice(content, bad=bad), ahead=True).read(np.arange(bad + 1))
    assert [int(next(reading).blocks[0]) for _ in range(2)] == [0, WINDOW_BLOCKS]
    with pytest.raises(NotClean) as raised:
        next(reading)
    assert isinstance(raised.value.__cause__, OSError)
    assert readers() == []
