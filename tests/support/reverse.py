"""The reverse map of a pool, worked out mapping by mapping from an independent reader of the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.support.image import Image, Superblock


class Owned(NamedTuple):
    """Data blocks and who maps them."""

    data_begin: int
    data_end: int
    dev_id: int
    thin_begin: int

    def __str__(self) -> str:
        """The line of thin_rmap."""
        thin_end = self.thin_begin + self.data_end - self.data_begin
        return f"data {self.data_begin}..{self.data_end} -> thin({self.dev_id}) {self.thin_begin}..{thin_end}"


def runs_of(mappings: Iterable[tuple[int, int, int]]) -> list[Owned]:
    """Join (device, thin block, data block), which ascend, where both blocks go on; sort by data block."""
    runs: list[Owned] = []
    for dev_id, thin, data in mappings:
        last = runs[-1] if runs else Owned(0, 0, -1, 0)
        length = last.data_end - last.data_begin
        if (dev_id, thin, data) == (last.dev_id, last.thin_begin + length, last.data_end):
            runs[-1] = last._replace(data_end=data + 1)
        else:
            runs.append(Owned(data, data + 1, dev_id, thin))
    return sorted(runs)


def reverse_map_of(image: Image, regions: list[tuple[int, int]], superblock: Superblock | None = None) -> list[Owned]:
    """Every mapping of a data block in *regions*."""
    return runs_of(
        (dev_id, thin, data)
        for dev_id, mappings in sorted(image.mappings(superblock).items())
        for thin, (data, _) in sorted(mappings.items())
        if any(begin <= data < end for begin, end in regions)
    )


def without_shared_nodes(image: Image, regions: list[tuple[int, int]]) -> list[Owned]:
    """The same less what is in nodes that a device with a lower id has too."""
    seen: set[int] = set()

    def walk(block: int) -> Iterator[tuple[int, int]]:
        if block in seen:
            return
        seen.add(block)
        node = image.node(block)
        for key, value in zip(node.keys, node.children, strict=True):
            if node.leaf:
                yield key, value >> 24
            else:
                yield from walk(value)

    roots = [
        (dev_id, int.from_bytes(value, "little")) for dev_id, value in image.items(image.superblock().mapping_root)
    ]
    return runs_of(
        (dev_id, thin, data)
        for dev_id, root in roots
        for thin, data in walk(root)
        if any(begin <= data < end for begin, end in regions)
    )
