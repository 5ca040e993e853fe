"""The readers of tests/data against each other: facts from one file have to agree with those from another."""

from __future__ import annotations

import pytest

from tests.support import fixtures


def test_every_image_of_the_manifest_is_there() -> None:
    assert len(fixtures.GOOD) == 29
    assert len(fixtures.DAMAGED) == 75
    assert not set(fixtures.GOOD) & set(fixtures.DAMAGED)


@pytest.mark.parametrize("name", fixtures.GOOD)
def test_dump_listing_check_and_manifest_agree(name: str) -> None:
    facts = fixtures.facts_of(name)
    pool = fixtures.read_xml(fixtures.answer(name, "xml"))
    assert len(pool.devices) == facts.nr_devices
    assert sum(len(device.mappings) for device in pool.devices.values()) == facts.nr_mappings
    assert all(device.details.mapped_blocks == len(device.mappings) for device in pool.devices.values())
    assert int(pool.superblock["transaction"]) == facts.transaction_id
    assert int(pool.superblock["data_block_size"]) == facts.data_block_size

    rows = fixtures.read_ls(fixtures.answer(name, "lsfull.txt"))
    assert {int(row["DEV"]): int(row["MAPPED_BLOCKS"]) for row in rows} == {
        dev: device.details.mapped_blocks for dev, device in pool.devices.items()
    }
    assert len(fixtures.read_ls(fixtures.answer(name, "ls.txt"))) == facts.nr_devices

    runs = fixtures.read_runs(fixtures.answer(name, "check.txt"))
    assert {command.split()[1]: run.status for command, run in runs.items()} == facts.check_status

    status, _ = fixtures.read_status(fixtures.answer(name, "reopen.txt"))
    if status is not None:
        assert (status.nr_data_blocks, status.nr_metadata_blocks) == (facts.nr_data_blocks, facts.nr_metadata_blocks)
        assert (status.metadata_snap, status.needs_check) == (facts.metadata_snap, facts.needs_check)


@pytest.mark.parametrize("name", fixtures.DAMAGED)
def test_damaged_image_differs_from_its_base(name: str) -> None:
    base = fixtures.base_of(name)
    assert base in fixtures.GOOD
    assert fixtures.changed_blocks(name) or len(fixtures.image(name)) < len(fixtures.image(base))
    runs = fixtures.read_runs(fixtures.answer(name, "expected.txt"))
    for version, status in fixtures.damage_of(name).check_status.items():
        assert runs[f"thin_check {version}"].status == status


def test_shared_parts_of_a_dump_are_expanded() -> None:
    dump = b"""<superblock uuid="" time="1" transaction="0" version="2" data_block_size="128" nr_data_blocks="8">
      <def name="9"><range_mapping origin_begin="0" data_begin="4" length="2" time="0"/></def>
      <device dev_id="7" mapped_blocks="3" transaction="0" creation_time="0" snap_time="1">
        <ref name="9"/><single_mapping origin_block="5" data_block="1" time="1"/>
      </device>
    </superblock>"""
    details, mappings = fixtures.read_xml(dump).devices[7]
    assert details == (3, 0, 0, 1)
    assert mappings == {0: (4, 0), 1: (5, 0), 5: (1, 1)}


def test_thin_block_mapped_twice_is_refused() -> None:
    dump = b"""<superblock>
      <device dev_id="7" mapped_blocks="2" transaction="0" creation_time="0" snap_time="1">
        <single_mapping origin_block="5" data_block="1" time="1"/>
        <single_mapping origin_block="5" data_block="2" time="1"/>
      </device>
    </superblock>"""
    with pytest.raises(ValueError, match="more than once"):
        fixtures.read_xml(dump)
