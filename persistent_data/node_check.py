"""The content of one btree node, taken apart and checked: everything that can be said without knowing its parent.

Source: docs/format.md, "Btree node".
"""

from __future__ import annotations

from operator import lt
from struct import Struct
from typing import TYPE_CHECKING

from persistent_data.checksum import BTREE_NODE_SALT, block_checksum, kind_of
from persistent_data.damage import ADVISORY, NON_FATAL, Fault
from persistent_data.layout import BLOCK_SIZE, INTERNAL_NODE, KEY_SIZE, LEAF_NODE, NODE_HEADER, NODE_HEADER_SIZE

if TYPE_CHECKING:
    from bufio.device import ReadableBuffer

IO_ERROR = "io error"
OUTSIDE_DEVICE = "block outside the device"
NOT_A_NODE = "not a btree node"
CHECKSUM_ERROR = "checksum error"
BLOCKNR_MISMATCH = "blocknr mismatch"
BAD_FLAGS = "node is neither internal nor leaf"
VALUE_SIZE_MISMATCH = "value_size mismatch"
MAX_ENTRIES_TOO_LARGE = "max_entries is too large"
MAX_ENTRIES_ZERO = "max_entries is zero"
MAX_ENTRIES_ODD = "max_entries is not divisible by 3"
TOO_MANY_ENTRIES = "nr_entries > max_entries"
TOO_FEW_ENTRIES = "nr_entries < max_entries / 3"
EMPTY_NODE = "node is empty"
KEYS_OUT_OF_ORDER = "keys out of order"
PADDING_NOT_ZERO = "padding is not zero"

_arrays: dict[int, Struct] = {}


def words(content: ReadableBuffer, offset: int, count: int) -> tuple[int, ...]:
    """Return *count* little-endian u64 from byte *offset* of a block."""
    array = _arrays.get(count)
    if array is None:
        array = _arrays[count] = Struct(f"<{count}Q")
    return array.unpack_from(content, offset)


class Node:
    """A btree node whose content passed :func:`check_node`.

    :ivar block: its metadata block
    :ivar is_leaf: false for an internal node
    :ivar keys: all valid keys, ascending
    :ivar content: the whole block, as long as the caller's buffer holds it
    """

    __slots__ = ("block", "content", "is_leaf", "keys", "max_entries", "value_size")

    def __init__(
        self,
        block: int,
        content: ReadableBuffer,
        is_leaf: bool,
        keys: tuple[int, ...],
        max_entries: int,
        value_size: int,
    ) -> None:
        self.block = block
        self.content = content
        self.is_leaf = is_leaf
        self.keys = keys
        self.max_entries = max_entries
        self.value_size = value_size

    @property
    def values_offset(self) -> int:
        """Byte offset of the first value in the block."""
        return NODE_HEADER_SIZE + KEY_SIZE * self.max_entries

    def numbers(self) -> tuple[int, ...]:
        """Return the values of a node whose values are u64: children, roots, or block and time."""
        return words(self.content, self.values_offset, len(self.keys))

    def records(self, layout: Struct) -> list[tuple[int, ...]]:
        """Return the values, each taken apart with *layout*, whose size is the node's value size."""
        begin = self.values_offset
        return list(layout.iter_unpack(memoryview(self.content)[begin : begin + len(self.keys) * layout.size]))


def check_node(
    content: ReadableBuffer, location: int, leaf_value_size: int, is_root: bool
) -> tuple[Node | None, list[Fault]]:
    """Check the metadata block read from *location* as a node of a tree whose leaf values have *leaf_value_size* bytes.

    :return: the node, or None when a fatal fault makes its content meaningless; and every fault found
    """
    csum, flags, blocknr, nr_entries, max_entries, value_size, padding = NODE_HEADER.unpack_from(content)
    wanted = block_checksum(content, BTREE_NODE_SALT)
    if csum != wanted:
        kind = kind_of(content)
        if kind is not None:
            return None, [Fault(NOT_A_NODE, f"it has the checksum of a {kind} block")]
        return None, [Fault(CHECKSUM_ERROR, f"{csum:#010x} is stored, {wanted:#010x} is computed")]
    if blocknr != location:
        return None, [Fault(BLOCKNR_MISMATCH, f"the block says it is block {blocknr}")]
    if flags not in (INTERNAL_NODE, LEAF_NODE):
        return None, [Fault(BAD_FLAGS, f"flags are {flags:#x}")]
    is_leaf = flags == LEAF_NODE
    wanted_size = leaf_value_size if is_leaf else KEY_SIZE
    if value_size != wanted_size:
        kind = "a leaf" if is_leaf else "an internal node"
        return None, [Fault(VALUE_SIZE_MISMATCH, f"values of {kind} have {value_size} bytes instead of {wanted_size}")]
    if NODE_HEADER_SIZE + (KEY_SIZE + value_size) * max_entries > BLOCK_SIZE:
        return None, [Fault(MAX_ENTRIES_TOO_LARGE, f"{max_entries} entries with values of {value_size} bytes")]
    if max_entries == 0:
        return None, [Fault(MAX_ENTRIES_ZERO)]
    if nr_entries > max_entries:
        return None, [Fault(TOO_MANY_ENTRIES, f"{nr_entries} > {max_entries}")]
    if nr_entries == 0 and not (is_root and is_leaf):
        return None, [Fault(EMPTY_NODE, "only a leaf that is the whole tree may be empty")]
    keys = words(content, NODE_HEADER_SIZE, nr_entries)
    if not all(map(lt, keys, keys[1:])):
        first = next(i for i in range(nr_entries - 1) if keys[i] >= keys[i + 1])
        return None, [Fault(KEYS_OUT_OF_ORDER, f"key {first} is {keys[first]}, key {first + 1} is {keys[first + 1]}")]

    faults = []
    if max_entries % 3:
        faults.append(Fault(MAX_ENTRIES_ODD, f"max_entries is {max_entries}", NON_FATAL))
    if not is_root and nr_entries < max_entries // 3:
        faults.append(Fault(TOO_FEW_ENTRIES, f"{nr_entries} < {max_entries // 3}", NON_FATAL))
    if padding:
        faults.append(Fault(PADDING_NOT_ZERO, f"it is {padding:#x}", ADVISORY))
    return Node(location, content, is_leaf, keys, max_entries, value_size), faults
