"""thin_dump as a program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support.fixtures import answer, image, image_path, read_xml
from tests.support.image import Image
from tests.support.tools import ROOT, Result, command, run_tool
from thinpool import dump as dumping
from tools._progress import Progress

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


@pytest.fixture(params=[1 << 62, 0], ids=["one by one", "by arrays"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dumps leaf by leaf, and then as for large pools."""
    monkeypatch.setattr(dumping, "WORTH_BATCHES", request.param)


@pytest.mark.usefixtures("either_way")
def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    result = dump(image_path("deep", tmp_path), "-o", "/dev/full")
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


@pytest.mark.usefixtures("either_way")
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


@pytest.mark.parametrize("option", ["-m", "--metadata-snap", "-m=39", "-m39", "--metadata-snap=39"])
def test_the_metadata_snapshot_is_dumped_so_that_it_can_be_restored(tmp_path: Path, option: str) -> None:
    """The reference says that the data device has no blocks."""
    recorded = answer("metadata_snapshot", "metasnap.xml").replace(b'nr_data_blocks="0"', b'nr_data_blocks="16384"')
    assert dump(option, image_path("metadata_snapshot", tmp_path)) == Result(0, recorded, "")


def test_a_metadata_snapshot_at_another_block_is_refused(tmp_path: Path) -> None:
    result = dump("-m=38", image_path("metadata_snapshot", tmp_path))
    assert (result.status, result.stdout) == (64, b"")
    assert result.stderr == "metadata snapshot does not match that in superblock, which is at block 39\n"


def test_mappings_can_be_skipped(tmp_path: Path) -> None:
    result = dump("--skip-mappings", image_path("leaf_flipped", tmp_path))
    assert result.status == 0
    assert b"mapping" not in result.stdout
    assert b'<device dev_id="3" mapped_blocks="12000"' in result.stdout


def test_repair_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = image_path("mixed", tmp_path)
    for option in ("-r", "--repair"):
        result = dump(option, path, "-o", tmp_path / "out.xml")
        assert (result.status, result.stdout) == (64, b"")
        assert result.stderr == "thin_dump --repair is not available in this version; nothing was dumped\n"
    assert not (tmp_path / "out.xml").exists()
    assert "cannot be used with" in dump("-r", "-m", path).stderr


# Overrides


def superblock_tag(*arguments: str | Path) -> dict[str, str]:
    result = dump(*arguments, "--skip-mappings")
    assert (result.status, result.stderr) == (0, "")
    return read_xml(result.stdout).superblock


@pytest.mark.parametrize("options", [[], ["-m"]])
def test_numbers_of_the_superblock_can_be_overridden(tmp_path: Path, options: list[str]) -> None:
    """Transaction id and number of data blocks as in 1.x: the higher one counts; for the metadata snapshot as well."""
    path = image_path("metadata_snapshot", tmp_path)
    before = superblock_tag(*options, path)
    higher = ["--transaction-id=77", "--nr-data-blocks", "99999", "--data-block-size", "256"]
    changed = {"transaction": "77", "nr_data_blocks": "99999", "data_block_size": "256"}
    assert superblock_tag(*options, *higher, path) == {**before, **changed}
    assert superblock_tag(*options, "--transaction-id=0", "--nr-data-blocks=1", path) == before


@pytest.mark.parametrize("size", ["0", "1", "127", "129", "2097280"])
def test_a_data_block_size_that_no_pool_can_have_is_a_usage_error(tmp_path: Path, size: str) -> None:
    result = dump("--data-block-size", size, image_path("empty", tmp_path))
    assert (result.status, result.stdout) == (64, b"")
    assert f"error: invalid value '{size}' for '--data-block-size <SECTORS>': invalid data block size" in result.stderr


def test_more_data_blocks_let_mappings_lead_further(tmp_path: Path) -> None:
    path = image_path("value_outside_device", tmp_path)
    result = dump(path)
    assert result.status == 64
    found = re.search(r"leads to data block (\d+) of", result.stderr)
    assert found is not None
    assert dump("--nr-data-blocks", found[1], path).status == 64
    assert dump("--nr-data-blocks", str(int(found[1]) + 1), path).status == 0


