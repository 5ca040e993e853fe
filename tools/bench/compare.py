"""Contestants beside a counterpart: round by round, with a goal where there is one.

A ratio here is the median of the ratios of the single rounds, not the ratio of two medians: what the rest of the
machine does in a round hits both sides of it.  Whether a goal is met is decided likewise.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tools.bench.measure import table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tools.bench.measure import Result

__all__ = [
    "BLOCKS_PER_SECOND",
    "MIB_PER_SECOND",
    "MILLISECONDS",
    "NANOSECONDS",
    "Goal",
    "Row",
    "Unit",
    "report",
    "rows_of",
]


@dataclass(frozen=True)
class Unit:
    """How the time of one operation is shown: as it is (less is better), or as a rate (more is better)."""

    name: str
    factor: float
    """Shown is that times the seconds of an operation, or for a rate that divided by them."""
    is_rate: bool = False

    def of(self, seconds: float) -> float:
        """What is shown for an operation of that many *seconds*."""
        return self.factor / seconds if self.is_rate else self.factor * seconds


NANOSECONDS = Unit("ns per block", 1e9)
MILLISECONDS = Unit("ms", 1e3)
BLOCKS_PER_SECOND = Unit("blocks/s", 1, is_rate=True)
MIB_PER_SECOND = Unit("MiB/s", 1, is_rate=True)


@dataclass(frozen=True)
class Goal:
    """The value aimed at: *times* that of the counterpart, *plus* a constant of the same unit.

    At most that much for a time, at least that much for a rate.
    """

    times: float = 0.0
    plus: float = 0.0

    def __str__(self) -> str:
        terms = [f"{self.times:g} x"] if self.times else []
        terms += [f"{self.plus:,g}"] if self.plus else []
        return " + ".join(terms)


@dataclass(frozen=True)
class Row:
    """One operation of one contestant beside the same operation of its counterpart."""

    operation: str
    unit: Unit
    clock: str
    subject: Result
    counterpart: Result
    goal: Goal | None = None

    def values(self, result: Result) -> list[float]:
        """What *result*, of either side, comes to in each round."""
        return [self.unit.of(seconds) for seconds in result.seconds(self.clock)]

    @property
    def ratio(self) -> float:
        """The value as a multiple of the counterpart's."""
        pairs = zip(self.values(self.subject), self.values(self.counterpart), strict=True)
        return statistics.median(value / other for value, other in pairs)

    @property
    def of_goal(self) -> float | None:
        """The value as a multiple of the one aimed at; None without a goal."""
        if self.goal is None:
            return None
        times, plus = self.goal.times, self.goal.plus
        pairs = zip(self.values(self.subject), self.values(self.counterpart), strict=True)
        return statistics.median(value / (times * other + plus) for value, other in pairs)

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        of_goal = self.of_goal
        if of_goal is None:
            return None
        return of_goal >= 1 if self.unit.is_rate else of_goal <= 1

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data, with the value of every round."""
        values, others = self.values(self.subject), self.values(self.counterpart)
        return {
            "operation": self.operation,
            "contestant": self.subject.name,
            "counterpart": self.counterpart.name,
            "unit": self.unit.name,
            "clock": self.clock,
            "median": statistics.median(values),
            "counterpart_median": statistics.median(others),
            "ratio": self.ratio,
            "goal": None if self.goal is None else str(self.goal),
            "of_goal": self.of_goal,
            "is_met": self.is_met,
            "rounds": values,
            "counterpart_rounds": others,
        }


def rows_of(
    results: Mapping[str, Mapping[str, Result]],
    counterpart: str,
    unit: Unit,
    clocks: Sequence[str],
    goals: Mapping[tuple[str, str], Goal],
) -> list[Row]:
    """Set every contestant of *results* (by operation, then by contestant) beside *counterpart*.

    :param clocks: ``cpu``, ``wall`` or both; each makes a row of its own
    :param goals: by operation and contestant
    """
    return [
        Row(operation, unit, clock, result, by_name[counterpart], goals.get((operation, name)))
        for operation, by_name in results.items()
        for name, result in by_name.items()
        if name != counterpart
        for clock in clocks
    ]


def report(rows: Sequence[Row]) -> str:
    """An aligned table of *rows* that share their unit and the name of their counterpart."""
    first = rows[0]
    lines = []
    previous = ("", "")
    for row in rows:
        values = row.values(row.subject)
        here = (row.operation, row.subject.name)
        lines.append(
            [
                # What is as in the line above is left out.
                row.operation if row.operation != previous[0] else "",
                row.subject.name if here != previous else "",
                row.clock,
                f"{statistics.median(values):,.0f}",
                f"{min(values):,.0f} .. {max(values):,.0f}",
                f"{statistics.median(row.values(row.counterpart)):,.0f}",
                f"{row.ratio:.2f}",
                "" if row.goal is None else f"{'>=' if row.unit.is_rate else '<='} {row.goal}",
                {None: "", True: "yes", False: "no"}[row.is_met],
            ]
        )
        previous = here
    return table(
        [first.unit.name, "by", "clock", "median", "range", first.counterpart.name, "ratio", "goal", "met"], lines
    )
