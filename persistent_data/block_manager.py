"""Metadata blocks behind a cache: what kind each one is, who may touch it, and when it goes to disk.

Two ways lead to a block:

* *Locks*, for code that builds other structures on the same blocks: many readers or one writer, held until unlocked.
* *Borrowing*, for the structures of this package: no lock and no hold, valid until the owner calls
  :meth:`BlockManager.begin_operation`.  The owner serialises its operations, so nothing else runs meanwhile, and the
  cache leaves alone what the present operation has borrowed.

Either way a block is checked when it is first read, by the validator of the kind it is expected to be, and remembers
that kind; asking for it as another kind later is damage.  Just before a block is written, its own number and its
checksum are put in.  Source: docs/format.md, "Checksums"; docs/design.md, "Block manager".
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from bufio import Client
from bufio.client import FIRST_EPOCH
from persistent_data.checksum import BITMAP_SALT, INDEX_SALT, block_checksum, crc32c, kind_of, xor_of
from persistent_data.errors import CorruptMetadata, InvalidArgument, MetadataError, ReadOnlyMetadata, WouldBlock
from persistent_data.layout import BLOCK_HEADER, BLOCK_SIZE, BLOCKNR, BLOCKNR_OFFSET, CHECKSUM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bufio import Buffer, Device
    from bufio.engine import Engine

_ZEROES = bytes(BLOCK_SIZE)


class View:
    """The content of one cached block, as a certain kind of block.

    ``data`` is the block's 4096 bytes, writable; subclasses add what their kind of block is made of.  A view lives as
    long as its block stays cached, and follows its content to another block number when that is moved.
    """

    __slots__ = ("buffer", "checksummed", "data", "validator")

    def __init__(self, buffer: Buffer, validator: Validator) -> None:
        self.buffer = buffer
        self.data = buffer.data
        self.checksummed = buffer.data[CHECKSUM.size :]
        """What the checksum covers; kept because it is needed each time the block is written."""
        self.validator = validator

    @property
    def block(self) -> int:
        """Number of the metadata block that this content is, or will be, written to."""
        return self.buffer.block_number

    def reload(self) -> None:
        """Take notice that the bytes were replaced as a whole."""


class Validator:
    """One kind of block: its name, its checksum's salt, the class of its views."""

    def __init__(self, name: str, salt: int, view: type[View] = View) -> None:
        self.name = name
        self.salt = salt
        self.xor = xor_of(salt)
        self.view = view

    def check(self, data: memoryview, block: int) -> None:
        """Accept the bytes read from *block* as this kind.

        :raises CorruptMetadata: ENOTBLK for another block's number, EILSEQ for everything else
        """
        csum, _, blocknr = BLOCK_HEADER.unpack_from(data)
        wanted = block_checksum(data, self.salt)
        if blocknr != block:
            kind = kind_of(data)
            found = "nothing that was ever written" if kind is None else f"a {kind} that belongs to block {blocknr}"
            raise CorruptMetadata(block, f"expected a {self.name}, found {found}", number=errno.ENOTBLK)
        if csum != wanted:
            kind = kind_of(data)
            if kind is not None:
                raise CorruptMetadata(block, f"expected a {self.name}, found a {kind}")
            raise CorruptMetadata(block, f"bad checksum in {self.name}: {csum:#010x} instead of {wanted:#010x}")
        self.check_content(data, block)

    def check_content(self, data: memoryview, block: int) -> None:
        """Check what this kind of block has beside its header; a hook for subclasses."""


BITMAP = Validator("space map bitmap", BITMAP_SALT)
METADATA_INDEX = Validator("metadata index block", INDEX_SALT)


def complete_for_write(buffer: Buffer) -> None:
    """Put into a block that is about to be written what can only be known then: its number, then its checksum."""
    view: View = buffer.aux
    data = buffer.data
    BLOCKNR.pack_into(data, BLOCKNR_OFFSET, buffer.block_number)
    CHECKSUM.pack_into(data, 0, crc32c(view.checksummed) ^ view.validator.xor)


