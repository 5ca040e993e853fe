"""Whole btrees read level by level, many nodes at a time: any number of trees at once, or one in the order of its keys.

Both are made for sound trees.  What :class:`~persistent_data.btree_walk.BTreeWalk` would report of a tree, whatever its
severity, is :class:`~persistent_data.block_batches.NotClean` here.

Nodes are taken by their height, which is the same for all the nodes of one level of a tree, and has to be the same in
every tree that a node belongs to.  So no node is read before all those above it, none twice, and no walk goes in
circles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from persistent_data.block_batches import NotClean, require
from persistent_data.btree_walk import MAX_DEPTH
from persistent_data.distinct import Distinct

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from persistent_data.block_batches import Flags, Numbers, Words
    from persistent_data.node_batches import NodeBatch, NodeBatches

LAST_KEY = (1 << 64) - 1


class Level:
    """Nodes of one height, and what is known of each from above, before it is read.  All arrays are of one length.

    :ivar blocks: i8: where the nodes are
    :ivar low: u8: the node's keys are not below this
    :ivar high: u8: the node's keys, and those of all nodes below it, are not above this
    :ivar label: i8: the least of the labels of the trees that the node belongs to
    :ivar references: i8: pointers to the node, those to roots included
    :ivar nr_ways: i1: ways that lead to the node, by pointers to itself or to nodes above it; 2 stands for more, and
        ways that do not count (:meth:`BatchWalk.leaves`) are left out
    :ivar is_root: bool: it is a root and no other node points to it
    """

    __slots__ = ("blocks", "high", "is_root", "label", "low", "nr_ways", "references")

    def __init__(
        self,
        blocks: Numbers,
        low: Words,
        high: Words,
        label: Numbers,
        references: Numbers,
        nr_ways: NDArray[np.int8],
        is_root: Flags,
    ) -> None:
        self.blocks = blocks
        self.low = low
        self.high = high
        self.label = label
        self.references = references
        self.nr_ways = nr_ways
        self.is_root = is_root

    @classmethod
    def of_roots(cls, roots: Numbers, labels: Numbers, counts: Flags) -> Level:
        """Return the roots of trees, one after the other; *counts* says of each tree whether ways through it count."""
        n = len(roots)
        low, high = np.zeros(n, np.uint64), np.full(n, LAST_KEY, np.uint64)
        return cls(roots, low, high, labels, np.ones(n, np.int64), counts.astype(np.int8), np.ones(n, np.bool_))

    @classmethod
    def joined(cls, parts: Sequence[Level]) -> Level:
        """Return all *parts*, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.blocks for part in parts]),
            np.concatenate([part.low for part in parts]),
            np.concatenate([part.high for part in parts]),
            np.concatenate([part.label for part in parts]),
            np.concatenate([part.references for part in parts]),
            np.concatenate([part.nr_ways for part in parts]),
            np.concatenate([part.is_root for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.blocks)

    def at(self, where: slice | Numbers) -> Level:
        """Return some of the nodes."""
        return Level(
            self.blocks[where],
            self.low[where],
            self.high[where],
            self.label[where],
            self.references[where],
            self.nr_ways[where],
            self.is_root[where],
        )

    def distinct(self) -> tuple[Level, Numbers]:
        """Return the same with each node once, ascending by block, and the place that each of ours has there."""
        distinct = Distinct(self.blocks)
        places = distinct.places
        level = self.at(distinct.first)
        if len(level) < len(self):
            level.references = distinct.counts
            nr_ways = np.zeros(len(level), np.int64)
            np.add.at(nr_ways, places, self.nr_ways)
            level.nr_ways = np.minimum(nr_ways, 2).astype(np.int8)
            np.maximum.at(level.low, places, self.low)
            np.minimum.at(level.high, places, self.high)
            np.minimum.at(level.label, places, self.label)
            np.logical_and.at(level.is_root, places, self.is_root)
        return level, places


class BatchWalk:
    """Walks trees whose nodes *batches* reads.

    :param nr_blocks: pointers to this block or a later one are damage
    :ivar levels: after a walk, distinct nodes from the highest roots down to the leaves
    :ivar nr_entries: after :meth:`leaves`, i8: the entries in the leaves of each tree; shared leaves count in each
    """

    def __init__(self, batches: NodeBatches, nr_blocks: int) -> None:
        self._batches = batches
        self._nr_blocks = min(nr_blocks, batches.nr_blocks)
        self.levels: list[Level] = []
        self.nr_entries = np.empty(0, np.int64)

    def leaves(
        self, roots: Sequence[int], labels: Sequence[int], counts: Sequence[bool] | None = None
    ) -> Iterator[tuple[NodeBatch, Level]]:
        """Yield every leaf of the trees with these *roots*, ascending by block, and what is known of it from above.

        :param labels: a number for each tree; trees may have the same root
        :param counts: for each tree whether ways through it count as ways; None for all of them
        :raises NotClean: a tree is not clean, which may come to light after its leaves have been yielded
        """
        n = len(roots)
        counted = np.ones(n, np.bool_) if counts is None else np.array(counts, np.bool_)
        tops = Level.of_roots(_as_blocks(roots), np.array(labels, np.int64), counted)
        self._require_inside(tops, np.zeros(n, np.int64))
        heights = self._heights(tops)
        self.levels = []
        shape: list[tuple[Numbers, Numbers, Numbers]] = []
        """For each level: roots there, the places of all nodes that are pointed to, and the pointers in each node."""
        pointed_to: list[Level] = []
        for height in range(int(heights.max(initial=-1)), -1, -1):
            here = np.flatnonzero(heights == height)
            level, places = Level.joined([tops.at(here), *pointed_to]).distinct()
            self.levels.append(level)
            if height:
                children, nr_entries = self._children(level, height)
                pointed_to = [children]
            else:
                nr_entries = np.empty(len(level), np.int64)
                at = 0
                for nodes, part in self._read(level, height):
                    nr_entries[at : at + len(part)] = nodes.nr_entries
                    at += len(part)
                    yield nodes, part
            shape.append((here, places, nr_entries))
        self.nr_entries = _add_up(shape, n)

    def leaves_in_key_order(self, root: int) -> Iterator[tuple[NodeBatch, Level]]:
        """Yield the leaves of one tree in the order of their keys; otherwise as :meth:`leaves`."""
        yield from self.read_leaves(self.leaf_level(root))

    def leaf_level(self, root: int) -> Level:
        """Return what is known from above of the leaves of one tree, in the order of their keys; read none of them.

        Memory: 50 bytes for each leaf of the tree.

        :raises NotClean: what is above the leaves is not clean, or leads to a node twice
        """
        zero = np.zeros(1, np.int64)
        level = Level.of_roots(_as_blocks([root]), zero, np.ones(1, np.bool_))
        self._require_inside(level, zero)
        self.levels = [level]
        for height in range(int(self._heights(level)[0]), 0, -1):
            level, _ = self._children(level, height)
            if len(Distinct(level.blocks).values) < len(level):
                raise NotClean(root)
            self.levels.append(level)
        return level

    def read_leaves(self, level: Level) -> Iterator[tuple[NodeBatch, Level]]:
        """Yield leaves of which *level* is known, in that order, and what is known of them.

        :raises NotClean: one of them is not clean, or no leaf, or does not fit its place
        """
        yield from self._read(level, 0)

    def _heights(self, tops: Level) -> Numbers:
        """Find out how many levels there are below each root, by way of its first child."""
        heights = np.full(len(tops), -1, np.int64)
        left = np.arange(len(tops))
        blocks = tops.blocks
        for height in range(MAX_DEPTH):
            distinct = Distinct(blocks)
            places = distinct.places
            is_leaf = np.empty(len(distinct.values), np.bool_)
            first = np.empty(len(distinct.values), np.int64)
            at = 0
            for nodes in self._batches.read(distinct.values, np.ones(len(is_leaf), np.bool_)):
                end = at + len(nodes.blocks)
                is_leaf[at:end] = nodes.is_leaf
                first[at:end] = nodes.children[:, 0].view(np.int64)
                at = end
            heights[left[is_leaf[places]]] = height
            deeper = ~is_leaf[places]
            left, blocks = left[deeper], first[places[deeper]]
            if not len(left):
                return heights
            if not ((blocks > 0) & (blocks < self._nr_blocks)).all():
                break
        raise NotClean(int(tops.blocks[left[0]]))

    def _read(self, level: Level, height: int) -> Iterator[tuple[NodeBatch, Level]]:
        """Read the nodes of *level*, and compare them with what is known of them."""
        at = 0
        for nodes in self._batches.read(level.blocks, level.is_root):
            part = level.at(slice(at, at + len(nodes.blocks)))
            at += len(part)
            last = np.maximum(nodes.nr_entries - 1, 0)
            fits = (nodes.keys[:, 0] >= part.low) & (nodes.keys[np.arange(len(part)), last] <= part.high)
            require((nodes.is_leaf == (height == 0)) & (fits | (nodes.nr_entries == 0)), part.blocks)
            yield nodes, part

    def _children(self, level: Level, height: int) -> tuple[Level, Numbers]:
        """Read internal nodes; return what they point to, node by node, and how many pointers each has."""
        parts: list[Level] = []
        counts: list[Numbers] = []
        for nodes, part in self._read(level, height):
            low, children = nodes.pointers()
            parents = np.repeat(np.arange(len(part)), nodes.nr_entries)
            # A child's keys end before those of the next one begin, the last child's where those of the parent end.
            high = np.empty_like(low)
            high[:-1] = low[1:] - np.uint64(1)
            high[np.cumsum(nodes.nr_entries) - 1] = part.high
            n = len(low)
            found = Level(
                children.view(np.int64),
                low,
                high,
                part.label[parents],
                np.ones(n, np.int64),
                part.nr_ways[parents],
                np.zeros(n, np.bool_),
            )
            self._require_inside(found, part.blocks[parents])
            parts.append(found)
            counts.append(nodes.nr_entries)
        return Level.joined(parts), np.concatenate(counts)

    def _require_inside(self, level: Level, holders: Numbers) -> None:
        """Make sure that the pointers, which stand in the blocks *holders*, lead to metadata blocks."""
        require((level.blocks > 0) & (level.blocks < self._nr_blocks), holders)


def _as_blocks(pointers: Sequence[int]) -> Numbers:
    """Return u64 as they were found, the larger ones as negative numbers, which are no blocks either."""
    return np.array(pointers, np.uint64).view(np.int64)


def _add_up(shape: list[tuple[Numbers, Numbers, Numbers]], nr_roots: int) -> Numbers:
    """Return the entries below each root; for *shape* see :meth:`BatchWalk.leaves`."""
    result = np.zeros(nr_roots, np.int64)
    pointed_to = totals = np.empty(0, np.int64)
    for roots, places, counts in reversed(shape):
        totals = np.add.reduceat(pointed_to, np.cumsum(counts) - counts) if len(pointed_to) else counts
        result[roots] = totals[places[: len(roots)]]
        pointed_to = totals[places[len(roots) :]]
    return result
