"""What btrees promise beyond what test_btree_model.py finds out: exact shapes, and trees that are damaged.

A search in a damaged tree must not say that there is no such key when there is one: it is right, or it raises.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from persistent_data.btree import BTree, Finger, block_pointers
from persistent_data.btree_spine import ValueType
from persistent_data.errors import CorruptMetadata, InvalidArgument, KeyNotFound, WouldBlock
from tests.support.devices import FaultyMemory
from tests.support.image import SALTS, raw_checksum
from tests.support.trees import BLOCK_SIZE, Store, describe_tree

if TYPE_CHECKING:
    from collections.abc import Callable

WIDE = 480  # bytes of a value; six in a leaf


def wide(number: int) -> bytes:
    return number.to_bytes(4, "little") * (WIDE // 4)


class Trees:
    """A store, and single-level trees with wide values in it."""

    def __init__(self, nr_blocks: int = 2000, cache_bytes: int | None = None) -> None:
        self.device = FaultyMemory(nr_blocks * BLOCK_SIZE)
        self.store = Store.format(self.device, cache_bytes=cache_bytes)
        self.tree = BTree(self.store.tm, [ValueType(WIDE)])

    def make(self, keys: range) -> int:
        """A committed tree with these keys."""
        root = self.tree.empty()
        for key in keys:
            self.store.bm.begin_operation()
            root = self.tree.insert(root, [key], wide(key))
        self.store.commit([root])
        return root

    def reopen(self) -> None:
        """Forget what is cached."""
        self.store.reopen()
        self.tree = BTree(self.store.tm, [ValueType(WIDE)])

    def fills(self, root: int) -> list[list[int]]:
        """Entries in each node, level by level."""
        self.store.commit([root])
        return [[count for _, count in level] for level in self.store.image().shape(root).levels]


@pytest.fixture
def trees() -> Trees:
    return Trees()


# Shapes: how full nodes are after insertions and removals is part of what the kernel does


def test_full_root_is_split_in_two_and_keeps_its_block(trees: Trees) -> None:
    root = trees.tree.empty()
    for key in range(7):
        root = trees.tree.insert(root, [key], wide(key))
    first = root
    assert trees.fills(root) == [[2], [3, 4]]
    assert first == root


def test_full_leaf_is_split_if_no_sibling_has_eight_slots_free(trees: Trees) -> None:
    """Leaves of six never do: so one becomes two, or two become three."""
    root = trees.tree.empty()
    for key in range(0, 100, 10):
        root = trees.tree.insert(root, [key], wide(key))
    assert trees.fills(root) == [[3], [3, 3, 4]]
    for key in (31, 32, 33, 34):
        root = trees.tree.insert(root, [key], wide(key))
    # The middle one was full, and it is neither the first nor the last of three.
    assert trees.fills(root) == [[4], [3, 3, 4, 4]]


def test_overwriting_in_a_full_leaf_splits_nothing(trees: Trees) -> None:
    root = trees.make(range(6))
    root = trees.tree.insert(root, [3], wide(99))
    assert trees.fills(root) == [[6]]
    assert trees.tree.lookup(root, [3]) == wide(99)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_leaves_of_words_end_up_nearly_full(order: str) -> None:
    store = Store.of_size(200)
    tree = BTree(store.tm, [ValueType(8)])
    root = tree.empty()
    keys = range(3000) if order == "ascending" else range(2999, -1, -1)
    for key in keys:
        store.bm.begin_operation()
        root = tree.insert(root, [key], key)
    store.commit([root])
    fills = [count for _, count in store.image().shape(root).levels[-1]]
    inner = fills[1:-2] if order == "ascending" else fills[2:-1]
    assert all(240 <= fill <= 252 for fill in inner), fills


def test_new_lowest_key_is_the_parents_too(trees: Trees) -> None:
    root = trees.make(range(100, 140))
    root = trees.tree.insert(root, [5], wide(5))
    trees.store.commit([root])
    assert trees.store.image().node(root).keys[0] == 5
    assert trees.tree.find_lowest_key(root) == [5]


def test_two_underfull_leaves_are_merged(trees: Trees) -> None:
    root = trees.make(range(7))
    root = trees.tree.remove(root, [6])
    # 3 + 4 entries before the removal: not below 2 * (6 // 3 + 1) yet.
    assert trees.fills(root) == [[2], [3, 3]]
    root = trees.tree.remove(root, [5])
    assert trees.fills(root) == [[2], [3, 2]]
    root = trees.tree.remove(root, [4])
    # 3 + 2 are: they are merged first, then the key goes.
    assert trees.fills(root) == [[1], [4]]
    root = trees.tree.remove(root, [0])
    # Now the only child takes the place of its parent.
    assert trees.fills(root) == [[3]]


def test_emptied_tree_is_an_empty_leaf(trees: Trees) -> None:
    root = trees.make(range(50))
    for key in range(50):
        trees.store.bm.begin_operation()
        root = trees.tree.remove(root, [key])
    assert trees.fills(root) == [[0]]
    assert trees.tree.find_highest_key(root) == []


def test_only_child_that_is_shared_keeps_what_it_refers_to() -> None:
    """Kernels before May 2026 forgot to count this: docs/design.md, "Removal"."""
    held: list[int] = []
    dropped: list[int] = []
    store = Store.of_size(300)
    value_type = ValueType(
        WIDE, lambda values: held.extend(map(number, values)), lambda v: dropped.extend(map(number, v))
    )
    tree = BTree(store.tm, [value_type])
    root = tree.empty()
    for key in range(7):
        root = tree.insert(root, [key], wide(key))
    for key in (6, 5, 4):
        root = tree.remove(root, [key])
    store.commit([root])
    child = store.image().node(root).children[0]
    assert len(store.image().node(root).children) == 1
    snapshot = root
    store.tm.inc(root)
    dropped.clear()
    root = tree.remove(root, [0])
    store.commit([root, snapshot])
    assert sorted(held) == [0, 1, 2, 3]
    assert dropped == [0]
    assert store.tm.ref(child) == 1
    assert [key for key, _ in tree.items(snapshot)] == [0, 1, 2, 3]
    assert [key for key, _ in tree.items(root)] == [1, 2, 3]


def number(value: object) -> int:
    assert isinstance(value, bytes)
    return int.from_bytes(value[:4], "little")


# Single promises


def test_value_that_is_equal_gives_up_nothing() -> None:
    dropped: list[object] = []
    store = Store.of_size(100)
    tree = BTree(store.tm, [ValueType(8, None, dropped.extend, lambda a, b: int(a) // 10 == int(b) // 10)])
    root = tree.insert(tree.empty(), [1], 41)
    root, inserted = tree.insert_notify(root, [1], 45)
    assert not inserted
    assert dropped == []
    assert tree.lookup(root, [1]) == 45
    root = tree.insert(root, [1], 51)
    assert dropped == [45]


def test_remove_leaves_below_a_missing_inner_tree_returns_the_root_of_the_whole() -> None:
    """Found while writing these tests: the root returned was that of the inner tree."""
    store = Store.of_size(100)
    pointers = block_pointers(store.tm)
    tree = BTree(store.tm, [pointers, pointers, ValueType(8)])
    root = tree.insert(tree.empty(), [1, 2, 3], 7)
    store.commit([root])
    for missing in ([1, 9, 0], [9, 2, 0], [1, 2, 4]):
        store.bm.begin_operation()
        root, count, stopped = tree.remove_leaves(root, missing, 50)
        assert (count, stopped) == (0, missing[-1])
        assert tree.lookup(root, [1, 2, 3]) == 7


def test_shadowed_child_stays_cached_while_a_block_is_found_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by test_pool_model: with hardly any memory, reading a bitmap could evict the child that was to be moved."""
    store = Store.of_size(600, cache_bytes=1)
    tree = BTree(store.tm, [ValueType(8)])
    root = tree.empty()
    for key in range(3000):
        store.bm.begin_operation()
        root = tree.insert(root, [key], key)
    store.commit([root])
    replace = store.sm.replace

    def replace_after_reading(block: int) -> int | None:
        for other in range(500, 540):
            store.bm.client.read(other).release()
        return replace(block)

    monkeypatch.setattr(store.sm, "replace", replace_after_reading)
    for key in range(0, 3000, 100):
        for neighbour in range(max(0, key - 300), min(3000, key + 300), 60):
            store.bm.begin_operation()
            tree.find(root, neighbour)  # cached now, but no longer in use when the removal begins
        store.bm.begin_operation()
        root = tree.remove(root, [key])
    store.commit([root])
    assert [key for key, _ in tree.items(root)] == [key for key in range(3000) if key % 100]


