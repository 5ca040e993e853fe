"""Check, dump and listing on every image: the verdicts and the bytes that thin-provisioning-tools 1.1.0 recorded."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from bufio.device import MemoryDevice
from persistent_data.damage import FATAL
from tests.support.fixtures import (
    DAMAGED,
    GOOD,
    answer,
    base_of,
    changed_blocks,
    facts_of,
    has_answer,
    image,
    read_runs,
    read_xml,
)
from thinpool.check import Options, Report, check_report
from thinpool.dump import Options as DumpOptions
from thinpool.dump import dump
from thinpool.errors import Corrupt
from thinpool.listing import DEFAULT_FIELDS, FIELDS, format_table, list_devices
from thinpool.xml_format import XmlWriter

if TYPE_CHECKING:
    from collections.abc import Callable

SNAPSHOTS = [name for name in GOOD if has_answer(name, "metasnap.xml")]


def xml_of(name: str, metadata_snap: bool = False) -> bytes:
    out = io.BytesIO()
    dump(MemoryDevice(image(name)), XmlWriter(out.write), DumpOptions(metadata_snap=metadata_snap))
    return out.getvalue()


def table_of(name: str, fields: list[str], metadata_snap: bool = False) -> bytes:
    return format_table(fields, list_devices(MemoryDevice(image(name)), fields, metadata_snap)).encode()


# Good images


@pytest.mark.parametrize("name", GOOD)
def test_dump_is_byte_for_byte_the_recorded_one(name: str) -> None:
    assert xml_of(name) == answer(name, "xml")


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_dump_of_the_metadata_snapshot_is_the_recorded_one_but_for_the_number_of_data_blocks(name: str) -> None:
    """Where the reference says 0, from which nothing can be restored."""
    size = b'nr_data_blocks="%d"' % facts_of(name).nr_data_blocks
    assert answer(name, "metasnap.xml").count(b'nr_data_blocks="0"') == 1
    assert xml_of(name, metadata_snap=True) == answer(name, "metasnap.xml").replace(b'nr_data_blocks="0"', size)


@pytest.mark.parametrize("name", GOOD)
def test_listing_is_byte_for_byte_the_recorded_one(name: str) -> None:
    assert table_of(name, list(DEFAULT_FIELDS)) == answer(name, "ls.txt")


@pytest.mark.parametrize("name", GOOD)
def test_listing_of_every_column_is_byte_for_byte_the_recorded_one(name: str) -> None:
    recorded = answer(name, "lsfull.txt")
    assert table_of(name, recorded.decode().splitlines()[0].split()) == recorded


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_listing_of_the_metadata_snapshot_is_byte_for_byte_the_recorded_one(name: str) -> None:
    assert table_of(name, list(DEFAULT_FIELDS), metadata_snap=True) == answer(name, "metasnap.ls.txt")


@pytest.mark.parametrize("name", GOOD)
def test_highest_fields_are_those_of_the_last_mapping(name: str) -> None:
    """The recorded tables do not have them, the recorded XML does."""
    model = read_xml(answer(name, "xml"))
    sectors = int(model.superblock["data_block_size"])
    fields = ["DEV", "HIGHEST_BLOCK", "HIGHEST_SECTOR", "HIGHEST_BYTE"]
    expected = []
    for dev_id, device in model.devices.items():
        if device.mappings:
            end = (max(device.mappings) + 1) * sectors
            expected.append([str(dev_id), str(end // sectors - 1), str(end - 1), str(end * 512 - 1)])
        else:
            expected.append([str(dev_id), "-", "-", "-"])
    assert list_devices(MemoryDevice(image(name)), fields) == expected


@pytest.mark.parametrize("name", GOOD)
def test_every_finding_in_a_kernel_made_pool_is_one_that_was_recorded(name: str) -> None:
    """Two pools have leaks, because the kernel was killed or ran out of space.  There is not even advice otherwise."""
    report = check_report(MemoryDevice(image(name)))
    recorded = read_runs(answer(name, "check.txt"))["thin_check 1.1.0"]
    assert report.ok == (recorded.status == 0)
    leaked = sum(finding.keys[1] - finding.keys[0] for finding in report.findings if finding.keys)
    assert {finding.rule for finding in report.findings} <= {"leak"}
    assert (f"{leaked} data blocks have leaked." in recorded.stderr) == bool(leaked)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_metadata_snapshots_are_sound(name: str) -> None:
    assert check_report(MemoryDevice(image(name)), Options(metadata_snap=True)).findings == []


# Damaged images: the verdict of the check

KERNEL_REFUSES = "the kernel refuses to load such a pool"
STRICTER = {
    # image: options under which 1.1.0 passes it and we do not, and why
    "sb_magic": ({"", "--ignore-non-fatal-errors", "--skip-mappings", "--super-block-only"}, KERNEL_REFUSES),
    "sb_blocknr": ({"", "--ignore-non-fatal-errors", "--skip-mappings", "--super-block-only"}, KERNEL_REFUSES),
    "sb_incompat": ({"", "--ignore-non-fatal-errors", "--skip-mappings", "--super-block-only"}, KERNEL_REFUSES),
    "sb_data_block_size": ({"", "--ignore-non-fatal-errors", "--skip-mappings", "--super-block-only"}, KERNEL_REFUSES),
    "sb_metadata_size": ({"", "--ignore-non-fatal-errors", "--skip-mappings"}, KERNEL_REFUSES),
    "cut_free_part": ({"", "--ignore-non-fatal-errors", "--skip-mappings"}, KERNEL_REFUSES),
    "cut_within_block": ({"--skip-mappings"}, KERNEL_REFUSES),
    "metasnap_sb_flipped": (
        {"--skip-mappings"},
        "the metadata snapshot's trees are part of that check, and unreachable",
    ),
    "value_outside_device": ({"--ignore-non-fatal-errors"}, "1.1.0 sees only a leak; reading that thin block fails"),
}
LAXER = {
    "sb_needs_check": ({"--skip-mappings"}, "1.1.0 fails in clearing the flag, which nobody asked it to"),
}
OPTIONS = {
    "": Options(),
    "--ignore-non-fatal-errors": Options(),
    "--skip-mappings": Options(skip_mappings=True),
    "--super-block-only": Options(super_block_only=True),
}


def passes(report: Report, option: str) -> bool:
    return report.worst != FATAL if option == "--ignore-non-fatal-errors" else report.ok


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", DAMAGED)
def test_verdict_is_the_recorded_one_or_stricter_for_a_reason(name: str, option: str) -> None:
    ours = passes(check_report(MemoryDevice(image(name)), OPTIONS[option]), option)
    theirs = read_runs(answer(name, "expected.txt"))[f"thin_check 1.1.0 {option}".strip()].status == 0
    if option in STRICTER.get(name, (set(), ""))[0]:
        assert (ours, theirs) == (False, True)
    elif option in LAXER.get(name, (set(), ""))[0]:
        assert (ours, theirs) == (True, False)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", [name for name in DAMAGED if not name.startswith(("all_", "cut_", "sb_"))])
def test_tree_damage_is_placed_in_a_block_that_was_changed(name: str) -> None:
    """Or on the way to one: a parent names a child whose content it does not go with."""
    report = check_report(MemoryDevice(image(name)))
    assert report.findings
    changed = changed_blocks(name)
    for finding in report.of(FATAL):
        if "node error" in finding.message:
            assert changed & {*finding.path}, finding.message


# Damaged images: what is read out of them

NOT_A_SUPERBLOCK = "1.1.0 does not look at the superblock's magic, block number and feature flags"
WRONG_CONTENT = "1.1.0 writes something other than what the pool held"
STRICTER_DUMP = {
    "sb_magic": NOT_A_SUPERBLOCK,
    "sb_blocknr": NOT_A_SUPERBLOCK,
    "sb_incompat": NOT_A_SUPERBLOCK,
    "child_twice": WRONG_CONTENT,
    "children_swapped": WRONG_CONTENT,
    "details_missing": WRONG_CONTENT,
    "internal_marked_leaf": WRONG_CONTENT,
    "leaf_blocknr": "1.1.0 does not look at a node's block number",
    "leaf_shortened": WRONG_CONTENT,
    "leaves_swapped": WRONG_CONTENT,
    "mapped_blocks_wrong": "the number of mappings is not the one in the details",
    "parent_key_high": "a lookup does not find what 1.1.0 writes",
    "top_entry_missing": WRONG_CONTENT,
    "two_devices_one_tree": "the number of mappings is not the one in the details",
    "value_outside_device": "a mapping leads outside the data device",
}


def refusal(read: Callable[[], object]) -> Corrupt | None:
    """The error that *read* ends with, None if it does not."""
    try:
        read()
    except Corrupt as error:
        return error
    return None


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pool_is_refused_or_dumped_as_recorded(name: str) -> None:
    theirs = read_runs(answer(name, "expected.txt"))["thin_dump 1.1.0"].status == 0
    error = refusal(lambda: xml_of(name))
    assert (error is None) == (theirs and name not in STRICTER_DUMP)
    if error is not None:
        assert error.block is not None or error.rule == "inconsistent device ids"
        assert error.strerror
        assert "\n" not in error.strerror


UNCHANGED_BY_THE_DAMAGE = [
    name
    for name in DAMAGED
    if name.startswith(("data_", "metadata_", "metasnap_"))
    or name in {"cut_free_part", "cut_within_block", "sb_held_root_wrong", "sb_metadata_size", "sb_metadata_block_size"}
]


@pytest.mark.parametrize("name", UNCHANGED_BY_THE_DAMAGE)
def test_damage_outside_the_mapping_trees_does_not_change_a_dump(name: str) -> None:
    assert xml_of(name) == answer(base_of(name), "xml")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_listing_refuses_what_a_dump_refuses(name: str) -> None:
    listed = refusal(lambda: list_devices(MemoryDevice(image(name)), FIELDS))
    assert (listed is None) == (refusal(lambda: xml_of(name)) is None)
