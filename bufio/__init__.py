"""Write-back caches of the blocks of devices, with the semantics of Linux dm-bufio and of LVM's bcache.

    >>> with FileDevice("disk.img") as device, Client(device) as client:
    ...     buffer = client.read(7)

They know nothing of what is in the blocks.  Source: docs/bufio.md.  What tests of programs on top of it need, devices
that fail and devices that remember, is in :mod:`bufio.testing`.

The names below are loaded when they are first used: a tool that only reads a device does not pay for the caches.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bufio.bcache import Bcache, BcacheStats, Block, GetFlags
    from bufio.client import Buffer, Client
    from bufio.core import Stats
    from bufio.device import Device, FileDevice, MemoryDevice
    from bufio.engine import AsyncEngine, SyncEngine
    from bufio.errors import BlocksNotWritten, HoldError, WouldDeadlock
    from bufio.memory import parameters

_HOMES = {
    "AsyncEngine": "engine",
    "Bcache": "bcache",
    "BcacheStats": "bcache",
    "Block": "bcache",
    "BlocksNotWritten": "errors",
    "Buffer": "client",
    "Client": "client",
    "Device": "device",
    "FileDevice": "device",
    "GetFlags": "bcache",
    "HoldError": "errors",
    "MemoryDevice": "device",
    "Stats": "core",
    "SyncEngine": "engine",
    "WouldDeadlock": "errors",
    "parameters": "memory",
}

__all__ = [
    "AsyncEngine",
    "Bcache",
    "BcacheStats",
    "Block",
    "BlocksNotWritten",
    "Buffer",
    "Client",
    "Device",
    "FileDevice",
    "GetFlags",
    "HoldError",
    "MemoryDevice",
    "Stats",
    "SyncEngine",
    "WouldDeadlock",
    "parameters",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
