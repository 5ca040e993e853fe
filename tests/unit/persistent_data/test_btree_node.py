"""Moving entries within and between nodes, and the nodes that are refused when they are read."""

from __future__ import annotations

import errno
import random
import struct
from typing import TYPE_CHECKING

import pytest

from persistent_data.block_manager import BlockManager
from persistent_data.btree_insert import balance, distribute
from persistent_data.btree_node import BTREE_NODE, Node, Value, WideNode, format_node, view_again
from persistent_data.errors import CorruptMetadata
from persistent_data.layout import INTERNAL_NODE, LEAF_NODE, max_entries
from tests.support.devices import FaultyMemory
from tests.support.image import SALTS, Image, raw_checksum
from tests.support.trees import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = [4, 8, 24, 480, 1000]


@pytest.fixture
def bm() -> Iterator[BlockManager]:
    bm = BlockManager(FaultyMemory(16 * BLOCK_SIZE))
    yield bm
    bm.close(write=False)


def value(size: int, number: int) -> Value:
    return number if size == 8 else number.to_bytes(4, "little").ljust(size, b"v")


def node_of(bm: BlockManager, block: int, size: int, keys: range | list[int]) -> Node:
    node = format_node(bm.borrow_zeroed(block, BTREE_NODE), LEAF_NODE, size)
    for at, key in enumerate(keys):
        node.insert_at(at, key, value(size, key + 1000))
    return node


def entries(*nodes: Node) -> list[tuple[int, Value]]:
    return [entry for node in nodes for entry in zip(node.keys(), node.values(), strict=True)]


@pytest.mark.parametrize(
    ("size", "expected"), [(1000, 3), (480, 6), (24, 126), (16, 168), (8, 252), (4, 336), (0, 507)]
)
def test_node_holds_as_many_entries_as_fit_a_multiple_of_three(size: int, expected: int) -> None:
    assert max_entries(size) == expected
    assert 32 + (8 + size) * (expected + 3) > BLOCK_SIZE


@pytest.mark.parametrize("size", SIZES)
def test_entries_are_inserted_and_deleted_in_place(bm: BlockManager, size: int) -> None:
    node = node_of(bm, 1, size, [])
    assert isinstance(node, WideNode) == (size != 8)
    rng = random.Random(size)
    model: list[tuple[int, Value]] = []
    for number in range(400):
        if len(model) < node.max_entries and (rng.random() < 0.6 or not model):
            at = rng.randint(0, len(model))
            entry = number, value(size, number)
            model.insert(at, entry)
            node.insert_at(at, *entry)
        else:
            at = rng.randrange(len(model))
            del model[at]
            node.delete_at(at)
        assert entries(node) == model
    for at, (key, found) in enumerate(model):
        assert (node.key(at), node.value(at)) == (key, found)
    if model:
        node.set_value(0, value(size, 5))
        node.set_key(0, 77)
        assert entries(node)[0] == (77, value(size, 5))
    bm.flush()


@pytest.mark.parametrize("size", SIZES)
def test_image_of_a_node_is_what_an_independent_reader_sees(size: int) -> None:
    device = FaultyMemory(16 * BLOCK_SIZE)
    bm = BlockManager(device)
    node = node_of(bm, 5, size, range(10, 13))
    bm.begin_operation()
    bm.flush()
    image = Image.from_bytes(device.contents())
    assert image.kind(5) == "node"
    seen = image.node(5)
    assert (seen.leaf, seen.max_entries, seen.value_size) == (True, node.max_entries, size)
    assert seen.keys == (10, 11, 12)
    assert [int.from_bytes(v[:4], "little") for v in seen.values] == [1010, 1011, 1012]


