"""A pool to begin with, and one step of each kind that may be done to it, for tests that make each of them fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bufio import MemoryDevice
from thinpool import PoolMetadata, ThinDevice

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 4096
NR_METADATA_BLOCKS = 128
NR_DEVICE_BLOCKS = 160
"""The device has grown, and the metadata has not yet been told."""
NR_DATA_BLOCKS = 4000
FRESH_DATA_BLOCK = 3900
"""Allocated by hand, so that it can be mapped."""


def build() -> bytes:
    """A small pool with a bit of everything, closed.

    Device 0 has two leaves and shares one with its snapshot 1; 2 is empty, 3 to be deleted; transaction id 5.
    """
    device = MemoryDevice(NR_METADATA_BLOCKS * BLOCK)
    with PoolMetadata.format(device, 128, NR_DATA_BLOCKS) as pool:
        for dev in (0, 2, 3):
            pool.create_thin(dev)
        with pool.open_thin_device(0) as thin:
            thin.provision(0, 400)
            thin.provision(1000, 3)
        with pool.open_thin_device(3) as thin:
            thin.provision(10, 5)
        pool.commit()
        pool.create_snap(1, 0)
        with pool.open_thin_device(1) as thin:
            thin.insert_block(7, pool.alloc_data_block())
        pool.set_transaction_id(0, 5)
        pool.inc_data_range(FRESH_DATA_BLOCK, FRESH_DATA_BLOCK + 4)
    device.grow(NR_DEVICE_BLOCKS * BLOCK)
    return device.contents()


OWNED = dict.fromkeys(range(FRESH_DATA_BLOCK, FRESH_DATA_BLOCK + 4), 1)
"""Data blocks that are allocated but not mapped."""


def build_with_snap() -> bytes:
    """The same, and a metadata snapshot that is not the present state."""
    device = MemoryDevice(build())
    with PoolMetadata.open(device) as pool:
        pool.reserve_metadata_snap()
        pool.commit()
        with pool.open_thin_device(0) as thin:
            thin.insert_block(3, pool.alloc_data_block())
    return device.contents()


Step = "Callable[[PoolMetadata, ThinDevice], object]"

STEPS: dict[str, Callable[[PoolMetadata, ThinDevice], object]] = {
    "create_thin": lambda pool, thin: pool.create_thin(9),
    "create_snap": lambda pool, thin: pool.create_snap(9, 1),
    "create_snap_of_the_open_device": lambda pool, thin: pool.create_snap(9, 0),
    "delete_thin_device": lambda pool, thin: pool.delete_thin_device(3),
    "delete_shared_device": lambda pool, thin: pool.delete_thin_device(1),
    "insert_block": lambda pool, thin: thin.insert_block(5000, FRESH_DATA_BLOCK),
    "overwrite_block": lambda pool, thin: thin.insert_block(5, FRESH_DATA_BLOCK),
    "insert_range": lambda pool, thin: thin.insert_range(6000, FRESH_DATA_BLOCK, 4),
    "remove_block": lambda pool, thin: thin.remove_block(8),
    "remove_range": lambda pool, thin: thin.remove_range(100, 300),
    "remove_everything": lambda pool, thin: thin.remove_range(0, 1 << 64),
    "provision": lambda pool, thin: thin.provision(2000, 300),
    "alloc_data_block": lambda pool, thin: pool.alloc_data_block(),
    "inc_data_range": lambda pool, thin: pool.inc_data_range(0, 50),
    "dec_data_range": lambda pool, thin: pool.dec_data_range(FRESH_DATA_BLOCK, FRESH_DATA_BLOCK + 4),
    "resize_data_dev": lambda pool, thin: pool.resize_data_dev(40000),
    "resize_metadata_dev": lambda pool, thin: pool.resize_metadata_dev(NR_METADATA_BLOCKS + 20),
    "set_transaction_id": lambda pool, thin: pool.set_transaction_id(5, 6),
    "reserve_metadata_snap": lambda pool, thin: pool.reserve_metadata_snap(),
}
"""Each succeeds on the pool of :func:`build`, *thin* being device 0."""

STEPS_WITH_SNAP: dict[str, Callable[[PoolMetadata, ThinDevice], object]] = {
    "release_metadata_snap": lambda pool, thin: pool.release_metadata_snap(),
    "insert_beside_snap": lambda pool, thin: thin.insert_block(5, FRESH_DATA_BLOCK),
    "remove_range_beside_snap": lambda pool, thin: thin.remove_range(0, 100),
    "delete_beside_snap": lambda pool, thin: pool.delete_thin_device(1),
}
"""Each succeeds on the pool of :func:`build_with_snap`."""
