"""Who maps a data block: the mappings of all devices, by data block.

The trees are in the order of thin blocks, so the mappings that are wanted have to be sorted.  Memory is bounded: beyond
:data:`MOST_RUNS_IN_MEMORY` runs, sorted parts go to a temporary file, 32 bytes a run, and are merged in the end.
"""

from __future__ import annotations

import errno
import os
from array import array
from bisect import bisect_right
from itertools import chain, islice
from mmap import PROT_READ, mmap
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from persistent_data.read_ahead import ReadAhead
from thinpool.errors import ThinError
from thinpool.layout import TIME_BITS
from thinpool.mapping_nodes import MappingNodes, Shape
from thinpool.pool_reader import PoolReader
from thinpool.runs import DataRun, data_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import IO

    from bufio.device import Device
    from thinpool.mapping_walk import Subtree
    from thinpool.reverse_batch import Columns
    from thinpool.trees import DeviceEntry

    Progress = Callable[[int, int], None]

MOST_RUNS_IN_MEMORY = 1 << 20
"""Runs that are sorted together: some 75 MB."""
BULK_FROM_MAPPINGS = 1 << 17
"""Mappings from which on it takes less time to load numpy first."""

_LINES_AT_A_TIME = 1024


class ReverseRun(NamedTuple):
    """*length* data blocks from *data_begin* on, which device *dev_id* maps from thin block *thin_begin* on."""

    data_begin: int
    length: int
    dev_id: int
    thin_begin: int


