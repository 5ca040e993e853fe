"""Mappings by data block: against plain dicts, in little memory, with regions of all sorts, and on damage."""

from __future__ import annotations

import errno
import os
import random
import tempfile

import pytest

import thinpool
from bufio import MemoryDevice
from bufio.testing import FaultyDevice
from tests.support.fixtures import GOOD, facts_of, image
from tests.support.image import BLOCK, Image
from tests.support.reverse import Owned, reverse_map_of
from tests.support.surgeon import Surgeon
from thinpool.reverse_map import MOST_RUNS_IN_MEMORY, ReverseRun, disjoint, reverse_map

EVERYTHING = [(0, 1 << 64)]
WITH_SNAPSHOT = [name for name in GOOD if facts_of(name).metadata_snap is not None]


def owned(run: ReverseRun) -> Owned:
    return Owned(run.data_begin, run.data_begin + run.length, run.dev_id, run.thin_begin)


def found(content: bytes, regions: list[tuple[int, int]], most: int = MOST_RUNS_IN_MEMORY) -> list[Owned]:
    return [owned(run) for run in reverse_map(MemoryDevice(content), regions, most_runs_in_memory=most)]


@pytest.mark.parametrize("name", GOOD)
def test_every_mapping_of_every_device_is_found(name: str) -> None:
    assert found(image(name), EVERYTHING) == reverse_map_of(Image.from_bytes(image(name)), EVERYTHING)


@pytest.mark.parametrize("name", WITH_SNAPSHOT)
def test_the_metadata_snapshot_can_be_read(name: str) -> None:
    content = Image.from_bytes(image(name))
    snap = content.superblock(content.superblock().held_root)
    runs = reverse_map(MemoryDevice(image(name)), EVERYTHING, metadata_snap=True)
    assert list(map(owned, runs)) == reverse_map_of(content, EVERYTHING, snap)