def test_bounds_of_a_key(bm: BlockManager) -> None:
    node = node_of(bm, 1, 8, [10, 20, 30])
    cases = {5: (-1, 0), 10: (0, 0), 15: (0, 1), 30: (2, 2), 31: (2, 3), (1 << 64) - 1: (2, 3)}
    for key, (lower, upper) in cases.items():
        assert (node.lower_bound(key), node.upper_bound(key)) == (lower, upper)
        assert node.contains(key) == (lower == upper)
    assert node_of(bm, 2, 8, []).lower_bound(5) == -1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("left_share", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("right_share", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_balance_halves_and_the_odd_one_goes_right(
    bm: BlockManager, size: int, left_share: float, right_share: float
) -> None:
    nr_left, nr_right = (round(share * max_entries(size)) for share in (left_share, right_share))
    left = node_of(bm, 1, size, range(nr_left))
    right = node_of(bm, 2, size, range(nr_left, nr_left + nr_right))
    before = entries(left, right)
    balance(left, right)
    assert entries(left, right) == before
    assert left.nr_entries == len(before) // 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("nr_left", ["full", "two thirds", "half", "third", "one"])
def test_two_become_three_of_a_third_each(bm: BlockManager, size: int, nr_left: str) -> None:
    full = max_entries(size)
    count = {"full": full, "two thirds": 2 * full // 3, "half": full // 2, "third": full // 3, "one": 1}[nr_left]
    left = node_of(bm, 1, size, range(count))
    middle = node_of(bm, 2, size, [])
    right = node_of(bm, 3, size, range(count, count + full))
    before = entries(left, right)
    distribute(left, middle, right)
    assert entries(left, middle, right) == before
    total = count + full
    assert left.nr_entries == total // 3
    assert middle.nr_entries == (total - total // 3) // 2


def test_vacated_slots_keep_their_bytes(bm: BlockManager) -> None:
    """The kernel moves entries with memmove, and the checksum covers what is left behind."""
    node = node_of(bm, 1, 8, [10, 20, 30])
    node.delete_at(0)
    assert node.words[4:7].tolist() == [20, 30, 30]
    node.delete_at(1)
    assert node.words[4:7].tolist() == [20, 30, 30]
    assert node.keys() == [20]


def test_leaf_that_becomes_a_parent_has_room_for_children(bm: BlockManager) -> None:
    node, left, right = (node_of(bm, block, 1000, [block * 10, block * 10 + 1]) for block in (1, 2, 3))
    parent = node.become_parent_of(left, right)
    assert not parent.is_leaf
    assert (parent.max_entries, parent.value_size) == (252, 8)
    assert (parent.keys(), parent.children()) == ([20, 30], [2, 3])
    assert not isinstance(parent, WideNode)
    assert bm.borrow(1, BTREE_NODE) is parent


def test_view_follows_the_bytes(bm: BlockManager) -> None:
    node = node_of(bm, 1, 8, [10, 20])
    other = node_of(bm, 2, 480, [5])
    node.data[:] = other.data
    again = view_again(node)
    assert isinstance(again, WideNode)
    assert entries(again) == [(5, value(480, 1005))]


# Damaged nodes


def node_bytes(
    *, flags: int = LEAF_NODE, nr_entries: int = 3, nr_max: int = 252, value_size: int = 8, keys: tuple[int, ...] = ()
) -> bytes:
    data = bytearray(BLOCK_SIZE)
    struct.pack_into("<IIQIIII", data, 0, 0, flags, 3, nr_entries, nr_max, value_size, 0)
    struct.pack_into(f"<{len(keys)}Q", data, 32, *keys)
    data[0:4] = (raw_checksum(bytes(data)) ^ SALTS["node"]).to_bytes(4, "little")
    return bytes(data)


GOOD = node_bytes(keys=(1, 2, 3))


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (node_bytes(keys=(1, 2, 3), flags=0), "flags"),
        (node_bytes(keys=(1, 2, 3), flags=3), "flags"),
        (node_bytes(keys=(1, 2, 3), flags=4), "flags"),
        (node_bytes(keys=(1, 2, 3), nr_max=255), "max_entries is too large"),
        (node_bytes(keys=(1, 2, 3), nr_max=0xFFFFFFFF), "max_entries is too large"),
        (node_bytes(keys=(1, 2, 3), value_size=0xFFFFFFFF), "max_entries is too large"),
        (node_bytes(keys=(1, 2, 3), nr_max=2), "nr_entries > max_entries"),
        (node_bytes(keys=(1, 2, 3), nr_entries=0xFFFFFFFF), "nr_entries > max_entries"),
        (node_bytes(keys=(1, 2, 3), flags=INTERNAL_NODE, value_size=4), "value_size"),
        (node_bytes(keys=(1, 3, 2)), "keys out of order"),
        (node_bytes(keys=(1, 2, 2)), "keys out of order"),
        (GOOD[:4000] + b"\1" + GOOD[4001:], "bad checksum"),
    ],
)
def test_damaged_node_is_refused_by_block_and_rule(data: bytes, rule: str) -> None:
    device = FaultyMemory(16 * BLOCK_SIZE)
    device.pwrite(data, 3 * BLOCK_SIZE)
    bm = BlockManager(device)
    with pytest.raises(CorruptMetadata, match=rule) as caught:
        bm.borrow(3, BTREE_NODE)
    assert caught.value.errno == errno.EILSEQ
    assert caught.value.block == 3
    device.pwrite(GOOD, 3 * BLOCK_SIZE)
    bm.forget(3)
    assert isinstance(bm.borrow(3, BTREE_NODE), Node)


def test_stale_bytes_behind_the_entries_do_no_harm() -> None:
    device = FaultyMemory(16 * BLOCK_SIZE)
    device.pwrite(node_bytes(keys=(1, 2, 3, 0, 7, 7), nr_entries=3), 3 * BLOCK_SIZE)
    node = BlockManager(device).borrow(3, BTREE_NODE)
    assert isinstance(node, Node)
    assert node.keys() == [1, 2, 3]
