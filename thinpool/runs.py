"""Runs: stretches of thin blocks mapped to consecutive data blocks, at the same time or at any."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

from thinpool.layout import TIME_BITS, TIME_MASK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_BATCH_LEAVES = 64
"""Leaves that are turned into runs together."""
_WORTH_AN_ARRAY = 4096
"""Entries from which on array operations are faster, the first import of the array package included."""


class Run(NamedTuple):
    """*length* thin blocks from *thin_begin* on, mapped to as many data blocks from *data_begin* on, all at *time*."""

    thin_begin: int
    data_begin: int
    length: int
    time: int

    def joined_with(self, following: Run) -> Run | None:
        """Return both as one run, None if *following* does not go on where this one ends."""
        if (
            following.thin_begin == self.thin_begin + self.length
            and following.data_begin == self.data_begin + self.length
            and following.time == self.time
        ):
            return self._replace(length=self.length + following.length)
        return None


class DataRun(NamedTuple):
    """*length* thin blocks from *thin_begin* on, mapped to as many data blocks from *data_begin* on, at any times."""

    thin_begin: int
    data_begin: int
    length: int

    def joined_with(self, following: DataRun) -> DataRun | None:
        """Return both as one run, None if *following* does not go on where this one ends."""
        if (
            following.thin_begin == self.thin_begin + self.length
            and following.data_begin == self.data_begin + self.length
        ):
            return self._replace(length=self.length + following.length)
        return None

    def from_offset(self, offset: int) -> DataRun:
        """Return what follows the first *offset* blocks."""
        return DataRun(self.thin_begin + offset, self.data_begin + offset, self.length - offset)


def data_runs(keys: Sequence[int], values: Sequence[int]) -> list[DataRun]:
    """Find the runs of a leaf: *keys* are thin blocks, ascending, *values* their block times."""
    runs: list[DataRun] = []
    begin = data_begin = length = 0
    for key, value in zip(keys, values, strict=True):
        if length and key == begin + length and value >> TIME_BITS == data_begin + length:
            length += 1
            continue
        if length:
            runs.append(DataRun(begin, data_begin, length))
        begin, data_begin, length = key, value >> TIME_BITS, 1
    if length:
        runs.append(DataRun(begin, data_begin, length))
    return runs


RunFields = tuple[list[int], list[int], list[int], list[int]]
"""Runs as lists of their fields."""


def run_fields(keys: bytes, values: bytes) -> RunFields:
    """Find the runs of a sorted stretch of a mapping tree.

    :param keys: thin blocks, as little-endian words of 8 bytes
    :param values: as many block times, likewise
    """
    if len(keys) >= 8 * _WORTH_AN_ARRAY:
        return _run_fields_by_arrays(keys, values)
    thin: list[int] = []
    first: list[int] = []
    lengths: list[int] = []
    next_key = next_value = -1
    for key, value in zip(memoryview(keys).cast("Q"), memoryview(values).cast("Q"), strict=True):
        if key == next_key and value == next_value:
            lengths[-1] += 1
        else:
            thin.append(key)
            first.append(value)
            lengths.append(1)
        next_key = key + 1
        next_value = value + (1 << TIME_BITS)
    return thin, [value >> TIME_BITS for value in first], lengths, [value & TIME_MASK for value in first]


def _run_fields_by_arrays(keys: bytes, values: bytes) -> RunFields:
    import numpy as np

    k = np.frombuffer(keys, "<u8")
    v = np.frombuffer(values, "<u8")
    breaks = np.flatnonzero((k[1:] - k[:-1] != 1) | (v[1:] - v[:-1] != 1 << TIME_BITS)) + 1
    starts = np.concatenate(([0], breaks))
    first = v[starts]
    return (
        k[starts].tolist(),
        (first >> np.uint64(TIME_BITS)).tolist(),
        np.diff(starts, append=len(k)).tolist(),
        (first & np.uint64(TIME_MASK)).tolist(),
    )


def runs_of_fields(fields: RunFields) -> Iterator[Run]:
    """Return the runs one by one; none exists before it is asked for."""
    # A named tuple without the call of its own __new__ takes half the time.
    return map(tuple.__new__, repeat(Run), zip(*fields, strict=True))
