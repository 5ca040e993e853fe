"""Two mapping trees side by side: where they lead to the same data blocks, and where they do not.

Devices that were snapshotted from each other share whole subtrees.  A node that both have is not compared with itself,
and if nobody wants to know what is the same, it is not even read: the cost is then that of the differences.

Source: docs/design.md, "Comparing devices".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from thinpool.runs import data_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from thinpool.mapping_walk import MappingWalk, Subtree
    from thinpool.runs import DataRun

    EntriesOfBoth = Callable[[Subtree, int, Subtree, int], tuple[Sequence[int], Sequence[int]]]
    """Returns the entries of a node that is at the top of a subtree on the left, with a bound above its keys, and of
    one on the right, with its bound, verified as :class:`thinpool.mapping_walk.Nodes` has it, in both places."""

SAME = "same"
DIFFERENT = "different"
LEFT_ONLY = "left_only"
RIGHT_ONLY = "right_only"
KINDS = ("", LEFT_ONLY, RIGHT_ONLY, DIFFERENT, SAME)
"""For those who number them.  Of the first four, the lower bits say which sides map something."""


class Difference(NamedTuple):
    """*length* thin blocks from *thin_begin* on that two devices do not map to the same data blocks.

    ``kind`` is ``left_only``, ``right_only`` or ``different``; a data block that the kind does not speak of is None.
    Where it was asked for, ``kind`` may also be ``same``, and both data blocks are equal.
    """

    kind: str
    thin_begin: int
    length: int
    left_data_begin: int | None
    right_data_begin: int | None

    def goes_on_with(self, following: Difference) -> bool:
        """Tell whether both are one stretch."""
        return (
            self.kind == following.kind
            and self.thin_begin + self.length == following.thin_begin
            and (self.left_data_begin is None or self.left_data_begin + self.length == following.left_data_begin)
            and (self.right_data_begin is None or self.right_data_begin + self.length == following.right_data_begin)
        )


class _Side:
    """What is still to be compared of one tree: runs at hand, then what the walk brings."""

    def __init__(self, walk: MappingWalk) -> None:
        self.walk = walk
        self.runs: list[DataRun] = []
        """Of one leaf; the last one is next."""

    @property
    def next_key(self) -> int:
        """The smallest thin block that may be left, 2**64 at the end."""
        return self.runs[-1].thin_begin if self.runs else self.walk.next_key

    def open(self) -> None:
        """Look into the next subtree; the runs at hand have been used up."""
        leaf = self.walk.open()
        if leaf is not None:
            self.runs = data_runs(*leaf)
            self.runs.reverse()

    def take(self, length: int) -> int:
        """Remove the next *length* thin blocks, no more than the next run has; return their first data block."""
        run = self.runs.pop()
        if length < run.length:
            self.runs.append(run.from_offset(length))
        return run.data_begin


class _ReadAhead:
    """Lets nodes be read before their turn: those of one side only, or of both, as the comparison will need them."""

    def __init__(self, left: MappingWalk, right: MappingWalk, both: bool) -> None:
        self._left = left
        self._right = right
        self._both = both
        self._asked: set[int] = set()
        self._since = 0

    def before(self, *blocks: int) -> None:
        """Take note that nodes are about to be opened.

        Asks again when half of what was asked for has been used, so that something is always in flight.
        """
        nodes = self._left.nodes
        self._since += 1
        if self._since >= nodes.most_ahead // 2 or not self._asked.issuperset(blocks):
            left, right = self._left.upcoming(), self._right.upcoming()
            self._asked = left | right if self._both else left ^ right
            self._since = 0
            nodes.read_ahead(self._asked)


def differences(
    left: MappingWalk, right: MappingWalk, *, entries_of_both: EntriesOfBoth | None = None
) -> Iterator[Difference]:
    """Iterate over the thin blocks that two mapping trees of one pool treat differently, ascending, in longest runs.

    Only data blocks are compared, not times.

    :param entries_of_both: reads a node that both trees have; with it, what both map to the same data blocks is yielded
        too, without it such nodes are passed over
    :raises Corrupt: damaged metadata; everything before it has been returned
    """
    pending: Difference | None = None
    for found in _compare(_Side(left), _Side(right), entries_of_both):
        if pending is None:
            pending = found
        elif pending.goes_on_with(found):
            pending = pending._replace(length=pending.length + found.length)
        else:
            yield pending
            pending = found
    if pending is not None:
        yield pending


def _compare(left: _Side, right: _Side, entries_of_both: EntriesOfBoth | None) -> Iterator[Difference]:
    same = entries_of_both is not None
    ahead = _ReadAhead(left.walk, right.walk, both=same)
    while True:
        yield from _compare_runs(left, right, same)
        ours, others = left.walk.subtrees, right.walk.subtrees
        if left.runs or right.runs or not ours or not others:
            behind = left if not left.runs and ours else right
            if not behind.walk.subtrees:
                return
            ahead.before(behind.walk.subtrees[-1].block)
            behind.open()
        elif ours[-1].block != others[-1].block or ours[-1].height != others[-1].height:
            ahead.before(ours[-1].block, others[-1].block)
            _open_different(left, right)
        elif entries_of_both is not None:
            ahead.before(ours[-1].block)
            yield from _open_common(left.walk, right.walk, entries_of_both)
        else:
            left.walk.take()
            right.walk.take()


def _compare_runs(left: _Side, right: _Side, same: bool) -> Iterator[Difference]:
    """Compare what is at hand, as far as it is known what the other side has there."""
    while left.runs or right.runs:
        begin, other_begin = left.next_key, right.next_key
        if begin < other_begin:
            if not left.runs:
                return
            length = min(left.runs[-1].length, other_begin - begin)
            yield Difference(LEFT_ONLY, begin, length, left.take(length), None)
        elif other_begin < begin:
            if not right.runs:
                return
            length = min(right.runs[-1].length, begin - other_begin)
            yield Difference(RIGHT_ONLY, other_begin, length, None, right.take(length))
        else:
            if not left.runs or not right.runs:
                return
            length = min(left.runs[-1].length, right.runs[-1].length)
            data, other_data = left.take(length), right.take(length)
            if data != other_data:
                yield Difference(DIFFERENT, begin, length, data, other_data)
            elif same:
                yield Difference(SAME, begin, length, data, data)


def _open_different(left: _Side, right: _Side) -> None:
    """Look into the next subtree of that side, or of both, which cannot lead to a common subtree otherwise."""
    one, other = left.walk.subtrees[-1], right.walk.subtrees[-1]
    # Of two that begin at different keys the later one may still turn out to be shared.
    if one.height > other.height or (one.height == other.height and one.low <= other.low):
        left.open()
    if other.height > one.height or (other.height == one.height and other.low <= one.low):
        right.open()


def _open_common(left: MappingWalk, right: MappingWalk, entries_of_both: EntriesOfBoth) -> Iterator[Difference]:
    """Look once into a subtree that is next on both sides."""
    subtree, high = left.take()
    twin, twin_high = right.take()
    keys, values = entries_of_both(subtree, high, twin, twin_high)
    if subtree.height:
        left.give_children(subtree, keys, values)
        right.give_children(twin, keys, values)
        return
    for run in data_runs(keys, values):
        yield Difference(SAME, run.thin_begin, run.length, run.data_begin, run.data_begin)
