"""The listing by arrays against the listing node by node, and both against plain dicts."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bufio import MemoryDevice
from persistent_data.block_batches import NotClean
from tests.support.fixtures import DAMAGED, GOOD, answer, facts_of, image
from tests.support.mapping_pools import MadePool, made_pool
from tests.support.surgeon import Surgeon
from thinpool import listing, listing_batch
from thinpool.errors import ThinError
from thinpool.listing import FIELDS, Row, format_table, list_devices
from thinpool.pool_reader import PoolReader

COUNTED = [field for field in FIELDS if field.startswith(("DEV", "MAPPED_B", "EXCLUSIVE_B", "SHARED_B", "HIGHEST_B"))]


def listed(content: bytes, fields: list[str], worth_batches: int, metadata_snap: bool = False) -> list[list[str]] | str:
    """The rows, or the error."""
    before, listing.WORTH_BATCHES = listing.WORTH_BATCHES, worth_batches
    try:
        return list_devices(MemoryDevice(content), fields, metadata_snap)
    except ThinError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        listing.WORTH_BATCHES = before


def assert_same(content: bytes, fields: list[str], metadata_snap: bool = False) -> list[list[str]] | str:
    plain = listed(content, fields, 1 << 62, metadata_snap)
    assert listed(content, fields, 0, metadata_snap) == plain
    return plain


@pytest.mark.parametrize("name", GOOD)
def test_sound_images_are_listed_as_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = answer(name, "lsfull.txt")
    fields = recorded.decode().splitlines()[0].split()
    rows = assert_same(image(name), fields)
    assert not isinstance(rows, str)
    assert format_table(fields, rows).encode() == recorded
    for some in (["HIGHEST_BLOCK"], ["EXCLUSIVE_BLOCKS"]):
        assert_same(image(name), some)
    if facts_of(name).metadata_snap is not None:
        assert_same(image(name), COUNTED, metadata_snap=True)


def test_sound_images_are_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is compared with the records above is the work of arrays."""

    def fail(*arguments: object) -> None:
        raise AssertionError("the plain code was asked")

    monkeypatch.setattr(listing._Counter, "run", fail)
    for name in ("deep", "mixed", "random", "shared_by_many", "snapshot_chain", "metadata_full", "many_devices"):
        assert not isinstance(listed(image(name), COUNTED, 0), str)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_images_are_refused_alike(name: str) -> None:
    assert_same(image(name), COUNTED)


def exclusive_blocks(made: MadePool) -> list[list[str]]:
    uses = Counter(data for mappings in made.devices.values() for data, _ in mappings.values())
    return [
        [str(dev_id), str(len(mappings)), str(sum(uses[data] == 1 for data, _ in mappings.values()))]
        for dev_id, mappings in made.devices.items()
    ]


@given(st.integers(0, 1 << 32))
def test_any_pool_is_listed_as_its_trees_are(seed: int) -> None:
    dice = Random(seed)
    made = made_pool(dice, nr_data_blocks=1 << dice.randint(4, 22), small_leaves=dice.random() < 0.5)
    assert assert_same(made.content, ["DEV", "MAPPED_BLOCKS", "EXCLUSIVE_BLOCKS"]) == exclusive_blocks(made)
    highest = [[str(max(mappings, default="-"))] for mappings in made.devices.values()]
    assert assert_same(made.content, ["HIGHEST_BLOCK"]) == highest


def test_pools_made_of_large_leaves_are_clean_as_often_as_not() -> None:
    """So that the test above is one of arrays."""
    clean = 0
    for seed in range(60):
        made = made_pool(Random(seed), nr_data_blocks=1 << 16, small_leaves=False)
        pool = PoolReader(MemoryDevice(made.content))
        try:
            listing_batch.count(pool, [Row(entry) for entry in pool.devices()], True, True)
        except NotClean:
            continue
        clean += 1
    assert clean >= 20


@given(st.integers(0, 1 << 32))
def test_damage_in_any_leaf_is_told_alike(seed: int) -> None:
    dice = Random(seed)
    made = made_pool(dice, nr_data_blocks=1 << 20, small_leaves=False)
    surgeon = Surgeon(made.content)
    for block in dice.sample(made.leaves, min(len(made.leaves), 1)):
        if dice.random() < 0.5:
            surgeon.value(block, dice.randrange(252), dice.choice([0, (1 << 64) - 1, 1 << 44, (1 << 44) - 1]))
        else:
            surgeon.node(block, nr_entries=dice.randrange(253))
    assert_same(surgeon.content(), COUNTED)


def test_a_block_that_is_mapped_very_often_is_shared() -> None:
    """Counts are small numbers, and all entries of many leaves lead to one data block."""
    surgeon = Surgeon(image("deep"))
    (dev_id,) = surgeon.image.devices()
    leaves = surgeon.leaves(surgeon.device_root(dev_id))
    for block in leaves[:300]:
        node = surgeon.image.node(block) if block == leaves[0] else None
        keys = surgeon.block(block)[32 : 32 + 8 * 252]
        count = int.from_bytes(surgeon.block(block)[16:20], "little")
        assert node is None or len(node.keys) == count
        words = [int.from_bytes(keys[8 * i : 8 * i + 8], "little") for i in range(count)]
        surgeon.rewrite(block, words, [7 << 24] * count)
    rows = assert_same(surgeon.content(), ["MAPPED_BLOCKS", "EXCLUSIVE_BLOCKS"])
    assert not isinstance(rows, str)
    mapped, exclusive = map(int, rows[0])
    assert 0 < exclusive < mapped - 25000


def test_counts_are_cut_before_they_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_batch, "_CAPPED_FROM", 1)
    assert_same(image("shared_by_many"), COUNTED)