@pytest.mark.parametrize("name", ["mixed", "dirty_3", "snapshot_chain", "discards"])
def test_only_what_is_in_the_regions_is_found(name: str) -> None:
    content = Image.from_bytes(image(name))
    end = max(max(content.counts("data")), 20)
    for seed in range(8):
        dice = random.Random(seed)
        begins = [dice.randrange(end) for _ in range(dice.randrange(1, 9))]
        regions = [(begin, begin + dice.randrange(1, end // 10)) for begin in begins]
        assert found(image(name), regions) == reverse_map_of(content, disjoint(regions))


@pytest.mark.parametrize("regions", [[], [(1 << 40, 1 << 41)], [(16384, 16385)]])
def test_where_nothing_is_mapped_nothing_is_found(regions: list[tuple[int, int]]) -> None:
    assert found(image("mixed"), regions) == []


def test_regions_that_overlap_or_touch_are_one() -> None:
    assert disjoint([(5, 9), (0, 3), (8, 12), (3, 4), (20, 30), (22, 23)]) == [(0, 4), (5, 12), (20, 30)]
    whole = found(image("sequential"), [(100, 200)])
    assert found(image("sequential"), [(150, 200), (100, 150)]) == whole
    assert found(image("sequential"), [(100, 160), (140, 200), (120, 130)]) == whole
    assert len(whole) == 1


@pytest.mark.parametrize("region", [(5, 5), (6, 5), (-1, 5)])
def test_a_region_is_a_range_of_blocks(region: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no range of data blocks"):
        list(reverse_map(MemoryDevice(image("empty")), [region]))


def test_runs_go_on_from_leaf_to_leaf() -> None:
    """32768 mappings in more than a hundred leaves, and one line."""
    assert found(image("sequential"), EVERYTHING) == [Owned(0, 32768, 1, 0)]


# Memory and reads


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_what_does_not_fit_in_memory_is_sorted_all_the_same(most: int) -> None:
    name = "discards"
    assert found(image(name), [(0, 900)], most) == found(image(name), [(0, 900)])


def test_a_temporary_file_that_cannot_be_written_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(thinpool.ThinError, match="temporary file: No space left") as caught:
        found(image("random"), EVERYTHING, 10)
    assert caught.value.errno == errno.ENOSPC


def test_leaves_without_anything_wanted_are_read_once_for_all_devices() -> None:
    device = FaultyDevice(MemoryDevice(image("snapshot_chain")))
    assert list(reverse_map(device, [(1 << 40, 1 << 41)])) == []
    surgeon = Surgeon(image("snapshot_chain"))
    roots = [surgeon.device_root(dev_id) for dev_id in surgeon.image.devices()]
    leaves = {leaf for root in roots for leaf in surgeon.leaves(root)}
    wanted = [(leaf, sum(call.overlaps(leaf * BLOCK, (leaf + 1) * BLOCK) for call in device.log)) for leaf in leaves]
    in_all_trees = sum(len(surgeon.leaves(root)) for root in roots)
    assert sum(times for _, times in wanted) < in_all_trees / 2


# Damage


def refused(surgeon: Surgeon, rule: str, block: int, region: tuple[int, int] = (0, 10)) -> str:
    runs = reverse_map(surgeon.device(), [region])
    with pytest.raises(thinpool.Corrupt, match=rule) as caught:
        next(runs)
    assert caught.value.block == block
    return str(caught.value)


def test_damage_is_refused_before_anything_is_said_even_beside_the_regions() -> None:
    surgeon = Surgeon(image("random"))
    leaf = surgeon.leaves(surgeon.device_root(3))[-1]
    surgeon.flip(leaf)
    for region in ((0, 10), (1 << 40, 1 << 41)):
        message = refused(surgeon, "checksum error", leaf, region)
        assert f"block {leaf}" in message
        assert "thin device 3, thin blocks [" in message


def test_a_leaf_passed_over_must_fit_each_of_its_parents() -> None:
    content = image("snapshot_chain")
    surgeon = Surgeon(content)
    roots = {dev_id: surgeon.image.node(surgeon.device_root(dev_id)) for dev_id in sorted(surgeon.image.devices())}
    first = roots.pop(min(roots))
    # The same leaf, not the first one, below another root, and a leaf of that root's own in front.
    dev_id, root, index = next(
        (dev_id, root, index)
        for dev_id, root in roots.items()
        for index, child in enumerate(root.children)
        if index and child in first.children and not {*root.children[:index]} <= {*first.children}
    )
    nowhere = (1 << 40, 1 << 41)
    leaf = root.children[index]
    surgeon.key(root.number, index, root.keys[index] + 1)
    message = refused(surgeon, "first key below", leaf, nowhere)
    assert f"thin device {dev_id}," in message

    surgeon = Surgeon(content)
    surgeon.key(root.number, index + 1, root.keys[index + 1] - 1)
    surgeon.key(leaf, len(surgeon.image.node(leaf).keys) - 1, root.keys[index + 1] - 1)
    assert f"thin device {dev_id}," in refused(surgeon, "last key not below", leaf, nowhere)


def test_mappings_must_lead_to_data_blocks() -> None:
    surgeon = Surgeon(image("random"))
    leaf = surgeon.leaves(surgeon.device_root(3))[4]
    surgeon.value(leaf, 0, 16384 << 24)
    refused(surgeon, "data block outside", leaf)


@pytest.mark.parametrize("region", [(0, 16384), (1 << 40, 1 << 41)], ids=["found", "passed over"])
def test_the_number_of_mappings_must_be_that_of_the_details(region: tuple[int, int]) -> None:
    surgeon = Surgeon(image("snapshot_chain"))
    last = max(surgeon.image.devices())
    nr_mappings = surgeon.image.devices()[last].mapped_blocks
    surgeon.details(last, mapped_blocks=nr_mappings + 1)
    message = refused(surgeon, "unexpected number of mappings", surgeon.device_root(last), region)
    assert f"expected {nr_mappings + 1}, actual {nr_mappings}" in message
