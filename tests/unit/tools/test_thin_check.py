"""thin_check as a program: what it prints where, its exit status, and how fast it starts."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from bufio.device import FileDevice, MemoryDevice
from tests.support.fixtures import (
    DAMAGED,
    GOOD,
    answer,
    base_of,
    damage_of,
    facts_of,
    image,
    image_path,
    read_runs,
)
from tests.support.pools import assert_sound
from tests.support.surgeon import Surgeon
from tests.support.tools import ROOT, Result, command, run_as_anybody, run_process, run_tool
from thinpool.check import check_report
from tools.thin_check import main

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

FORBIDDEN_AT_START = {
    "argparse",
    "construct",
    "dataclasses",
    "json",
    "logging",
    "numpy",
    "pathlib",
    "thinpool.leak_repair",
    "thinpool.metadata",
}


STRICTER = {
    "cut_free_part",
    "sb_blocknr",
    "sb_data_block_size",
    "sb_incompat",
    "sb_magic",
    "sb_metadata_size",
    "value_outside_device",
}
"""Damaged images that 1.1.0 passes and we do not; tests/unit/thinpool/test_fixtures.py has the reasons."""


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
    assert sorted(ours) == sorted(recorded.stderr.splitlines())


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
    assert "contains leaks" not in result.stderr


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


@pytest.mark.parametrize("option", ["--clear-needs-check-flag", "--auto-repair"])
@pytest.mark.parametrize("name", ["leaf_flipped", "data_count_too_high", "mapped_blocks_wrong"])
def test_nothing_is_written_when_something_is_fatal(tmp_path: Path, name: str, option: str) -> None:
    path = image_path(name, tmp_path)
    operate(path, flags=1)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert check(option, path).status == 64
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def underfull(tmp_path: Path) -> Path:
    """A pool with an underfull leaf, the leaks that came of it, and the flag set."""
    path = image_path("random", tmp_path)
    surgeon = Surgeon(path.read_bytes())
    leaf = surgeon.leaves(surgeon.device_root(3))[1]
    surgeon.details(3, mapped_blocks=12000 - len(surgeon.image.node(leaf).keys) + 83)
    surgeon.keep(leaf, 83)
    surgeon.superblock(flags=1)
    path.write_bytes(surgeon.content())
    return path


def test_nothing_is_written_when_something_beside_leaks_fails_the_check(tmp_path: Path) -> None:
    path = underfull(tmp_path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    for option in ("--clear-needs-check-flag", "--auto-repair"):
        assert check(option, path).status == 64
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_what_is_ignored_does_not_keep_leaks_from_being_repaired(tmp_path: Path) -> None:
    path = underfull(tmp_path)
    result = check("--clear-needs-check-flag", "--ignore-non-fatal-errors", path)
    assert (result.status, result.stderr.splitlines()[-1]) == (0, "Cleared needs_check flag")
    assert "Repairing data leaks." in result.stderr
    assert check("--ignore-non-fatal-errors", path).stderr.count("leak") == 0


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


@pytest.mark.parametrize("option", ["--auto-repair", "--clear-needs-check-flag"])
@pytest.mark.parametrize(("name", "kind"), [("data_leak", "data"), ("metadata_leak", "metadata")])
def test_leaks_are_repaired_and_the_flag_is_cleared(tmp_path: Path, name: str, kind: str, option: str) -> None:
    path = image_path(name, tmp_path)
    operate(path, flags=1)
    result = check(option, path)
    assert result.status == 0
    lines = [f"3 {kind} blocks have leaked.", f"Repairing {kind} leaks."]
    assert [line for line in result.stderr.splitlines() if "leak" in line] == lines
    assert result.stderr.endswith("Cleared needs_check flag\n")
    assert_sound(MemoryDevice(path.read_bytes()))
    assert check("--json", path).stdout.count(b"\n") == 2, "no finding any more"
    assert check(option, path).stderr.count("\n") == 5


def test_the_flag_is_cleared_but_leaks_stay_where_they_were_not_looked_for(tmp_path: Path) -> None:
    for option in ("--skip-mappings", "--super-block-only"):
        path = image_path("metadata_leak", tmp_path)
        operate(path, flags=1)
        result = check("--clear-needs-check-flag", option, path)
        assert (result.status, result.stderr.splitlines()[-1]) == (0, "Cleared needs_check flag")
        assert check(path).status == 64


def test_wrong_free_counts_alone_are_corrected_by_auto_repair_only(tmp_path: Path) -> None:
    """Volume managers ask for the other at each activation."""
    path = image_path("data_index_free_wrong", tmp_path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert check("--clear-needs-check-flag", path).status == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    result = check("--auto-repair", path)
    assert (result.status, result.stderr.splitlines()[-1]) == (0, "Correcting free counts.")
    assert_sound(MemoryDevice(path.read_bytes()))


@pytest.mark.parametrize("name", DAMAGED)
def test_auto_repair_gives_the_recorded_verdict_or_a_stricter_one(name: str, tmp_path: Path) -> None:
    path = image_path(name, tmp_path)
    before = path.read_bytes()
    ours = check("--auto-repair", path)
    recorded = read_runs(answer(name, "expected.txt"))["thin_check 1.1.0 --auto-repair"].status
    assert ours.status == 64 or recorded == 0
    assert ours.status == check(path).status
    if ours.status:
        assert path.read_bytes() == before
        assert recorded == 64 or name in STRICTER


def test_an_error_in_writing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image_path("metadata_leak", tmp_path)
    before = path.read_bytes()

    def fail(self: FileDevice, data: object, offset: int) -> None:
        raise OSError(errno.EIO, "cannot write", self.path)

    monkeypatch.setattr(FileDevice, "pwrite", fail)
    result = check("--auto-repair", path)
    last = result.stderr.splitlines()[-1]
    assert (result.status, last) == (64, f"cannot write the repair: {path}: cannot write: the metadata is as it was")
    assert path.read_bytes() == before


WRITING = ["--auto-repair", "--clear-needs-check-flag"]


@pytest.mark.parametrize("option", WRITING)
def test_a_repair_needs_permission_to_write(tmp_path: Path, option: str) -> None:
    path = image_path("data_leak", tmp_path)
    path.chmod(0o444)
    before = path.read_bytes()
    result = run_as_anybody("thin_check", option, path)
    assert (result.status, result.stdout) == (64, b"")
    assert result.stderr == f"Couldn't open input file '{path}': Permission denied (os error 13)\n"
    assert path.read_bytes() == before


@pytest.mark.parametrize("option", WRITING)
def test_a_pool_in_use_is_not_repaired(tmp_path: Path, option: str) -> None:
    path = image_path("data_leak", tmp_path)
    before = path.read_bytes()
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert "Device or resource busy (os error 16)" in check(option, path).stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("option", WRITING)
@pytest.mark.parametrize("output", ["pipe", "/dev/full"])
def test_nothing_is_repaired_that_cannot_be_told(tmp_path: Path, option: str, output: str) -> None:
    path = image_path("data_leak", tmp_path)
    before = path.read_bytes()
    if output == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(output, os.O_WRONLY)
    line = command("thin_check", option, path)
    done = subprocess.run(line, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writing)
    assert done.returncode == 64
    assert done.stderr.decode().removeprefix("Checking thin metadata\n") == (
        "" if output == "pipe" else "output error: No space left on device (os error 28)\n"
    )
    assert path.read_bytes() == before


def test_a_repair_does_not_change_the_dump(tmp_path: Path) -> None:
    path = image_path("dirty_2", tmp_path)
    assert check("-q", "--auto-repair", path) == Result(0, b"", "")
    assert run_tool("thin_dump", path).stdout == answer("dirty_2", "xml")


@pytest.mark.parametrize(
    ("one", "others"),
    [
        (
            "--auto-repair",
            [
                "--ignore-non-fatal-errors",
                "--metadata-snap",
                "--override-mapping-root <BLOCKNR>",
                "--override-details-root <BLOCKNR>",
                "--super-block-only",
                "--skip-mappings",
            ],
        ),
        (
            "--clear-needs-check-flag",
            ["--metadata-snap", "--override-mapping-root <BLOCKNR>", "--override-details-root <BLOCKNR>"],
        ),
        ("--json", ["--quiet"]),
    ],
)
def test_options_that_exclude_each_other(tmp_path: Path, one: str, others: list[str]) -> None:
    path = image_path("needs_check", tmp_path)
    before = path.read_bytes()
    for other in others:
        for line in ([one, *other.replace("<BLOCKNR>", "1").split()], [*other.replace("<BLOCKNR>", "1").split(), one]):
            result = check(*line, path)
            assert (result.status, result.stdout) == (64, b"")
            first, empty, usage, *_ = result.stderr.splitlines()
            assert first == f"error: the argument '{one}' cannot be used with '{other}'"
            assert (empty, usage) == ("", "Usage: thin_check [OPTIONS] <INPUT>")
    assert path.read_bytes() == before


# Other roots


def roots(path: Path) -> tuple[list[str], list[str]]:
    """Options that name the roots of the pool, and those of its metadata snapshot."""
    image = Surgeon(path.read_bytes()).image
    main = image.superblock()
    snap = image.superblock(main.held_root)
    return (
        [f"--override-mapping-root={main.mapping_root}", f"--override-details-root={main.details_root}"],
        [f"--override-mapping-root={snap.mapping_root}", f"--override-details-root={snap.details_root}"],
    )


def test_other_roots_are_checked_in_place_of_the_superblocks(tmp_path: Path) -> None:
    path = image_path("metadata_snapshot", tmp_path)
    own, other = roots(path)
    for pair in (own, other):
        result = check(*pair, path)
        assert (result.status, result.stderr.splitlines()[-1]) == (0, "mapping tree"), "space maps are not looked at"
    assert check(own[0], path).status == 0
    for pair in ([own[0], other[1]], [other[0], own[1]], [other[0]], [other[1]]):
        result = check(*pair, path)
        assert result.status == 64
        assert "Inconsistency between the details tree and the mapping tree" in result.stderr
    assert check("-m", *own, path).status == 0, "they are about the pool"


def test_a_good_root_replaces_one_that_is_out_of_reach(tmp_path: Path) -> None:
    path = image_path("sb_mapping_root_outside", tmp_path)
    assert check(path).status == 64
    root = Surgeon(image(base_of("sb_mapping_root_outside"))).image.superblock().mapping_root
    assert check("--override-mapping-root", str(root), path).status == 0


def test_a_root_that_cannot_be_is_named(tmp_path: Path) -> None:
    path = image_path("random", tmp_path)
    result = check("--override-mapping-root", "2048", path)
    assert result.status == 64
    assert "mapping top-level: node error: block outside the device" in result.stderr
    assert "a pointer to block 2048 of 2048" in result.stderr
    result = check("--override-details-root", "0", path)
    assert (result.status, "device details tree: node error:" in result.stderr) == (64, True)
    result = check("--override-details-root", "x", path)
    assert result.stderr.startswith("error: invalid value 'x' for '--override-details-root <BLOCKNR>': invalid digit")


# JSON


def json_lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("name", ["leaf_flipped", "data_leak", "details_node_flipped", "sb_version", "random"])
def test_json_has_every_finding_with_its_place(name: str, tmp_path: Path) -> None:
    path = image_path(name, tmp_path)
    result = check("--json", path)
    findings = check_report(MemoryDevice(path.read_bytes())).findings
    superblock, *found, summary = json_lines(result)
    text = check(path)
    assert (result.status, result.stderr) == (text.status, "")
    assert [f"{superblock['transaction_id']}", f"{superblock['metadata_free_blocks']}"] == [
        line.partition("=")[2] for line in text.stdout.decode().splitlines()
    ]
    assert len(found) == len(findings)
    for line, finding in zip(found, findings, strict=True):
        assert line["type"] == "finding"
        for field in ("severity", "rule", "tree", "device", "block", "expected", "actual", "message"):
            assert line[field] == getattr(finding, field)
        assert tuple(line["path"]) == finding.path
        kind = "thin" if finding.device is not None and finding.tree == "mapping tree" else "key"
        if finding.keys is not None:
            end = line[f"{kind}_end"]
            assert (line[f"{kind}_begin"], 1 << 64 if end is None else end) == finding.keys
    severities = [finding.severity for finding in findings]
    assert summary == {
        "type": "summary",
        "status": result.status,
        **{severity: severities.count(severity) for severity in ("fatal", "non_fatal", "advisory")},
        "repaired": False,
        "data_leaks_repaired": 0,
        "metadata_leaks_repaired": 0,
        "needs_check_cleared": False,
    }


def test_json_tells_what_was_repaired(tmp_path: Path) -> None:
    path = image_path("data_leak", tmp_path)
    operate(path, flags=1)
    summary = json_lines(check("--json", "--auto-repair", path))[-1]
    assert (summary["status"], summary["repaired"], summary["needs_check_cleared"]) == (0, True, True)
    assert (summary["data_leaks_repaired"], summary["metadata_leaks_repaired"]) == (3, 0)


def test_json_of_what_is_no_pool_is_a_finding_and_a_summary(tmp_path: Path) -> None:
    finding, summary = json_lines(check("--json", image_path("sb_checksum", tmp_path)))
    assert (finding["rule"], finding["block"], summary["fatal"]) == ("bad checksum in superblock", 0, 1)


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


# Ends that nobody wants: never 2, which would have a pool activated unchecked


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONPATH": "/nonexistent"},
        {"PYTHONHOME": "/nonexistent"},
        {"PYTHONHASHSEED": "x"},
        {"PYTHONIOENCODING": "no such encoding"},
        {"PYTHONUTF8": "7"},
        {"PYTHONMALLOC": "no such allocator"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_an_interpreter_that_does_not_start_is_no_missing_program(tmp_path: Path, environment: dict[str, str]) -> None:
    path = image_path("empty", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tools.thin_check", "-q", path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode not in (0, 2)
    assert done.stderr


@pytest.mark.parametrize(
    "lost", ["bufio/device.py", "persistent_data/checksum.py", "thinpool/check.py", "tools/_cli.py"]
)
def test_a_missing_module_is_no_missing_program(tmp_path: Path, lost: str) -> None:
    # An editable installation has a finder, which would take the module from the checkout.
    without_it = (
        "import runpy, sys; "
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]; "
        "runpy.run_module('tools.thin_check', run_name='__main__', alter_sys=True)"
    )
    for package in ("bufio", "persistent_data", "thinpool", "tools"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / lost).unlink()
    done = subprocess.run(
        [sys.executable, "-c", without_it, "-q", image_path("empty", tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode not in (0, 2)
    assert b"ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("megabytes", [12, 16, 18, 20, 22, 24, 32])
def test_too_little_memory_is_no_missing_program(tmp_path: Path, megabytes: int) -> None:
    limits = (megabytes << 20, megabytes << 20)
    done = subprocess.run(
        command("thin_check", "-q", image_path("random", tmp_path)),
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limits),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 2


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.02, 0.03, 0.05])
def test_an_interrupt_is_no_missing_program(tmp_path: Path, delay: float) -> None:
    process = subprocess.Popen(
        command("thin_check", image_path("many_devices", tmp_path)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode != 2


def test_a_directory_that_has_gone_does_not_matter(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    line = shlex.join(command("thin_check", "-q", image_path("empty", tmp_path)))
    done = subprocess.run(
        ["sh", "-c", f"rmdir {gone}; exec {line}"],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(("name", "status"), [("random", 0), ("leaf_flipped", 64)])
def test_nobody_has_to_read_the_messages(tmp_path: Path, name: str, status: int) -> None:
    """What could not be written to a closed pipe must not be tried again when the interpreter ends."""
    reading, writing = os.pipe()
    os.close(reading)
    line = command("thin_check", image_path(name, tmp_path))
    done = subprocess.run(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=writing, timeout=60, check=False)
    os.close(writing)
    assert done.returncode == status
