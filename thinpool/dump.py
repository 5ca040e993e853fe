"""Pass a pool's contents to a visitor: every device with its mappings as runs, shared parts once.

Mappings are streamed; what is in memory is described in :mod:`thinpool.leaf_lists`.  Large pools take array operations
(:mod:`thinpool.dump_batch`), which leave all that is not as usual to the plain code here.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from persistent_data.btree_walk import FIRST_KEY_LOW, LAST_KEY_HIGH, UNEVEN_DEPTH
from persistent_data.damage import FATAL, Damage, Fault
from persistent_data.layout import max_entries
from persistent_data.node_check import EMPTY_NODE, Node, check_node
from thinpool.ir import Device
from thinpool.layout import TIME_BITS, TIME_MASK
from thinpool.leaf_lists import Leaves
from thinpool.pool_reader import PoolReader
from thinpool.trees import DATA_BLOCK_OUTSIDE, MAPPING_KIND, MAPPING_TREE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import bufio.device
    from thinpool.ir import Superblock, Visitor
    from thinpool.trees import DeviceEntry

WORTH_BATCHES = 1000
"""Leaves from which on array operations are faster, the import of the array package included."""
NEXT_BLOCK = 1 << TIME_BITS
"""What two mappings of one run differ by: the following data block, the same time."""


class Options:
    """What to dump.

    :ivar metadata_snap: the metadata snapshot in place of the pool
    :ivar snap_block: the metadata block at which that snapshot must be, None for wherever it is
    :ivar skip_mappings: devices only
    :ivar dev_ids: devices to dump, None for all; ids that the pool has not are passed over
    :ivar expand_shared: repeat what devices share in each of them, rather than refer to it
    :ivar transaction: the transaction id to tell, if the superblock's is lower
    :ivar data_block_size: sectors to tell in place of the superblock's
    :ivar nr_data_blocks: data blocks to tell, and to accept, if the superblock says fewer
    :ivar mapping_root: metadata block of the mapping tree's root in place of the superblock's
    :ivar details_root: metadata block of the details tree's root in place of the superblock's
    """

    __slots__ = (
        "data_block_size",
        "details_root",
        "dev_ids",
        "expand_shared",
        "mapping_root",
        "metadata_snap",
        "nr_data_blocks",
        "skip_mappings",
        "snap_block",
        "transaction",
    )

    def __init__(
        self,
        *,
        metadata_snap: bool = False,
        skip_mappings: bool = False,
        dev_ids: Collection[int] | None = None,
        snap_block: int | None = None,
        expand_shared: bool = False,
        transaction: int = 0,
        data_block_size: int | None = None,
        nr_data_blocks: int = 0,
        mapping_root: int | None = None,
        details_root: int | None = None,
    ) -> None:
        self.metadata_snap = metadata_snap
        self.skip_mappings = skip_mappings
        self.dev_ids = dev_ids
        self.snap_block = snap_block
        self.expand_shared = expand_shared
        self.transaction = transaction
        self.data_block_size = data_block_size
        self.nr_data_blocks = nr_data_blocks
        self.mapping_root = mapping_root
        self.details_root = details_root


def dump(
    device: bufio.device.Device,
    visitor: Visitor,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Pass the pool on *device* to *visitor*.

    The superblock and all internal nodes are verified before the visitor is called for the first time; leaves are
    verified as they are read, so damage in a leaf ends a dump midway.

    :param progress: is told how many leaves have been read, and how many there are
    :raises Corrupt: at the first damage
    :raises ThinError: ENODATA, the metadata snapshot was asked for and there is none; EINVAL, it is at another block
    :raises OSError: the device cannot be read
    """
    options = options or Options()
    pool = PoolReader(
        device,
        options.metadata_snap,
        options.snap_block,
        mapping_root=options.mapping_root,
        details_root=options.details_root,
    )
    pool.nr_data_blocks = max(pool.nr_data_blocks, options.nr_data_blocks)
    devices = pool.devices()
    if options.dev_ids is not None:
        devices = [entry for entry in devices if entry.dev_id in options.dev_ids]
    leaves = _new_leaves(pool, devices)
    if not options.skip_mappings:
        for entry in devices:
            leaves.add_device(entry)
        leaves.finish()
        if not options.expand_shared:
            leaves.cut()
    visitor.begin_superblock(_superblock(pool, options))
    emitter = _new_emitter(pool, leaves, visitor, progress)
    if not (options.skip_mappings or options.expand_shared):
        emitter.shared_parts()
    for number, entry in enumerate(devices):
        visitor.begin_device(
            Device(
                dev_id=entry.dev_id,
                mapped_blocks=entry.mapped_blocks,
                transaction=entry.transaction_id,
                creation_time=entry.creation_time,
                snap_time=entry.snapshotted_time,
            )
        )
        if not options.skip_mappings:
            emitter.device(number, entry)
        visitor.end_device()
    visitor.end_superblock()


def _superblock(pool: PoolReader, options: Options) -> Superblock:
    """Return what to tell of the pool.

    A metadata snapshot has no number of data blocks of its own.  The pool's will do, for the data device does not
    shrink; with the 0 that the reference tools write nothing can be restored.
    """
    superblock = pool.describe()
    superblock.transaction = max(superblock.transaction, options.transaction)
    superblock.nr_data_blocks = pool.nr_data_blocks
    if options.data_block_size is not None:
        superblock.data_block_size = options.data_block_size
    return superblock


def _new_leaves(pool: PoolReader, devices: list[DeviceEntry]) -> Leaves:
    # What the details say may be wrong, which would be a waste of time here and nothing else.
    if sum(entry.mapped_blocks for entry in devices) < WORTH_BATCHES * max_entries(MAPPING_KIND.value_size):
        return Leaves(pool)
    from thinpool.leaf_arrays import LeafArrays

    return LeafArrays(pool)


