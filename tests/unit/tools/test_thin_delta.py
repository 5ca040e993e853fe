"""thin_delta as a program."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from tests.support.fixtures import DAMAGED, GOOD, base_of, facts_of, image, image_path
from tests.support.image import Image
from tests.support.surgeon import Surgeon
from tests.support.tools import NEEDED, ROOT, Result, run_tool
from tools import _progress

if TYPE_CHECKING:
    from pathlib import Path

OF_2_AND_0 = ["--thin1", "2", "--thin2", "0"]
TERSE = b"""\
<superblock uuid="" time="2" transaction="9007199254740993" data_block_size="128" nr_data_blocks="16384">
  <diff left="2" right="0">
    <different begin="0" length="10"/>
    <same begin="10" length="90"/>
  </diff>
</superblock>"""
VERBOSE = b"""\
<superblock uuid="" time="2" transaction="9007199254740993" data_block_size="128" nr_data_blocks="16384">
  <diff left="2" right="0">
    <different>
      <range begin="0" left_data_begin="0" right_data_begin="100" length="10"/>
    </different>
    <same>
      <range begin="10" data_begin="10" length="90"/>
    </same>
  </diff>
</superblock>"""


def delta(*arguments: str | Path) -> Result:
    return run_tool("thin_delta", *arguments)


def body(*lines: str) -> str:
    return "".join(f"    {line}\n" for line in lines)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return image_path("transaction_id", tmp_path)


def test_ranges_are_told_as_the_reference_does(pool: Path) -> None:
    assert delta(*OF_2_AND_0, pool) == Result(0, TERSE, "")


@pytest.mark.parametrize("option", ["--snap1", "--thin1"])
def test_devices_have_two_names(pool: Path, option: str) -> None:
    assert delta(option, "2", "--snap2=0", pool) == Result(0, TERSE, "")


def test_data_blocks_are_shown_on_demand(pool: Path) -> None:
    assert delta("--verbose", *OF_2_AND_0, pool) == Result(0, VERBOSE, "")


def test_ranges_are_not_joined_where_data_blocks_do_not_go_on(pool: Path) -> None:
    """Versions 1.1.0 and 1.3.3 of the reference make this one range and so tell wrong data blocks."""
    result = delta("--verbose", "--thin1", "0", "--thin2", "4", pool)
    assert (
        body(
            "<left_only>",
            '  <range begin="0" data_begin="100" length="10"/>',
            '  <range begin="10" data_begin="10" length="90"/>',
            "</left_only>",
        )
        in result.stdout.decode()
    )
    assert body('<left_only begin="0" length="100"/>') in delta("--thin1", "0", "--thin2", "4", pool).stdout.decode()


def test_what_is_the_same_can_be_left_out(pool: Path) -> None:
    same = body('<same begin="10" length="90"/>').encode()
    assert delta("--no-same", *OF_2_AND_0, pool) == Result(0, TERSE.replace(same, b""), "")


def test_nothing_mapped_is_an_empty_comparison(pool: Path) -> None:
    for option in ([], ["--verbose"]):
        result = delta("--thin1", "4", "--thin2", "4", *option, pool)
        assert result.stdout.endswith(b'<diff left="4" right="4">\n  </diff>\n</superblock>')


def test_trees_can_be_named_by_their_roots(pool: Path) -> None:
    surgeon = Surgeon(pool.read_bytes())
    one, other = (str(surgeon.device_root(dev_id)) for dev_id in (2, 0))
    mixed = TERSE.replace(b'left="2"', f'left_root="{one}"'.encode())
    assert delta("--root1", one, "--thin2", "0", pool) == Result(0, mixed, "")
    roots = mixed.replace(b'right="0"', f'right_root="{other}"'.encode())
    assert delta("--root1", one, "--root2", other, pool) == Result(0, roots, "")


def test_needs_check_is_told(tmp_path: Path) -> None:
    path = image_path("needs_check", tmp_path)
    tag = delta("--thin1", "0", "--thin2", "0", path).stdout.decode().splitlines()[0]
    assert tag.split()[3:5] == ['transaction="0"', 'flags="1"']
    lines = delta("--json", "--thin1", "0", "--thin2", "0", path).stdout.decode().splitlines()
    assert json.loads(lines[0])["needs_check"] is True


def test_the_metadata_snapshot_can_be_read(tmp_path: Path) -> None:
    path = image_path("metadata_snapshot", tmp_path)
    block = facts_of("metadata_snapshot").metadata_snap
    result = delta("-m", "--thin1", "0", "--thin2", "1", path)
    assert result.stdout.startswith(
        b'<superblock uuid="" time="0" transaction="0" data_block_size="128" nr_data_blocks="0">\n'
    )
    assert delta(f"-m={block}", "--thin1", "0", "--thin2", "1", path) == result
    wrong = delta("-m=7", "--thin1", "0", "--thin2", "1", path)
    assert (wrong.status, wrong.stdout) == (64, b"")
    assert "metadata snapshot does not match that in superblock" in wrong.stderr


@pytest.mark.parametrize("name", [name for name in GOOD if facts_of(name).nr_devices])
def test_json_tells_what_xml_tells(name: str, tmp_path: Path) -> None:
    path = image_path(name, tmp_path)
    ids = sorted(Image.from_bytes(image(name)).devices())
    line: list[str | Path] = ["--thin1", str(ids[0]), "--thin2", str(ids[-1]), path]

    def objects(*options: str) -> list[dict[str, object]]:
        return [json.loads(text) for text in delta("--json", *options, *line).stdout.splitlines()]

    def elements(*options: str) -> ElementTree.Element:
        return ElementTree.fromstring(delta(*options, *line).stdout)[0]

    pool, sides, *ranges = objects()
    assert (pool["type"], pool["data_block_size"]) == ("superblock", facts_of(name).data_block_size)
    assert sides == {"type": "diff", "left": ids[0], "right": ids[-1]}
    assert ranges == [{"type": one.tag} | {k: int(v) for k, v in one.attrib.items()} for one in elements()]
    _, _, *ranges = objects("--verbose")
    assert ranges == [
        {"type": group.tag} | {k: int(v) for k, v in one.attrib.items()}
        for group in elements("--verbose")
        for one in group
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thin2", "0"], "--thin1 or --root1 not specified"),
        (["--thin1", "0"], "--thin2 or --root2 not specified"),
        ([*OF_2_AND_0, "--root1", "7"], "the argument '--thin1 <DEV_ID>' cannot be used with '--root1 <BLOCKNR>'"),
        ([*OF_2_AND_0, "--root2", "7"], "the argument '--thin2 <DEV_ID>' cannot be used with '--root2 <BLOCKNR>'"),
        (["--thin1", "one", "--thin2", "0"], "invalid value 'one' for '--thin1 <DEV_ID>'"),
        (["--thin1", "-1", "--thin2", "0"], "invalid value '-1' for '--thin1 <DEV_ID>'"),
        (["--root1", str(1 << 64), "--thin2", "0"], "for '--root1 <BLOCKNR>'"),
    ],
)
def test_both_sides_must_be_given_once(pool: Path, arguments: list[str], message: str) -> None:
    result = delta(*arguments, pool)
    assert (result.status, result.stdout) == (64, b"")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_devices_must_exist(pool: Path) -> None:
    wanted = Result(64, b"", "Unable to find mapping tree for snap1 (9)\n")
    assert delta("--thin1", "9", "--thin2", "0", pool) == wanted
    assert delta("--root1", "1024", "--thin2", "0", pool) == Result(
        64, b"", "block 1024 cannot be the root of a mapping tree: the pool has 1024 blocks\n"
    )


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pool_is_compared_or_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    path = image_path(name, tmp_path)
    ids = sorted(Image.from_bytes(image(base_of(name))).devices())
    for dev_id in ids[:3]:
        result = delta("--thin1", str(ids[0]), "--thin2", str(dev_id), path)
        assert result.stderr.count("\n") == (result.status == 64)
        assert result.status in (0, 64)
        assert "internal error" not in result.stderr
        assert result.stdout.endswith(b"</superblock>") == (result.status == 0)


def test_damage_is_refused_with_its_place(tmp_path: Path) -> None:
    result = delta("--thin1", "3", "--thin2", "3", image_path("leaf_flipped", tmp_path))
    assert result.status == 64
    assert result.stderr.startswith("mapping tree: node error: checksum error: block 106 ")
    assert "thin device 3, thin blocks [" in result.stderr


def test_what_was_found_before_the_damage_is_written(tmp_path: Path) -> None:
    path = image_path("sequential", tmp_path)
    surgeon = Surgeon(path.read_bytes())
    surgeon.flip(surgeon.leaves(surgeon.device_root(1))[-1])
    path.write_bytes(surgeon.content())
    result = delta("--json", "--thin1", "1", "--thin2", "1", path)
    assert result.status == 64
    assert [json.loads(line)["type"] for line in result.stdout.splitlines()[:2]] == ["superblock", "diff"]


class _Terminal(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), write_through=True)

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode()


@pytest.mark.parametrize(("tool", "title"), [("thin_delta", "Comparing ["), ("thin_rmap", "Reading [")])
def test_a_terminal_shows_progress_and_is_left_clean(
    tool: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "_FIRST_SHOWN_AFTER", 0)
    arguments = {"thin_delta": ["--thin1", "1", "--thin2", "20"], "thin_rmap": ["--region", "0..16384"]}[tool]
    path = image_path("snapshot_chain", tmp_path)
    wanted = run_tool(tool, *arguments, path)
    main = import_module(f"tools.{tool}").main
    for name, output in (("file", io.TextIOWrapper(io.BytesIO())), ("terminal", _Terminal())):
        terminal = _Terminal()
        with redirect_stdout(output), redirect_stderr(terminal):
            assert main([*arguments, str(path)]) == 0
        output.flush()
        assert isinstance(output.buffer, io.BytesIO)
        assert output.buffer.getvalue() == wanted.stdout
        if tool == "thin_delta" and name == "terminal":
            assert terminal.shown() == "", "no bar among the lines"
            continue
        assert title in terminal.shown()
        assert terminal.shown().endswith("\r")
        assert not terminal.shown().rstrip("\r").rpartition("\r")[2].strip()


@pytest.mark.parametrize("tool", ["thin_delta", "thin_rmap"])
def test_they_start_without_what_they_do_not_need(tool: str, pool: Path) -> None:
    program = f"import sys; from tools.{tool} import main; main({[*NEEDED[tool], str(pool)]}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "thinpool.mapping_nodes" in loaded
    assert not loaded & {"argparse", "bufio.core", "construct", "dataclasses", "json", "numpy", "tempfile"}
    assert not loaded & {"persistent_data.btree", "thinpool.compare", "thinpool.metadata"}, "the engine"
