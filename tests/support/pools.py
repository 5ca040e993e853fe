"""What a pool on a device says, by a reader that shares no code with the engine, and whether it is sound."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from tests.support.image import ENTRIES_PER_BITMAP, Image
from thinpool.check import check_report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bufio import MemoryDevice
    from tests.support.devices import FaultyMemory
    from tests.support.image import Details
    from thinpool.check import Finding

DATA_SPACE_MAP = "data space map"


class Content(NamedTuple):
    """Everything that users of a pool can tell from its metadata, as plain values."""

    time: int
    transaction_id: int
    flags: int
    devices: dict[int, Details]
    mappings: dict[int, dict[int, tuple[int, int]]]
    """Device -> {thin block: (data block, time)}."""
    data_counts: dict[int, int]
    nr_data_blocks: int
    nr_metadata_blocks: int
    snap_mappings: dict[int, dict[int, tuple[int, int]]] | None
    """The same in the metadata snapshot, None when there is none."""

    def mapped_data_blocks(self) -> set[int]:
        """Data blocks that a device maps, or the metadata snapshot's version of one."""
        devices = [*self.mappings.values(), *(self.snap_mappings or {}).values()]
        return {data for mappings in devices for data, _ in mappings.values()}


def content_of(image: bytes) -> Content:
    """Read what was committed last."""
    found = Image.from_bytes(image)
    sb = found.superblock()
    return Content(
        time=sb.time,
        transaction_id=sb.transaction_id,
        flags=sb.flags,
        devices=found.devices(),
        mappings=found.mappings(),
        data_counts=found.counts("data"),
        nr_data_blocks=sb.data_map.nr_blocks,
        nr_metadata_blocks=sb.metadata_map.nr_blocks,
        snap_mappings=found.mappings(found.superblock(sb.held_root)) if sb.held_root else None,
    )


def assert_sound(device: MemoryDevice | FaultyMemory, owned: Mapping[int, int] | None = None) -> Image:
    """Fail unless our check finds nothing wrong and every count is what an independent recount gives.

    :param owned: references to data blocks that belong to the caller: allocated, but not mapped (yet)
    :returns: the device's content
    """
    image = Image.from_bytes(device.contents())
    extra = {block: count for block, count in (owned or {}).items() if count}
    findings = [f for f in check_report(device).findings if f.severity != "advisory" and not _is_owned(f, extra)]
    assert not findings, "check finds:\n" + "\n".join(map(str, findings))
    metadata, data = image.recount()
    assert image.counts("metadata") == metadata
    assert image.counts("data") == dict(Counter(data) + Counter(extra))
    sb = image.superblock()
    for which, root in (("metadata", sb.metadata_map), ("data", sb.data_map)):
        counts = image.counts(which)
        assert root.nr_allocated == len(counts), f"{which} space map: nr_allocated"
        per_bitmap = Counter(block // ENTRIES_PER_BITMAP for block in counts)
        for index, (_, nr_free, none_free_before) in enumerate(image.bitmaps(which)):
            assert nr_free == ENTRIES_PER_BITMAP - per_bitmap[index], f"{which} space map: nr_free of bitmap {index}"
            first = index * ENTRIES_PER_BITMAP
            free_below = [block for block in range(first, first + none_free_before) if block not in counts]
            assert not free_below, f"{which} space map: {free_below} are free below none_free_before"
    return image


def _is_owned(finding: Finding, extra: Mapping[int, int]) -> bool:
    """Whether a count that is too high is explained by what the caller owns."""
    if finding.tree != DATA_SPACE_MAP or finding.keys is None or finding.expected is None or finding.actual is None:
        return False
    return all(extra.get(block, 0) == finding.actual - finding.expected for block in range(*finding.keys))


def outcome_of(call: Callable[[], object]) -> OSError | None:
    """The error that *call* raises, None if it raises none; only an ``OSError`` counts as one."""
    try:
        call()
    except OSError as error:
        return error
    return None
