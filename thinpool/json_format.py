"""Write a pool's contents as JSON, one object a line.

Source: docs/tools/thin_dump.md, "JSON".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinpool.text_format import TextWriter

if TYPE_CHECKING:
    from thinpool.ir import Device, Superblock


class JsonWriter(TextWriter):
    """A visitor of :mod:`thinpool.ir` that passes lines of JSON to *write*, some kilobytes of ASCII at a time.

    Each line can be understood without the others, but for shared parts and what refers to them.
    """

    _owner = ""
    """The device or the shared part that the next mappings belong to, as a member of their objects."""

    def begin_superblock(self, superblock: Superblock) -> None:
        """Write what the pool says of itself."""
        self._line(
            f'{{"type": "superblock", "uuid": "{superblock.uuid}", "time": {superblock.time}, '
            f'"transaction": {superblock.transaction}, "needs_check": {"true" if superblock.needs_check else "false"}, '
            f'"version": {superblock.version}, "data_block_size": {superblock.data_block_size}, '
            f'"nr_data_blocks": {superblock.nr_data_blocks}}}\n'
        )

    def end_superblock(self) -> None:
        """Write that this is all, and pass on everything."""
        self._line('{"type": "end"}\n')
        self.flush()

    def begin_shared(self, name: int) -> None:
        """Write that a shared part begins."""
        self._owner = f'"def": {name}'
        self._line(f'{{"type": "def", "name": {name}}}\n')

    def end_shared(self) -> None:
        """Write nothing: the next object says that the part has ended."""

    def begin_device(self, device: Device) -> None:
        """Write what the pool says of a device."""
        self._owner = f'"dev_id": {device.dev_id}'
        self._line(
            f'{{"type": "device", "dev_id": {device.dev_id}, "mapped_blocks": {device.mapped_blocks}, '
            f'"transaction": {device.transaction}, "creation_time": {device.creation_time}, '
            f'"snap_time": {device.snap_time}}}\n'
        )

    def end_device(self) -> None:
        """Write nothing: the next object says that the device has ended."""

    def mapping(self, thin_begin: int, data_begin: int, length: int, time: int) -> None:
        """Write a run."""
        self._line(
            f'{{"type": "mapping", {self._owner}, "thin_begin": {thin_begin}, "data_begin": {data_begin}, '
            f'"length": {length}, "time": {time}}}\n'
        )

    def shared(self, name: int) -> None:
        """Write a reference to a shared part."""
        self._line(f'{{"type": "ref", {self._owner}, "name": {name}}}\n')
