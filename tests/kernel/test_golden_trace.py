"""Our engine against a recorded trace of the kernel's: every block of the device, by hash, after each of 21 steps.

No kernel is booted here.  The trace was recorded from the kernel's engine on a zeroed device of 8 MiB;
``test_replay.py`` plays the same steps in a kernel and finds the same hashes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.image import Image, SpaceMapRoot
from tests.support.kernel import make_sparse
from thinpool.errors import NotMapped
from thinpool.metadata import PoolMetadata
from thinpool.thin_device import ThinDevice


@dataclass(frozen=True)
class Step:
    """What the superblock says after a step, and the first half of the whole device's SHA-256."""

    name: str
    time: int
    held: int
    mapping_root: int
    details_root: int
    data_map: SpaceMapRoot
    metadata_map: SpaceMapRoot
    sha256: str


def _recorded() -> list[Step]:
    table = """
        format                  |0| 0|   6|   7|   0,  0,   4,  5|2048, 8,   1,  2|ca45630ebbfafac5
        resize data             |0| 0|   6|   7|4096,  0,  10,  5|2048, 9,  11,  2|083cd002811554a3
        reopen, create          |0| 0|   4|  12|4096,  0,  10,  5|2048,10,  13,  2|98e47a4d216ce296
        first write             |0| 0|  16|  18|4096,  1,  19,  5|2048,10,  20,  2|5f28de8b2780977b
        ascending writes        |0| 0|  23|  27|4096,301,  28,  5|2048,12,  29,  2|6e06173ef5fc2dd4
        descending writes       |0| 0|  32|  37|4096,501,  38,  5|2048,13,  39,  2|c9a0a9d0d30aa3e3
        snapshot                |1| 0|  41|  42|4096,501,  38,  5|2048,13,  43,  2|a92a411f4c84445d
        break sharing once      |1| 0|  46|  49|4096,502,  50,  5|2048,15,  51,  2|870a4493bea1fb0d
        break sharing often     |1| 0|  54|  58|4096,532,  59,  5|2048,16,  60,  2|312c65eca637d273
        two more snapshots      |3| 0|  67|  68|4096,532,  59,  5|2048,16,  69, 66|09198a822b48bfc3
        write to a snapshot     |3| 0|  72|  77|4096,533,  78, 76|2048,18,  79, 74|b5c56ed6a856af6a
        remove a range          |3| 0|  81|  87|4096,518,  88, 86|2048,18,  89, 74|8dd27b07c27da6c3
        reserve                 |3|91|  81|  87|4096,518,  88, 86|2048,19,  92, 74|e70a21184b79882f
        write while held        |3|91|  95| 100|4096,519, 101, 99|2048,23, 102, 96|db08abaf1cfadc60
        release                 |3| 0|  95| 100|4096,519, 107,105|2048,18, 108,106|db94c03e66c5850f
        delete                  |3| 0| 111| 109|4096,519, 107,105|2048,18, 112,106|170fb643d961e69c
        remove nearly all       |3| 0| 114| 122|4096,502, 123,119|2048,16, 124,121|e9b978c8b3da060f
        transaction id          |3| 0| 114| 122|4096,502, 123,119|2048,16, 124,121|6214368102575e25
        resize metadata         |3| 0| 114| 122|4096,502, 123,119|4096,16, 124,121|e587769c97dae351
        write in the new part   |3| 0|2050|2052|4096,503,2053,119|4096,16,2054,121|2d9b83328f179ec1
        reopen, create again    |3| 0|   3|   4|4096,503,2053,119|4096,17,   5,121|37bfe50cb0a8abe0
    """
    steps = []
    for line in table.strip().splitlines():
        name, time, held, mapping, details, data, metadata, sha256 = (word.strip() for word in line.split("|"))
        roots = [SpaceMapRoot(*map(int, blob.split(","))) for blob in (data, metadata)]
        steps.append(Step(name, int(time), int(held), int(mapping), int(details), roots[0], roots[1], sha256))
    return steps


RECORDED = _recorded()


