"""List the devices of a pool: how much each has mapped, how much of that it owns alone, and its ages.

Source: docs/tools/thin_ls.md, "Fields".
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from persistent_data.btree_walk import NoVisitor
from persistent_data.damage import FATAL, Damage, Fault
from persistent_data.node_check import check_node
from persistent_data.ref_counts import RefCounts
from thinpool.layout import TIME_BITS
from thinpool.pool_reader import PoolReader
from thinpool.trees import DATA_BLOCK_OUTSIDE, MAPPING_KIND, MAPPING_TREE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from bufio.device import Device
    from persistent_data.node_check import Node
    from thinpool.trees import DeviceEntry

_SECTOR_SIZE = 512
_MAX_SHOWN = 8192
_UNITS = ("b", "KiB", "MiB", "GiB", "Tib", "PiB", "EiB", "ZiB", "YiB", "RiB")

DEFAULT_FIELDS = ("DEV", "MAPPED", "CREATE_TIME", "SNAP_TIME")
_OWNERSHIP = ("EXCLUSIVE", "SHARED")
_SUFFIXES = ("_BLOCKS", "_SECTORS", "_BYTES", "")
_HIGHEST = ("HIGHEST_BLOCK", "HIGHEST_SECTOR", "HIGHEST_BYTE", "HIGHEST_MAPPED")
FIELDS = (
    "DEV",
    *(name + suffix for suffix in _SUFFIXES for name in ("MAPPED", *_OWNERSHIP)),
    *_HIGHEST,
    "TRANSACTION",
    "CREATE_TIME",
    "SNAP_TIME",
)
"""Every field there is."""
_NOTHING = "-"
"""In a HIGHEST field of a device without mappings."""

WORTH_BATCHES = 1000
"""Metadata blocks in use from which on array operations are faster, the import of the array package included."""


def _needs_walk(fields: Iterable[str]) -> bool:
    """Tell whether one of *fields* takes a walk of the mapping trees; the others are in the details tree."""
    return any(field.startswith(("HIGHEST", *_OWNERSHIP)) for field in fields)


class Row:
    """One device, counted.

    :ivar device: its entries in the device trees
    :ivar exclusive: mappings whose data block has no other mapping in any device
    :ivar highest: the highest mapped thin block, -1 for none
    """

    __slots__ = ("device", "exclusive", "highest")

    def __init__(self, device: DeviceEntry) -> None:
        self.device = device
        self.exclusive = 0
        self.highest = -1


def human_size(size_bytes: int) -> str:
    """Word a size as a whole number and a unit, spelled and rounded as thin_ls has it since its first release.

    The unit is the largest that the size reaches, and the number is rounded; but where up to 8192 of the unit below
    suffice, that is used, and the number is cut.
    """
    power = max(size_bytes.bit_length() - 1, 0) // 10
    if power:
        below = size_bytes >> 10 * (power - 1)
        if below <= _MAX_SHOWN:
            return f"{below}{_UNITS[power - 1]}"
        size_bytes += 1 << (10 * power - 1)
    return f"{size_bytes >> 10 * power}{_UNITS[power]}"


def list_devices(
    device: Device,
    fields: Sequence[str] = DEFAULT_FIELDS,
    metadata_snap: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[str]]:
    """Return a row of cells for each device, ascending by id.

    Reads the mapping trees only if one of *fields* needs it; EXCLUSIVE and SHARED may need the leaves twice.

    :param progress: is told, as the mapping trees are walked, how many mappings have been seen, and how many there are
    :raises ValueError: no such field
    :raises Corrupt: what must be read is damaged
    :raises ThinError: ENODATA, the metadata snapshot was asked for and there is none
    :raises OSError: the device cannot be read
    """
    for field in fields:
        if field not in FIELDS:
            raise ValueError(f"unknown field {field}")
    pool = PoolReader(device, metadata_snap)
    rows = [Row(entry) for entry in pool.devices()]
    if _needs_walk(fields):
        _count(pool, rows, fields, progress)
    sectors = pool.superblock.data_block_size
    return [[_cell(field, row, sectors) for field in fields] for row in rows]


def _count(
    pool: PoolReader, rows: list[Row], fields: Sequence[str], progress: Callable[[int, int], None] | None
) -> None:
    """Fill in *rows* as far as *fields* need it."""
    ownership = any(field.startswith(_OWNERSHIP) for field in fields)
    if ownership:
        pool.require_countable()
    if pool.main.metadata_root.nr_allocated >= WORTH_BATCHES:
        from persistent_data.block_batches import NotClean
        from thinpool.listing_batch import count

        try:
            count(pool, rows, ownership, any(field in _HIGHEST for field in fields), progress)
        except NotClean:
            pass  # what is wrong with it, if anything, takes the plain code to say
        else:
            return
    _Counter(pool, rows, ownership, progress).run()


def _cell(field: str, row: Row, sectors: int) -> str:
    """Word one field of a device; *sectors* is the size of a data block."""
    ages = {
        "DEV": row.device.dev_id,
        "TRANSACTION": row.device.transaction_id,
        "CREATE_TIME": row.device.creation_time,
        "SNAP_TIME": row.device.snapshotted_time,
    }
    if field in ages:
        return str(ages[field])
    if field in _HIGHEST:
        if row.highest < 0:
            return _NOTHING
        last_byte = (row.highest + 1) * sectors * _SECTOR_SIZE - 1
        return {
            "HIGHEST_BLOCK": str(row.highest),
            "HIGHEST_SECTOR": str(last_byte // _SECTOR_SIZE),
            "HIGHEST_BYTE": str(last_byte),
            "HIGHEST_MAPPED": human_size(last_byte),
        }[field]
    name, _, unit = field.partition("_")
    mapped = row.device.mapped_blocks
    blocks = {"MAPPED": mapped, "EXCLUSIVE": row.exclusive, "SHARED": mapped - row.exclusive}[name]
    if unit == "BLOCKS":
        return str(blocks)
    if unit == "SECTORS":
        return str(blocks * sectors)
    size_bytes = blocks * sectors * _SECTOR_SIZE
    return str(size_bytes) if unit == "BYTES" else human_size(size_bytes)


def format_table(fields: Sequence[str], rows: Sequence[Sequence[str]], headers: bool = True) -> str:
    """Return lines of right-aligned columns, each cell followed by a blank."""
    lines = [fields, *rows] if headers else list(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(fields))] if lines else []
    return "".join(
        "".join(f"{cell:>{width}} " for cell, width in zip(line, widths, strict=True)) + "\n" for line in lines
    )


def json_lines(fields: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield an object for each row: numbers as such, a size with its unit as a string, null where there is nothing."""
    for row in rows:
        members = ", ".join(f'"{field}": {_json_value(cell)}' for field, cell in zip(fields, row, strict=True))
        yield f"{{{members}}}\n"


