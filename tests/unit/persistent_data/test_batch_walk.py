"""Trees level by level: the same verdict, counts and sums as the walk node by node."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bufio import MemoryDevice
from persistent_data.batch_walk import LAST_KEY, BatchWalk
from persistent_data.block_batches import NotClean
from persistent_data.block_reader import BlockReader
from persistent_data.btree_walk import MAX_DEPTH, BTreeWalk, NoVisitor, TreeKind
from persistent_data.node_batches import NodeBatches
from persistent_data.ref_counts import RefCounts
from tests.support.fixtures import image
from tests.support.image import Image
from tests.support.surgeon import Surgeon, node_block

if TYPE_CHECKING:
    from persistent_data.damage import Damage

BLOCK = 4096
FULL = 84
KIND = TreeKind("test tree", 8)
FIXTURES = ["mixed", "random", "snapshot_chain", "deep", "many_devices", "shared_by_many", "huge_virtual"]


class Found:
    """What a walk over *roots* finds; the label of each tree is its place in *roots*, counted from the end."""

    def __init__(self, content: bytes, roots: list[int], nr_blocks: int | None = None) -> None:
        nr_blocks = len(content) // BLOCK if nr_blocks is None else nr_blocks
        walk = BatchWalk(NodeBatches(MemoryDevice(content)), nr_blocks)
        self.leaves: dict[int, tuple[list[int], list[int]]] = {}
        self.labels: dict[int, int] = {}
        self.shared: dict[int, bool] = {}
        for nodes, level in walk.leaves(roots, range(len(roots), 0, -1)):
            for i, block in enumerate(level.blocks.tolist()):
                assert block not in self.leaves
                count = int(nodes.nr_entries[i])
                self.leaves[block] = nodes.keys[i, :count].tolist(), nodes.values[i, :count].tolist()
        for level in walk.levels:
            self.labels.update(zip(level.blocks.tolist(), level.label.tolist(), strict=True))
            self.shared.update(zip(level.blocks.tolist(), (level.nr_ways > 1).tolist(), strict=True))
        self.references = Counter(
            {
                block: count
                for level in walk.levels
                for block, count in zip(level.blocks.tolist(), level.references.tolist(), strict=True)
            }
        )
        self.nr_entries = walk.nr_entries.tolist()


def plainly(content: bytes, roots: list[int], nr_blocks: int | None = None) -> tuple[list[Damage], RefCounts]:
    """The same trees, walked node by node."""
    nr_blocks = len(content) // BLOCK if nr_blocks is None else nr_blocks
    damages: list[Damage] = []
    references = RefCounts(nr_blocks)
    walk = BTreeWalk(BlockReader(MemoryDevice(content)), nr_blocks, damages.append, references)
    for root in roots:
        walk.walk(root, KIND, NoVisitor())
    return damages, references


def is_clean(content: bytes, roots: list[int], nr_blocks: int | None = None) -> bool:
    try:
        Found(content, roots, nr_blocks)
    except NotClean:
        return False
    return True


def mapping_roots(name: str) -> tuple[bytes, Image, list[int], int]:
    content = image(name)
    pool = Image.from_bytes(content)
    sb = pool.superblock()
    roots = [int.from_bytes(value, "little") for _, value in pool.items(sb.mapping_root)]
    return content, pool, roots, min(sb.metadata_map.nr_blocks, pool.nr_blocks)


# Metadata of a kernel


@pytest.mark.parametrize("name", FIXTURES)
def test_everything_is_as_other_readers_have_it(name: str) -> None:
    content, pool, roots, nr_blocks = mapping_roots(name)
    found = Found(content, roots, nr_blocks)
    damages, references = plainly(content, roots, nr_blocks)
    assert not damages
    assert found.references == {block: count for block in range(nr_blocks) if (count := references[block])}

    ways: Counter[int] = Counter()
    labels: dict[int, int] = {}
    leaves: dict[int, tuple[list[int], list[int]]] = {}
    for i, root in enumerate(roots):
        nr_entries = 0
        for _, node in pool.nodes(root):
            ways[node.number] += 1
            labels[node.number] = len(roots) - i  # labels descend, so the last is the least
            if node.leaf:
                leaves[node.number] = list(node.keys), [int.from_bytes(value, "little") for value in node.values]
                nr_entries += len(node.keys)
        assert found.nr_entries[i] == nr_entries
    assert found.leaves == leaves
    assert found.labels == labels
    assert found.shared == {block: count > 1 for block, count in ways.items()}


@pytest.mark.parametrize("name", FIXTURES)
def test_one_tree_in_the_order_of_its_keys(name: str) -> None:
    content, pool, roots, nr_blocks = mapping_roots(name)
    walk = BatchWalk(NodeBatches(MemoryDevice(content)), nr_blocks)
    for root in roots[:20]:
        found: list[tuple[int, int]] = []
        for nodes, _ in walk.leaves_in_key_order(root):
            keys, values = nodes.entries()
            found += zip(keys.tolist(), values.tolist(), strict=True)
        assert found == [(key, int.from_bytes(value, "little")) for key, value in pool.items(root)]


def mutate(rng: random.Random, surgeon: Surgeon, blocks: list[int]) -> None:
    """Break a tree, or nearly: mostly what only shows when a node is compared with others."""
    pool = surgeon.image
    block = rng.choice(blocks)
    node = pool.node(block)
    n = len(node.keys)
    if n == 0:
        return
    i = rng.randrange(n)
    what = rng.choice(["first", "last", "shift", "child", "swap", "count", "flags"])
    if what == "first":
        surgeon.key(block, 0, max(0, node.keys[0] + rng.choice([-1, 1, -1000])))
    elif what == "last":
        surgeon.key(block, n - 1, min(LAST_KEY, node.keys[-1] + rng.choice([1, -1, 100, 1 << 40])))
    elif what == "shift":
        for j, key in enumerate(node.keys):
            surgeon.key(block, j, key + 1)
    elif what == "child":
        surgeon.value(block, i, rng.choice([0, 1 << 40, (1 << 64) - 1, block, *blocks]))
    elif what == "swap":
        j = rng.randrange(n)
        surgeon.value(block, i, node.children[j])
        surgeon.value(block, j, node.children[i])
    elif what == "count":
        surgeon.node(block, nr_entries=rng.choice([n - 1, 1, FULL, FULL - 1]))
    else:
        surgeon.node(block, flags=1 if node.leaf else 2)


@pytest.mark.parametrize("name", FIXTURES[:-1])
def test_broken_trees_get_the_verdict_of_the_plain_walk(name: str) -> None:
    content, pool, roots, nr_blocks = mapping_roots(name)
    content = content[: nr_blocks * BLOCK]
    roots = roots[:12]
    blocks = sorted({node.number for root in roots for _, node in pool.nodes(root)})
    internal = [block for block in blocks if not pool.node(block).leaf]
    rng = random.Random(name)
    used = content[: (max(blocks) + 1) * BLOCK]
    verdicts: Counter[bool] = Counter()
    for number in range(60):
        surgeon = Surgeon(used)
        mutate(rng, surgeon, internal if internal and number % 2 else blocks)
        damages, _ = plainly(surgeon.content(), roots)
        assert is_clean(surgeon.content(), roots) == (not damages), damages[:1]
        verdicts[not damages] += 1
    assert verdicts[True] > 2
    assert verdicts[False] > 5


# Trees made by hand


class Forest:
    """A device of a few hundred blocks with trees on it."""

    def __init__(self, nr_blocks: int = 400) -> None:
        self.surgeon = Surgeon(bytes(nr_blocks * BLOCK))

    def leaf(self, block: int, first: int, count: int = FULL) -> int:
        keys = range(first, first + count)
        self.surgeon.put(block, node_block(block, keys, keys))
        return block

    def leaves(self, block: int, first: int = 0) -> tuple[list[int], list[int]]:
        """Leaves from *block* on, enough for an internal node; the keys that lead there, and the blocks."""
        keys = [first + 100 * i for i in range(FULL)]
        return keys, [self.leaf(block + i, key) for i, key in enumerate(keys)]

    def internal(self, block: int, keys: list[int], children: list[int]) -> int:
        self.surgeon.put(block, node_block(block, keys, children, leaf=False))
        return block

    def verdict(self, *roots: int) -> bool:
        """Whether the trees are clean, on which both walks have to agree."""
        content = self.surgeon.content()
        clean = is_clean(content, list(roots))
        assert clean == (not plainly(content, list(roots))[0])
        return clean


@pytest.fixture
def forest() -> Forest:
    return Forest()


def test_no_trees_at_all() -> None:
    found = Found(bytes(BLOCK), [])
    assert found.leaves == {}
    assert found.nr_entries == []


def test_trees_of_different_heights_share_nodes(forest: Forest) -> None:
    """As when a tree grew a level after it was made a snapshot of."""
    keys, leaves = forest.leaves(10)
    low = forest.internal(5, keys, leaves)
    more_keys, more_leaves = forest.leaves(100, 10000)
    high = forest.internal(6, more_keys, more_leaves)
    top = forest.internal(4, [0, 10000], [low, high])
    single = forest.leaf(3, 5, 2)
    assert forest.verdict(low, top, single, top)
    found = Found(forest.surgeon.content(), [low, top, single, top, leaves[0]])
    assert found.nr_entries == [FULL * FULL, 2 * FULL * FULL, 2, 2 * FULL * FULL, FULL]
    assert (found.references[low], found.references[top], found.references[leaves[0]]) == (2, 2, 2)
    assert (found.labels[low], found.labels[top], found.labels[high], found.labels[leaves[0]]) == (2, 2, 2, 1)
    assert (found.shared[single], found.shared[low], found.shared[leaves[1]]) == (False, True, True)


def test_a_child_in_two_trees_obeys_both_parents(forest: Forest) -> None:
    keys, leaves = forest.leaves(10)
    first = forest.internal(5, keys, leaves)
    second = forest.internal(6, [*keys[:-1], keys[-1] - 1], leaves)
    assert forest.verdict(first, second)
    forest.internal(6, [*keys[:-1], keys[-1] + 1], leaves)
    assert not forest.verdict(first, second)
    forest.internal(6, [0, *(key - 10 for key in keys[1:])], leaves)
    assert forest.verdict(first, second), "from 90 on, where the leaf before ends with 83"
    forest.internal(6, [0, *(key - 17 for key in keys[1:])], leaves)
    assert not forest.verdict(first, second)


def test_the_end_of_a_parent_is_the_end_of_all_below(forest: Forest) -> None:
    keys, leaves = forest.leaves(10)
    low = forest.internal(5, keys, leaves)
    more_keys, more_leaves = forest.leaves(100, keys[-1] + FULL)
    high = forest.internal(6, more_keys, more_leaves)
    top = forest.internal(4, [0, keys[-1] + FULL], [low, high])
    assert forest.verdict(top)
    forest.surgeon.key(4, 1, keys[-1] + FULL - 1)
    assert not forest.verdict(top)


def test_a_small_root_is_no_child(forest: Forest) -> None:
    keys, leaves = forest.leaves(10)
    forest.leaf(leaves[3], keys[3], FULL - 1)
    top = forest.internal(5, keys, leaves)
    assert forest.verdict(leaves[3])
    assert not forest.verdict(top)
    assert not forest.verdict(leaves[3], top)
    assert not forest.verdict(top, leaves[3])


def test_empty_trees(forest: Forest) -> None:
    empty = forest.leaf(3, 0, 0)
    assert forest.verdict(empty, empty)
    forest.surgeon.node(empty, flags=1)
    assert not forest.verdict(empty)


def test_the_last_key_there_is(forest: Forest) -> None:
    forest.surgeon.put(3, node_block(3, [0, LAST_KEY], [1, 2]))
    assert forest.verdict(3)


@pytest.mark.parametrize("root", [0, 400, 1 << 62, LAST_KEY])
def test_roots_outside_the_device(forest: Forest, root: int) -> None:
    assert not forest.verdict(root)


def test_a_bound_below_the_size_of_the_device(forest: Forest) -> None:
    keys, leaves = forest.leaves(10)
    top = forest.internal(5, keys, leaves)
    assert is_clean(forest.surgeon.content(), [top], leaves[-1] + 1)
    assert not is_clean(forest.surgeon.content(), [top], leaves[-1])


def test_loops_end(forest: Forest) -> None:
    keys, leaves = forest.leaves(10)
    forest.internal(5, keys, [5, *leaves[1:]])
    assert not forest.verdict(5)
    forest.internal(5, keys, [*leaves[1:], 5])
    assert not forest.verdict(5)
    forest.internal(5, keys, [6, *leaves[1:]])
    forest.internal(6, keys, [5, *leaves[1:]])
    assert not forest.verdict(5)


def test_a_leaf_that_stands_twice_in_a_tree(forest: Forest) -> None:
    keys, leaves = forest.leaves(10)
    top = forest.internal(5, keys, [*leaves[:-1], leaves[0]])
    assert not forest.verdict(top)
    with pytest.raises(NotClean):
        list(BatchWalk(NodeBatches(forest.surgeon.device()), 400).leaves_in_key_order(top))


@pytest.mark.parametrize("extra", [0, 1])
def test_more_levels_than_there_can_be(forest: Forest, extra: int) -> None:
    """A chain; its nodes have too few entries, so both walks must be told that each is a root."""
    nr_levels = MAX_DEPTH + extra
    for level in range(nr_levels - 1):
        forest.internal(10 + level, [0], [11 + level])
    forest.leaf(10 + nr_levels - 1, 0)
    walk = BatchWalk(NodeBatches(forest.surgeon.device()), 400)
    with pytest.raises(NotClean) as raised:
        list(walk.leaves_in_key_order(10))
    assert raised.value.block == (10 if extra else 11), (
        "the root is to blame for the depth, else its child for its size"
    )


def test_in_key_order_what_is_broken_is_found_as_well(forest: Forest) -> None:
    keys, leaves = forest.leaves(10)
    top = forest.internal(5, keys, leaves[::-1])
    walk = BatchWalk(NodeBatches(forest.surgeon.device()), 400)
    with pytest.raises(NotClean):
        list(walk.leaves_in_key_order(top))
    with pytest.raises(NotClean):
        list(walk.leaves_in_key_order(0))
    forest.internal(5, keys, leaves)
    walk = BatchWalk(NodeBatches(forest.surgeon.device()), 400)
    assert [level.blocks.tolist() for _, level in walk.leaves_in_key_order(top)] == [leaves]


def test_only_some_leaves_are_read_if_that_is_wanted(forest: Forest) -> None:
    keys, leaves = forest.leaves(10)
    top = forest.internal(5, keys, leaves)
    forest.surgeon.flip(leaves[4])
    walk = BatchWalk(NodeBatches(forest.surgeon.device()), 400)
    level = walk.leaf_level(top)
    assert level.blocks.tolist() == leaves
    some = level.at(np.array([7, 2, 9]))
    assert [nodes.blocks.tolist() for nodes, _ in walk.read_leaves(some)] == [[leaves[7], leaves[2], leaves[9]]]
    with pytest.raises(NotClean):
        list(walk.read_leaves(level))
