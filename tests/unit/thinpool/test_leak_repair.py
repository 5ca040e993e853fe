"""Leaks are repaired, everything that counts free blocks is put right, and no block in use is written to."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import pytest

import thinpool.check
from bufio.device import MemoryDevice
from bufio.testing import CrashDevice, FaultyDevice, Write
from persistent_data.damage import FATAL
from tests.support.fixtures import DAMAGED, GOOD, answer, image, read_runs
from tests.support.image import Image
from tests.support.leaks import BLOCK, small_pool, with_leaks, with_random_leaks
from tests.support.pools import assert_sound, content_of
from tests.support.surgeon import Surgeon
from thinpool.check import Counts, Observer, check, check_report
from thinpool.errors import Corrupt, OutOfSpace, ThinError
from thinpool.leak_repair import LeakRepair, repair_leaks
from thinpool.needs_check import clear_needs_check

if TYPE_CHECKING:
    from collections.abc import Callable

    from bufio.device import Device, ReadableBuffer, WritableBuffer


def counts_of(device: Device) -> Counts:
    class Listener(Observer):
        counts: Counts | None = None

        def counted(self, counts: Counts) -> None:
            self.counts = counts

    listener = Listener()
    assert all(finding.severity != FATAL for finding in check(device, observer=listener))
    assert listener.counts is not None
    return listener.counts


def assert_repaired(before: bytes, device: MemoryDevice) -> None:
    """The pool is sound, its users see what they saw, and every block that was in use has its old content."""
    assert_sound(device)
    assert check_report(device).findings == []
    after = device.contents()
    old, new = content_of(before), content_of(after)
    assert new == old._replace(data_counts=new.data_counts)
    assert new.data_counts == Image.from_bytes(before).recount()[1]
    for block in Image.from_bytes(before).recount()[0]:
        begin = block * BLOCK
        if block:
            assert after[begin : begin + BLOCK] == before[begin : begin + BLOCK], block


# What is repaired


LEFT_BY_THE_KERNEL = ["dirty_2", "metadata_full"]
"""Images with leaks: it was killed, or ran out of space."""


@pytest.mark.parametrize("name", ["data_leak", "metadata_leak", *LEFT_BY_THE_KERNEL])
def test_recorded_leaks_are_repaired(name: str) -> None:
    device = MemoryDevice(image(name))
    repair = repair_leaks(device)
    assert repair.has_written
    assert repair.data_leaks + repair.metadata_leaks > 0
    assert_repaired(image(name), device)


@pytest.mark.parametrize("name", [name for name in GOOD if name not in LEFT_BY_THE_KERNEL])
def test_a_sound_pool_is_not_written_to(name: str) -> None:
    device = CrashDevice(image(name))
    assert not repair_leaks(device).has_written
    assert device.trace == ()


@pytest.mark.parametrize("name", ["empty", "many_devices", "metadata_snapshot", "mixed", "resized_data"])
@pytest.mark.parametrize("seed", range(4))
def test_seeded_leaks_are_repaired(name: str, seed: int) -> None:
    content = with_random_leaks(image(name), seed)
    lost = {which: set(Image.from_bytes(content).counts(which)) for which in ("data", "metadata")}
    found = Image.from_bytes(content).recount()
    device = MemoryDevice(content)
    repair = repair_leaks(device)
    assert repair.metadata_leaks == len(lost["metadata"] - found[0].keys())
    assert repair.data_leaks == len(lost["data"] - found[1].keys())
    assert_repaired(content, device)


@pytest.mark.slow
def test_leaks_under_every_bitmap_of_large_space_maps_are_repaired() -> None:
    """Two bitmaps for metadata, 170 for data: their index has two levels."""
    content = small_pool(17000, 170 * 16320)
    leaks = [number * 16320 + 16319 for number in range(1, 170)]
    content = with_leaks(content, metadata=[16319, 16999])
    surgeon = Surgeon(content)
    index = [bitmap for bitmap, _, _ in surgeon.image.bitmaps("data")]
    for number in range(1, 170):
        surgeon.patch(index[number], BLOCK - 1, 1, 0x80, "bitmap")
    content = surgeon.content()
    assert set(leaks) <= Image.from_bytes(content).counts("data").keys()
    device = MemoryDevice(content)
    repair = repair_leaks(device)
    assert (repair.data_leaks, repair.metadata_leaks) == (169, 2)
    assert_repaired(content, device)


@pytest.mark.parametrize("which", ["data", "metadata"])
@pytest.mark.parametrize(
    "break_it",
    [
        lambda s, which: s.superblock(**{f"{which}_nr_allocated": 5}),
        lambda s, which: s.index_entry(which, 0, nr_free=0),
        lambda s, which: s.index_entry(which, 0, none_free_before=16320),
    ],
    ids=["nr_allocated", "nr_free", "none_free_before"],
)
def test_what_the_space_maps_say_of_themselves_is_put_right(
    which: str, break_it: Callable[[Surgeon, str], None]
) -> None:
    surgeon = Surgeon(image("mixed"))
    break_it(surgeon, which)
    device = surgeon.device()
    assert check_report(device).findings
    repair = repair_leaks(device)
    assert (repair.data_leaks, repair.metadata_leaks, repair.has_written) == (0, 0, True)
    assert_repaired(surgeon.content(), device)


def test_a_leak_may_serve_as_room_for_its_own_repair() -> None:
    """Free is what nothing refers to, whatever the space map says."""
    content = small_pool()
    used = Image.from_bytes(content).recount()[0]
    content = with_leaks(content, metadata=[block for block in range(64) if block not in used])
    device = MemoryDevice(content)
    assert repair_leaks(device).metadata_leaks == 64 - len(used)
    assert_repaired(content, device)


@pytest.mark.parametrize("name", ["mixed", "metadata_snapshot"])
def test_large_pools_are_repaired_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large pool there are counts only where something is wrong."""
    monkeypatch.setattr(thinpool.check, "WORTH_ARRAYS", 0)
    device = CrashDevice(image(name))
    assert not repair_leaks(device).has_written
    assert device.trace == ()
    content = with_random_leaks(image(name), seed=5)
    leaky = MemoryDevice(content)
    assert repair_leaks(leaky).has_written
    assert_repaired(content, leaky)


