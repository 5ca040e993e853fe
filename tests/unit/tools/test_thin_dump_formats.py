"""The formats of thin_dump, held against what the reference wrote (tests/data/make_dump_answers.py) and each other."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fixtures import DATA, GOOD, answer, image_path, read_xml
from tests.support.tools import Result, run_tool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RECORDED = {
    (version, name, tuple(options)): digest
    for digest, version, name, *options in map(str.split, (DATA / "dumps.txt").read_text().splitlines())
    if options[0] == "-f"
}


def recorded(version: str, form: str) -> list[tuple[str, list[str], str]]:
    """Images, options, and hashes of what *version* wrote with them in *form*."""
    return [
        (name, list(options[2:]), digest)
        for (by, name, options), digest in RECORDED.items()
        if by == version and options[1] == form
    ]


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def dump(*arguments: str | Path) -> bytes:
    result = run_tool("thin_dump", *arguments)
    assert (result.status, result.stderr) == (0, "")
    return result.stdout


def with_snap_size_of_the_reference(content: bytes, options: list[str]) -> bytes:
    """What the reference says of the data device in a dump of the metadata snapshot: 0 blocks."""
    if not options:
        return content
    content = re.sub(rb'(?<= nr_data_blocks=")\d+', b"0", content, count=1)
    return re.sub(rb"^(begin superblock: .*, )\d+$", rb"\g<1>0", content, count=1, flags=re.MULTILINE)


def test_there_is_an_answer_for_every_image() -> None:
    for version, form in (("1.1.0", "human_readable"), ("0.9.0", "human_readable"), ("0.9.0", "xml")):
        assert {name for name, options, _ in recorded(version, form) if not options} == set(GOOD)


@pytest.mark.parametrize(("name", "options", "digest"), recorded("1.1.0", "human_readable"))
def test_human_readable_is_that_of_the_reference(name: str, options: list[str], digest: str, tmp_path: Path) -> None:
    ours = dump("-f", "human_readable", *options, image_path(name, tmp_path))
    assert digest_of(with_snap_size_of_the_reference(ours, options)) == digest


@pytest.mark.parametrize(("name", "options", "digest"), recorded("0.9.0", "human_readable"))
def test_human_readable_without_sharing_is_that_of_the_old_tool(
    name: str, options: list[str], digest: str, tmp_path: Path
) -> None:
    """But for runs of one block, which it did not write as ranges."""
    ours = dump("--format=human_readable", "--no-shared", *options, image_path(name, tmp_path))
    ours = re.sub(rb"\((\d+)\.\.\1\) -> \((\d+)\.\.\2\)", rb"\1 -> \2", ours)
    assert digest_of(with_snap_size_of_the_reference(ours, options)) == digest


@pytest.mark.parametrize(("name", "options", "digest"), recorded("0.9.0", "xml"))
def test_xml_without_sharing_is_that_of_the_old_tool(
    name: str, options: list[str], digest: str, tmp_path: Path
) -> None:
    """But for the flags, which it always wrote, and the newline at the end."""
    ours = dump("--no-shared", *options, image_path(name, tmp_path))
    assert b"<def" not in ours
    assert b"<ref" not in ours
    if b' flags="' not in ours:
        ours = ours.replace(b" version=", b' flags="0" version=', 1)
    assert digest_of(with_snap_size_of_the_reference(ours + b"\n", options)) == digest


def json_of(*arguments: str | Path) -> Iterator[dict[str, Any]]:
    for line in dump("--json", *arguments).decode().splitlines():
        yield json.loads(line)


@pytest.mark.parametrize("name", GOOD)
def test_json_tells_what_xml_tells(name: str, tmp_path: Path) -> None:
    superblock, *objects, end = json_of(image_path(name, tmp_path))
    expected = read_xml(answer(name, "xml"))
    assert superblock.pop("type") == "superblock"
    assert superblock.pop("needs_check") == (b'flags="1"' in answer(name, "xml"))
    assert {key: str(value) for key, value in superblock.items()} == expected.superblock
    assert end == {"type": "end"}
    found: dict[int, dict[int, tuple[int, int]]] = {}
    for one in objects:
        kind = one.pop("type")
        if kind == "device":
            dev_id = one.pop("dev_id")
            assert tuple(one.values()) == tuple(expected.devices[dev_id].details)
            found[dev_id] = {}
        else:
            assert kind == "mapping"
            assert one["dev_id"] == list(found)[-1], "mappings follow their device"
            for i in range(one["length"]):
                found[one["dev_id"]][one["thin_begin"] + i] = one["data_begin"] + i, one["time"]
    assert found == {dev_id: device.mappings for dev_id, device in expected.devices.items()}


def test_json_and_a_format_exclude_each_other(tmp_path: Path) -> None:
    result = run_tool("thin_dump", "--json", "-f", "xml", image_path("empty", tmp_path))
    assert (result.status, result.stdout) == (64, b"")
    assert "the argument '--json' cannot be used with '--format <TYPE>'" in result.stderr


@pytest.mark.parametrize("value", ["xm", "", "custom", "custom=", "human"])
def test_an_unknown_format_is_a_usage_error_that_names_the_known_ones(value: str, tmp_path: Path) -> None:
    result = run_tool("thin_dump", f"--format={value}", image_path("empty", tmp_path))
    assert (result.status, result.stdout) == (64, b"")
    assert f"invalid value '{value}' for '--format <TYPE>'" in result.stderr
    assert "[possible values: xml, human_readable, custom=FILE]" in result.stderr


# A format of the user's own

EMITTER = """
class Counter:
    def __init__(self, write):
        self.write = write
    def begin_superblock(self, superblock): self.write(b"pool of %d\\n" % superblock.nr_data_blocks)
    def end_superblock(self): self.write(b"end\\n")
    def begin_shared(self, name): self.length = 0
    def end_shared(self): self.write(b"shared: %d\\n" % self.length)
    def begin_device(self, device): self.dev_id, self.length, self.refs = device.dev_id, 0, 0
    def end_device(self): self.write(b"%d: %d, %d\\n" % (self.dev_id, self.length, self.refs))
    def mapping(self, thin_begin, data_begin, length, time): self.length += length
    def shared(self, name): self.refs += 1

