"""The dm-thin metadata engine: what the kernel's dm-thin-metadata does, on the same on-disk format.

    >>> with thinpool.PoolMetadata.open("/dev/vg/pool_tmeta") as pool:
    ...     pool.create_snap(2, origin=1)

The names below are loaded when they are first used: a tool that only checks a pool does not pay for the engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thinpool.compare import delta
    from thinpool.differences import Difference
    from thinpool.errors import (
        Corrupt,
        DeviceBusy,
        DeviceExists,
        NoSuchDevice,
        NotMapped,
        OutOfSpace,
        ReadOnly,
        ThinError,
        TransactionMismatch,
        WouldBlock,
    )
    from thinpool.leak_repair import LeakRepair, repair_leaks
    from thinpool.metadata import DeviceDetails, PoolMetadata
    from thinpool.runs import Run
    from thinpool.thin_device import LookupResult, MappedRange, ThinDevice

_HOMES = {
    "Corrupt": "errors",
    "DeviceBusy": "errors",
    "DeviceDetails": "metadata",
    "DeviceExists": "errors",
    "Difference": "differences",
    "LeakRepair": "leak_repair",
    "LookupResult": "thin_device",
    "MappedRange": "thin_device",
    "NoSuchDevice": "errors",
    "NotMapped": "errors",
    "OutOfSpace": "errors",
    "PoolMetadata": "metadata",
    "ReadOnly": "errors",
    "Run": "runs",
    "ThinDevice": "thin_device",
    "ThinError": "errors",
    "TransactionMismatch": "errors",
    "WouldBlock": "errors",
    "delta": "compare",
    "repair_leaks": "leak_repair",
}

__all__ = [
    "Corrupt",
    "DeviceBusy",
    "DeviceDetails",
    "DeviceExists",
    "Difference",
    "LeakRepair",
    "LookupResult",
    "MappedRange",
    "NoSuchDevice",
    "NotMapped",
    "OutOfSpace",
    "PoolMetadata",
    "ReadOnly",
    "Run",
    "ThinDevice",
    "ThinError",
    "TransactionMismatch",
    "WouldBlock",
    "delta",
    "repair_leaks",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
