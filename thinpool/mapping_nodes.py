"""Nodes of mapping trees for programs without an engine: each is verified where it stands, or it raises."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from persistent_data.block_reader import WINDOW_BLOCKS
from persistent_data.btree_walk import (
    FIRST_KEY_LOW,
    LAST_KEY_HIGH,
    MAX_DEPTH,
    TOO_DEEP,
    UNEVEN_DEPTH,
    UNEVEN_GEOMETRY,
)
from persistent_data.damage import FATAL, UNBOUNDED, Damage, Fault
from persistent_data.node_check import OUTSIDE_DEVICE, check_node
from thinpool.errors import ThinError
from thinpool.layout import TIME_BITS
from thinpool.mapping_walk import MappingWalk, Subtree
from thinpool.trees import DATA_BLOCK_OUTSIDE, MAPPING_KIND, MAPPING_TREE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from persistent_data.node_check import Node
    from persistent_data.read_ahead import ReadAhead
    from thinpool.pool_reader import PoolReader


class Shape(NamedTuple):
    """What of a sound node has to fit its place in a tree."""

    max_entries: int
    first_key: int
    last_key: int


class MappingNodes:
    """The nodes of the mapping tree whose root *pool* has at metadata block *root*.

    :ivar root: as given
    :ivar shape: of the node whose entries were returned last
    :param ahead: reads the blocks; several trees may have it in common
    :param path: metadata blocks that lead to the root; empty when somebody just says that it is one
    :param dev_id: the thin device whose tree it is, for the sake of messages; None if that is not known
    :raises Corrupt: a node on the way to the first leaf is damaged
    :raises ThinError: EINVAL, no such block, and nothing led there
    :raises OSError: the device cannot be read
    """

    most_ahead = WINDOW_BLOCKS // 2
    """Two trees that are walked side by side fill a window."""

    def __init__(
        self, pool: PoolReader, ahead: ReadAhead, root: int, path: tuple[int, ...] = (), dev_id: int | None = None
    ) -> None:
        self._pool = pool
        self._ahead = ahead
        self.root = root
        self._dev_id = dev_id
        self.shape = Shape(0, 0, 0)
        self._geometry: dict[int, tuple[int, int]] = {}
        """For each height the latest parent, and max_entries of its children.  Siblings come one after the other."""
        if not path and not 0 < root < pool.nr_blocks:
            message = f"block {root} cannot be the root of a mapping tree: the pool has {pool.nr_blocks} blocks"
            raise ThinError(errno.EINVAL, message)
        self._tree = Subtree(0, root, self._measure(root, path), path)

    @property
    def height(self) -> int:
        """Levels above the leaves."""
        return self._tree.height

    def walk(self) -> MappingWalk:
        """Begin a walk of the tree."""
        return MappingWalk(self, self._tree)

    def entries(self, subtree: Subtree, high: int) -> tuple[Sequence[int], Sequence[int]]:
        """Return keys and values of the node at the top of *subtree*; see :class:`thinpool.mapping_walk.Nodes`.

        :raises Corrupt: it is damaged, does not fit its parent, or leads nowhere
        :raises OSError: the device cannot read it
        """
        return self._entries(subtree, high, ((self, subtree, high),))

    def entries_of_both(
        self, subtree: Subtree, high: int, other: MappingNodes, twin: Subtree, twin_high: int
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Return keys and values of a node that is at the top of *subtree* here and of *twin* in *other*.

        :raises Corrupt: it is damaged, does not fit one of its parents, or leads nowhere
        :raises OSError: the device cannot read it
        """
        return self._entries(subtree, high, ((self, subtree, high), (other, twin, twin_high)))

    def _entries(
        self, subtree: Subtree, high: int, places: Sequence[tuple[MappingNodes, Subtree, int]]
    ) -> tuple[Sequence[int], Sequence[int]]:
        low, block, height, parents = subtree
        path = (*parents, block)
        node = self._read(block, path, low, high)
        keys, values = node.keys, node.numbers()
        if node.is_leaf != (height == 0):
            found = "a leaf among internal nodes" if node.is_leaf else "an internal node among leaves"
            self._refuse(Fault(UNEVEN_DEPTH, found), path, low, high)
        self.shape = Shape(node.max_entries, keys[0] if keys else low, keys[-1] if keys else low)
        for nodes, place, place_high in places:
            nodes.check_place(place, place_high, self.shape)
        if height:
            for child in values:
                self._check_pointer(child, path, low, high)
        elif values:
            # The data block is the upper part of the value, so the largest value has the largest block.
            highest = max(values) >> TIME_BITS
            if highest >= self._pool.nr_data_blocks:
                detail = f"a mapping leads to data block {highest} of {self._pool.nr_data_blocks}"
                self._refuse(Fault(DATA_BLOCK_OUTSIDE, detail), path, low, high)
        return keys, values

    def check_place(self, subtree: Subtree, high: int, shape: Shape) -> None:
        """Check that a sound node of that shape can be at the top of *subtree*, all keys below *high*.

        :raises Corrupt: it has its values elsewhere than its siblings, or keys that the parents do not lead to
        """
        low = subtree.low
        path = (*subtree.path, subtree.block)
        parent = path[-2] if len(path) > 1 else 0
        known, wanted = self._geometry.get(subtree.height, (-1, 0))
        if known != parent:
            self._geometry[subtree.height] = (parent, shape.max_entries)
        elif shape.max_entries != wanted:
            self._refuse(Fault(UNEVEN_GEOMETRY, f"{shape.max_entries} instead of {wanted}"), path, low, high)
        if shape.first_key < low:
            self._refuse(Fault(FIRST_KEY_LOW, f"key {shape.first_key}, where a parent says {low}"), path, low, high)
        if shape.last_key >= high:
            detail = f"key {shape.last_key}, where the next subtree begins with {high}"
            self._refuse(Fault(LAST_KEY_HIGH, detail), path, low, high)

    def read_ahead(self, blocks: set[int]) -> None:
        """Read nodes that are about to be asked for."""
        self._ahead.fetch(blocks)

    def _refuse(self, fault: Fault, path: tuple[int, ...], low: int, high: int) -> NoReturn:
        self._pool.refuse(Damage(fault, path, low, high), MAPPING_TREE, self._dev_id)

    def _read(self, block: int, path: tuple[int, ...], low: int, high: int) -> Node:
        """Read and check a node on its own; *path* ends with it."""
        node, faults = check_node(self._ahead.take(block), block, MAPPING_KIND.value_size, block == self.root)
        for fault in faults:
            if fault.severity == FATAL:
                self._refuse(fault, path, low, high)
        assert node is not None, "without a node there is a fatal fault"
        return node

    def _check_pointer(self, block: int, path: tuple[int, ...], low: int, high: int) -> None:
        """Refuse a pointer to *block*, found at the end of *path*, that leads to no metadata block."""
        if not 0 < block < self._pool.nr_blocks:
            fault = Fault(OUTSIDE_DEVICE, f"a pointer to block {block} of {self._pool.nr_blocks}")
            self._refuse(fault, path, low, high)

    def _measure(self, root: int, path: tuple[int, ...]) -> int:
        """Return the number of levels below *root*: the way to the first leaf."""
        block = root
        height = -1
        is_leaf = False
        while not is_leaf:
            height += 1
            if height == MAX_DEPTH:
                self._refuse(Fault(TOO_DEEP, f"more than {MAX_DEPTH} levels"), path, 0, UNBOUNDED)
            self._check_pointer(block, path, 0, UNBOUNDED)
            path = (*path, block)
            node = self._read(block, path, 0, UNBOUNDED)
            is_leaf = node.is_leaf
            block = 0 if is_leaf else node.numbers()[0]
        return height
