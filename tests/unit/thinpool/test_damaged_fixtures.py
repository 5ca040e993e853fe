"""The images that the kernel made: the engine says of the sound ones what others recorded, and of the damaged ones
nothing that is not so.

A damaged image is compared with the sound one that it was made from.  Whatever is asked, the answer is that of the
sound image, or an error that names the block and the rule; the few faults that no query can see are listed.
"""

from __future__ import annotations

import errno
from functools import lru_cache
from typing import TYPE_CHECKING

import pytest

from bufio import MemoryDevice
from tests.support import fixtures
from tests.support.image import Image
from thinpool import Corrupt, DeviceDetails, NoSuchDevice, NotMapped, PoolMetadata, Run, ThinDevice, ThinError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SHARED_FLAGS_SEEN = 400
"""Mappings of a device whose shared flag is compared; all of them would take long and show no more."""


@lru_cache(maxsize=4)
def expected_of(name: str) -> fixtures.PoolModel:
    return fixtures.read_xml(fixtures.answer(name, "xml"))


def runs_of(mappings: dict[int, tuple[int, int]]) -> list[Run]:
    found: list[Run] = []
    for thin in sorted(mappings):
        data, time = mappings[thin]
        joined = found[-1].joined_with(Run(thin, data, 1, time)) if found else None
        if joined is None:
            found.append(Run(thin, data, 1, time))
        else:
            found[-1] = joined
    return found


