"""A walk over btrees that trusts nothing: it survives any damage, says what and where, and goes on with the rest.

Trees share nodes.  Each distinct node is read and checked once; what its parents need to know of it is kept
(:class:`Summary`), so that key ranges, depths and geometry are still verified for every parent.

Source: docs/format.md, "Btree node".
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from persistent_data.damage import FATAL, NON_FATAL, UNBOUNDED, Damage, Fault
from persistent_data.node_check import EMPTY_NODE, IO_ERROR, OUTSIDE_DEVICE, TOO_FEW_ENTRIES, Node, check_node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    from persistent_data.block_reader import BlockReader
    from persistent_data.ref_counts import RefCounts

    class Visitor(Protocol):
        """What a walk tells its user about the leaves."""

        def leaf(self, node: Node, path: tuple[int, ...]) -> int:
            """Take a leaf that no walk has met before; return its mark, a number below 2**64."""

        def shared(self, block: int, mark: int, path: tuple[int, ...]) -> None:
            """Take note that sound node *block*, met before, was reached again; *mark* is the highest below it."""


LOOP = "node is its own ancestor"
TWICE = "node stands twice in one tree"
OTHER_TREE = "node belongs to another tree"
TOO_DEEP = "tree is too deep"
FIRST_KEY_LOW = "first key below the parent's key"
LAST_KEY_HIGH = "last key not below the parent's next key"
UNEVEN_DEPTH = "leaves at different depths"
UNEVEN_GEOMETRY = "max_entries differs from that of the siblings"

MAX_DEPTH = 64
"""Levels of a tree; with 84 children in each internal node the key space is used up long before."""


class TreeKind:
    """What tells the trees of a metadata device apart: a name, and the size of a leaf's values in bytes."""

    __slots__ = ("name", "value_size")

    def __init__(self, name: str, value_size: int) -> None:
        self.name = name
        self.value_size = value_size


class Summary:
    """What a sound node says about everything below it.

    :ivar low: the node's first key
    :ivar high: the last key of the last leaf below
    :ivar nr_entries: entries in all the leaves below, damaged ones left out
    :ivar mark: the highest mark that the visitor gave a leaf below
    :ivar kind: number of the tree kind
    :ivar height: 0 for a leaf
    :ivar max_entries: of the node itself
    :ivar small_root: it was met as a root, and has fewer entries than other nodes must have
    """

    __slots__ = ("height", "high", "kind", "low", "mark", "max_entries", "nr_entries", "small_root")

    def __init__(
        self,
        low: int,
        high: int,
        nr_entries: int,
        mark: int,
        kind: int,
        height: int,
        max_entries: int,
        small_root: bool,
    ) -> None:
        self.low = low
        self.high = high
        self.nr_entries = nr_entries
        self.mark = mark
        self.kind = kind
        self.height = height
        self.max_entries = max_entries
        self.small_root = small_root


class _Summaries:
    """Summaries by block, in arrays: 4 bytes for each block of the device and 40 for each node seen."""

    _UNSEEN, _OPEN, _FAILED, _FIRST = range(4)
    _FIELDS = 5

    def __init__(self, nr_blocks: int) -> None:
        self._index = array("I", [self._UNSEEN]) * nr_blocks
        self._data = array("Q")

    def seen(self, block: int) -> bool:
        return self._index[block] != self._UNSEEN

    def is_open(self, block: int) -> bool:
        """Tell whether the walk of *block* has begun and not yet ended."""
        return self._index[block] == self._OPEN

    def open(self, block: int) -> None:
        self._index[block] = self._OPEN

    def fail(self, block: int) -> None:
        """Note that *block* is damaged and will never have a summary."""
        self._index[block] = self._FAILED

    def close(self, block: int, s: Summary) -> None:
        packed = s.kind << 48 | s.height << 32 | s.max_entries << 1 | s.small_root
        self._index[block] = self._FIRST + len(self._data) // self._FIELDS
        self._data.extend((s.low, s.high, s.nr_entries, s.mark, packed))

    def get(self, block: int) -> Summary | None:
        number = self._index[block] - self._FIRST
        if number < 0:
            return None
        low, high, nr_entries, mark, packed = self._data[number * self._FIELDS : (number + 1) * self._FIELDS]
        small_root = bool(packed & 1)
        return Summary(
            low, high, nr_entries, mark, packed >> 48, packed >> 32 & 0xFFFF, (packed & 0xFFFFFFFF) >> 1, small_root
        )


class NoVisitor:
    """A visitor for whom the walk's own checks are enough."""

    def leaf(self, node: Node, path: tuple[int, ...]) -> int:
        """Give every leaf the mark 0."""
        return 0

    def shared(self, block: int, mark: int, path: tuple[int, ...]) -> None:
        """Ignore it."""