def test_counts_of_a_check_are_used_again() -> None:
    content = with_leaks(small_pool(), data=[999])
    device = MemoryDevice(content)
    repair = repair_leaks(device, counts_of(device))
    assert repr(repair) == repr(LeakRepair(1, 0, has_written=True))
    assert_repaired(content, device)


def test_the_order_is_that_of_a_commit() -> None:
    """The superblock that was found, flush; bitmaps, indices, flush, superblock, flush."""
    device = CrashDevice(with_leaks(small_pool(), data=[999], metadata=[60]))
    repair_leaks(device)
    found, found_flush, *before, flush, superblock, last = device.trace
    assert isinstance(found, Write)
    assert (found.offset, type(found_flush).__name__) == (0, "Flush")
    kinds = [
        Image.from_bytes(device.contents()).kind(event.offset // BLOCK) for event in before if isinstance(event, Write)
    ]
    assert kinds == ["bitmap", "bitmap", "node", "index"]
    assert len(before) == len(kinds)
    assert isinstance(superblock, Write)
    assert superblock.offset == 0
    assert type(flush).__name__ == type(last).__name__ == "Flush"


class DirectDevice(MemoryDevice):
    """Demands what a block device opened with O_DIRECT does: whole, aligned blocks."""

    def readinto(self, buffer: WritableBuffer, offset: int) -> None:
        self._check(buffer, offset)
        super().readinto(buffer, offset)

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        self._check(data, offset)
        super().pwrite(data, offset)

    @staticmethod
    def _check(buffer: ReadableBuffer, offset: int) -> None:
        assert not isinstance(buffer, bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        assert (address % BLOCK, memoryview(buffer).nbytes % BLOCK, offset % BLOCK) == (0, 0, 0)


def test_block_devices_are_read_and_written_past_the_page_cache() -> None:
    surgeon = Surgeon(with_leaks(small_pool(), data=[999], metadata=[60]))
    surgeon.superblock(flags=1)
    device = DirectDevice(surgeon.content())
    repair_leaks(device)
    assert clear_needs_check(device)
    assert_sound(device)


# What is not


@pytest.mark.parametrize("name", DAMAGED)
def test_only_what_the_reference_repairs_is_repaired(name: str) -> None:
    """Where 1.1.0 had nothing to repair in metadata that the kernel refuses, neither have we."""
    device = CrashDevice(image(name))
    report = check_report(device)
    if report.worst == FATAL:
        with pytest.raises(Corrupt, match="only leaks can be repaired"):
            repair_leaks(device)
        assert device.trace == ()
    else:
        recorded = read_runs(answer(name, "expected.txt"))["thin_check 1.1.0 --auto-repair"]
        assert recorded.status == 0
        repair_leaks(device)
        assert check_report(device).ok


def test_a_superblock_that_has_changed_since_the_check_is_refused() -> None:
    device = CrashDevice(with_leaks(small_pool(), data=[999]))
    counts = counts_of(device)
    surgeon = Surgeon(device.contents())
    surgeon.superblock(trans_id=7)
    changed = CrashDevice(surgeon.content())
    with pytest.raises(Corrupt, match="changed since the check"):
        repair_leaks(changed, counts)
    assert changed.trace == ()


def parts(surgeon: Surgeon) -> dict[str, int]:
    """The blocks that a repair reads."""
    sb = surgeon.image.superblock()
    return {
        "data bitmap": surgeon.bitmap_of("data", 0),
        "data index": sb.data_map.bitmap_root,
        "metadata bitmap": surgeon.bitmap_of("metadata", 0),
        "metadata index": sb.metadata_map.bitmap_root,
    }


@pytest.mark.parametrize("part", ["data bitmap", "data index", "metadata bitmap", "metadata index"])
def test_a_part_that_has_changed_since_the_check_is_refused(part: str) -> None:
    surgeon = Surgeon(with_leaks(small_pool(), data=[999]))
    block = parts(surgeon)[part]
    counts = counts_of(surgeon.device())
    surgeon.flip(block)
    device = CrashDevice(surgeon.content())
    with pytest.raises(Corrupt, match=f"block {block}: ") as caught:
        repair_leaks(device, counts)
    assert caught.value.block == block
    assert device.trace == ()


@pytest.mark.parametrize("part", ["data bitmap", "data index", "metadata bitmap", "metadata index"])
def test_a_part_with_several_references_is_refused(part: str) -> None:
    """It could not be moved without somebody who still expects it where it was."""
    surgeon = Surgeon(with_leaks(small_pool(), data=[999]))
    block = parts(surgeon)[part]
    device = CrashDevice(surgeon.content())
    counts = counts_of(device)
    counts.metadata.add(block)
    with pytest.raises(Corrupt, match=f"block {block}: a part of a space map has several references"):
        repair_leaks(device, counts)
    assert device.trace == ()


def test_a_pool_without_room_for_the_repair_is_left_alone() -> None:
    device = CrashDevice(with_leaks(small_pool(), data=[999]))
    counts = counts_of(device)
    for block in range(counts.metadata.nr_blocks):
        counts.metadata.counts[block] = counts.metadata.counts[block] or 1
    with pytest.raises(OutOfSpace, match="too few free metadata blocks"):
        repair_leaks(device, counts)
    assert device.trace == ()


# When it is cut off

LEAKY = with_leaks(small_pool(), data=[300, 301, 999], metadata=[50, 63])


def assert_no_worse(content: bytes) -> None:
    """Nothing but the leaks that were there before, and the users' view unchanged."""
    report = check_report(MemoryDevice(content))
    assert {finding.rule for finding in report.findings} <= {"leak", "nr_allocated is wrong", "nr_free is wrong"}
    seen = content_of(content)
    before = content_of(LEAKY)
    assert seen._replace(data_counts={}) == before._replace(data_counts={})
    for which in ("data", "metadata"):
        leaks = (
            Image.from_bytes(content).counts(which).keys() - Image.from_bytes(content).recount()[which == "data"].keys()
        )
        assert leaks <= Image.from_bytes(LEAKY).counts(which).keys()


def test_a_power_cut_leaves_the_old_leaks_or_none() -> None:
    device = CrashDevice(LEAKY)
    repair_leaks(device)
    outcomes = set()
    for left in device.images(exhaustive=6, samples=24, seed=1):
        content = left.contents()
        assert_no_worse(content)
        outcomes.add(check_report(MemoryDevice(content)).worst)
    assert outcomes == {None, "non_fatal"}


def test_an_error_at_any_call_is_told_and_leaves_nothing_worse() -> None:
    recorder = CrashDevice(LEAKY)
    repair_leaks(recorder)
    nr_writes = sum(isinstance(event, Write) for event in recorder.trace)
    for kind, number in [*(("write", i) for i in range(nr_writes)), *(("flush", i) for i in range(3))]:
        inner = MemoryDevice(LEAKY)
        device = FaultyDevice(inner)
        device.on(kind, skip=number, times=1).fail(errno.EIO)  # type: ignore[arg-type]  # a literal, from the list
        with pytest.raises(ThinError) as caught:
            repair_leaks(device)
        assert caught.value.errno == errno.EIO
        is_last = (kind, number) in (("write", nr_writes - 1), ("flush", 2))
        told = "either as it was or repaired; check it again" if is_last else "the metadata is as it was"
        assert str(caught.value.strerror).startswith("cannot write the repair: ")
        assert str(caught.value.strerror).endswith(told)
        assert_no_worse(inner.contents())
        repair_leaks(inner)
        assert_repaired(LEAKY, inner)


def test_a_torn_write_leaves_nothing_worse() -> None:
    inner = MemoryDevice(LEAKY)
    device = FaultyDevice(inner)
    device.on("write").tear(sectors=[1, 3, 4])
    with pytest.raises(ThinError):
        repair_leaks(device)
    assert_no_worse(inner.contents())


def test_an_error_in_reading_leaves_the_pool_alone() -> None:
    device = FaultyDevice(CrashDevice(LEAKY))
    counts = counts_of(device.inner)
    device.on("read", skip=1).fail(errno.EIO)
    with pytest.raises(OSError, match=r".") as caught:
        repair_leaks(device, counts)
    assert caught.value.errno == errno.EIO
    assert device.inner.trace == ()
