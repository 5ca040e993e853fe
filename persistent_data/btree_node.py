"""One btree node in its block: searching it, and moving entries within and between nodes.

Keys and values stay in the block's bytes; nothing is decoded ahead of use.  ``words`` is the block as 512 integers: key
*i* is ``words[4 + i]``, and where values have 8 bytes, value *i* is ``words[4 + max_entries + i]``.  So a position
found by bisecting ``words`` becomes that of the value by adding ``max_entries``; the tree code works on such *slots* (4
+ i) where speed counts and on *indexes* (i) elsewhere.

Entries are moved as the kernel moves them: vacated slots keep their old bytes, which the checksum covers, so that the
same operations give the same block.  Source: docs/format.md, "Btree node"; docs/design.md, "Moving entries".
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import islice
from operator import lt
from typing import TYPE_CHECKING, cast

from persistent_data.block_manager import Validator, View
from persistent_data.checksum import BTREE_NODE_SALT
from persistent_data.errors import CorruptMetadata
from persistent_data.layout import (
    BLOCK_SIZE,
    INTERNAL_NODE,
    KEY_SIZE,
    LEAF_NODE,
    NODE_HEADER,
    NODE_HEADER_SIZE,
    max_entries,
)

if TYPE_CHECKING:
    from bufio import Buffer

FIRST_SLOT = NODE_HEADER_SIZE // KEY_SIZE
"""Slot of a node's first key."""
_COUNTS_WORD = 2
WORD_VALUE_SIZE = 8

Value = int | bytes
"""A value: an int where the tree's values have 8 bytes, else exactly that many bytes."""


