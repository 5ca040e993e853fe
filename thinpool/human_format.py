"""Write a pool's contents for people, byte for byte as thin_dump 1.x does with ``--format human_readable``.

Source: docs/tools/thin_dump.md, "human_readable".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinpool.text_format import TextWriter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from persistent_data.block_batches import Words
    from thinpool.ir import Device, Superblock

_RUN = "    (%d..%d) -> (%d..%d), %d\n"


class HumanWriter(TextWriter):
    """A visitor of :mod:`thinpool.ir` that passes text to *write*, some kilobytes of ASCII at a time.

    Ranges include their last block, and a run of one block is a range too.
    """

    lines_of_runs = ((_RUN, (0, 1, 2, 3, 4)),)

    def begin_superblock(self, superblock: Superblock) -> None:
        """Write what the pool says of itself."""
        self._line(
            f'begin superblock: "{superblock.uuid}", {superblock.time}, {superblock.transaction}, '
            f"{int(superblock.needs_check)}, {superblock.version}, {superblock.data_block_size}, "
            f"{superblock.nr_data_blocks}\n"
        )

    def end_superblock(self) -> None:
        """Write the last line and pass on everything."""
        self._line("end superblock\n")
        self.flush()

    def begin_shared(self, name: int) -> None:
        """Write the first line of a shared part."""
        self._line(f"def: {name}\n")

    def end_shared(self) -> None:
        """Write the empty line that ends a shared part."""
        self._line("\n")

    def begin_device(self, device: Device) -> None:
        """Write what the pool says of a device."""
        self._line(
            f"device: {device.dev_id}\nmapped_blocks: {device.mapped_blocks}\ntransaction: {device.transaction}\n"
            f"creation time: {device.creation_time}\nsnap time: {device.snap_time}\n"
        )

    def end_device(self) -> None:
        """Write the empty line that ends a device."""
        self._line("\n")

    def mapping(self, thin_begin: int, data_begin: int, length: int, time: int) -> None:
        """Write a run."""
        self._line(_RUN % (thin_begin, thin_begin + length - 1, data_begin, data_begin + length - 1, time))

    def _columns(
        self, thin_begins: Words, data_begins: Words, lengths: Words, times: Words
    ) -> tuple[NDArray[np.uint8] | None, list[Words]]:
        rest = lengths - lengths.dtype.type(1)
        return None, [thin_begins, thin_begins + rest, data_begins, data_begins + rest, times]

    def shared(self, name: int) -> None:
        """Write a reference to a shared part."""
        self._line(f"    ref: {name}\n")
