"""One mapping tree, node by node in the order of its keys, wherever the nodes come from.

Who walks decides with each subtree whether to look into it.  Memory: the children of one node on each level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from persistent_data.damage import UNBOUNDED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class Nodes(Protocol):
        """Where the nodes of a mapping tree come from."""

        @property
        def most_ahead(self) -> int:
            """How many nodes are worth reading ahead."""

        def entries(self, subtree: Subtree, high: int) -> tuple[Sequence[int], Sequence[int]]:
            """Return keys and values of the node at the top of *subtree*; the values are children or block times.

            The node has been verified: it is a leaf if and only if the subtree's height is 0, its keys ascend, none is
            below ``subtree.low``, and all are below *high*.

            :raises Corrupt: it is damaged
            """

        def read_ahead(self, blocks: set[int]) -> None:
            """Read nodes that are about to be asked for; no fault is reported."""


class Subtree(NamedTuple):
    """A part of a mapping tree that has not been looked into.

    :ivar low: its keys, thin blocks, are not below this
    :ivar block: metadata block of its topmost node
    :ivar height: levels below that node
    :ivar path: metadata blocks that lead to that node, itself not included
    """

    low: int
    block: int
    height: int
    path: tuple[int, ...]


class MappingWalk:
    """What is still to come of a mapping tree.

    :ivar nodes: where its nodes come from
    :ivar subtrees: disjoint, descending by keys: the last one is next
    """

    def __init__(self, nodes: Nodes, tree: Subtree) -> None:
        self.nodes = nodes
        self.subtrees = [tree]

    @property
    def next_key(self) -> int:
        """The smallest key that may be to come, 2**64 at the end."""
        return self.subtrees[-1].low if self.subtrees else UNBOUNDED

    def upcoming(self) -> set[int]:
        """Return the metadata blocks of the subtrees that come next, as many as are worth reading ahead."""
        return {subtree.block for subtree in self.subtrees[-self.nodes.most_ahead :]}

    def take(self) -> tuple[Subtree, int]:
        """Pass over the next subtree; return it, and a bound above its keys."""
        subtree = self.subtrees.pop()
        return subtree, self.next_key

    def give_children(self, parent: Subtree, keys: Sequence[int], blocks: Sequence[int]) -> None:
        """Let the children of *parent*, which was taken, come next."""
        path = (*parent.path, parent.block)
        height = parent.height - 1
        self.subtrees.extend(
            Subtree(key, block, height, path) for key, block in zip(reversed(keys), reversed(blocks), strict=True)
        )

    def open(self) -> tuple[Sequence[int], Sequence[int]] | None:
        """Look into the next subtree: return the keys and block times of a leaf; children of an internal node are next.

        :raises Corrupt: the node is damaged
        """
        subtree, high = self.take()
        keys, values = self.nodes.entries(subtree, high)
        if subtree.height == 0:
            return keys, values
        self.give_children(subtree, keys, values)
        return None
