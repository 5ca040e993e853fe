"""thin_check as a program: what it prints where, its exit status, and how fast it starts."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.fixtures import DAMAGED, GOOD, answer, damage_of, facts_of, image_path, read_runs
from tests.support.surgeon import Surgeon
from tests.support.tools import Result, run_process, run_tool
from tools.thin_check import main

if TYPE_CHECKING:
    from pathlib import Path

FORBIDDEN_AT_START = {"argparse", "construct", "dataclasses", "logging", "numpy", "pathlib", "thinpool.metadata"}


def check(*arguments: str | Path) -> Result:
    return run_tool("thin_check", *arguments)


def operate(path: Path, **fields: int) -> None:
    surgeon = Surgeon(path.read_bytes())
    surgeon.superblock(**fields)
    path.write_bytes(surgeon.content())


# What it prints


@pytest.mark.parametrize("name", GOOD)
def test_stdout_and_verdict_are_the_recorded_ones(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = read_runs(answer(name, "check.txt"))["thin_check 1.1.0"]
    assert main([str(image_path(name, tmp_path))]) == recorded.status
    captured = capsys.readouterr()
    assert captured.out == recorded.stdout
    ours = [line for line in captured.err.splitlines() if not line.startswith("Bad reference count")]
    theirs = [line for line in recorded.stderr.splitlines() if "perhaps you wanted" not in line]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_explained_on_stderr_and_not_with_quiet(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(image_path(name, tmp_path))
    status = main([path])
    captured = capsys.readouterr()
    assert status in (0, 64)
    assert status == 64 or damage_of(name).check_status["1.1.0"] == 0
    assert "Traceback" not in captured.err
    if status:
        assert len(captured.err.splitlines()) > 1
    assert main(["-q", path]) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_messages_keep_the_words_that_scripts_look_for(tmp_path: Path) -> None:
    expected = {
        "leaf_flipped": [
            "1 nodes in data mapping tree contain errors",
            "0 io errors, 1 checksum errors",
            "Thin device 3 has 1 errors and is missing 224 mappings, while expected 12000",
            "Check of mappings failed",
        ],
        "internal_flipped": ["Thin device 3 is missing root with 12000 mappings", "Check of mappings failed"],
        "details_node_flipped": ["device details tree: node error: checksum error"],
        "top_node_flipped": ["mapping top-level: node error: checksum error"],
        "details_missing": ["Inconsistency between the details tree and the mapping tree"],
        "mapped_blocks_wrong": ["Thin device 0 has unexpected number of mappings, expected 3431, actual 3432"],
        "metadata_index_flipped": ["metadata space map: bad checksum in index block"],
        "metasnap_sb_flipped": ["metadata snap: bad checksum in superblock"],
        "data_leak": ["3 data blocks have leaked.", "data space map contains leaks"],
        "metadata_leak": ["3 metadata blocks have leaked.", "metadata space map contains leaks"],
        "data_count_too_high": [
            "Bad reference count for data block 1040.  Expected 1, but space map contains 2.",
            "data space map: Fatal errors in data space map",
        ],
    }
    for name, texts in expected.items():
        result = check(image_path(name, tmp_path))
        assert result.status == 64
        for text in texts:
            assert text in result.stderr, name


def test_damage_is_told_with_block_device_and_thin_blocks(tmp_path: Path) -> None:
    line = next(
        line for line in check(image_path("leaf_flipped", tmp_path)).stderr.splitlines() if "checksum error:" in line
    )
    assert "block 106" in line
    assert "thin device 3" in line
    assert re.search(r"thin blocks \[\d+\.\.182697\]", line)
    assert line.endswith("path 0/68/69/106")


def test_advice_does_not_fail_the_check(tmp_path: Path) -> None:
    result = check(image_path("sb_version", tmp_path))
    assert result.status == 0
    assert "advisory: superblock: version 4294967295" in result.stderr


def test_thousands_of_findings_are_counted_not_printed(tmp_path: Path) -> None:
    path = image_path("random", tmp_path)
    surgeon = Surgeon(path.read_bytes())
    bitmap = surgeon.bitmap_of("data", 0)
    surgeon.put(bitmap, surgeon.block(bitmap)[:16] + b"\x44" * 4080, "bitmap")  # every second count is two
    path.write_bytes(surgeon.content())
    result = check(path)
    assert result.status == 64
    assert len(result.stderr.splitlines()) < 200
    assert re.search(r"\.\.\. and \d+ more of: bad reference count", result.stderr)


def test_information_comes_as_soon_as_the_superblock_is_sound(tmp_path: Path) -> None:
    expected = b"TRANSACTION_ID=0\nMETADATA_FREE_BLOCKS=1982\n"
    assert check(image_path("leaf_flipped", tmp_path)).stdout == expected
    assert check("--super-block-only", image_path("random", tmp_path)).stdout == expected
    assert check(image_path("sb_checksum", tmp_path)).stdout == b""


def test_information_about_a_missing_or_damaged_snapshot_is_not_given(tmp_path: Path) -> None:
    assert check("-m", image_path("random", tmp_path)).stdout == b""
    assert check("-m", image_path("metasnap_sb_flipped", tmp_path)).stdout == b""
    assert check("-m", image_path("metadata_snapshot", tmp_path)).stdout.startswith(b"TRANSACTION_ID=0\n")


# Options


@pytest.mark.parametrize("option", ["--ignore-non-fatal-errors", "--skip-mappings", "--super-block-only"])
def test_options_that_look_away_from_leaks(tmp_path: Path, option: str) -> None:
    path = image_path("metadata_leak", tmp_path)
    assert check(path).status == 64
    assert check(option, path).status == 0


def test_ignored_leaks_are_still_reported(tmp_path: Path) -> None:
    result = check("--ignore-non-fatal-errors", image_path("metadata_leak", tmp_path))
    assert "3 metadata blocks have leaked." in result.stderr


def test_the_superblock_alone_may_be_checked_in_a_file_of_one_block(tmp_path: Path) -> None:
    assert check("--super-block-only", image_path("cut_to_superblock", tmp_path)).status == 0


@pytest.mark.parametrize("option", [[], ["--skip-mappings"], ["--super-block-only"]])
def test_needs_check_is_cleared_when_asked_to(tmp_path: Path, option: list[str]) -> None:
    path = image_path("needs_check", tmp_path)
    before = path.read_bytes()
    assert check(*option, path).status == 0
    assert path.read_bytes() == before, "not unless asked to"
    result = check(*option, "--clear-needs-check-flag", path)
    assert (result.status, "Cleared needs_check flag" in result.stderr) == (0, True)
    after = Surgeon(path.read_bytes())
    assert after.image.superblock().flags == 0
    operate(path, flags=1)
    assert path.read_bytes() == before, "nothing else was changed"


def test_needs_check_stays_when_the_check_fails(tmp_path: Path) -> None:
    path = image_path("metadata_leak", tmp_path)
    operate(path, flags=1)
    assert check("--clear-needs-check-flag", path).status == 64
    assert Surgeon(path.read_bytes()).image.superblock().flags == 1
    assert check("--clear-needs-check-flag", "--ignore-non-fatal-errors", path).status == 0
    assert Surgeon(path.read_bytes()).image.superblock().flags == 0


def test_other_flags_survive_the_clearing(tmp_path: Path) -> None:
    path = image_path("random", tmp_path)
    operate(path, flags=0x81)
    assert check("-q", "--clear-needs-check-flag", path).status == 0
    assert Surgeon(path.read_bytes()).image.superblock().flags == 0x80


def test_nothing_is_written_when_there_is_nothing_to_clear(tmp_path: Path) -> None:
    path = image_path("random", tmp_path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    result = check("--clear-needs-check-flag", path)
    assert (result.status, "Cleared" in result.stderr) == (0, False)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_the_flag_is_not_cleared_by_a_look_at_the_snapshot(tmp_path: Path) -> None:
    result = check("--clear-needs-check-flag", "-m", image_path("metadata_snapshot", tmp_path))
    assert result.status == 64
    assert "the argument '--clear-needs-check-flag' cannot be used with '--metadata-snap'" in result.stderr


def test_repair_is_refused_rather_than_left_out(tmp_path: Path) -> None:
    result = check("--auto-repair", image_path("metadata_leak", tmp_path))
    assert result.status == 64
    assert "--auto-repair" in result.stderr


def test_volume_managers_default_options_work(tmp_path: Path) -> None:
    result = check("-q", "--clear-needs-check-flag", image_path("needs_check", tmp_path))
    assert result == Result(0, b"", "")


# Start-up


def _loaded(import_times: str) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in import_times.splitlines() if line.startswith("import time:")}


def test_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    """The smallest pool must take less time than the loading of any of these.

    What the interpreter loads by itself does not count: an editable installation has it load a good deal.
    """
    result = run_process("thin_check", "-q", image_path("empty", tmp_path), flags=["-X", "importtime"])
    assert result.status == 0
    bare = subprocess.run([sys.executable, "-X", "importtime", "-c", ""], capture_output=True, text=True, check=True)
    loaded = _loaded(result.stderr) - _loaded(bare.stderr)
    assert "thinpool.check" in loaded
    found = {name for name in loaded if name in FORBIDDEN_AT_START or name.partition(".")[0] in FORBIDDEN_AT_START}
    assert not found


def test_facts_of_the_pool_are_the_recorded_ones(tmp_path: Path) -> None:
    for name in ("mixed", "transaction_id"):
        facts = facts_of(name)
        free = facts.nr_metadata_blocks - facts.used_metadata_blocks
        expected = f"TRANSACTION_ID={facts.transaction_id}\nMETADATA_FREE_BLOCKS={free}\n"
        assert check(image_path(name, tmp_path)).stdout.decode() == expected
