"""Copy on write: which block to change in place, which to copy, and what a copy does to reference counts.

A transaction never writes to a block that the last commit refers to.  ``shadow_block`` gives a version of a block that
may be changed: the block itself if this transaction made it and nobody else refers to it, else a new block with its
content.  The old version of a block without other references is not needed in memory any more, so its buffer is *moved*
to the new block (bufio's ``release_move``); only a shared block is copied.

Source: docs/design.md, "Transactions"; the order of allocations is the kernel's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from persistent_data.btree_node import Node, format_node
from persistent_data.errors import WouldBlock
from persistent_data.space_map import runs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from bufio import Buffer
    from persistent_data.block_manager import BlockManager, Validator, View
    from persistent_data.space_map_metadata import MetadataSpaceMap

MAX_PREFETCHES = 128


class TransactionManager:
    """One transaction after the other on the blocks of *bm*, counted by *sm*."""

    def __init__(self, bm: BlockManager, sm: MetadataSpaceMap) -> None:
        self.bm = bm
        self.sm = sm
        self._peek = bm.peek
        self._client = bm.client
        self._shadows: set[int] = set()
        """Blocks allocated since the last commit, those in :attr:`exclusive` excepted."""
        self.exclusive: set[int] = set()
        """Blocks allocated since the last commit that are known to have one reference: they are changed in place.

        Whoever adds a reference to a metadata block does so through this class, which takes it out of here.
        """
        self.settled: set[int] = set()
        """Internal btree nodes that a removal may enter without looking at those next to them.

        They and the siblings next to them are exclusive and share their entries as a removal would have them do.
        Filled by :func:`~persistent_data.btree_remove.rebalance_children`; whoever changes the number of entries of an
        internal node takes out what that touches (``ShadowSpine.unsettle``).  Kept here because it ends where
        ``exclusive`` does.
        """

    # Blocks

    def new_block(self, validator: Validator) -> View:
        """Allocate a block, zeroed, with one reference.

        :raises NoFreeBlock: metadata space is exhausted
        """
        block = self.sm.new_block()
        view = self.bm.borrow_zeroed(block, validator)
        self.exclusive.add(block)
        return view

    def new_node(self, validator: Validator, flags: int, value_size: int) -> Node:
        """Allocate a block and make it an empty btree node."""
        return format_node(self.new_block(validator), flags, value_size)

    def shadow_block(self, block: int, validator: Validator) -> tuple[View, bool]:
        """Return a version of *block* that may be changed, and whether *block* was shared.

        If it was, the version is a copy, and the caller adds a reference to everything that the block refers to.  The
        caller also replaces the reference to *block* by one to the version; its count was taken down already.
        """
        if block in self.exclusive:
            buffer = self._peek(block)
            if buffer is not None and buffer.aux is not None:
                view: View = buffer.aux
                if view.validator is validator:
                    buffer.referenced = self._client.epoch
                    if not buffer.dirty:
                        self._client.mark_dirty(buffer)
                    return view, False
        self.bm.require_writable(block)
        view = self.bm.borrow(block, validator)
        if self.move_to_new_block(view.buffer):
            return view, False
        shared = self.sm.more_than_one(block)
        if not shared and (block in self._shadows or block in self.exclusive):
            self._shadows.discard(block)
            self.exclusive.add(block)
            return self.bm.borrow_for_write(block, validator), False
        new = self.sm.new_block()
        self.sm.dec(block, block + 1)
        if shared:
            view = self.bm.borrow_copy(view, new)
        else:
            self.bm.move(view, new)
        self.exclusive.add(new)
        return view, shared

    def move_to_new_block(self, buffer: Buffer) -> bool:
        """Shadow a borrowed block that nobody else refers to, if its counts can be changed in place.

        :returns: whether it was done; if not, nothing was, and :meth:`shadow_block` does it
        """
        block = buffer.block_number
        if block in self._shadows or block in self.exclusive or self.bm.read_only:
            return False
        new = self.sm.replace(block)
        if new is None:
            return False
        self._client.move(buffer, new)
        self.exclusive.add(new)
        return True

    def read_block(self, block: int, validator: Validator) -> View:
        """Return *block* for reading: borrowed, see :class:`~persistent_data.block_manager.BlockManager`."""
        return self.bm.borrow(block, validator)

    # Reference counts

    def inc(self, block: int) -> None:
        """Add a reference to one metadata block."""
        self._not_exclusive((block,))
        self.sm.inc(block, block + 1)

    def dec(self, block: int) -> None:
        """Take a reference from one metadata block."""
        self.settled.discard(block)
        self.sm.dec(block, block + 1)

    def inc_range(self, begin: int, end: int) -> None:
        """Add a reference to each block of ``[begin, end)``."""
        self._not_exclusive(range(begin, end))
        self.sm.inc(begin, end)

    def _not_exclusive(self, blocks: Collection[int]) -> None:
        """Note that *blocks* may have more than one reference from now on."""
        moved = self.exclusive.intersection(blocks)
        self._shadows |= moved
        self.exclusive -= moved
        self.settled.clear()

    def dec_range(self, begin: int, end: int) -> None:
        """Take a reference from each block of ``[begin, end)``."""
        self.settled.clear()
        self.sm.dec(begin, end)

    def inc_blocks(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of *blocks*, neighbours in the list at once."""
        for begin, end in runs(blocks):
            self.inc_range(begin, end)

    def dec_blocks(self, blocks: Iterable[int]) -> None:
        """Take a reference from each of *blocks*, neighbours in the list at once."""
        for begin, end in runs(blocks):
            self.dec_range(begin, end)

    def ref(self, block: int) -> int:
        """Return the number of references to a metadata block."""
        return self.sm.get_count(block)

    def block_is_shared(self, block: int) -> bool:
        """Tell whether a metadata block has more than one reference."""
        return self.sm.more_than_one(block)

    # Transactions

    def forget_exclusive(self) -> None:
        """Look at every block's count again before it is changed in place: the block manager's mode has changed."""
        self._not_exclusive(self.exclusive)

    def pre_commit(self) -> None:
        """First phase of a commit: write the space map, and put everything but the superblock on the device."""
        self.sm.commit()
        self.bm.flush()

    def commit(self, superblock: View) -> None:
        """Second phase: put the superblock (dirty, the only block that is) on the device.  The transaction is over."""
        self._shadows.clear()
        self.exclusive.clear()
        self.settled.clear()
        self._client.mark_dirty(superblock.buffer)
        self.bm.flush()

    def non_blocking_clone(self) -> NonBlockingTransactionManager:
        """Return a manager for reading without any I/O."""
        return NonBlockingTransactionManager(self.bm)


class NonBlockingTransactionManager:
    """Reads what is cached, and remembers what was not.  Changing anything through it is impossible."""

    def __init__(self, bm: BlockManager) -> None:
        self.bm = bm
        self._wanted: dict[int, int] = {}

    def read_block(self, block: int, validator: Validator) -> View:
        """Return *block* for reading if it is cached.

        :raises WouldBlock: it is not; :meth:`issue_prefetches` will read it
        """
        view = self.bm.borrow_cached(block, validator)
        if view is None:
            # As many as the kernel remembers, and as there: of blocks with the same slot the first one wins.
            self._wanted.setdefault(block % MAX_PREFETCHES, block)
            raise WouldBlock(f"metadata block {block} is not cached")
        return view

    def issue_prefetches(self) -> None:
        """Read the blocks that were wanted into the cache.  What cannot be read shows when it is read again."""
        for block in sorted(self._wanted.values()):
            self.bm.prefetch(block)
        self._wanted.clear()