class Node(View):
    """A btree node whose values are 8 bytes: every internal node, and leaves of trees of integers.

    ``nr_entries`` is only changed by :meth:`set_nr_entries`, which keeps the block's header and ``end`` (the slot
    behind the last key) in step.
    """

    __slots__ = (
        "checked_edges",
        "children_are_leaves",
        "end",
        "is_leaf",
        "max_entries",
        "nr_entries",
        "value_size",
        "words",
    )

    words: memoryview[int]

    def __init__(self, buffer: Buffer, validator: Validator) -> None:
        super().__init__(buffer, validator)
        self.words = buffer.data.cast("Q")
        self.reload()

    def reload(self) -> None:
        _, flags, _, nr_entries, max_entries, value_size, _ = NODE_HEADER.unpack_from(self.data)
        self.is_leaf: bool = flags == LEAF_NODE
        self.nr_entries: int = nr_entries
        self.max_entries: int = max_entries
        self.value_size: int = value_size
        self.end: int = FIRST_SLOT + nr_entries
        self.checked_edges = 0
        """Bit *i*: the children on both sides of key *i* were seen to respect it (see btree_spine)."""
        self.children_are_leaves: bool | None = None
        """What the first child that was read turned out to be."""

    def set_nr_entries(self, nr_entries: int) -> None:
        """Change the number of entries; what lies behind the last one has no meaning."""
        self.nr_entries = nr_entries
        self.end = FIRST_SLOT + nr_entries
        self.words[_COUNTS_WORD] = self.max_entries << 32 | nr_entries
        self.checked_edges = 0

    # Searching

    def lower_bound(self, key: int) -> int:
        """Index of the largest key not above *key*, -1 if there is none."""
        return bisect_right(self.words, key, FIRST_SLOT, self.end) - FIRST_SLOT - 1

    def upper_bound(self, key: int) -> int:
        """Index of the smallest key not below *key*, ``nr_entries`` if there is none."""
        return bisect_left(self.words, key, FIRST_SLOT, self.end) - FIRST_SLOT

    def contains(self, key: int) -> bool:
        """Tell whether *key* is one of the keys."""
        slot = bisect_left(self.words, key, FIRST_SLOT, self.end)
        return slot < self.end and self.words[slot] == key

    # Entries

    def key(self, index: int) -> int:
        """Return key *index*."""
        return self.words[FIRST_SLOT + index]

    def set_key(self, index: int, key: int) -> None:
        """Replace key *index*."""
        self.words[FIRST_SLOT + index] = key

    def child(self, index: int) -> int:
        """Return value *index* of an internal node: a metadata block."""
        return self.words[FIRST_SLOT + self.max_entries + index]

    def set_child(self, index: int, block: int) -> None:
        """Replace value *index* of an internal node."""
        self.words[FIRST_SLOT + self.max_entries + index] = block

    def value(self, index: int) -> Value:
        """Return value *index*."""
        return self.words[FIRST_SLOT + self.max_entries + index]

    def set_value(self, index: int, value: Value) -> None:
        """Replace value *index*."""
        assert isinstance(value, int)
        self.words[FIRST_SLOT + self.max_entries + index] = value

    def keys(self) -> list[int]:
        """Return all keys, ascending."""
        return self.words[FIRST_SLOT : self.end].tolist()

    def values(self) -> list[Value]:
        """Return all values, in the order of the keys."""
        first = FIRST_SLOT + self.max_entries
        return cast("list[Value]", self.words[first : first + self.nr_entries].tolist())

    def children(self) -> list[int]:
        """Return all values of an internal node."""
        first = FIRST_SLOT + self.max_entries
        return self.words[first : first + self.nr_entries].tolist()

    # Changing

    def insert_at(self, index: int, key: int, value: Value) -> None:
        """Put an entry before *index*.  There must be room."""
        words = self.words
        slot = FIRST_SLOT + index
        end = self.end
        nr_max = self.max_entries
        if slot < end:
            words[slot + 1 : end + 1] = words[slot:end]
            words[slot + 1 + nr_max : end + 1 + nr_max] = words[slot + nr_max : end + nr_max]
        words[slot] = key
        words[slot + nr_max] = cast("int", value)
        self.set_nr_entries(self.nr_entries + 1)

    def delete_at(self, index: int) -> None:
        """Remove entry *index*."""
        words = self.words
        slot = FIRST_SLOT + index
        last = self.end - 1
        nr_max = self.max_entries
        if slot < last:
            words[slot:last] = words[slot + 1 : last + 1]
            words[slot + nr_max : last + nr_max] = words[slot + 1 + nr_max : last + 1 + nr_max]
        self.set_nr_entries(self.nr_entries - 1)

    def slide(self, source: int, target: int) -> None:
        """Move all entries from index *source* on so that they begin at index *target*.  The count stays as it is."""
        count = self.nr_entries - source
        words = self.words
        source += FIRST_SLOT
        target += FIRST_SLOT
        words[target : target + count] = words[source : source + count]
        source += self.max_entries
        target += self.max_entries
        words[target : target + count] = words[source : source + count]

    def copy_from(self, source: Node, source_index: int, count: int, index: int) -> None:
        """Copy *count* entries of *source* to *index*.  Both counts stay as they are."""
        a = FIRST_SLOT + source_index
        b = FIRST_SLOT + index
        if count == 1:
            # What evening out after a removal mostly comes to; slices would take three times as long.
            words = source.words
            self.words[b] = words[a]
            self.words[b + self.max_entries] = words[a + source.max_entries]
            return
        self.words[b : b + count] = source.words[a : a + count]
        a += source.max_entries
        b += self.max_entries
        self.words[b : b + count] = source.words[a : a + count]

    def become_parent_of(self, left: Node, right: Node) -> Node:
        """Turn into an internal node with these two children; return the object for what it is now."""
        nr_max = max_entries(WORD_VALUE_SIZE)
        NODE_HEADER.pack_into(self.data, 0, 0, INTERNAL_NODE, self.block, 2, nr_max, WORD_VALUE_SIZE, 0)
        words = self.data.cast("Q")
        for slot, child in ((FIRST_SLOT, left), (FIRST_SLOT + 1, right)):
            words[slot] = child.words[FIRST_SLOT]
            words[slot + nr_max] = child.block
        return view_again(self)


