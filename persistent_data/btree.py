"""Copy-on-write btrees with 64-bit keys, of any number of nested levels and any size of value.

A tree is named by the block of its root.  Whatever changes a tree returns its new root, and the old root stays a tree
as it was for as long as somebody has a reference to it; that is what a snapshot is.  In a tree of several levels a
value of each level but the last is the root of a tree of the next one, and a key is a sequence of integers, one a
level.

The cost of each call is that of going down once: O(log n) nodes read, or shadowed.  Source: docs/format.md, "Btree
node"; docs/design.md, "Btrees".
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from persistent_data.btree_insert import make_room, split_beneath
from persistent_data.btree_node import BTREE_NODE, FIRST_SLOT, WORD_VALUE_SIZE, Node, Value
from persistent_data.btree_remove import even_out_leaves, rebalance_children
from persistent_data.btree_spine import KEY_LIMIT, LEVELS, MAX_LEVELS, READ_AHEAD, ReadSpine, ShadowSpine, ValueType
from persistent_data.errors import CorruptMetadata, InvalidArgument, KeyNotFound
from persistent_data.layout import LEAF_NODE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from persistent_data.transaction_manager import NonBlockingTransactionManager, TransactionManager


Place = tuple[Node, int, Node | None, int]
"""A leaf and the index of an entry in it, its parent and the index of the leaf in that.

