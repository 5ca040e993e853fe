"""A write-back cache of the blocks of a device, with the semantics of Linux dm-bufio.

It knows nothing of what is in the blocks.  Source: docs/bufio.md.
"""

from __future__ import annotations

from bufio.client import Client
from bufio.core import Buffer, Stats
from bufio.device import Device, FileDevice, MemoryDevice
from bufio.engine import AsyncEngine, SyncEngine
from bufio.errors import HoldError, WouldDeadlock
from bufio.memory import parameters

__all__ = [
    "AsyncEngine",
    "Buffer",
    "Client",
    "Device",
    "FileDevice",
    "HoldError",
    "MemoryDevice",
    "Stats",
    "SyncEngine",
    "WouldDeadlock",
    "parameters",
]
