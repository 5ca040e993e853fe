"""thin_metadata_pack and thin_metadata_unpack beside those of the reference.

Version 0.9.0 has none: conftest.py leaves this module out there.  What 1.1.0 packs is recorded in tests/data, and
tested everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import packs, peers
from tests.support.fixtures import GOOD, image_path
from tests.support.tools import Result, run_tool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.peer

DONE = Result(0, b"", "")


@pytest.mark.parametrize("name", GOOD)
def test_each_unpacks_what_the_other_packed(name: str, tmp_path: Path) -> None:
    path = image_path(name, tmp_path)
    content = path.read_bytes()
    assert run_tool("thin_metadata_pack", "-i", path, "-o", tmp_path / "ours") == DONE
    result = peers.run_peer("thin_metadata_unpack", "-i", tmp_path / "ours", "-o", tmp_path / "copy")
    assert result.status == 0, result.stderr
    assert (tmp_path / "copy").read_bytes() == content

    result = peers.run_peer("thin_metadata_pack", "-i", path, "-o", tmp_path / "theirs")
    assert result.status == 0, result.stderr
    ours, theirs = (packs.entries((tmp_path / pack).read_bytes()) for pack in ("ours", "theirs"))
    assert theirs.items() <= ours.items()
    if len(theirs) == len(ours):
        assert run_tool("thin_metadata_unpack", "-f", "-i", tmp_path / "theirs", "-o", tmp_path / "copy") == DONE
        assert (tmp_path / "copy").read_bytes() == content
    else:
        # Their packer may lose a chunk; that is noticed, unless the pool did not use it.
        refused = run_tool("thin_metadata_unpack", "-f", "-i", tmp_path / "theirs", "-o", tmp_path / "copy")
        assert refused.status == 0 or "are missing" in refused.stderr or "no superblock" in refused.stderr


def test_a_pack_of_a_size_that_the_reference_would_cut_is_unpacked_by_it(tmp_path: Path) -> None:
    path = image_path("mixed", tmp_path)
    with open(path, "ab") as file:
        file.truncate(2999 * 4096)
    assert run_tool("thin_metadata_pack", "-i", path, "-o", tmp_path / "pack") == DONE
    result = peers.run_peer("thin_metadata_unpack", "-i", tmp_path / "pack", "-o", tmp_path / "copy")
    assert result.status == 0, result.stderr
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
