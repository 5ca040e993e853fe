"""What is counted with arrays is what is counted node by node, or nothing is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import thinpool.check
from bufio import MemoryDevice
from tests.support.fixtures import GOOD, image
from tests.support.image import Image
from tests.support.leaks import BLOCK, with_random_leaks
from tests.support.surgeon import Surgeon
from thinpool import PoolMetadata, fast_counts
from thinpool.check import Counts, Observer, Options, check

if TYPE_CHECKING:
    from persistent_data.ref_counts import RefCounts

EVERY_POOL, NO_POOL = 0, 1 << 62


class Counting(Observer):
    """Remembers the counts, and whether arrays made them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.by_arrays: list[bool] = []
        self.counts: Counts | None = None
        original = fast_counts.count_mappings

        def count_mappings(*arguments: object) -> tuple[RefCounts, bytes] | None:
            counts = original(*arguments)  # type: ignore[arg-type]  # passed on as they are
            self.by_arrays.append(counts is not None)
            return counts

        monkeypatch.setattr(fast_counts, "count_mappings", count_mappings)

    def counted(self, counts: Counts) -> None:
        self.counts = counts

    def run(self, content: bytes, threshold: int, **options: bool) -> tuple[list[str], Counts | None]:
        """Check *content*; return the findings and the counts."""
        self.counts = None
        self._monkeypatch.setattr(thinpool.check, "WORTH_ARRAYS", threshold)
        findings = [repr(finding) for finding in check(MemoryDevice(content), Options(**options), self)]
        return findings, self.counts


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def as_dict(counts: RefCounts) -> dict[int, int]:
    return {block: counts[block] for block in range(counts.nr_blocks) if counts.counts[block]}


@pytest.mark.parametrize("name", [name for name in GOOD if name not in ("resized_metadata", "metadata_full")])
def test_counts_are_those_of_an_independent_reader(counting: Counting, name: str) -> None:
    content = with_random_leaks(image(name), seed=11)
    findings, counts = counting.run(content, EVERY_POOL)
    assert counting.by_arrays == [True]
    assert counts is not None
    assert (as_dict(counts.metadata), as_dict(counts.data)) == Image.from_bytes(content).recount()
    plain_findings, plain = counting.run(content, NO_POOL)
    assert findings == plain_findings
    assert plain is not None
    assert (counts.metadata.counts, counts.metadata.excess) == (plain.metadata.counts, plain.metadata.excess)
    assert (counts.data.counts, counts.data.excess) == (plain.data.counts, plain.data.excess)


def shared_by(nr_devices: int) -> bytes:
    """Data block 0 is mapped by that many devices, each with a leaf of its own."""
    device = MemoryDevice(1024 * BLOCK)
    with PoolMetadata.format(device, 128, 2000) as pool:
        pool.create_thin(0)
        with pool.open_thin_device(0) as thin:
            thin.provision(0, 1)
        for dev_id in range(1, nr_devices):
            pool.create_snap(dev_id, origin=0)
            with pool.open_thin_device(dev_id) as thin:
                thin.provision(1, 1)
        pool.commit()
    return device.contents()


@pytest.mark.parametrize("nr_devices", [255, 256, 257, 300])
def test_more_than_255_references_are_counted_node_by_node(counting: Counting, nr_devices: int) -> None:
    surgeon = Surgeon(shared_by(nr_devices))
    surgeon.count("data", 1999, 1)
    findings, counts = counting.run(surgeon.content(), EVERY_POOL)
    assert counting.by_arrays == [nr_devices <= 255]
    assert len([finding for finding in findings if "rule='leak'" in finding]) == 1
    assert counts is not None
    assert counts.data[0] == nr_devices
    assert as_dict(counts.metadata) == Image.from_bytes(surgeon.content()).recount()[0]


def test_nodes_with_more_than_255_references_are_counted(counting: Counting) -> None:
    device = MemoryDevice(1024 * BLOCK)
    with PoolMetadata.format(device, 128, 2000) as pool:
        pool.create_thin(0)
        for dev_id in range(1, 300):
            pool.create_snap(dev_id, origin=0)
        pool.commit()
    surgeon = Surgeon(device.contents())
    surgeon.count("data", 1999, 1)
    _, counts = counting.run(surgeon.content(), EVERY_POOL)
    assert counting.by_arrays == [True]
    assert counts is not None
    assert as_dict(counts.metadata) == Image.from_bytes(surgeon.content()).recount()[0]


def test_what_is_not_clean_leaves_the_counts_alone(counting: Counting) -> None:
    surgeon = Surgeon(image("mixed"))
    dev_id = max(surgeon.image.devices(), key=lambda dev_id: len(surgeon.leaves(surgeon.device_root(dev_id))))
    surgeon.node(surgeon.leaves(surgeon.device_root(dev_id))[0], padding=1)
    findings, counts = counting.run(surgeon.content(), EVERY_POOL)
    assert counting.by_arrays == [False]
    assert counts is not None
    assert (as_dict(counts.metadata), as_dict(counts.data)) == Image.from_bytes(surgeon.content()).recount()
    assert findings == counting.run(surgeon.content(), NO_POOL)[0]


@pytest.mark.parametrize("name", ["metadata_snapshot", "metadata_snapshot_of_deleted"])
def test_a_metadata_snapshot_by_itself_is_checked_with_arrays(counting: Counting, name: str) -> None:
    assert counting.run(image(name), EVERY_POOL, metadata_snap=True) == ([], None)
    assert counting.by_arrays == [True]
    surgeon = Surgeon(image(name))
    snap = surgeon.image.superblock(surgeon.image.superblock().held_root)
    root = int.from_bytes(next(iter(surgeon.image.items(snap.mapping_root)))[1], "little")
    surgeon.flip(surgeon.leaves(root)[0])
    findings, _ = counting.run(surgeon.content(), EVERY_POOL, metadata_snap=True)
    assert findings
    assert findings == counting.run(surgeon.content(), NO_POOL, metadata_snap=True)[0]
