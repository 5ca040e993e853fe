"""Who maps a data block, in large pools: nothing is sorted, each mapping goes to the place of its data block.

A word for each data block has the owner in its upper bits and the thin block in its lower ones, so a run is where words
ascend by one.  Owners of a block beyond the first go to a list, which is sorted.

Memory is that of one stretch of data blocks.  If they are not all in one, the trees are read for each stretch, the last
one first, and runs wait in a temporary file; a run that goes on from stretch to stretch is made whole on the way.

Source: docs/design.md, "Data blocks and their owners".
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import numpy as np

from persistent_data.batch_walk import BatchWalk
from persistent_data.block_batches import NotClean
from persistent_data.distinct import Distinct
from persistent_data.node_batches import NodeBatches
from thinpool.errors import ThinError
from thinpool.layout import TIME_BITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import IO

    from persistent_data.batch_walk import Level
    from persistent_data.block_batches import Flags, Numbers, Words
    from persistent_data.node_batches import NodeBatch
    from thinpool.pool_reader import PoolReader
    from thinpool.trees import DeviceEntry

    Columns = tuple[Words, Words, Words, Words]
    """Runs: their first data blocks, lengths, device ids and first thin blocks."""
    Runs = tuple[Numbers, Numbers, Words]
    """Runs of a stretch: the places of their first words, lengths and first words."""
    Ranges = list[tuple[int, int]]

MEMORY = 256 << 20
"""Bytes that the words of a stretch and what is computed from them may take."""

_NO_LIMIT = 1 << 62
_WORDS_AT_A_TIME = 1 << 20
_SPARSE = 8
"""Places to a word from which on most places are not looked at."""
_MOST_STRETCHES = 32
_SPOOL_BYTES = 24 << 16
"""Of a temporary file, read at a time: runs of 24 bytes."""
_BYTES_A_WORD = 10
_BYTES_A_SORTED_WORD = 64
"""For a block with several owners, or beside one: words, runs, and the orders they are brought into."""


class ReverseBatches:
    """The runs of data blocks in *ranges*, which are disjoint and ascend.

    :param devices: all devices of the pool, ascending by id
    :param memory: bytes for the words of a stretch
    :param progress: called now and then with the mappings read and those to be read
    :ivar nr_stretches: stretches that were read
    """

    def __init__(
        self,
        pool: PoolReader,
        devices: Sequence[DeviceEntry],
        ranges: Ranges,
        memory: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._pool = pool
        self._devices = devices
        self._thin_bits = np.uint64(64 - len(devices).bit_length())
        self._end_of_thin = 1 << (int(self._thin_bits) - 1)
        """Half of what there is room for, so that what differs by owner never differs as thin blocks do."""
        self._ids = np.array([entry.dev_id for entry in devices], np.uint64)
        self._roots = [entry.root for entry in devices]
        self._nr_mappings = sum(entry.mapped_blocks for entry in devices)
        self._memory = memory
        self._progress = progress
        self._batches = NodeBatches(pool.reader.device)
        self._stretches = _cut(ranges, pool.nr_data_blocks, self._most_words(self._nr_owned_twice() > 0))
        self.nr_stretches = 0
        self._done = 0
        self._next_begin = -1
        self._heads: dict[int, int] = {}
        """Of the stretch that was read last, where it begins and its runs there: their first words and lengths."""

    @property
    def is_too_long(self) -> bool:
        """Tell whether the trees would have to be read so often that sorting all runs is better."""
        return len(self._stretches) > _MOST_STRETCHES

    def _nr_owned_twice(self) -> int:
        """Return the mappings to data blocks that have others, as far as the superblock tells."""
        return self._nr_mappings - self._pool.main.data_root.nr_allocated

    def _most_words(self, sorted_too: bool) -> int:
        return max(self._memory // (_BYTES_A_SORTED_WORD if sorted_too else _BYTES_A_WORD), 1)

    def columns(self) -> Iterator[Columns]:
        """Iterate over the runs, by begin, end, device and thin block, in batches of any size.

        :raises NotClean: something is wrong or unusual; nothing has been returned
        :raises ThinError: the temporary file cannot be written
        """
        with _Spool() as spool:
            while self._stretches:
                stretch = self._stretches.pop()
                words = np.zeros(stretch.size, np.uint64)
                most = self._most_words(sorted_too=True)
                others = _Others(most if stretch.size > 1 else _NO_LIMIT)
                try:
                    self._read(stretch, words, others)
                    if others.found and stretch.size > most:
                        raise _TooManyError
                except _TooManyError:
                    self._stretches += stretch.halves()
                    continue
                self.nr_stretches += 1
                runs = self._runs(stretch, words, others)
                if not self._stretches and self.nr_stretches == 1:
                    yield from (self._as_columns(stretch, run) for run in runs)
                    return
                self._spool(spool, stretch, runs)
            for stretch, found in spool.stretches():
                yield self._as_columns(stretch, found)

    def _spool(self, spool: _Spool, stretch: _Stretch, runs: Iterator[Runs]) -> None:
        """Put the runs of *stretch* aside, those at its beginning where those of the stretch before can find them."""
        heads: dict[int, int] = {}
        spool.begin()
        for at, lengths, first in runs:
            nr_heads = int(np.searchsorted(at, 0, "right"))
            heads.update(zip(first[:nr_heads].tolist(), lengths[:nr_heads].tolist(), strict=True))
            spool.write((at[nr_heads:], lengths[nr_heads:], first[nr_heads:]))
        spool.end(stretch, heads)
        self._next_begin, self._heads = stretch.begin, heads

    def _as_columns(self, stretch: _Stretch, runs: Runs) -> Columns:
        at, lengths, words = runs
        owners = words >> self._thin_bits
        thin_begins = words - (owners << self._thin_bits)
        return stretch.data_blocks(at), lengths.view(np.uint64), self._ids[owners.astype(np.int64) - 1], thin_begins

    # Reading

    def _read(self, stretch: _Stretch, words: Words, others: _Others) -> None:
        """Read all trees, and note the owners of the data blocks of *stretch*."""
        walk = BatchWalk(self._batches, self._pool.nr_blocks)
        wanted_again = np.zeros(self._pool.nr_blocks, np.bool_)
        """Leaves of several devices with something wanted: nobody has said whose they are."""
        for nodes, level in walk.leaves(self._roots, range(len(self._roots))):
            keys, values = nodes.entries()
            data = values >> np.uint64(TIME_BITS)
            self._verify(nodes, keys, data)
            self._advance(len(keys))
            owners = level.label
            is_shared = level.nr_ways > 1
            if is_shared.any():
                of_shared = np.repeat(is_shared, nodes.nr_entries)
                inside = stretch.contains(data)
                leaf = np.repeat(np.arange(len(level)), nodes.nr_entries)
                wanted_again[nodes.blocks[leaf[inside & of_shared]]] = True
                keys, data = keys[~of_shared], data[~of_shared]
                owners, counts = owners[~is_shared], nodes.nr_entries[~is_shared]
            else:
                counts = nodes.nr_entries
            self._place(stretch, words, others, data, self._owned(keys, np.repeat(owners, counts)))
        for entry, found in zip(self._devices, walk.nr_entries.tolist(), strict=True):
            if found != entry.mapped_blocks:
                raise NotClean(entry.root)
        if wanted_again.any():
            for owner, root in enumerate(self._roots):
                level = walk.leaf_level(root)
                self._read_shared(
                    walk, level.at(np.flatnonzero(wanted_again[level.blocks])), owner, stretch, words, others
                )

    def _read_shared(
        self, walk: BatchWalk, level: Level, owner: int, stretch: _Stretch, words: Words, others: _Others
    ) -> None:
        """Read leaves of *owner* that others have too, and that have been verified."""
        for nodes, _ in walk.read_leaves(level):
            keys, values = nodes.entries()
            self._place(stretch, words, others, values >> np.uint64(TIME_BITS), self._owned(keys, owner))

    def _verify(self, nodes: NodeBatch, keys: Words, data: Words) -> None:
        if len(keys) and (int(data.max()) >= self._pool.nr_data_blocks or int(keys.max()) >= self._end_of_thin):
            raise NotClean(int(nodes.blocks[0]))

    def _advance(self, nr_mappings: int) -> None:
        self._done += nr_mappings
        if self._progress is not None:
            nr_passes = self.nr_stretches + 1 + len(self._stretches)
            self._progress(self._done, self._nr_mappings * nr_passes)

    def _owned(self, keys: Words, owners: Numbers | int) -> Words:
        """Return a word for each of the thin blocks *keys*: its owner, or that of all, from 1 on, and the block."""
        words: Words = (np.asarray(owners).astype(np.uint64) + np.uint64(1)) << self._thin_bits
        return words | keys

    def _place(self, stretch: _Stretch, words: Words, others: _Others, data: Words, new: Words) -> None:
        """Put the words *new* to the places of data blocks, or on the list where another word is."""
        at, new = stretch.places(data, new)
        if not len(at):
            return
        taken = words.take(at) != 0
        if taken.any():
            others.add(at[taken], new[taken])
            at, new = at[~taken], new[~taken]
        words[at] = new
        lost = words.take(at) != new
        if lost.any():
            others.add(at[lost], new[lost])

    # Runs

    def _runs(self, stretch: _Stretch, words: Words, others: _Others) -> Iterator[Runs]:
        """Yield the runs of *stretch*, in order."""
        heads = self._heads if stretch.end == self._next_begin else {}
        if not others.found:
            for runs in _runs_of_words(words):
                _join_heads(runs, stretch.size, heads)
                yield runs
            return
        parts = [*_runs_of_words(words), others.runs()]
        at, lengths, first = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        # A run may be in part among the words and in part on the list.
        at, lengths, first = runs = _joined(at, lengths, first)
        _join_heads(runs, stretch.size, heads)
        order = np.lexsort((first, lengths, at))
        yield at[order], lengths[order], first[order]


def _runs_of_words(words: Words) -> Iterator[Runs]:
    begin = 0
    """Where the run begins, or the gap, that may go on in the next part."""
    for first in range(0, len(words), _WORDS_AT_A_TIME):
        end = min(first + _WORDS_AT_A_TIME, len(words))
        before = max(first - 1, 0)
        part = words[before:end]
        if int(np.count_nonzero(part)) * _SPARSE < len(part):
            # Places of words, and of what follows them, are the only ones at which anything can end.
            owned_at = np.flatnonzero(part)
            places = Distinct(np.concatenate((owned_at, owned_at + 1))).values
            places = places[(places > 0) & (places < len(part))]
            breaks = places[part[places] - part[places - 1] != 1] + before
        else:
            breaks = np.flatnonzero(part[1:] - part[:-1] != 1) + (before + 1)
        edges = np.concatenate([[begin], breaks, [len(words)] if end == len(words) else breaks[:0]])
        begin = int(edges[-1])
        at, lengths = edges[:-1], edges[1:] - edges[:-1]
        found = words.take(at)
        owned = found != 0
        yield at[owned], lengths[owned], found[owned]


def _joined(at: Numbers, lengths: Numbers, first: Words) -> Runs:
    """Join runs where one goes on with another; the result is in no particular order."""
    # Along a run, words and places ascend together.
    offset = first - at.view(np.uint64)
    order = np.lexsort((at, offset))
    at, lengths, first, offset = at[order], lengths[order], first[order], offset[order]
    begins = np.ones(len(at), np.bool_)
    begins[1:] = (offset[1:] != offset[:-1]) | (at[1:] != at[:-1] + lengths[:-1])
    where = np.flatnonzero(begins)
    return at[where], np.add.reduceat(lengths, where) if len(where) else lengths, first[where]


def _join_heads(runs: Runs, size: int, heads: dict[int, int]) -> None:
    """Lengthen runs that end with a stretch of that size by those of the next one that go on with them."""
    if not heads:
        return
    at, lengths, first = runs
    for i in np.flatnonzero(at + lengths == size).tolist():
        lengths[i] += heads.pop(int(first[i]) + int(lengths[i]), 0)


class _TooManyError(Exception):
    """A stretch has more owners than there is memory for."""


class _Stretch:
    """Data blocks whose words are in memory together: *ranges*, disjoint and ascending, with a word between them.

    :ivar size: words
    :ivar begin: first data block; *end* is behind the last one
    """

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges
        self._begins = np.array([begin for begin, _ in ranges], np.uint64)
        self._ends = np.array([end for _, end in ranges], np.uint64)
        lengths = (self._ends - self._begins + np.uint64(1)).astype(np.int64)
        self._at = np.cumsum(lengths) - lengths
        self.size = max(int(lengths.sum()) - 1, 0)
        self.begin = ranges[0][0] if ranges else 0
        self.end = ranges[-1][1] if ranges else 0

    def contains(self, data: Words) -> Flags:
        """Tell which data blocks are in it."""
        if len(self._ranges) <= 1:
            return (data >= np.uint64(self.begin)) & (data < np.uint64(self.end))
        which = np.searchsorted(self._begins, data, "right") - 1
        return (which >= 0) & (data < self._ends[which])

    def places(self, data: Words, words: Words) -> tuple[Numbers, Words]:
        """Return the places of those data blocks that are in it, and those of *words* that belong to them."""
        inside = self.contains(data)
        if not inside.all():
            data, words = data[inside], words[inside]
        if len(self._ranges) <= 1:
            return (data - np.uint64(self.begin)).view(np.int64), words
        which = np.searchsorted(self._begins, data, "right") - 1
        return (data - self._begins[which]).view(np.int64) + self._at[which], words

    def data_blocks(self, at: Numbers) -> Words:
        """Return the data blocks at places of it."""
        if len(self._ranges) <= 1:
            return at.view(np.uint64) + np.uint64(self.begin)
        which = np.searchsorted(self._at, at, "right") - 1
        return (at - self._at[which]).view(np.uint64) + self._begins[which]

    def halves(self) -> list[_Stretch]:
        """Return two stretches that have the same data blocks, as far as possible as many each."""
        return _cut(self._ranges, self.end, (self.size + 1) // 2)


def _cut(ranges: Ranges, end: int, most: int) -> list[_Stretch]:
    """Return stretches of *most* words at most that together have all data blocks in *ranges* below *end*."""
    stretches: list[Ranges] = [[]]
    room = most
    for begin, range_end in ranges:
        first = begin
        while first < min(range_end, end):
            if room <= 0:
                stretches.append([])
                room = most
            following = min(first + room, range_end, end)
            stretches[-1].append((first, following))
            room -= following - first + 1
            first = following
    return [_Stretch(part) for part in stretches]


class _Others:
    """Words for data blocks that have another word already.

    :param most: so many are kept
    :ivar found: whether there is any
    """

    def __init__(self, most: int) -> None:
        self._room = most
        self._at: list[Numbers] = []
        self._words: list[Words] = []
        self.found = False

    def add(self, at: Numbers, words: Words) -> None:
        """Take words.

        :raises _TooManyError: there are too many of them
        """
        self._room -= len(at)
        if self._room < 0:
            raise _TooManyError
        self._at.append(at)
        self._words.append(words)
        self.found = True

    def runs(self) -> Runs:
        """Return the runs of all words."""
        at = np.concatenate(self._at)
        return _joined(at, np.ones(len(at), np.int64), np.concatenate(self._words))


class _Spool:
    """Runs of several stretches in a temporary file, the last stretch first."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._size = 0
        self._begin = 0
        self._parts: list[tuple[_Stretch, dict[int, int], int, int]] = []
        """Stretches, with the runs at their very beginning, and where in the file the others are."""

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self) -> None:
        """Begin with another stretch."""
        self._begin = self._size

    def write(self, runs: Runs) -> None:
        """Add runs to the stretch.

        :raises ThinError: the file cannot be written
        """
        from tempfile import TemporaryFile

        view = memoryview(np.column_stack([column.view(np.int64) for column in runs]).tobytes())
        try:
            if self._file is None:
                self._file = TemporaryFile(prefix="thin_rmap-", buffering=0)  # noqa: SIM115  closed by __exit__
            while view:
                written = self._file.write(view)
                self._size += written
                view = view[written:]
        except OSError as error:
            number = error.errno or errno.EIO
            raise ThinError(number, f"cannot write a temporary file: {os.strerror(number)}") from error

    def end(self, stretch: _Stretch, heads: dict[int, int]) -> None:
        """End the stretch; what is in *heads* when all is read goes first."""
        self._parts.append((stretch, heads, self._begin, self._size))

    def stretches(self) -> Iterator[tuple[_Stretch, Runs]]:
        """Iterate over all runs, in order, with their stretches."""
        for stretch, heads, begin, end in reversed(self._parts):
            ordered = sorted((length, word) for word, length in heads.items())
            lengths, words = [length for length, _ in ordered], [word for _, word in ordered]
            yield stretch, (np.zeros(len(heads), np.int64), np.array(lengths, np.int64), np.array(words, np.uint64))
            for at in range(begin, end, _SPOOL_BYTES):
                yield stretch, self._load(at, min(at + _SPOOL_BYTES, end))

    def _load(self, begin: int, end: int) -> Runs:
        assert self._file is not None
        content = b""
        while len(content) < end - begin:
            content += os.pread(self._file.fileno(), end - begin - len(content), begin + len(content))
        rows = np.frombuffer(content, np.int64).reshape(-1, 3)
        at, lengths, words = (np.ascontiguousarray(column) for column in rows.T)
        return at, lengths, words.view(np.uint64)
