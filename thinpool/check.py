"""Check the metadata of a pool: every rule that the kernel relies on, and some that it merely keeps.

:func:`check` yields what it finds, :func:`check_report` collects it.  Nothing is written.  The order of work is that of
docs/format.md, "Checking": superblocks, the two device trees, the mapping trees, the data space map, the metadata space
map.  Later steps need complete counts, so they are left out once something below a tree cannot be read.

Every tool starts with this module: it imports nothing that takes long to load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from persistent_data.block_reader import BlockReader
from persistent_data.btree_walk import BTreeWalk
from persistent_data.damage import ADVISORY, FATAL, SEVERITIES, Fault, show_range
from persistent_data.layout import ENTRIES_PER_BITMAP, MAX_METADATA_BLOCKS
from persistent_data.node_check import IO_ERROR, OUTSIDE_DEVICE
from persistent_data.ref_counts import RefCounts
from persistent_data.space_map_check import (
    BAD_COUNT,
    LEAK,
    OVERFLOW_MISSING,
    compare_counts,
    count_bitmaps,
    read_index_block,
    read_index_tree,
    read_overflow,
)
from thinpool.layout import (
    MAX_DEVICE_ID,
    METADATA_BLOCK_SECTORS,
    NEEDS_CHECK_FLAG,
    SUPERBLOCK_LOCATION,
    SUPERBLOCK_VERSION,
    TIME_BITS,
    TIME_MASK,
    Superblock,
    valid_data_block_size,
)
from thinpool.superblock_check import BAD_CHECKSUM, superblock_fault
from thinpool.trees import (
    DATA_SPACE_MAP,
    DETAILS_KIND,
    DETAILS_TREE,
    MAPPING_KIND,
    MAPPING_TREE,
    METADATA_SPACE_MAP,
    NODE_ERROR,
    SNAP_PREFIX,
    TOP_LEVEL,
    TOP_LEVEL_KIND,
    DetailsVisitor,
    DeviceEntry,
    TopLevelVisitor,
    describe_damage,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from bufio.device import Device
    from persistent_data.damage import Damage, Severity
    from persistent_data.node_check import Node
    from persistent_data.space_map_check import CountError, Index
    from thinpool.layout import SpaceMapRoot

SUPERBLOCK = "superblock"

INCOMPATIBLE = "feature flags that the kernel refuses"
BAD_DATA_BLOCK_SIZE = "data block size"
BAD_SPACE_MAP_ROOT = "space map root"
NO_SNAPSHOT = "no current metadata snap"
UNUSUAL_SUPERBLOCK = "unusual superblock"
INCONSISTENT_IDS = "inconsistent device ids"
DEVICE_ID_TOO_LARGE = "device id beyond 24 bits"
MAPPED_BLOCKS = "mapped_blocks is wrong"
MISSING_MAPPINGS = "mappings are missing"
DATA_BLOCK_OUTSIDE = "data block outside the data device"
TIME_IN_FUTURE = "time is later than the pool's"
TIMES_OUT_OF_ORDER = "device times out of order"
SHARED_LOOKS_EXCLUSIVE = "shared data block looks exclusive"
SHARED_DAMAGE = "damage shared with another device"

WORTH_ARRAYS = 1500
"""Allocated metadata blocks from which on a check with arrays takes less, with the time to load numpy."""

_SUSPECT = 1 << 32
"""In a mark, beside the highest time below a node: some mapping there must not be shared."""
_TIMES = int.from_bytes((TIME_MASK.to_bytes(8, "little")) * 512, "little")


class Options:
    """What to check.

    :ivar super_block_only: the superblock and nothing else
    :ivar skip_mappings: stop after the two device trees
    :ivar metadata_snap: the trees of the metadata snapshot in place of the pool's own, and no space maps
    :ivar mapping_root: metadata block to use in place of the superblock's data_mapping_root, and no space maps, which
        count what the superblock leads to; without effect on the metadata snapshot
    :ivar details_root: the same for device_details_root
    """

    __slots__ = ("details_root", "mapping_root", "metadata_snap", "skip_mappings", "super_block_only")

    def __init__(
        self,
        *,
        super_block_only: bool = False,
        skip_mappings: bool = False,
        metadata_snap: bool = False,
        mapping_root: int | None = None,
        details_root: int | None = None,
    ) -> None:
        self.super_block_only = super_block_only
        self.skip_mappings = skip_mappings
        self.metadata_snap = metadata_snap
        self.mapping_root = mapping_root
        self.details_root = details_root

    @property
    def is_overridden(self) -> bool:
        """True when the pool's trees are not those that the superblock names."""
        return self.mapping_root is not None or self.details_root is not None


