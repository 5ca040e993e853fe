"""thin_delta beside the reference's: the same bytes, and where the versions differ those of the one that is right."""

from __future__ import annotations

import re
from itertools import combinations
from typing import TYPE_CHECKING

import pytest

from tests.support import peers
from tests.support.fixtures import GOOD, facts_of, image, image_path
from tests.support.image import Image
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.peer

MAX_PAIRS = 8
WITH_SNAPSHOT = [name for name in GOOD if facts_of(name).metadata_snap is not None]


def pairs_of(devices: list[int]) -> list[tuple[int, int]]:
    """The first device with itself, and some pairs from near and far."""
    pairs = list(combinations(devices, 2))
    return [(devices[0], devices[0]), *pairs[:: max(1, len(pairs) // MAX_PAIRS)]]


def is_rust() -> bool:
    return not peers.peer_version().startswith("0.")


def theirs(*arguments: str | Path) -> bytes:
    """What the reference prints, without what only version 0.9.0 writes."""
    result = peers.run_peer("thin_delta", *arguments)
    assert result.status == 0, result.stderr
    return re.sub(rb' metadata_snap="\d+">', b">", result.stdout, count=1).removesuffix(b"\n")


def ours(*arguments: str | Path) -> bytes:
    """What we print, without what version 0.9.0 does not write."""
    result = run_tool("thin_delta", *arguments)
    assert result.status == 0, result.stderr
    return result.stdout if is_rust() else result.stdout.replace(b' flags="1"', b"", 1)


@pytest.mark.parametrize("name", [name for name in GOOD if facts_of(name).nr_devices])
def test_every_byte_is_the_same(name: str, tmp_path: Path) -> None:
    path = image_path(name, tmp_path)
    for left, right in pairs_of(sorted(Image.from_bytes(image(name)).devices())):
        line = ("--thin1", str(left), "--snap2", str(right), path)
        assert ours(*line) == theirs(*line)
        if not is_rust():
            assert ours("--verbose", *line) == theirs("--verbose", *line), "the Rust versions are wrong here"


@pytest.mark.parametrize("name", WITH_SNAPSHOT)
def test_the_metadata_snapshot_is_compared_the_same(name: str, tmp_path: Path) -> None:
    path = image_path(name, tmp_path)
    content = Image.from_bytes(image(name))
    for left, right in pairs_of(sorted(content.devices(content.superblock(content.superblock().held_root)))):
        line = ("-m", "--thin1", str(left), "--thin2", str(right), path)
        assert ours(*line) == theirs(*line)