class Trace:
    """The pool that the trace is about, and the handles that stay open."""

    def __init__(self, path: Path) -> None:
        self.path = make_sparse(path, 2048 * 4096)
        self.pool = PoolMetadata.open(path, 128, format_device=True)
        self.thins: dict[int, ThinDevice] = {}

    def open_thin(self, dev: int) -> None:
        self.thins[dev] = self.pool.open_thin_device(dev)

    def write(self, dev: int, blocks: Iterable[int]) -> None:
        """What the pool target does for writes to these blocks, and a commit."""
        thin = self.thins[dev]
        for block in blocks:
            try:
                if not thin.find_block(block).shared:
                    continue
            except NotMapped:
                pass
            thin.insert_block(block, self.pool.alloc_data_block())
        self.pool.commit()

    def close(self) -> None:
        for thin in self.thins.values():
            thin.close()
        self.thins.clear()
        self.pool.close()

    def reopen(self) -> None:
        self.close()
        self.pool = PoolMetadata.open(self.path, 128)

    # ---- the steps, in the order of the table

    def format(self) -> None:
        self.pool.commit()

    def resize_data(self) -> None:
        self.pool.resize_data_dev(4096)
        self.pool.commit()

    def reopen_and_create(self) -> None:
        self.reopen()
        self.pool.create_thin(0)
        self.pool.commit()

    def first_write(self) -> None:
        self.open_thin(0)
        self.write(0, [0])

    def ascending_writes(self) -> None:
        self.write(0, range(1, 301))

    def descending_writes(self) -> None:
        self.write(0, range(1000, 800, -1))

    def snapshot(self) -> None:
        self.pool.create_snap(1, 0)
        self.pool.commit()

    def break_sharing_once(self) -> None:
        self.write(0, [5])

    def break_sharing_often(self) -> None:
        self.write(0, range(0, 291, 10))

    def two_more_snapshots(self) -> None:
        self.pool.create_snap(2, 1)
        self.pool.commit()
        self.pool.create_snap(3, 1)
        self.pool.commit()

    def write_to_a_snapshot(self) -> None:
        self.open_thin(1)
        self.write(1, [7])

    def remove_a_range(self) -> None:
        self.thins[0].remove_range(100, 250)
        self.pool.commit()

    def reserve(self) -> None:
        self.pool.commit()
        self.pool.reserve_metadata_snap()
        self.pool.commit()

    def write_while_held(self) -> None:
        self.write(0, [8])

    def release(self) -> None:
        self.pool.release_metadata_snap()
        self.pool.commit()

    def delete(self) -> None:
        self.pool.delete_thin_device(2)
        self.pool.commit()

    def remove_nearly_all(self) -> None:
        self.thins[0].remove_range(0, 2000)
        self.pool.commit()

    def transaction_id(self) -> None:
        self.pool.set_transaction_id(0, 7)
        self.pool.commit()

    def resize_metadata(self) -> None:
        with self.path.open("r+b") as f:
            f.truncate(4096 * 4096)
        self.pool.resize_metadata_dev(4096)
        self.pool.commit()

    def write_in_the_new_part(self) -> None:
        self.write(0, [3])

    def reopen_and_create_again(self) -> None:
        self.reopen()
        self.pool.create_thin(9)
        self.pool.commit()

    def steps(self) -> list[Callable[[], None]]:
        return [
            self.format,
            self.resize_data,
            self.reopen_and_create,
            self.first_write,
            self.ascending_writes,
            self.descending_writes,
            self.snapshot,
            self.break_sharing_once,
            self.break_sharing_often,
            self.two_more_snapshots,
            self.write_to_a_snapshot,
            self.remove_a_range,
            self.reserve,
            self.write_while_held,
            self.release,
            self.delete,
            self.remove_nearly_all,
            self.transaction_id,
            self.resize_metadata,
            self.write_in_the_new_part,
            self.reopen_and_create_again,
        ]


def test_every_step_of_the_recorded_trace_gives_the_recorded_device(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "meta")
    for step, run in zip(RECORDED, trace.steps(), strict=True):
        run()
        image = Image.load(trace.path)
        superblock = image.superblock()
        found = Step(
            step.name,
            superblock.time,
            superblock.held_root,
            superblock.mapping_root,
            superblock.details_root,
            superblock.data_map,
            superblock.metadata_map,
            image.sha256()[:16],
        )
        assert found == step
    assert trace.pool.free_block_count == 3593
    assert trace.pool.free_metadata_block_count == 3670
    assert {dev: d.mapped_blocks for dev, d in trace.pool.devices().items()} == {0: 1, 1: 501, 3: 501, 9: 0}
    trace.close()


@pytest.mark.parametrize("last", [4, 11, 13, 19], ids=lambda last: RECORDED[last].name)
def test_counts_on_disk_equal_a_recount_of_the_trees(tmp_path: Path, last: int) -> None:
    trace = Trace(tmp_path / "meta")
    for run in trace.steps()[: last + 1]:
        run()
    image = Image.load(trace.path)
    assert (image.counts("metadata"), image.counts("data")) == image.recount()
    trace.close()
