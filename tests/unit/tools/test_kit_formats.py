"""The kit (test_kit.py) for the options of thin_dump and thin_ls that change what is written or from where."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.fixtures import image_path
from tests.support.tools import ROOT, command, run_process, run_tool

if TYPE_CHECKING:
    from pathlib import Path

LINES = [
    ("thin_dump", "--json"),
    ("thin_dump", "-f", "human_readable"),
    ("thin_dump", "--no-shared"),
    ("thin_dump", "--skip-mappings"),
    ("thin_dump", "--dev-id", "0", "--dev-id", "2"),
    ("thin_dump", "--transaction-id", "9", "--nr-data-blocks", "99999", "--data-block-size", "256"),
    ("thin_ls", "--json"),
    ("thin_ls", "--json", "-o", "EXCLUSIVE,HIGHEST_MAPPED"),
    ("thin_ls", "--no-headers", "-o", "DEV,SHARED_BYTES"),
]

pytestmark = pytest.mark.parametrize("line", LINES, ids=" ".join)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return image_path("transaction_id", tmp_path)


def test_it_runs_as_a_program_and_leaves_the_input_alone(line: tuple[str, ...], small: Path) -> None:
    before = small.read_bytes(), small.stat().st_mtime_ns
    small.chmod(0o444)
    result = run_tool(*line, small)
    assert (result.status, result.stderr) == (0, "")
    assert result.stdout
    assert run_process(*line, small) == result
    assert run_tool(line[0], small, *line[1:], "") == result, "options may follow the input, and be empty"
    assert (small.read_bytes(), small.stat().st_mtime_ns) == before


@pytest.mark.parametrize("name", ["sb_checksum", "details_root_zeroed", "top_node_flipped"])
def test_damage_of_what_every_line_needs_is_one_sentence(line: tuple[str, ...], name: str, tmp_path: Path) -> None:
    result = run_tool(*line, image_path(name, tmp_path))
    assert (result.status, result.stdout) == (64, b"")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_a_missing_or_tiny_file_is_refused(line: tuple[str, ...], tmp_path: Path) -> None:
    result = run_tool(*line, tmp_path / "none")
    assert (result.status, result.stdout) == (64, b"")
    assert result.stderr == f"Couldn't find input file '{tmp_path / 'none'}'\n"
    (tmp_path / "tiny").write_bytes(bytes(4095))
    assert "too small" in run_tool(*line, tmp_path / "tiny").stderr


def test_a_closed_pipe_is_silent_and_a_full_disk_is_not(line: tuple[str, ...], small: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = command(*line, small)
    done = subprocess.run(arguments, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (64, b"")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(arguments, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (64, b"output error: No space left on device (os error 28)\n")