class BlockManager:
    """The blocks of a metadata device.

    :param device: where they are; it stays the caller's to close
    :param cache_bytes: memory for cached blocks; by default a share of ``bufio.parameters.max_cache_size_bytes``
    :param engine: how transfers are done; one that is synchronous by default
    :param read_only: begin in read-only mode
    """

    def __init__(
        self,
        device: Device,
        *,
        cache_bytes: int | None = None,
        engine: Engine | None = None,
        read_only: bool = False,
    ) -> None:
        self.device = device
        self.client = Client(
            device,
            BLOCK_SIZE,
            reserved_buffers=16,
            write_callback=complete_for_write,
            engine=engine,
            cache_bytes=cache_bytes,
        )
        self.client.epoch = FIRST_EPOCH
        self.peek = self.client.peek
        self.read_only = read_only
        self._unlocked = threading.Condition()
        self._lock_counts: dict[Buffer, int] = {}
        """Readers that have a buffer locked, or -1 for a writer; those that nobody has locked are not in here."""

    def before_first_write(self, step: Callable[[], None]) -> None:
        """Have *step* called once, before any block is written from now on; if it raises, nothing is."""

        def first(buffer: Buffer) -> None:
            # Also called for the rest of the blocks that are written together with the first.
            if self.client.write_callback is first:
                step()
                self.client.write_callback = complete_for_write
            complete_for_write(buffer)

        self.client.write_callback = first

    @property
    def nr_blocks(self) -> int:
        """Metadata blocks on the device, at this moment."""
        return self.client.device_size

    # Borrowing

    def begin_operation(self) -> None:
        """Give up everything borrowed so far."""
        self.client.epoch += 1

    def borrow(self, block: int, validator: Validator) -> View:
        """Return the view of *block*, reading and checking it if need be.

        :raises CorruptMetadata: it is not of that kind (EINVAL if it is known to be of another), or out of range
        :raises OSError: the device cannot read it
        """
        buffer = self.peek(block)
        if buffer is None:
            self._check_range(block)
            buffer = self.client.borrow(block)
        buffer.referenced = self.client.epoch
        view: View | None = buffer.aux
        if view is None:
            return self._validate(buffer, validator)
        if view.validator is not validator:
            raise self._kind_mismatch(view, validator)
        return view

    def borrow_cached(self, block: int, validator: Validator) -> View | None:
        """Return the view of *block* if no I/O is needed for it, else None."""
        return None if self.peek(block) is None else self.borrow(block, validator)

    def borrow_for_write(self, block: int, validator: Validator) -> View:
        """Return the view of *block* and mark it dirty.

        :raises ReadOnlyMetadata: in read-only mode; further as :meth:`borrow`
        """
        self.require_writable(block)
        view = self.borrow(block, validator)
        self.client.mark_dirty(view.buffer)
        return view

    def borrow_zeroed(self, block: int, validator: Validator) -> View:
        """Return a zeroed, dirty view of *block*, whatever it was before, without reading it.

        :raises ReadOnlyMetadata: in read-only mode
        """
        self.require_writable(block)
        self._check_range(block)
        buffer = self.client.borrow_new(block)
        buffer.data[:] = _ZEROES
        self.client.mark_dirty(buffer)
        view = buffer.aux = validator.view(buffer, validator)
        return view

    def borrow_copy(self, source: View, block: int) -> View:
        """Return a dirty view of *block* with the bytes of *source*, which stays what it is.

        :raises ReadOnlyMetadata: in read-only mode
        """
        self.require_writable(block)
        self._check_range(block)
        buffer = self.client.borrow_new(block)
        buffer.data[:] = source.data
        self.client.mark_dirty(buffer)
        view = buffer.aux = source.validator.view(buffer, source.validator)
        return view

    def move(self, view: View, block: int) -> None:
        """Make the content of *view* that of *block*, dirty; the old block keeps what it has on the device.

        This is bufio's ``release_move``: no copy is made.

        :raises ReadOnlyMetadata: in read-only mode
        """
        self.require_writable(block)
        self.client.move(view.buffer, block)

    # Locks

    def read_lock(self, block: int, validator: Validator) -> View:
        """Lock *block* for reading; waits for a writer.  Give it back with :meth:`unlock`.

        :raises InvalidArgument: this thread has it locked for writing
        :raises CorruptMetadata: see :meth:`borrow`
        """
        return self._lock_kind(self._hold(block, validator), exclusive=False, wait=True)

    def try_read_lock(self, block: int, validator: Validator) -> View:
        """As :meth:`read_lock`, but never reads and never waits.

        :raises WouldBlock: the block is not cached, or locked for writing
        """
        buffer = self.client.get(block)
        if buffer is None:
            raise WouldBlock(f"metadata block {block} is not cached")
        return self._lock_kind(self._view_of(buffer, validator), exclusive=False, wait=False)

    def write_lock(self, block: int, validator: Validator) -> View:
        """Lock *block* for changing it; it is dirty from the unlock on.  Waits for readers and a writer.

        :raises ReadOnlyMetadata: in read-only mode
        :raises InvalidArgument: this thread has it locked already
        """
        self.require_writable(block)
        return self._lock_kind(self._hold(block, validator), exclusive=True, wait=True)

    def write_lock_zero(self, block: int, validator: Validator) -> View:
        """As :meth:`write_lock`, zeroed and without reading; the only way to change a block's kind."""
        self.require_writable(block)
        self._check_range(block)
        buffer = self.client.new(block)
        view: View = buffer.aux
        if view is None:
            view = buffer.aux = validator.view(buffer, validator)
        self._lock(view, exclusive=True, wait=True)
        buffer.data[:] = _ZEROES
        if buffer.aux.validator is not validator:
            buffer.aux = validator.view(buffer, validator)
        view = buffer.aux
        view.reload()
        return view

    def unlock(self, view: View) -> None:
        """Give a lock back.

        :raises InvalidArgument: it is not locked
        """
        with self._unlocked:
            count = self._lock_counts.pop(view.buffer, 0)
            if count == 0:
                raise InvalidArgument(f"metadata block {view.block} is not locked")
            if count < 0:
                view.buffer.mark_dirty()
            elif count > 1:
                self._lock_counts[view.buffer] = count - 1
            self._unlocked.notify_all()
        view.buffer.release()

    def lock_count(self, view: View) -> int:
        """Return how many readers have a block locked, -1 for a writer."""
        with self._unlocked:
            return self._lock_counts.get(view.buffer, 0)

    def _hold(self, block: int, validator: Validator) -> View:
        self._check_range(block)
        return self._view_of(self.client.read(block), validator)

    def _view_of(self, buffer: Buffer, validator: Validator) -> View:
        """Return the view of a held buffer; on failure the hold is given back."""
        view: View | None = buffer.aux
        try:
            if view is None:
                return self._validate(buffer, validator)
            if view.validator is not validator:
                raise self._kind_mismatch(view, validator)
        except BaseException:
            buffer.release()
            raise
        return view

    def _lock(self, view: View, *, exclusive: bool, wait: bool) -> View:
        me = threading.get_ident()
        buffer = view.buffer
        with self._unlocked:
            while (count := self._lock_counts.get(buffer, 0)) < 0 or (exclusive and count):
                mine = view.buffer.holders.count(me) > 1
                if not wait or mine:
                    view.buffer.release()
                    if mine:
                        raise InvalidArgument(f"metadata block {view.block} is already locked by this thread")
                    raise WouldBlock(f"metadata block {view.block} is locked for writing")
                self._unlocked.wait()
            self._lock_counts[buffer] = -1 if exclusive else count + 1
        return view

    def _lock_kind(self, view: View, *, exclusive: bool, wait: bool) -> View:
        """Lock a block as the kind that *view* is; while waiting for that, a writer may have made it another."""
        self._lock(view, exclusive=exclusive, wait=wait)
        current: View = view.buffer.aux
        if current.validator is not view.validator:
            self.unlock(view)
            raise self._kind_mismatch(current, view.validator)
        return current

    # Everything at once

    def prefetch(self, block: int, count: int = 1) -> None:
        """Read blocks ahead."""
        self.client.prefetch(block, count)

    @property
    def most_read_ahead(self) -> int:
        """Blocks that may be read ahead without pushing out what was read ahead before."""
        return self.client.max_buffers // 4

    def prefetch_all(self, blocks: Iterable[int]) -> None:
        """Read those of *blocks* ahead that are not cached, neighbours together."""
        first = end = -1
        for block in sorted(block for block in blocks if self.peek(block) is None):
            if block != end:
                if first >= 0:
                    self.client.prefetch(first, end - first)
                first = block
            end = block + 1
        if first >= 0:
            self.client.prefetch(first, end - first)

    def flush(self) -> None:
        """Put every dirty block on the device and make it durable.

        :raises ReadOnlyMetadata: in read-only mode
        :raises OSError: a write since the last flush failed, or the flush itself
        """
        if self.read_only:
            raise ReadOnlyMetadata("metadata is read-only: nothing can be flushed")
        self.client.write_dirty_buffers()

    def is_all_zeroes(self, block: int) -> bool:
        """Tell whether every byte of *block* is zero; says and remembers nothing about its kind."""
        self._check_range(block)
        buffer = self.client.read(block)
        try:
            return buffer.data == _ZEROES
        finally:
            buffer.release()

    def forget(self, block: int) -> None:
        """Forget what is cached of *block*, even if it was not written yet."""
        self.client.forget(block)

    def reset(self) -> None:
        """Forget every cached block, dirty or not: what is on the device is what counts."""
        self.client.reset()

    def close(self, *, write: bool = True) -> None:
        """Free the cache, after writing what is dirty unless *write* is false.  The device stays open.

        :raises bufio.HoldError: blocks are still locked
        :raises OSError: something could not be written
        """
        if write:
            self.client.close()
        else:
            self.client.discard_all()

    # Checks

    def _check_range(self, block: int) -> None:
        nr_blocks = self.client.device_size
        if not 0 <= block < nr_blocks:
            raise CorruptMetadata(block, f"beyond the end of the device ({nr_blocks} blocks)", number=errno.EIO)

    def require_writable(self, block: int) -> None:
        """:raises ReadOnlyMetadata: in read-only mode"""
        if self.read_only:
            raise ReadOnlyMetadata(f"metadata is read-only: block {block} cannot be changed")

    def _validate(self, buffer: Buffer, validator: Validator) -> View:
        validator.check(buffer.data, buffer.block_number)
        view = buffer.aux = validator.view(buffer, validator)
        return view

    def _kind_mismatch(self, view: View, validator: Validator) -> MetadataError:
        return CorruptMetadata(
            view.block, f"expected a {validator.name}, found a {view.validator.name}", number=errno.EINVAL
        )
