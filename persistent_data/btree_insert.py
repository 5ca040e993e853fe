"""Making room for an entry: splitting a full node, or sharing its entries with a sibling.

Full nodes are dealt with on the way down, internal ones too, so that a parent always has room for one more child.
Where entries go decides which blocks are allocated later, so the rules are the kernel's; see docs/design.md,
"Insertion".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persistent_data.btree_node import Node
    from persistent_data.btree_spine import ShadowSpine, ValueType

_ROOM_WORTH_SHARING = 8
"""Entries are shared with a sibling that has at least this many free slots; else nodes are split."""


def split_beneath(spine: ShadowSpine, node: Node) -> Node:
    """Split the top node of a tree into two children; it keeps its block number and becomes their parent."""
    left = spine.new_node(like=node)
    right = spine.new_node(like=node)
    nr_left = node.nr_entries // 2
    nr_right = node.nr_entries - nr_left
    left.copy_from(node, 0, nr_left, 0)
    right.copy_from(node, nr_left, nr_right, 0)
    left.set_nr_entries(nr_left)
    right.set_nr_entries(nr_right)
    return node.become_parent_of(left, right)


def make_room(spine: ShadowSpine, parent: Node, index: int, node: Node, key: int, value_type: ValueType) -> Node:
    """Make room in *node*, the full child *index* of *parent*; return the node in whose range *key* is now.

    Both may be changed in place.
    """
    last = parent.nr_entries - 1
    sibling_is_shared = False
    if index > 0:
        if spine.is_shared(parent.child(index - 1)):
            sibling_is_shared = True
        elif _has_room(spine.child(parent, index - 1, value_type.size)):
            left = spine.shadow_child(parent, index - 1, value_type)
            balance(left, node)
            parent.set_key(index, node.key(0))
            return left if key < node.key(0) else node
    if index < last:
        if spine.is_shared(parent.child(index + 1)):
            sibling_is_shared = True
        elif _has_room(spine.child(parent, index + 1, value_type.size)):
            right = spine.shadow_child(parent, index + 1, value_type)
            balance(node, right)
            parent.set_key(index + 1, right.key(0))
            return node if key < right.key(0) else right
    if sibling_is_shared or last <= 1 or index in (0, last):
        return _split_one_into_two(spine, parent, index, node, key)
    return _split_two_into_three(spine, parent, index, node, key, value_type)


def _has_room(node: Node) -> bool:
    return node.max_entries - node.nr_entries >= _ROOM_WORTH_SHARING


def _split_one_into_two(spine: ShadowSpine, parent: Node, index: int, node: Node, key: int) -> Node:
    right = spine.new_node(like=node)
    balance(node, right)
    parent.insert_at(index + 1, right.key(0), right.block)
    return node if key < right.key(0) else right


def _split_two_into_three(
    spine: ShadowSpine, parent: Node, index: int, node: Node, key: int, value_type: ValueType
) -> Node:
    left = spine.shadow_child(parent, index - 1, value_type)
    middle = spine.new_node(like=node)
    distribute(left, middle, node)
    parent.set_key(index, node.key(0))
    parent.insert_at(index, middle.key(0), middle.block)
    if key >= node.key(0):
        return node
    return left if key < middle.key(0) else middle


def balance(left: Node, right: Node) -> None:
    """Share the entries of two neighbours equally, the odd one to the right; *right* may be empty."""
    target = (left.nr_entries + right.nr_entries) // 2
    if left.nr_entries < target:
        take_from_right(left, right, target - left.nr_entries)
    elif left.nr_entries > target:
        give_to_right(left, right, left.nr_entries - target)


def take_from_right(left: Node, right: Node, count: int) -> None:
    """Move the first *count* entries of *right* to the end of *left*."""
    left.copy_from(right, 0, count, left.nr_entries)
    right.slide(count, 0)
    left.set_nr_entries(left.nr_entries + count)
    right.set_nr_entries(right.nr_entries - count)


def give_to_right(left: Node, right: Node, count: int) -> None:
    """Move the last *count* entries of *left* to the front of *right*."""
    if right.nr_entries:
        right.slide(0, count)
    right.copy_from(left, left.nr_entries - count, count, 0)
    left.set_nr_entries(left.nr_entries - count)
    right.set_nr_entries(right.nr_entries + count)


def distribute(left: Node, middle: Node, right: Node) -> None:
    """Spread the entries of *left* and *right* over three nodes; *middle* is new."""
    nr_left, nr_right = left.nr_entries, right.nr_entries
    total = nr_left + nr_right
    to_left = total // 3
    to_middle = (total - to_left) // 2
    to_right = total - to_left - to_middle
    if nr_left < to_left:
        short = to_left - nr_left
        left.copy_from(right, 0, short, nr_left)
        middle.copy_from(right, short, to_middle, 0)
        right.slide(nr_right - to_right, 0)
    elif nr_left < to_left + to_middle:
        excess = nr_left - to_left
        middle.copy_from(left, to_left, excess, 0)
        middle.copy_from(right, 0, to_middle - excess, excess)
        right.slide(nr_right - to_right, 0)
    else:
        short = to_right - nr_right
        right.slide(0, short)
        right.copy_from(left, nr_left - short, short, 0)
        # The entries just copied are copied here too: they end up behind the last one, where the kernel leaves them.
        middle.copy_from(left, to_left, nr_left - to_left, 0)
    left.set_nr_entries(to_left)
    middle.set_nr_entries(to_middle)
    right.set_nr_entries(to_right)
