"""thin_rmap as a program."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.fixtures import DAMAGED, GOOD, image, image_path
from tests.support.image import Image
from tests.support.reverse import reverse_map_of
from tests.support.tools import Result, run_tool

if TYPE_CHECKING:
    from pathlib import Path


def rmap(*arguments: str | Path) -> Result:
    return run_tool("thin_rmap", *arguments)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return image_path("transaction_id", tmp_path)


def test_owners_are_told_in_lines_of_the_reference(pool: Path) -> None:
    assert rmap("--region", "95..105", pool).stdout.decode().splitlines() == [
        "data 95..100 -> thin(0) 95..100",
        "data 95..100 -> thin(2) 95..100",
        "data 95..100 -> thin(3) 95..100",
        "data 100..105 -> thin(0) 0..5",
    ]


@pytest.mark.parametrize("name", ["dirty_4", "shared_by_many", "snapshot_chain"])
def test_all_devices_that_share_a_block_are_told(name: str, tmp_path: Path) -> None:
    """Versions 0.9.0 and 1.1.0 of the reference tell one of those that share a node of their trees."""
    owners = {
        dev_id
        for dev_id, mappings in Image.from_bytes(image(name)).mappings().items()
        if 0 in {block for block, _ in mappings.values()}
    }
    lines = rmap("--region", "0..1", image_path(name, tmp_path)).stdout.decode().splitlines()
    assert lines == [f"data 0..1 -> thin({dev_id}) 0..1" for dev_id in sorted(owners)]
    assert len(owners) > 1


def test_regions_may_be_repeated(pool: Path) -> None:
    result = rmap("--region", "108..109", "--region=100..102", "--region", "101..103", pool)
    assert result == Result(0, b"data 100..103 -> thin(0) 0..3\ndata 108..109 -> thin(0) 8..9\n", "")


@pytest.mark.parametrize("region", ["5000..5001", "16384..16385", f"16384..{(1 << 64) - 1}"])
def test_no_mapping_is_no_output(pool: Path, region: str) -> None:
    assert rmap("--region", region, pool) == Result(0, b"", "")


def test_a_region_may_reach_beyond_the_end(pool: Path) -> None:
    assert rmap("--region", f"0..{(1 << 64) - 1}", pool) == rmap("--region", "0..16384", pool)


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        ("23,7890", "badly formed region"),
        ("23..six", "invalid digit found in string"),
        ("found..7890", "invalid digit found in string"),
        ("89..88", "end <= begin"),
        ("89..89", "end <= begin"),
        ("89..", "badly formed region"),
        ("..89", "badly formed region"),
        ("..", "badly formed region"),
        ("", "badly formed region"),
        ("89...99", "invalid digit found in string"),
        ("1..2..3", "invalid digit found in string"),
        ("0..-1", "invalid digit found in string"),
        (f"0..{1 << 64}", "number too large to fit in target type"),
    ],
)
def test_bad_regions_are_refused_with_the_reason(pool: Path, region: str, reason: str) -> None:
    result = rmap(f"--region={region}", pool)
    assert (result.status, result.stdout) == (64, b"")
    assert result.stderr.startswith(f"error: invalid value '{region}' for '--region <BLOCK_RANGE>': {reason}\n")


def test_a_region_is_required(pool: Path) -> None:
    wanted = "error: the following required arguments were not provided:\n  --region <BLOCK_RANGE>\n"
    assert rmap(pool).stderr.startswith(wanted)
    assert rmap("--region", "", pool).status == 64, "an empty value is passed over"


@pytest.mark.parametrize("name", GOOD)
def test_json_tells_what_the_lines_tell(name: str, tmp_path: Path) -> None:
    region = (0, 1 << 40)
    result = rmap("--json", "--region", "0..1099511627776", image_path(name, tmp_path))
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {
            "data_begin": run.data_begin,
            "length": run.data_end - run.data_begin,
            "dev_id": run.dev_id,
            "thin_begin": run.thin_begin,
        }
        for run in reverse_map_of(Image.from_bytes(image(name)), [region])
    ]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pool_is_read_or_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    result = rmap("--region", "0..100000", image_path(name, tmp_path))
    assert result.status in (0, 64)
    assert result.stderr.count("\n") == (result.status == 64)
    assert result.status == 0 or result.stdout == b""
    assert "internal error" not in result.stderr


def test_damage_is_refused_with_its_place(tmp_path: Path) -> None:
    result = rmap("--region", "0..1", image_path("leaf_flipped", tmp_path))
    assert (result.status, result.stdout) == (64, b"")
    assert result.stderr.startswith("mapping tree: node error: checksum error: block 106 ")
    assert "thin device 3, thin blocks [" in result.stderr
