"""A walk over damaged trees: it says what, where and for which keys, survives everything, and still knows the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bufio.device import MemoryDevice
from persistent_data import btree_walk, node_check
from persistent_data.block_reader import BlockReader
from persistent_data.btree_walk import BTreeWalk, NoVisitor, Summary, TreeKind
from persistent_data.damage import ADVISORY, FATAL, NON_FATAL, UNBOUNDED, Damage
from persistent_data.ref_counts import RefCounts
from tests.support.surgeon import Surgeon, node_block, seal

if TYPE_CHECKING:
    from persistent_data.node_check import Node

BLOCK = 4096
KIND = TreeKind("test tree", 8)
OTHER_KIND = TreeKind("other tree", 8)
FULL = 84  # entries that a node other than a root must have


class Recorder(NoVisitor):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.reached_again: list[tuple[int, int]] = []

    def leaf(self, node: Node, path: tuple[int, ...]) -> int:
        self.keys += node.keys
        return node.keys[-1] if node.keys else 0

    def shared(self, block: int, mark: int, path: tuple[int, ...]) -> None:
        self.reached_again.append((block, mark))


class Forest:
    """A device of a few hundred blocks with trees on it, and a walk over them."""

    def __init__(self, nr_blocks: int = 200) -> None:
        self.surgeon = Surgeon(bytes(nr_blocks * BLOCK))
        self.nr_blocks = nr_blocks
        self.damages: list[Damage] = []
        self.visitor = Recorder()
        self.references = RefCounts(nr_blocks)
        self._walk: BTreeWalk | None = None

    def leaf(self, block: int, first: int = 0, count: int = FULL, max_entries: int = 252) -> int:
        keys = [first + i for i in range(count)]
        self.surgeon.put(block, node_block(block, keys, keys, max_entries=max_entries))
        return block

    def internal(self, block: int, keys: list[int], children: list[int], max_entries: int = 9) -> int:
        # A small geometry of its own, so that three children are enough for a node below a root.
        self.surgeon.put(block, node_block(block, keys, children, leaf=False, max_entries=max_entries))
        return block

    def walk(self, root: int, kind: TreeKind = KIND, path: tuple[int, ...] = ()) -> Summary | None:
        if self._walk is None:
            reader = BlockReader(self.surgeon.device())
            self._walk = BTreeWalk(reader, self.nr_blocks, self.damages.append, self.references)
        return self._walk.walk(root, kind, self.visitor, path)

    def nr_errors(self, block: int) -> int:
        assert self._walk is not None
        return self._walk.nr_errors(block)

    def only(self) -> Damage:
        assert len(self.damages) == 1, self.damages
        return self.damages[0]


@pytest.fixture
def forest() -> Forest:
    """A tree of two levels: 10 over the leaves 11, 12, 13 with keys from 0, 1000 and 2000 on."""
    result = Forest()
    result.internal(10, [0, 1000, 2000], [result.leaf(11, 0), result.leaf(12, 1000), result.leaf(13, 2000)])
    return result


def test_a_sound_tree_is_summed_up(forest: Forest) -> None:
    summary = forest.walk(10)
    assert summary is not None
    assert (summary.low, summary.high, summary.nr_entries, summary.height) == (0, 2000 + FULL - 1, 3 * FULL, 1)
    assert summary.mark == 2000 + FULL - 1, "the highest mark of the leaves"
    assert forest.damages == []
    assert sorted(forest.visitor.keys) == [base + i for base in (0, 1000, 2000) for i in range(FULL)]
    assert [forest.references[block] for block in (10, 11, 12, 13, 14)] == [1, 1, 1, 1, 0]


def test_an_empty_leaf_is_a_whole_tree(forest: Forest) -> None:
    forest.leaf(20, count=0)
    summary = forest.walk(20)
    assert summary is not None
    assert summary.nr_entries == 0
    assert forest.damages == []


def test_a_node_met_again_is_counted_and_not_read_again(forest: Forest) -> None:
    forest.walk(10)
    seen = len(forest.visitor.keys)
    summary = forest.walk(10)
    assert summary is not None
    assert summary.nr_entries == 3 * FULL
    assert len(forest.visitor.keys) == seen
    assert forest.visitor.reached_again == [(10, 2000 + FULL - 1)]
    assert [forest.references[block] for block in (10, 11)] == [2, 1]


def test_damage_has_a_path_and_a_range_of_keys(forest: Forest) -> None:
    forest.surgeon.flip(12)
    summary = forest.walk(10, path=(0, 5))
    damage = forest.only()
    assert damage.fault.rule == node_check.CHECKSUM_ERROR
    assert (damage.block, damage.path, damage.begin, damage.end) == (12, (0, 5, 10, 12), 1000, 2000)
    assert "block 12" in str(damage)
    assert "[1000..1999]" in str(damage)
    assert summary is not None
    assert summary.nr_entries == 2 * FULL, "its siblings are still counted"
    assert forest.nr_errors(10) == 1


def test_damage_in_the_last_child_is_open_ended(forest: Forest) -> None:
    forest.surgeon.flip(13)
    forest.walk(10)
    assert (forest.only().begin, forest.only().end) == (2000, UNBOUNDED)
    assert "[2000..]" in str(forest.only())


def test_a_damaged_root_has_no_summary(forest: Forest) -> None:
    forest.surgeon.flip(10)
    assert forest.walk(10) is None
    assert forest.walk(10) is None
    assert forest.only().path == (10,), "reported once, however often it is reached"


# The content of single nodes


@pytest.mark.parametrize(
    ("rule", "severity", "fields"),
    [
        (node_check.BLOCKNR_MISMATCH, FATAL, {"blocknr": 13}),
        (node_check.BAD_FLAGS, FATAL, {"flags": 0}),
        (node_check.BAD_FLAGS, FATAL, {"flags": 3}),
        (node_check.VALUE_SIZE_MISMATCH, FATAL, {"value_size": 4}),
        (node_check.MAX_ENTRIES_TOO_LARGE, FATAL, {"max_entries": 255}),
        (node_check.MAX_ENTRIES_ZERO, FATAL, {"max_entries": 0}),
        (node_check.TOO_MANY_ENTRIES, FATAL, {"nr_entries": 253}),
        (node_check.EMPTY_NODE, FATAL, {"nr_entries": 0}),
        (node_check.TOO_FEW_ENTRIES, NON_FATAL, {"nr_entries": FULL - 1}),
        (node_check.PADDING_NOT_ZERO, ADVISORY, {"padding": 1}),
    ],
)
def test_broken_rule_of_a_leaf_is_named(forest: Forest, rule: str, severity: str, fields: dict[str, int]) -> None:
    forest.surgeon.node(12, **fields)
    forest.walk(10)
    damage = forest.only()
    assert (damage.fault.rule, damage.fault.severity, damage.block) == (rule, severity, 12)
    assert forest.nr_errors(10) == (severity == FATAL)


def test_max_entries_not_divisible_by_three_is_not_fatal(forest: Forest) -> None:
    keys = list(range(FULL))
    forest.surgeon.put(20, node_block(20, keys, keys, max_entries=250))
    summary = forest.walk(20)
    assert summary is not None
    assert (forest.only().fault.rule, forest.only().fault.severity) == (node_check.MAX_ENTRIES_ODD, NON_FATAL)


def test_internal_values_must_be_eight_bytes(forest: Forest) -> None:
    forest.surgeon.node(10, value_size=16)
    assert forest.walk(10) is None
    assert forest.only().fault.rule == node_check.VALUE_SIZE_MISMATCH


@pytest.mark.parametrize("value", [1003, 1002, 0])
def test_keys_must_ascend(forest: Forest, value: int) -> None:
    forest.surgeon.key(12, 4, value)
    forest.walk(10)
    assert forest.only().fault.rule == node_check.KEYS_OUT_OF_ORDER
    assert forest.only().block == 12


@pytest.mark.parametrize("kind", ["superblock", "bitmap", "index"])
def test_a_block_of_another_kind_is_not_a_node(forest: Forest, kind: str) -> None:
    forest.surgeon.put(12, seal(forest.surgeon.block(12), kind))
    forest.walk(10)
    assert forest.only().fault.rule == node_check.NOT_A_NODE
    assert kind in forest.only().fault.detail


# Between nodes


def test_first_key_below_the_parents_is_found(forest: Forest) -> None:
    forest.surgeon.key(10, 1, 1001)
    forest.walk(10)
    damage = forest.only()
    assert (damage.fault.rule, damage.block, damage.begin) == (btree_walk.FIRST_KEY_LOW, 12, 1001)


def test_a_parents_key_may_be_too_low(forest: Forest) -> None:
    forest.surgeon.key(10, 1, 900)
    forest.walk(10)
    assert forest.damages == []


@pytest.mark.parametrize("next_key", [1000 + FULL - 1, 1000 + FULL - 10])
def test_last_key_must_be_below_the_parents_next(forest: Forest, next_key: int) -> None:
    forest.surgeon.key(10, 2, next_key)
    forest.walk(10)
    damage = forest.only()
    assert (damage.fault.rule, damage.block, damage.end) == (btree_walk.LAST_KEY_HIGH, 12, next_key)


def test_the_bound_of_the_last_child_is_inherited() -> None:
    forest = Forest()
    for i in range(6):
        forest.leaf(20 + i, 1000 * i)
    forest.internal(11, [0, 1000, 2000], [20, 21, 22])
    forest.internal(12, [2050, 4000, 5000], [23, 24, 25])
    forest.internal(10, [0, 2050], [11, 12])
    forest.walk(10)
    damage = forest.only()
    assert damage.fault.rule == btree_walk.LAST_KEY_HIGH, "22 ends with 2083, its uncle begins with 2050"
    assert (damage.path, damage.end) == ((10, 11, 22), 2050)


def test_a_shared_node_is_held_against_every_parents_keys(forest: Forest) -> None:
    forest.internal(30, [500, 1040], [12, 13])
    forest.walk(10)
    assert forest.damages == []
    forest.walk(30)
    damage = forest.only()
    assert (damage.fault.rule, damage.path, damage.end) == (btree_walk.LAST_KEY_HIGH, (30, 12), 1040)


@pytest.mark.parametrize("pointer", [0, 200, 1 << 63])
def test_a_pointer_out_of_the_device_is_the_parents_fault(forest: Forest, pointer: int) -> None:
    forest.surgeon.value(10, 1, pointer)
    forest.walk(10)
    damage = forest.only()
    assert (damage.fault.rule, damage.block) == (node_check.OUTSIDE_DEVICE, 10)
    assert (damage.begin, damage.end) == (1000, 2000)


def test_a_node_that_is_its_own_child_ends(forest: Forest) -> None:
    forest.surgeon.value(10, 1, 10)
    forest.walk(10)
    assert (forest.only().fault.rule, forest.only().path) == (btree_walk.LOOP, (10, 10))
    assert forest.nr_errors(10) == 1


def test_a_loop_over_two_levels_ends() -> None:
    forest = Forest()
    forest.internal(11, [0, 1, 2], [10, 12, 13])
    forest.leaf(12, 1000)
    forest.leaf(13, 2000)
    forest.internal(10, [0], [11])
    forest.walk(10)
    assert (10, 11, 10) in [damage.path for damage in forest.damages]
    assert btree_walk.LOOP in [damage.fault.rule for damage in forest.damages]


def test_a_child_that_stands_twice_is_found(forest: Forest) -> None:
    forest.surgeon.value(10, 2, 12)
    forest.walk(10)
    assert btree_walk.TWICE in [damage.fault.rule for damage in forest.damages]


def test_a_very_long_chain_ends() -> None:
    forest = Forest()
    for block in range(1, 150):
        forest.internal(block, [0], [block + 1], max_entries=3)
    forest.leaf(150, 0)
    assert forest.walk(1) is None or forest.nr_errors(1)
    assert forest.only().fault.rule == btree_walk.TOO_DEEP


def test_a_node_of_another_tree_is_found(forest: Forest) -> None:
    forest.walk(10, OTHER_KIND)
    assert forest.walk(12) is None
    damage = forest.only()
    assert damage.fault.rule == btree_walk.OTHER_TREE
    assert "other tree" in damage.fault.detail


def test_leaves_at_different_depths_are_found() -> None:
    forest = Forest()
    forest.internal(11, [0, 1000, 2000], [forest.leaf(21, 0), forest.leaf(22, 1000), forest.leaf(23, 2000)])
    forest.internal(10, [0, 3000], [11, forest.leaf(12, 3000, max_entries=9, count=9)])
    forest.walk(10)
    assert (forest.only().fault.rule, forest.only().path) == (btree_walk.UNEVEN_DEPTH, (10, 12))


def test_siblings_must_have_the_same_geometry(forest: Forest) -> None:
    forest.leaf(12, 1000, max_entries=249)
    forest.walk(10)
    assert (forest.only().fault.rule, forest.only().path) == (btree_walk.UNEVEN_GEOMETRY, (10, 12))


def test_a_small_root_is_too_small_below_a_parent(forest: Forest) -> None:
    forest.leaf(12, 1000, count=5)
    forest.walk(12)
    assert forest.damages == []
    forest.walk(10)
    assert (forest.only().fault.rule, forest.only().fault.severity) == (node_check.TOO_FEW_ENTRIES, NON_FATAL)


# Reading


class BadSectors(MemoryDevice):
    """Fails to read some blocks."""

    def __init__(self, content: bytes, *bad: int) -> None:
        super().__init__(content)
        self.bad = bad

    def readinto(self, buffer: bytearray | memoryview, offset: int) -> None:
        first, count = offset // BLOCK, memoryview(buffer).nbytes // BLOCK
        if any(first <= block < first + count for block in self.bad):
            raise OSError(5, "Input/output error")
        super().readinto(buffer, offset)


def test_an_unreadable_block_does_not_take_its_neighbours_along(forest: Forest) -> None:
    reader = BlockReader(BadSectors(forest.surgeon.content(), 12))
    walk = BTreeWalk(reader, forest.nr_blocks, forest.damages.append, forest.references)
    summary = walk.walk(10, KIND, forest.visitor)
    assert (forest.only().fault.rule, forest.only().block) == (node_check.IO_ERROR, 12)
    assert summary is not None
    assert summary.nr_entries == 2 * FULL


def test_an_unreadable_root_is_damage(forest: Forest) -> None:
    reader = BlockReader(BadSectors(forest.surgeon.content(), 10))
    walk = BTreeWalk(reader, forest.nr_blocks, forest.damages.append, forest.references)
    assert walk.walk(10, KIND, forest.visitor) is None
    assert forest.only().fault.rule == node_check.IO_ERROR