def disjoint(regions: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges of data blocks, ends exclusive, ascending, those that overlap or touch as one.

    :raises ValueError: one is empty or begins below 0
    """
    result: list[tuple[int, int]] = []
    for begin, end in sorted(regions):
        if not 0 <= begin < end:
            raise ValueError(f"no range of data blocks: {begin}..{end}")
        if result and begin <= result[-1][1]:
            begin, last_end = result.pop()
            end = max(end, last_end)
        result.append((begin, end))
    return result


def reverse_map(
    device: Device,
    regions: Iterable[tuple[int, int]],
    metadata_snap: bool = False,
    most_runs_in_memory: int = MOST_RUNS_IN_MEMORY,
    progress: Progress | None = None,
) -> Iterator[ReverseRun]:
    """Iterate over what is mapped to the data blocks in *regions*, by begin, end, device and thin block.

    Runs are as long as data blocks and thin blocks both go on within a region; regions that overlap or touch are one.
    Every device is listed, those that share their mappings with others too.

    Everything is read and verified before the first run is returned.  Of leaves that several devices share, those
    without a mapping in *regions* are read once, others for each device.

    :param regions: ranges of data blocks, ends exclusive; they may reach beyond the end of the data device
    :param progress: called now and then with the mappings read and those of all devices
    :raises ValueError: one of *regions* is empty or begins below 0
    :raises Corrupt: a tree is damaged, or a device has not as many mappings as its details say
    :raises ThinError: ENODATA, the metadata snapshot was asked for and there is none; others, the temporary file
        cannot be written
    :raises OSError: the device cannot be read
    """
    wanted = disjoint(regions)
    pool = PoolReader(device, metadata_snap)
    devices = pool.devices()
    columns = _in_bulk(pool, devices, wanted, progress)
    if columns is None:
        yield from _one_by_one(pool, devices, wanted, most_runs_in_memory, progress)
        return
    for run in columns:
        yield from map(ReverseRun._make, zip(*(column.tolist() for column in run), strict=True))


def reverse_map_text(
    device: Device,
    regions: Iterable[tuple[int, int]],
    metadata_snap: bool = False,
    *,
    json: bool = False,
    progress: Progress | None = None,
) -> Iterator[bytes | memoryview]:
    """Iterate over the same as lines of text, many at a time; each piece holds until the next one is asked for.

    :param json: as JSON objects
    """
    wanted = disjoint(regions)
    pool = PoolReader(device, metadata_snap)
    devices = pool.devices()
    columns = _in_bulk(pool, devices, wanted, progress)
    if columns is not None:
        yield from _text_in_bulk(columns, json)
        return
    runs = _one_by_one(pool, devices, wanted, MOST_RUNS_IN_MEMORY, progress)
    lines = map(_json_line if json else _line, runs)
    while piece := "".join(islice(lines, _LINES_AT_A_TIME)):
        yield piece.encode()


def _line(run: ReverseRun) -> str:
    begin, length, dev_id, thin_begin = run
    return f"data {begin}..{begin + length} -> thin({dev_id}) {thin_begin}..{thin_begin + length}\n"


def _json_line(run: ReverseRun) -> str:
    begin, length, dev_id, thin_begin = run
    return f'{{"data_begin": {begin}, "length": {length}, "dev_id": {dev_id}, "thin_begin": {thin_begin}}}\n'


def _text_in_bulk(columns: Iterable[Columns], json: bool) -> Iterator[memoryview]:
    from thinpool.bulk_text import LINES_AT_A_TIME, BulkText

    # Columns: begin and length of the data blocks, device, begin of the thin blocks, and both ends.
    if json:
        text = BulkText([('{"data_begin": ', 0, ', "length": ', 1, ', "dev_id": ', 2, ', "thin_begin": ', 3, "}\n")])
    else:
        text = BulkText([("data ", 0, "..", 4, " -> thin(", 2, ") ", 3, "..", 5, "\n")])
    for begins, lengths, dev_ids, thin_begins in columns:
        for at in range(0, len(begins), LINES_AT_A_TIME):
            part = slice(at, at + LINES_AT_A_TIME)
            begin, length, thin_begin = begins[part], lengths[part], thin_begins[part]
            yield text.lines(None, (begin, length, dev_ids[part], thin_begin, begin + length, thin_begin + length))


def _in_bulk(
    pool: PoolReader, devices: Sequence[DeviceEntry], wanted: list[tuple[int, int]], progress: Progress | None
) -> Iterator[Columns] | None:
    """Return the runs of a large pool, many at a time; None if that is not the way, or there is anything unusual."""
    if sum(entry.mapped_blocks for entry in devices) < BULK_FROM_MAPPINGS:
        return None
    from persistent_data.block_batches import NotClean
    from thinpool.reverse_batch import MEMORY, ReverseBatches

    batches = ReverseBatches(pool, devices, wanted, MEMORY, progress)
    if batches.is_too_long:
        return None
    columns = batches.columns()
    try:
        # When there is a first batch, everything has been read.
        return chain(list(islice(columns, 1)), columns)
    except NotClean:
        return None


def _one_by_one(
    pool: PoolReader,
    devices: Sequence[DeviceEntry],
    wanted: list[tuple[int, int]],
    most_runs_in_memory: int,
    progress: Progress | None,
) -> Iterator[ReverseRun]:
    nr_mappings = sum(entry.mapped_blocks for entry in devices)
    with _Sorter(most_runs_in_memory) as sorter:
        collector = _Collector(pool, _Regions(wanted), sorter)
        for entry in devices:
            for done in collector.collect(entry):
                if progress is not None:
                    progress(done, nr_mappings)
        yield from sorter.runs()


class _Regions:
    """Disjoint ranges of data blocks, ascending."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._ranges = ranges
        self._begins = [begin for begin, _ in ranges]
        # A block time is below another if its data block is; what is wanted of a range of blocks can be said of values.
        self._lowest = ranges[0][0] << TIME_BITS if ranges else 0
        self._end = ranges[-1][1] << TIME_BITS if ranges else 0

    def runs_of(self, keys: Sequence[int], values: Sequence[int]) -> list[DataRun]:
        """Return those runs of a leaf, or parts of runs, whose data blocks are in one of the ranges."""
        low, end = self._lowest, self._end
        if not values or min(values) >= end or max(values) < low:
            return []
        if min(values) < low or max(values) >= end:
            pairs = [(key, value) for key, value in zip(keys, values, strict=True) if low <= value < end]
            keys, values = [key for key, _ in pairs], [value for _, value in pairs]
        runs = data_runs(keys, values)
        return runs if len(self._ranges) == 1 else [part for run in runs for part in self._parts(run)]

    def _parts(self, run: DataRun) -> Iterator[DataRun]:
        """Yield what a run has in each range."""
        run_end = run.data_begin + run.length
        for begin, end in self._ranges[max(bisect_right(self._begins, run.data_begin) - 1, 0) :]:
            if begin >= run_end:
                return
            first, last = max(begin, run.data_begin), min(end, run_end)
            if first < last:
                yield DataRun(run.thin_begin + first - run.data_begin, first, last - first)


class _Collector:
    """Takes what is wanted of each device to the sorter."""

    def __init__(self, pool: PoolReader, wanted: _Regions, sorter: _Sorter) -> None:
        self._pool = pool
        self._wanted = wanted
        self._sorter = sorter
        self._ahead = ReadAhead(pool.reader)
        self._barren = array("H", [0]) * pool.nr_blocks
        """Number of mappings of leaves that have been read and hold nothing wanted, by metadata block."""
        self._max_entries = array("H", [0]) * pool.nr_blocks
        self._first_keys = array("Q", [0]) * pool.nr_blocks
        self._last_keys = array("Q", [0]) * pool.nr_blocks
        """Shapes of those leaves."""
        self._done = 0

    def collect(self, entry: DeviceEntry) -> Iterator[int]:
        """Take the wanted mappings of a device; yield now and then the mappings that have been seen of all devices.

        :raises Corrupt: its tree is damaged, or it has not as many mappings as its details say
        """
        nodes = MappingNodes(self._pool, self._ahead, entry.root, entry.path, entry.dev_id)
        walk = nodes.walk()
        asked: set[int] = set()
        found = 0
        last = DataRun(0, 0, 0)
        while walk.subtrees:
            subtree = walk.subtrees[-1]
            nr_entries = self._barren[subtree.block] if subtree.height == 0 else 0
            if nr_entries:
                found += nr_entries
                self._pass_over(nodes, *walk.take())
                continue
            if subtree.block not in asked:
                yield self._done + found
                asked = {block for block in walk.upcoming() if not self._barren[block]}
                nodes.read_ahead(asked)
            leaf = walk.open()
            if leaf is None:
                continue
            keys, values = leaf
            found += len(keys)
            runs = self._wanted.runs_of(keys, values)
            if not runs:
                self._note_barren(subtree.block, len(keys), nodes.shape)
                continue
            # A run may go on in the next leaf, so the last one is kept.
            joined = last.joined_with(runs[0])
            if joined is not None:
                runs[0] = joined
            elif last.length:
                self._sorter.add(last, entry.dev_id)
            last = runs.pop()
            for run in runs:
                self._sorter.add(run, entry.dev_id)
        if last.length:
            self._sorter.add(last, entry.dev_id)
        self._pool.check_nr_mappings(entry, found)
        self._done += found

    def _note_barren(self, block: int, nr_entries: int, shape: Shape) -> None:
        self._barren[block] = nr_entries
        self._max_entries[block], self._first_keys[block], self._last_keys[block] = shape

    def _pass_over(self, nodes: MappingNodes, subtree: Subtree, high: int) -> None:
        """Check that a leaf which has been read for another place fits this one."""
        block = subtree.block
        shape = Shape(self._max_entries[block], self._first_keys[block], self._last_keys[block])
        nodes.check_place(subtree, high, shape)


class _Sorter:
    """Sorts any number of runs in bounded memory.

    A run is a record of bytes that sorts as the run does.
    """

    _RECORD = Struct(">QQQQ")
    """Data begin, data end, device id, thin begin; big-endian, so that bytes sort as numbers do."""

    def __init__(self, most_in_memory: int) -> None:
        self._most = most_in_memory
        self._records: list[bytes] = []
        self._file: IO[bytes] | None = None
        self._parts: list[tuple[int, int]] = []
        """Sorted parts of the file: begin and end in bytes."""

    def __enter__(self) -> _Sorter:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, run: DataRun, dev_id: int) -> None:
        """Take a run.

        :raises ThinError: the temporary file cannot be written
        """
        self._records.append(self._RECORD.pack(run.data_begin, run.data_begin + run.length, dev_id, run.thin_begin))
        if len(self._records) >= self._most:
            self._spill()

    def runs(self) -> Iterator[ReverseRun]:
        """Iterate over all runs taken, by begin, end, device and thin block."""
        self._records.sort()
        records: Iterable[bytes] = self._records
        if self._file is not None:
            from heapq import merge

            # Mapped, every part is read where it has been got to, and the system sees to the pages.
            file = mmap(self._file.fileno(), self._parts[-1][1], prot=PROT_READ)
            records = merge(*(self._slices(file, begin, end) for begin, end in self._parts), self._records)
        for begin, end, dev_id, thin_begin in map(self._RECORD.unpack, records):
            yield ReverseRun(begin, end - begin, dev_id, thin_begin)

    def _slices(self, file: mmap, begin: int, end: int) -> Iterator[bytes]:
        """Yield the records of a sorted part of the file."""
        size = self._RECORD.size
        for at in range(begin, end, size):
            yield file[at : at + size]

    def _spill(self) -> None:
        """Move what is in memory to the file, sorted."""
        from tempfile import TemporaryFile

        self._records.sort()
        view = memoryview(b"".join(self._records))
        begin = self._parts[-1][1] if self._parts else 0
        self._parts.append((begin, begin + len(view)))
        self._records.clear()
        try:
            if self._file is None:
                self._file = TemporaryFile(prefix="thin_rmap-", buffering=0)  # noqa: SIM115  closed by __exit__
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            number = error.errno or errno.EIO
            raise ThinError(number, f"cannot write a temporary file: {os.strerror(number)}") from error
