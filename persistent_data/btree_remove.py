"""Keeping nodes filled while entries are removed: neighbours are merged or share their entries, on the way down.

The rules are the kernel's; see docs/design.md, "Removal".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from persistent_data.btree_insert import give_to_right, take_from_right
from persistent_data.btree_node import FIRST_SLOT, view_again
from persistent_data.errors import CorruptMetadata

if TYPE_CHECKING:
    from persistent_data.btree_node import Node
    from persistent_data.btree_spine import ShadowSpine, ValueType


def rebalance_children(spine: ShadowSpine, node: Node, key: int, value_type: ValueType) -> tuple[Node, bool]:
    """Merge or even out the children of *node* that are next to *key*.

    *node* may be changed in place.  Returns the object for it, which is a new one when its only child took its place,
    and false when *key* is below every key.
    """
    if node.nr_entries == 1:
        return _replace_by_child(spine, node, value_type), True
    index = node.lower_bound(key)
    if index < 0:
        return node, False
    first = max(index - 1, 0)
    last = min(index + 1, node.nr_entries - 1)
    nr_before = node.nr_entries
    children = spine.shadow_children(node, first, last - first + 1, value_type)
    _check_geometry(*children)
    if len(children) == 2:
        changed = _even_out_two(spine, node, first, *children)
    else:
        changed = _even_out_three(spine, node, first, *children)
    if not children[0].is_leaf:
        if changed:
            spine.unsettle(node, index)
            # Their children have got new neighbours where entries came or went.
            for child in children:
                spine.settled.difference_update(child.children())
        if node.nr_entries == nr_before:
            # Doing the same again would change nothing: they share their entries as they should, the keys above are
            # right, and there is nothing left to shadow.
            spine.settled.add(node.child(index))
    return node, True


def even_out_leaves(
    spine: ShadowSpine, parent: Node, child: int, index: int, value_type: ValueType
) -> tuple[Node, int] | None:
    """Do to the leaves around child *child* of *parent* what :func:`rebalance_children` does, if none is to be merged.

    :param index: of an entry in that leaf
    :returns: where that entry is afterwards; None if :func:`rebalance_children` has to do it.  At most the leaves were
        shadowed then, which is what it would begin with
    """
    if not 0 < child < parent.nr_entries - 1:
        return None
    left, center, right = spine.shadow_children(parent, child - 1, 3, value_type)
    nr_max = left.max_entries
    if not nr_max == center.max_entries == right.max_entries:
        return None
    index += left.nr_entries
    if left.nr_entries + center.nr_entries + right.nr_entries <= 4 * (nr_max // 3):
        return None
    _share(left, center, right)
    slot = FIRST_SLOT + child
    parent.words[slot] = center.words[FIRST_SLOT]
    parent.words[slot + 1] = right.words[FIRST_SLOT]
    # Moving entries does not change their order.
    for leaf in (left, center):
        if index < leaf.nr_entries:
            return leaf, index
        index -= leaf.nr_entries
    return right, index


def _replace_by_child(spine: ShadowSpine, node: Node, value_type: ValueType) -> Node:
    child = spine.child(node, 0, value_type.size)
    if spine.is_shared(child.block):
        spine.inc_contents(child, value_type)
    node.data[:] = child.data
    spine.free(child)
    return view_again(node)


def _even_out_two(spine: ShadowSpine, parent: Node, index: int, left: Node, right: Node) -> bool:
    """Merge *right* into *left*, or share their entries; they are children *index* and *index* + 1.

    :returns: whether any entry has moved
    """
    least = left.max_entries // 3
    if left.nr_entries + right.nr_entries < 2 * (least + 1):
        left.copy_from(right, 0, right.nr_entries, left.nr_entries)
        left.set_nr_entries(left.nr_entries + right.nr_entries)
        parent.delete_at(index + 1)
        spine.free(right)
        return True
    excess = left.nr_entries - (left.nr_entries + right.nr_entries) // 2
    _move(left, right, excess)
    parent.set_key(index + 1, right.key(0))
    return excess != 0


def _even_out_three(spine: ShadowSpine, parent: Node, index: int, left: Node, center: Node, right: Node) -> bool:
    """Merge *center* into its neighbours, or share the entries of all three; *left* is child *index*.

    :returns: whether any entry has moved
    """
    least = left.max_entries // 3
    if left.nr_entries + center.nr_entries + right.nr_entries < 4 * least + 1:
        _merge_center(spine, parent, index, left, center, right)
        return True
    changed = _share(left, center, right)
    parent.set_key(index + 1, center.key(0))
    parent.set_key(index + 2, right.key(0))
    return changed


def _merge_center(spine: ShadowSpine, parent: Node, index: int, left: Node, center: Node, right: Node) -> None:
    """Give the entries of *center* to its neighbours, then look at those two."""
    to_left = min(left.max_entries - left.nr_entries, center.nr_entries)
    to_right = center.nr_entries - to_left
    left.copy_from(center, 0, to_left, left.nr_entries)
    left.set_nr_entries(left.nr_entries + to_left)
    if to_right:
        right.slide(0, to_right)
        right.copy_from(center, to_left, to_right, 0)
        right.set_nr_entries(right.nr_entries + to_right)
    parent.set_key(index + 2, right.key(0))
    parent.delete_at(index + 1)
    spine.free(center)
    _even_out_two(spine, parent, index, left, right)


def _share(left: Node, center: Node, right: Node) -> bool:
    """Share the entries of three neighbours equally; the end that has fewer is settled first.

    :returns: whether any entry has moved
    """
    total = left.nr_entries + center.nr_entries + right.nr_entries
    to_right = total // 3
    to_left = to_right + (1 if total % 3 else 0)
    if left.nr_entries == to_left and right.nr_entries == to_right:
        return False
    if left.nr_entries < right.nr_entries:
        short = to_left - left.nr_entries
        if short > center.nr_entries:
            short -= center.nr_entries
            _move(left, center, -center.nr_entries)
            _move(left, right, -short)
        else:
            _move(left, center, -short)
        _move(center, right, to_right - right.nr_entries)
    else:
        short = to_right - right.nr_entries
        if short > center.nr_entries:
            short -= center.nr_entries
            _move(center, right, center.nr_entries)
            _move(left, right, short)
        else:
            _move(center, right, short)
        _move(left, center, left.nr_entries - to_left)
    return True


def _move(left: Node, right: Node, count: int) -> None:
    """Move *count* entries to the right, or to the left if it is negative."""
    if count > 0:
        give_to_right(left, right, count)
    elif count < 0:
        take_from_right(left, right, -count)


def _check_geometry(first: Node, *others: Node) -> None:
    for node in others:
        if node.max_entries != first.max_entries:
            raise CorruptMetadata(
                node.block,
                f"max_entries {node.max_entries} differs from {first.max_entries} of its sibling, block {first.block}",
            )
