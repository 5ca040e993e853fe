"""The metadata of a thin pool: devices, snapshots, data blocks, and the transactions in which they change.

This is dm-thin-metadata's interface under the kernel's names.  Every call is one step of the transaction that is open
from the last commit to the next.  Source: docs/design.md; docs/api.md.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from operator import index
from typing import TYPE_CHECKING, NamedTuple, NoReturn, cast

from sortedcontainers import SortedDict

from bufio import FileDevice
from persistent_data.errors import KeyNotFound, NoFreeBlock, NoFreeMetadataBlock
from persistent_data.layout import BLOCK_SIZE, MAX_METADATA_BLOCKS
from thinpool.errors import (
    Corrupt,
    DeviceBusy,
    DeviceExists,
    NoSuchDevice,
    OutOfSpace,
    ReadOnly,
    ThinError,
    TransactionMismatch,
    from_below,
)
from thinpool.layout import (
    DEVICE_DETAILS,
    MAX_DATA_BLOCK,
    MAX_DEVICE_ID,
    MAX_TIME,
    NEEDS_CHECK_FLAG,
    SUPERBLOCK_LOCATION,
    Superblock,
    valid_data_block_size,
)
from thinpool.storage import Storage
from thinpool.thin_device import Handle, ThinDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from bufio import Device, Stats
    from bufio.device import PathLike, SupportsFileno
    from bufio.engine import Engine

_MAX_RESERVE_BLOCKS = 4096
_RESERVE_FRACTION = 10


class DeviceDetails(NamedTuple):
    """What the pool records of one device.  The times count snapshots, they are no clock times."""

    mapped_blocks: int
    """Data blocks mapped, shared ones included."""
    transaction_id: int
    """The pool's transaction id when the device was created."""
    creation_time: int
    snapshotted_time: int
    """Time of the last snapshot that the device took part in, as origin or as snapshot."""


