"""Mappings by data block in bulk: against plain dicts, in little memory, and on damage, which it leaves to others."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from typing import TYPE_CHECKING

import pytest

import thinpool
from bufio import MemoryDevice
from persistent_data.block_batches import NotClean
from tests.support.fixtures import DAMAGED, GOOD, facts_of, image
from tests.support.image import Image
from tests.support.reverse import Owned, reverse_map_of
from tests.support.surgeon import Surgeon
from thinpool import reverse_batch, reverse_map
from thinpool.pool_reader import PoolReader
from thinpool.reverse_batch import MEMORY, ReverseBatches

if TYPE_CHECKING:
    from bufio.device import Device

Ranges = list[tuple[int, int]]
EVERYTHING: Ranges = [(0, 1 << 64)]
WITH_SNAPSHOT = [name for name in GOOD if facts_of(name).metadata_snap is not None]


def batches_of(device: Device, ranges: Ranges, memory: int = MEMORY, *, metadata_snap: bool = False) -> ReverseBatches:
    pool = PoolReader(device, metadata_snap)
    return ReverseBatches(pool, pool.devices(), ranges, memory)


def owned(batches: ReverseBatches) -> list[Owned]:
    runs = [run for columns in batches.columns() for run in zip(*(column.tolist() for column in columns), strict=True)]
    return [Owned(begin, begin + length, dev_id, thin) for begin, length, dev_id, thin in runs]


def found(content: bytes, ranges: Ranges, memory: int = MEMORY) -> list[Owned]:
    return owned(batches_of(MemoryDevice(content), ranges, memory))


@pytest.mark.parametrize("name", GOOD)
def test_every_mapping_of_every_device_is_found(name: str) -> None:
    wanted = reverse_map_of(Image.from_bytes(image(name)), EVERYTHING)
    assert found(image(name), EVERYTHING) == wanted


@pytest.mark.parametrize("name", WITH_SNAPSHOT)
def test_the_metadata_snapshot_can_be_read(name: str) -> None:
    content = Image.from_bytes(image(name))
    wanted = reverse_map_of(content, EVERYTHING, content.superblock(content.superblock().held_root))
    assert owned(batches_of(MemoryDevice(image(name)), EVERYTHING, metadata_snap=True)) == wanted


@pytest.mark.parametrize("name", ["mixed", "dirty_3", "snapshot_chain", "discards", "sequential"])
def test_in_little_memory_the_trees_are_read_several_times(name: str) -> None:
    wanted = reverse_map_of(Image.from_bytes(image(name)), EVERYTHING)
    batches = batches_of(MemoryDevice(image(name)), EVERYTHING, 100_000)
    assert owned(batches) == wanted
    assert batches.nr_stretches > 1


@pytest.mark.parametrize("name", ["mixed", "dirty_3", "snapshot_chain", "discards"])
def test_only_what_is_in_the_ranges_is_found(name: str) -> None:
    content = Image.from_bytes(image(name))
    end = max(max(content.counts("data")), 20)
    for seed in range(8):
        dice = random.Random(seed)
        begins = [dice.randrange(end) for _ in range(dice.randrange(1, 9))]
        ranges = reverse_map.disjoint((begin, begin + dice.randrange(1, end // 10)) for begin in begins)
        wanted = reverse_map_of(content, ranges)
        assert found(image(name), ranges) == wanted
        assert found(image(name), ranges, dice.randrange(1000, 100_000)) == wanted


def test_stretches_may_be_of_single_blocks() -> None:
    wanted = reverse_map_of(Image.from_bytes(image("shared_by_many")), [(0, 12), (14, 17)])
    assert wanted
    assert found(image("shared_by_many"), [(0, 12), (14, 17)], 1) == wanted


@pytest.mark.parametrize("ranges", [[], [(1 << 40, 1 << 41)], [(16384, 16385)]])
def test_where_nothing_is_mapped_nothing_is_found(ranges: Ranges) -> None:
    assert found(image("mixed"), ranges) == []


@pytest.mark.parametrize("sparse", [0, 1 << 20], ids=["as if few", "as if many"])
@pytest.mark.parametrize("name", ["mixed", "dirty_3", "sequential", "discards"])
def test_runs_are_found_among_many_words_and_few(name: str, sparse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reverse_batch, "_SPARSE", sparse)
    monkeypatch.setattr(reverse_batch, "_WORDS_AT_A_TIME", 50)
    assert found(image(name), EVERYTHING) == reverse_map_of(Image.from_bytes(image(name)), EVERYTHING)


def test_a_large_device_with_little_in_it_is_not_for_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reverse_map, "BULK_FROM_MAPPINGS", 0)
    monkeypatch.setattr(reverse_batch, "MEMORY", 1000)
    batches = batches_of(MemoryDevice(image("mixed")), EVERYTHING, 1000)
    assert batches.is_too_long
    monkeypatch.setattr(ReverseBatches, "columns", None)
    runs = reverse_map.reverse_map(MemoryDevice(image("mixed")), EVERYTHING)
    wanted = reverse_map_of(Image.from_bytes(image("mixed")), EVERYTHING)
    assert [Owned(begin, begin + length, dev, thin) for begin, length, dev, thin in runs] == wanted


def test_a_stretch_with_too_many_owners_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the superblock says of data blocks in use tells how long a stretch can be, but not of each."""
    monkeypatch.setattr(ReverseBatches, "_nr_owned_twice", lambda _: 0)
    batches = batches_of(MemoryDevice(image("snapshot_chain")), EVERYTHING, 200_000)
    assert len(batches._stretches) == 1
    assert owned(batches) == reverse_map_of(Image.from_bytes(image("snapshot_chain")), EVERYTHING)
    assert batches.nr_stretches > 1


