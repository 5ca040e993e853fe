"""The neutral form of a pool's contents, between whatever reads it and whatever writes it.

A reader calls a :class:`Visitor` in this order: ``begin_superblock``; for each shared part ``begin_shared``, mappings,
``end_shared``; for each device in ascending id ``begin_device``, mappings and references to shared parts in ascending
order of thin blocks, ``end_device``; ``end_superblock``.

A visitor may also have a method ``mappings(thin_begins, data_begins, lengths, times)``, which takes many runs as arrays
of numpy, in place of as many calls of ``mapping``.  It is called for large pools only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Protocol

    class Visitor(Protocol):
        """Takes a pool's contents piece by piece.  Thin blocks and data blocks count ``data_block_size`` sectors."""

        def begin_superblock(self, superblock: Superblock) -> None:
            """Begin a pool."""

        def end_superblock(self) -> None:
            """End the pool; nothing follows."""

        def begin_shared(self, name: int) -> None:
            """Begin mappings that several devices have in common, to be referred to by *name*."""

        def end_shared(self) -> None:
            """End the shared mappings."""

        def begin_device(self, device: Device) -> None:
            """Begin a device."""

        def end_device(self) -> None:
            """End the device."""

        def mapping(self, thin_begin: int, data_begin: int, length: int, time: int) -> None:
            """Take a run: *length* thin blocks from *thin_begin* on lead to the data blocks from *data_begin* on."""

        def shared(self, name: int) -> None:
            """Take all mappings of a shared part as mappings of this device."""


class Superblock:
    """What a pool says of itself.

    :ivar uuid: text, empty in every pool that the kernel made
    :ivar time: counts snapshots
    :ivar transaction: the user's transaction id
    :ivar needs_check: the kernel wants the pool checked
    :ivar version: of the format
    :ivar data_block_size: sectors
    :ivar nr_data_blocks: data blocks
    """

    __slots__ = ("data_block_size", "needs_check", "nr_data_blocks", "time", "transaction", "uuid", "version")

    def __init__(
        self,
        *,
        uuid: str = "",
        time: int,
        transaction: int,
        needs_check: bool = False,
        version: int,
        data_block_size: int,
        nr_data_blocks: int,
    ) -> None:
        self.uuid = uuid
        self.time = time
        self.transaction = transaction
        self.needs_check = needs_check
        self.version = version
        self.data_block_size = data_block_size
        self.nr_data_blocks = nr_data_blocks


class Device:
    """A thin device: its id, its number of mappings, and the three ages that the pool keeps of it.

    :ivar transaction: the pool's transaction id when the device was created
    :ivar creation_time: the pool's time when the device was created
    :ivar snap_time: the pool's time when the device was last snapshotted
    """

    __slots__ = ("creation_time", "dev_id", "mapped_blocks", "snap_time", "transaction")

    def __init__(
        self, *, dev_id: int, mapped_blocks: int, transaction: int, creation_time: int, snap_time: int
    ) -> None:
        self.dev_id = dev_id
        self.mapped_blocks = mapped_blocks
        self.transaction = transaction
        self.creation_time = creation_time
        self.snap_time = snap_time