def _new_emitter(
    pool: PoolReader, leaves: Leaves, visitor: Visitor, progress: Callable[[int, int], None] | None
) -> Emitter:
    if leaves.nr_to_read() < WORTH_BATCHES:
        return Emitter(pool, leaves, visitor, progress)
    from thinpool.dump_batch import BatchEmitter

    return BatchEmitter(pool, leaves, visitor, progress)


class Run:
    """The run that the next mapping may belong to; none yet if *length* is 0.

    :ivar begin: its first thin block
    :ivar value: the value of its first mapping, data block and time
    """

    __slots__ = ("begin", "length", "value")

    def __init__(self) -> None:
        self.begin = self.value = self.length = 0

    def end(self, visitor: Visitor) -> None:
        """Pass on the run: nothing follows that could belong to it."""
        if self.length:
            visitor.mapping(self.begin, self.value >> TIME_BITS, self.length, self.value & TIME_MASK)


class Emitter:
    """Reads leaves and passes what they hold to a visitor, as runs."""

    def __init__(
        self, pool: PoolReader, leaves: Leaves, visitor: Visitor, progress: Callable[[int, int], None] | None
    ) -> None:
        self._pool = pool
        self._leaves = leaves
        self._visitor = visitor
        self._progress = progress
        self._nr_done = 0
        self._nr_leaves = leaves.nr_to_read()
        self._part_sizes: dict[int, int] = {}
        """Mappings of each shared part, by the part's first leaf."""

    def shared_parts(self) -> None:
        """Pass on every shared part.

        :raises Corrupt: a leaf is damaged
        """
        for head in self._leaves.shared_heads():
            self._visitor.begin_shared(self._leaves.blocks[head])
            self._part_sizes[head] = self._stream(array("I", self._leaves.part(head)), None)
            self._visitor.end_shared()

    def device(self, number: int, entry: DeviceEntry) -> None:
        """Pass on a device's mappings and its references to shared parts.

        :raises Corrupt: a leaf is damaged, or the number of mappings is not that of the device's details
        """
        leaves = self._leaves
        found = 0
        for piece in leaves.pieces(number):
            if isinstance(piece, int):
                found += self._part_sizes[piece]
                self._visitor.shared(leaves.blocks[piece])
            else:
                found += self._stream(piece, entry)
        leaves.check_geometry(number, entry)
        self._pool.check_nr_mappings(entry, found)

    def _stream(self, leaves: array[int], entry: DeviceEntry | None) -> int:
        """Pass on the mappings of consecutive leaves as runs; return their number."""
        run = Run()
        found = self._pass_on(leaves, entry, run)
        run.end(self._visitor)
        return found

    def _pass_on(self, leaves: array[int], entry: DeviceEntry | None, run: Run) -> int:
        """Pass on the mappings of consecutive leaves, but for the last *run*; return their number."""
        mapping: Callable[[int, int, int, int], None] = self._visitor.mapping
        found = 0
        begin, value, length = run.begin, run.value, run.length
        next_key, next_value = begin + length, value + length * NEXT_BLOCK
        blocks = self._leaves.blocks
        for block, content in self._pool.reader.read_in_order(blocks[leaf] for leaf in leaves):
            node = self._check(self._leaves.number(block), block, content, entry)
            found += len(node.keys)
            for key, mapped in zip(node.keys, node.numbers(), strict=True):
                if key == next_key and mapped == next_value and length:
                    length += 1
                else:
                    if length:
                        mapping(begin, value >> TIME_BITS, length, value & TIME_MASK)
                    begin, value, length = key, mapped, 1
                next_key = key + 1
                next_value = mapped + NEXT_BLOCK
            self._done(1)
        run.begin, run.value, run.length = begin, value, length
        return found

    def _done(self, nr_leaves: int) -> None:
        self._nr_done += nr_leaves
        if self._progress is not None:
            self._progress(self._nr_done, self._nr_leaves)

    def _check(self, leaf: int, block: int, content: bytes, entry: DeviceEntry | None) -> Node:
        """Verify everything about a leaf, in the context of all its parents."""
        leaves = self._leaves
        low, high = leaves.lowest[leaf], leaves.highest[leaf]
        is_root = bool(leaves.is_root[leaf])
        node, faults = check_node(content, block, MAPPING_KIND.value_size, is_root)
        faults = [fault for fault in faults if fault.severity == FATAL]
        if node is not None and not faults:
            if not node.is_leaf:
                faults.append(Fault(UNEVEN_DEPTH, "an internal node among leaves"))
            elif node.keys:
                self._check_content(node, low, high, faults)
            elif not is_root:
                faults.append(Fault(EMPTY_NODE))
        for fault in faults:
            path, dev_id = self._leaves.locate(leaf, entry)
            self._pool.refuse(Damage(fault, path, low, max(low, high) + 1), MAPPING_TREE, dev_id)
        assert node is not None
        leaves.geometry[leaf] = node.max_entries
        return node

    def _check_content(self, node: Node, low: int, high: int, faults: list[Fault]) -> None:
        first, last = node.keys[0], node.keys[-1]
        if first < low:
            faults.append(Fault(FIRST_KEY_LOW, f"key {first}, where a parent says {low}"))
        if last > high:
            faults.append(Fault(LAST_KEY_HIGH, f"key {last}, where a parent ends at {high}"))
        # The data block is the upper part of the value, so the largest value has the largest block.
        highest = max(node.numbers()) >> TIME_BITS
        if highest >= self._pool.nr_data_blocks:
            detail = f"a mapping leads to data block {highest} of {self._pool.nr_data_blocks}"
            faults.append(Fault(DATA_BLOCK_OUTSIDE, detail))
