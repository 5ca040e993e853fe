"""What the reference's readers were recorded to make of every image (``tests/data/answers.txt``), and what ours make.

A :class:`Difference` between our output and that of a version is a function that undoes it: applied to what we print,
it gives the recorded bytes.  ``docs/compatibility.md`` lists them with their reasons.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from tests.support.fixtures import BLOCK_SIZE, DATA, image
from tests.support.image import Image
from tests.support.reverse import without_shared_nodes
from tests.support.tools import Result, run_tool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NEW, OLD = VERSIONS = ("1.1.0", "0.9.0")


class Answer(NamedTuple):
    """What one version gave; the hashes are empty where it failed."""

    status: int
    sha256: str
    sorted_sha256: str

    def is_of(self, output: bytes) -> bool:
        """Whether *output* is what was printed, or its lines in ascending order."""
        return _hash(output) in (self.sha256, self.sorted_sha256)


class Case(NamedTuple):
    """A command line on an image; a version that has no such program gave no answer."""

    name: str
    command: str
    answers: dict[str, Answer]

    @property
    def program(self) -> str:
        """The first word."""
        return self.command.split()[0]

    def run(self, tmp_path: Path, *options: str) -> Result:
        """What ours makes of it, with *options* besides."""
        path = tmp_path / f"{self.name}.img"
        if not path.exists():
            path.write_bytes(image(self.name))
        words = [str(tmp_path / word) if word == "OUTPUT" else word for word in self.command.split()]
        (tmp_path / "OUTPUT").unlink(missing_ok=True)
        return run_tool(words[0], *options, *words[1:], path)


@cache
def cases_of(name: str) -> list[Case]:
    """The recorded cases of an image."""
    return [case for case in _cases() if case.name == name]


@cache
def _cases() -> list[Case]:
    cases = []
    for line in (DATA / "answers.txt").read_text().splitlines():
        name, command, rest = line.split(": ")
        answers = {}
        for version, text in zip(VERSIONS, rest.split("  "), strict=True):
            if text != "-":
                status, sha256, sorted_sha256, *_ = *text.split(), "", ""
                answers[version] = Answer(int(status), sha256, sorted_sha256)
        cases.append(Case(name, command, answers))
    return cases


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# Differences


class Output(NamedTuple):
    """Our output of a case, and what made it."""

    case: Case
    content: bytes
    tmp_path: Path


class Difference(NamedTuple):
    """Something that *versions* print in another way; ``example`` is an image and a command that show it."""

    name: str
    programs: tuple[str, ...]
    versions: tuple[str, ...]
    example: tuple[str, str]
    undo: Callable[[Output], bytes]


def as_printed_by(version: str, case: Case, content: bytes, tmp_path: Path, *, without: str = "") -> bytes:
    """Our output with all that differs from that of a version undone, but for the difference named *without*."""
    for difference in DIFFERENCES:
        if version in difference.versions and case.program in difference.programs and difference.name != without:
            content = difference.undo(Output(case, content, tmp_path))
    return content


def _substituted(pattern: bytes, replacement: bytes, *, count: int = 0) -> Callable[[Output], bytes]:
    def undo(output: Output) -> bytes:
        return re.sub(pattern, replacement, output.content, count=count)

    return undo


def _without_sharing(output: Output) -> bytes:
    if "--skip-mappings" in output.case.command:
        return output.content
    return output.case.run(output.tmp_path, "--no-shared").stdout


def _final_newline(output: Output) -> bytes:
    return output.content + (b"\n" if output.content.endswith(b"</superblock>") else b"")


def _no_data_blocks(output: Output) -> bytes:
    if " -m" not in output.case.command:
        return output.content
    return re.sub(rb'nr_data_blocks="\d+"', b'nr_data_blocks="0"', output.content, count=1)


def _snapshot_in_delta(output: Output) -> bytes:
    held = Image.from_bytes(image(output.case.name)).superblock().held_root
    if not held or " -m" in output.case.command:
        return output.content
    return output.content.replace(b">", b' metadata_snap="%d">' % held, 1)


def _zero_without_unit(output: Output) -> bytes:
    """A table is set again, for its columns are as wide as what is in them."""
    rows = [["0" if cell == "0b" else cell for cell in row.split()] for row in output.content.decode().splitlines()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("".join(f"{cell:>{width}} " for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode()


def _shared_nodes_once(output: Output) -> bytes:
    words = output.case.command.split()
    regions = [tuple(map(int, word.split(".."))) for word in words[2::2]]
    runs = without_shared_nodes(Image.from_bytes(image(output.case.name)), [(begin, end) for begin, end in regions])
    return "".join(f"{run}\n" for run in runs).encode()


_RANGE = re.compile(rb'( *<range begin=")(\d+)(" .*data_begin="\d+" length=")(\d+)("/>\n)')


def _ranges_joined(output: Output) -> bytes:
    lines: list[bytes] = []
    end = None
    for line in output.content.splitlines(keepends=True):
        match = _RANGE.fullmatch(line)
        if match is None:
            end = None
        elif end is not None and int(match[2]) == end:
            before = _RANGE.fullmatch(lines.pop())
            assert before is not None
            end += int(match[4])
            line = b"%b%b%b%d%b" % (before[1], before[2], before[3], end - int(before[2]), before[5])
        else:
            end = int(match[2]) + int(match[4])
        lines.append(line)
    return b"".join(lines)


def _lines_sorted(output: Output) -> bytes:
    return b"".join(sorted(output.content.splitlines(keepends=True)))


def _wrong_free_blocks(output: Output) -> bytes:
    nr_blocks = len(image(output.case.name)) // BLOCK_SIZE
    return re.sub(rb"(METADATA_FREE_BLOCKS)=\d+", rb"\1=%d" % (nr_blocks - 1), output.content)


#: In the order in which they are undone.
DIFFERENCES = [
    Difference("free-blocks", ("thin_check",), (OLD,), ("empty", "thin_check"), _wrong_free_blocks),
    Difference("def-and-ref", ("thin_dump",), (OLD,), ("snapshot_chain", "thin_dump"), _without_sharing),
    Difference(
        "flags",
        ("thin_dump",),
        (OLD,),
        ("empty", "thin_dump"),
        _substituted(rb'( transaction="\d+")( version=)', rb'\1 flags="0"\2', count=1),
    ),
    Difference("final-newline", ("thin_dump", "thin_delta"), (OLD,), ("empty", "thin_dump"), _final_newline),
    Difference(
        "single-mapping",
        ("thin_dump",),
        (OLD,),
        ("block_1g", "thin_dump -f human_readable"),
        _substituted(rb"\((\d+)\.\.\1\) -> \((\d+)\.\.\2\)", rb"\1 -> \2"),
    ),
    Difference(
        "data-blocks-of-snapshot", ("thin_dump",), VERSIONS, ("metadata_snapshot", "thin_dump -m"), _no_data_blocks
    ),
    Difference("zero-bytes", ("thin_ls",), (OLD,), ("devices_without_mappings", "thin_ls"), _zero_without_unit),
    Difference("all-owners", ("thin_rmap",), VERSIONS, ("block_1m", "thin_rmap --region 0..8192"), _shared_nodes_once),
    Difference("order-of-runs", ("thin_rmap",), (OLD,), ("block_192k", "thin_rmap --region 0..16384"), _lines_sorted),
    Difference(
        "delta-flags",
        ("thin_delta",),
        (OLD,),
        ("needs_check", "thin_delta --thin1 0 --thin2 0"),
        _substituted(rb' flags="1"', b"", count=1),
    ),
    Difference(
        "delta-snapshot",
        ("thin_delta",),
        (OLD,),
        ("metadata_snapshot", "thin_delta --thin1 0 --thin2 3"),
        _snapshot_in_delta,
    ),
    Difference(
        "verbose-ranges",
        ("thin_delta",),
        (NEW,),
        ("block_192k", "thin_delta --verbose --thin1 0 --thin2 2"),
        _ranges_joined,
    ),
]
