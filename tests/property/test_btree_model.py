"""Btrees against dictionaries, with values so large that a few insertions split a node.

One machine drives up to three trees that are snapshots of each other, of one to three levels, with references counted
by a value type whose callbacks keep a ledger.  At each commit the trees are looked at by an independent reader.
"""

from __future__ import annotations

import copy
import random
from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from persistent_data.btree import BTree, block_pointers
from persistent_data.btree_spine import ValueType
from persistent_data.errors import KeyNotFound
from tests.support.trees import Store, assert_tree_is_sound, leaf_values, recount

if TYPE_CHECKING:
    from collections.abc import Callable

    from persistent_data.btree_node import Value

Model = dict[tuple[int, ...], int]
"""Keys -> the thing that the value refers to.  Upper levels of which nothing is left are in ``Tree.uppers``."""

NR_BLOCKS = 600
KEY_LIMIT = 1 << 64

picks = st.integers(0, 11)
upper_keys = st.lists(st.sampled_from([0, 0, 1, 2, 3, KEY_LIMIT - 1]), min_size=2, max_size=2)
last_keys = st.one_of(st.integers(0, 40), st.integers(0, 40), st.sampled_from([KEY_LIMIT - 2, KEY_LIMIT - 1]))
things = st.integers(1, 5)


class Tree:
    """A root, and what is below it as plain values."""

    def __init__(self, root: int, content: Model, uppers: set[tuple[int, ...]]) -> None:
        self.root = root
        self.content = content
        self.uppers = uppers
        """Upper keys that have a tree, empty or not."""

    def below(self, uppers: tuple[int, ...]) -> list[int]:
        """The last-level keys of one last-level tree."""
        return sorted(keys[-1] for keys in self.content if keys[:-1] == uppers)

    def put(self, keys: tuple[int, ...], thing: int) -> None:
        self.content[keys] = thing
        for level in range(1, len(keys)):
            self.uppers.add(keys[:level])


