"""The reference tools accept what our repair of leaks leaves, and what a power cut leaves of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bufio.device import MemoryDevice
from bufio.testing import CrashDevice
from tests.support import peers
from tests.support.fixtures import image, image_path
from tests.support.image import Image
from tests.support.leaks import small_pool, with_leaks, with_random_leaks
from tests.support.tools import run_tool
from thinpool.check import check_report
from thinpool.leak_repair import repair_leaks

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.peer

LEAKY = ["data_leak", "metadata_leak", "dirty_2", "metadata_full"]


@pytest.mark.parametrize("name", LEAKY)
def test_repaired_pools_are_accepted(name: str) -> None:
    device = MemoryDevice(image(name))
    repair_leaks(device)
    peers.assert_accepted(device.contents())
    assert peers.run_thin_dump(device.contents()).stdout == peers.run_thin_dump(image(name)).stdout


@pytest.mark.parametrize("name", ["mixed", "resized_data", "metadata_snapshot"])
@pytest.mark.parametrize("seed", range(3))
def test_pools_with_seeded_leaks_are_accepted_once_repaired(name: str, seed: int) -> None:
    content = with_random_leaks(image(name), seed)
    device = MemoryDevice(content)
    assert repair_leaks(device).has_written
    peers.assert_accepted(device.contents())


@pytest.mark.parametrize("name", ["empty", "transaction_id", "snapshot_chain"])
def test_restored_pools_are_left_alone_or_get_right_free_counts(name: str, tmp_path: Path) -> None:
    """Version 0.9.0 leaves wrong totals, with which the kernel lives; later ones do not."""
    output = tmp_path / "restored"
    xml = run_tool("thin_dump", "--no-shared", image_path(name, tmp_path)).stdout
    assert peers.run_thin_restore(xml, output, 4 << 20).status == 0
    before = output.read_bytes()
    assert run_tool("thin_check", "-q", "--clear-needs-check-flag", output).status == 0
    assert output.read_bytes() == before
    findings = check_report(MemoryDevice(before)).findings
    assert run_tool("thin_check", "-q", "--auto-repair", output).status == 0
    assert (output.read_bytes() != before) == bool(findings)
    assert check_report(MemoryDevice(output.read_bytes())).findings == []
    peers.assert_accepted(output)


def test_whatever_a_power_cut_leaves_is_accepted_but_for_the_leaks() -> None:
    device = CrashDevice(with_leaks(small_pool(), data=[300, 999], metadata=[50, 63]))
    repair_leaks(device)
    images = list(device.images(exhaustive=3, samples=2, seed=2))
    assert len(images) > 10
    for left in images[-40:]:
        result = peers.run_thin_check(left.contents(), "--ignore-non-fatal-errors")
        assert result.status == 0, f"{left}: {result.stderr}"


@pytest.mark.parametrize("name", LEAKY)
def test_the_counts_are_those_that_the_reference_leaves(name: str, tmp_path: Path) -> None:
    if peers.peer_version().startswith("0."):
        expected = Image.from_bytes(image(name)).recount()  # 0.9.0 does not repair data leaks
    else:
        path = image_path(name, tmp_path)
        assert peers.run_peer("thin_check", "--auto-repair", path).status == 0
        theirs = Image.load(path)
        expected = theirs.counts("metadata"), theirs.counts("data")
    device = MemoryDevice(image(name))
    repair_leaks(device)
    ours = Image.from_bytes(device.contents())
    assert ours.counts("data") == expected[1]
    assert sorted(ours.counts("metadata").values()) == sorted(expected[0].values())
