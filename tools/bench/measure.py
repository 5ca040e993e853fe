"""Clocks, medians and tables for the measurements.

A measurement here is a function that does a known number of operations and returns a :class:`Lap`.  Rivals take turns
within a round (:func:`interleave`), so that whatever else the machine does hits all of them; what is reported is the
median over the rounds, with the extremes beside it.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["Lap", "Result", "Stopwatch", "environment", "interleave", "one_core", "table"]


@dataclass(frozen=True)
class Lap:
    """One run: *operations* done in *cpu* seconds of this process and *wall* seconds of the world."""

    operations: int
    cpu: float
    wall: float


class Stopwatch:
    """Time that can be stopped for preparations: ``with watch.running(): ...`` adds to it."""

    def __init__(self) -> None:
        self.cpu = 0.0
        self.wall = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time spent in the block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall

    def lap(self, operations: int) -> Lap:
        """What was counted so far, as the time of that many operations."""
        return Lap(operations, self.cpu, self.wall)


@dataclass
class Result:
    """The laps of one contestant."""

    name: str
    laps: list[Lap] = field(default_factory=list)

    def seconds(self, clock: str) -> list[float]:
        """Seconds for one operation, lap by lap, by the clock ``cpu`` or ``wall``."""
        return [getattr(lap, clock) / lap.operations for lap in self.laps]

    def median_seconds(self, clock: str) -> float:
        """Median of the seconds for one operation."""
        return statistics.median(self.seconds(clock))

    def rates(self, clock: str) -> tuple[float, float, float]:
        """Operations a second: slowest, median, fastest."""
        seconds = self.seconds(clock)
        return 1 / max(seconds), 1 / statistics.median(seconds), 1 / min(seconds)


def interleave(contestants: dict[str, Callable[[], dict[str, Lap]]], rounds: int) -> dict[str, dict[str, Result]]:
    """Run all contestants *rounds* times in turn, beginning with another one each round.

    A contestant does one lap of each of its operations and returns them by name; the results are by operation, then by
    contestant.  The garbage collector runs before each and stays on: users have it on.
    """
    results: dict[str, dict[str, Result]] = {}
    names = list(contestants)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            for operation, lap in contestants[name]().items():
                results.setdefault(operation, {}).setdefault(name, Result(name)).laps.append(lap)
    return {operation: {name: by_name[name] for name in names} for operation, by_name in results.items()}


@contextmanager
def one_core() -> Iterator[int]:
    """Stay on one of the cores that this process may use, so that "on one core" is meant literally."""
    before = os.sched_getaffinity(0)
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def environment(packages: Iterable[str]) -> dict[str, str]:
    """What a reader has to know about the machine and the versions to compare figures."""
    found = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()} ({platform.python_compiler()})",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "switches": " ".join(sys.orig_argv[1:]),
    }
    for package in packages:
        found[package] = metadata.version(package)
    return found


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    cells = [list(heading), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heading))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
