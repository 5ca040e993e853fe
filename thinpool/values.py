"""What the values of the mapping trees mean, and what copying or dropping them does to the counts of data blocks.

Source: docs/format.md, "The four tree types".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from persistent_data.btree_spine import ValueType
from persistent_data.space_map import runs
from thinpool.layout import DEVICE_DETAILS, TIME_BITS

if TYPE_CHECKING:
    from persistent_data.btree import BTree
    from persistent_data.btree_node import Value
    from persistent_data.space_map import SpaceMap
    from persistent_data.transaction_manager import TransactionManager

BLOCK_TIME_SIZE = 8


def block_times(data_map: SpaceMap) -> ValueType:
    """Return the type of mapping values, ``data_block << 24 | time``, whose blocks *data_map* counts."""

    def inc(values: list[Value]) -> None:
        for begin, end in runs(_data_blocks(values)):
            data_map.inc(begin, end)

    def dec(values: list[Value]) -> None:
        if len(values) == 1:
            (value,) = values
            assert isinstance(value, int)
            block = value >> TIME_BITS
            data_map.dec(block, block + 1)
            return
        for begin, end in runs(_data_blocks(values)):
            data_map.dec(begin, end)

    def equal(old: Value, new: Value) -> bool:
        assert isinstance(old, int)
        assert isinstance(new, int)
        return old >> TIME_BITS == new >> TIME_BITS

    return ValueType(BLOCK_TIME_SIZE, inc, dec, equal)


def mapping_roots(tm: TransactionManager, mappings: BTree) -> ValueType:
    """Return the type of top-level values: roots of mapping trees, which go away with their last reference."""

    def inc(values: list[Value]) -> None:
        for root in values:
            assert isinstance(root, int)
            tm.inc(root)

    def dec(values: list[Value]) -> None:
        for root in values:
            assert isinstance(root, int)
            mappings.delete(root)

    return ValueType(BLOCK_TIME_SIZE, inc, dec)


def device_details() -> ValueType:
    """Return the type of the details tree's values."""
    return ValueType(DEVICE_DETAILS.size)


def _data_blocks(values: list[Value]) -> list[int]:
    return [value >> TIME_BITS for value in values if isinstance(value, int)]