class BTreeMachine(RuleBasedStateMachine):
    """Does the same to trees and to dictionaries, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger: Counter[int] = Counter()
        self.trees: list[Tree] = []
        self.committed: list[Tree] = []
        self.committed_ledger: Counter[int] = Counter()

    @initialize(
        value_size=st.sampled_from([1000, 480, 24, 8, 4]),
        nr_levels=st.sampled_from([1, 1, 2, 3]),
        cache_bytes=st.sampled_from([None, 1]),
        pattern=st.sampled_from(["ascending", "descending", "random"]),
        count=st.sampled_from([30, 12, 0]),
    )
    def begin(self, value_size: int, nr_levels: int, cache_bytes: int | None, pattern: str, count: int) -> None:
        self.value_size = value_size
        self.nr_levels = nr_levels
        self.store = Store.of_size(NR_BLOCKS, cache_bytes=cache_bytes)
        self.make_tree_operations()
        self.trees = [Tree(self.tree.empty(), {}, set())]
        # As much as fills a few nodes, whatever the size of values.
        per_node = max(1, 4064 // (8 + value_size) // 3)
        self.insert_many(0, [0, 0], 0, count * per_node if nr_levels == 1 else count, pattern)
        self.commit()

    def make_tree_operations(self) -> None:
        def inc(values: list[Value]) -> None:
            self.ledger.update(self.thing_of(value) for value in values)

        def dec(values: list[Value]) -> None:
            self.ledger.subtract(self.thing_of(value) for value in values)

        last = ValueType(self.value_size, inc, dec)
        self.tree = BTree(self.store.tm, [*[block_pointers(self.store.tm)] * (self.nr_levels - 1), last])

    # Values

    def value_of(self, thing: int) -> Value:
        if self.value_size == 8:
            return thing
        return thing.to_bytes(4, "little").ljust(self.value_size, bytes([thing]))

    def thing_of(self, value: Value) -> int:
        return value if isinstance(value, int) else int.from_bytes(value[:4], "little")

    def pick(self, which: int) -> Tree:
        return self.trees[which % len(self.trees)]

    def keys(self, uppers: list[int], key: int) -> tuple[int, ...]:
        return (*uppers[: self.nr_levels - 1], key)

    def starting(self) -> None:
        self.store.bm.begin_operation()

    # Changing

    def put(self, tree: Tree, keys: tuple[int, ...], thing: int) -> None:
        self.starting()
        old = tree.content.get(keys)
        if old != thing:
            self.ledger[thing] += 1  # the tree takes this over
        tree.root, inserted = self.tree.insert_notify(tree.root, keys, self.value_of(thing))
        assert inserted == (old is None)
        tree.put(keys, thing)

    @rule(which=picks, uppers=upper_keys, key=last_keys, thing=things)
    def insert(self, which: int, uppers: list[int], key: int, thing: int) -> None:
        self.put(self.pick(which), self.keys(uppers, key), thing)

    @rule(
        which=picks,
        uppers=upper_keys,
        begin=st.integers(0, 30),
        count=st.integers(1, 40),
        pattern=st.sampled_from(["ascending", "descending", "random"]),
    )
    def insert_many(self, which: int, uppers: list[int], begin: int, count: int, pattern: str) -> None:
        order = list(range(begin, begin + count))
        if pattern == "descending":
            order.reverse()
        elif pattern == "random":
            random.Random(begin).shuffle(order)
        for key in order:
            self.put(self.pick(which), self.keys(uppers, key), key % 5 + 1)

    @rule(which=picks, uppers=upper_keys, key=last_keys, pick=st.one_of(st.none(), picks))
    def remove(self, which: int, uppers: list[int], key: int, pick: int | None) -> None:
        tree = self.pick(which)
        keys = self.keys(uppers, key)
        if pick is not None and tree.content:
            keys = sorted(tree.content)[pick % len(tree.content)]
        self.starting()
        if keys not in tree.content:
            with pytest.raises(KeyNotFound):
                self.tree.remove(tree.root, keys)
            return
        tree.root = self.tree.remove(tree.root, keys)
        del tree.content[keys]

    @rule(which=picks, pick=st.integers(0, 1 << 16), count=st.integers(1, 40))
    def remove_many(self, which: int, pick: int, count: int) -> None:
        tree = self.pick(which)
        order = sorted(tree.content)
        random.Random(pick).shuffle(order)
        if pick % 3:
            order.sort(reverse=pick % 3 == 1)
        for keys in order[:count]:
            self.starting()
            tree.root = self.tree.remove(tree.root, keys)
            del tree.content[keys]

    @rule(which=picks, uppers=upper_keys, begin=last_keys, length=st.one_of(st.integers(0, 40), st.just(KEY_LIMIT)))
    def remove_leaves(self, which: int, uppers: list[int], begin: int, length: int) -> None:
        tree = self.pick(which)
        keys = self.keys(uppers, begin)
        end = min(begin + length, KEY_LIMIT)
        self.starting()
        root, count, stopped = self.tree.remove_leaves(tree.root, keys, end)
        tree.root = root
        gone = [k for k in tree.content if k[:-1] == keys[:-1] and begin <= k[-1] < stopped]
        assert count == len(gone)
        assert begin <= stopped <= max(begin, end)
        for k in gone:
            del tree.content[k]

    @rule(which=picks, uppers=upper_keys, begin=last_keys, length=st.integers(0, 100))
    def remove_range(self, which: int, uppers: list[int], begin: int, length: int) -> None:
        """By lookup_next and remove_leaves in turn, as one has to who wants everything gone."""
        tree = self.pick(which)
        uppers = list(self.keys(uppers, 0)[:-1])
        end = begin + length
        wanted = [k for k in tree.content if list(k[:-1]) == uppers and begin <= k[-1] < end]
        for _ in range(len(wanted) + 1):
            self.starting()
            try:
                found, _ = self.tree.lookup_next(tree.root, [*uppers, begin])
            except KeyNotFound:
                break
            if found >= end:
                break
            tree.root, count, begin = self.tree.remove_leaves(tree.root, [*uppers, found], end)
            assert count > 0
        for k in wanted:
            del tree.content[k]

    # Whole trees

    @precondition(lambda self: len(self.trees) < 3)
    @rule(which=picks)
    def snapshot(self, which: int) -> None:
        tree = self.pick(which)
        self.starting()
        self.store.tm.inc(tree.root)
        self.trees.append(Tree(tree.root, dict(tree.content), set(tree.uppers)))

    @rule(which=picks)
    def delete(self, which: int) -> None:
        tree = self.pick(which)
        self.trees.remove(tree)
        self.starting()
        self.tree.delete(tree.root)
        if not self.trees:
            self.starting()
            self.trees.append(Tree(self.tree.empty(), {}, set()))

    # Transactions

    @rule()
    def commit(self) -> None:
        self.store.commit([tree.root for tree in self.trees])
        self.committed = copy.deepcopy(self.trees)
        self.committed_ledger = self.ledger.copy()
        self.check_image()

    @rule()
    def reopen(self) -> None:
        """Begin again with the last commit; what came after it is lost."""
        self.store.reopen()
        assert self.store.roots == [tree.root for tree in self.committed]
        self.trees = copy.deepcopy(self.committed)
        self.ledger = self.committed_ledger.copy()
        self.make_tree_operations()

    @rule()
    def write_early(self) -> None:
        """As happens when memory is short: dirty blocks go to the device before the commit."""
        self.starting()
        self.store.bm.flush()

    def check_image(self) -> None:
        image = self.store.image()
        roots = [tree.root for tree in self.committed]
        counts = recount(image, roots, self.nr_levels)
        assert image.counts("metadata") == counts
        assert image.superblock().metadata_map.nr_allocated == len(counts)
        values = leaf_values(image, roots, self.nr_levels)
        assert +self.committed_ledger == Counter(int.from_bytes(value[:4], "little") for value in values)
        assert not [thing for thing, count in self.committed_ledger.items() if count < 0]
        for tree in self.committed:
            found: Model = {}
            self.read_level(tree.root, (), found)
            assert found == tree.content

    def read_level(self, root: int, uppers: tuple[int, ...], found: Model) -> None:
        image = self.store.image()
        is_last = len(uppers) == self.nr_levels - 1
        assert_tree_is_sound(image, root, self.value_size if is_last else 8)
        for key, value in image.items(root):
            if is_last:
                found[*uppers, key] = int.from_bytes(value[:4], "little")
            else:
                self.read_level(int.from_bytes(value, "little"), (*uppers, key), found)

    # Reading

    @rule(which=picks, uppers=upper_keys, key=last_keys)
    def read(self, which: int, uppers: list[int], key: int) -> None:
        tree = self.pick(which)
        keys = self.keys(uppers, key)
        self.starting()
        if keys in tree.content:
            assert self.thing_of(self.tree.lookup(tree.root, keys)) == tree.content[keys]
        else:
            with pytest.raises(KeyNotFound):
                self.tree.lookup(tree.root, keys)
        following = tree.below(keys[:-1])[bisect_left(tree.below(keys[:-1]), key) :]
        if following:
            found, value = self.tree.lookup_next(tree.root, keys)
            assert (found, self.thing_of(value)) == (following[0], tree.content[*keys[:-1], following[0]])
        else:
            with pytest.raises(KeyNotFound):
                self.tree.lookup_next(tree.root, keys)

    @rule(which=picks, begin=last_keys, step=st.integers(1, 9))
    def iterate(self, which: int, begin: int, step: int) -> None:
        if self.nr_levels > 1:
            return
        tree = self.pick(which)
        content = [(keys[-1], tree.content[keys]) for keys in sorted(tree.content)]
        self.starting()
        assert [(k, self.thing_of(v)) for k, v in self.tree.items(tree.root, begin)] == [
            entry for entry in content if entry[0] >= begin
        ]
        seen: list[tuple[int, int]] = []

        def visit(key: int, value: Value) -> bool:
            seen.append((key, self.thing_of(value)))
            return len(seen) == step

        assert bool(self.tree.walk(tree.root, visit)) == (len(content) >= step)
        assert seen == content[:step]
        if not content:
            with pytest.raises(KeyNotFound):
                self.tree.cursor(tree.root)
            return
        cursor = self.tree.cursor(tree.root)
        for at in range(0, len(content), step):
            key, value = cursor.key_value
            assert (key, self.thing_of(value)) == content[at]
            if at + step >= len(content):
                with pytest.raises(KeyNotFound):
                    cursor.skip(step)
                with pytest.raises(KeyNotFound):
                    cursor.key_value  # noqa: B018  # the access is what raises
                with pytest.raises(KeyNotFound):
                    cursor.next()
            elif step == 1:
                cursor.next()
            else:
                cursor.skip(step)

    @invariant()
    def extremes_agree(self) -> None:
        for tree in self.trees:
            self.starting()
            for end, find in ((0, self.tree.find_lowest_key), (-1, self.tree.find_highest_key)):
                expected: tuple[int, ...] = ()
                for level in range(1, self.nr_levels):
                    candidates = sorted(u for u in tree.uppers if len(u) == level and u[:-1] == expected)
                    if not candidates:
                        break
                    expected = candidates[end]
                if len(expected) == self.nr_levels - 1 and tree.below(expected):
                    expected = (*expected, tree.below(expected)[end])
                assert find(tree.root) == list(expected)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        while self.trees:
            self.starting()
            self.tree.delete(self.trees.pop().root)
        assert not +self.ledger, "references are left although there is no tree"
        assert not -self.ledger
        self.trees = []
        self.committed = []
        self.store.commit([])
        image = self.store.image()
        assert image.counts("metadata") == recount(image, [], 1)


BTreeMachine.TestCase.settings = settings(
    suppress_health_check=list(HealthCheck), print_blob=True, phases=set(Phase) - {Phase.explain}
)
TestBTreeMachine = BTreeMachine.TestCase


def take_a_walk(rng: random.Random, value_size: int, nr_levels: int, nr_steps: int) -> None:
    """Drive the machine by hand, with a bit of everything, much of it where trees grow and shrink."""
    machine = BTreeMachine()

    def uppers() -> list[int]:
        return rng.choices([0, 0, 0, 0, 1, 1, 2, 3, 4, KEY_LIMIT - 1], k=2)

    def key() -> int:
        return rng.choice([rng.randrange(41), rng.randrange(300), KEY_LIMIT - 1])

    def which() -> int:
        return rng.randrange(12)

    def pattern() -> str:
        return rng.choice(["ascending", "descending", "random"])

    steps: list[tuple[int, Callable[[], object]]] = [
        (20, lambda: machine.insert(which(), uppers(), key(), rng.randint(1, 5))),
        (6, lambda: machine.insert_many(which(), uppers(), rng.randrange(300), rng.randint(1, 60), pattern())),
        (20, lambda: machine.remove(which(), uppers(), key(), rng.choice([None, rng.randrange(1000)]))),
        (6, lambda: machine.remove_many(which(), rng.randrange(1 << 16), rng.randint(1, 60))),
        (3, lambda: machine.remove_leaves(which(), uppers(), key(), rng.choice([5, 40, 400, KEY_LIMIT]))),
        (3, lambda: machine.remove_range(which(), uppers(), key(), rng.choice([5, 40, 400]))),
        (4, lambda: len(machine.trees) < 3 and machine.snapshot(which())),
        (3, lambda: len(machine.trees) > 1 and machine.delete(which())),
        (8, machine.commit),
        (2, machine.reopen),
        (1, machine.write_early),
        (5, lambda: machine.read(which(), uppers(), key())),
        (3, lambda: machine.iterate(which(), key(), rng.randint(1, 9))),
    ]
    machine.begin(value_size, nr_levels, rng.choice([None, 1]), pattern(), rng.choice([0, 12, 30]))
    weights = [weight for weight, _ in steps]
    for _ in range(nr_steps):
        rng.choices(steps, weights)[0][1]()
        machine.extremes_agree()
    machine.commit()
    machine.teardown()


@pytest.mark.parametrize("nr_levels", [1, 2, 3])
@pytest.mark.parametrize("value_size", [1000, 480, 24, 8, 4])
@pytest.mark.parametrize("seed", range(max(1, settings().max_examples // 50)))
def test_a_random_walk_agrees_with_the_model(seed: int, value_size: int, nr_levels: int) -> None:
    take_a_walk(random.Random(seed), value_size, nr_levels, 150)
