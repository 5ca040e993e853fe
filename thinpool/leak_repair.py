"""Give back blocks that are counted as in use and are not, and put right what the space maps say of themselves.

Source: docs/design.md, "Repair of leaks".
"""

from __future__ import annotations

from mmap import mmap
from typing import TYPE_CHECKING

from persistent_data.block_reader import BlockReader
from persistent_data.checksum import SUPERBLOCK_SALT, block_checksum
from persistent_data.damage import FATAL
from persistent_data.errors import MetadataError
from persistent_data.layout import BLOCK_SIZE, SPACE_MAP_ROOT
from persistent_data.space_map_repair import CountedMap, plan_repair
from thinpool.check import Counts, Observer, check
from thinpool.durable_superblock import make_superblock_durable
from thinpool.errors import Corrupt, ThinError, from_below
from thinpool.layout import SUPERBLOCK_FIELDS, SUPERBLOCK_LOCATION, Superblock
from thinpool.superblock_check import superblock_fault

if TYPE_CHECKING:
    from bufio.device import Device
    from persistent_data.space_map_repair import MapRepair, Repair
    from thinpool.layout import SpaceMapRoot


class LeakRepair:
    """What :func:`repair_leaks` did.

    :ivar data_leaks: data blocks given back
    :ivar metadata_leaks: metadata blocks given back
    :ivar has_written: false when there was nothing to put right
    """

    __slots__ = ("data_leaks", "has_written", "metadata_leaks")

    def __init__(self, data_leaks: int, metadata_leaks: int, has_written: bool) -> None:
        self.data_leaks = data_leaks
        self.metadata_leaks = metadata_leaks
        self.has_written = has_written

    def __repr__(self) -> str:
        return f"LeakRepair({self.data_leaks}, {self.metadata_leaks}, has_written={self.has_written})"


class _Listener(Observer):
    counts: Counts | None = None

    def counted(self, counts: Counts) -> None:
        self.counts = counts


def repair_leaks(device: Device, counts: Counts | None = None) -> LeakRepair:
    """Correct the counts of leaked blocks in both space maps, and every wrong nr_free, none_free_before, nr_allocated.

    What changes is written to free metadata blocks and flushed; then the superblock, in one sector, and flushed.  So a
    crash or an I/O error leaves the pool as it was, or repaired.  Nothing is written where nothing is wrong.

    :param counts: from the observer of a check of this device that found nothing fatal; None to check it now
    :raises Corrupt: the check finds something fatal, or a block is not as it was when it was counted
    :raises ThinError: there is no room for corrected space maps, or an I/O error; the message says what became of it
    """
    if counts is None:
        counts = _count(device)
        if counts is None:
            return LeakRepair(0, 0, has_written=False)
    reader = BlockReader(device)
    superblock = counts.superblock
    try:
        content = bytearray(reader.read(SUPERBLOCK_LOCATION))
        if superblock_fault(content, SUPERBLOCK_LOCATION) is not None or not _is_same(content, superblock):
            raise Corrupt(SUPERBLOCK_LOCATION, "the superblock has changed since the check: is the pool in use?")
        repair = plan_repair(
            reader,
            CountedMap(counts.data, counts.data_index, superblock.data_root.nr_allocated),
            CountedMap(counts.metadata, counts.metadata_index, superblock.metadata_root.nr_allocated),
        )
    except MetadataError as error:
        raise from_below(error) from error
    if repair.is_needed:
        _commit(device, content, superblock, repair)
    return LeakRepair(repair.data.nr_leaks, repair.metadata.nr_leaks, repair.is_needed)


def _count(device: Device) -> Counts | None:
    """Check the metadata; return its counts, None if there is nothing to repair."""
    listener = _Listener()
    for finding in check(device, observer=listener):
        if finding.severity == FATAL:
            raise Corrupt(finding.block, finding.rule, message=f"only leaks can be repaired: {finding.message}")
    # A large pool without any fault is not counted block by block.
    return listener.counts


def _is_same(content: bytearray, superblock: Superblock) -> bool:
    now = Superblock.unpack(content)
    return all(getattr(now, name) == getattr(superblock, name) for name in SUPERBLOCK_FIELDS)


def _commit(device: Device, content: bytearray, superblock: Superblock, repair: Repair) -> None:
    # Anonymous maps begin at a page, as devices opened with O_DIRECT demand.
    buffer = memoryview(mmap(-1, BLOCK_SIZE))
    try:
        make_superblock_durable(device)
        for block, new in repair.writes:
            buffer[:] = bytes(new)
            device.pwrite(buffer, block * BLOCK_SIZE)
        device.flush()
    except OSError as error:
        raise _failed(error, "the metadata is as it was") from error
    sb = Superblock.unpack(content)
    sb.data_space_map_root = _new_root(sb.data_space_map_root, superblock.data_root, repair.data)
    sb.metadata_space_map_root = _new_root(sb.metadata_space_map_root, superblock.metadata_root, repair.metadata)
    sb.pack_into(content)
    sb.csum = block_checksum(content, SUPERBLOCK_SALT)
    sb.pack_into(content)
    buffer[:] = bytes(content)
    try:
        device.pwrite(buffer, SUPERBLOCK_LOCATION * BLOCK_SIZE)
        device.flush()
    except OSError as error:
        raise _failed(error, "the metadata is either as it was or repaired; check it again") from error


def _new_root(blob: bytes, root: SpaceMapRoot, repair: MapRepair) -> bytes:
    new = SPACE_MAP_ROOT.pack(root.nr_blocks, repair.nr_allocated, repair.bitmap_root, root.ref_count_root)
    return new + blob[SPACE_MAP_ROOT.size :]


def _failed(error: OSError, outcome: str) -> ThinError:
    below = from_below(error)
    return ThinError(below.errno or 0, f"cannot write the repair: {below.strerror}: {outcome}")