No parent is named where one of the nodes above has to be looked at before an entry may be removed.
"""


class Finger:
    """The leaf that an insertion ended in, and the keys that belong into it.

    As long as nothing but insertions through the same finger happens to the tree and the transaction goes on, a key in
    ``[low, high)`` can be put into the leaf without going down again: every node above it was shadowed and has room.
    """

    __slots__ = ("high", "leaf", "low")

    def __init__(self) -> None:
        self.leaf: Node | None = None
        self.low = 0
        self.high = 0


class BTree:
    """Operations on the trees of one kind.

    :param value_types: what the values of each level are, outermost first; all but the last are made by
        :func:`block_pointers`
    """

    def __init__(self, tm: TransactionManager, value_types: Sequence[ValueType]) -> None:
        self._tm = tm
        self._value_types = tuple(value_types)
        self._last_type = self._value_types[-1]
        self.spine = ShadowSpine(tm)

    # Whole trees

    def empty(self) -> int:
        """Make a tree without entries and return its root."""
        return self._tm.new_node(BTREE_NODE, LEAF_NODE, self._value_types[0].size).block

    def delete(self, root: int) -> None:
        """Give up a reference to a tree; when it was the last one, all that the tree refers to is given up as well."""
        self._delete(root, 0, 1)

    def _delete(self, block: int, level: int, depth: int) -> None:
        if depth > MAX_LEVELS * len(self._value_types):
            raise CorruptMetadata(block, "tree is too deep: a node must be below itself")
        tm = self._tm
        if tm.ref(block) == 1:
            value_type = self._value_types[level]
            node = self.spine.root(block, value_type.size)
            if not node.is_leaf:
                children = node.children()
                for index, child in enumerate(children):
                    if index % (READ_AHEAD // 2) == 0:
                        self._read_ahead_to_delete(children, index)
                    self._delete(child, level, depth + 1)
            elif level + 1 < len(self._value_types):
                for root in node.children():
                    self._delete(root, level + 1, depth + 1)
            elif value_type.dec is not None and node.nr_entries:
                value_type.dec(node.values())
            # Nothing read so far is needed any more.
            tm.bm.begin_operation()
        tm.dec(block)

    def _read_ahead_to_delete(self, children: list[int], index: int) -> None:
        """Start to read those of the next children that nobody else refers to: the others will not be read at all."""
        half = READ_AHEAD // 2
        ref = self._tm.ref
        ahead = children[index + half if index else 0 : index + READ_AHEAD]
        self._tm.bm.prefetch_all(child for child in ahead if ref(child) == 1)

    # Reading

    def lookup(self, root: int, keys: Sequence[int]) -> Value:
        """Return the value of *keys*.

        :raises KeyNotFound: there is none
        """
        return _lookup(self.spine, self._value_types, root, keys)

    def find(self, root: int, key: int) -> tuple[Node, int] | None:
        """Return the leaf and the slot of *key* in a tree of the last level, None if it is not there."""
        return self.spine.find(root, key, self._last_type.size)

    def count_if_leaf(self, root: int) -> int | None:
        """Return the number of entries of a tree of the last level if its root is its only node, else None."""
        node = self.spine.root(root, self._last_type.size)
        return node.nr_entries if node.is_leaf else None

    def height(self, root: int) -> int:
        """Return how many nodes are above a leaf in a tree of the last level."""
        node = self.spine.root(root, self._last_type.size)
        for height in range(MAX_LEVELS):
            if node.is_leaf:
                return height
            node = self.spine.child(node, 0, self._last_type.size)
        raise CorruptMetadata(root, f"tree has more than {MAX_LEVELS} levels: a node must be below itself")

    def node_entries(self, block: int, low: int, high: int, *, is_leaf: bool) -> tuple[list[int], list[int]]:
        """Return keys and values of one node of a tree of integers.

        :param low: no key may be below this; nor any at or above *high*
        :param is_leaf: what the node has to be, at its depth
        """
        node = self.spine.root(block, self._last_type.size)
        if node.is_leaf != is_leaf:
            raise CorruptMetadata(block, "leaves at different depths")
        if node.nr_entries and (node.key(0) < low or node.key(node.nr_entries - 1) >= high):
            raise CorruptMetadata(block, f"keys are not within [{low}..{high}), as the node above says")
        return node.keys(), node.children()

    def lookup_non_blocking(self, tm: NonBlockingTransactionManager, root: int, keys: Sequence[int]) -> Value:
        """As :meth:`lookup`, reading through the non-blocking clone *tm*.

        :raises WouldBlock: a node is not cached
        """
        return _lookup(ReadSpine(tm), self._value_types, root, keys)

    def lookup_next(self, root: int, keys: Sequence[int]) -> tuple[int, Value]:
        """Return the entry with the smallest last-level key not below ``keys[-1]``; the other keys match exactly.

        :raises KeyNotFound: there is none
        """
        block = self._subtree(root, keys)
        found = self.leaf_from(block, keys[-1])
        if found is None:
            raise KeyNotFound(f"no key from {keys[-1]} on")
        leaf, index, _ = found
        return leaf.key(index), leaf.value(index)

    def leaf_from(self, root: int, key: int, end: int = 0) -> tuple[Node, int, int] | None:
        """Return the leaf with the smallest key not below *key*, that key's index, and a bound above the leaf's keys.

        For trees of one level, or the root of one on the last level.  None when there is no such key.

        :param end: the caller walks up to this key: nodes on the way there are read ahead
        """
        spine = self.spine
        size = self._last_type.size
        node = spine.root(root, size)
        low, high = 0, KEY_LIMIT
        turns: tuple[Node, int, int] | None = None
        for _ in range(MAX_LEVELS):
            if node.nr_entries and (node.key(0) < low or node.key(node.nr_entries - 1) >= high):
                raise CorruptMetadata(node.block, f"keys are not within [{low}..{high}), as the node above says")
            if not node.is_leaf:
                index = max(node.lower_bound(key), 0)
            else:
                index = node.upper_bound(key)
                if index < node.nr_entries:
                    return node, index, high
                if turns is None:
                    return None
                # The key would be behind the last one here: the next leaf's first key is the one.
                node, index, high = turns
                key, turns = 0, None
            low = node.key(index)
            if index + 1 < node.nr_entries:
                turns = (node, index + 1, high)
                high = node.key(index + 1)
                if high < end:
                    spine.read_ahead(node, index, end)
            node = spine.checked_child(node, index, size)
        raise CorruptMetadata(root, f"tree has more than {MAX_LEVELS} levels: a node must be below itself")

    def find_lowest_key(self, root: int) -> list[int]:
        """Return the lowest key on each level, as far as there are entries: nothing at all for an empty tree."""
        return self._find_extreme(root, lowest=True)

    def find_highest_key(self, root: int) -> list[int]:
        """Return the highest key on each level, as far as there are entries: nothing at all for an empty tree."""
        return self._find_extreme(root, lowest=False)

    def _find_extreme(self, block: int, *, lowest: bool) -> list[int]:
        found: list[int] = []
        for value_type in self._value_types:
            node = self.spine.root(block, value_type.size)
            for _ in range(MAX_LEVELS):
                if node.is_leaf:
                    break
                node = self.spine.checked_child(node, 0 if lowest else node.nr_entries - 1, value_type.size)
            else:
                raise CorruptMetadata(block, f"tree has more than {MAX_LEVELS} levels: a node must be below itself")
            if not node.nr_entries:
                break
            index = 0 if lowest else node.nr_entries - 1
            found.append(node.key(index))
            if len(found) < len(self._value_types):
                block = node.child(index)
        return found

    def walk(self, root: int, visit: Callable[[int, Value], object]) -> object:
        """Call *visit* with each key and value of a tree of one level, ascending, until it returns something true.

        :returns: what *visit* returned, None if it was called for everything
        """
        for key, value in self.items(root):
            result = visit(key, value)
            if result:
                return result
        return None

    def items(self, root: int, key: int = 0) -> Iterator[tuple[int, Value]]:
        """Iterate over the entries of a tree of one level from *key* on, ascending.

        One leaf is in memory at a time, and nothing else stays borrowed while it goes on.  Other operations may go on
        meanwhile if they leave this tree (this *root*) alone.
        """
        while key < KEY_LIMIT:
            self._tm.bm.begin_operation()
            found = self.leaf_from(root, key, KEY_LIMIT)
            if found is None:
                return
            leaf, index, bound = found
            entries = list(zip(leaf.keys()[index:], leaf.values()[index:], strict=True))
            yield from entries
            key = bound

    def cursor(self, root: int) -> Cursor:
        """Return a cursor on the first entry of a tree of one level.

        :raises KeyNotFound: the tree is empty
        """
        return Cursor(self, root)

    def _subtree(self, root: int, keys: Sequence[int]) -> int:
        """Return the root of the last-level tree that all keys but the last lead to."""
        for value_type, key in zip(self._value_types[:-1], keys, strict=False):
            found = self.spine.find(root, key, value_type.size)
            if found is None:
                raise KeyNotFound(f"no key {key}")
            leaf, slot = found
            root = leaf.child(slot - FIRST_SLOT)
        return root

    # Inserting

    def insert(self, root: int, keys: Sequence[int], value: Value) -> int:
        """Give *keys* a value, a new one or another one; return the new root.

        The tree takes over the caller's reference to what *value* refers to, and gives up its own to what the replaced
        value referred to, unless that is the same.  An error leaves a transaction that has to be abandoned.
        """
        return self.insert_notify(root, keys, value)[0]

    def insert_notify(self, root: int, keys: Sequence[int], value: Value) -> tuple[int, bool]:
        """As :meth:`insert`; also returns whether the key was not there before."""
        owner: Node | None = None
        owner_index = 0
        block = root
        for level, key in enumerate(keys[:-1]):
            leaf, index, top = self._descend_to_insert(block, key, self._value_types[level], owner, owner_index, None)
            if owner is None:
                root = top
            if index < 0 or leaf.key(index) != key:
                index += 1
                child = self._tm.new_node(BTREE_NODE, LEAF_NODE, self._value_types[level + 1].size)
                leaf.insert_at(index, key, child.block)
            owner, owner_index, block = leaf, index, leaf.child(index)
        leaf, index, top = self._descend_to_insert(block, keys[-1], self._last_type, owner, owner_index, None)
        if owner is None:
            root = top
        return root, self._put(leaf, index, keys[-1], value)

    def insert_in_subtree(self, root: int, key: int, value: Value, finger: Finger) -> tuple[int, bool]:
        """As :meth:`insert_notify` on a tree of the last level; *finger* learns where the entry went."""
        leaf, index, root = self._descend_to_insert(root, key, self._last_type, None, 0, finger)
        return root, self._put(leaf, index, key, value)

    def insert_at_finger(self, finger: Finger, key: int, value: int) -> bool | None:
        """Insert into the finger's leaf, for trees of integers, if the key belongs there and nothing else is needed.

        :returns: whether the key was not there before; None if the caller has to go down from the root
        """
        leaf = finger.leaf
        if leaf is None or not finger.low <= key < finger.high:
            return None
        buffer = leaf.buffer
        if buffer.aux is not leaf:
            return None
        index = bisect_right(leaf.words, key, FIRST_SLOT, leaf.end) - FIRST_SLOT - 1
        if leaf.nr_entries == leaf.max_entries and (index < 0 or leaf.words[FIRST_SLOT + index] != key):
            return None
        buffer.referenced = self._tm.bm.client.epoch
        if not buffer.dirty:
            self._tm.bm.client.mark_dirty(buffer)
        return self._put(leaf, index, key, value)

    def _descend_to_insert(
        self, block: int, key: int, value_type: ValueType, owner: Node | None, owner_index: int, finger: Finger | None
    ) -> tuple[Node, int, int]:
        """Go down to where *key* belongs, shadowing, with room made on the way.

        :param owner: the leaf of the level above whose value *owner_index* is the tree's root
        :returns: the leaf, the index of the largest key not above *key* (-1 if there is none), and the tree's new root
        """
        spine = self.spine
        exclusive = self._tm.exclusive
        client = self._tm.bm.client
        peek = client.peek
        epoch = client.epoch
        parent: Node | None = None
        slot = 0
        top = block
        low, high = 0, KEY_LIMIT
        unchanged = True
        for _ in LEVELS:
            buffer = peek(block) if block in exclusive else None
            if buffer is not None and buffer.aux.__class__ is Node:
                node: Node = buffer.aux
                buffer.referenced = epoch
                if not buffer.dirty:
                    client.mark_dirty(buffer)
            elif parent is not None:
                node = spine.shadow_child(parent, slot - FIRST_SLOT, value_type)
            else:
                node = spine.shadow_root(block, value_type)
                top = node.block
                if owner is not None:
                    owner.set_child(owner_index, top)
            if node.nr_entries == node.max_entries and not (node.is_leaf and node.contains(key)):
                unchanged = False
                spine.settled.clear()
                if parent is None:
                    node = split_beneath(spine, node)
                else:
                    node = make_room(spine, parent, slot - FIRST_SLOT, node, key, value_type)
            words = node.words
            slot = bisect_right(words, key, FIRST_SLOT, node.end) - 1
            if node.is_leaf:
                if node.value_size != value_type.size:
                    raise CorruptMetadata(
                        node.block, f"value_size mismatch: {node.value_size} instead of {value_type.size}"
                    )
                if finger is not None:
                    finger.leaf = node if unchanged else None
                    finger.low, finger.high = low, high
                return node, slot - FIRST_SLOT, top
            if slot < FIRST_SLOT:
                slot = FIRST_SLOT
                words[slot] = key
            low = words[slot]
            if slot + 1 < node.end:
                high = words[slot + 1]
            parent = node
            block = words[slot + node.max_entries]
        raise CorruptMetadata(top, f"tree has more than {MAX_LEVELS} levels: a node must be below itself")

    def _put(self, leaf: Node, index: int, key: int, value: Value) -> bool:
        """Store an entry in a leaf that has room; *index* is that of the largest key not above *key*."""
        if index < 0 or leaf.words[FIRST_SLOT + index] != key:
            leaf.insert_at(index + 1, key, value)
            return True
        value_type = self._last_type
        old = leaf.value(index)
        leaf.set_value(index, value)
        # Last, because giving up the old value may take a whole tree, and with it an operation of its own.
        if value_type.dec is not None and not (value_type.equal or _same)(old, value):
            value_type.dec([old])
        return False

    def shadow_leaf_of(self, root: int, key: int) -> tuple[int, Node]:
        """Shadow the way to the leaf that has *key* in a tree of one level; return the new root and the leaf.

        For changing a value in place: nothing is split or merged.

        :raises InvalidArgument: the key is not there
        """
        spine = self.spine
        node = spine.shadow_root(root, self._last_type)
        top = node.block
        for _ in range(MAX_LEVELS):
            index = node.lower_bound(key)
            if index < 0 or (node.is_leaf and node.key(index) != key):
                raise InvalidArgument(f"no key {key} below metadata block {top}")
            if node.is_leaf:
                return top, node
            node = spine.shadow_child(node, index, self._last_type)
        raise CorruptMetadata(top, f"tree has more than {MAX_LEVELS} levels: a node must be below itself")

    # Removing

    def remove(self, root: int, keys: Sequence[int]) -> int:
        """Remove *keys* and give up what its value referred to; return the new root.

        Trees of lower levels that become empty stay.  An error leaves a transaction that has to be abandoned.

        :raises KeyNotFound: it is not there; nothing has changed
        """
        self.lookup(root, keys)
        leaf, index, root = self._descend_to_remove(root, keys, exact=True)
        self._drop(leaf, index)
        return root

    def find_place(self, root: int, key: int) -> Place | None:
        """Find *key* in a tree of the last level, for :meth:`remove_at`; None if it is not there.  Changes nothing."""
        spine = self.spine
        peek = self._tm.bm.peek
        epoch = self._tm.bm.client.epoch
        parent: Node | None = None
        at = 0
        block = root
        if root in self._tm.exclusive:
            for _ in LEVELS:
                buffer = peek(block)
                if buffer is None or buffer.aux.__class__ is not Node:
                    break
                buffer.referenced = epoch
                node: Node = buffer.aux
                words = node.words
                slot = bisect_right(words, key, FIRST_SLOT, node.end) - 1
                if slot < FIRST_SLOT:
                    break
                if node.is_leaf:
                    if words[slot] != key or node.value_size != self._last_type.size:
                        break
                    return node, slot - FIRST_SLOT, parent, at
                if parent is not None and block not in spine.settled:
                    break
                parent, at = node, slot - FIRST_SLOT
                block = words[slot + node.max_entries]
        found = self.find(root, key)
        return None if found is None else (found[0], found[1] - FIRST_SLOT, None, 0)

    def remove_at(self, root: int, key: int, place: Place) -> int:
        """As :meth:`remove` on a tree of the last level; *place* is where :meth:`find_place` has just found the key."""
        leaf, index, parent, at = place
        moved = None
        if parent is not None:
            # Above the leaves next to the key, going down from the root would change nothing.
            if not parent.buffer.dirty:
                self._tm.bm.client.mark_dirty(parent.buffer)
            moved = even_out_leaves(self.spine, parent, at, index, self._last_type)
        if moved is not None:
            leaf, index = moved
        else:
            leaf, index, root = self._descend_one_level(root, key, self._last_type, None, 0, exact=True)
        self._drop(leaf, index)
        return root

    def remove_leaves(self, root: int, keys: Sequence[int], end: int) -> tuple[int, int, int]:
        """Remove entries with last-level keys in ``[keys[-1], end)``, from the first on.

        :returns: the new root, the number of entries removed, and the key it stopped at.  That may be a gap: go on with
            :meth:`lookup_next`
        """
        key = keys[-1]
        count = 0
        # As the kernel does it, the end is found by going down once more, which may even out nodes once more.
        while key < KEY_LIMIT:
            self._tm.bm.begin_operation()
            try:
                leaf, index, root = self._descend_to_remove(root, [*keys[:-1], key], exact=False)
            except _Stopped as stopped:
                return stopped.root, count, key
            index = max(index, 0)
            if index >= leaf.nr_entries or not key <= leaf.key(index) < end:
                break
            key = leaf.key(index) + 1
            self._drop(leaf, index)
            count += 1
        return root, count, key

    def _drop(self, leaf: Node, index: int) -> None:
        value = leaf.value(index)
        leaf.delete_at(index)
        dec = self._last_type.dec
        if dec is not None:
            dec([value])

    def _descend_to_remove(self, root: int, keys: Sequence[int], *, exact: bool) -> tuple[Node, int, int]:
        owner: Node | None = None
        owner_index = 0
        block = root
        try:
            for value_type, key in zip(self._value_types[:-1], keys, strict=False):
                leaf, index, top = self._descend_one_level(block, key, value_type, owner, owner_index, exact=True)
                if owner is None:
                    root = top
                owner, owner_index, block = leaf, index, leaf.child(index)
            leaf, index, top = self._descend_one_level(
                block, keys[-1], self._last_type, owner, owner_index, exact=exact
            )
        except _Stopped as stopped:
            if owner is not None:
                stopped.root = root
            raise
        return leaf, index, root if owner is not None else top

    def _descend_one_level(
        self, block: int, key: int, value_type: ValueType, owner: Node | None, owner_index: int, *, exact: bool
    ) -> tuple[Node, int, int]:
        """Go down to the leaf for *key*, shadowing, with nodes kept filled on the way.

        :param owner: the leaf of the level above whose value *owner_index* is the tree's root
        :returns: the leaf, the index of *key* (if not *exact*, of the largest key not above it), and the tree's new
            root
        """
        spine = self.spine
        node = spine.shadow_root(block, value_type)
        top = node.block
        if owner is not None:
            owner.set_child(owner_index, top)
        parent: Node | None = None
        at = 0
        for _ in LEVELS:
            above = True
            if not node.is_leaf:
                nr_before = node.nr_entries
                node, above = rebalance_children(spine, node, key, value_type)
                if parent is not None and node.nr_entries != nr_before:
                    spine.unsettle(parent, at)
            index = node.lower_bound(key)
            if node.is_leaf:
                if exact and (index < 0 or node.key(index) != key):
                    raise _Stopped(top, key)
                return node, index, top
            if index < 0 or not above:
                raise _Stopped(top, key)
            parent, at = node, index
            node = spine.shadow_child(node, index, value_type)
        raise CorruptMetadata(top, f"tree has more than {MAX_LEVELS} levels: a node must be below itself")


class _Stopped(KeyNotFound):
    """A removal found no key.  The nodes that it shadowed on the way are below ``root`` now."""

    def __init__(self, root: int, key: int) -> None:
        super().__init__(f"no key {key}")
        self.root = root


class Cursor:
    """A position in a tree of one level.  The tree must not change while it is used."""

    def __init__(self, tree: BTree, root: int) -> None:
        self._tree = tree
        self._root = root
        self._entries: list[tuple[int, Value]] = []
        self._at = 0
        self._bound = 0
        self._load()

    def _load(self) -> None:
        found = self._tree.leaf_from(self._root, self._bound, KEY_LIMIT) if self._bound < KEY_LIMIT else None
        self._at = 0
        self._entries = []
        if found is None:
            raise KeyNotFound("the cursor is at the end of the tree")
        leaf, index, self._bound = found
        self._entries = list(zip(leaf.keys()[index:], leaf.values()[index:], strict=True))

    @property
    def key_value(self) -> tuple[int, Value]:
        """The entry that the cursor is on.

        :raises KeyNotFound: it has gone past the last one
        """
        if self._at >= len(self._entries):
            raise KeyNotFound("the cursor is at the end of the tree")
        return self._entries[self._at]

    def next(self) -> None:
        """Go to the next entry.

        :raises KeyNotFound: there is none
        """
        self.skip(1)

    def skip(self, count: int) -> None:
        """Go *count* entries further.

        :raises KeyNotFound: there are not that many
        """
        while count >= len(self._entries) - self._at:
            count -= len(self._entries) - self._at
            self._load()
        self._at += count


def block_pointers(tm: TransactionManager) -> ValueType:
    """Return the type of values that are metadata blocks, counted in the metadata space map."""

    def inc(blocks: list[Value]) -> None:
        tm.inc_blocks(b for b in blocks if isinstance(b, int))

    def dec(blocks: list[Value]) -> None:
        tm.dec_blocks(b for b in blocks if isinstance(b, int))

    return ValueType(WORD_VALUE_SIZE, inc, dec)


def _lookup(spine: ReadSpine, value_types: Sequence[ValueType], root: int, keys: Sequence[int]) -> Value:
    value: Value = root
    for value_type, key in zip(value_types, keys, strict=True):
        assert isinstance(value, int)
        found = spine.find(value, key, value_type.size)
        if found is None:
            raise KeyNotFound(f"no key {key}")
        leaf, slot = found
        value = leaf.value(slot - FIRST_SLOT)
    return value


def _same(a: Value, b: Value) -> bool:
    return a == b