class BTreeWalk:
    """Walks any number of trees of one device, which may share nodes.

    :param nr_blocks: pointers to this block or a later one are damage
    :param report: is called with each :class:`Damage`, the path of which begins with the path given to :meth:`walk`
    :param references: where each pointer to a node is counted, the pointers to roots included
    :ivar nr_io_errors: blocks that could not be read
    """

    def __init__(
        self, reader: BlockReader, nr_blocks: int, report: Callable[[Damage], None], references: RefCounts
    ) -> None:
        self._reader = reader
        self._nr_blocks = min(nr_blocks, reader.nr_blocks)
        self._report = report
        self._references = references
        self._summaries = _Summaries(self._nr_blocks)
        self._kinds: list[TreeKind] = []
        self._errors: dict[int, int] = {}
        self._claimed: bytes | None = None
        self._claimed_by = ""

    def claim(self, is_node: bytes, kind: TreeKind) -> None:
        """Take note of the nodes of trees of *kind* that somebody else has walked: blocks whose byte is not zero.

        Trees of that kind are walked here no more; other trees must keep away from these nodes.
        """
        self._claimed, self._claimed_by = is_node, kind.name

    def nr_errors(self, block: int) -> int:
        """Return the number of fatal faults found in and below node *block*."""
        return self._errors.get(block, 0)

    def walk(self, root: int, kind: TreeKind, visitor: Visitor, path: tuple[int, ...] = ()) -> Summary | None:
        """Walk the tree at *root*, to which the block at the end of *path* points.

        :return: the root's summary, None when the root itself cannot be used
        """
        if kind not in self._kinds:
            self._kinds.append(kind)
        number = self._kinds.index(kind)
        if not self._arrive(root, number, visitor, path, 0, UNBOUNDED):
            summary = self._summaries.get(root) if 0 < root < self._nr_blocks else None
            return summary if summary is not None and summary.kind == number else None
        try:
            content = self._reader.read(root)
        except OSError as error:
            self._fail(root, Fault(IO_ERROR, str(error)), (*path, root), 0, UNBOUNDED)
            return None
        node = self._check(root, content, number, True, (*path, root), 0, UNBOUNDED)
        if node is None:
            return None
        if not node.is_leaf:
            node.content = bytes(content)  # the reader's buffer is about to be used again
        return self._descend(node, number, visitor, (*path, root), 0, UNBOUNDED, 1)

    def find_damage(self, root: int, kind: TreeKind, fault: Fault, path: tuple[int, ...] = ()) -> Iterator[Damage]:
        """Find again the damage below *root*, which has been walked, and place *fault* wherever it hits this tree.

        Only nodes above damage are read.  What is wrong between a node and its children is placed at the node.
        """
        waiting = [(root, path, 0, UNBOUNDED)]
        seen = {root}
        while waiting:
            block, above, begin, end = waiting.pop()
            here = (*above, block)
            node = self._reread(block, kind, block == root)
            if node is None:
                yield Damage(fault, here, begin, end)
                continue
            if node.is_leaf:
                continue
            bounds = (*node.keys[1:], end)
            nr_below = 0
            below = []
            for i, child in enumerate(node.numbers()):
                nr_errors = self._errors.get(child, 0)
                nr_below += nr_errors
                if nr_errors and child not in seen:
                    seen.add(child)
                    below.append((child, here, node.keys[i], bounds[i]))
            if self._errors.get(block, 0) > nr_below:
                yield Damage(fault, here, begin, end)
            waiting += reversed(below)

    def _reread(self, block: int, kind: TreeKind, is_root: bool) -> Node | None:
        """Read a node once more; None if it has no use."""
        if not 0 < block < self._nr_blocks or self._summaries.get(block) is None:
            return None
        try:
            content = bytes(self._reader.read(block))
        except OSError:
            return None
        return check_node(content, block, kind.value_size, is_root)[0]

    def _damage(self, block: int, fault: Fault, path: tuple[int, ...], begin: int, end: int) -> None:
        if fault.severity == FATAL:
            self._errors[block] = self._errors.get(block, 0) + 1
        self._report(Damage(fault, path, begin, end))

    def _fail(self, block: int, fault: Fault, path: tuple[int, ...], begin: int, end: int) -> None:
        self._summaries.fail(block)
        self._damage(block, fault, path, begin, end)

    def _arrive(self, block: int, kind: int, visitor: Visitor, path: tuple[int, ...], begin: int, end: int) -> bool:
        """Follow a pointer to *block*, which stands in the last block of *path*; say whether it leads to a new node."""
        # A bad pointer is the fault of the node it stands in.
        holder = path[-1] if path else 0
        if not 0 < block < self._nr_blocks:
            fault = Fault(OUTSIDE_DEVICE, f"a pointer to block {block} of {self._nr_blocks}")
            self._damage(holder, fault, path or (0,), begin, end)
            return False
        self._references.add(block)
        if self._claimed is not None and self._claimed[block]:
            fault = Fault(OTHER_TREE, f"it is also part of the {self._claimed_by}")
            self._damage(holder, fault, (*path, block), begin, end)
            return False
        if not self._summaries.seen(block):
            self._summaries.open(block)
            return True
        summary = self._summaries.get(block)
        if summary is None:
            # A damaged node was reported when it was found.  One that is still open is in this very tree.
            if self._summaries.is_open(block):
                self._damage(holder, Fault(LOOP if block in path else TWICE), (*path, block), begin, end)
        elif summary.kind != kind:
            name = self._kinds[summary.kind].name
            self._damage(holder, Fault(OTHER_TREE, f"it is also part of the {name}"), (*path, block), begin, end)
        else:
            visitor.shared(block, summary.mark, (*path, block))
        return False

    def _check(
        self,
        block: int,
        content: memoryview,
        kind: int,
        is_root: bool,
        path: tuple[int, ...],
        begin: int,
        end: int,
    ) -> Node | None:
        node, faults = check_node(content, block, self._kinds[kind].value_size, is_root)
        for fault in faults:
            self._damage(block, fault, path, begin, end)
        if node is None:
            self._summaries.fail(block)
        return node

    def _descend(
        self, node: Node, kind: int, visitor: Visitor, path: tuple[int, ...], begin: int, end: int, depth: int
    ) -> Summary | None:
        """Walk everything below a checked node and keep its summary."""
        block = node.block
        keys = node.keys
        if node.is_leaf:
            mark = visitor.leaf(node, path)
            low, high = (keys[0], keys[-1]) if keys else (0, 0)
            summary = Summary(low, high, len(keys), mark, kind, 0, node.max_entries, self._is_small_root(node, depth))
            self._summaries.close(block, summary)
            return summary
        if depth == MAX_DEPTH:
            self._fail(block, Fault(TOO_DEEP, f"more than {MAX_DEPTH} levels"), path, begin, end)
            return None

        children = node.numbers()
        bounds = (*keys[1:], end)
        self._read_children(children, keys, bounds, kind, visitor, path, depth)

        high, nr_entries, mark, height, geometry = 0, 0, 0, 0, 0
        for i, child in enumerate(children):
            if not 0 < child < self._nr_blocks:
                continue
            below = self._summaries.get(child)
            errors = self._errors.get(child, 0)
            if below is None:
                if not self._summaries.is_open(child):
                    self._errors[block] = self._errors.get(block, 0) + errors
                continue
            if below.kind != kind:
                continue
            child_path = (*path, child)
            nr_entries += below.nr_entries
            mark = max(mark, below.mark)
            high = below.high
            if errors:
                self._errors[block] = self._errors.get(block, 0) + errors
            if below.low < keys[i]:
                detail = f"key {below.low}, where the parent says {keys[i]}"
                self._damage(block, Fault(FIRST_KEY_LOW, detail), child_path, keys[i], bounds[i])
            if not errors and below.high >= bounds[i]:
                detail = f"key {below.high}, where the next subtree begins with {bounds[i]}"
                self._damage(block, Fault(LAST_KEY_HIGH, detail), child_path, keys[i], bounds[i])
            if geometry and below.max_entries != geometry:
                detail = f"{below.max_entries} instead of {geometry}"
                self._damage(block, Fault(UNEVEN_GEOMETRY, detail), child_path, keys[i], bounds[i])
            if height and below.height + 1 != height:
                detail = f"{below.height} levels below this node, {height - 1} below its siblings"
                self._damage(block, Fault(UNEVEN_DEPTH, detail), child_path, keys[i], bounds[i])
            if below.small_root:
                detail = "it is the root of another tree"
                fault = Fault(TOO_FEW_ENTRIES, detail, NON_FATAL) if below.nr_entries else Fault(EMPTY_NODE, detail)
                self._damage(block, fault, child_path, keys[i], bounds[i])
            geometry = geometry or below.max_entries
            height = height or below.height + 1
        small_root = self._is_small_root(node, depth)
        summary = Summary(keys[0], high, nr_entries, mark, kind, height, node.max_entries, small_root)
        self._summaries.close(block, summary)
        return summary

    @staticmethod
    def _is_small_root(node: Node, depth: int) -> bool:
        return depth == 1 and len(node.keys) < node.max_entries // 3

    def _read_children(
        self,
        children: tuple[int, ...],
        keys: tuple[int, ...],
        bounds: tuple[int, ...],
        kind: int,
        visitor: Visitor,
        path: tuple[int, ...],
        depth: int,
    ) -> None:
        """Walk those children that no walk has met, leaves at once, internal nodes after all have been read."""
        places = {
            child: i for i, child in enumerate(children) if self._arrive(child, kind, visitor, path, keys[i], bounds[i])
        }
        internal: list[Node] = []
        for child, content in self._reader.read_many(sorted(places)):
            i = places[child]
            child_path = (*path, child)
            if isinstance(content, OSError):
                self._fail(child, Fault(IO_ERROR, str(content)), child_path, keys[i], bounds[i])
                continue
            node = self._check(child, content, kind, False, child_path, keys[i], bounds[i])
            if node is None:
                continue
            if node.is_leaf:
                self._descend(node, kind, visitor, child_path, keys[i], bounds[i], depth + 1)
            else:
                node.content = bytes(content)  # the window is about to move
                internal.append(node)
        for node in internal:
            i = places[node.block]
            self._descend(node, kind, visitor, (*path, node.block), keys[i], bounds[i], depth + 1)