create_emitter = Counter
"""


def custom(tmp_path: Path, source: str | bytes, name: str = "dirty_4") -> Result:
    path = tmp_path / "emitter.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    return run_tool("thin_dump", "-f", f"custom={path}", image_path(name, tmp_path))


def test_a_format_of_ones_own_is_a_python_file(tmp_path: Path) -> None:
    assert custom(tmp_path, EMITTER) == Result(0, b"pool of 16384\nshared: 900\n0: 0, 1\n1: 0, 1\nend\n", "")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "has no function create_emitter(write)"),
        (b"\x7fELF\x02\x01\x01\x00", "failed: "),
        ("def (", "failed: SyntaxError: invalid syntax"),
        ("import no_such_module", "failed: ModuleNotFoundError: No module named 'no_such_module'"),
        ("{}[1]", "failed: KeyError: 1"),
        ("create_emitter = lambda write: object()", "failed: AttributeError: "),
        (EMITTER.replace("self.refs += 1", "self.refs /= 0"), "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_wrong_with_it_is_told_in_one_sentence(tmp_path: Path, source: str | bytes, reason: str) -> None:
    result = custom(tmp_path, source)
    assert result.status == 64
    assert result.stderr.startswith(f"Custom format '{tmp_path / 'emitter.py'}' ")
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_custom_format_must_be_there(tmp_path: Path) -> None:
    result = run_tool("thin_dump", "-f", f"custom={tmp_path / 'none'}", image_path("empty", tmp_path))
    assert (result.status, result.stdout) == (64, b"")
    assert "No such file or directory (os error 2)" in result.stderr


def test_damage_is_told_as_in_other_formats(tmp_path: Path) -> None:
    result = custom(tmp_path, EMITTER, "leaf_flipped")
    assert (result.status, result.stdout) == (64, b"pool of 16384\n")
    assert result.stderr == run_tool("thin_dump", tmp_path / "leaf_flipped.img").stderr
