"""What a power cut may leave in each block, as far as the promises of a cache go."""

from __future__ import annotations

_SECTOR_BYTES = 512


class Durability:
    """For each sector of a device, everything that it may hold after a power cut.

    It is told what the user of a cache did and was promised, never what the cache did: a content is possible from the
    moment at which its block is changed, until a later one is promised to be durable.

    :param image: what the device holds to begin with, durably
    """

    def __init__(self, image: bytes, block_size: int) -> None:
        self._block_size = block_size
        self._possible = [{image[at : at + _SECTOR_BYTES]} for at in range(0, len(image), _SECTOR_BYTES)]
        self.unsettled: set[int] = set()
        """Blocks of which more than one content is possible, as far as is known."""
        self._endangered: set[int] = set()
        """Those that have to be written again because a flush failed."""
        self._discarded: set[int] = set()
        """Those that no cache writes again: a discard was the last that happened to some of their bytes."""
        self._doubtful: set[int] = set()
        """Those that were not written again after a flush failed: no later flush makes up for it."""
        self._rewritten: set[int] = set()
        """Those of which every byte has been changed since."""
        self._ragged: set[int] = set()
        """Those changed by parts of sectors, so that a sector may have one change without another."""

    def _sectors(self, block: int, content: bytes) -> list[tuple[int, bytes]]:
        first = block * self._block_size // _SECTOR_BYTES
        pieces = [content[at : at + _SECTOR_BYTES] for at in range(0, len(content), _SECTOR_BYTES)]
        # The last block of a device may be cut short.
        return list(enumerate(pieces, first))[: len(self._possible) - first]

    def may_become(self, block: int, content: bytes, begin: int = 0, end: int | None = None) -> None:
        """Note that a block is about to be changed to *content*, by writing bytes ``[begin, end)`` of it (or all)."""
        end = self._block_size if end is None else end
        for sector, piece in self._sectors(block, content):
            self._possible[sector].add(piece)
        self.unsettled.add(block)
        if begin % _SECTOR_BYTES or end % _SECTOR_BYTES:
            self._ragged.add(block)
        if end - begin == self._block_size:
            self._rewritten.add(block)
            self._discarded.discard(block)

    def may_be_discarded(self, block: int) -> None:
        """Note that the device is about to be told to discard a block."""
        self.may_become(block, bytes(self._block_size), 0, 0)
        self._discarded.add(block)

    def settle(self, block: int, content: bytes) -> None:
        """Note that *content* was promised to be durable."""
        if block in self._rewritten:
            self._doubtful.discard(block)
        for blocks in (self._rewritten, self._endangered):
            blocks.discard(block)
        if block not in self._doubtful:
            for blocks in (self.unsettled, self._discarded, self._ragged):
                blocks.discard(block)
            for sector, piece in self._sectors(block, content):
                self._possible[sector] = {piece}

    def drop(self, block: int) -> None:
        """Note that what was to become of a block will not be written."""
        self._rewritten.discard(block)
        if block in self._endangered:
            self._doubtful.add(block)

    def flush_has_failed(self, cached: set[int]) -> None:
        """Note that a flush failed when those blocks were *cached*, which have to be written again therefore.

        Of the others whatever was possible stays so until all of it is changed.
        """
        self._endangered |= self.unsettled & cached
        lost = self.unsettled - cached | self._discarded
        self._doubtful |= lost
        self._rewritten -= lost

    def check(self, image: bytes, what: object) -> None:
        """Fail if *image*, which is what *what* left, has a sector that no content of its block explains."""
        for sector, possible in enumerate(self._possible):
            block, at = divmod(sector, self._block_size // _SECTOR_BYTES)
            found = image[sector * _SECTOR_BYTES : (sector + 1) * _SECTOR_BYTES]
            if found not in possible and block not in self._ragged:
                raise AssertionError(f"sector {at} of block {block} holds {found[:8].hex()}... after {what}")