class PoolMetadata:
    """The metadata of one pool, opened.

    Made by :meth:`open`, :meth:`format` or :meth:`open_metadata_snap`.  Any number of threads may use it: calls are
    done one after the other.

    *Refused* calls (unknown device, wrong argument, read-only, out of data space) change nothing.  A call that *fails
    midway* (I/O error, damage, out of metadata space) leaves a transaction that cannot be trusted: from then on only
    :meth:`abort` and :meth:`close` are possible, and queries answer from the last commit.  Source: docs/design.md,
    "Failure".

    Metadata blocks have 4096 bytes, data blocks ``data_block_size`` sectors of 512 bytes.
    """

    def __init__(self, storage: Storage, device: Device, *, owns_device: bool) -> None:
        self._storage = storage
        self._device = device
        self._owns_device = owns_device
        self._lock = threading.RLock()
        storage.bm.client.owner_lock = self._lock
        self._handles: dict[int, Handle] = {}
        """Devices that are open, or were and have changed; the most recently added last."""
        self._generation = 0
        """Changes whenever what a handle remembers of the trees may be out of date."""
        self._in_service = False
        self._closed = False
        self._failure: BaseException | None = None
        self._cannot_recover = False
        self._shows_failed = False
        """The pool has failed, and an interrupt has kept it from going back to what was committed."""
        self._frozen: str | None = None
        """Why nothing may be changed, None when it may."""
        self._is_snapshot = False
        self._opened_read_only = False
        self._pre_commit_callback: Callable[[], object] | None = None
        self._begin()

    # Opening and closing

    @classmethod
    def open(
        cls,
        device_or_path: Device | PathLike | SupportsFileno,
        data_block_size: int | None = None,
        *,
        format_device: bool = False,
        nr_data_blocks: int = 0,
        read_only: bool = False,
        cache_bytes: int | None = None,
        engine: Engine | None = None,
    ) -> Self:
        """Open the metadata of a pool.

        :param device_or_path: a path (opened exclusively: a pool that is in use is refused), a ``bufio`` device, or an
            open file
        :param data_block_size: sectors; must be what the pool was made with.  None takes that
        :param format_device: format a device whose superblock is all zeroes; one that has metadata is opened as it is
        :param nr_data_blocks: data blocks of a pool that is formatted here
        :param read_only: refuse every change, and do not even open the device for writing
        :param cache_bytes: memory for cached metadata blocks
        :param engine: how transfers are done, synchronously by default.  With a ``bufio.AsyncEngine``, iterations,
            deletions and comparisons read ahead while they work; it stays the caller's to close
        :raises ThinError: EPERM for an all-zero superblock without *format_device*, EINVAL for another data block size
        :raises Corrupt: not metadata, or damaged
        :raises OSError: as ``open`` does, for a path
        """
        device, owned = _as_device(device_or_path, read_only=read_only)
        try:
            if _is_unformatted(device):
                if not format_device:
                    raise ThinError(errno.EPERM, f"{device.name}: superblock is all zeroes: not formatted")
                if data_block_size is None:
                    raise ThinError(errno.EINVAL, f"{device.name}: data_block_size is needed to format")
                self = cls._format(device, owned, data_block_size, nr_data_blocks, cache_bytes, engine)
            else:
                read_only = read_only or device.read_only
                storage = Storage.open(device, cache_bytes, engine, read_only=read_only)
                self = cls(storage, device, owns_device=owned)
                if read_only:
                    self._opened_read_only = True
                    self._frozen = "the pool was opened read-only"
            if data_block_size is not None and data_block_size != self.data_block_size:
                self._storage.bm.close(write=False)
                raise ThinError(
                    errno.EINVAL,
                    f"{device.name}: data blocks have {self.data_block_size} sectors, not {data_block_size}",
                )
        except BaseException as error:
            if owned:
                device.close()
            if isinstance(error, OSError):
                raise _named(device, from_below(error)) from error
            raise
        return self

    @classmethod
    def format(
        cls,
        device_or_path: Device | PathLike | SupportsFileno,
        data_block_size: int,
        nr_data_blocks: int = 0,
        *,
        cache_bytes: int | None = None,
        engine: Engine | None = None,
    ) -> Self:
        """Make an empty pool on a device whose first 4096 bytes are zero, commit it, and return it opened.

        :param data_block_size: sectors, 128 to 2097152 and a multiple of 128
        :raises DeviceBusy: the first block is not zero: whatever it is, it is not overwritten
        :raises OutOfSpace: the device is too small
        :raises ThinError: EINVAL for an impossible data block size
        """
        device, owned = _as_device(device_or_path, read_only=False)
        try:
            if not _is_unformatted(device):
                raise DeviceBusy(f"{device.name}: block 0 is not zero; clear it to give up what is there")
            return cls._format(device, owned, data_block_size, nr_data_blocks, cache_bytes, engine)
        except BaseException as error:
            if owned:
                device.close()
            if isinstance(error, OSError):
                raise _named(device, from_below(error)) from error
            raise

    @classmethod
    def _format(
        cls,
        device: Device,
        owned: bool,
        data_block_size: int,
        nr_data_blocks: int,
        cache_bytes: int | None,
        engine: Engine | None,
    ) -> Self:
        if not valid_data_block_size(data_block_size):
            raise ThinError(
                errno.EINVAL,
                f"data_block_size of {data_block_size} sectors is not a multiple of 128 in 128..2097152",
            )
        if not 0 <= nr_data_blocks <= MAX_DATA_BLOCK + 1:
            raise ThinError(errno.EINVAL, f"a pool cannot have {nr_data_blocks} data blocks")
        try:
            self = cls(Storage.format(device, data_block_size, cache_bytes, engine), device, owns_device=owned)
            if nr_data_blocks:
                self.resize_data_dev(nr_data_blocks)
                self.commit()
        except BaseException:
            # Leave the device as unformatted as it was found.
            device.pwrite(memoryview(mmap.mmap(-1, BLOCK_SIZE)), SUPERBLOCK_LOCATION)
            raise
        return self

    @classmethod
    def open_metadata_snap(
        cls,
        device_or_path: Device | PathLike | SupportsFileno,
        *,
        cache_bytes: int | None = None,
        engine: Engine | None = None,
    ) -> Self:
        """Open the metadata snapshot that a pool holds, read-only, while the pool itself may be in use elsewhere.

        Counts of free blocks are those of the pool when its superblock was read.

        :raises ThinError: ENODATA when the pool holds none
        """
        device, owned = _as_device(device_or_path, read_only=True, exclusive=False)
        try:
            storage = Storage.open(device, cache_bytes, engine, read_only=True)
            held_root = storage.superblock.held_root
            if not held_root:
                storage.bm.close(write=False)
                raise ThinError(errno.ENODATA, "no current metadata snap")
            copy = Storage.read_superblock(storage.bm, held_root)
            self = cls(storage, device, owns_device=owned)
        except BaseException as error:
            if owned:
                device.close()
            if isinstance(error, OSError):
                raise _named(device, from_below(error)) from error
            raise
        self._is_snapshot = self._opened_read_only = True
        self._frozen = "a metadata snapshot cannot be changed"
        self._time = copy.time
        self._root = copy.data_mapping_root
        self._details_root = copy.device_details_root
        self._transaction_id = copy.trans_id
        self._flags = copy.flags
        self._metadata_snap = 0
        return self

    def close(self) -> None:
        """Commit what was changed (unless read-only, failed or aborted), and give the device back.

        :raises DeviceBusy: a thin device is open; the pool stays usable
        :raises ThinError: the commit failed; the pool is closed all the same
        """
        with self._lock:
            if self._closed:
                return
            busy = sorted(handle.dev for handle in self._handles.values() if handle.open_count)
            if busy:
                raise DeviceBusy(f"thin devices {busy} are still open")
            try:
                if self._frozen is None:
                    self.commit()
            finally:
                self._release()

    def _release(self) -> None:
        self._closed = True
        self._frozen = "the pool is closed"
        self._storage.bm.close(write=False)
        if self._owns_device:
            self._device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close; commit first if the block was left normally.  Devices that are still open are closed with it."""
        with self._lock:
            if self._closed:
                return
            for handle in self._handles.values():
                handle.open_count = 0
            if kind is not None:
                self._release()
            else:
                self.close()

    # The transaction

    def _begin(self) -> None:
        """Take the state of the transaction from the last commit."""
        sb = self._storage.superblock
        self._time = sb.time
        self._root = sb.data_mapping_root
        self._details_root = sb.device_details_root
        self._metadata_snap = sb.held_root
        self._transaction_id = sb.trans_id
        self._flags = sb.flags
        self._data_block_size = sb.data_block_size
        self._nr_data_blocks = sb.data_root.nr_blocks
        # Shortcuts for the calls that are made by the million.
        self._client = self._storage.bm.client
        self._find_mapping = self._storage.trees.mappings.spine.find
        self._generation += 1
        self._storage.bm.begin_operation()

    def _start_change(self) -> None:
        """Begin a call that changes something.

        :raises ThinError: it may not: read-only, failed, closed
        """
        if self._frozen is not None:
            raise self._refusal()
        self._in_service = True
        self._storage.bm.begin_operation()

    def _start_query(self) -> None:
        """Begin a call that only reads.

        :raises ThinError: the pool is closed, or lost
        """
        if self._frozen is not None:
            if self._closed or self._cannot_recover:
                raise self._refusal()
            if self._shows_failed:
                self._show_committed()
        self._storage.bm.begin_operation()

    def _refusal(self) -> ThinError:
        assert self._frozen is not None
        if self._failure is not None or self._closed or self._cannot_recover:
            return ThinError(errno.EINVAL, self._frozen)
        return ReadOnly(self._frozen)

    def _fail(self, error: BaseException) -> NoReturn:
        """Note that a call failed midway, and raise what the caller gets to see.

        From here on only ``abort`` and ``close`` change anything, and the handles show what was committed.
        """
        self._give_up(error, f"the transaction failed ({str(error) or type(error).__name__}): abort it first")
        if isinstance(error, OSError) and not isinstance(error, ThinError):
            raise from_below(error) from error
        raise error

    def _give_up(self, reason: BaseException, frozen: str) -> None:
        """Let nothing but an abort go on from here, and everything that is asked be answered from the last commit."""
        if self._failure is None:
            self._failure = reason
            self._frozen = frozen
            self._shows_failed = True
            self._show_committed()

    def _show_committed(self) -> None:
        """Take what queries go by from the last commit."""
        self._begin()
        for handle in list(self._handles.values()):
            handle.restore_committed()
            if not handle.exists:
                self._drop(handle)
        self._shows_failed = False

    def commit(self) -> None:
        """Make everything since the last commit durable, and begin the next transaction.

        Nothing at all is written when no call has changed, or tried to change, anything since the pool was opened.

        :raises ThinError: EIO when a write failed, ENOSPC out of metadata space: abort; or what the pre-commit callback
            returned as a negative error number: nothing was done then
        """
        with self._lock:
            if self._frozen is not None:
                raise self._refusal()
            if not self._in_service:
                return
            if self._pre_commit_callback is not None:
                result = self._pre_commit_callback()
                if isinstance(result, int) and result < 0:
                    raise ThinError(-result, f"the pre-commit callback refused: {os.strerror(-result)}")
                if self._frozen is not None:
                    raise self._refusal()
            self._storage.bm.begin_operation()
            try:
                # First of all: from here on no handle may trust what it remembers of shadowed nodes.
                self._generation += 1
                written = self._write_changed_details()
                self._storage.commit(self._next_superblock())
                for handle in written:
                    handle.note_commit()
                    if not handle.open_count:
                        del self._handles[handle.dev]
                self._begin()
            except BaseException as error:
                self._fail(error)

    def _write_changed_details(self) -> list[Handle]:
        details = self._storage.trees.details
        written = []
        for handle in reversed(list(self._handles.values())):
            if not handle.changed:
                continue
            self._storage.bm.begin_operation()
            value = DEVICE_DETAILS.pack(*handle.details())
            self._details_root = details.insert(self._details_root, [handle.dev], value)
            written.append(handle)
        return written

    def _next_superblock(self) -> Superblock:
        sb = Superblock()
        for name in Superblock.__slots__:
            setattr(sb, name, getattr(self._storage.superblock, name))
        sb.time = self._time
        sb.data_mapping_root = self._root
        sb.device_details_root = self._details_root
        sb.held_root = self._metadata_snap
        sb.trans_id = self._transaction_id
        sb.flags = self._flags
        return sb

    def abort(self) -> None:
        """Return to the last commit.

        Everything is read from the device again, the transaction id and the devices' counts included.  Devices stay
        open; one that was created since is gone, and its calls raise :class:`NoSuchDevice`.  A metadata threshold is
        lost.

        :raises Corrupt: what is on the device cannot be opened any more; only ``close`` works after that
        """
        with self._lock:
            if self._closed or self._cannot_recover or self._is_snapshot:
                raise ThinError(errno.EINVAL, self._frozen or "there is nothing to abort")
            in_doubt = self._storage.superblock_in_doubt
            self._in_service = True
            # Half an abort is no state to go on from: an interrupt in here leaves a failed pool.
            interrupted = "an abort was interrupted: abort again"
            self._give_up(ThinError(errno.EINVAL, interrupted), interrupted)
            try:
                for handle in self._handles.values():
                    handle.aborted_with_changes = handle.changed or handle.had_changes
                self._storage.bm.reset()
                storage = Storage.reopen(self._storage.bm)
                storage.superblock_in_doubt = in_doubt
                if in_doubt and not storage.bm.read_only:
                    storage.settle_superblock()
                self._storage = storage
                self._begin()
                for handle in list(self._handles.values()):
                    # One that was made since is gone, even where there was another device of that id before.
                    handle.set_details(self._committed_details(handle.dev) if handle.is_committed else None)
                    if not (handle.open_count and handle.exists):
                        self._drop(handle)
                self._failure = None
                self._frozen = "the pool is read-only" if self._storage.bm.read_only else None
            except OSError as error:
                self._cannot_recover = True
                self._failure = error
                self._frozen = f"the last commit cannot be opened again ({error})"
                raise from_below(error) from error

    def _drop(self, handle: Handle) -> None:
        """Forget a handle that nobody has open, or whose device is gone: whoever has that open is told so."""
        if not handle.exists:
            handle.aborted_with_changes = True
        del self._handles[handle.dev]

    def register_pre_commit_callback(self, callback: Callable[[], object] | None) -> None:
        """Have *callback* called first in each commit, to flush the data device, say.  It replaces the previous one.

        If it raises, or returns a negative number, the commit is not done and can be tried again.
        """
        with self._lock:
            self._pre_commit_callback = callback

    @property
    def changed_this_transaction(self) -> bool:
        """True when a device was created or has changed mappings since the last commit."""
        with self._lock:
            return any(handle.changed for handle in self._handles.values())

    # Devices

    def create_thin(self, dev: int) -> None:
        """Create a device without mappings.

        :param dev: 0 to 2^24 - 1
        :raises DeviceExists: there is one of that id
        :raises ThinError: EINVAL for an impossible id
        """
        dev = index(dev)
        with self._lock:
            self._start_change()
            self._require_new(dev)
            try:
                trees = self._storage.trees
                mapping_root = trees.mappings.empty()
                self._root = trees.top_level.insert(self._root, [dev], mapping_root)
                self._generation += 1
                self._add_new_handle(dev, DeviceDetails(0, self._transaction_id, self._time, self._time))
            except BaseException as error:
                self._fail(error)

    def create_snap(self, dev: int, origin: int) -> None:
        """Create a device with the mappings that *origin* has now.  From here on they share every data block.

        The cost does not depend on how much is mapped.  The origin must not be written to meanwhile.

        :raises DeviceExists: there is a device *dev*
        :raises NoSuchDevice: there is no device *origin*
        :raises ThinError: EINVAL for an impossible id, or when 2^24 - 1 snapshots have been taken
        """
        dev, origin = index(dev), index(origin)
        with self._lock:
            self._start_change()
            self._require_new(dev)
            origin_handle = self._handle(origin)
            if self._time >= MAX_TIME:
                raise ThinError(errno.EINVAL, f"no more snapshots can be taken: the pool's time is {self._time}")
            mapping_root = self._mapping_root(origin_handle)
            try:
                self._storage.tm.inc(mapping_root)
                self._root = self._storage.trees.top_level.insert(self._root, [dev], mapping_root)
                self._time += 1
                self._generation += 1
                self._add_new_handle(
                    dev, DeviceDetails(origin_handle.mapped_blocks, self._transaction_id, self._time, self._time)
                )
                origin_handle.snapshotted_time = self._time
                origin_handle.changed = True
                if origin not in self._handles:
                    self._handles[origin] = origin_handle
            except BaseException as error:
                self._fail(error)

    def delete_thin_device(self, dev: int) -> None:
        """Delete a device; data blocks that only it maps become free with the next commit.

        :raises NoSuchDevice: there is none
        :raises DeviceBusy: it is open
        """
        dev = index(dev)
        with self._lock:
            self._start_change()
            handle = self._handle(dev)
            if handle.open_count:
                raise DeviceBusy(f"device {dev} is open")
            try:
                trees = self._storage.trees
                if handle.is_committed:
                    self._details_root = trees.details.remove(self._details_root, [dev])
                self._handles.pop(dev, None)
                self._storage.bm.begin_operation()
                self._root = trees.top_level.remove(self._root, [dev])
                self._generation += 1
            except BaseException as error:
                self._fail(error)

    def open_thin_device(self, dev: int) -> ThinDevice:
        """Open a device, which may be open already.

        :raises NoSuchDevice: there is none
        :raises Corrupt: it is in only one of the two trees of devices
        """
        dev = index(dev)
        with self._lock:
            self._start_query()
            handle = self._handle(dev)
            root = self._mapping_root(handle)
            self._require_plausible_root(handle, root)
            self._handles.setdefault(dev, handle)
            handle.open_count += 1
            return ThinDevice(self, handle)

    def devices(self) -> Mapping[int, DeviceDetails]:
        """Return the devices by ascending id, with what has changed since the last commit."""
        with self._lock:
            self._start_query()
            found: SortedDict[int, DeviceDetails] = SortedDict()
            try:
                for dev, value in self._storage.trees.details.items(self._details_root):
                    assert isinstance(value, bytes)
                    found[dev] = DeviceDetails(*DEVICE_DETAILS.unpack(value))
            except OSError as error:
                raise from_below(error) from error
            for handle in self._handles.values():
                if handle.exists:
                    found[handle.dev] = DeviceDetails(*handle.details())
            return cast("Mapping[int, DeviceDetails]", found)

    def _require_new(self, dev: int) -> None:
        if not 0 <= dev <= MAX_DEVICE_ID:
            raise ThinError(errno.EINVAL, f"device id {dev} is not in 0..{MAX_DEVICE_ID}")
        handle = self._handles.get(dev)
        if (handle is not None and handle.exists) or self._committed_details(dev) is not None:
            raise DeviceExists(f"device {dev} exists")

    def _add_new_handle(self, dev: int, details: DeviceDetails) -> None:
        # Whoever still has a device of that id open from before an abort has one that is gone: it gets no part of this.
        self._handles.pop(dev, None)
        handle = Handle(dev)
        handle.create(details)
        self._handles[dev] = handle

    def _handle(self, dev: int) -> Handle:
        """Return the handle of an existing device, a new one that is not in the list yet if there is none."""
        handle = self._handles.get(dev)
        if handle is None:
            details = self._committed_details(dev)
            if details is not None:
                handle = Handle(dev)
                handle.set_details(details)
        if handle is None or not handle.exists:
            raise NoSuchDevice(f"no device {dev}")
        return handle

    def _committed_details(self, dev: int) -> DeviceDetails | None:
        """Read the details tree of the present transaction, which handles are written to only by a commit."""
        try:
            value = self._storage.trees.details.lookup(self._details_root, [dev])
        except KeyNotFound:
            return None
        except OSError as error:
            raise from_below(error) from error
        assert isinstance(value, bytes)
        return DeviceDetails(*DEVICE_DETAILS.unpack(value))

    def _mapping_root(self, handle: Handle) -> int:
        """Return the root of a device's mapping tree."""
        if handle.root_generation != self._generation:
            try:
                root = self._storage.trees.top_level.lookup(self._root, [handle.dev])
            except KeyNotFound:
                rule = f"device {handle.dev} is in the details tree but not in the mapping tree"
                raise Corrupt(self._root, rule, number=errno.EINVAL) from None
            except OSError as error:
                raise from_below(error) from error
            assert isinstance(root, int)
            handle.remember_root(root, self._generation)
        return handle.root

    def _require_plausible_root(self, handle: Handle, root: int) -> None:
        """A tree of one leaf shows at a glance whether it has what the details say."""
        try:
            mapped = self._storage.trees.mappings.count_if_leaf(root)
        except OSError as error:
            raise from_below(error) from error
        if mapped is not None and mapped != handle.mapped_blocks:
            raise Corrupt(
                root,
                f"device {handle.dev} has {handle.mapped_blocks} mapped blocks, but its tree is a leaf of {mapped}",
                number=errno.EINVAL,
            )

    # Data blocks

    def alloc_data_block(self) -> int:
        """Take a free data block and return it, with one reference that belongs to the caller until it is mapped.

        A block that is free now but was not at the last commit is not given out.

        :raises OutOfSpace: no data block is free, nothing has changed; or no metadata block: abort
        """
        with self._lock:
            self._start_change()
            try:
                return self._storage.data_map.new_block()
            except NoFreeMetadataBlock as error:
                self._fail(error)
            except NoFreeBlock as error:
                raise OutOfSpace(f"no free data block: {error.strerror}") from error
            except BaseException as error:
                self._fail(error)

    def block_is_shared(self, b: int) -> bool:
        """Tell whether data block *b* is mapped more than once, metadata snapshot included."""
        return self._count(b) > 1

    def block_is_used(self, b: int) -> bool:
        """Tell whether data block *b* is in use."""
        return self._count(b) > 0

    def _count(self, b: int) -> int:
        b = index(b)
        with self._lock:
            self._start_query()
            self._require_data_range(b, b + 1)
            try:
                return self._counting_storage().data_map.get_count(b)
            except OSError as error:
                raise from_below(error) from error

    def _counting_storage(self) -> Storage:
        """After a failure the counts in memory are those of the failed transaction: read the committed ones."""
        if self._failure is not None:
            return self._storage.reopen_committed()
        return self._storage

    def inc_data_range(self, b: int, e: int) -> None:
        """Add a reference to each data block of ``[b, e)``.

        :raises ThinError: EINVAL for a range beyond the device, nothing has changed
        """
        b, e = index(b), index(e)
        with self._lock:
            self._start_change()
            self._require_data_range(b, e)
            try:
                self._storage.data_map.inc(b, e)
            except BaseException as error:
                self._fail(error)

    def dec_data_range(self, b: int, e: int) -> None:
        """Take a reference from each data block of ``[b, e)``.

        :raises ThinError: EINVAL for a range beyond the device or a block that has none, nothing has changed
        """
        b, e = index(b), index(e)
        with self._lock:
            self._start_change()
            self._require_data_range(b, e)
            data_map = self._storage.data_map
            try:
                for block in range(b, e):
                    if data_map.is_free(block):
                        raise ThinError(errno.EINVAL, f"data block {block} has no reference to give up")
            except OSError as error:
                raise from_below(error) from error
            try:
                data_map.dec(b, e)
            except BaseException as error:
                self._fail(error)

    def _require_data_range(self, b: int, e: int) -> None:
        if not 0 <= b <= e <= self._nr_data_blocks:
            raise ThinError(errno.EINVAL, f"data blocks [{b}..{e}] are not within the pool's {self._nr_data_blocks}")

    # Transaction ids

    @property
    def transaction_id(self) -> int:
        """The id that the pool's user set last; kept by the next commit."""
        return self._transaction_id

    def set_transaction_id(self, current: int, new: int) -> None:
        """Replace the transaction id, if it is *current*.

        :raises TransactionMismatch: it is not
        :raises ThinError: EINVAL for an id that does not fit into 64 bits
        """
        current, new = index(current), index(new)
        with self._lock:
            self._start_change()
            if self._transaction_id != current:
                raise TransactionMismatch(f"transaction id is {self._transaction_id}, not {current}")
            if not 0 <= new < 1 << 64:
                raise ThinError(errno.EINVAL, f"transaction id {new} does not fit into 64 bits")
            self._transaction_id = new

    # Metadata snapshots

    @property
    def metadata_snap(self) -> int | None:
        """The metadata block of the metadata snapshot that is held, None if there is none."""
        return self._metadata_snap or None

    def reserve_metadata_snap(self) -> None:
        """Commit, and keep that state for readers until it is released; the next commit makes it findable.

        :raises DeviceBusy: one is held
        """
        with self._lock:
            self._start_change()
            if self._metadata_snap:
                raise DeviceBusy(f"a metadata snapshot is held already, at metadata block {self._metadata_snap}")
            self.commit()
            self._storage.bm.begin_operation()
            try:
                block, copy = self._storage.copy_superblock()
                self._storage.tm.inc(copy.data_mapping_root)
                self._storage.tm.inc(copy.device_details_root)
                self._metadata_snap = block
                self._generation += 1
            except BaseException as error:
                self._fail(error)

    def release_metadata_snap(self) -> None:
        """Give the metadata snapshot up.

        :raises ThinError: EINVAL when none is held
        """
        with self._lock:
            self._start_change()
            held = self._metadata_snap
            if not held:
                raise ThinError(errno.EINVAL, "no metadata snapshot is held")
            try:
                copy = Storage.read_superblock(self._storage.bm, held)
            except OSError as error:
                raise from_below(error) from error
            try:
                self._metadata_snap = 0
                self._storage.trees.info.delete(copy.data_mapping_root)
                self._storage.trees.details.delete(copy.device_details_root)
                self._storage.tm.dec(held)
                self._generation += 1
            except BaseException as error:
                self._fail(error)

    # Sizes

    @property
    def data_block_size(self) -> int:
        """Sectors of 512 bytes in a data block."""
        return self._data_block_size

    @property
    def data_dev_size(self) -> int:
        """Data blocks of the pool; an extension shows after the next commit."""
        if self._failure is not None:
            return self._storage.superblock.data_root.nr_blocks
        return self._storage.data_map.nr_blocks

    @property
    def free_block_count(self) -> int:
        """Free data blocks; those freed since the last commit count, but can be allocated only after the next."""
        if self._failure is not None:
            root = self._storage.superblock.data_root
            return root.nr_blocks - root.nr_allocated
        # In the transaction that gives the pool its first blocks the committed count is behind what was allocated.
        return max(0, self._storage.data_map.nr_free)

    @property
    def metadata_dev_size(self) -> int:
        """Metadata blocks that the pool uses; an extension shows at once."""
        if self._failure is not None:
            return self._storage.superblock.metadata_root.nr_blocks
        return self._storage.metadata_map.nr_blocks

    @property
    def free_metadata_block_count(self) -> int:
        """Metadata blocks that are free, less a reserve of a tenth (at most 4096 blocks) for the work of a commit."""
        if self._failure is not None:
            root = self._storage.superblock.metadata_root
            free = root.nr_blocks - root.nr_allocated
        else:
            free = self._storage.metadata_map.nr_free
        return max(0, free - min(_MAX_RESERVE_BLOCKS, self.metadata_dev_size // _RESERVE_FRACTION))

    def resize_data_dev(self, n: int) -> None:
        """Let the pool have *n* data blocks.

        :raises ThinError: EINVAL for fewer than it has, or more than a mapping can name
        """
        n = index(n)
        with self._lock:
            self._start_change()
            data_map = self._storage.data_map
            now = self._nr_data_blocks
            if n < now:
                raise ThinError(errno.EINVAL, f"the data device cannot shrink from {now} to {n} blocks")
            if n > MAX_DATA_BLOCK + 1:
                raise ThinError(errno.EINVAL, f"{n} data blocks are more than a mapping can name")
            if n > now:
                try:
                    data_map.extend(n - now)
                    self._nr_data_blocks = n
                except BaseException as error:
                    self._fail(error)

    def resize_metadata_dev(self, n: int) -> None:
        """Let the pool use *n* metadata blocks of its device, which must have grown before; at most 4161600 are used.

        :raises ThinError: EINVAL for fewer than it uses, or more than the device has
        """
        n = index(n)
        with self._lock:
            self._start_change()
            metadata_map = self._storage.metadata_map
            n = min(n, MAX_METADATA_BLOCKS)
            if n < metadata_map.nr_blocks:
                raise ThinError(errno.EINVAL, f"metadata cannot shrink from {metadata_map.nr_blocks} to {n} blocks")
            if n > self._storage.bm.nr_blocks:
                raise ThinError(errno.EINVAL, f"{self._device.name} has {self._storage.bm.nr_blocks} blocks, not {n}")
            if n > metadata_map.nr_blocks:
                try:
                    metadata_map.extend(n - metadata_map.nr_blocks)
                except BaseException as error:
                    self._fail(error)

    def register_metadata_threshold(self, nr_free: int, callback: Callable[[], None]) -> None:
        """Have *callback* called when an allocation leaves *nr_free* free metadata blocks or fewer.

        Called once for each time that the count falls to the threshold, during the call that allocates; it must not use
        the pool.  Replaces the previous one.
        """
        nr_free = index(nr_free)
        with self._lock:
            self._start_query()
            self._storage.metadata_map.register_threshold(nr_free, callback)

    # Modes and flags

    @property
    def is_read_only(self) -> bool:
        """True when changes are refused."""
        return self._storage.bm.read_only

    def set_read_only(self) -> None:
        """Refuse every change from now on.  What was changed since the last commit stays, uncommitted."""
        with self._lock:
            self._storage.bm.read_only = True
            self._storage.tm.forget_exclusive()
            self._generation += 1
            if self._frozen is None:
                self._frozen = "the pool is read-only"

    def set_read_write(self) -> None:
        """Allow changes again.

        :raises ReadOnly: the pool was opened read-only, or this is a metadata snapshot
        """
        with self._lock:
            if self._opened_read_only:
                raise ReadOnly(f"{self._device.name} was opened read-only")
            self._storage.bm.read_only = False
            if self._failure is None and not self._closed:
                if self._storage.superblock_in_doubt:
                    try:
                        self._storage.settle_superblock()
                    except OSError as error:
                        self._storage.bm.read_only = True
                        raise from_below(error) from error
                self._frozen = None

    @property
    def needs_check(self) -> bool:
        """True when the pool was marked as one that has to be checked before it is used again."""
        return bool(self._flags & NEEDS_CHECK_FLAG)

    def set_needs_check(self) -> None:
        """Mark the pool, on the device at once; the open transaction is not committed by this.

        Possible after a failure too, which is when it is needed.

        :raises ReadOnly: in read-only mode
        """
        with self._lock:
            self._write_flags(self._flags | NEEDS_CHECK_FLAG)

    def clear_needs_check(self) -> None:
        """Take the mark away, on the device at once.  The kernel never does this: be sure that the pool is sound."""
        with self._lock:
            self._write_flags(self._flags & ~NEEDS_CHECK_FLAG)

    def _write_flags(self, flags: int) -> None:
        with self._lock:
            self._start_query()
            if self._storage.bm.read_only:
                raise ReadOnly(self._frozen or "the pool is read-only")
            self._in_service = True
            try:
                self._storage.write_flags(flags)
            except OSError as error:
                raise from_below(error) from error
            self._flags = flags

    # Odds and ends

    def issue_prefetches(self) -> None:
        """Read the blocks that lookups without I/O have missed."""
        with self._lock:
            self._start_query()
            self._storage.non_blocking.issue_prefetches()

    @property
    def time(self) -> int:
        """Number of snapshots ever taken."""
        return self._time

    @property
    def uuid(self) -> bytes:
        """The 16 bytes that the superblock has for one; the kernel leaves them zero."""
        return self._storage.superblock.uuid

    @property
    def stats(self) -> Stats:
        """Counters of the cache of metadata blocks."""
        return self._storage.bm.client.stats


def _as_device(
    source: Device | PathLike | SupportsFileno, *, read_only: bool, exclusive: bool = True
) -> tuple[Device, bool]:
    """Return a device for whatever names one, and whether it was opened here."""
    if isinstance(source, str | os.PathLike):
        # The kernel changes metadata behind the page cache, which can therefore be out of date for a block device.
        direct = os.path.exists(source) and stat.S_ISBLK(os.stat(source).st_mode)
        try:
            return FileDevice(source, read_only=read_only, exclusive=exclusive, direct=direct), True
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise DeviceBusy(f"{os.fspath(source)}: {error.strerror}: the pool is in use") from error
            raise
    if hasattr(source, "size_bytes"):
        return cast("Device", source), False
    if not hasattr(source, "fileno"):
        raise TypeError(f"a path, a device or an open file is needed, not {type(source).__name__}")
    return FileDevice.of_open_file(source), True


def _is_unformatted(device: Device) -> bool:
    """Tell whether the first metadata block is all zeroes.

    :raises ThinError: the device has not even one block
    """
    if device.size_bytes < BLOCK_SIZE:
        raise ThinError(errno.EINVAL, f"{device.size_bytes} bytes are too few for metadata")
    # A map of its own is aligned, as direct access wants it.
    block = memoryview(mmap.mmap(-1, BLOCK_SIZE))
    device.readinto(block, SUPERBLOCK_LOCATION * BLOCK_SIZE)
    return block == bytes(BLOCK_SIZE)


def _named(device: Device, error: ThinError) -> ThinError:
    """Put the device's name in front of an error's message."""
    if device.name not in (error.strerror or ""):
        error.strerror = f"{device.name}: {error.strerror}"
        error.args = (error.errno, error.strerror)
    return error
