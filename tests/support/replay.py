"""One list of operations, executed by the kernel's pool target and by our engine, for comparison block by block.

What the pool target does with its metadata, as found by experiment (Linux 6.1.176; each line is pinned by
tests/kernel/test_replay.py, which would differ in block numbers if it were wrong):

====================  =============================================================================================
the operation         calls on the metadata
====================  =============================================================================================
pool table, resume    open (formatting zeros), resize_data_dev to the table's size, commit; nothing if of that size
create_thin           create_thin, commit: each successful message is followed by a commit
create_snap           create_snap, commit
delete                delete_thin_device, commit
set_transaction_id    set_transaction_id, commit
reserve_metadata_snap commit, reserve_metadata_snap, commit
release_metadata_snap release_metadata_snap, commit
thin table            open_thin_device; its removal: close, without a commit
write, block unmapped find_block, alloc_data_block, insert_block
write, block shared   find_block, alloc_data_block, insert_block (after the copy)
discard               remove_range, once for each bio; blocks that it covers in part do not count
flush, device changed commit; without a change of that device a flush does nothing
status                commit
suspend of the pool   commit
table of another size suspend: commit; resume: resize_data_dev, then resize_metadata_dev, then one commit
removal of the pool   suspend: commit; close
about once a second   commit, if a device changed and more than a second has passed since the last *flush or timed*
                      commit (those after messages and status do not count), once the bios at hand are done
====================  =============================================================================================

The last line is the only one that depends on time.  So the first change of each transaction is committed on its own
(see ``begin_transaction`` in ``uml/agent.py``), with a flush: now a second begins in which the kernel leaves the rest
alone.  Transactions are short, commits are flushes where possible, and before each commit the superblock is compared:
if it changed too early, :class:`EarlyCommitError` is raised and :func:`replay_in_kernel` starts over.

The pool runs with skip_block_zeroing, and writes are synchronous, so allocations come in the order of the writes.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from tests.support.image import BLOCK, Image
from tests.support.kernel import KernelRunError, StepResults, Steps, make_sparse, run_steps
from thinpool.errors import NotMapped
from thinpool.metadata import PoolMetadata
from thinpool.thin_device import ThinDevice

#: Every thin device is this long, in data blocks: any key a test uses fits, and so does 64 KiB times it.
THIN_BLOCKS = 1 << 36

#: Attempts before a machine that is too slow for the kernel's timed commits is given up on.
ATTEMPTS = 6


@dataclass(frozen=True)
class CreateThin:
    dev: int


@dataclass(frozen=True)
class CreateSnap:
    dev: int
    origin: int


@dataclass(frozen=True)
class Delete:
    dev: int


@dataclass(frozen=True)
class Activate:
    """Open the device; it stays open until it is deactivated."""

    dev: int


@dataclass(frozen=True)
class Deactivate:
    dev: int


@dataclass(frozen=True)
class Write:
    """Write to each of the blocks, in this order; no commit."""

    dev: int
    blocks: tuple[int, ...]

    @classmethod
    def to(cls, dev: int, blocks: Iterable[int]) -> "Write":
        """Write to any iterable of blocks."""
        return cls(dev, tuple(blocks))


@dataclass(frozen=True)
class Discard:
    """Discard [begin, end) of an active device in one bio; no commit."""

    dev: int
    begin: int
    end: int


@dataclass(frozen=True)
class Commit:
    pass


@dataclass(frozen=True)
class SetTransactionId:
    current: int
    new: int


@dataclass(frozen=True)
class ReserveMetadataSnap:
    pass


@dataclass(frozen=True)
class ReleaseMetadataSnap:
    pass


@dataclass(frozen=True)
class ResizeData:
    nr_blocks: int


@dataclass(frozen=True)
class ResizeMetadata:
    nr_blocks: int


@dataclass(frozen=True)
class Reopen:
    """Close every device and the pool, open the pool again (as large as it is)."""


@dataclass(frozen=True)
class Checkpoint:
    """The metadata device as it is now is a result; comes after a commit."""


Operation: TypeAlias = (
    CreateThin
    | CreateSnap
    | Delete
    | Activate
    | Deactivate
    | Write
    | Discard
    | Commit
    | SetTransactionId
    | ReserveMetadataSnap
    | ReleaseMetadataSnap
    | ResizeData
    | ResizeMetadata
    | Reopen
    | Checkpoint
)

#: The operations that the pool target does not follow with a commit.
UNCOMMITTED = (Write, Discard, Activate, Deactivate, Checkpoint)


@dataclass(frozen=True)
class Geometry:
    """The pool to begin with; the images are made as large as the operations let them become."""

    metadata_blocks: int
    data_blocks: int
    data_block_size: int = 128
    start: bytes = field(default=b"", repr=False)
    """The metadata device to begin with, of that size; none: a new pool."""
    settle: bool = True
    """Commit the first change of each transaction on its own.  Without, only a fast machine succeeds."""

    @classmethod
    def of(cls, start: bytes) -> "Geometry":
        """The pool that is on a metadata device."""
        superblock = Image.from_bytes(start).superblock()
        return cls(len(start) // BLOCK, superblock.data_map.nr_blocks, superblock.data_block_size, start)

    def make_metadata(self, path: Path, nr_blocks: int) -> Path:
        """The image to begin with, *nr_blocks* long."""
        path.write_bytes(self.start)
        os.truncate(path, nr_blocks * BLOCK)
        return path


class EarlyCommitError(KernelRunError):
    """The kernel committed in the middle of a transaction, because that took too long."""


# ---- the kernel


def kernel_steps(geometry: Geometry, operations: Sequence[Operation]) -> tuple[Steps, list[int]]:
    """The steps for the guest's agent, and the indices of those that say whether a transaction was left in peace."""
    steps = Steps()
    guards: list[int] = []
    data_blocks = geometry.data_blocks
    active: list[int] = []
    dirty: int | None = None
    """The device that changed last, in this transaction."""

    def pool_create() -> None:
        steps.pool_create(geometry.data_block_size, data_blocks)

    def change(dev: int) -> None:
        nonlocal dirty
        if dirty is None:
            steps.add("begin_transaction", settle=geometry.settle)
        dirty = dev

    def commit_follows() -> None:
        nonlocal dirty
        if dirty is not None:
            guards.append(steps.add("same_transaction"))
            dirty = None

    steps.add("meta_window", sectors=geometry.metadata_blocks * BLOCK // 512)
    pool_create()
    for operation in operations:
        changed = dirty
        if not isinstance(operation, UNCOMMITTED):
            commit_follows()
        match operation:
            case CreateThin(dev):
                steps.message(f"create_thin {dev}")
            case CreateSnap(dev, origin):
                steps.add("snap", dev=dev, origin=origin)
            case Delete(dev):
                steps.message(f"delete {dev}")
            case Activate(dev):
                steps.add("activate", dev=dev, blocks=THIN_BLOCKS)
                active.append(dev)
            case Deactivate(dev):
                steps.add("deactivate", dev=dev)
                active.remove(dev)
            case Write(dev, blocks):
                change(dev)
                steps.write(dev, blocks, seed=0)
            case Discard(dev, begin, end):
                change(dev)
                steps.add("discard", dev=dev, begin=begin, end=end)
            case Commit():
                if changed in active:
                    steps.add("flush", dev=changed)
                else:
                    steps.add("status")
            case SetTransactionId(current, new):
                steps.message(f"set_transaction_id {current} {new}")
            case ReserveMetadataSnap():
                steps.message("reserve_metadata_snap")
            case ReleaseMetadataSnap():
                steps.message("release_metadata_snap")
            case ResizeData(nr_blocks):
                data_blocks = nr_blocks
                steps.pool_reload(geometry.data_block_size, data_blocks)
            case ResizeMetadata(nr_blocks):
                steps.add("meta_window", sectors=nr_blocks * BLOCK // 512)
                steps.pool_reload(geometry.data_block_size, data_blocks)
            case Reopen():
                steps.add("pool_remove")
                active.clear()
                pool_create()
            case Checkpoint():
                steps.add("checkpoint")
    commit_follows()
    return steps, guards


def largest(geometry: Geometry, operations: Iterable[Operation]) -> tuple[int, int]:
    """(metadata blocks, data blocks) that the images need."""
    metadata, data = geometry.metadata_blocks, geometry.data_blocks
    for operation in operations:
        match operation:
            case ResizeMetadata(nr_blocks):
                metadata = max(metadata, nr_blocks)
            case ResizeData(nr_blocks):
                data = max(data, nr_blocks)
    return metadata, data


def replay_in_kernel(geometry: Geometry, operations: Sequence[Operation], directory: Path) -> list[Image]:
    """The metadata device at each checkpoint, as the kernel wrote it."""
    for attempt in range(ATTEMPTS):
        try:
            return _replay_in_kernel(geometry, operations, directory)
        except EarlyCommitError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("not reached")


def _replay_in_kernel(geometry: Geometry, operations: Sequence[Operation], directory: Path) -> list[Image]:
    metadata_blocks, data_blocks = largest(geometry, operations)
    meta = geometry.make_metadata(directory / "kernel.meta", metadata_blocks)
    data = make_sparse(directory / "kernel.data", data_blocks * geometry.data_block_size * 512)
    steps, guards = kernel_steps(geometry, operations)
    results: StepResults = run_steps(steps, meta=meta, data=data)
    early = [i for i in guards if not results.values[i]]
    if early:
        raise EarlyCommitError(f"steps {early}: the kernel committed before it was told to")
    return results.checkpoints


# ---- our engine


class EngineReplay:
    """The same operations as calls on our engine, on an image file."""

    def __init__(self, geometry: Geometry, path: Path, metadata_blocks: int) -> None:
        self.path = path
        self.metadata_blocks = metadata_blocks
        geometry.make_metadata(path, geometry.metadata_blocks)
        self.pool = PoolMetadata.open(path, geometry.data_block_size, format_device=True)
        if self.pool.data_dev_size != geometry.data_blocks:
            self.pool.resize_data_dev(geometry.data_blocks)
            self.pool.commit()
        self.data_block_size = geometry.data_block_size
        self.settle = geometry.settle
        self.settled = not self.settle
        self.thins: dict[int, ThinDevice] = {}
        self.checkpoints: list[Image] = []

    def write(self, dev: int, block: int) -> None:
        """A write: allocates where nothing is mapped or what is mapped is shared."""
        thin = self.thins[dev]
        try:
            if not thin.find_block(block).shared:
                return
        except NotMapped:
            pass
        thin.insert_block(block, self.pool.alloc_data_block())
        self.changed()

    def changed(self) -> None:
        """Commit the first change of a transaction on its own, as the kernel is made to."""
        if not self.settled:
            self.pool.commit()
            self.settled = True

    def close(self) -> None:
        """Close every device, then the pool."""
        for thin in self.thins.values():
            thin.close()
        self.thins.clear()
        self.pool.close()

    def apply(self, operation: Operation) -> None:
        """Execute one operation as the pool target does."""
        pool = self.pool
        if not isinstance(operation, UNCOMMITTED):
            self.settled = not self.settle
        match operation:
            case CreateThin(dev):
                pool.create_thin(dev)
                pool.commit()
            case CreateSnap(dev, origin):
                pool.create_snap(dev, origin)
                pool.commit()
            case Delete(dev):
                pool.delete_thin_device(dev)
                pool.commit()
            case Activate(dev):
                self.thins[dev] = pool.open_thin_device(dev)
            case Deactivate(dev):
                self.thins.pop(dev).close()
            case Write(dev, blocks):
                for block in blocks:
                    self.write(dev, block)
            case Discard(dev, begin, end):
                self.thins[dev].remove_range(begin, end)
                self.changed()
            case Commit():
                pool.commit()
            case SetTransactionId(current, new):
                pool.set_transaction_id(current, new)
                pool.commit()
            case ReserveMetadataSnap():
                pool.commit()
                pool.reserve_metadata_snap()
                pool.commit()
            case ReleaseMetadataSnap():
                pool.release_metadata_snap()
                pool.commit()
            case ResizeData(nr_blocks):
                pool.commit()
                pool.resize_data_dev(nr_blocks)
                pool.commit()
            case ResizeMetadata(nr_blocks):
                pool.commit()
                with self.path.open("r+b") as f:
                    f.truncate(nr_blocks * BLOCK)
                pool.resize_metadata_dev(nr_blocks)
                pool.commit()
            case Reopen():
                pool.commit()
                self.close()
                self.pool = PoolMetadata.open(self.path, self.data_block_size)
            case Checkpoint():
                self.checkpoints.append(self.image())

    def image(self) -> Image:
        """What the file holds, as long as the device that the kernel's checkpoints are taken from."""
        return Image(Image.load(self.path).blocks, self.metadata_blocks)


def replay_in_engine(geometry: Geometry, operations: Sequence[Operation], directory: Path) -> list[Image]:
    """The metadata device at each checkpoint, as our engine wrote it."""
    metadata_blocks, _ = largest(geometry, operations)
    engine = EngineReplay(geometry, directory / "engine.meta", metadata_blocks)
    try:
        for operation in operations:
            engine.apply(operation)
    finally:
        engine.close()
    return engine.checkpoints
