"""Pools that pass between the kernel and our engine, and the plain dicts that say what must be in them.

A :class:`World` is a pool: two image files, and for each device a dict from virtual block to the mark that a read of
it must return.  A leg changes both, either through our engine (:class:`OurLeg`) or in a booted kernel
(:class:`KernelLeg`); the two have the same methods, so a scenario is written once and run in both orders.

A mark is what the first sector of a data block says: (kind, number, seed), as in ``uml/agent.py``.  Each leg writes
with a seed of its own, so a block that was left over from another leg, device or place never passes for the right one.
"""

from __future__ import annotations

import os
import struct
from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bufio.device import FileDevice
from tests.support import fixtures, peers
from tests.support.image import BLOCK, Image
from tests.support.kernel import StepResults, Steps, in_runs, make_sparse, marks_in, run_steps, stamp
from thinpool.check import check
from thinpool.errors import NotMapped
from thinpool.metadata import PoolMetadata

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from thinpool.thin_device import ThinDevice

Mark = tuple[int, int, int]
Blocks = dict[int, Mark]

ZEROS: Mark = (0, 0, 0)

#: The kernel's limit on the size of a device, less than a file's: 4 EiB.
LARGEST_DEVICE_BYTES = 1 << 62

#: Blocks without a mapping that are read for each device, besides all that have one.
PROBES = 60