def test_finger_takes_only_keys_of_its_leaf() -> None:
    store = Store.of_size(100)
    tree = BTree(store.tm, [ValueType(8)])
    finger = Finger()
    root = tree.empty()
    model = {}
    for key in [*range(0, 2000, 2), *range(1999, 0, -2), *range(0, 2000, 7)]:
        store.bm.begin_operation()
        inserted = tree.insert_at_finger(finger, key, key + 1)
        if inserted is None:
            root, inserted = tree.insert_in_subtree(root, key, key + 1, finger)
        assert inserted == (key not in model)
        model[key] = key + 1
    store.commit([root])
    assert dict(tree.items(root)) == model


def test_lookup_without_io_says_which_blocks_to_prefetch(trees: Trees) -> None:
    root = trees.make(range(100))
    trees.reopen()
    clone = trees.store.tm.non_blocking_clone()
    for _ in range(10):
        try:
            assert trees.tree.lookup_non_blocking(clone, root, [50]) == wide(50)
            break
        except WouldBlock:
            clone.issue_prefetches()
    else:
        pytest.fail("still not cached")


def test_height_and_number_of_entries(trees: Trees) -> None:
    assert trees.tree.height(trees.make(range(6))) == 0
    assert trees.tree.count_if_leaf(trees.make(range(6))) == 6
    large = trees.make(range(2000))
    assert trees.tree.height(large) == 2
    assert trees.tree.count_if_leaf(large) is None