class WideNode(Node):
    """A leaf whose values are not 8 bytes; they are handled as bytes."""

    __slots__ = ()

    def value(self, index: int) -> Value:
        return bytes(self._value_bytes(index, 1))

    def set_value(self, index: int, value: Value) -> None:
        assert isinstance(value, bytes)
        self._value_bytes(index, 1)[:] = value

    def insert_at(self, index: int, key: int, value: Value) -> None:
        if index < self.nr_entries:
            self.slide(index, index + 1)
        self.words[FIRST_SLOT + index] = key
        self.set_value(index, value)
        self.set_nr_entries(self.nr_entries + 1)

    def delete_at(self, index: int) -> None:
        if index + 1 < self.nr_entries:
            self.slide(index + 1, index)
        self.set_nr_entries(self.nr_entries - 1)

    def values(self) -> list[Value]:
        return [self.value(index) for index in range(self.nr_entries)]

    def slide(self, source: int, target: int) -> None:
        count = self.nr_entries - source
        a = FIRST_SLOT + source
        b = FIRST_SLOT + target
        self.words[b : b + count] = self.words[a : a + count]
        self._value_bytes(target, count)[:] = self._value_bytes(source, count)

    def copy_from(self, source: Node, source_index: int, count: int, index: int) -> None:
        assert isinstance(source, WideNode)
        a = FIRST_SLOT + source_index
        b = FIRST_SLOT + index
        self.words[b : b + count] = source.words[a : a + count]
        self._value_bytes(index, count)[:] = source._value_bytes(source_index, count)

    def _value_bytes(self, index: int, count: int) -> memoryview:
        first = NODE_HEADER_SIZE + KEY_SIZE * self.max_entries + self.value_size * index
        return self.data[first : first + self.value_size * count]


def value_size_of(data: memoryview) -> int:
    """Return the value size in the header of a node."""
    return cast("int", NODE_HEADER.unpack_from(data)[5])


def view_node(buffer: Buffer, validator: Validator) -> Node:
    """Make the kind of node object that the block's value size asks for."""
    size = value_size_of(buffer.data)
    return (Node if size == WORD_VALUE_SIZE or size == 0 else WideNode)(buffer, validator)


def view_again(node: View) -> Node:
    """Return a new object for the bytes of *node*, which became another kind of node."""
    view = node.buffer.aux = view_node(node.buffer, node.validator)
    return view


def format_node(view: View, flags: int, value_size: int) -> Node:
    """Make a zeroed block an empty node for values of *value_size* bytes."""
    NODE_HEADER.pack_into(view.data, 0, 0, flags, 0, 0, max_entries(value_size), value_size, 0)
    return view_again(view)


class NodeValidator(Validator):
    """Checks what one node can show by itself.

    Beyond what the kernel looks at (fit, counts, flags): exactly one kind flag, an internal node's value size, and keys
    in strictly ascending order, because a search in a node that breaks these gives wrong answers.
    """

    def __init__(self) -> None:
        super().__init__("btree node", BTREE_NODE_SALT)
        self.view = view_node  # type: ignore[assignment]  # a factory in place of the class: two kinds of node

    def check_content(self, data: memoryview, block: int) -> None:
        _, flags, _, nr_entries, nr_max, value_size, _ = NODE_HEADER.unpack_from(data)
        if flags not in (INTERNAL_NODE, LEAF_NODE):
            raise CorruptMetadata(block, f"flags of btree node are {flags:#x}, neither internal nor leaf")
        if NODE_HEADER_SIZE + (KEY_SIZE + value_size) * nr_max > BLOCK_SIZE:
            raise CorruptMetadata(block, f"max_entries is too large: {nr_max} values of {value_size} bytes")
        if nr_entries > nr_max:
            raise CorruptMetadata(block, f"nr_entries > max_entries: {nr_entries} > {nr_max}")
        if flags == INTERNAL_NODE and value_size != WORD_VALUE_SIZE:
            raise CorruptMetadata(block, f"value_size mismatch: {value_size} in an internal node")
        keys = data[NODE_HEADER_SIZE : NODE_HEADER_SIZE + KEY_SIZE * nr_entries].cast("Q").tolist()
        if not all(map(lt, keys, islice(keys, 1, None))):
            raise CorruptMetadata(block, "keys out of order")


BTREE_NODE = NodeValidator()
