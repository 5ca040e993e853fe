"""thin_rmap beside the reference's: the same lines, and those for devices that share their mappings besides.

Versions 0.9.0 and 1.1.0 visit a node that several devices share once, for the first of them, and so hide the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import peers
from tests.support.fixtures import GOOD, facts_of, image, image_path
from tests.support.image import Image
from tests.support.reverse import reverse_map_of, without_shared_nodes
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.peer


def regions_of(name: str) -> list[list[tuple[int, int]]]:
    """The whole data device, one block, some parts, parts that touch or overlap, a part beyond the end."""
    end = facts_of(name).nr_data_blocks
    third, tenth = end // 3, end // 10
    return [
        [(0, end)],
        [(7, 8)],
        [(third, 2 * third), (3, 50), (end - 5, end + 5)],
        [(0, tenth), (tenth, third), (tenth // 2, tenth + 9)],
        [(end, 1 << 63)],
    ]


@pytest.mark.parametrize("name", GOOD)
def test_every_byte_is_the_same_but_for_owners_that_the_reference_hides(name: str, tmp_path: Path) -> None:
    path = image_path(name, tmp_path)
    content = Image.from_bytes(image(name))
    rust = not peers.peer_version().startswith("0.")
    for regions in regions_of(name):
        line = [part for begin, end in regions for part in ("--region", f"{begin}..{end}")]
        theirs = peers.run_peer("thin_rmap", *line, path)
        assert theirs.status == 0, theirs.stderr
        ours = run_tool("thin_rmap", *line, path)
        assert (ours.status, ours.stderr) == (0, "")
        wanted, hidden = reverse_map_of(content, regions), without_shared_nodes(content, regions)
        assert ours.stdout.decode() == "".join(f"{run}\n" for run in wanted)
        if rust and wanted == hidden:
            assert ours.stdout == theirs.stdout
        # Runs that begin together have another order in version 0.9.0.
        assert sorted(theirs.stdout.decode().splitlines()) == sorted(map(str, hidden))


@pytest.mark.parametrize("region", ["23..six", "found..7890", "89..88", "89..89", "89..", "..89", "89...99"])
def test_both_refuse_what_is_no_region(region: str, tmp_path: Path) -> None:
    path = image_path("empty", tmp_path)
    for result in (
        run_tool("thin_rmap", "--region", region, path),
        peers.run_peer("thin_rmap", "--region", region, path),
    ):
        assert result.status != 0
        assert result.stdout == b""
