"""Two large mapping trees side by side, hundreds of leaves at a time.

Leaves of both trees are read in the order of their keys, those that both have once, or not at all if nobody wants to
know what is the same.  The thin blocks up to where the next leaves begin are then known on both sides: two arrays, with
a place for each thin block, are compared as a whole.

Source: docs/design.md, "Comparing devices".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from persistent_data.batch_walk import BatchWalk, Level
from persistent_data.block_batches import NotClean
from persistent_data.block_reader import WINDOW_BLOCKS
from persistent_data.distinct import Distinct
from persistent_data.node_batches import NodeBatches
from thinpool.differences import KINDS, LEFT_ONLY, RIGHT_ONLY, SAME, Difference
from thinpool.layout import TIME_BITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from persistent_data.block_batches import Flags, Numbers, Words
    from thinpool.pool_reader import PoolReader

    Bytes = NDArray[np.uint8]
    Side = tuple[Words, Words]
    """Thin blocks, in any order, and their data blocks."""

_LEFT_ONLY, _RIGHT_ONLY, _SAME = (KINDS.index(kind) for kind in (LEFT_ONLY, RIGHT_ONLY, SAME))

_MOST_PLACES_A_MAPPING = 8
"""Thin blocks for each mapping up to which all have a place in the arrays, mapped or not."""


class Columns:
    """Differences, ascending; a number for each in every column.

    :ivar kinds: where they are in :data:`~thinpool.differences.KINDS`
    :ivar left_begins: data blocks, 0 where a kind does not speak of the left side, or ranges were joined without regard
        to them; so are *right_begins*
    """

    __slots__ = ("begins", "kinds", "left_begins", "lengths", "right_begins")

    def __init__(self, kinds: Bytes, begins: Words, lengths: Words, left_begins: Words, right_begins: Words) -> None:
        self.kinds = kinds
        self.begins = begins
        self.lengths = lengths
        self.left_begins = left_begins
        self.right_begins = right_begins

    def __len__(self) -> int:
        return len(self.kinds)

    def numbers(self) -> tuple[Words, Words, Words, Words]:
        """Return all columns but the kinds."""
        return self.begins, self.lengths, self.left_begins, self.right_begins

    def part(self, where: slice) -> Columns:
        """Return some of them."""
        return Columns(self.kinds[where], *(column[where] for column in self.numbers()))

    def with_more(self, more: Columns) -> Columns:
        """Return them and *more*, which come after them."""
        columns = map(np.concatenate, zip(self.numbers(), more.numbers(), strict=True))
        return Columns(np.concatenate((self.kinds, more.kinds)), *columns)

    def differences(self) -> Iterator[Difference]:
        """Return them one by one."""
        numbers = zip(*(column.tolist() for column in self.numbers()), strict=True)
        for kind, (begin, length, left, right) in zip(self.kinds.tolist(), numbers, strict=True):
            left_begin = left if kind != _RIGHT_ONLY else None
            right_begin = right if kind != _LEFT_ONLY else None
            yield Difference(KINDS[kind], begin, length, left_begin, right_begin)


class DeltaBatches:
    """The comparison of the mapping trees with *roots*, left and right.

    :param same: return also what both sides map to the same data blocks
    :param joined: make ranges as long as they are without regard to data blocks
    :ivar nr_mappings: of each side, so far; without *same* those of leaves that both have are left out
    :ivar begin: thin block at which the first difference begins that has not been returned
    """

    def __init__(self, pool: PoolReader, roots: tuple[int, int], *, same: bool, joined: bool) -> None:
        self._pool = pool
        self._roots = roots
        self._same = same
        self._joined = joined
        size = np.uint32 if pool.nr_data_blocks < 1 << 32 else np.uint64
        self._rooms: list[NDArray[np.unsignedinteger]] = [np.empty(0, size), np.empty(0, size)]
        """For the places of each side.  Memory that has been used is faster than new memory."""
        self.nr_mappings = [0, 0]
        self.begin = 0
        self._waiting = _NONE
        """The last range, which may go on."""

    def columns(self) -> Iterator[Columns]:
        """Iterate over the differences, ascending, in longest ranges.

        :raises NotClean: something is wrong or unusual.  What has been returned holds
        """
        walk = BatchWalk(NodeBatches(self._pool.reader.device), self._pool.nr_blocks)
        level, ranks, bounds = _in_windows(*map(walk.leaf_level, self._roots), with_common=self._same)
        left = right = _NOTHING
        at = 0
        for number, (nodes, part) in enumerate(walk.read_leaves(level)):
            keys, values = nodes.entries()
            data = values >> np.uint64(TIME_BITS)
            if len(data) and int(data.max()) >= self._pool.nr_data_blocks:
                raise NotClean(int(nodes.blocks[0]))
            counts = np.bincount(ranks[at : at + len(part)], nodes.nr_entries, 3).astype(np.int64)
            at += len(part)
            end_of_left, begin_of_right = int(counts[0] + counts[1]), int(counts[0])
            self.nr_mappings[0] += end_of_left
            self.nr_mappings[1] += len(keys) - begin_of_right
            left = _added(left, (keys[:end_of_left], data[:end_of_left]))
            right = _added(right, (keys[begin_of_right:], data[begin_of_right:]))
            known_left, known_right = left, right
            left = right = _NOTHING
            if number < len(bounds):
                known_left, left = _parted(known_left, bounds[number])
                known_right, right = _parted(known_right, bounds[number])
            yield from self._finished(self._compare(known_left, known_right))
        if len(self._waiting):
            yield self._waiting

    def _compare(self, left: Side, right: Side) -> Columns:
        """Compare what is known of both sides."""
        keys = np.concatenate((left[0], right[0]))
        if not len(keys):
            return _NONE
        low, high = keys.min(), keys.max()
        nr_places = int(high - low) + 1
        gaps: Flags | None = None
        if nr_places <= _MOST_PLACES_A_MAPPING * len(keys):
            blocks = None
            left_at, right_at = (left[0] - low).view(np.int64), (right[0] - low).view(np.int64)
        else:
            blocks = Distinct(keys).values
            nr_places = len(blocks)
            left_at, right_at = np.searchsorted(blocks, left[0]), np.searchsorted(blocks, right[0])
            gaps = blocks[1:] - blocks[:-1] != 1
        ours, others = self._placed(0, nr_places, left_at, left[1]), self._placed(1, nr_places, right_at, right[1])
        kinds = (ours != 0).view(np.uint8) + 2 * (others != 0).view(np.uint8)
        kinds += (ours == others) & (ours != 0)
        breaks = kinds[1:] != kinds[:-1]
        if gaps is not None:
            breaks |= gaps
        if not self._joined:
            for numbers in (ours, others):
                breaks |= (numbers[1:] - numbers[:-1] != 1) & (numbers[1:] != 0)
        edges = np.concatenate(([0], np.flatnonzero(breaks) + 1, [nr_places]))
        begins, lengths = edges[:-1], edges[1:] - edges[:-1]
        found = kinds.take(begins)
        wanted = np.flatnonzero(found != 0 if self._same else (found != 0) & (found != _SAME))
        begins, lengths, found = begins.take(wanted), lengths.take(wanted), found.take(wanted)
        thin_begins = begins.view(np.uint64) + low if blocks is None else blocks.take(begins)
        if self._joined:
            left_begins = right_begins = np.zeros(len(begins), np.uint64)
        else:
            left_begins, right_begins = (
                np.maximum(side.take(begins).astype(np.uint64), np.uint64(1)) - np.uint64(1) for side in (ours, others)
            )
        return Columns(found, thin_begins, lengths.view(np.uint64), left_begins, right_begins)

    def _placed(self, side: int, nr_places: int, at: Numbers, data: Words) -> NDArray[np.unsignedinteger]:
        """Return an array that has data blocks, and one more, at places *at*, and 0 where nothing is mapped."""
        if len(self._rooms[side]) < nr_places:
            self._rooms[side] = np.empty(nr_places, self._rooms[side].dtype)
        places = self._rooms[side][:nr_places]
        places.fill(0)
        places[at] = (data + np.uint64(1)).astype(places.dtype)
        return places

    def _finished(self, columns: Columns) -> Iterator[Columns]:
        """Yield the ranges in *columns*, with the one that waits in front, and let the last one wait."""
        if not len(columns):
            return
        waiting = self._waiting
        if len(waiting) and not self._goes_on(columns):
            columns = waiting.with_more(columns)
        self._waiting = columns.part(slice(-1, None))
        self.begin = int(self._waiting.begins[0])
        if len(columns) > 1:
            yield columns.part(slice(0, -1))

    def _goes_on(self, columns: Columns) -> bool:
        """Lengthen the first range in *columns* by the one that waits, if it goes on with that."""
        (last,), (first,) = self._waiting.differences(), columns.part(slice(0, 1)).differences()
        if self._joined:
            goes_on = last.kind == first.kind and last.thin_begin + last.length == first.thin_begin
        else:
            goes_on = last.goes_on_with(first)
        if goes_on:
            columns.lengths[0] += self._waiting.lengths[0]
            for ours, others in zip(columns.numbers(), self._waiting.numbers(), strict=True):
                if ours is not columns.lengths:
                    ours[0] = others[0]
        return goes_on


_NOTHING: Side = (np.empty(0, np.uint64), np.empty(0, np.uint64))
_NONE = Columns(np.empty(0, np.uint8), *(np.empty(0, np.uint64) for _ in range(4)))


def _in_windows(left: Level, right: Level, *, with_common: bool) -> tuple[Level, Numbers, Words]:
    """Return the leaves of two trees in the order in which they are to be read: by their keys, a window at a time.

    Within a window those of the left tree come first, then those of both, if they are wanted, then those of the right.

    :return: the leaves; for each 0, 1 or 2 for left, both or right; for each window but the last a bound: no key in a
        later window is below it
    """
    _, in_left, in_right = np.intersect1d(left.blocks, right.blocks, assume_unique=True, return_indices=True)
    parts = [
        left.at(np.setdiff1d(np.arange(len(left)), in_left, assume_unique=True)),
        left.at(in_left[: len(in_left) if with_common else 0]),
        right.at(np.setdiff1d(np.arange(len(right)), in_right, assume_unique=True)),
    ]
    twins = right.at(in_right[: len(parts[1])])
    parts[1].low = np.maximum(parts[1].low, twins.low)
    parts[1].high = np.minimum(parts[1].high, twins.high)
    parts[1].is_root = parts[1].is_root & twins.is_root
    level = Level.joined(parts)
    ranks = np.repeat(np.arange(3), [len(part) for part in parts])
    order = np.argsort(level.low, kind="stable")
    bounds = level.low[order[WINDOW_BLOCKS::WINDOW_BLOCKS]]
    order = order[np.lexsort((ranks[order], np.arange(len(order)) // WINDOW_BLOCKS))]
    return level.at(order), ranks[order], bounds


def _added(known: Side, more: Side) -> Side:
    return (np.concatenate((known[0], more[0])), np.concatenate((known[1], more[1]))) if len(known[0]) else more


def _parted(side: Side, bound: np.uint64) -> tuple[Side, Side]:
    """Return what is below *bound*, and what is not."""
    below = side[0] < bound
    if below.all():
        return side, _NOTHING
    return (side[0][below], side[1][below]), (side[0][~below], side[1][~below])
