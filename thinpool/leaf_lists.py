"""The leaves of mapping trees in the order of their keys, verified as far as the internal nodes can tell, and what
several devices have in common.

In memory are the block numbers of the internal nodes' children, and some 30 bytes for each leaf; never the mappings.
:mod:`thinpool.leaf_arrays` makes the same lists for large pools.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING

from persistent_data.btree_walk import (
    FIRST_KEY_LOW,
    LAST_KEY_HIGH,
    MAX_DEPTH,
    TOO_DEEP,
    UNEVEN_DEPTH,
    UNEVEN_GEOMETRY,
)
from persistent_data.damage import FATAL, UNBOUNDED, Damage, Fault
from persistent_data.node_check import OUTSIDE_DEVICE, Node, check_node
from thinpool.trees import MAPPING_KIND, MAPPING_TREE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from thinpool.pool_reader import PoolReader
    from thinpool.trees import DeviceEntry

_MAX_KEY = UNBOUNDED - 1


class _Subtree:
    """An internal node and what is below it.

    :ivar height: levels below it
    :ivar first: its first key
    :ivar last: its last key
    :ivar chunks: numbers of the chunks below
    """

    __slots__ = ("chunks", "first", "height", "last", "max_entries")

    def __init__(self, node: Node, height: int, chunks: array[int]) -> None:
        self.first = node.keys[0]
        self.last = node.keys[-1]
        self.max_entries = node.max_entries
        self.height = height
        self.chunks = chunks


class Leaves:
    """The leaves of all devices to be dumped, in order of keys, and how they follow each other.

    A leaf is known by its number here.  The children of an internal node just above the leaves are a *chunk*; a device
    is a list of chunks, so that what devices share is stored once.
    """

    _CUT = 0xFFFFFFFF
    """In place of a neighbour: there is none, or not always the same."""
    _UNSET = 0xFFFFFFFE

    def __init__(self, pool: PoolReader) -> None:
        self._pool = pool
        self._numbers = array("I", [0]) * pool.nr_blocks
        self.blocks = array("I")
        self.lowest = array("Q")
        """Each leaf's keys may not begin below this, whichever parent it is reached by."""
        self.highest = array("Q")
        """Nor go beyond this."""
        self.is_root = bytearray()
        self._next = array("I")
        self._previous = array("I")
        self._occurrences = bytearray()
        self._chunks: list[array[int]] = []
        self._devices: list[array[int]] = []
        self._entries: list[DeviceEntry] = []
        self._subtrees: dict[int, _Subtree] = {}
        self.geometry = array("H")
        """max_entries of each leaf, once it has been read."""
        self._even_chunks: set[int] = set()
        """Chunks whose leaves have the same max_entries."""

    # Gathering

    def add_device(self, entry: DeviceEntry) -> None:
        """Take the leaves of the next device.

        :raises Corrupt: an internal node on the way is damaged
        """
        self._entry = entry
        self._entries.append(entry)
        path = (*entry.path, entry.root)
        chunks = self._subtree(entry.root, None, path, 0, _MAX_KEY)
        self._devices.append(chunks)

    def _refuse(self, fault: Fault, path: tuple[int, ...], low: int, high: int) -> NoReturn:
        self._pool.refuse(Damage(fault, path, low, high + 1), MAPPING_TREE, self._entry.dev_id)

    def _read(self, block: int, is_root: bool, path: tuple[int, ...], low: int, high: int) -> Node:
        """Read a node of which nothing is known."""
        if not 0 < block < self._pool.nr_blocks:
            fault = Fault(OUTSIDE_DEVICE, f"a pointer to block {block} of {self._pool.nr_blocks}")
            self._refuse(fault, path[:-1], low, high)
        content = bytes(self._pool.reader.read(block))
        node, faults = check_node(content, block, MAPPING_KIND.value_size, is_root)
        for fault in faults:
            if fault.severity == FATAL:
                self._refuse(fault, path, low, high)
        assert node is not None
        return node

    def _subtree(self, block: int, height: int | None, path: tuple[int, ...], low: int, high: int) -> array[int]:
        """Return the chunks below *block*, whose keys must be within *low* and *high*.

        *height* is the number of levels below the node; None for a root, of which it is not known yet.
        """
        known = self._subtrees.get(block)
        if known is None:
            node = self._read(block, height is None, path, low, high)
            if node.is_leaf:
                if height is not None:
                    self._refuse(Fault(UNEVEN_DEPTH, "a leaf among internal nodes"), path, low, high)
                return array("I", [self._add_chunk((block,), (low,), high, True)])
            if height is None:
                height = self._measure(node, path)
            known = _Subtree(node, height, self._children(node, height, path, high))
            self._subtrees[block] = known
        if height is not None and known.height != height:
            self._refuse(Fault(UNEVEN_DEPTH, f"{known.height} levels below it instead of {height}"), path, low, high)
        if known.first < low:
            self._refuse(Fault(FIRST_KEY_LOW, f"key {known.first}, where the parent says {low}"), path, low, high)
        if known.last > high:
            self._refuse(Fault(LAST_KEY_HIGH, f"key {known.last}, where the parent ends at {high}"), path, low, high)
        self._end_at(known.chunks[-1], high)
        return known.chunks

    def _measure(self, node: Node, path: tuple[int, ...]) -> int:
        """Return the height of an internal root: the way down to the first leaf."""
        height = 0
        while not node.is_leaf:
            height += 1
            if height == MAX_DEPTH:
                self._refuse(Fault(TOO_DEEP, f"more than {MAX_DEPTH} levels"), path, 0, _MAX_KEY)
            child = node.numbers()[0]
            path = (*path, child)
            node = self._read(child, False, path, 0, _MAX_KEY)
        return height

    def _children(self, node: Node, height: int, path: tuple[int, ...], high: int) -> array[int]:
        """Return the chunks below a node whose keys do not go beyond *high*."""
        keys = node.keys
        children = node.numbers()
        if height == 1:
            if min(children) <= 0 or max(children) >= self._pool.nr_blocks:
                i = next(i for i, child in enumerate(children) if not 0 < child < self._pool.nr_blocks)
                fault = Fault(OUTSIDE_DEVICE, f"a pointer to block {children[i]} of {self._pool.nr_blocks}")
                self._refuse(fault, path, keys[i], high)
            return array("I", [self._add_chunk(children, keys, high, False)])
        chunks = array("I")
        for i, child in enumerate(children):
            bound = keys[i + 1] - 1 if i + 1 < len(keys) else high
            child_path = (*path, child)
            chunks += self._subtree(child, height - 1, child_path, keys[i], bound)
            found, wanted = self._subtrees[child].max_entries, self._subtrees[children[0]].max_entries
            if found != wanted:
                self._refuse(Fault(UNEVEN_GEOMETRY, f"{found} instead of {wanted}"), child_path, keys[i], bound)
        return chunks

    def _add_chunk(self, leaves: tuple[int, ...], keys: tuple[int, ...], high: int, is_root: bool) -> int:
        numbers = array("I")
        for i, block in enumerate(leaves):
            bound = keys[i + 1] - 1 if i + 1 < len(keys) else high
            number = self.number(block)
            if number < 0:
                number = len(self.blocks)
                self._numbers[block] = number + 1
                self.blocks.append(block)
                self.lowest.append(keys[i])
                self.highest.append(bound)
                self.is_root.append(is_root)
                self.geometry.append(0)
            else:
                self.lowest[number] = max(self.lowest[number], keys[i])
                self.highest[number] = min(self.highest[number], bound)
                self.is_root[number] &= is_root
            numbers.append(number)
        self._chunks.append(numbers)
        return len(self._chunks) - 1

    def _end_at(self, chunk: int, high: int) -> None:
        """Take note that the last leaf of a chunk must not go beyond *high*."""
        last_leaf = self._chunks[chunk][-1]
        self.highest[last_leaf] = min(self.highest[last_leaf], high)

    def finish(self) -> None:
        """Take note that all devices have been added."""

    # Cutting into parts that devices share

    def cut(self) -> None:
        """Find out which leaves always stand next to each other, and which occur more than once.

        Neighbours a, b belong to one part if b follows every a and a precedes every b, in all devices.
        """
        nr_leaves = len(self.blocks)
        self._next = array("I", [self._UNSET]) * nr_leaves
        self._previous = array("I", [self._UNSET]) * nr_leaves
        self._occurrences = bytearray(nr_leaves)
        uses = array("Q", [0]) * len(self._chunks)
        for chunks in self._devices:
            last = self._CUT
            for chunk in chunks:
                uses[chunk] += 1
                self._join(last, self._chunks[chunk][0])
                last = self._chunks[chunk][-1]
            self._join(last, self._CUT)
        for chunk, nr_uses in enumerate(uses):
            before = self._CUT
            for leaf in self._chunks[chunk]:
                if before != self._CUT:
                    self._join(before, leaf)
                before = leaf
                self._occurrences[leaf] = min(self._occurrences[leaf] + nr_uses, 2)

    def _join(self, a: int, b: int) -> None:
        if a != self._CUT:
            self._next[a] = b if self._next[a] in (self._UNSET, b) else self._CUT
        if b != self._CUT:
            self._previous[b] = a if self._previous[b] in (self._UNSET, a) else self._CUT

    def nr_to_read(self) -> int:
        """Return the number of leaves to read: each once, or once for each device if nothing was cut."""
        if self._occurrences:
            return len(self.blocks)
        return sum(len(self._chunks[chunk]) for chunks in self._devices for chunk in chunks)

    def number(self, block: int) -> int:
        """Return the number of the leaf at *block*."""
        return self._numbers[block] - 1

    def is_shared(self, leaf: int) -> bool:
        """Tell whether a leaf occurs more than once."""
        return bool(self._occurrences) and self._occurrences[leaf] > 1

    def is_head(self, leaf: int) -> bool:
        """Tell whether a leaf begins a part."""
        before = self._previous[leaf]
        return before == self._CUT or self._next[before] != leaf

    def part(self, head: int) -> Iterator[int]:
        """Yield the leaves of the part that begins with *head*."""
        leaf = head
        while True:
            yield leaf
            after = self._next[leaf]
            if after == self._CUT or self._previous[after] != leaf:
                return
            leaf = after

    def shared_heads(self) -> list[int]:
        """Return the first leaves of all shared parts, ascending by metadata block."""
        heads = [leaf for leaf in range(len(self.blocks)) if self.is_shared(leaf) and self.is_head(leaf)]
        return sorted(heads, key=self.blocks.__getitem__)

    def check_geometry(self, number: int, entry: DeviceEntry) -> None:
        """Compare max_entries of the leaves of a device, all of which have been read, with those of their siblings.

        :raises Corrupt: they differ, so some values are not where they were looked for
        """
        for chunk in self._devices[number]:
            if chunk in self._even_chunks:
                continue
            leaves = self._chunks[chunk]
            wanted = self.geometry[leaves[0]]
            for leaf in leaves:
                if self.geometry[leaf] != wanted:
                    fault = Fault(UNEVEN_GEOMETRY, f"{self.geometry[leaf]} instead of {wanted}")
                    path, dev_id = self.locate(leaf, entry)
                    damage = Damage(fault, path, self.lowest[leaf], self.highest[leaf] + 1)
                    self._pool.refuse(damage, MAPPING_TREE, dev_id)
            self._even_chunks.add(chunk)

    def locate(self, leaf: int, entry: DeviceEntry | None) -> tuple[tuple[int, ...], int]:
        """Return the way to a leaf and the id of a device it belongs to: *entry*, or the first one to have it."""
        if entry is None:
            entry = next(e for e, chunks in zip(self._entries, self._devices, strict=True) if self._has(chunks, leaf))
        block = self.blocks[leaf]
        path = (*entry.path, entry.root)
        while path[-1] != block:
            node = self._read(path[-1], True, path, 0, _MAX_KEY)
            children = node.numbers()
            if block in children or node.is_leaf:
                path = (*path, block)
            else:
                path = (*path, children[max(bisect_right(node.keys, self.lowest[leaf]) - 1, 0)])
        return path, entry.dev_id

    def _has(self, chunks: array[int], leaf: int) -> bool:
        return any(leaf in self._chunks[chunk] for chunk in chunks)

    def pieces(self, number: int) -> Iterator[array[int] | int]:
        """Yield what a device, by its number in the order of :meth:`add_device`, consists of.

        These are stretches of leaves of its own, and the first leaves of shared parts.
        """
        own = array("I")
        for chunk in self._devices[number]:
            for leaf in self._chunks[chunk]:
                if not self.is_shared(leaf):
                    own.append(leaf)
                    continue
                if own:
                    yield own
                    own = array("I")
                if self.is_head(leaf):
                    yield leaf
        if own:
            yield own
