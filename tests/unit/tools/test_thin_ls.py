"""thin_ls as a program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.fixtures import answer, image_path, read_xml
from tests.support.tools import Result, run_tool

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
    result = ls(image_path("leaf_flipped", tmp_path))
    assert (result.status, result.stdout) == (64, b"")
    assert result.stderr.count("\n") == 1
    assert "block 106" in result.stderr
