"""Going down a tree: reading with what a search needs checked, and shadowing with what copy on write needs done.

A search that *finds* a key in nodes that are sound by themselves gives the right value.  A search that finds *nothing*
can be wrong although every node is sound, when children are swapped or a parent's key is too high.  So a child is
compared with its parent when it is read from the device, and before a key is said to be absent the neighbours on both
sides of the way down are looked at too (:meth:`ReadSpine.verify_absence`); a bit for each key of an internal node
remembers what was checked.

Source: docs/format.md, "Btree node"; docs/design.md, "Searching damaged trees".
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, cast

from persistent_data.btree_node import BTREE_NODE, FIRST_SLOT, Node
from persistent_data.errors import CorruptMetadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from persistent_data.block_manager import Validator, View
    from persistent_data.btree_node import Value
    from persistent_data.transaction_manager import NonBlockingTransactionManager, TransactionManager

MAX_LEVELS = 64
"""A deeper tree cannot be: it would need more keys than there are."""
LEVELS = (None,) * MAX_LEVELS
"""To iterate over, without making a range for each descent."""
KEY_LIMIT = 1 << 64
READ_AHEAD = 32
"""Nodes that a walk asks for before it comes to them, and half as many that it keeps on their way."""


class ValueType:
    """What the values of a tree are, and what has to happen when they are copied, replaced or dropped.

    :param size: bytes of a value.  Values of 8 bytes are handled as ints, others as bytes
    :param inc: called with the values of a leaf that was copied: the copies are further references
    :param dec: called with values that are not in the tree any more
    :param equal: tells whether replacing the first by the second changes what is referred to; by default whether they
        are the same
    """

    __slots__ = ("dec", "equal", "inc", "size")

    def __init__(
        self,
        size: int,
        inc: Callable[[list[Value]], None] | None = None,
        dec: Callable[[list[Value]], None] | None = None,
        equal: Callable[[Value, Value], bool] | None = None,
    ) -> None:
        self.size = size
        self.inc = inc
        self.dec = dec
        self.equal = equal


class ReadSpine:
    """Reading from the trees of a transaction manager, or of its non-blocking clone."""

    def __init__(self, tm: TransactionManager | NonBlockingTransactionManager) -> None:
        self._tm = tm
        self._peek = tm.bm.peek
        self._client = tm.bm.client

    def root(self, block: int, value_size: int) -> Node:
        """Return the root node of a tree with values of that size."""
        node = cast("Node", self._tm.read_block(block, BTREE_NODE))
        self._check_value_size(node, value_size)
        if not node.nr_entries and not node.is_leaf:
            raise CorruptMetadata(block, "empty node that leads to others")
        return node

    def child(self, parent: Node, index: int, value_size: int) -> Node:
        """Return child *index* of an internal node; it is compared with its parent if it has to be read first."""
        block = parent.child(index)
        known = self._peek(block) is not None
        node = cast("Node", self._tm.read_block(block, BTREE_NODE))
        if not known:
            self._compare(parent, index, node, value_size)
        return node

    def checked_child(self, parent: Node, index: int, value_size: int) -> Node:
        """Return child *index*, compared with its parent and with the neighbours: nothing can be hidden there."""
        for edge in (index, index + 1):
            if not parent.checked_edges >> edge & 1:
                self._check_edge(parent, edge, value_size)
        return self.child(parent, index, value_size)

    def read_ahead(self, parent: Node, index: int, end: int) -> None:
        """Start to read child *index* and what follows it, which a walk to key *end* (exclusive) will come to."""
        bm = self._tm.bm
        count = min(READ_AHEAD, bm.most_read_ahead)
        last = min(index + count, parent.upper_bound(end) if end < KEY_LIMIT else parent.nr_entries) - 1
        # Halfway, so that as many are on their way while the walk is busy with the others.
        halfway = min(index + count // 2, last)
        if halfway > index and self._peek(parent.child(halfway)) is None:
            bm.prefetch_all(parent.child(at) for at in range(index, last + 1))

    def find(self, root: int, key: int, value_size: int) -> tuple[Node, int] | None:
        """Return the leaf that has *key*, and the key's slot; None if the tree does not have it.

        :raises CorruptMetadata: a node on the way, or beside it if the key is not found, is damaged
        """
        peek = self._peek
        epoch = self._client.epoch
        block = root
        node: Node
        parent: Node | None = None
        slot = 0
        for _ in LEVELS:
            buffer = peek(block)
            if buffer is not None and (node := buffer.aux).__class__ is Node:
                buffer.referenced = epoch
            elif parent is None:
                node = self.root(block, value_size)
            else:
                node = self.child(parent, slot - FIRST_SLOT, value_size)
            words = node.words
            slot = bisect_right(words, key, FIRST_SLOT, node.end) - 1
            if node.is_leaf:
                if node.value_size != value_size:
                    self._check_value_size(node, value_size)
                if words[slot] == key and slot >= FIRST_SLOT:
                    return node, slot
                break
            if slot < FIRST_SLOT:
                break
            block = words[slot + node.max_entries]
            parent = node
        else:
            raise self._too_deep(root)
        self.verify_absence(root, key, value_size)
        return None

    def verify_absence(self, root: int, key: int, value_size: int) -> None:
        """Make sure that *key*, which a plain search does not find, cannot be anywhere else in the tree.

        :raises CorruptMetadata: it could
        """
        node = self.root(root, value_size)
        low, high = 0, KEY_LIMIT
        for _ in range(MAX_LEVELS):
            if node.nr_entries and (node.key(0) < low or node.key(node.nr_entries - 1) >= high):
                raise CorruptMetadata(node.block, f"keys are not within [{low}..{high}), as the node above says")
            if node.is_leaf:
                return
            index = node.lower_bound(key)
            if index < 0:
                self.checked_child(node, 0, value_size)
                return
            low = node.key(index)
            if index + 1 < node.nr_entries:
                high = node.key(index + 1)
            node = self.checked_child(node, index, value_size)
        raise self._too_deep(root)

    def _check_edge(self, parent: Node, edge: int, value_size: int) -> None:
        """Compare the children on both sides of key *edge* with it, and so with each other."""
        for index in (edge - 1, edge):
            if 0 <= index < parent.nr_entries:
                child = cast("Node", self._tm.read_block(parent.child(index), BTREE_NODE))
                self._compare(parent, index, child, value_size)
        parent.checked_edges |= 1 << edge

    def _compare(self, parent: Node, index: int, child: Node, value_size: int) -> None:
        """Raise unless *child* can be child *index* of *parent*."""
        if child.nr_entries == 0:
            raise CorruptMetadata(child.block, f"empty node below metadata block {parent.block}")
        low = parent.key(index)
        if child.key(0) < low:
            raise CorruptMetadata(
                parent.block, f"key {low} is above the first key {child.key(0)} of its child, block {child.block}"
            )
        if index + 1 < parent.nr_entries and child.key(child.nr_entries - 1) >= parent.key(index + 1):
            last = child.key(child.nr_entries - 1)
            raise CorruptMetadata(
                parent.block, f"child {child.block} has key {last}, not below the next key {parent.key(index + 1)}"
            )
        if parent.children_are_leaves is None:
            parent.children_are_leaves = child.is_leaf
        elif parent.children_are_leaves != child.is_leaf:
            raise CorruptMetadata(child.block, f"leaves at different depths below metadata block {parent.block}")
        self._check_value_size(child, value_size)

    def _check_value_size(self, node: Node, value_size: int) -> None:
        if node.is_leaf and node.value_size != value_size:
            raise CorruptMetadata(node.block, f"value_size mismatch: {node.value_size} instead of {value_size}")

    def _too_deep(self, root: int) -> CorruptMetadata:
        return CorruptMetadata(root, f"tree has more than {MAX_LEVELS} levels: a node must be below itself")


class ShadowSpine(ReadSpine):
    """Going down while making each node on the way one that may be changed."""

    _tm: TransactionManager

    def __init__(self, tm: TransactionManager) -> None:
        super().__init__(tm)
        self._exclusive = tm.exclusive
        self._move_to_new_block = tm.move_to_new_block
        self.settled = tm.settled

    def shadow(self, block: int, value_type: ValueType) -> Node:
        """Return a version of node *block* that may be changed, with a reference added to all that a copy refers to.

        The caller puts ``node.block`` wherever *block* was.
        """
        node, was_shared = cast("tuple[Node, bool]", self._tm.shadow_block(block, BTREE_NODE))
        if was_shared:
            self.inc_contents(node, value_type)
        return node

    def shadow_child(self, parent: Node, index: int, value_type: ValueType) -> Node:
        """Shadow child *index* of *parent*, which may be changed itself and is."""
        slot = FIRST_SLOT + parent.max_entries + index
        block = parent.words[slot]
        buffer = self._peek(block)
        if buffer is None:
            self.child(parent, index, value_type.size)
        elif buffer.aux.__class__ is Node:
            # The two usual cases, without the calls that the others need.
            buffer.referenced = self._client.epoch
            if block in self._exclusive:
                if not buffer.dirty:
                    self._client.mark_dirty(buffer)
                return buffer.aux
            if self._move_to_new_block(buffer):
                parent.words[slot] = buffer.block_number
                return buffer.aux
        node, was_shared = cast("tuple[Node, bool]", self._tm.shadow_block(block, BTREE_NODE))
        if was_shared:
            self.inc_contents(node, value_type)
        parent.words[slot] = node.buffer.block_number
        return node

    def shadow_children(self, parent: Node, index: int, count: int, value_type: ValueType) -> list[Node]:
        """Shadow *count* children of *parent* from *index* on, left to right."""
        words = parent.words
        first = FIRST_SLOT + parent.max_entries + index
        client = self._client
        epoch = client.epoch
        nodes = []
        for slot in range(first, first + count):
            block = words[slot]
            buffer = self._peek(block)
            # As in shadow_child; written out because every removal does this for the three leaves around its key.
            if buffer is not None and buffer.aux.__class__ is Node:
                buffer.referenced = epoch
                if block in self._exclusive:
                    if not buffer.dirty:
                        client.mark_dirty(buffer)
                    nodes.append(buffer.aux)
                    continue
                if self._move_to_new_block(buffer):
                    words[slot] = buffer.block_number
                    nodes.append(buffer.aux)
                    continue
            nodes.append(self.shadow_child(parent, index + slot - first, value_type))
        return nodes

    def unsettle(self, parent: Node, index: int) -> None:
        """Note that child *index* of *parent*, and perhaps those next to it, have more or fewer entries than before.

        Whether they and those next to them share their entries as they should is open again.
        """
        self.settled.difference_update(parent.children()[max(index - 2, 0) : index + 3])

    def shadow_root(self, block: int, value_type: ValueType) -> Node:
        """Shadow the root of a tree with values of that type."""
        self.root(block, value_type.size)
        return self.shadow(block, value_type)

    def inc_contents(self, node: Node, value_type: ValueType) -> None:
        """Add a reference to everything that *node* refers to."""
        if not node.is_leaf:
            self._tm.inc_blocks(node.children())
        elif value_type.inc is not None:
            value_type.inc(node.values())

    def new_node(self, like: Node) -> Node:
        """Allocate an empty node of the same kind and geometry."""
        flags = like.data[4]
        validator: Validator = BTREE_NODE
        return self._tm.new_node(validator, flags, like.value_size)

    def is_shared(self, block: int) -> bool:
        """Tell whether a node has more than one reference."""
        return self._tm.block_is_shared(block)

    def free(self, node: View) -> None:
        """Give up the only reference to a node whose content went elsewhere."""
        self._tm.dec(node.block)
