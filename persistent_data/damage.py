"""What is wrong with a block, kept apart from where the block stands.

A content check knows the block and nothing else: it gives :class:`Fault`.  Whoever walks a tree knows the way there: it
makes a :class:`Damage` of the fault.  So one content check serves programs that check, dump, list and repair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Literal

    Severity = Literal["advisory", "non_fatal", "fatal"]

ADVISORY: Severity = "advisory"
"""Worth knowing; the kernel lives with it."""
NON_FATAL: Severity = "non_fatal"
"""Wrong, but nothing is lost and nothing will be: leaks, underfull nodes."""
FATAL: Severity = "fatal"
"""The metadata cannot be trusted."""
SEVERITIES = (ADVISORY, NON_FATAL, FATAL)
"""From light to grave."""

UNBOUNDED = 1 << 64
"""End of a range of keys that reaches to the end of the key space."""


def gravest(severities: list[Severity]) -> Severity | None:
    """Return the worst of several severities, None of none."""
    return max(severities, key=SEVERITIES.index, default=None)


class Fault:
    """One broken rule of the format.

    :ivar rule: the rule, in the few words that messages and tests use
    :ivar detail: what was found, and what should have been
    :ivar severity: :data:`FATAL` when the block's content must not be used
    """

    __slots__ = ("detail", "rule", "severity")

    def __init__(self, rule: str, detail: str = "", severity: Severity = FATAL) -> None:
        self.rule = rule
        self.detail = detail
        self.severity = severity

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}" if self.detail else self.rule

    def __repr__(self) -> str:
        return f"Fault({self.rule!r}, {self.detail!r}, {self.severity!r})"


class Damage:
    """A fault and its place in a tree.

    :ivar block: the metadata block at fault
    :ivar path: metadata blocks from the start of the tree down to *block*, both included
    :ivar begin: smallest key that may be affected
    :ivar end: the key behind the largest, :data:`UNBOUNDED` at the end of the key space
    """

    __slots__ = ("begin", "block", "end", "fault", "path")

    def __init__(self, fault: Fault, path: tuple[int, ...], begin: int = 0, end: int = UNBOUNDED) -> None:
        self.fault = fault
        self.block = path[-1]
        self.path = path
        self.begin = begin
        self.end = end

    def __str__(self) -> str:
        return f"{self.fault} (block {self.block}, keys {show_range(self.begin, self.end)})"

    def __repr__(self) -> str:
        return f"Damage({self.fault!r}, path={self.path}, begin={self.begin}, end={self.end})"


def show_range(begin: int, end: int) -> str:
    """Word a range of keys as in ``[10..20]``, both ends included; an open end is left out."""
    return f"[{begin}..{'' if end >= UNBOUNDED else end - 1}]"