def spread(items: Iterable[int], count: int) -> list[int]:
    """The first, the last, and some between."""
    ordered = sorted(items)
    step = max(1, len(ordered) // count)
    return sorted({*ordered[::step], *ordered[-1:]})


def blocks_of(runs: Iterable[Run]) -> dict[int, tuple[int, int]]:
    return {run.thin_begin + i: (run.data_begin + i, run.time) for run in runs for i in range(run.length)}


# Sound images


@pytest.fixture(params=fixtures.GOOD)
def sound_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_pool_is_what_the_tools_recorded(sound_name: str) -> None:
    facts = fixtures.facts_of(sound_name)
    expected = expected_of(sound_name)
    device = MemoryDevice(fixtures.image(sound_name))
    with PoolMetadata.open(device) as pool:
        assert pool.data_block_size == facts.data_block_size
        assert pool.data_dev_size == facts.nr_data_blocks
        assert pool.free_block_count == facts.nr_data_blocks - facts.used_data_blocks
        assert pool.metadata_dev_size == facts.nr_metadata_blocks
        reserve = min(4096, facts.nr_metadata_blocks // 10)
        assert pool.free_metadata_block_count == max(0, facts.nr_metadata_blocks - facts.used_metadata_blocks - reserve)
        assert pool.transaction_id == facts.transaction_id == int(expected.superblock["transaction"])
        assert pool.time == int(expected.superblock["time"])
        assert pool.metadata_snap == facts.metadata_snap
        assert pool.needs_check == facts.needs_check
        details = pool.devices()
        assert list(details) == sorted(expected.devices)
        assert details == {dev: DeviceDetails(*device.details) for dev, device in expected.devices.items()}
        status, _ = fixtures.read_status(fixtures.answer(sound_name, "reopen.txt"))
        if status is not None:
            assert pool.metadata_dev_size == status.nr_metadata_blocks
            used_and_reserved = min(facts.nr_metadata_blocks, status.used_metadata_blocks)
            assert pool.free_metadata_block_count == facts.nr_metadata_blocks - used_and_reserved
            assert pool.free_block_count == status.nr_data_blocks - status.used_data_blocks
    assert device.contents() == fixtures.image(sound_name)


def test_mappings_are_what_the_tools_recorded(sound_name: str) -> None:
    expected = expected_of(sound_name)
    _, thins = fixtures.read_status(fixtures.answer(sound_name, "reopen.txt"))
    recorded = {int(row["DEV"]): row for row in fixtures.read_ls(fixtures.answer(sound_name, "lsfull.txt"))}
    with PoolMetadata.open(MemoryDevice(fixtures.image(sound_name)), read_only=True) as pool:
        counted: dict[int, int] = {}
        for dev, model in expected.devices.items():
            with pool.open_thin_device(dev) as thin:
                assert list(thin.mappings()) == runs_of(model.mappings)
                assert thin.mapped_count == model.details.mapped_blocks == len(model.mappings)
                assert thin.highest_mapped_block == max(model.mappings, default=None)
                if dev in thins and thins[dev].highest_mapped is not None:
                    last_sector = thins[dev].highest_mapped
                    assert last_sector is not None
                    assert thin.highest_mapped_block == last_sector // pool.data_block_size
                assert thin.mapped_count == int(recorded[dev]["MAPPED_BLOCKS"])
            for data, _ in model.mappings.values():
                counted[data] = counted.get(data, 0) + 1
        for dev, model in expected.devices.items():
            if len(model.mappings) <= 3000:
                shared = sum(counted[data] > 1 for data, _ in model.mappings.values())
                assert shared == int(recorded[dev]["SHARED_BLOCKS"])


def test_lookups_are_what_the_tools_recorded(sound_name: str) -> None:
    expected = expected_of(sound_name)
    with PoolMetadata.open(MemoryDevice(fixtures.image(sound_name)), read_only=True) as pool:
        for dev in spread(expected.devices, 40):
            model = expected.devices[dev]
            with pool.open_thin_device(dev) as thin:
                for block in spread(model.mappings, SHARED_FLAGS_SEEN):
                    data, time = model.mappings[block]
                    assert thin.find_block(block) == (data, model.details.snapshotted_time > time)
                    assert pool.block_is_used(data)
                for block in absent_blocks(model.mappings):
                    with pytest.raises(NotMapped):
                        thin.find_block(block)


def absent_blocks(mappings: dict[int, tuple[int, int]]) -> list[int]:
    """Some blocks that are not mapped, next to some that are."""
    near = {neighbour for block in spread(mappings, 40) for neighbour in (block - 1, block + 1)}
    return sorted(block for block in near | {0, (1 << 64) - 1} if block not in mappings and 0 <= block < 1 << 64)


@pytest.mark.parametrize("name", [name for name in fixtures.GOOD if fixtures.has_answer(name, "metasnap.xml")])
def test_metadata_snapshot_is_what_the_tools_recorded(name: str) -> None:
    expected = fixtures.read_xml(fixtures.answer(name, "metasnap.xml"))
    device = MemoryDevice(fixtures.image(name))
    with PoolMetadata.open_metadata_snap(device) as snap:
        assert snap.time == int(expected.superblock["time"])
        assert snap.transaction_id == int(expected.superblock["transaction"])
        assert snap.devices() == {dev: DeviceDetails(*model.details) for dev, model in expected.devices.items()}
        for dev, model in expected.devices.items():
            with snap.open_thin_device(dev) as thin:
                assert list(thin.mappings()) == runs_of(model.mappings)


@pytest.mark.parametrize("name", [name for name in fixtures.GOOD if fixtures.facts_of(name).metadata_snap is None])
def test_pool_without_a_metadata_snapshot_has_none_to_open(name: str) -> None:
    with pytest.raises(ThinError) as caught:
        PoolMetadata.open_metadata_snap(MemoryDevice(fixtures.image(name)))
    assert caught.value.errno == errno.ENODATA


# Damaged images

COUNTS = "the mappings are sound, and what a count says cannot be held against anything but a recount"
UNSEEN = {
    "data_allocated_wrong": COUNTS,
    "data_count_too_high": COUNTS,
    "data_count_too_low": COUNTS,
    "data_leak": COUNTS,
    "data_shared_too_low": COUNTS,
    "metadata_allocated_wrong": COUNTS,
    "details_missing": "a device without details is no device, for the kernel as well",
    "details_time_future": "the time of a device may be any number that fits",
    "mapped_blocks_wrong": "counting the mappings of a tree of many leaves would take reading all of it",
    "sb_needs_check": "the flag is what the superblock says it is",
    "sb_time_back": "the time is what the superblock says it is",
    "sb_transaction_back": "the transaction id is what the superblock says it is",
    "leaf_shortened": "a leaf with fewer entries is a leaf; the nodes above do not say how many there are",
    "value_at_free_block": "whether a mapped block is in use is for the check to compare; lookups do not read counts",
    "value_time_future": "the time of a mapping is compared with that of its device, not with the pool's",
    "value_twice": "two mappings of one data block are what sharing by hand looks like",
}
"""Faults that change an answer without breaking a rule that the query could see, and why.  ``thinpool.check`` sees
all of them but those that leave sound metadata."""

NOT_ASKED = {
    "data_index_free_wrong": "only allocations use the free count of a bitmap",
    "data_overflow_too_low": "what is asked is only whether a data block is shared, and it is",
    "metadata_bitmap_flipped": "only changes read it: see test_change_meets_the_damage",
    "metadata_count_too_high": COUNTS,
    "metadata_count_too_low": COUNTS,
    "metadata_leak": COUNTS,
    "sb_metadata_block_size": "there is only one size, the field means nothing",
    "sb_version": "versions 1 and 2 differ in nothing that is read, later ones use the feature flags",
}
"""Faults that no query comes across, and why."""


class Inquiry:
    """What was asked of a damaged pool: errors collected, wrong answers too."""

    def __init__(self) -> None:
        self.errors: list[ThinError] = []
        self.wrong: list[str] = []

    def ask(self, what: str, call: Callable[[], object], answer: object) -> None:
        """Compare an answer with the sound image's; *answer* is a class if that has no answer but this error."""
        try:
            found = call()
        except ThinError as error:
            if isinstance(answer, type) and type(error) is answer:
                return
            self.errors.append(error)
            return
        if found != answer:
            self.wrong.append(f"{what}: {found!r} instead of {answer!r}"[:300])


def inquire(name: str) -> Inquiry:
    """Ask the damaged pool *name* all sorts of things, and compare with what is known of the sound one."""
    base = fixtures.base_of(name)
    expected = expected_of(base)
    inquiry = Inquiry()
    try:
        pool = PoolMetadata.open(MemoryDevice(fixtures.image(name)), read_only=True)
    except ThinError as error:
        inquiry.errors.append(error)
        return inquiry
    with pool:
        wanted = {dev: DeviceDetails(*model.details) for dev, model in expected.devices.items()}
        inquiry.ask("devices", lambda: dict(pool.devices()), wanted)
        facts = fixtures.facts_of(base)
        inquiry.ask("time", lambda: pool.time, int(expected.superblock["time"]))
        inquiry.ask("transaction_id", lambda: pool.transaction_id, facts.transaction_id)
        inquiry.ask("needs_check", lambda: pool.needs_check, facts.needs_check)
        used = facts.nr_data_blocks - facts.used_data_blocks
        inquiry.ask("free_block_count", lambda: pool.free_block_count, used)
        free = facts.nr_metadata_blocks - facts.used_metadata_blocks - min(4096, facts.nr_metadata_blocks // 10)
        inquiry.ask("free_metadata_block_count", lambda: pool.free_metadata_block_count, free)
        ask_counts(inquiry, pool, base)
        for dev in spread(expected.devices, 25):
            try:
                thin = pool.open_thin_device(dev)
            except ThinError as error:
                inquiry.errors.append(error)
            else:
                ask_device(inquiry, dev, thin, expected.devices[dev])
                thin.close()
    return inquiry


def ask_counts(inquiry: Inquiry, pool: PoolMetadata, base: str) -> None:
    counts = Image.from_bytes(fixtures.image(base)).counts("data")
    for block in range(fixtures.facts_of(base).nr_data_blocks):
        count = counts.get(block, 0)
        try:
            found = pool.block_is_used(block), pool.block_is_shared(block)
        except ThinError as error:
            # One is enough: every block of the same bitmap meets the same damage.
            inquiry.errors.append(error)
            return
        if found != (count > 0, count > 1):
            inquiry.wrong.append(f"data block {block} used, shared: {found} with a count of {count}")


def ask_device(inquiry: Inquiry, dev: int, thin: ThinDevice, model: fixtures.DeviceModel) -> None:
    inquiry.ask(f"{dev} mapped_count", lambda: thin.mapped_count, len(model.mappings))
    inquiry.ask(f"{dev} highest", lambda: thin.highest_mapped_block, max(model.mappings, default=None))
    for block in spread(model.mappings, 300):
        data, time = model.mappings[block]
        answer = data, model.details.snapshotted_time > time
        inquiry.ask(f"{dev} find_block({block})", lambda block=block: thin.find_block(block), answer)  # type: ignore[misc]
    for block in absent_blocks(model.mappings):
        inquiry.ask(f"{dev} find_block({block})", lambda block=block: thin.find_block(block), NotMapped)  # type: ignore[misc]
    found: list[Run] = []
    try:
        found.extend(thin.mappings())
        whole = True
    except ThinError as error:
        inquiry.errors.append(error)
        whole = False
    blocks = blocks_of(found)
    if blocks != {thin: model.mappings[thin] for thin in sorted(model.mappings)[: len(blocks)]}:
        inquiry.wrong.append(f"{dev} mappings: not those of the sound image")
    elif whole and len(blocks) != len(model.mappings):
        inquiry.wrong.append(f"{dev} mappings: only {len(blocks)} of {len(model.mappings)}")


@pytest.fixture(params=[name for name in fixtures.DAMAGED if not name.startswith("metasnap_")])
def damaged_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_every_answer_is_right_or_names_the_damage(damaged_name: str) -> None:
    inquiry = inquire(damaged_name)
    for error in inquiry.errors:
        assert_names_the_damage(damaged_name, error)
    if damaged_name in UNSEEN:
        assert inquiry.wrong, "it is seen now: take it out of the table"
    else:
        assert not inquiry.wrong
        assert inquiry.errors or damaged_name in NOT_ASKED or damaged_name in IN_THE_METADATA_SNAPSHOT
    assert damaged_name not in NOT_ASKED or not inquiry.errors


IN_THE_METADATA_SNAPSHOT = ("sb_held_root_wrong", "metasnap_sb_flipped", "metasnap_root_zeroed")


def assert_names_the_damage(name: str, error: ThinError) -> None:
    if name == "details_missing":
        assert isinstance(error, NoSuchDevice)
        return
    if name in ("all_zero", "sb_zeroed"):
        assert error.errno == errno.EPERM
        assert "superblock" in str(error)
        return
    assert isinstance(error, Corrupt), repr(error)
    assert error.rule
    assert error.rule in str(error)
    assert error.block is not None
    assert f"metadata block {error.block}" in str(error)
    if error.block >= fixtures.facts_of(fixtures.base_of(name)).nr_metadata_blocks:
        assert "beyond the end" in error.rule  # a pointer that leads nowhere: where to is all that is known
    elif name in NAMED_BESIDE:
        assert error.block == NAMED_BESIDE[name]
    else:
        assert error.block in fixtures.changed_blocks(name) | ({0} if name.startswith("cut_") else set())


NAMED_BESIDE = {
    "sb_mapping_root_is_details": 607,  # sound, but not what the superblock says it is
    "two_devices_one_tree": 26,  # likewise
}


@pytest.mark.parametrize("name", IN_THE_METADATA_SNAPSHOT)
def test_damaged_metadata_snapshot_is_refused_by_name(name: str) -> None:
    with pytest.raises(Corrupt) as caught:
        ask_snapshot(name)
    held = fixtures.facts_of(fixtures.base_of(name)).metadata_snap
    assert caught.value.block in fixtures.changed_blocks(name) or (held is None and caught.value.block is not None)


def ask_snapshot(name: str) -> None:
    with PoolMetadata.open_metadata_snap(MemoryDevice(fixtures.image(name))) as snap:
        for dev in snap.devices():
            with snap.open_thin_device(dev) as thin:
                list(thin.mappings())


@pytest.mark.damages
@pytest.mark.parametrize(
    "name", ["data_bitmap_flipped", "data_bitmap_zeroed", "data_index_flipped", "metadata_bitmap_flipped"]
)
def test_change_meets_the_damage(name: str) -> None:
    device = MemoryDevice(fixtures.image(name))
    pool = PoolMetadata.open(device)
    with pool.open_thin_device(min(pool.devices())) as thin:
        with pytest.raises(Corrupt) as caught:
            thin.provision(1 << 40, 1)
        assert caught.value.block in fixtures.changed_blocks(name)
        pool.abort()
        assert thin.mapped_count
    pool.close()
    assert Image.from_bytes(device.contents()).superblock() == Image.from_bytes(fixtures.image(name)).superblock()