def test_shadowing_the_way_to_a_key_that_is_not_there_is_refused(trees: Trees) -> None:
    root = trees.make(range(0, 100, 2))
    with pytest.raises(InvalidArgument):
        trees.tree.shadow_leaf_of(root, 51)


def test_walk_stops_at_the_first_result(trees: Trees) -> None:
    root = trees.make(range(100))
    assert trees.tree.walk(root, lambda key, value: key if key == 42 else 0) == 42
    assert trees.tree.walk(root, lambda key, value: None) is None


def test_iteration_goes_on_while_other_trees_change(trees: Trees) -> None:
    root = trees.make(range(100))
    other = trees.tree.empty()
    seen = []
    for key, _ in trees.tree.items(root):
        seen.append(key)
        trees.store.bm.begin_operation()
        other = trees.tree.insert(other, [key], wide(key))
    assert seen == list(range(100))


# Damaged trees

STEP = 100
KEYS = range(0, 300 * STEP, STEP)


class Damaged(Trees):
    """A tree of two levels whose blocks can be patched."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.make(KEYS)
        self.leaves = self.store.image().node(self.root).children
        self.first_keys = self.store.image().node(self.root).keys

    def patch(self, block: int, offset: int, code: str, *values: int) -> None:
        """Change a block on the device, its checksum right again."""
        data = bytearray(self.store.image().block(block))
        struct.pack_into(f"<{code}", data, offset, *values)
        data[0:4] = (raw_checksum(bytes(data)) ^ SALTS["node"]).to_bytes(4, "little")
        self.device.pwrite(bytes(data), block * BLOCK_SIZE)

    def set_key(self, index: int, key: int) -> None:
        self.patch(self.root, 32 + 8 * index, "Q", key)

    def set_child(self, index: int, block: int) -> None:
        self.patch(self.root, 32 + 8 * 252 + 8 * index, "Q", block)


def swap_children(tree: Damaged) -> set[int]:
    tree.set_child(5, tree.leaves[9])
    tree.set_child(9, tree.leaves[5])
    return {tree.root}


def raise_parent_key(tree: Damaged) -> set[int]:
    tree.set_key(7, tree.first_keys[7] + STEP // 2)
    return {tree.root}


def lower_parent_key(tree: Damaged) -> set[int]:
    tree.set_key(7, tree.first_keys[7] - STEP - 1)
    return {tree.root}


def point_to_itself(tree: Damaged) -> set[int]:
    tree.set_child(7, tree.root)
    return {tree.root}


def use_a_child_twice(tree: Damaged) -> set[int]:
    tree.set_child(8, tree.leaves[7])
    return {tree.root}


def empty_a_child(tree: Damaged) -> set[int]:
    tree.patch(tree.leaves[7], 16, "I", 0)
    return {tree.leaves[7]}


def put_a_tree_in_place_of_a_leaf(tree: Damaged) -> set[int]:
    other = tree.tree.empty()
    for key in range(tree.first_keys[7], tree.first_keys[8], STEP // 10):
        tree.store.bm.begin_operation()
        other = tree.tree.insert(other, [key], wide(key))
    assert tree.tree.height(other) == 1
    tree.store.commit([tree.root, other])
    tree.set_child(7, other)
    return {other, tree.root}


def put_a_leaf_of_words_in_place(tree: Damaged) -> set[int]:
    words = BTree(tree.store.tm, [ValueType(8)])
    other = words.empty()
    for key in range(tree.first_keys[7], tree.first_keys[8], STEP):
        other = words.insert(other, [key], key)
    tree.store.commit([tree.root, other])
    tree.set_child(7, other)
    return {other}


def point_beyond_the_device(tree: Damaged) -> set[int]:
    tree.set_child(7, 1 << 40)
    return {1 << 40}


def point_to_the_superblock(tree: Damaged) -> set[int]:
    tree.set_child(7, 0)
    return {0}


DAMAGES: list[Callable[[Damaged], set[int]]] = [
    swap_children,
    raise_parent_key,
    lower_parent_key,
    point_to_itself,
    use_a_child_twice,
    empty_a_child,
    put_a_tree_in_place_of_a_leaf,
    put_a_leaf_of_words_in_place,
    point_beyond_the_device,
    point_to_the_superblock,
]


@pytest.fixture(params=DAMAGES, ids=lambda damage: damage.__name__)
def damaged(request: pytest.FixtureRequest) -> tuple[Damaged, set[int]]:
    tree = Damaged()
    blocks = request.param(tree)
    tree.reopen()
    return tree, blocks


def ask(call: Callable[[], object]) -> object:
    """The answer, KeyNotFound as a class, or the damage that was met."""
    try:
        return call()
    except KeyNotFound:
        return KeyNotFound
    except CorruptMetadata as error:
        return error


def test_search_in_a_damaged_tree_is_right_or_names_the_damage(damaged: tuple[Damaged, set[int]]) -> None:
    tree, blocks = damaged
    errors: list[CorruptMetadata] = []
    # Cold and warm, forwards and backwards: what is cached already must not change what is noticed.
    asked = [key + off for key in KEYS for off in (0, 1, STEP - 1)]
    for order in (asked, asked[::-1]):
        tree.reopen()
        for key in order:
            tree.store.bm.begin_operation()
            found = ask(lambda key=key: tree.tree.lookup(tree.root, [key]))  # type: ignore[misc]  # bound at once
            if isinstance(found, CorruptMetadata):
                errors.append(found)
            else:
                assert found == (wide(key) if key in KEYS else KeyNotFound), key
            following = ask(lambda key=key: tree.tree.lookup_next(tree.root, [key]))  # type: ignore[misc]
            expected = next(((k, wide(k)) for k in KEYS if k >= key), KeyNotFound)
            if isinstance(following, CorruptMetadata):
                errors.append(following)
            else:
                assert following == expected, key
    assert errors
    for error in errors:
        assert error.block in blocks
        assert error.rule
        assert f"metadata block {error.block}" in str(error)


def test_iteration_over_a_damaged_tree_stops_at_the_damage(damaged: tuple[Damaged, set[int]]) -> None:
    tree, blocks = damaged
    seen: list[int] = []
    with pytest.raises(CorruptMetadata) as caught:
        seen.extend(key for key, _ in tree.tree.items(tree.root))
    assert caught.value.block in blocks
    assert seen == list(KEYS)[: len(seen)]


def test_description_of_a_tree_names_every_node(trees: Trees) -> None:
    """The checker that the property tests rely on prints what it looks at."""
    root = trees.make(range(20))
    text = describe_tree(trees.store.image(), root)
    assert text.startswith(f"{root} internal")
    assert text.count("leaf") == len(trees.fills(root)[-1])
