"""Runs: stretches of thin blocks mapped to consecutive data blocks at the same time."""

from __future__ import annotations

from itertools import repeat
from typing import NamedTuple

from thinpool.layout import TIME_BITS, TIME_MASK

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


def runs_of_entries(keys: bytes, values: bytes) -> list[Run]:
    """Find the runs of a sorted stretch of a mapping tree.

    :param keys: thin blocks, as little-endian words of 8 bytes
    :param values: as many block times, likewise
    """
    if len(keys) >= 8 * _WORTH_AN_ARRAY:
        return _runs_by_arrays(keys, values)
    found: list[Run] = []
    begin = first = length = 0
    for key, value in zip(memoryview(keys).cast("Q"), memoryview(values).cast("Q"), strict=True):
        if key == begin + length and value == first + (length << TIME_BITS) and length:
            length += 1
            continue
        if length:
            found.append(Run(begin, first >> TIME_BITS, length, first & TIME_MASK))
        begin, first, length = key, value, 1
    if length:
        found.append(Run(begin, first >> TIME_BITS, length, first & TIME_MASK))
    return found


def _runs_by_arrays(keys: bytes, values: bytes) -> list[Run]:
    import numpy as np

    k = np.frombuffer(keys, "<u8")
    v = np.frombuffer(values, "<u8")
    breaks = np.flatnonzero((k[1:] - k[:-1] != 1) | (v[1:] - v[:-1] != 1 << TIME_BITS)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(starts, append=len(k))
    first = v[starts]
    fields = zip(
        k[starts].tolist(),
        (first >> np.uint64(TIME_BITS)).tolist(),
        lengths.tolist(),
        (first & np.uint64(TIME_MASK)).tolist(),
        strict=True,
    )
    # A named tuple without the call of its own __new__: half the time of all of this.
    return list(map(tuple.__new__, repeat(Run), fields))
