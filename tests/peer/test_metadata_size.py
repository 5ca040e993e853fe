"""thin_metadata_size beside the installed reference."""

from __future__ import annotations

import pytest

from tests.support import peers
from tests.support.tools import run_tool

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("unit", "bskmKM")
@pytest.mark.parametrize("block_size", ["64k", "128k", "1m", "1g"])
def test_sizes_are_the_same_where_all_versions_agree(unit: str, block_size: str) -> None:
    """Before 1.0 the last leaf was not counted if it was not full, so here it is."""
    factor = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[block_size[-1]] * int(block_size[:-1])
    line = ["-b", block_size, "-s", f"{factor * 126 * 4000}b", "-m", "1000", "-u", unit, "-n"]
    result = peers.run_peer("thin_metadata_size", *line)
    assert result.status == 0, result.stderr
    assert run_tool("thin_metadata_size", *line).stdout.strip() == result.stdout.strip()
