"""Btree nodes by the hundred: read in few transfers, checked and handed out as arrays.

The rules of a sound node are worded in :mod:`persistent_data.node_check`.  Here they are array operations that only say
whether a batch is clean: a node of which :func:`~persistent_data.node_check.check_node` would report anything at all,
and any whose entries are not in the usual places, is :class:`NotClean`.  Whoever meets that leaves it to the plain
code, which knows what to say; so a sound but unusual pool costs time, never an answer.

Only for programs with thousands of nodes to read: importing numpy takes as long as checking 1,500 nodes one by one.
"""

from __future__ import annotations

from struct import calcsize
from typing import TYPE_CHECKING

import numpy as np

from persistent_data.block_batches import BlockBatches, NotClean, require
from persistent_data.block_reader import WINDOW_BLOCKS
from persistent_data.checksum import BTREE_NODE_SALT
from persistent_data.layout import (
    INTERNAL_NODE,
    KEY_SIZE,
    LEAF_NODE,
    NODE_FIELDS,
    NODE_HEADER,
    NODE_HEADER_SIZE,
    max_entries,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from numpy.typing import NDArray

    from bufio.device import Device
    from persistent_data.block_batches import Flags, Numbers, Window, Words

CHILD_SIZE = 8
"""Bytes in a value of an internal node."""

NODE_DTYPE = np.dtype(
    [
        (name, f"<u{calcsize('<' + code)}")
        for name, code in zip(NODE_FIELDS, NODE_HEADER.format.lstrip("<"), strict=True)
    ]
)
"""The header of a node."""


class NodeBatch:
    """*n* clean nodes.  The arrays are views that hold until the next batch is asked for.

    :ivar blocks: i8, shape (n,): where the nodes were read, in the order in which they were asked for
    :ivar is_leaf: bool, shape (n,)
    :ivar nr_entries: i8, shape (n,)
    :ivar keys: u8, shape (n, m): row i has ``nr_entries[i]`` keys, strictly ascending, and meaningless words behind
        them; *m* is the entries that there is room for
    :ivar children: u8, shape (n, 252): the values of the internal nodes, likewise
    :ivar values: u8 or u4, shape (n, m): the values of the leaves, likewise
    :ivar unused: bool, shape (n, m): true behind the last entry of each node
    """

    __slots__ = ("blocks", "children", "is_leaf", "keys", "nr_entries", "unused", "values")

    def __init__(
        self,
        blocks: Numbers,
        is_leaf: Flags,
        nr_entries: Numbers,
        keys: Words,
        children: Words,
        values: Words,
        unused: Flags,
    ) -> None:
        self.blocks = blocks
        self.is_leaf = is_leaf
        self.nr_entries = nr_entries
        self.keys = keys
        self.children = children
        self.values = values
        self.unused = unused

    def entries(self) -> tuple[Words, Words]:
        """Return all keys and all values of a batch of leaves, one node after the other, as arrays of their own."""
        if not self.unused.any():
            return self.keys.reshape(-1), self.values.reshape(-1)
        used = ~self.unused
        return self.keys[used], self.values[used]

    def pointers(self) -> tuple[Words, Words]:
        """Return all keys and all children of a batch of internal nodes, as arrays of their own."""
        used = ~self.unused[:, : self.children.shape[1]]
        return self.keys[:, : used.shape[1]][used], self.children[used]


class _Rows:
    """The parts of the nodes in a window."""

    def __init__(self, window: Window, leaf_value_size: int) -> None:
        nr_children = max_entries(CHILD_SIZE)
        nr_values = max_entries(leaf_value_size)
        self.window = window
        self.header = window.rows[:, :NODE_HEADER_SIZE].view(NODE_DTYPE)[:, 0]
        self.keys = _columns(window.rows, NODE_HEADER_SIZE, max(nr_children, nr_values), KEY_SIZE)
        self.children = _columns(window.rows, NODE_HEADER_SIZE + nr_children * KEY_SIZE, nr_children, CHILD_SIZE)
        self.values = _columns(window.rows, NODE_HEADER_SIZE + nr_values * KEY_SIZE, nr_values, leaf_value_size)


class NodeBatches:
    """Reads nodes of *device*, up to :data:`~persistent_data.block_reader.WINDOW_BLOCKS` of them at a time.

    Memory: one window or two, and a tenth of one for what is computed from it.

    :param leaf_value_size: bytes in a value of a leaf: 8 or 4
    :param ahead: see :class:`~persistent_data.block_batches.BlockBatches`
    :ivar nr_blocks: whole blocks on the device
    """

    def __init__(self, device: Device, leaf_value_size: int = 8, *, ahead: bool = False) -> None:
        self._blocks = BlockBatches(device, ahead=ahead)
        self.nr_blocks = self._blocks.nr_blocks
        self._leaf_geometry = (max_entries(leaf_value_size), leaf_value_size)
        self._rows = [_Rows(window, leaf_value_size) for window in self._blocks.windows]
        nr_keys = self._rows[0].keys.shape[1]
        self._columns = np.arange(nr_keys, dtype=np.min_scalar_type(nr_keys))
        self._unused = np.empty((WINDOW_BLOCKS, nr_keys), np.bool_)
        self._ascending = np.empty((WINDOW_BLOCKS, nr_keys - 1), np.bool_)

    def read(self, blocks: Numbers, may_be_small: Flags | None = None) -> Generator[NodeBatch, None, None]:
        """Yield the nodes at metadata blocks *blocks* in the order given.

        The device is read in ascending order within a batch, so ascending *blocks* are read in ascending order.

        :param may_be_small: for each block whether it is the root of a tree, which may have fewer entries than other
            nodes; None when none of them is
        :raises NotClean: one of them is not a clean node, is outside the device, cannot be read, or is asked for twice
            within a window
        """
        for begin, part, number in self._blocks.fetch(blocks):
            small = None if may_be_small is None else may_be_small[begin : begin + len(part)]
            yield self._check(self._rows[number], part, small)

    def _check(self, rows: _Rows, blocks: Numbers, may_be_small: Flags | None) -> NodeBatch:
        """Check the first of *rows* as the nodes at *blocks*."""
        n = len(blocks)
        header = rows.header[:n]
        flags = header["flags"]
        is_leaf = flags == LEAF_NODE
        nr_entries = header["nr_entries"].astype(np.int64)
        room, value_size = self._leaf_geometry
        geometry = np.where(is_leaf, room, max_entries(CHILD_SIZE))
        least = geometry // 3
        if may_be_small is not None:
            least[may_be_small] = ~is_leaf[may_be_small]  # only a leaf that is the whole tree may be empty
        clean = rows.window.checksums(n, BTREE_NODE_SALT) == header["csum"]
        clean &= header["blocknr"] == blocks.view(np.uint64)
        clean &= is_leaf | (flags == INTERNAL_NODE)
        clean &= header["max_entries"] == geometry
        clean &= header["value_size"] == np.where(is_leaf, value_size, CHILD_SIZE)
        clean &= header["padding"] == 0
        clean &= (nr_entries >= least) & (nr_entries <= geometry)
        require(clean, blocks)

        keys = rows.keys[:n]
        unused, ascending = self._unused[:n], self._ascending[:n]
        np.greater_equal(self._columns, nr_entries.astype(self._columns.dtype)[:, None], out=unused)
        np.greater(keys[:, 1:], keys[:, :-1], out=ascending)
        ascending |= unused[:, 1:]
        if not ascending.all():
            raise NotClean(int(blocks[ascending.all(axis=1).argmin()]))
        return NodeBatch(blocks, is_leaf, nr_entries, keys, rows.children[:n], rows.values[:n], unused)


def _columns(window: NDArray[np.uint8], offset: int, count: int, size: int) -> Words:
    """Return *count* numbers of *size* bytes from byte *offset* of each row."""
    return window[:, offset : offset + count * size].view(f"<u{size}")
