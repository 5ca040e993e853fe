"""Write a pool's contents as JSON, one object a line.

Source: docs/tools/thin_dump.md, "JSON".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinpool.text_format import TextWriter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from persistent_data.block_batches import Words
    from thinpool.ir import Device, Superblock

_RUN = '{"type": "mapping", "%s": %%d, "thin_begin": %%d, "data_begin": %%d, "length": %%d, "time": %%d}\n'
_OWNERS = ("dev_id", "def")
"""What the mappings belong to: a device, or a shared part."""
_RUNS = [_RUN % owner for owner in _OWNERS]


class JsonWriter(TextWriter):
    """A visitor of :mod:`thinpool.ir` that passes lines of JSON to *write*, some kilobytes of ASCII at a time.

    Each line can be understood without the others, but for shared parts and what refers to them.
    """

    lines_of_runs = tuple((text, (0, 1, 2, 3, 4)) for text in _RUNS)
    _kind = 0
    """Which of the owners the next mappings belong to."""
    _owner = 0
    """Its number."""

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
        self._kind, self._owner = 1, name
        self._line(f'{{"type": "def", "name": {name}}}\n')

    def end_shared(self) -> None:
        """Write nothing: the next object says that the part has ended."""

    def begin_device(self, device: Device) -> None:
        """Write what the pool says of a device."""
        self._kind, self._owner = 0, device.dev_id
        self._line(
            f'{{"type": "device", "dev_id": {device.dev_id}, "mapped_blocks": {device.mapped_blocks}, '
            f'"transaction": {device.transaction}, "creation_time": {device.creation_time}, '
            f'"snap_time": {device.snap_time}}}\n'
        )

    def end_device(self) -> None:
        """Write nothing: the next object says that the device has ended."""

    def mapping(self, thin_begin: int, data_begin: int, length: int, time: int) -> None:
        """Write a run."""
        self._line(_RUNS[self._kind] % (self._owner, thin_begin, data_begin, length, time))

    def _columns(
        self, thin_begins: Words, data_begins: Words, lengths: Words, times: Words
    ) -> tuple[NDArray[np.uint8] | None, list[Words]]:
        owners = thin_begins.copy()
        owners.fill(self._owner)
        kinds = (lengths == 0).view("u1")
        kinds.fill(self._kind)
        return kinds, [owners, thin_begins, data_begins, lengths, times]

    def shared(self, name: int) -> None:
        """Write a reference to a shared part."""
        self._line(f'{{"type": "ref", "{_OWNERS[self._kind]}": {self._owner}, "name": {name}}}\n')