def test_a_temporary_file_that_cannot_be_written_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(thinpool.ThinError, match="temporary file: No space left") as caught:
        found(image("random"), EVERYTHING, 10_000)
    assert caught.value.errno == errno.ENOSPC


def test_progress_ends_where_it_is_said_to() -> None:
    calls: list[tuple[int, int]] = []
    pool = PoolReader(MemoryDevice(image("sequential")))
    list(ReverseBatches(pool, pool.devices(), EVERYTHING, MEMORY, lambda *call: calls.append(call)).columns())
    assert calls[-1] == (32768, 32768)
    assert calls == sorted(calls)


# Damage is for the plain code


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_returned_of_damaged_pools_is_what_the_plain_code_returns(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for mappings in (1 << 62, 0):
        monkeypatch.setattr(reverse_map, "BULK_FROM_MAPPINGS", mappings)
        try:
            answers.append(repr(list(reverse_map.reverse_map(MemoryDevice(image(name)), EVERYTHING))))
        except OSError as error:
            answers.append(f"{type(error)} {error}")
    assert answers[0] == answers[1]


def spoilt(how: str) -> Surgeon:
    surgeon = Surgeon(image("snapshot_chain"))
    root = surgeon.device_root(5)
    leaf = surgeon.leaves(root)[2]
    if how == "checksum":
        surgeon.flip(leaf)
    elif how == "data block":
        surgeon.value(leaf, 0, 16384 << 24)
    elif how == "key":
        surgeon.key(root, 2, surgeon.image.node(root).keys[2] + 1)
    elif how == "count":
        surgeon.details(5, mapped_blocks=surgeon.image.devices()[5].mapped_blocks + 1)
    elif how == "thin block":
        last = surgeon.leaves(root)[-1]
        surgeon.key(last, len(surgeon.image.node(last).keys) - 1, 1 << 63)
    return surgeon


@pytest.mark.parametrize("how", ["checksum", "data block", "key", "count", "thin block"])
@pytest.mark.parametrize("memory", [MEMORY, 100_000])
def test_nothing_is_returned_of_what_is_not_clean(how: str, memory: int) -> None:
    columns = batches_of(spoilt(how).device(), EVERYTHING, memory).columns()
    with pytest.raises(NotClean):
        next(columns)


def test_thin_blocks_may_be_beyond_what_is_done_in_bulk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reverse_map, "BULK_FROM_MAPPINGS", 0)
    surgeon = spoilt("thin block")
    runs = list(reverse_map.reverse_map(surgeon.device(), EVERYTHING))
    assert [Owned(begin, begin + length, dev, thin) for begin, length, dev, thin in runs] == reverse_map_of(
        surgeon.image, EVERYTHING
    )


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize("name", GOOD)
def test_text_in_bulk_is_that_of_single_lines(name: str, json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for mappings in (1 << 62, 0):
        monkeypatch.setattr(reverse_map, "BULK_FROM_MAPPINGS", mappings)
        pieces = reverse_map.reverse_map_text(MemoryDevice(image(name)), EVERYTHING, json=json)
        texts.append(b"".join(map(bytes, pieces)))
    assert texts[0] == texts[1]
