"""thin_ls as a program."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest

from tests.support.fixtures import DATA, GOOD, answer, facts_of, image_path, read_xml
from tests.support.tools import Result, run_tool
from thinpool.listing import FIELDS, human_size
from tools._progress import Progress

if TYPE_CHECKING:
    from pathlib import Path


def ls(*arguments: str | Path) -> Result:
    return run_tool("thin_ls", *arguments)


def test_the_default_table_is_the_recorded_one(tmp_path: Path) -> None:
    assert ls(image_path("mixed", tmp_path)) == Result(0, answer("mixed", "ls.txt"), "")


def test_every_column_can_be_asked_for(tmp_path: Path) -> None:
    recorded = answer("mixed", "lsfull.txt")
    fields = ",".join(recorded.decode().splitlines()[0].split())
    assert ls("-o", fields, image_path("mixed", tmp_path)) == Result(0, recorded, "")


def test_the_metadata_snapshot_is_listed(tmp_path: Path) -> None:
    recorded = answer("metadata_snapshot", "metasnap.ls.txt")
    assert ls("--metadata-snap", image_path("metadata_snapshot", tmp_path)) == Result(0, recorded, "")


def test_headers_can_be_left_out(tmp_path: Path) -> None:
    result = ls("--no-headers", "-m", "-o", "DEV,EXCLUSIVE_BYTES", image_path("metadata_snapshot", tmp_path))
    shared = read_xml(answer("metadata_snapshot", "metasnap.xml")).devices
    blocks = [{block for block, _ in shared[dev_id].mappings.values()} for dev_id in (0, 1)]
    assert not blocks[0] & blocks[1]
    assert result.stdout.decode() == "".join(f"{i} {len(blocks[i]) * 65536} \n" for i in (0, 1))
    assert ls("--no-headers", image_path("empty", tmp_path)).stdout == b""


def test_a_device_without_mappings_has_no_highest_block(tmp_path: Path) -> None:
    result = ls("--no-headers", "--format=DEV,HIGHEST_BLOCK", image_path("devices_without_mappings", tmp_path))
    assert result.stdout.splitlines()[0].split() == [b"0", b"-"]


@pytest.mark.parametrize("fields", ["FOO", "", "DEV,,MAPPED", "dev"])
def test_an_unknown_field_is_a_usage_error(tmp_path: Path, fields: str) -> None:
    result = ls(f"--format={fields}", image_path("empty", tmp_path))
    assert result.status == 64
    assert f"invalid value '{fields}' for '--format <FIELDS>': Unknown field" in result.stderr


def test_damage_is_refused_with_its_place(tmp_path: Path) -> None:
    result = ls("-o", "DEV,EXCLUSIVE", image_path("leaf_flipped", tmp_path))
    assert (result.status, result.stdout) == (64, b"")
    assert result.stderr.count("\n") == 1
    assert "block 106" in result.stderr


def test_what_the_details_say_is_held_against_the_mappings_where_those_are_read(tmp_path: Path) -> None:
    path = image_path("mapped_blocks_wrong", tmp_path)
    assert ls("--no-headers", "-o", "MAPPED_BLOCKS", path).stdout.split()[0] == b"3431"
    result = ls("-o", "MAPPED_BLOCKS,HIGHEST_BLOCK", path)
    assert (result.status, result.stdout) == (64, b"")
    assert "Thin device 0 has unexpected number of mappings, expected 3431, actual 3432" in result.stderr


@pytest.mark.parametrize("name", GOOD)
def test_highest_blocks_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    """But for devices without mappings, of which it says what it says of a device that has block 0."""
    digest, fields = next(
        (words[0], words[4])
        for words in map(str.split, (DATA / "dumps.txt").read_text().splitlines())
        if words[2:4] == [name, "-o"]
    )
    last_byte = facts_of(name).data_block_size * 512 - 1
    block_0 = ["0", str(last_byte // 512), str(last_byte), human_size(last_byte)]
    rows = [line.split() for line in ls("-o", fields, image_path(name, tmp_path)).stdout.decode().splitlines()]
    rows = [row[:1] + block_0 if row[1] == "-" else row for row in rows]
    assert hashlib.sha256("".join(" ".join(row) + "\n" for row in rows).encode()).hexdigest() == digest


@pytest.mark.parametrize("name", GOOD)
def test_json_tells_what_the_table_tells(name: str, tmp_path: Path) -> None:
    path = image_path(name, tmp_path)
    fields = ",".join(FIELDS)
    rows = [line.split() for line in ls("--no-headers", "-o", fields, path).stdout.decode().splitlines()]
    objects = [json.loads(line) for line in ls("--json", "-o", fields, path).stdout.decode().splitlines()]
    assert [list(one) for one in objects] == [list(FIELDS)] * len(rows)
    assert [["-" if value is None else str(value) for value in one.values()] for one in objects] == rows
    for one in objects:
        assert all(isinstance(one[field], int) for field in ("DEV", "MAPPED_BYTES", "SHARED_SECTORS", "CREATE_TIME"))
        assert isinstance(one["MAPPED"], str)


def test_a_listing_that_takes_long_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, int, int]] = []

    class Recorder(Progress):
        def __call__(self, done: int, total: int) -> None:
            shown.append((self._title, done, total))

    monkeypatch.setattr("tools.thin_ls.Progress", Recorder)
    path = image_path("mixed", tmp_path)
    ls(path)
    assert shown == [], "the default fields are at hand"
    ls("-o", "EXCLUSIVE", path)
    total = sum(device.details.mapped_blocks for device in read_xml(answer("mixed", "xml")).devices.values())
    assert {title for title, _, _ in shown} == {"Scanning data mappings"}
    assert [done for _, done, _ in shown] == sorted(done for _, done, _ in shown)
    assert 0 < shown[0][1] <= shown[-1][1] <= total == shown[-1][2]
