"""The kit (test_kit.py) for tools that are told everything by options, as far as it is about the command line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.fixtures import DATA, image_path
from tests.support.tools import OPTION_TOOLS, ROOT, command, run_process, run_tool
from thinpool.version import VERSION

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.parametrize("tool", OPTION_TOOLS)


@pytest.fixture
def working(tool: str, tmp_path: Path) -> list[str]:
    """A command line that works, again and again."""
    if tool == "thin_metadata_size":
        return ["-b", "64k", "-s", "1t", "-m", "1000"]
    source = image_path("transaction_id", tmp_path)
    if tool == "thin_metadata_unpack":
        source = DATA / "packs" / "transaction_id.pack"
    return ["-i", str(source), "-f", "-o", str(tmp_path / "output")]


def test_it_runs_as_a_program(tool: str, working: list[str]) -> None:
    assert run_process(tool, *working) == run_tool(tool, *working) == run_process("__main__", tool, *working)
    assert run_tool(tool, *working).status == 0


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_explains_everything_on_stdout(tool: str, option: str) -> None:
    result = run_tool(tool, option)
    text = result.stdout.decode()
    assert (result.status, result.stderr) == (0, "")
    assert f"Usage: {tool} [OPTIONS] --" in text
    for part in ("Options:", "--version", "Exit status:", "Example"):
        assert part in text
    assert "Arguments:" not in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version_is_three_numbers_and_nothing_else(tool: str, option: str, working: list[str]) -> None:
    for line in ([option], [option, *working], [*working, option]):
        result = run_tool(tool, *line)
        assert (result.status, result.stderr) == (0, "")
        assert re.fullmatch(rb"\d+\.\d+\.\d+\n", result.stdout)
        assert result.stdout.decode().strip() == VERSION


@pytest.mark.parametrize("bad", ["--hedgehogs-only", "-X", "operand"])
def test_what_it_does_not_know_is_a_usage_error(tool: str, bad: str, working: list[str]) -> None:
    result = run_tool(tool, *working, bad)
    assert (result.status, result.stdout) == (64, b"")
    assert result.stderr.startswith(f"error: unexpected argument '{bad}' found\n\nUsage: {tool} [OPTIONS] --")
    assert "try '--help'" in result.stderr


def test_what_it_needs_is_named(tool: str, working: list[str]) -> None:
    pairs = [[option, working[at + 1]] for at, option in enumerate(working) if option[0] == "-" and option != "-f"]
    for left_out in pairs:
        result = run_tool(tool, *(word for pair in pairs if pair is not left_out for word in pair))
        assert (result.status, result.stdout) == (64, b"")
        assert result.stderr.startswith("error: the following required arguments were not provided:\n  --")
        assert result.stderr.count("\n  --") == 1


def test_an_option_without_its_value_is_a_usage_error(tool: str, working: list[str]) -> None:
    assert "a value is required for '--" in run_tool(tool, *working[:-1]).stderr


def test_options_are_not_abbreviated(tool: str, working: list[str]) -> None:
    assert "unexpected argument '--versio' found" in run_tool(tool, *working, "--versio").stderr


def test_empty_arguments_are_passed_over(tool: str, working: list[str]) -> None:
    assert run_tool(tool, "", *working, "") == run_tool(tool, *working)


def test_old_scripts_may_choose_an_engine_and_a_log_level(tool: str, working: list[str]) -> None:
    assert run_tool(tool, "--io-engine", "sync", "-v", *working) == run_tool(tool, *working)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_descriptor_is_no_traceback(tool: str, closed: str, working: list[str]) -> None:
    shell = f"exec {shlex.join(command(tool, *working))} {closed}"
    done = subprocess.run(["sh", "-c", shell], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert b"Traceback" not in done.stderr
    writes = bool(run_tool(tool, *working).stdout)
    assert done.returncode == (64 if closed == ">&-" and writes else 0)


def test_a_closed_pipe_is_silent_and_a_full_disk_is_not(tool: str, working: list[str]) -> None:
    for arguments in (working, ["--help"]):
        if not run_tool(tool, *arguments).stdout:
            continue
        reading, writing = os.pipe()
        os.close(reading)
        line = command(tool, *arguments)
        done = subprocess.run(line, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
        os.close(writing)
        assert (done.returncode, done.stderr) == (64, b"")
        with open("/dev/full", "wb") as full:
            done = subprocess.run(line, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (64, b"output error: No space left on device (os error 28)\n")
