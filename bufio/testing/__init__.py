"""Devices for the tests of whoever stands on a device: one that fails as it is told, one that loses power.

Neither is loaded by ``import bufio``.  Source: docs/bufio.md, "bufio.testing".
"""

from __future__ import annotations

from bufio.testing.crash import CrashDevice, CrashImage, Discard, Event, Flush, Grow, Mark, Write
from bufio.testing.faulty import Call, FaultyDevice, Gate, GateTimeout, Kind, Rule, Selection

__all__ = [
    "Call",
    "CrashDevice",
    "CrashImage",
    "Discard",
    "Event",
    "FaultyDevice",
    "Flush",
    "Gate",
    "GateTimeout",
    "Grow",
    "Kind",
    "Mark",
    "Rule",
    "Selection",
    "Write",
]