class Finding:
    """One thing that is not as it should be.

    :ivar severity: ``"fatal"``, ``"non_fatal"`` or ``"advisory"``
    :ivar rule: the rule that is broken, in a few fixed words
    :ivar message: a sentence for people
    :ivar tree: the structure it was found in, such as ``"mapping tree"``; ``"metadata snap: "`` precedes it where it
        belongs to the metadata snapshot
    :ivar device: the thin device concerned, None where no single one is
    :ivar keys: range (begin, end) of keys concerned: thin blocks in a mapping tree, device ids in the device trees,
        counted blocks in a space map; end exclusive, ``2**64`` for an open end
    :ivar block: the metadata block at fault, None where no single one is
    :ivar path: metadata blocks from the superblock to *block*
    :ivar expected: references found, where a count is wrong
    :ivar actual: the count in the space map, where a count is wrong
    """

    __slots__ = ("actual", "block", "device", "expected", "keys", "message", "path", "rule", "severity", "tree")

    def __init__(
        self,
        severity: Severity,
        rule: str,
        message: str,
        tree: str,
        *,
        device: int | None = None,
        keys: tuple[int, int] | None = None,
        block: int | None = None,
        path: tuple[int, ...] = (),
        expected: int | None = None,
        actual: int | None = None,
    ) -> None:
        self.severity = severity
        self.rule = rule
        self.message = message
        self.tree = tree
        self.device = device
        self.keys = keys
        self.block = block
        self.path = path
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"Finding({fields})"


class Report:
    """Everything that a check found."""

    __slots__ = ("findings",)

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings

    @property
    def worst(self) -> Severity | None:
        """The gravest severity found, None when nothing was."""
        return max((f.severity for f in self.findings), key=SEVERITIES.index, default=None)

    @property
    def ok(self) -> bool:
        """True when nothing worse than advice was found."""
        return self.worst in (None, ADVISORY)

    def of(self, severity: Severity) -> list[Finding]:
        """Return the findings of one severity."""
        return [f for f in self.findings if f.severity == severity]

    def __str__(self) -> str:
        return "\n".join(f"{f.severity}: {f.message}" for f in self.findings) or "clean"


class Counts:
    """What a check has counted that read everything: the references to each block, and where the counts on disk are.

    :ivar superblock: the pool's, as it was read
    :ivar data: references to each data block
    :ivar metadata: references to each metadata block
    :ivar data_index: index of the data space map
    :ivar metadata_index: index of the metadata space map
    """

    __slots__ = ("data", "data_index", "metadata", "metadata_index", "superblock")

    def __init__(
        self, superblock: Superblock, data: RefCounts, metadata: RefCounts, data_index: Index, metadata_index: Index
    ) -> None:
        self.superblock = superblock
        self.data = data
        self.metadata = metadata
        self.data_index = data_index
        self.metadata_index = metadata_index


class Observer:
    """Is told how the check comes along; does nothing unless overridden."""

    def accepted(self, superblock: Superblock) -> None:
        """Take note of the pool's superblock, once it is known to be readable and what it claims to be."""

    def stage(self, title: str) -> None:
        """Take note that the check goes on to *title*."""

    def progress(self, done: int, total: int) -> None:
        """Take note that of *total* metadata blocks in use about *done* have been read."""

    def counted(self, counts: Counts) -> None:
        """Take the counts, at the end of a check that found both space maps whole; they may still be wrong.

        Of a large pool in which nothing at all is wrong there are none.
        """


def check_report(device: Device, options: Options | None = None, observer: Observer | None = None) -> Report:
    """Check a pool's metadata and return everything found.  As :func:`check` otherwise."""
    return Report(list(check(device, options, observer)))


def check(device: Device, options: Options | None = None, observer: Observer | None = None) -> Iterator[Finding]:
    """Check the metadata on *device* and yield what is not as it should be, in the order in which it is found.

    Damage never raises, unreadable blocks included: they are findings.  The device is only read, each block about once.
    Memory: one byte for each data block and each metadata block, less where large ranges were never used, plus 40 bytes
    for each metadata block in use, or 150 in a large pool.

    :raises OSError: the size of the device cannot be found out
    """
    return _Check(device, options or Options(), observer or Observer()).run()