def _json_value(cell: str) -> str:
    if cell == _NOTHING:
        return "null"
    return cell if cell.isdigit() else f'"{cell}"'


class _Counter(NoVisitor):
    """Counts mappings, and which of them have their data block for themselves.

    First every distinct leaf is read once and its data blocks are counted.  Nodes that were reached again are noted;
    all leaves below them are shared.  If anything at all is shared, the leaves of each device that are not are read
    again: a mapping is exclusive where the count of its data block is one.
    """

    def __init__(
        self, pool: PoolReader, rows: list[Row], ownership: bool, progress: Callable[[int, int], None] | None
    ) -> None:
        self._pool = pool
        self._rows = rows
        self._ownership = ownership
        self._counts = RefCounts(pool.nr_data_blocks if ownership else 0)
        self._own: list[array[int]] = [array("I") for _ in rows]
        """Leaves that each device was the first to reach."""
        self._reached_again: set[int] = set()
        self._shared = bytearray(pool.nr_blocks)
        self._current = 0
        self._progress = progress
        self._nr_seen = 0
        self._nr_expected = sum(row.device.mapped_blocks for row in rows)

    def run(self) -> None:
        """Fill in the rows.

        :raises Corrupt: a mapping tree is damaged
        """
        walk = self._pool.new_walk()
        for number, row in enumerate(self._rows):
            self._current = number
            self._pool.enter(MAPPING_TREE, row.device.dev_id)
            summary = walk.walk(row.device.root, MAPPING_KIND, self, row.device.path)
            assert summary is not None, "the walk raises at damage"
            row.exclusive = summary.nr_entries
            row.highest = summary.high if summary.nr_entries else -1
            self._pool.check_nr_mappings(row.device, summary.nr_entries)
        if self._ownership and (self._reached_again or self._counts.any_shared()):
            for block in self._reached_again:
                self._mark_shared(block)
            for number in range(len(self._rows)):
                self._rows[number].exclusive = self._count_exclusive(self._own[number])

    def leaf(self, node: Node, path: tuple[int, ...]) -> int:
        self._nr_seen += len(node.keys)
        if self._progress is not None:
            self._progress(self._nr_seen, self._nr_expected)
        if self._ownership and node.keys:
            self._own[self._current].append(node.block)
            outside = self._counts.add_all([value >> TIME_BITS for value in node.numbers()])
            if outside:
                detail = f"a mapping leads to data block {outside[0]} of {self._pool.nr_data_blocks}"
                damage = Damage(Fault(DATA_BLOCK_OUTSIDE, detail), path, node.keys[0], node.keys[-1] + 1)
                self._pool.refuse(damage, MAPPING_TREE, self._rows[self._current].device.dev_id)
        return 0

    def shared(self, block: int, mark: int, path: tuple[int, ...]) -> None:
        if self._ownership:
            self._reached_again.add(block)

    def _read(self, block: int) -> Node:
        """Read a node that the walk found sound."""
        content = bytes(self._pool.reader.read(block))
        node, faults = check_node(content, block, MAPPING_KIND.value_size, True)
        if node is None:
            fault = next(fault for fault in faults if fault.severity == FATAL)
            self._pool.refuse(Damage(fault, (block,)), MAPPING_TREE)
        assert node is not None
        return node

    def _mark_shared(self, block: int) -> None:
        """Mark everything below and including *block*; what is marked is marked all the way down."""
        if self._shared[block]:
            return
        self._shared[block] = 1
        node = self._read(block)
        if not node.is_leaf:
            for child in node.numbers():
                self._mark_shared(child)

    def _count_exclusive(self, leaves: array[int]) -> int:
        exclusive = 0
        counts = self._counts.counts
        own = sorted(block for block in leaves if not self._shared[block])
        for block, content in self._pool.reader.read_many(own):
            if isinstance(content, OSError):
                raise content
            node, faults = check_node(content, block, MAPPING_KIND.value_size, True)
            if node is None:
                self._pool.refuse(Damage(faults[0], (block,)), MAPPING_TREE)
            else:
                exclusive += [counts[value >> TIME_BITS] for value in node.numbers()].count(1)
        return exclusive
