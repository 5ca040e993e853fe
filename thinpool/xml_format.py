"""Write a pool's contents as the XML of thin_dump 1.x, byte for byte.

Source: docs/tools/thin_dump.md, "XML".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinpool.text_format import TextWriter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from persistent_data.block_batches import Words
    from thinpool.ir import Device, Superblock

_SINGLE = '    <single_mapping origin_block="%d" data_block="%d" time="%d"/>\n'
_RANGE = '    <range_mapping origin_begin="%d" data_begin="%d" length="%d" time="%d"/>\n'


class XmlWriter(TextWriter):
    """A visitor of :mod:`thinpool.ir` that passes XML to *write*, some kilobytes of ASCII at a time.

    The whole superblock tag is on the first line; no newline ends the last one.
    """

    lines_of_runs = ((_SINGLE, (0, 1, 3)), (_RANGE, (0, 1, 2, 3)))

    def begin_superblock(self, superblock: Superblock) -> None:
        """Write the superblock's tag."""
        flags = ' flags="1"' if superblock.needs_check else ""
        self._line(
            f'<superblock uuid="{superblock.uuid}" time="{superblock.time}" transaction="{superblock.transaction}"'
            f'{flags} version="{superblock.version}" data_block_size="{superblock.data_block_size}" '
            f'nr_data_blocks="{superblock.nr_data_blocks}">\n'
        )

    def end_superblock(self) -> None:
        """Write the closing tag and pass on everything."""
        self._line("</superblock>")
        self.flush()

    def begin_shared(self, name: int) -> None:
        """Write the opening tag of a shared part."""
        self._line(f'  <def name="{name}">\n')

    def end_shared(self) -> None:
        """Write the closing tag of a shared part."""
        self._line("  </def>\n")

    def begin_device(self, device: Device) -> None:
        """Write a device's tag."""
        self._line(
            f'  <device dev_id="{device.dev_id}" mapped_blocks="{device.mapped_blocks}" '
            f'transaction="{device.transaction}" creation_time="{device.creation_time}" '
            f'snap_time="{device.snap_time}">\n'
        )

    def end_device(self) -> None:
        """Write a device's closing tag."""
        self._line("  </device>\n")

    def mapping(self, thin_begin: int, data_begin: int, length: int, time: int) -> None:
        """Write a run."""
        if length == 1:
            self._line(_SINGLE % (thin_begin, data_begin, time))
        else:
            self._line(_RANGE % (thin_begin, data_begin, length, time))

    def _columns(
        self, thin_begins: Words, data_begins: Words, lengths: Words, times: Words
    ) -> tuple[NDArray[np.uint8] | None, list[Words]]:
        return (lengths != 1).view("u1"), [thin_begins, data_begins, lengths, times]

    def shared(self, name: int) -> None:
        """Write a reference to a shared part."""
        self._line(f'    <ref name="{name}"/>\n')