class _MappingVisitor:
    """Counts the data blocks of each leaf and judges the times in it.

    A leaf's mark is its highest time plus one, 0 for a leaf without entries, with _SUSPECT added where that time is not
    before the device's last snapshot.  The kernel takes such a mapping for exclusive, so its data block must not be
    shared.
    """

    def __init__(self, check: _Check, pool_time: int, suspects: bytearray | None) -> None:
        self._check = check
        self._pool_time = pool_time
        self._suspects = suspects
        self.device: DeviceEntry | None = None
        self.dev_id = 0

    def leaf(self, node: Node, path: tuple[int, ...]) -> int:
        self._check.another_leaf()
        if not node.keys:
            return 0
        values = node.numbers()
        blocks = [value >> TIME_BITS for value in values]
        if self._check.data_counts is not None:
            outside = self._check.data_counts.add_all(blocks)
            if outside:
                self._report_outside(node, blocks, path)
        begin = node.values_offset
        packed = int.from_bytes(node.content[begin : begin + 8 * len(values)], "little") & _TIMES
        times = [value & TIME_MASK for value in values] if packed else None
        newest = max(times) if times else 0
        if newest > self._pool_time:
            self._report_future(node, times or [], path)
        mark = newest + 1
        if self.device is not None and newest >= self.device.snapshotted_time:
            mark |= _SUSPECT
            self._mark_suspects(blocks, times, self.device.snapshotted_time)
        return mark

    def _mark_suspects(self, blocks: list[int], times: list[int] | None, since: int) -> None:
        suspects = self._suspects
        if suspects is None:
            return
        if times is not None and min(times) < since:
            blocks = [block for block, time in zip(blocks, times, strict=True) if time >= since]
        try:
            for block in blocks:
                suspects[block] = 1
        except IndexError:
            pass  # a block outside the device, which is reported as such

    def _report_outside(self, node: Node, blocks: list[int], path: tuple[int, ...]) -> None:
        limit = self._check.data_nr_blocks
        bad = [i for i, block in enumerate(blocks) if block >= limit]
        first = bad[0]
        self._check.add(
            FATAL,
            DATA_BLOCK_OUTSIDE,
            f"{len(bad)} mappings of thin device {self.dev_id} lead to data blocks outside the data device, "
            f"the first is that of thin block {node.keys[first]} to data block {blocks[first]} of {limit} "
            f"(block {node.block})",
            self._check.prefix + MAPPING_TREE,
            device=self.dev_id,
            keys=(node.keys[first], node.keys[bad[-1]] + 1),
            path=path,
        )

    def _report_future(self, node: Node, times: list[int], path: tuple[int, ...]) -> None:
        bad = [i for i, time in enumerate(times) if time > self._pool_time]
        first = bad[0]
        self._check.add(
            ADVISORY,
            TIME_IN_FUTURE,
            f"{len(bad)} mappings of thin device {self.dev_id} are newer than the pool, the first is that of "
            f"thin block {node.keys[first]} with time {times[first]}, while the pool's time is {self._pool_time} "
            f"(block {node.block})",
            self._check.prefix + MAPPING_TREE,
            device=self.dev_id,
            keys=(node.keys[first], node.keys[bad[-1]] + 1),
            path=path,
        )

    def shared(self, block: int, mark: int, path: tuple[int, ...]) -> None:
        if self._suspects is None or self.device is None:
            return
        if mark & _SUSPECT or mark > self.device.snapshotted_time:
            self._check.add(
                ADVISORY,
                SHARED_LOOKS_EXCLUSIVE,
                f"mappings below metadata block {block} belong to thin device {self.dev_id} and to another, "
                "but their times are not before the last snapshot of each: the kernel may overwrite shared data",
                MAPPING_TREE,
                device=self.dev_id,
                path=path,
            )


_SEVERAL = bytes(count > 1 for count in range(256))
_CHUNK = 1 << 16
_LEAVES_BETWEEN_NEWS = 64


