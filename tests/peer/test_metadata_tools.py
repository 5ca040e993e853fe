"""thin_metadata_size, thin_metadata_pack and thin_metadata_unpack beside the installed reference.

Version 0.9.0 has no packer; what 1.1.0 packs is recorded in tests/data, and asked for live where THINPOOL_PEER_DIR has
it.
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


@pytest.fixture
def packer() -> None:
    if peers.peer_version().startswith("0."):
        pytest.skip(f"{peers.peer_version()} has no thin_metadata_pack")


@pytest.mark.parametrize("unit", "bskmKM")
@pytest.mark.parametrize("block_size", ["64k", "128k", "1m", "1g"])
def test_sizes_are_the_same_where_all_versions_agree(unit: str, block_size: str) -> None:
    """Before 1.0 the last leaf was not counted if it was not full, so here it is."""
    factor = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[block_size[-1]] * int(block_size[:-1])
    line = ["-b", block_size, "-s", f"{factor * 126 * 4000}b", "-m", "1000", "-u", unit, "-n"]
    result = peers.run_peer("thin_metadata_size", *line)
    assert result.status == 0, result.stderr
    assert run_tool("thin_metadata_size", *line).stdout.strip() == result.stdout.strip()


@pytest.mark.usefixtures("packer")
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


@pytest.mark.usefixtures("packer")
def test_a_pack_of_a_size_that_the_reference_would_cut_is_unpacked_by_it(tmp_path: Path) -> None:
    path = image_path("mixed", tmp_path)
    with open(path, "ab") as file:
        file.truncate(2999 * 4096)
    assert run_tool("thin_metadata_pack", "-i", path, "-o", tmp_path / "pack") == DONE
    result = peers.run_peer("thin_metadata_unpack", "-i", tmp_path / "pack", "-o", tmp_path / "copy")
    assert result.status == 0, result.stderr
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
