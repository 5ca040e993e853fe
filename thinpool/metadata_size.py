"""How large the metadata device of a pool should be.

The estimate lets every data block be mapped once, in btree leaves that are half full, and adds a block for each thin
device.  Leaves that were shared and have come to differ map the data blocks they still share twice; that is not in it.
Source: docs/tools/thin_metadata_size.md, "The estimate".
"""

from __future__ import annotations

from persistent_data.layout import BLOCK_SIZE, MAX_METADATA_BLOCKS, SECTOR_SHIFT, max_entries
from thinpool.layout import MAX_DATA_BLOCK_SIZE, MIN_DATA_BLOCK_SIZE

_MAPPING_SIZE = 8
_MAPPINGS_PER_LEAF = max_entries(_MAPPING_SIZE) // 2
"""126: a leaf that has just been split, or whose neighbour could not take it in, is half full."""


class SizeEstimate:
    """What :func:`estimate` comes to.

    :ivar nr_blocks_wanted: metadata blocks of 4096 bytes, without regard to how many a pool can use
    """

    __slots__ = ("nr_blocks_wanted",)

    def __init__(self, nr_blocks_wanted: int) -> None:
        self.nr_blocks_wanted = nr_blocks_wanted

    @property
    def nr_blocks(self) -> int:
        """Metadata blocks to make the device of: the wanted ones, but no more than a pool can use."""
        return min(self.nr_blocks_wanted, MAX_METADATA_BLOCKS)

    @property
    def nr_bytes(self) -> int:
        """:attr:`nr_blocks` in bytes."""
        return self.nr_blocks * BLOCK_SIZE

    @property
    def limited(self) -> bool:
        """True when a pool of that shape may run out of metadata however large its metadata device is."""
        return self.nr_blocks_wanted > MAX_METADATA_BLOCKS


def estimate(data_block_size_bytes: int, pool_size_bytes: int, max_thins: int) -> SizeEstimate:
    """Return the size of the metadata for a pool of *pool_size_bytes* of data.

    :param max_thins: thin devices and snapshots, at most at any one time
    :raises ValueError: no pool can be made so; the argument is a sentence that says why
    """
    block_size_step = MIN_DATA_BLOCK_SIZE << SECTOR_SHIFT
    if not data_block_size_bytes or data_block_size_bytes % block_size_step:
        raise ValueError("block size must be a multiple of 64 KiB")
    if data_block_size_bytes > MAX_DATA_BLOCK_SIZE << SECTOR_SHIFT:
        raise ValueError("maximum block size is 1 GiB")
    if pool_size_bytes < data_block_size_bytes:
        raise ValueError("pool size must be larger than block size")
    # A partial data block at the end is out of the pool's reach, a partial leaf is a leaf.
    nr_data_blocks = pool_size_bytes // data_block_size_bytes
    nr_leaves = -(-nr_data_blocks // _MAPPINGS_PER_LEAF)
    return SizeEstimate(1 + nr_leaves + max_thins)