class _Check:
    """One run of a check."""

    def __init__(self, device: Device, options: Options, observer: Observer) -> None:
        self._reader = BlockReader(device)
        self._options = options
        self._observer = observer
        self._pending: list[Finding] = []
        self._complete = True
        """False once references are missing because something could not be read."""
        self._tree = SUPERBLOCK
        self._dev_id: int | None = None
        self._own_damage: list[Damage] = []
        """Fatal damage first met in the device that is being looked at."""
        self._nr_leaves = 0
        self._nr_in_use = 0
        self.prefix = ""
        self.data_counts: RefCounts | None = None
        """Made when the first mapping tree is walked."""
        self.data_nr_blocks = 0
        self._can_count_data = False

    def add(
        self,
        severity: Severity,
        rule: str,
        message: str,
        tree: str,
        *,
        device: int | None = None,
        keys: tuple[int, int] | None = None,
        path: tuple[int, ...] = (),
        expected: int | None = None,
        actual: int | None = None,
    ) -> None:
        """Note a finding; the block at fault is the last of *path*."""
        block = path[-1] if path else None
        self._pending.append(
            Finding(
                severity,
                rule,
                message,
                tree,
                device=device,
                keys=keys,
                block=block,
                path=path,
                expected=expected,
                actual=actual,
            )
        )

    def another_leaf(self) -> None:
        """Count a leaf of a mapping tree, which is what nearly all blocks are, and tell the observer now and then."""
        self._nr_leaves += 1
        if self._nr_leaves % _LEAVES_BETWEEN_NEWS == 0:
            self._tell_progress(self._nr_leaves)

    def _tell_progress(self, nr_leaves: int) -> None:
        self._observer.progress(min(nr_leaves, self._nr_in_use), self._nr_in_use)

    def _drain(self) -> Iterator[Finding]:
        found, self._pending = self._pending, []
        yield from found

    # Superblocks

    def run(self) -> Iterator[Finding]:
        main = self._read_superblock(SUPERBLOCK_LOCATION)
        if main is None:
            yield from self._drain()
            return
        self._check_superblock(main)
        if self._options.super_block_only:
            self._observer.accepted(main)
            yield from self._drain()
            return
        self._prepare(main)
        snap = self._read_snapshot(main) if main.held_root else None
        if not self._options.metadata_snap:
            self._observer.accepted(main)
            yield from self._drain()
            yield from self._check_pool(main, snap)
            return
        if not main.held_root:
            self.add(FATAL, NO_SNAPSHOT, NO_SNAPSHOT, SUPERBLOCK, path=(0,))
        if snap is not None:
            self._observer.accepted(main)
            yield from self._drain()
            yield from self._check_snapshot_only(main, snap)
        yield from self._drain()

    def _read_superblock(self, location: int) -> Superblock | None:
        """Return the superblock at *location*; None, after saying why, when it is not one."""
        path = (0,) if location == SUPERBLOCK_LOCATION else (0, location)
        tree = self.prefix + SUPERBLOCK
        if not 0 <= location < self._reader.nr_blocks:
            what = "Metadata device/file too small.  Is this binary metadata?" if location == 0 else ""
            message = what or f"{self.prefix}superblock is at block {location}, outside the device"
            self.add(FATAL, OUTSIDE_DEVICE, message, tree, path=(0,))
            return None
        try:
            content = self._reader.read(location)
        except OSError as error:
            self.add(
                FATAL, IO_ERROR, f"{self.prefix}superblock: io error in block {location}: {error}", tree, path=path
            )
            return None
        fault = superblock_fault(content, location)
        if fault is None:
            return Superblock.unpack(content)
        # Of the copy in a metadata snapshot the kernel looks at nothing else.
        advisory = location != SUPERBLOCK_LOCATION and fault.rule != BAD_CHECKSUM
        self.add(
            ADVISORY if advisory else FATAL, fault.rule, f"{self.prefix}{fault} (block {location})", tree, path=path
        )
        return Superblock.unpack(content) if advisory else None

    def _check_superblock(self, sb: Superblock) -> None:
        """Check what the superblock says by itself."""

        def fatal(rule: str, message: str) -> None:
            self.add(FATAL, rule, f"superblock: {message}", SUPERBLOCK, path=(0,))

        def unusual(message: str) -> None:
            self.add(ADVISORY, UNUSUAL_SUPERBLOCK, f"superblock: {message}", SUPERBLOCK, path=(0,))

        if sb.incompat_flags or sb.compat_ro_flags:
            found = f"incompat_flags {sb.incompat_flags:#x}, compat_ro_flags {sb.compat_ro_flags:#x}"
            fatal(INCOMPATIBLE, f"unknown feature flags, the kernel refuses such a pool ({found})")
        if not valid_data_block_size(sb.data_block_size):
            fatal(BAD_DATA_BLOCK_SIZE, f"data block size of {sb.data_block_size} sectors is not allowed")
        metadata, data = sb.metadata_root, sb.data_root
        nr_blocks = metadata.nr_blocks
        if not 0 < nr_blocks <= MAX_METADATA_BLOCKS:
            fatal(BAD_SPACE_MAP_ROOT, f"metadata space map of {nr_blocks} blocks, the limit is {MAX_METADATA_BLOCKS}")
        elif data.nr_blocks > nr_blocks * ENTRIES_PER_BITMAP:
            fatal(BAD_SPACE_MAP_ROOT, f"data space map of {data.nr_blocks} blocks, more than bitmaps can be stored for")
        for name, block in (
            ("index of the metadata space map", metadata.bitmap_root),
            ("overflow tree of the metadata space map", metadata.ref_count_root),
            ("index of the data space map", data.bitmap_root),
            ("overflow tree of the data space map", data.ref_count_root),
        ):
            if not 0 < block < nr_blocks:
                fatal(BAD_SPACE_MAP_ROOT, f"the {name} is at block {block}, outside the {nr_blocks} metadata blocks")
        if not 0 < sb.version <= SUPERBLOCK_VERSION:
            unusual(f"version {sb.version}, known are 1 and 2")
        if sb.flags & ~NEEDS_CHECK_FLAG:
            unusual(f"undefined flags {sb.flags:#x}")
        if sb.metadata_block_size != METADATA_BLOCK_SECTORS:
            unusual(f"metadata block size of {sb.metadata_block_size} sectors instead of {METADATA_BLOCK_SECTORS}")
        if any(sb.uuid):
            unusual("uuid is not zero")
        if sb.metadata_nr_blocks > nr_blocks:
            unusual(f"metadata_nr_blocks is {sb.metadata_nr_blocks}, the metadata space map has {nr_blocks} blocks")

    def _prepare(self, sb: Superblock) -> None:
        """Check the sizes against the device, and set up the walk and the counters."""
        root = sb.metadata_root
        if root.nr_blocks > self._reader.nr_blocks:
            message = (
                f"superblock: metadata space map of {root.nr_blocks} blocks, "
                f"but the device has {self._reader.nr_blocks}: the kernel refuses such a pool"
            )
            self.add(FATAL, BAD_SPACE_MAP_ROOT, message, SUPERBLOCK, path=(0,))
        limit = min(root.nr_blocks, MAX_METADATA_BLOCKS)
        self._references = RefCounts(max(limit, 1))
        self._references.add(SUPERBLOCK_LOCATION)
        self._nr_in_use = root.nr_allocated
        self._walk = BTreeWalk(self._reader, limit, self._walk_damage, self._references)
        nr_data_blocks = sb.data_root.nr_blocks
        if nr_data_blocks <= limit * ENTRIES_PER_BITMAP:
            self.data_nr_blocks = nr_data_blocks
            self._can_count_data = True

    def _read_snapshot(self, main: Superblock) -> Superblock | None:
        """Return the superblock of the metadata snapshot that the pool holds, None when it cannot be used."""
        self.prefix = SNAP_PREFIX
        location = main.held_root
        if location < self._references.nr_blocks:
            self._references.add(location)
        sb = self._read_superblock(location)
        if sb is None:
            self._complete = False
        else:
            path = (0, location)
            for what, is_odd in (
                ("space map roots are not zero", any(sb.data_space_map_root) or any(sb.metadata_space_map_root)),
                ("held_root is not zero", sb.held_root != 0),
                (f"time {sb.time} is later than the pool's, {main.time}", sb.time > main.time),
            ):
                if is_odd:
                    self.add(
                        ADVISORY,
                        UNUSUAL_SUPERBLOCK,
                        f"{SNAP_PREFIX}superblock: {what}",
                        SNAP_PREFIX + SUPERBLOCK,
                        path=path,
                    )
        self.prefix = ""
        return sb

    # Trees

    def _check_pool(self, main: Superblock, snap: Superblock | None) -> Iterator[Finding]:
        self._observer.stage(DETAILS_TREE)
        self._override(main)
        devices = self._device_trees(main, (0,))
        yield from self._drain()
        snap_devices: list[DeviceEntry] = []
        if snap is not None:
            self.prefix = SNAP_PREFIX
            snap_devices = self._device_trees(snap, (0, main.held_root))
            self.prefix = ""
            yield from self._drain()
        if self._options.skip_mappings:
            return
        self._observer.stage(MAPPING_TREE)
        if self._is_clean(main, devices, snap, snap_devices):
            self._observer.stage(DATA_SPACE_MAP)
            self._observer.stage(METADATA_SPACE_MAP)
            return
        if not self._count_mappings(main, devices, snap, snap_devices):
            yield from self._mappings_one_by_one(main, devices, snap, snap_devices)
        if not self._complete or self._options.is_overridden:
            return
        self._observer.stage(DATA_SPACE_MAP)
        data_index = yield from self._data_space_map(main.data_root)
        self._observer.stage(METADATA_SPACE_MAP)
        metadata_index = yield from self._metadata_space_map(main.metadata_root)
        if self.data_counts is not None and data_index is not None and metadata_index is not None:
            self._observer.counted(Counts(main, self.data_counts, self._references, data_index, metadata_index))

    def _override(self, main: Superblock) -> None:
        """Take the roots that were asked for in place of the superblock's."""
        if self._options.mapping_root is not None:
            main.data_mapping_root = self._options.mapping_root
        if self._options.details_root is not None:
            main.device_details_root = self._options.details_root

    def _is_worth_arrays(self, main: Superblock) -> bool:
        """Tell whether node by node the rest takes longer than to load numpy, and arrays can do it."""
        return main.metadata_root.nr_allocated >= WORTH_ARRAYS and self._complete and self._can_count_data

    def _is_clean(
        self, main: Superblock, devices: list[DeviceEntry], snap: Superblock | None, snap_devices: list[DeviceEntry]
    ) -> bool:
        """Tell whether all that is left to check is clean; false too where node by node it takes no longer to tell."""
        if self._options.is_overridden or not self._is_worth_arrays(main):
            return False
        from thinpool.fast_check import is_clean  # here, because numpy takes long to load

        return is_clean(self._reader, self._references, main, devices, snap, snap_devices, self._tell_progress)

    def _count_mappings(
        self, main: Superblock, devices: list[DeviceEntry], snap: Superblock | None, snap_devices: list[DeviceEntry]
    ) -> bool:
        """Count what the mapping trees refer to, if they are clean; false too where node by node is no slower."""
        if not self._is_worth_arrays(main):
            return False
        from thinpool.fast_counts import count_mappings

        counted = count_mappings(self._reader, self._references, main, devices, snap, snap_devices, self._tell_progress)
        if counted is None:
            return False
        self.data_counts, nodes = counted
        self._walk.claim(nodes, MAPPING_KIND)
        return True

    def _mappings_one_by_one(
        self, main: Superblock, devices: list[DeviceEntry], snap: Superblock | None, snap_devices: list[DeviceEntry]
    ) -> Iterator[Finding]:
        suspects = bytearray(self.data_nr_blocks) if self._can_count_data else None
        yield from self._mappings(devices, main.time, suspects)
        if suspects is not None:
            self._check_exclusive(suspects)
            del suspects
        yield from self._drain()
        if snap is not None:
            self.prefix = SNAP_PREFIX
            yield from self._mappings(snap_devices, snap.time, None)
            self.prefix = ""

    def _check_snapshot_only(self, main: Superblock, snap: Superblock) -> Iterator[Finding]:
        self.prefix = SNAP_PREFIX
        self._observer.stage(DETAILS_TREE)
        devices = self._device_trees(snap, (0, main.held_root))
        yield from self._drain()
        if self._options.skip_mappings:
            return
        self._observer.stage(MAPPING_TREE)
        if not self._count_mappings(main, [], snap, devices):
            yield from self._mappings(devices, snap.time, None)

    def _walk_damage(self, damage: Damage) -> None:
        """Make a finding of what a walk came upon."""
        if damage.fault.severity == FATAL:
            self._complete = False
            self._own_damage.append(damage)
        self._damage(damage, NODE_ERROR)

    def _damage(self, damage: Damage, label: str = "") -> None:
        tree = self.prefix + self._tree
        self.add(
            damage.fault.severity,
            damage.fault.rule,
            describe_damage(damage, tree, self._dev_id, label),
            tree,
            device=self._dev_id,
            keys=(damage.begin, damage.end),
            path=damage.path,
        )

    def _device_trees(self, sb: Superblock, path: tuple[int, ...]) -> list[DeviceEntry]:
        """Read the details tree and the top level of the mapping tree; return the devices that the latter names."""
        self._tree = DETAILS_TREE
        details = DetailsVisitor()
        details_summary = self._walk.walk(sb.device_details_root, DETAILS_KIND, details, path)
        self._tree = TOP_LEVEL
        top_level = TopLevelVisitor()
        summary = self._walk.walk(sb.data_mapping_root, TOP_LEVEL_KIND, top_level, path)
        sound = (
            details_summary is not None
            and summary is not None
            and not self._walk.nr_errors(sb.device_details_root)
            and not self._walk.nr_errors(sb.data_mapping_root)
        )
        return self._join(sb, details, top_level, sound)

    def _join(
        self, sb: Superblock, details: DetailsVisitor, top_level: TopLevelVisitor, sound: bool
    ) -> list[DeviceEntry]:
        for dev_id, device in details.devices.items():
            self._check_details(sb, device, details.paths[dev_id])
        lost = [i for i in details.devices if i not in top_level.roots] if sound else []
        stray = [i for i in top_level.roots if i not in details.devices] if sound else []
        if lost or stray:
            self._complete = False
            ids = lost or stray
            where = "details tree only" if lost else "mapping tree only"
            first = f"thin device {min(ids)}" + (f" and {len(ids) - 1} more are" if len(ids) > 1 else " is")
            text = (
                f"{self.prefix}inconsistent device ids"
                if self.prefix
                else ("Inconsistency between the details tree and the mapping tree")
            )
            self.add(
                FATAL, INCONSISTENT_IDS, f"{text}: {first} in the {where}", self.prefix + TOP_LEVEL, device=min(ids)
            )
        devices = []
        for dev_id in sorted(top_level.roots):
            device = details.devices.get(dev_id) or DeviceEntry(dev_id, (-1, 0, 0, 1 << 64))
            device.root, device.path = top_level.roots[dev_id]
            devices.append(device)
        return devices

    def _check_details(self, sb: Superblock, device: DeviceEntry, path: tuple[int, ...]) -> None:
        dev_id = device.dev_id
        tree = self.prefix + DETAILS_TREE
        if dev_id > MAX_DEVICE_ID:
            message = f"{tree}: thin device {dev_id} has an id beyond 24 bits (block {path[-1]})"
            self.add(ADVISORY, DEVICE_ID_TOO_LARGE, message, tree, device=dev_id, path=path)
        if not device.creation_time <= device.snapshotted_time:
            message = (
                f"{tree}: thin device {dev_id} was created at time {device.creation_time}, "
                f"but last snapshotted at {device.snapshotted_time} (block {path[-1]})"
            )
            self.add(ADVISORY, TIMES_OUT_OF_ORDER, message, tree, device=dev_id, path=path)
        newest = max(device.creation_time, device.snapshotted_time)
        if newest > sb.time:
            message = (
                f"{tree}: thin device {dev_id} was created or snapshotted at time {newest}, "
                f"while the pool's time is {sb.time} (block {path[-1]})"
            )
            self.add(ADVISORY, TIME_IN_FUTURE, message, tree, device=dev_id, path=path)

    def _mappings(self, devices: list[DeviceEntry], pool_time: int, suspects: bytearray | None) -> Iterator[Finding]:
        if self._can_count_data and self.data_counts is None:
            self.data_counts = RefCounts(self.data_nr_blocks)
        visitor = _MappingVisitor(self, pool_time, suspects)
        self._tree = MAPPING_TREE
        for device in devices:
            visitor.dev_id = self._dev_id = device.dev_id
            visitor.device = device
            self._own_damage.clear()
            summary = self._walk.walk(device.root, MAPPING_KIND, visitor, device.path)
            if self._walk.nr_errors(device.root) > len(self._own_damage):
                self._place_shared_damage(device)
            self._check_mapped(device, None if summary is None else summary.nr_entries)
            if self._pending:
                yield from self._drain()
        self._dev_id = None

    def _place_shared_damage(self, device: DeviceEntry) -> None:
        """Tell which thin blocks of a device are hit by damage that was found in a device sharing nodes with it."""
        own = {block for damage in self._own_damage for block in damage.path[-2:]}
        for damage in self._walk.find_damage(device.root, MAPPING_KIND, Fault(SHARED_DAMAGE), device.path):
            if damage.block not in own:
                self._damage(damage, NODE_ERROR)

    def _check_mapped(self, device: DeviceEntry, found: int | None) -> None:
        """Compare the number of mappings found with the device's details; None when the root was no use."""
        wanted = device.mapped_blocks
        if wanted < 0:
            return  # it has no details, which is a finding of its own
        name = f"{self.prefix}Thin device {device.dev_id}"
        errors = self._walk.nr_errors(device.root)
        if found is None:
            rule, message = MISSING_MAPPINGS, f"{name} is missing root with {wanted} mappings"
        elif errors:
            missing = max(wanted - found, 0)
            rule = MISSING_MAPPINGS
            message = f"{name} has {errors} errors and is missing {missing} mappings, while expected {wanted}"
        elif found != wanted:
            rule = MAPPED_BLOCKS
            message = f"{name} has unexpected number of mappings, expected {wanted}, actual {found}"
        else:
            return
        self._complete = False
        self.add(
            FATAL,
            rule,
            message,
            self.prefix + MAPPING_TREE,
            device=device.dev_id,
            path=(*device.path, device.root),
            expected=wanted,
            actual=found,
        )

    def _check_exclusive(self, suspects: bytearray) -> None:
        """Report data blocks mapped more than once, by a mapping that the kernel takes for the only one."""
        counts = self.data_counts
        if counts is None or not counts.any_shared():
            return
        for begin in range(0, counts.nr_blocks, _CHUNK):
            several = counts.counts[begin : begin + _CHUNK].translate(_SEVERAL)
            both = int.from_bytes(several, "little") & int.from_bytes(suspects[begin : begin + _CHUNK], "little")
            if not both:
                continue
            flags = both.to_bytes(len(several), "little")
            at = flags.find(1)
            while at >= 0:
                end = at + 1
                while end < len(flags) and flags[end]:
                    end += 1
                blocks = show_range(begin + at, begin + end)
                self.add(
                    ADVISORY,
                    SHARED_LOOKS_EXCLUSIVE,
                    f"data blocks {blocks} are mapped more than once, but a mapping's time is not before the last "
                    "snapshot of its device: the kernel may overwrite shared data",
                    MAPPING_TREE,
                    keys=(begin + at, begin + end),
                )
                at = flags.find(1, end)

    # Space maps

    def _data_space_map(self, root: SpaceMapRoot) -> Generator[Finding, None, Index | None]:
        """Check the data space map; return its index if every count could be compared."""
        self._tree = DATA_SPACE_MAP
        limit = min(self._references.nr_blocks, self._reader.nr_blocks)
        index = read_index_tree(self._walk, root.bitmap_root, root.nr_blocks, self._damage)
        overflow = read_overflow(self._walk, root.ref_count_root, root.nr_blocks, self._damage)
        if index is None or not count_bitmaps(index, limit, self._references, self._damage):
            self._complete = False
        yield from self._drain()
        if index is None or overflow is None or self.data_counts is None or not self._complete:
            return None
        for error in compare_counts(self.data_counts, index, overflow, root.nr_allocated, self._reader, self._damage):
            yield from self._drain()
            yield self._count_finding(error, "data", index.path)
        yield from self._drain()
        return index

    def _metadata_space_map(self, root: SpaceMapRoot) -> Generator[Finding, None, Index | None]:
        """Check the metadata space map; return its index if every count could be compared."""
        self._tree = METADATA_SPACE_MAP
        limit = min(self._references.nr_blocks, self._reader.nr_blocks)
        nr_blocks = self._references.nr_blocks
        index = read_index_block(self._reader, root.bitmap_root, nr_blocks, self._references, self._damage)
        overflow = read_overflow(self._walk, root.ref_count_root, nr_blocks, self._damage)
        if index is None or not count_bitmaps(index, limit, self._references, self._damage):
            self._complete = False
        yield from self._drain()
        if index is None or overflow is None or not self._complete:
            return None
        for error in compare_counts(self._references, index, overflow, root.nr_allocated, self._reader, self._damage):
            yield from self._drain()
            yield self._count_finding(error, "metadata", index.path)
        yield from self._drain()
        return index

    def _count_finding(self, error: CountError, kind: str, path: tuple[int, ...]) -> Finding:
        expected, actual = error.expected, error.actual
        if actual is None:
            rule, contains = OVERFLOW_MISSING, "space map says it's >= 3.  Its overflow entry is missing."
        else:
            rule = LEAK if error.is_leak else BAD_COUNT
            contains = f"space map contains {actual}."
        message = f"Bad reference count for {kind} block {error.begin}.  Expected {expected}, but {contains}"
        if error.end - error.begin > 1:
            message += f"  The same holds for blocks {show_range(error.begin, error.end)}."
        return Finding(
            error.severity,
            rule,
            f"{message}  (bitmap block {error.bitmap})",
            self._tree,
            keys=(error.begin, error.end),
            block=error.bitmap,
            path=(*path, error.bitmap),
            expected=expected,
            actual=actual,
        )