def test_other_roots_give_another_pool(tmp_path: Path) -> None:
    """Those of the metadata snapshot, found in its superblock, give what the snapshot has."""
    path = image_path("metadata_snapshot", tmp_path)
    roots = Image.from_bytes(path.read_bytes())
    snap = roots.superblock(39)
    named = [f"--data-mapping-root={snap.mapping_root}", f"--device-details-root={snap.details_root}"]
    assert read_xml(dump(*named, path).stdout).devices == read_xml(dump("-m", path).stdout).devices
    main = roots.superblock()
    back = [f"--data-mapping-root={main.mapping_root}", f"--device-details-root={main.details_root}"]
    assert read_xml(dump("-m", *back, path).stdout).devices == read_xml(answer("metadata_snapshot", "xml")).devices


def test_a_root_that_is_none_is_refused_with_its_place(tmp_path: Path) -> None:
    path = image_path("metadata_snapshot", tmp_path)
    result = dump("--device-details-root", "0", path)
    assert (result.status, result.stdout) == (64, b"")
    assert "device details tree: node error: block outside the device: block 0" in result.stderr
    result = dump("--data-mapping-root", "99999999", path)
    assert (result.status, result.stdout) == (64, b"")
    assert "mapping top-level: node error: block outside the device" in result.stderr
    details = Image.from_bytes(path.read_bytes()).superblock().details_root
    assert "is also part of the device details tree" in dump("--data-mapping-root", str(details), path).stderr


def test_roots_help_where_those_of_the_superblock_are_wrong(tmp_path: Path) -> None:
    path = image_path("sb_mapping_root_outside", tmp_path)
    assert dump(path).status == 64
    root = Image.from_bytes(image("deleted_devices")).superblock().mapping_root
    result = dump("--data-mapping-root", str(root), path)
    assert (result.status, read_xml(result.stdout)) == (0, read_xml(answer("deleted_devices", "xml")))


# Damage


def test_damage_midway_ends_a_dump_with_one_sentence(tmp_path: Path) -> None:
    path = image_path("leaf_flipped", tmp_path)
    result = dump(path)
    assert result.status == 64
    assert result.stderr.count("\n") == 1
    for text in ("checksum error", "block 106", "thin device 3", "thin blocks ["):
        assert text in result.stderr
    assert answer("random", "xml").startswith(result.stdout)
    lost = re.search(r"thin blocks \[(\d+)\.\.", result.stderr)
    assert lost is not None
    # All that came before is written, but for the run that was not known to have ended.
    following = answer("random", "xml").splitlines()[result.stdout.count(b"\n") + 1]
    assert int(following.split(b'"')[1]) >= int(lost[1])
    quiet = dump("-q", path)
    assert (quiet.status, quiet.stderr) == (64, "")


# How far it is


def test_a_dump_that_takes_long_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is shown itself on that terminal."""
    shown: list[tuple[bool, int, int]] = []

    class Recorder(Progress):
        def __init__(self, title: str, *, beside_output: bool = False) -> None:
            super().__init__(title, beside_output=beside_output)
            self.beside_output = beside_output

        def __call__(self, done: int, total: int) -> None:
            shown.append((self.beside_output, done, total))

    monkeypatch.setattr("tools.thin_dump.Progress", Recorder)
    for worth in (1 << 62, 0):
        monkeypatch.setattr(dumping, "WORTH_BATCHES", worth)
        for options in ([], ["--no-shared"], ["-o", str(tmp_path / "output")]):
            shown.clear()
            assert dump(image_path("snapshot_chain", tmp_path), *options).status == 0
            assert {beside for beside, _, _ in shown} == {"-o" not in options}
            assert [done for _, done, _ in shown] == sorted(done for _, done, _ in shown)
            assert 0 < shown[0][1] < shown[-1][1] == shown[-1][2]


# What is loaded


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [("thin_dump", []), ("thin_dump", ["--json"]), ("thin_ls", []), ("thin_ls", ["-o", "DEV,EXCLUSIVE,HIGHEST_BLOCK"])],
)
def test_they_start_without_what_a_small_pool_does_not_need(tool: str, arguments: list[str], tmp_path: Path) -> None:
    line = [*arguments, str(image_path("mixed", tmp_path))]
    program = f"import sys; from tools.{tool} import main; assert main({line}) == 0; print(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "thinpool.pool_reader" in loaded
    assert not loaded & {"argparse", "bufio.core", "construct", "dataclasses", "json", "numpy"}
    assert not loaded & {"persistent_data.btree", "thinpool.metadata"}, "the engine"
