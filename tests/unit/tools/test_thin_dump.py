"""thin_dump as a program."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support.fixtures import answer, image_path, read_xml
from tests.support.tools import ROOT, Result, command, run_tool

if TYPE_CHECKING:
    from pathlib import Path


def dump(*arguments: str | Path) -> Result:
    return run_tool("thin_dump", *arguments)


def test_stdout_is_the_recorded_xml_and_stderr_is_empty(tmp_path: Path) -> None:
    assert dump(image_path("mixed", tmp_path)) == Result(0, answer("mixed", "xml"), "")


@pytest.mark.parametrize("option", [["-o", "OUT"], ["-oOUT"], ["--output", "OUT"], ["--output=OUT"]])
def test_output_goes_to_a_file_that_is_created_or_replaced(tmp_path: Path, option: list[str]) -> None:
    path = tmp_path / "out.xml"
    arguments = [text.replace("OUT", str(path)) for text in option]
    for _ in range(2):
        assert dump(image_path("mixed", tmp_path), *arguments) == Result(0, b"", "")
        assert path.read_bytes() == answer("mixed", "xml")
        path.write_bytes(b"x" * 1000000)


def test_output_is_not_touched_when_there_is_no_pool_to_dump(tmp_path: Path) -> None:
    path = tmp_path / "out.xml"
    path.write_text("precious")
    for name in ("sb_checksum", "top_node_flipped", "internal_flipped"):
        assert dump(image_path(name, tmp_path), "-o", path).status == 64
        assert path.read_text() == "precious"


def test_output_must_not_be_the_input(tmp_path: Path) -> None:
    path = image_path("mixed", tmp_path)
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(path)
    result = dump(path, "-o", tmp_path / "link")
    assert result.status == 64
    assert "is the input" in result.stderr
    assert path.read_bytes() == before


def test_output_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    result = dump(image_path("mixed", tmp_path), "-o", tmp_path / "no" / "such" / "directory")
    assert result.status == 64
    assert "Couldn't create output file" in result.stderr
    assert "No such file or directory (os error 2)" in result.stderr


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    result = dump(image_path("mixed", tmp_path), "-o", "/dev/full")
    assert result == Result(64, b"", "output error: No space left on device (os error 28)\n")


def test_a_reader_that_leaves_after_the_first_line_hears_nothing(tmp_path: Path) -> None:
    """As volume managers do, who look for the transaction id on the first line."""
    process = subprocess.Popen(
        command("thin_dump", image_path("deep", tmp_path)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    first = process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 64
    assert b'transaction="0"' in first
    assert b'nr_data_blocks="' in first
    assert errors == b""


def test_a_fifo_that_is_closed_is_silent_too(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def read_a_little() -> None:
        with open(fifo, "rb", buffering=0) as file:
            file.read(10)

    reader = threading.Thread(target=read_a_little)
    reader.start()
    result = dump(image_path("deep", tmp_path), "-o", fifo)
    reader.join()
    assert result == Result(64, b"", "")


def test_devices_are_selected(tmp_path: Path) -> None:
    path = image_path("mixed", tmp_path)
    everything = read_xml(answer("mixed", "xml"))
    result = dump("--dev-id", "45", path, "--dev-id=41", "--dev-id", "99999")
    assert read_xml(result.stdout).devices == {dev_id: everything.devices[dev_id] for dev_id in (41, 45)}
    assert read_xml(dump("--dev-id", "99999", path).stdout).devices == {}


@pytest.mark.parametrize("value", ["x", "", "-1", "0x10", "18446744073709551616"])
def test_a_device_id_is_a_number(tmp_path: Path, value: str) -> None:
    result = dump(f"--dev-id={value}", image_path("empty", tmp_path))
    assert result.status == 64
    assert f"invalid value '{value}' for '--dev-id <ID>'" in result.stderr


def test_a_value_must_follow(tmp_path: Path) -> None:
    result = dump(image_path("empty", tmp_path), "-o")
    assert result.status == 64
    assert "a value is required for '--output <FILE>' but none was supplied" in result.stderr


@pytest.mark.parametrize("option", ["-m", "--metadata-snap", "-m=39", "--metadata-snap=39"])
def test_the_metadata_snapshot_is_dumped(tmp_path: Path, option: str) -> None:
    result = dump(option, image_path("metadata_snapshot", tmp_path))
    assert result == Result(0, answer("metadata_snapshot", "metasnap.xml"), "")


def test_a_metadata_snapshot_at_another_block_is_refused(tmp_path: Path) -> None:
    result = dump("-m=38", image_path("metadata_snapshot", tmp_path))
    assert (result.status, result.stdout) == (64, b"")
    assert result.stderr == "metadata snapshot does not match that in superblock, which is at block 39\n"


def test_mappings_can_be_skipped(tmp_path: Path) -> None:
    result = dump("--skip-mappings", image_path("leaf_flipped", tmp_path))
    assert result.status == 0
    assert b"mapping" not in result.stdout
    assert b'<device dev_id="3" mapped_blocks="12000"' in result.stdout


def test_formats_other_than_xml_are_refused(tmp_path: Path) -> None:
    assert dump("-f", "xml", image_path("empty", tmp_path)).status == 0
    result = dump("--format", "human_readable", image_path("empty", tmp_path))
    assert result.status == 64
    assert "invalid value 'human_readable' for '--format <TYPE>'" in result.stderr


def test_damage_midway_ends_a_dump_with_one_sentence(tmp_path: Path) -> None:
    path = image_path("leaf_flipped", tmp_path)
    result = dump(path)
    assert result.status == 64
    assert result.stderr.count("\n") == 1
    for text in ("checksum error", "block 106", "thin device 3", "thin blocks ["):
        assert text in result.stderr
    assert b"</superblock>" not in result.stdout
    quiet = dump("-q", path)
    assert (quiet.status, quiet.stderr) == (64, "")
