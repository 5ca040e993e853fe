"""thin_metadata_size as a program, against what the reference was recorded to answer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.fixtures import DATA, read_runs
from tests.support.tools import ROOT, Result, run_tool

TOOL = "thin_metadata_size"
POOL = ["-b", "64k", "-s", "1t", "-m", "1000"]
RECORDED = {
    command.removeprefix(f"{TOOL} 1.1.0 "): run
    for command, run in read_runs((DATA / "metadata_size.txt").read_bytes()).items()
}


def size(*arguments: str) -> Result:
    return run_tool(TOOL, *arguments)


def test_enough_is_recorded() -> None:
    assert len(RECORDED) > 120
    assert {run.status for run in RECORDED.values()} == {0, 2, 64}


@pytest.mark.parametrize("line", RECORDED)
def test_answers_are_the_recorded_ones(line: str) -> None:
    recorded = RECORDED[line]
    result = size(*line.split())
    assert result.stdout.decode() == recorded.stdout
    if recorded.status != 2:
        assert (result.status, result.stderr.strip()) == (recorded.status, recorded.stderr.strip())
        return
    # A usage error, with which volume managers must not see status 2, and the reason that the reference gives.
    assert result.status == 64
    if "invalid value" in recorded.stderr:
        assert result.stderr.startswith(recorded.stderr.partition("--")[0])
    elif "unexpected" in recorded.stderr and "-m -1" not in line:
        assert result.stderr.partition("\n")[0] == recorded.stderr.partition("\n")[0]


def test_what_is_missing_is_named() -> None:
    wanted = "error: the following required arguments were not provided:\n"
    assert size().stderr.startswith(wanted + "  --block-size <SIZE>\n  --pool-size <SIZE>\n  --max-thins <NUM>\n\n")
    assert size("-b", "64k", "-m1").stderr.startswith(wanted + "  --pool-size <SIZE>\n\n")


def test_every_part_of_the_answer_is_in_the_json_object() -> None:
    result = size(*POOL, "--json")
    assert (result.status, result.stderr, result.stdout.count(b"\n")) == (0, "", 1)
    assert json.loads(result.stdout) == {
        "data_block_size_bytes": 65536,
        "pool_size_bytes": 1 << 40,
        "max_thins": 1000,
        "metadata_blocks": 134154,
        "metadata_bytes": 549494784,
        "metadata_sectors": 1073232,
        "metadata_blocks_wanted": 134154,
        "limited": False,
    }


def test_json_says_when_no_metadata_device_would_be_large_enough() -> None:
    answer = json.loads(size("-b64k", "-s40t", "-m1", "--json").stdout)
    assert answer["limited"]
    assert answer["metadata_blocks_wanted"] > answer["metadata_blocks"] == 4161600


@pytest.mark.parametrize("other", ["-n", "-n=short", "-um"])
def test_json_takes_no_format(other: str) -> None:
    result = size(*POOL, "--json", other)
    assert result.status == 64
    assert "cannot be used with" in result.stderr


def test_a_number_of_devices_that_wraps_at_64_bits_in_the_reference() -> None:
    assert size("-b", "64k", "-s", "1t", "-m", str((1 << 64) - 1)).stdout == b"33292800 sectors\n"


@pytest.mark.parametrize(("old", "new"), [("1k", "1024"), ("1K", "1000"), ("2M", "2000000")])
def test_devices_can_be_counted_in_thousands_as_before_1_0(old: str, new: str) -> None:
    assert size("-b64k", "-s1t", "-m", old) == size("-b64k", "-s1t", "-m", new)


@pytest.mark.parametrize("number", ["1b", "1s", "1x", "1.5k"])
def test_devices_have_no_bytes(number: str) -> None:
    assert "invalid value" in size("-b64k", "-s1t", "-m", number).stderr


@pytest.mark.parametrize("style", ["short", "long"])
def test_styles_are_taken_as_before_1_0(style: str) -> None:
    assert size(*POOL, f"-n{style}") == size(*POOL, f"-n={style}")


@pytest.mark.parametrize(("one", "other"), [("64kibibytes", "64k"), ("65536bytes", "64k"), ("128sectors", "64k")])
def test_names_of_units_may_be_plural(one: str, other: str) -> None:
    assert size("-b", one, "-s1t", "-m1") == size("-b", other, "-s1t", "-m1")


def test_stratis_gets_whole_sectors() -> None:
    """The call of docs/tools/thin_metadata_size.md, "Callers"."""
    result = size("-b", "524288b", "-s", "1099511627776b", "-m", "10", "-n")
    assert int(result.stdout) % 8 == 0


def test_it_starts_without_what_it_does_not_need() -> None:
    # What the interpreter itself has loaded depends on how the package is installed.
    program = (
        f"import sys; before = set(sys.modules); from tools.{TOOL} import main; "
        f"main({POOL}); print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"argparse", "construct", "dataclasses", "decimal", "json", "logging", "numpy", "pathlib"}
