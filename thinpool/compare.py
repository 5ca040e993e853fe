"""What two devices do not have in common.

Devices that were snapshotted from each other share whole subtrees; a node that both have is passed over unread, so the
cost is that of the differences.  Source: docs/design.md, "Comparing devices".
"""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from persistent_data.btree_spine import READ_AHEAD
from thinpool.errors import ThinError, from_below
from thinpool.layout import TIME_BITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool.thin_device import ThinDevice

LEFT_ONLY = "left_only"
RIGHT_ONLY = "right_only"
DIFFERENT = "different"

_END = 1 << 64


class Difference(NamedTuple):
    """*length* thin blocks from *thin_begin* on that two devices do not map to the same data blocks.

    ``kind`` is ``left_only``, ``right_only`` or ``different``; a data block that the kind does not speak of is None.
    """

    kind: str
    thin_begin: int
    length: int
    left_data_begin: int | None
    right_data_begin: int | None

    def goes_on_with(self, following: Difference) -> bool:
        """Tell whether both are one stretch."""
        return (
            self.kind == following.kind
            and self.thin_begin + self.length == following.thin_begin
            and (self.left_data_begin is None or self.left_data_begin + self.length == following.left_data_begin)
            and (self.right_data_begin is None or self.right_data_begin + self.length == following.right_data_begin)
        )


class _Side:
    """What is still to be compared of one device: entries at hand, then subtrees, in order of keys."""

    def __init__(self, device: ThinDevice) -> None:
        self._device = device
        with device._pool._lock:
            self._root = device._start_query()
            self._version = self._state()
        self.entries: deque[tuple[int, int]] = deque()
        self.subtrees: list[tuple[int, int, int]] = []
        """Last one first: lower bound of the keys, block, height above the leaves."""
        self.subtrees.append((0, self._root, self._height()))

    def _state(self) -> tuple[int, int, int]:
        pool = self._device._pool
        handle = self._device._live_handle()
        return pool._mapping_root(handle), handle.nr_changes, handle.snapshotted_time

    def _height(self) -> int:
        pool = self._device._pool
        with pool._lock:
            pool._start_query()
            try:
                return pool._storage.trees.mappings.height(self._root)
            except OSError as error:
                raise from_below(error) from error

    @property
    def head_key(self) -> int:
        """The smallest key that may be left."""
        if self.entries:
            return self.entries[0][0]
        return self.subtrees[-1][0] if self.subtrees else _END

    def expand(self) -> None:
        """Replace the first subtree by what is in its node."""
        low, block, height = self.subtrees.pop()
        pool = self._device._pool
        with pool._lock:
            pool._start_query()
            if self._state() != self._version:
                raise ThinError(errno.EINVAL, f"device {self._device.dev_id} changed while it was being compared")
            high = self.subtrees[-1][0] if self.subtrees else _END
            try:
                keys, values = pool._storage.trees.mappings.node_entries(block, low, high, is_leaf=height == 0)
            except OSError as error:
                raise from_below(error) from error
        if height == 0:
            self.entries.extend(zip(keys, values, strict=True))
        else:
            self.subtrees.extend(
                (key, child, height - 1) for key, child in zip(reversed(keys), reversed(values), strict=True)
            )


def delta(left: ThinDevice, right: ThinDevice) -> Iterator[Difference]:
    """Iterate over the thin blocks that *left* and *right*, devices of one pool, map differently, ascending.

    Only data blocks are compared, not times.  Neither device may be changed meanwhile.

    :raises ThinError: EINVAL when one of them was changed, or they belong to different pools
    :raises Corrupt: damaged metadata; everything before it has been returned
    """
    if left._pool is not right._pool:
        raise ThinError(errno.EINVAL, "only devices of the same pool can be compared")
    pending: Difference | None = None
    for found in _differing_blocks(_Side(left), _Side(right)):
        if pending is None:
            pending = found
        elif pending.goes_on_with(found):
            pending = pending._replace(length=pending.length + found.length)
        else:
            yield pending
            pending = found
    if pending is not None:
        yield pending


def _read_ahead(left: _Side, right: _Side) -> None:
    """Start to read the next subtrees that only one side has: what both have is not looked into."""
    nexts = [{block for _, block, _ in side.subtrees[-READ_AHEAD:]} for side in (left, right)]
    pool = left._device._pool
    with pool._lock:
        pool._start_query()
        pool._storage.bm.prefetch_all(nexts[0] ^ nexts[1])


def _differing_blocks(left: _Side, right: _Side) -> Iterator[Difference]:
    nr_expanded = -1
    while True:
        if not left.entries and not right.entries and left.subtrees and right.subtrees:
            (low, block, height), (other_low, other_block, other_height) = left.subtrees[-1], right.subtrees[-1]
            if block == other_block:
                left.subtrees.pop()
                right.subtrees.pop()
                continue
            nr_expanded += 1
            if nr_expanded % (READ_AHEAD // 2) == 0:
                _read_ahead(left, right)
            if height != other_height:
                (left if height > other_height else right).expand()
            else:
                # Of two that begin at different keys the later one may still turn out to be shared.
                if low <= other_low:
                    left.expand()
                if other_low <= low:
                    right.expand()
            continue
        a, b = left.head_key, right.head_key
        if a == b == _END:
            return
        if not left.entries and a <= b:
            left.expand()
        elif not right.entries and b <= a:
            right.expand()
        elif a < b:
            key, value = left.entries.popleft()
            yield Difference(LEFT_ONLY, key, 1, value >> TIME_BITS, None)
        elif b < a:
            key, value = right.entries.popleft()
            yield Difference(RIGHT_ONLY, key, 1, None, value >> TIME_BITS)
        else:
            key, value = left.entries.popleft()
            _, other = right.entries.popleft()
            if value >> TIME_BITS != other >> TIME_BITS:
                yield Difference(DIFFERENT, key, 1, value >> TIME_BITS, other >> TIME_BITS)
