"""What the scripts of every cache have in common: faults, statistics, kinds of errors."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar, Literal

from bufio import HoldError, WouldDeadlock
from tests.support.cache_script import Machine, ScriptError, instruction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bufio.testing.faulty import Rule
    from tests.support.cache_disks import Disk
    from tests.support.cache_script import Condition

_STATES = ("cached", "dirty", "held")


class CacheMachine(Machine):
    """A machine with a cache, whose statistics :meth:`stats` returns."""

    ERRORS: ClassVar = {
        "hold": lambda error: isinstance(error, HoldError),
        "deadlock": lambda error: isinstance(error, WouldDeadlock),
        "io": lambda error: isinstance(error, OSError) and error.errno == errno.EIO,
        "value": lambda error: isinstance(error, ValueError) and not isinstance(error, HoldError),
    }
    EVENTS: ClassVar[tuple[str, ...]] = ()
    """Names of the statistics that count what has happened."""

    def __init__(self, variables: Mapping[str, int]) -> None:
        super().__init__(variables)
        self._rules: list[Rule] = []
        self._baseline = dict.fromkeys(self.EVENTS, 0)

    # Faults

    def break_transfers(self, disk: Disk, kind: Literal["read", "write"], begin: int, end: int) -> None:
        """Let transfers that concern bytes ``[begin, end)`` of a disk fail."""
        self._rules.append(disk.faulty.on(kind, begin=begin, end=end).fail())

    def break_flushes(self, disk: Disk) -> None:
        """Let flushes of a disk fail."""
        self._rules.append(disk.faulty.on("flush").fail())

    @instruction("mend")
    def mend(self) -> None:
        """Let everything succeed again."""
        for rule in self._rules:
            rule.remove()
        self._rules.clear()

    # Statistics

    def stats(self) -> object:
        """Return a snapshot of the cache's statistics."""
        raise NotImplementedError

    def number(self, stats: object, name: str) -> int:
        """Return one of the numbers that scripts can ask for."""
        if name not in (*_STATES, *self.EVENTS):
            raise ScriptError(f"there is no statistic {name}: {', '.join((*_STATES, *self.EVENTS))}")
        number: int = getattr(stats, name)
        return number - self._baseline.get(name, 0)

    @instruction("recount")
    def recount(self) -> None:
        """Count events from here on."""
        stats = self.stats()
        self._baseline = {name: getattr(stats, name) for name in self.EVENTS}

    @instruction("expect <conditions:conditions>")
    def expect(self, conditions: list[Condition]) -> None:
        """Check statistics."""
        stats = self.stats()
        self.require(conditions, lambda name: self.number(stats, name))
