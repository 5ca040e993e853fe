"""The two stores that the per-operation measurements compare: a pool of ours, and LMDB.

Both hold 16-byte records, an 8-byte key and an 8-byte value.  For the pool that is a thin block and the data block with
its time; LMDB gets the same integers as big-endian bytes, so that its order is that of the numbers.

Neither waits for a disk: LMDB runs without sync, the pool on memory or on a file that is memory (tmpfs).  LMDB's
figures are those of a complete store.  So are ours: copy-on-write, both on-disk space maps, reference counts of data
blocks, checksums.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Protocol

import lmdb

from thinpool import PoolMetadata
from tools.bench.measure import Lap, Stopwatch
from tools.bench.pools import DATA_BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bufio import Device

__all__ = ["LmdbStore", "PoolStore", "Store"]

_KEY = Struct(">Q")


class Store(Protocol):
    """What is measured.  Every method returns the time of all its operations; changes commit every *batch*."""

    def insert(self, keys: Sequence[int], batch: int) -> Lap:
        """Add records."""

    def provision(self, keys: Sequence[int], batch: int) -> Lap:
        """Add records, finding a free data block for each included."""

    def lookup(self, keys: Sequence[int]) -> Lap:
        """Look up records that are there."""

    def remove(self, keys: Sequence[int], batch: int) -> Lap:
        """Remove records that are there."""

    def close(self) -> None:
        """Give everything back."""


class PoolStore:
    """Device 0 of a pool, in a cache that holds all of it."""

    def __init__(self, device: Device | Path, nr_data_blocks: int, cache_bytes: int) -> None:
        self._pool = PoolMetadata.open(
            device, DATA_BLOCK_SIZE, format_device=True, nr_data_blocks=nr_data_blocks, cache_bytes=cache_bytes
        )
        self._pool.create_thin(0)
        self._thin = self._pool.open_thin_device(0)

    def insert(self, keys: Sequence[int], batch: int) -> Lap:
        """``insert_block`` and ``commit``; the data blocks were allocated outside the measured time."""
        watch = Stopwatch()
        allocate, insert, commit = self._pool.alloc_data_block, self._thin.insert_block, self._pool.commit
        for begin in range(0, len(keys), batch):
            part = keys[begin : begin + batch]
            data_blocks = [allocate() for _ in part]
            with watch.running():
                for key, data_block in zip(part, data_blocks, strict=True):
                    insert(key, data_block)
                commit()
        return watch.lap(len(keys))

    def provision(self, keys: Sequence[int], batch: int) -> Lap:
        """``alloc_data_block``, ``insert_block`` and ``commit``: what the kernel does for a write to a new block."""
        watch = Stopwatch()
        allocate, insert, commit = self._pool.alloc_data_block, self._thin.insert_block, self._pool.commit
        with watch.running():
            for begin in range(0, len(keys), batch):
                for key in keys[begin : begin + batch]:
                    insert(key, allocate())
                commit()
        return watch.lap(len(keys))

    def lookup(self, keys: Sequence[int]) -> Lap:
        """``find_block``."""
        watch = Stopwatch()
        find = self._thin.find_block
        with watch.running():
            for key in keys:
                find(key)
        return watch.lap(len(keys))

    def remove(self, keys: Sequence[int], batch: int) -> Lap:
        """``remove_block`` and ``commit``."""
        watch = Stopwatch()
        remove, commit = self._thin.remove_block, self._pool.commit
        with watch.running():
            for begin in range(0, len(keys), batch):
                for key in keys[begin : begin + batch]:
                    remove(key)
                commit()
        return watch.lap(len(keys))

    def iterate(self) -> Lap:
        """Exhaust ``mappings()``; the operations are mappings, not runs."""
        watch = Stopwatch()
        with watch.running():
            nr_mappings = sum(run.length for run in self._thin.mappings())
        return watch.lap(nr_mappings)

    def close(self) -> None:
        """Close device and pool."""
        self._thin.close()
        self._pool.close()


class LmdbStore:
    """An LMDB environment without sync, through package lmdb."""

    def __init__(self, directory: Path, map_bytes: int) -> None:
        self._env = lmdb.open(str(directory), map_size=map_bytes, sync=False, metasync=False, lock=False)

    def insert(self, keys: Sequence[int], batch: int) -> Lap:
        """``put`` and ``commit``."""
        watch = Stopwatch()
        pack = _KEY.pack
        with watch.running():
            for begin in range(0, len(keys), batch):
                with self._env.begin(write=True) as transaction:
                    put = transaction.put
                    for key in keys[begin : begin + batch]:
                        put(pack(key), pack(key))
        return watch.lap(len(keys))

    def provision(self, keys: Sequence[int], batch: int) -> Lap:
        """The same as :meth:`insert`: LMDB has no data blocks to find."""
        return self.insert(keys, batch)

    def lookup(self, keys: Sequence[int]) -> Lap:
        """``get``, within one read transaction."""
        watch = Stopwatch()
        pack = _KEY.pack
        with self._env.begin() as transaction:
            get = transaction.get
            with watch.running():
                for key in keys:
                    get(pack(key))
        return watch.lap(len(keys))

    def remove(self, keys: Sequence[int], batch: int) -> Lap:
        """``delete`` and ``commit``."""
        watch = Stopwatch()
        pack = _KEY.pack
        with watch.running():
            for begin in range(0, len(keys), batch):
                with self._env.begin(write=True) as transaction:
                    delete = transaction.delete
                    for key in keys[begin : begin + batch]:
                        delete(pack(key))
        return watch.lap(len(keys))

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