class World:
    """One pool, and what must be in it.

    :ivar devices: what each block of each device reads as; a block that is not in the dict has no mapping
    :ivar leaks: data blocks may be allocated without being mapped, because the power was cut
    """

    def __init__(
        self, directory: Path, *, block: int = 128, data_blocks: int = 16384, metadata_blocks: int = 1024
    ) -> None:
        self.block = block
        self.data_blocks = data_blocks
        self.metadata_blocks = metadata_blocks
        self.meta = make_sparse(directory / "meta", metadata_blocks * BLOCK)
        self.data = make_sparse(directory / "data", data_blocks * block * 512)
        self.devices: dict[int, Blocks] = {}
        self.transaction_id = 0
        self.held = False
        self.leaks = False
        self.legs = 0

    @classmethod
    def of_image(cls, directory: Path, content: bytes) -> World:
        """The pool on a metadata device that the kernel wrote; each of its data blocks holds its own number."""
        image = Image.from_bytes(content)
        superblock = image.superblock()
        world = cls(
            directory,
            block=superblock.data_block_size,
            data_blocks=superblock.data_map.nr_blocks,
            metadata_blocks=superblock.metadata_map.nr_blocks,
        )
        world.meta.write_bytes(content)
        mappings = image.mappings()
        stamp(world.data, world.block, {data for blocks in mappings.values() for data, _ in blocks.values()})
        for dev, blocks in mappings.items():
            world.devices[dev] = {v: (1, data, 0) for v, (data, _) in blocks.items()}
        world.transaction_id = superblock.transaction_id
        world.held = superblock.held_root != 0
        world.leaks = image.counts("data") != image.recount()[1]
        return world

    @property
    def thin_blocks(self) -> int:
        """The size of every thin device, in data blocks."""
        return LARGEST_DEVICE_BYTES // (self.block * 512)

    # ---- legs

    @contextmanager
    def ours(self) -> Iterator[OurLeg]:
        """Change the pool with our engine; at the end it is committed, closed and verified."""
        leg = OurLeg(self)
        try:
            yield leg
        except BaseException:
            leg.discard_everything()
            raise
        leg.finish()
        self.verify()

    @contextmanager
    def kernel(self, *features: str) -> Iterator[KernelLeg]:
        """Change the pool in a kernel, which first reads every block of every device; at the end it is verified.

        :param features: of the pool's table, in place of ``skip_block_zeroing``
        """
        leg = KernelLeg(self, *features)
        yield leg
        leg.finish()
        self.verify(leg.status)

    # ---- what must hold between legs

    def verify(self, status: bytes | None = None) -> None:
        """What is on the disk, what our engine tells of it, and the dicts are the same; both checks are content.

        :param status: what the kernel said at its end, to be compared with what we say
        """
        image = Image.load(self.meta)
        self._verify_image(image)
        self._verify_engine(image, status)
        with FileDevice(self.meta, read_only=True) as device:
            findings = [f for f in check(device) if f.severity != "advisory"]
        if self.leaks:
            findings = [f for f in findings if "leak" not in f.rule]
        assert not findings, f"our check finds {findings[0]}"
        if peers.is_available():
            peers.assert_accepted(self.meta)

    def _verify_image(self, image: Image) -> None:
        superblock = image.superblock()
        assert superblock.transaction_id == self.transaction_id
        assert (superblock.held_root != 0) == self.held
        assert superblock.data_map.nr_blocks == self.data_blocks
        assert superblock.metadata_map.nr_blocks == self.metadata_blocks
        mappings = image.mappings()
        assert mappings.keys() == self.devices.keys() == image.devices().keys()
        for dev, blocks in mappings.items():
            expected = self.devices[dev]
            assert blocks.keys() == expected.keys(), f"device {dev} maps other blocks"
            assert image.devices()[dev].mapped_blocks == len(expected)
            keys = list(expected)
            found = marks_in(self.data, self.block, [blocks[k][0] for k in keys])
            wrong = [(k, blocks[k], f, expected[k]) for k, f in zip(keys, found, strict=True) if f != expected[k]]
            assert not wrong, (
                f"device {dev}: block {wrong[0][0]} is mapped to {wrong[0][1]}, which holds {wrong[0][2:]}"
            )
        metadata_counts, data_counts = image.recount()
        assert image.counts("metadata") == metadata_counts
        in_use = image.counts("data")
        if self.leaks:
            in_use = {b: n for b, n in in_use.items() if b in data_counts}
        assert in_use == data_counts

    def _verify_engine(self, image: Image, status: bytes | None) -> None:
        mappings = image.mappings()
        details = image.devices()
        with PoolMetadata.open(self.meta, read_only=True) as pool:
            assert pool.data_block_size == self.block
            assert pool.transaction_id == self.transaction_id
            assert (pool.metadata_snap or 0) == image.superblock().held_root
            assert {dev: tuple(d) for dev, d in details.items()} == {
                dev: (d.mapped_blocks, d.transaction_id, d.creation_time, d.snapshotted_time)
                for dev, d in pool.devices().items()
            }
            if status is not None:
                self._verify_status(pool, status)
            for dev, blocks in mappings.items():
                with pool.open_thin_device(dev) as thin:
                    found = {
                        run.thin_begin + i: (run.data_begin + i, run.time)
                        for run in thin.mappings()
                        for i in range(run.length)
                    }
                    assert found == blocks, f"our iteration over device {dev}"
                    assert thin.mapped_count == len(blocks)
                    assert thin.highest_mapped_block == (max(blocks) if blocks else None)
                    for key in list(blocks)[:: max(1, len(blocks) // 50)]:
                        result = thin.find_block(key)
                        assert result.block == blocks[key][0]
                        assert result.shared == (details[dev].snapshotted_time > blocks[key][1])

    def _verify_status(self, pool: PoolMetadata, status: bytes) -> None:
        kernel, thins = fixtures.read_status(status)
        assert kernel is not None, f"the kernel's pool failed: {status.decode()}"
        assert kernel.transaction_id == pool.transaction_id
        assert kernel.metadata_snap == pool.metadata_snap
        assert kernel.nr_data_blocks == pool.data_dev_size
        assert kernel.used_data_blocks == pool.data_dev_size - pool.free_block_count
        assert kernel.nr_metadata_blocks == pool.metadata_dev_size
        assert kernel.used_metadata_blocks == pool.metadata_dev_size - pool.free_metadata_block_count
        assert kernel.needs_check == pool.needs_check
        for dev, thin in thins.items():
            with pool.open_thin_device(dev) as device:
                assert thin.mapped == device.mapped_count * self.block
                highest = device.highest_mapped_block
                assert thin.highest_mapped == (None if highest is None else (highest + 1) * self.block - 1)


class Leg(ABC):
    """What can be done to a pool.  Every method changes the world's dicts, then the pool."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.legs += 1
        self.seed = world.legs

    def create(self, dev: int) -> None:
        """A new empty device."""
        self.world.devices[dev] = {}
        self._create(dev)

    def snap(self, dev: int, origin: int) -> None:
        """A snapshot."""
        self.world.devices[dev] = dict(self.world.devices[origin])
        self._snap(dev, origin)

    def delete(self, dev: int) -> None:
        """Delete a device."""
        del self.world.devices[dev]
        self._delete(dev)

    def write(self, dev: int, blocks: Iterable[int]) -> None:
        """Write a mark to each of the blocks, in this order."""
        blocks = list(blocks)
        self.world.devices[dev].update((b, (2, b, self.seed << 24 | dev)) for b in blocks)
        self._write(dev, blocks)

    def discard(self, dev: int, begin: int, end: int) -> None:
        """Discard [begin, end)."""
        mapped = self.world.devices[dev]
        for block in range(begin, end) if end - begin < len(mapped) else list(mapped):
            if begin <= block < end:
                mapped.pop(block, None)
        self._discard(dev, begin, end)

    def set_transaction_id(self, new: int) -> None:
        """Change the transaction id."""
        current, self.world.transaction_id = self.world.transaction_id, new
        self._set_transaction_id(current, new)

    def reserve(self) -> None:
        """Take a metadata snapshot."""
        self.world.held = True
        self._reserve()

    def release(self) -> None:
        """Release the metadata snapshot."""
        self.world.held = False
        self._release()

    def grow_data(self, nr_blocks: int) -> None:
        """Grow the data device to *nr_blocks*."""
        self.world.data_blocks = nr_blocks
        os.truncate(self.world.data, nr_blocks * self.world.block * 512)
        self._grow_data(nr_blocks)

    def grow_metadata(self, nr_blocks: int) -> None:
        """Grow the metadata device to *nr_blocks*."""
        self.world.metadata_blocks = nr_blocks
        os.truncate(self.world.meta, nr_blocks * BLOCK)
        self._grow_metadata(nr_blocks)

    @abstractmethod
    def commit(self) -> None:
        """Commit what was changed so far."""

    @abstractmethod
    def _create(self, dev: int) -> None: ...
    @abstractmethod
    def _snap(self, dev: int, origin: int) -> None: ...
    @abstractmethod
    def _delete(self, dev: int) -> None: ...
    @abstractmethod
    def _write(self, dev: int, blocks: list[int]) -> None: ...
    @abstractmethod
    def _discard(self, dev: int, begin: int, end: int) -> None: ...
    @abstractmethod
    def _set_transaction_id(self, current: int, new: int) -> None: ...
    @abstractmethod
    def _reserve(self) -> None: ...
    @abstractmethod
    def _release(self) -> None: ...
    @abstractmethod
    def _grow_data(self, nr_blocks: int) -> None: ...
    @abstractmethod
    def _grow_metadata(self, nr_blocks: int) -> None: ...


class OurLeg(Leg):
    """Changes through our engine, at once; the blocks are written to the data image here."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        new = Image.load(world.meta).block(0) == bytes(BLOCK)
        self.pool = PoolMetadata.open(world.meta, world.block, format_device=new)
        if new:
            self.pool.resize_data_dev(world.data_blocks)
            self.pool.commit()
        self.thins: dict[int, ThinDevice] = {}

    def thin(self, dev: int) -> ThinDevice:
        """The open handle of a device."""
        if dev not in self.thins:
            self.thins[dev] = self.pool.open_thin_device(dev)
        return self.thins[dev]

    def finish(self) -> None:
        """Close everything, which commits."""
        for thin in self.thins.values():
            thin.close()
        self.pool.close()

    def discard_everything(self) -> None:
        """Give up after a failed test."""
        for thin in self.thins.values():
            thin.close()
        self.pool.abort()
        self.pool.close()

    def commit(self) -> None:
        self.pool.commit()

    def _create(self, dev: int) -> None:
        self.pool.create_thin(dev)
        self.pool.commit()

    def _snap(self, dev: int, origin: int) -> None:
        self.pool.create_snap(dev, origin)
        self.pool.commit()

    def _delete(self, dev: int) -> None:
        if dev in self.thins:
            self.thins.pop(dev).close()
        self.pool.delete_thin_device(dev)
        self.pool.commit()

    def _write(self, dev: int, blocks: list[int]) -> None:
        thin = self.thin(dev)
        unit = self.world.block * 512
        with self.world.data.open("r+b") as data:
            for block in blocks:
                try:
                    found = thin.find_block(block)
                    target = None if found.shared else found.block
                except NotMapped:
                    target = None
                if target is None:
                    target = self.pool.alloc_data_block()
                    thin.insert_block(block, target)
                data.seek(target * unit)
                data.write(written_mark(self.seed, dev, block))

    def _discard(self, dev: int, begin: int, end: int) -> None:
        self.thin(dev).remove_range(begin, end)

    def _set_transaction_id(self, current: int, new: int) -> None:
        self.pool.set_transaction_id(current, new)

    def _reserve(self) -> None:
        self.pool.reserve_metadata_snap()

    def _release(self) -> None:
        self.pool.release_metadata_snap()

    def _grow_data(self, nr_blocks: int) -> None:
        self.pool.resize_data_dev(nr_blocks)
        self.pool.commit()

    def _grow_metadata(self, nr_blocks: int) -> None:
        self.pool.resize_metadata_dev(nr_blocks)
        self.pool.commit()


def written_mark(seed: int, dev: int, block: int) -> bytes:
    """The sector that the agent's ``write`` writes."""
    return struct.pack("<8sQQQ", b"kr-wrote", seed, dev, block) + bytes(512 - 32)


class KernelLeg(Leg):
    """Changes in a kernel; they are collected, and executed in one boot when the leg ends.

    :ivar status: what ``dmsetup status`` printed at the end
    :ivar values: the result of each step, after the run
    """

    def __init__(self, world: World, *features: str) -> None:
        super().__init__(world)
        self.features = features or ("skip_block_zeroing",)
        self.steps = Steps()
        self.status = b""
        self.expected_errors: dict[int, int] = {}
        self.possible_errors: dict[int, int] = {}
        self.active: set[int] = set()
        self.reads: list[tuple[int, int, Blocks]] = []
        """(step, device, what the step must read)"""
        self.statuses: list[int] = []
        self.values: list[Any] = []
        self.meta_size = world.metadata_blocks
        self.steps.add("meta_window", sectors=world.metadata_blocks * BLOCK // 512)
        self.steps.pool_create(world.block, world.data_blocks, self.features)
        self.read_everything()

    def activate(self, dev: int) -> None:
        """Activate a device, once."""
        if dev not in self.active:
            self.active.add(dev)
            self.steps.add("activate", dev=dev, blocks=self.world.thin_blocks)

    def read_everything(self) -> None:
        """Read every block of every device, and some that must not be there.

        Of a snapshot that is still what its origin is, each tenth block will do: the two share all of their tree.
        """
        whole: list[Blocks] = []
        for dev, every_block in self.world.devices.items():
            blocks = every_block
            if any(every_block == other for other in whole):
                blocks = {b: every_block[b] for b in sorted(every_block)[::10]}
            else:
                whole.append(every_block)
            self.activate(dev)
            ends = [end for _, end in in_runs(sorted(blocks))][:PROBES]
            probes = {b for b in (0, 1, *ends) if b < self.world.thin_blocks and b not in every_block}
            expected = {b: blocks.get(b, ZEROS) for b in sorted(blocks.keys() | probes)}
            self.reads.append((self.steps.marks(dev, expected), dev, expected))

    def fails(self, step: int, number: int) -> None:
        """The step must fail with this errno."""
        self.steps.steps[step][1]["may_fail"] = True
        self.expected_errors[step] = number

    def may_fail(self, step: int, number: int) -> None:
        """The step may fail with this errno: the kernel also commits by itself, each second."""
        self.steps.steps[step][1]["may_fail"] = True
        self.possible_errors[step] = number

    def run(self, cut: bool = False) -> StepResults:
        """Boot, execute, and compare what was read with what had to be."""
        results = run_steps(self.steps, meta=self.world.meta, data=self.world.data, cut=cut)
        possible = {step: at for step, at in self.possible_errors.items() if results.errnos.get(step) == at}
        assert results.errnos == self.expected_errors | possible
        for step, dev, expected in self.reads:
            found = expand(results.values[step])
            wrong = [(b, found.get(b), m) for b, m in expected.items() if found.get(b) != m]
            assert not wrong, f"device {dev}: {len(wrong)} blocks read wrong; block, read, expected: {wrong[0]}"
        self.values = results.values
        for step in self.statuses:
            self.status = self.values[step].encode()
        return results

    def finish(self) -> None:
        """Take the status, deactivate everything, and run."""
        self.statuses.append(self.steps.add("status"))
        self.steps.add("pool_remove")
        self.run()

    def cut_power(self) -> None:
        """Run, and cut the power instead of deactivating anything."""
        self.run(cut=True)

    def commit(self) -> None:
        self.steps.add("status")

    def _create(self, dev: int) -> None:
        self.steps.message(f"create_thin {dev}")

    def _snap(self, dev: int, origin: int) -> None:
        self.steps.add("snap", dev=dev, origin=origin)

    def _delete(self, dev: int) -> None:
        if dev in self.active:
            self.active.remove(dev)
            self.steps.add("deactivate", dev=dev)
        self.steps.message(f"delete {dev}")

    def _write(self, dev: int, blocks: list[int]) -> None:
        self.activate(dev)
        self.steps.write(dev, blocks, self.seed, size=512)

    def _discard(self, dev: int, begin: int, end: int) -> None:
        self.activate(dev)
        self.steps.add("discard", dev=dev, begin=begin, end=end)

    def _set_transaction_id(self, current: int, new: int) -> None:
        self.steps.message(f"set_transaction_id {current} {new}")

    def _reserve(self) -> None:
        self.steps.message("reserve_metadata_snap")

    def _release(self) -> None:
        self.steps.message("release_metadata_snap")

    def _grow_data(self, nr_blocks: int) -> None:
        self.steps.pool_reload(self.world.block, nr_blocks, self.features)

    def _grow_metadata(self, nr_blocks: int) -> None:
        self.steps.add("meta_window", sectors=nr_blocks * BLOCK // 512)
        self.steps.pool_reload(self.world.block, self.world.data_blocks, self.features)


def expand(runs: list[list[int]]) -> Blocks:
    """The agent's runs of marks, block by block."""
    blocks: Blocks = {}
    for kind, block, length, number, seed in runs:
        for i in range(length):
            blocks[block + i] = (kind, number + (i if kind in (1, 2) else 0), seed)
    return blocks
