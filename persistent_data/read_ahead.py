"""Blocks read before they are needed: many by one read, in ascending order, and no more than was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from persistent_data.block_reader import BlockReader


class ReadAhead:
    """Blocks of *reader*, for programs that know some time before which ones come next.

    Memory: the blocks named in the last call of :meth:`fetch`, less those taken since.
    """

    def __init__(self, reader: BlockReader) -> None:
        self._reader = reader
        self._contents: dict[int, bytes] = {}

    def fetch(self, blocks: Iterable[int]) -> None:
        """Read those of *blocks* that are not at hand, and drop what is at hand and not among them.

        Blocks outside the device or that cannot be read are passed over: the error is for whoever takes them.
        """
        wanted = {block for block in blocks if 0 <= block < self._reader.nr_blocks}
        contents = {block: content for block, content in self._contents.items() if block in wanted}
        for block, content in self._reader.read_many(sorted(wanted - contents.keys())):
            if not isinstance(content, OSError):
                contents[block] = bytes(content)
        self._contents = contents

    def take(self, block: int) -> bytes:
        """Return metadata block *block*, and keep it no longer.

        :raises OSError: the device cannot read it
        :raises ValueError: the device has no such block
        """
        content = self._contents.pop(block, None)
        return bytes(self._reader.read(block)) if content is None else content
