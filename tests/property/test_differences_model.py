"""The comparison of two trees of any shape that share what they like, against plain dicts; and what of them is read."""

from __future__ import annotations

from itertools import count, pairwise
from random import Random
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from thinpool.differences import SAME, differences
from thinpool.mapping_walk import MappingWalk, Subtree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Leaf = dict[int, int]
"""Thin block to data block."""


class Forest:
    """Nodes in memory, which verify what they are asked for and remember how often."""

    most_ahead = 4

    def __init__(self) -> None:
        self.nodes: dict[int, tuple[list[int], list[int], int]] = {}
        """Keys, values and height by block."""
        self.asked: list[int] = []
        self._blocks = count(1)

    def add(self, keys: list[int], values: list[int], height: int) -> int:
        block = next(self._blocks)
        self.nodes[block] = (keys, values, height)
        return block

    def add_leaf(self, leaf: Leaf, dice: Random) -> int:
        return self.add(sorted(leaf), [leaf[key] << 24 | dice.randrange(4) for key in sorted(leaf)], 0)

    def entries(self, subtree: Subtree, high: int) -> tuple[Sequence[int], Sequence[int]]:
        keys, values, height = self.nodes[subtree.block]
        assert subtree.height == height
        assert all(subtree.low <= key < high for key in keys)
        self.asked.append(subtree.block)
        return keys, values

    def entries_of_both(
        self, subtree: Subtree, high: int, twin: Subtree, twin_high: int
    ) -> tuple[Sequence[int], Sequence[int]]:
        assert subtree.block == twin.block
        return self.entries(subtree._replace(low=max(subtree.low, twin.low)), min(high, twin_high))

    def read_ahead(self, blocks: set[int]) -> None:
        assert blocks <= self.nodes.keys()
        assert len(blocks) <= 2 * self.most_ahead

    def walk(self, root: int) -> MappingWalk:
        return MappingWalk(self, Subtree(0, root, self.nodes[root][2], ()))

    def below(self, block: int) -> Iterator[int]:
        yield block
        _, values, height = self.nodes[block]
        if height:
            for child in values:
                yield from self.below(child)


def grow(forest: Forest, leaves: list[int], parents: dict[tuple[int, ...], int], dice: Random) -> int:
    """Build a tree over *leaves*; a group of children that has had a parent may get the same again."""
    level = leaves
    while len(level) > 1 or dice.random() < 0.2:
        height = forest.nodes[level[0]][2] + 1
        above = []
        while level:
            size = dice.randrange(1, 5)
            group, level = level[:size], level[size:]
            known = parents.get(tuple(group))
            if known is None or dice.random() < 0.1:
                # A parent may name a key that its child had once; leaves own eight keys each.
                firsts = [forest.nodes[child][0][0] for child in group]
                known = forest.add([dice.choice([key, key // 8 * 8]) for key in firsts], group, height)
                parents[tuple(group)] = known
            above.append(known)
        level = above
    return level[0]


def related_trees(forest: Forest, dice: Random) -> tuple[int, int, Leaf, Leaf]:
    """Two trees, of which the second has leaves of the first, changed ones, fewer and more; and their mappings."""
    mappings: tuple[Leaf, Leaf] = ({}, {})
    leaves: tuple[list[int], list[int]] = ([], [])
    for at in range(0, dice.randrange(1, 16) * 8, 8):
        data = dice.randrange(1000)
        old = {at + i: data + i // 3 * 5 + i for i in range(8) if dice.random() < 0.8}
        new = {key: dice.choice([block, block, block + 1]) for key, block in old.items() if dice.random() < 0.8}
        fate = dice.random()
        contents = (old, old) if fate < 0.6 else (old, new) if fate < 0.9 else dice.choice([(old, {}), ({}, new)])
        shared = forest.add_leaf(old, dice) if old else 0
        for side in (0, 1):
            if contents[side]:
                mappings[side].update(contents[side])
                is_shared = contents[side] is old and dice.random() < 0.95
                leaves[side].append(shared if is_shared else forest.add_leaf(contents[side], dice))
    parents: dict[tuple[int, ...], int] = {}
    roots = [grow(forest, side, parents, dice) if side else forest.add([], [], 0) for side in leaves]
    return roots[0], roots[1], *mappings


@given(st.integers(0, (1 << 64) - 1))
def test_differences_are_those_of_the_mappings(seed: int) -> None:
    dice = Random(seed)
    forest = Forest()
    left, right, ours, others = related_trees(forest, dice)
    common = {*forest.below(left)} & {*forest.below(right)}
    for same in (False, True):
        forest.asked.clear()
        reader = forest.entries_of_both if same else None
        found = list(differences(forest.walk(left), forest.walk(right), entries_of_both=reader))
        assert [one.thin_begin for one in found] == sorted(one.thin_begin for one in found)
        assert not any(one.goes_on_with(following) for one, following in pairwise(found))
        seen: dict[int, tuple[int | None, int | None]] = {}
        for one in found:
            for i in range(one.length):
                a = None if one.left_data_begin is None else one.left_data_begin + i
                b = None if one.right_data_begin is None else one.right_data_begin + i
                assert (one.kind == SAME) == (a == b)
                seen[one.thin_begin + i] = (a, b)
        assert seen == {
            key: (ours.get(key), others.get(key))
            for key in {*ours, *others}
            if same or ours.get(key) != others.get(key)
        }
        if left == right:
            assert len(forest.asked) == len({*forest.asked}) == (len(common) if same else 0)
