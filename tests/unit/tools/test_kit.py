"""What every tool must do, whatever it is for: explain itself, refuse what is not metadata, fail in one sentence."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import subprocess
import tomllib
from typing import TYPE_CHECKING

import pytest

from tests.support import tools as running
from tests.support.fixtures import image_path
from tests.support.surgeon import Surgeon
from tests.support.tools import NEEDED, ROOT, TOOLS, Result
from thinpool.version import VERSION
from tools import _cli

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.parametrize("tool", TOOLS)


def _line(tool: str, arguments: tuple[str | Path, ...]) -> tuple[str | Path, ...]:
    """The arguments of *tool*, or of a tool that it dispatches, with those that it does nothing without."""
    if tool == "__main__":
        return (arguments[0], *_line(str(arguments[0]), arguments[1:]))
    return (*NEEDED.get(tool, ()), *arguments)


def run_tool(tool: str, *arguments: str | Path) -> Result:
    return running.run_tool(tool, *_line(tool, arguments))


def run_process(tool: str, *arguments: str | Path) -> Result:
    return running.run_process(tool, *_line(tool, arguments))


def run_as_anybody(tool: str, *arguments: str | Path) -> Result:
    return running.run_as_anybody(tool, *_line(tool, arguments))


def command(tool: str, *arguments: str | Path) -> list[str]:
    return running.command(tool, *_line(tool, arguments))


def refused(result: Result, text: str) -> None:
    """The tool ended with the one status for failure and one line that has *text*."""
    assert result.status == 64
    assert result.stdout == b""
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    message = [line for line in result.stderr.splitlines() if line != "Checking thin metadata"]
    assert len(message) == 1, result.stderr


def usage_error(result: Result, text: str) -> None:
    assert result.status == 64, "never 2, which volume managers take for a missing program"
    assert result.stdout == b""
    assert result.stderr.startswith("error: ")
    assert text in result.stderr
    assert "Usage: thin_" in result.stderr
    assert "try '--help'" in result.stderr


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return image_path("transaction_id", tmp_path)


# The command line


def test_it_runs_as_a_program(tool: str, small: Path) -> None:
    assert run_process(tool, small) == run_tool(tool, small)
    assert run_process("__main__", tool, small) == run_tool(tool, small)
    refused(run_process(tool, small / "missing"), "Couldn't find input file")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_explains_everything_on_stdout(tool: str, option: str) -> None:
    result = run_tool(tool, option)
    text = result.stdout.decode()
    assert (result.status, result.stderr) == (0, "")
    assert re.search(rf"^Usage: {tool} \[OPTIONS\] (--\S+ <\w+> )*<INPUT>$", text, re.MULTILINE)
    for part in ("Options:", "--metadata-snap", "--version", "Exit status:", "Example"):
        assert part in text
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version_is_three_numbers_and_nothing_else(tool: str, option: str) -> None:
    result = run_tool(tool, option)
    assert (result.status, result.stderr) == (0, "")
    assert re.fullmatch(rb"\d+\.\d+\.\d+\n", result.stdout)
    assert result.stdout.decode().strip() == VERSION


def test_the_package_takes_its_version_from_the_same_place(tool: str) -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "thinpool.version.VERSION"}


def test_version_may_be_asked_for_with_other_arguments(tool: str) -> None:
    assert run_tool(tool, "-V", "no such file").status == 0


def test_an_unknown_option_is_a_usage_error(tool: str, small: Path) -> None:
    usage_error(run_tool(tool, "--hedgehogs-only", small), "unexpected argument '--hedgehogs-only' found")
    usage_error(run_tool(tool, "-X", small), "unexpected argument '-X' found")


def test_options_are_not_abbreviated(tool: str, small: Path) -> None:
    usage_error(run_tool(tool, "--metadata", small), "unexpected argument '--metadata' found")


def test_the_input_must_be_named(tool: str) -> None:
    usage_error(run_tool(tool), "the following required arguments were not provided:\n  <INPUT>")


def test_there_is_one_input(tool: str, small: Path) -> None:
    usage_error(run_tool(tool, small, "another"), "unexpected argument 'another' found")


def test_empty_arguments_are_passed_over(tool: str, small: Path) -> None:
    assert run_tool(tool, "", small, "").status == 0


def test_options_may_follow_the_input(tool: str) -> None:
    refused(run_tool(tool, "no-such-file", "-m"), "Couldn't find input file 'no-such-file'")


def test_old_scripts_may_choose_an_engine_and_a_log_level(tool: str, small: Path) -> None:
    assert run_tool(tool, "--io-engine", "sync", "-v", "--io-engine=async", "-vv", small).status == 0


def test_two_dashes_end_the_options(tool: str) -> None:
    refused(run_tool(tool, "--", "-V"), "Couldn't find input file '-V'")


def test_tools_are_dispatched_by_name(tool: str, small: Path) -> None:
    direct = run_tool(tool, small)
    dispatched = run_tool("__main__", tool, small)
    assert dispatched == direct
    assert run_tool("__main__", tool, "-V").status == 0


# The input


def test_a_missing_file_is_named(tool: str, tmp_path: Path) -> None:
    path = tmp_path / "missing"
    refused(run_tool(tool, path), f"Couldn't find input file '{path}'")
    refused(run_tool(tool, "-"), "Couldn't find input file '-'")


def test_a_file_is_no_directory(tool: str, small: Path) -> None:
    refused(run_tool(tool, small / "below"), "Couldn't find input file")


@pytest.mark.parametrize("path", [ROOT, "/dev/null"])
def test_what_is_neither_file_nor_block_device_is_refused(tool: str, path: Path | str) -> None:
    refused(run_tool(tool, path), f"Not a block device or regular file '{path}'.")


def test_a_fifo_is_refused_without_waiting_for_it(tool: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused(run_tool(tool, tmp_path / "fifo"), "Not a block device or regular file")


@pytest.mark.parametrize("size", [0, 1, 4095])
def test_a_tiny_file_is_refused(tool: str, tmp_path: Path, size: int) -> None:
    path = tmp_path / "tiny"
    path.write_bytes(bytes(size))
    refused(run_tool(tool, path), "Metadata device/file too small.  Is this binary metadata?")


@pytest.mark.parametrize("beginning", [b"<superblock uuid=", b'<?xml version="1.0"?>', b"<!DOCTYPE superblock"])
def test_xml_is_recognised(tool: str, tmp_path: Path, beginning: bytes) -> None:
    path = tmp_path / "pool.xml"
    path.write_bytes(beginning.ljust(8192))
    refused(run_tool(tool, path), "This looks like XML.  This tool only supports the binary metadata format.")


@pytest.mark.parametrize("content", [bytes(40960), random.Random(1).randbytes(40960)], ids=["zeros", "noise"])
def test_what_is_no_metadata_is_refused(tool: str, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    refused(run_tool(tool, path), "bad checksum in superblock")


def test_a_wrong_magic_number_is_refused(tool: str, small: Path) -> None:
    surgeon = Surgeon(small.read_bytes())
    surgeon.superblock(magic=1)
    small.write_bytes(surgeon.content())
    refused(run_tool(tool, small), "bad magic in superblock")


def test_a_truncated_image_is_refused(tool: str, small: Path) -> None:
    surgeon = Surgeon(small.read_bytes())
    surgeon.cut(3)
    small.write_bytes(surgeon.content())
    result = run_tool(tool, small)
    assert result.status == 64
    assert "Traceback" not in result.stderr
    assert "outside the device" in result.stderr


def test_a_partial_block_at_the_end_is_ignored(tool: str, small: Path) -> None:
    with open(small, "ab") as file:
        file.write(b"tail")
    assert run_tool(tool, small).status == 0


def test_random_damage_never_leads_to_a_traceback_or_to_a_status_of_its_own(tool: str, tmp_path: Path) -> None:
    """Bits flipped in blocks in use, with the checksum put right half of the time, so that the damage gets further."""
    path = image_path("transaction_id", tmp_path)
    pristine = path.read_bytes()
    used = Surgeon(pristine).image.live_blocks()
    kinds = {block: Surgeon(pristine).image.kind(block) for block in used}
    for seed in range(150):
        dice = random.Random(seed)
        surgeon = Surgeon(pristine)
        for block in dice.sample(used, 2):
            surgeon.flip(block, dice.choice([dice.randrange(4, 64), dice.randrange(4, 4096)]))
            if dice.random() < 0.5:
                surgeon.put(block, surgeon.block(block), kinds[block])
        path.write_bytes(surgeon.content())
        result = run_tool(tool, path)
        assert result.status in (0, 64)
        assert "internal error" not in result.stderr


def test_a_file_without_permission_is_refused(tool: str, small: Path) -> None:
    small.chmod(0)
    refused(run_as_anybody(tool, small), "Permission denied (os error 13)")


def test_an_open_that_fails_is_one_sentence(tool: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(small))

    monkeypatch.setattr(_cli, "FileDevice", refuse)
    refused(run_tool(tool, small), "Permission denied (os error 13)")


def test_a_file_that_somebody_writes_to_is_left_alone(tool: str, small: Path) -> None:
    with open(small, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(run_tool(tool, small), "Device or resource busy (os error 16)")


def test_the_input_is_not_changed(tool: str, tmp_path: Path) -> None:
    path = image_path("metadata_snapshot", tmp_path)
    before = hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns
    for option in ([], ["-m"]):
        assert run_tool(tool, *option, path).status == 0
    assert (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) == before


def test_a_read_only_input_is_enough(tool: str, small: Path) -> None:
    small.chmod(0o444)
    assert run_tool(tool, small).status == 0


def test_the_metadata_snapshot_must_exist(tool: str, small: Path) -> None:
    refused(run_tool(tool, "-m", small), "no current metadata snap")


# The output


def test_a_closed_pipe_is_silent_and_not_a_success(tool: str, small: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            command(tool, small), cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(writing)
    assert done.returncode == 64
    assert done.stderr in (b"", b"Checking thin metadata\n")


def test_a_full_disk_is_reported(tool: str, small: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(tool, small), cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert done.returncode == 64
    assert done.stderr.decode().removeprefix("Checking thin metadata\n") == (
        "output error: No space left on device (os error 28)\n"
    )


def test_a_closed_stdout_is_reported(tool: str, small: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command(tool, small)],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 64
    assert b"Bad file descriptor" in done.stderr


def test_a_closed_stderr_does_not_matter(tool: str, small: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command(tool, small)],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    failing = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command(tool, "missing")],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert failing.returncode == 64


# What nobody expects


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("oops"), "internal error, please report it: RuntimeError: oops"),
        (OSError(5, "Input/output error"), "Input/output error (os error 5)"),
    ],
)
def test_any_exception_ends_in_one_sentence(
    tool: str,
    error: BaseException,
    message: str,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(f"tools.{tool}.open_input", fail)
    refused(run_tool(tool, small), message)
