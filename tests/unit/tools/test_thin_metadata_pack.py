"""thin_metadata_pack and thin_metadata_unpack as programs: which files they touch, and when."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import random
import re
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support import packs
from tests.support.fixtures import BLOCK_SIZE, DATA, image, image_path
from tests.support.surgeon import Surgeon
from tests.support.tools import ROOT, Result, command, run_as_anybody, run_tool
from thinpool import pack as pack_module
from tools import _progress

if TYPE_CHECKING:
    from pathlib import Path

TOOLS = ["thin_metadata_pack", "thin_metadata_unpack"]
DONE = Result(0, b"", "")
QUESTION = "The destination appears to already contain metadata, are you sure? [y/n]: "
RECORDED = DATA / "packs" / "transaction_id.pack"


def pack(*arguments: str | Path) -> Result:
    return run_tool("thin_metadata_pack", *arguments)


def unpack(*arguments: str | Path) -> Result:
    return run_tool("thin_metadata_unpack", *arguments)


def refused(result: Result, text: str) -> None:
    assert (result.status, result.stdout) == (64, b"")
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return image_path("transaction_id", tmp_path)


@pytest.fixture
def source(tool: str, small: Path) -> Path:
    """An input of *tool*."""
    return small if tool == "thin_metadata_pack" else RECORDED


def answer(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# Both ways


@pytest.mark.parametrize("name", ["mixed", "many_devices", "resized_metadata", "metadata_snapshot"])
def test_a_device_is_packed_and_unpacked(name: str, tmp_path: Path) -> None:
    original = image_path(name, tmp_path)
    assert pack("-i", original, "-o", tmp_path / "pack") == DONE
    assert unpack("--input", tmp_path / "pack", "--output", tmp_path / "copy") == DONE
    assert (tmp_path / "copy").read_bytes() == original.read_bytes()


def test_damaged_blocks_are_mentioned_and_packed_on_request(tmp_path: Path) -> None:
    original = image_path("leaf_flipped", tmp_path)
    result = pack("-i", original, "-o", tmp_path / "pack")
    assert result == (0, b"", "1 damaged metadata blocks are not in the pack; --all packs them too\n")
    refused(unpack("-i", tmp_path / "pack", "-o", tmp_path / "copy"), "1 are missing; the first is block 106")
    assert not (tmp_path / "copy").exists()
    assert unpack("-i", tmp_path / "pack", "-o", tmp_path / "copy", "--incomplete") == DONE
    assert (tmp_path / "copy").read_bytes() != original.read_bytes()

    assert pack("-i", original, "-o", tmp_path / "all", "--all") == DONE
    assert unpack("-i", tmp_path / "all", "-o", tmp_path / "copy2") == DONE
    assert (tmp_path / "copy2").read_bytes() == original.read_bytes()


def test_a_larger_file_is_cut_and_its_old_content_is_gone(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.write_bytes(random.Random(1).randbytes(len(image("transaction_id")) + 10000))
    assert unpack("-i", RECORDED, "-o", output) == DONE
    assert output.read_bytes() == small.read_bytes()


# What is asked, refused and left alone


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("said", ["n\n", "", "no\n", "yesterday\n"])
def test_metadata_is_not_overwritten_without_a_yes(
    tool: str, source: Path, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = image_path("empty", tmp_path)
    answer(said, monkeypatch)
    result = run_tool(tool, "-i", source, "-o", output)
    assert result == (64, b"", QUESTION + "Output file not overwritten\n")
    assert output.read_bytes() == image("empty")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("said", ["y\n", "yes\n"])
def test_metadata_is_overwritten_after_a_yes_or_by_force(
    tool: str, source: Path, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = image_path("empty", tmp_path)
    answer(said, monkeypatch)
    assert run_tool(tool, "-i", source, "-o", output) == (0, b"", QUESTION)
    once = output.read_bytes()
    assert once != image("empty")
    output.write_bytes(image("empty"))
    assert run_tool(tool, "-f", "-i", source, "-o", output) == DONE
    assert output.read_bytes() == once


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_no_metadata_is_overwritten_without_a_question(tool: str, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.write_bytes(random.Random(1).randbytes(8192))
    assert run_tool(tool, "-i", source, "-o", output) == DONE


@pytest.mark.parametrize("tool", TOOLS)
def test_the_input_is_not_changed(tool: str, source: Path, tmp_path: Path) -> None:
    before = hashlib.sha256(source.read_bytes()).digest(), source.stat().st_mtime_ns
    assert run_tool(tool, "-i", source, "-o", tmp_path / "output") == DONE
    assert (hashlib.sha256(source.read_bytes()).digest(), source.stat().st_mtime_ns) == before


@pytest.mark.parametrize("tool", TOOLS)
def test_the_output_is_another_file(tool: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "both"
    path.write_bytes(source.read_bytes())
    (tmp_path / "link").symlink_to(path)
    refused(run_tool(tool, "-f", "-i", path, "-o", tmp_path / "link"), "is both the input and the output")
    assert path.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("name", "reason"), [("missing", "Couldn't find input file"), ("", "Not a block device or regular file")]
)
def test_an_input_that_is_none_leaves_the_output_alone(tool: str, name: str, reason: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    refused(run_tool(tool, "-i", tmp_path / name, "-o", output), reason)
    assert not output.exists()
    output.write_bytes(b"precious")
    refused(run_tool(tool, "-i", tmp_path / name, "-o", output), reason)
    assert output.read_bytes() == b"precious"


def test_what_is_no_binary_metadata_is_not_packed(tmp_path: Path) -> None:
    path, output = tmp_path / "input", tmp_path / "output"
    output.write_bytes(b"precious")
    for content, reason in (
        (b"<superblock uuid=".ljust(8192), "This looks like XML."),
        (bytes(4095), "Metadata device/file too small.  Is this binary metadata?"),
    ):
        path.write_bytes(content)
        refused(pack("-i", path, "-o", output), reason)
    assert output.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Not a pack file"),
        (b"<superblock uuid=".ljust(8192), "Not a pack file"),
        (packs.header(1, version=2), "unsupported pack file version (2)."),
        (packs.header(1, block_size=512), "block size is not 4096"),
        (RECORDED.read_bytes()[:-1], "the pack file is cut off"),
        (RECORDED.read_bytes()[:35], "the pack file is cut off"),
        (RECORDED.read_bytes() + b"abc", "the pack file is cut off"),
        (RECORDED.read_bytes()[:32], "it has no superblock"),
        (RECORDED.read_bytes()[:60] + b"\xff" + RECORDED.read_bytes()[61:], "damaged pack file"),
    ],
)
def test_a_pack_that_is_none_leaves_the_output_alone(content: bytes, reason: str, tmp_path: Path) -> None:
    path, output = tmp_path / "pack", tmp_path / "output"
    path.write_bytes(content)
    refused(unpack("-i", path, "-o", output), reason)
    assert not output.exists()
    output.write_bytes(b"precious")
    refused(unpack("-i", path, "-o", output), reason)
    assert output.read_bytes() == b"precious"


def test_random_damage_to_a_pack_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    for seed in range(100):
        dice = random.Random(seed)
        content = bytearray(RECORDED.read_bytes())
        for _ in range(2):
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        result = unpack("-f", "-i", path, "-o", tmp_path / "output")
        assert result == DONE or (result.status == 64 and result.stderr.count("\n") == 1)
        assert "internal error" not in result.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_an_output_nobody_can_write_is_one_sentence(tool: str, source: Path, tmp_path: Path) -> None:
    reasons = {
        "thin_metadata_pack": "Is a directory",
        "thin_metadata_unpack": "Invalid output file: Not a block device",
    }
    refused(run_tool(tool, "-i", source, "-o", tmp_path), reasons[tool])
    refused(run_tool(tool, "-i", source, "-o", tmp_path / "none" / "output"), "No such file or directory (os error 2)")
    output = tmp_path / "output"
    output.write_bytes(b"precious")
    output.chmod(0o444)
    refused(run_as_anybody(tool, "-i", source, "-o", output), "Permission denied (os error 13)")
    assert output.read_bytes() == b"precious"


def test_an_output_that_somebody_uses_is_left_alone(tmp_path: Path) -> None:
    output = image_path("empty", tmp_path)
    with open(output, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        refused(unpack("-f", "-i", RECORDED, "-o", output), "Device or resource busy (os error 16): it is in use")
    assert output.read_bytes() == image("empty")


def test_metadata_that_somebody_writes_is_not_packed(small: Path, tmp_path: Path) -> None:
    with open(small, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(pack("-i", small, "-o", tmp_path / "output"), "Device or resource busy (os error 16)")
    assert not (tmp_path / "output").exists()


def test_a_new_file_that_cannot_be_completed_is_removed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tools.thin_metadata_unpack.unpack", fail)
    monkeypatch.setattr("tools.thin_metadata_pack.pack", fail)
    refused(unpack("-i", RECORDED, "-o", tmp_path / "output"), "No space left on device (os error 28)")
    refused(pack("-i", small, "-o", tmp_path / "output"), "No space left on device (os error 28)")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_signal_leaves_no_part_of_a_file(
    tool: str, number: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "directory" / "output"
    output.parent.mkdir()
    done = []

    def stop(_self: object, blocks: int, total: int) -> None:
        done.append(os.listdir(output.parent))
        os.kill(os.getpid(), number)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr(_progress.Progress, "__call__", stop)
    refused(run_tool(tool, "-i", source, "-o", output), "interrupted")
    assert [len(names) for names in done] == [1], "something was on its way"
    assert os.listdir(output.parent) == []
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == handlers


def test_a_pack_that_is_not_completed_leaves_the_one_that_was_there(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "directory" / "output"
    output.parent.mkdir()
    output.write_bytes(b"an older pack")

    def stop(_self: object, blocks: int, total: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(_progress.Progress, "__call__", stop)
        refused(pack("-i", small, "-o", output), "interrupted")
    assert output.read_bytes() == b"an older pack"
    assert os.listdir(output.parent) == ["output"]


def test_a_pack_takes_the_place_of_a_file_with_its_rights_and_behind_its_links(small: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"an older pack")
    old.chmod(0o640)
    (tmp_path / "link").symlink_to("old")
    assert pack("-i", small, "-o", tmp_path / "link") == DONE
    assert (tmp_path / "link").is_symlink()
    assert old.stat().st_mode & 0o7777 == 0o640
    assert packs.entries(old.read_bytes()) == packs.entries(RECORDED.read_bytes())


def test_a_pack_goes_into_a_named_pipe(small: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(command("thin_metadata_pack", "-i", small, "-o", tmp_path / "pipe"), cwd=ROOT) as running:
        content = (tmp_path / "pipe").read_bytes()
    assert running.returncode == 0
    assert packs.entries(content) == packs.entries(RECORDED.read_bytes())
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


# Pipes, full disks, terminals, memory


def test_a_pack_goes_into_a_pipe(small: Path, tmp_path: Path) -> None:
    line = command("thin_metadata_pack", "-i", small, "-o", "/dev/stdout")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert packs.entries(done.stdout) == packs.entries(RECORDED.read_bytes())


def test_a_pipe_that_is_closed_is_silent_and_a_full_disk_is_not(small: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    line = command("thin_metadata_pack", "-i", small, "-o")
    done = subprocess.run(
        [*line, f"/dev/fd/{writing}"], cwd=ROOT, pass_fds=[writing], capture_output=True, timeout=60, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (64, b"")
    done = subprocess.run([*line, "/dev/full"], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (64, b"output error: No space left on device (os error 28)\n")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("tool", TOOLS)
def test_a_terminal_shows_progress_and_is_left_clean(
    tool: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "_FIRST_SHOWN_AFTER", 0)
    terminal = _Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        module = sys.modules.get(f"tools.{tool}") or __import__(f"tools.{tool}", fromlist=["main"])
        assert module.main(["-i", str(source), "-o", str(tmp_path / "output")]) == 0
    shown = terminal.getvalue()
    assert "ing [" in shown
    assert shown.endswith("\r")
    assert not shown.rstrip("\r").rpartition("\r")[2].strip()


@pytest.mark.parametrize("tool", TOOLS)
def test_small_pools_do_not_pay_for_what_large_ones_need(tool: str, source: Path, tmp_path: Path) -> None:
    arguments = ["-i", str(source), "-o", str(tmp_path / "output")]
    # What the interpreter itself has loaded depends on how the package is installed.
    program = (
        f"import sys; before = set(sys.modules); from tools.{tool} import main; "
        f"assert main({arguments}) == 0; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"argparse", "construct", "dataclasses", "logging", "numpy", "pathlib"}


def test_memory_does_not_grow_with_the_device(tmp_path: Path) -> None:
    """Half a gibibyte of device, nearly all of it a hole, with nodes that differ at its beginning and its end."""
    content = Surgeon(image("random")).content()
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.write(content)
        for end in (255, 511):
            file.seek((end << 20) - len(content))
            file.write(content)
    program = (
        f"from tools.thin_metadata_pack import main; "
        f"assert main(['-i', {str(path)!r}, '-o', {str(tmp_path / 'pack')!r}]) == 0; "
        f"print(open('/proc/self/status').read())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert peak is not None
    assert int(peak[1]) < 64 << 10
    assert pack_module.BLOCKS_PER_CHUNK * BLOCK_SIZE == 4 << 20
