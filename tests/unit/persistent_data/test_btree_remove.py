"""Removal at a place that was found before, and the nodes on the way there that need no second look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from persistent_data.btree import BTree
from persistent_data.btree_spine import ValueType
from tests.support.trees import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from persistent_data.transaction_manager import TransactionManager

NR_BLOCKS = 400


@pytest.fixture
def store() -> Store:
    return Store.of_size(NR_BLOCKS)


@pytest.fixture
def tree(store: Store) -> BTree:
    return BTree(store.tm, [ValueType(8)])


def filled(tree: BTree, count: int) -> int:
    """Return the root of a tree with the keys below *count*."""
    root = tree.empty()
    for key in range(count):
        root = tree.insert(root, [key], key)
    return root


def remove(tree: BTree, root: int, key: int) -> int:
    """Remove *key* where it is found; return the new root."""
    place = tree.find_place(root, key)
    assert place is not None
    return tree.remove_at(root, key, place)


def test_no_place_is_found_for_a_key_that_is_not_there(tree: BTree) -> None:
    root = filled(tree, 1000)
    root = remove(tree, root, 500)
    assert tree.find_place(root, 500) is None
    assert tree.find_place(root, 1000) is None


def test_the_committed_tree_stays_as_it_was(store: Store, tree: BTree) -> None:
    root = filled(tree, 1000)
    store.commit([root])
    old = list(tree.items(root))
    new = remove(tree, remove(tree, root, 500), 501)
    store.commit([new])
    assert new != root
    assert len(list(tree.items(new))) == 998
    store.reopen()
    assert [key for key, _ in BTree(store.tm, [ValueType(8)]).items(new)] == [
        key for key, _ in old if key not in (500, 501)
    ]


def test_the_first_removal_after_a_commit_shadows_the_root(store: Store, tree: BTree) -> None:
    root = remove(tree, filled(tree, 1000), 500)
    store.commit([root])
    # The leaves are the root's own children here, so that nothing above them could be unsettled.
    assert remove(tree, root, 501) != root


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tm, block: tm.inc(block), id="inc"),
        pytest.param(lambda tm, block: tm.inc_range(block, block + 1), id="inc_range"),
        pytest.param(lambda tm, block: tm.dec(block), id="dec"),
        pytest.param(lambda tm, block: tm.dec_range(block, block + 1), id="dec_range"),
        pytest.param(lambda tm, block: tm.forget_exclusive(), id="forget_exclusive"),
    ],
)
def test_a_node_that_is_shared_or_given_up_is_not_settled(
    store: Store, tree: BTree, change: Callable[[TransactionManager, int], None]
) -> None:
    block = tree.empty()
    store.tm.settled.add(block)
    change(store.tm, block)
    assert not store.tm.settled


def test_no_node_is_settled_after_a_commit(store: Store, tree: BTree) -> None:
    root = tree.empty()
    store.tm.settled.add(root)
    store.commit([root])
    assert not store.tm.settled
