"""Our dumps read by the reference tools, and their metadata read by ours."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from bufio.device import MemoryDevice
from tests.support import peers
from tests.support.fixtures import GOOD, answer, image, image_path, read_ls, read_xml
from thinpool.check import check_report
from thinpool.dump import dump
from thinpool.listing import FIELDS, format_table, list_devices
from thinpool.xml_format import XmlWriter

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.peer

UNSHARED = [name for name in GOOD if b"<def" not in answer(name, "xml")]
HINTS = {"nr_free is wrong", "none_free_before is too high", "nr_allocated is wrong"}


def our_dump(content: bytes) -> bytes:
    out = io.BytesIO()
    dump(MemoryDevice(content), XmlWriter(out.write))
    return out.getvalue()


def restored(name: str, tmp_path: Path) -> bytes:
    """The pool that thin_restore makes of our dump; it packs trees less tightly than a full pool can bear."""
    path = tmp_path / "restored.img"
    result = peers.run_thin_restore(our_dump(image(name)), path, 2 * len(image(name)))
    assert result.status == 0, result.stderr
    return path.read_bytes()


@pytest.mark.parametrize("name", UNSHARED)
def test_thin_restore_takes_our_dump_and_thin_dump_gives_it_back(name: str, tmp_path: Path) -> None:
    result = peers.run_thin_dump(restored(name, tmp_path))
    assert result.status == 0, result.stderr
    assert read_xml(result.stdout) == read_xml(our_dump(image(name)))


@pytest.mark.parametrize("name", UNSHARED)
def test_what_thin_restore_wrote_passes_our_check_and_dumps_the_same(name: str, tmp_path: Path) -> None:
    content = restored(name, tmp_path)
    report = check_report(MemoryDevice(content))
    assert report.ok, str(report)
    assert {finding.rule for finding in report.findings} <= HINTS, "old restore tools are a little off in these"
    assert read_xml(our_dump(content)) == read_xml(our_dump(image(name)))


@pytest.mark.parametrize("name", GOOD)
def test_thin_ls_lists_the_same(name: str, tmp_path: Path) -> None:
    """Version 0.9.0 has no HIGHEST fields and writes a size of nothing without its unit."""
    fields = [field for field in FIELDS if not field.startswith("HIGHEST")]
    result = peers.run_peer("thin_ls", "-o", ",".join(fields), image_path(name, tmp_path))
    assert result.status == 0, result.stderr
    ours = format_table(fields, list_devices(MemoryDevice(image(name)), fields)).encode()

    def without_unit_of_nothing(table: bytes) -> list[dict[str, str]]:
        return [{key: "0" if text == "0b" else text for key, text in row.items()} for row in read_ls(table)]

    assert without_unit_of_nothing(result.stdout) == without_unit_of_nothing(ours)
