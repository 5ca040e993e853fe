"""Images damaged on purpose: a part of what ``make test-crash`` does, whether faults are found, and what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.crash import fuzz
from tests.crash.damage import BASES, Case, base, make_case
from tests.support.surgeon import Surgeon
from thinpool import Corrupt, PoolMetadata, check, listing, pack
from thinpool.dump import dump
from thinpool.json_format import JsonWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bufio import MemoryDevice

pytestmark = pytest.mark.damages

NR_CASES = 60


@pytest.mark.parametrize("begin", range(0, NR_CASES, 20))
def test_damaged_images_get_true_answers_or_errors(begin: int) -> None:
    tally = fuzz.run(fuzz.Job(1, begin, begin + 20))
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.cases == 20
    assert tally.answers["damage: found"] > 5


def test_cases_follow_from_their_numbers() -> None:
    assert make_case(7, 3) == make_case(7, 3)
    assert len({make_case(7, number).content for number in range(20)}) > 15


@pytest.mark.parametrize("name", BASES)
def test_intact_images_are_clean(name: str) -> None:
    verdicts = fuzz.judge(Case(name, "nothing", base(name).content))
    assert verdicts["no damage: clean"] == 1
    assert verdicts["query answers"] == verdicts["dump as XML answers"] == 1


def test_sample_goes_through_the_real_commands() -> None:
    verdicts = fuzz.judge(Case("small", "nothing", base("small").content), also_commands=True)
    assert all(verdicts[f"{tool} ends with 0"] == 1 for tool in ("thin_check", "thin_dump", "thin_metadata_pack"))
    surgeon = Surgeon(base("small").content)
    surgeon.flip(surgeon.image.superblock().mapping_root)
    verdicts = fuzz.judge(Case("small", "a bit flipped", surgeon.content()), also_commands=True)
    assert all(verdicts[f"{tool} ends with 64"] == 1 for tool in ("thin_check", "thin_dump", "thin_ls", "thin_rmap"))


# That the judge is no yes-man


def _leaf_changed() -> Case:
    """A mapping leads to another data block than it did, and the counts say otherwise."""
    surgeon = Surgeon(base("small").content)
    surgeon.value(surgeon.leaves(surgeon.device_root(0))[0], 0, 1900 << 24)
    return Case("small", "a mapping changed", surgeon.content())


def test_check_that_finds_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*unused: object) -> Iterator[check.Finding]:
        return iter(())

    monkeypatch.setattr(check, "check", nothing)
    with pytest.raises(fuzz.WrongAnswer, match="check calls an image clean in which the data space map"):
        fuzz.judge(_leaf_changed())


def test_other_errors_than_those_of_the_library_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def clumsy(*unused: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(listing, "list_devices", clumsy)
    with pytest.raises(fuzz.WrongAnswer, match="ls raises IndexError: list index out of range"):
        fuzz.judge(_leaf_changed())


def test_endless_readers_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*unused: object) -> None:
        while True:
            pass

    monkeypatch.setattr(listing, "list_devices", endless)
    monkeypatch.setattr(fuzz, "DEADLINE", 0.5)
    with pytest.raises(fuzz.WrongAnswer, match=r"ls takes more than 0\.5 seconds"):
        fuzz.judge(_leaf_changed())


def test_two_ways_that_disagree_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pack.pack

    def wrong_by_arrays(device: MemoryDevice, write: Callable[[bytes], object]) -> None:
        right(device, write)
        if pack._BATCH_FROM_NODES == 0:
            write(b"more")

    monkeypatch.setattr(pack, "pack", wrong_by_arrays)
    with pytest.raises(fuzz.WrongAnswer, match=r"pack: .* the plain way, .* by arrays"):
        fuzz.judge(_leaf_changed())


# What was found this way


def test_number_of_data_blocks_without_bitmaps_takes_no_memory() -> None:
    """A superblock said that there were 2**32 data blocks, on a device of 144 metadata blocks.

    thin_ls made room to count each of them, 4 GiB, because some metadata device could hold the bitmaps of so many.
    This one cannot, and thin_check said so.  What counts nothing goes on.
    """
    surgeon = Surgeon(base("small").content)
    surgeon.superblock(data_nr_blocks=1 << 32)
    with pytest.raises(Corrupt, match="4294967296 blocks, more than bitmaps can be stored for"):
        listing.list_devices(surgeon.device(), listing.FIELDS)
    assert listing.list_devices(surgeon.device(), listing.DEFAULT_FIELDS)
    dump(surgeon.device(), JsonWriter(lambda piece: None))


def test_root_that_leads_nowhere_is_damage() -> None:
    """The root of a mapping tree with several leaves had lost its entries, all three of them.

    Asked for the highest mapped block, the engine looked for the last child and left with a ValueError.
    """
    surgeon = Surgeon(base("wide").content)
    root = surgeon.device_root(0)
    assert not surgeon.image.node(root).leaf
    surgeon.node(root, nr_entries=0)
    with (
        PoolMetadata.open(surgeon.device(), read_only=True) as pool,
        pytest.raises(Corrupt, match=f"block {root}: empty node that leads to others"),
    ):
        pool.open_thin_device(0)
