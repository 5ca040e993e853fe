"""Which of the outside witnesses are on this machine, and what happens to a test when one is missing.

A test marked ``peer`` or ``kernel`` that cannot run is skipped with the reason.  With ``THINPOOL_REQUIRE_ORACLES=1`` in
the environment it fails instead, so that continuous integration cannot lose an oracle unnoticed.  See docs/testing.md.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

__all__ = ["MISSING", "find_program", "give_up", "required"]

#: Where Debian puts administrators' programs, which an ordinary user's PATH may leave out.
_SYSTEM_DIRECTORIES = "/usr/sbin:/sbin:/usr/bin:/bin"
_UML_MODULES = Path("/usr/lib/uml/modules")


def find_program(name: str, path: str | None = None) -> str | None:
    """The first compiled program *name* on PATH or in the system's directories (only on *path*, if given).

    Scripts do not count: an installed thinpool has tools of the same names as the reference.
    """
    where = f"{os.environ.get('PATH', '')}:{_SYSTEM_DIRECTORIES}" if path is None else path
    for directory in where.split(":"):
        found = shutil.which(name, path=directory) if directory else None
        if found is not None:
            with open(found, "rb") as file:
                if file.read(4) == b"\x7fELF":
                    return found
    return None


def _missing_peer() -> str | None:
    directory = os.environ.get("THINPOOL_PEER_DIR")
    missing = [name for name in ("thin_check", "thin_dump", "thin_restore") if not find_program(name, directory)]
    if not missing:
        return None
    return f"{', '.join(missing)}: not in {directory or 'PATH'} (Debian package thin-provisioning-tools)"


def _missing_kernel() -> str | None:
    if platform.machine() != "x86_64":
        return f"user-mode Linux runs on x86_64, this is {platform.machine()}"
    packages = {"linux.uml": "user-mode-linux", "dmsetup": "dmsetup", "modprobe": "kmod"}
    missing = [f"{name} ({package})" for name, package in packages.items() if not find_program(name)]
    if not missing and not _UML_MODULES.is_dir():
        missing = [f"{_UML_MODULES} (user-mode-linux)"]
    return f"not installed: {', '.join(missing)} (Debian packages in parentheses)" if missing else None


def _missing_lvm() -> str | None:
    return None if find_program("lvm") else "not installed: lvm (Debian package lvm2)"


#: By marker, a function that says what is missing on this machine, or None.
MISSING: dict[str, Callable[[], str | None]] = {"peer": _missing_peer, "kernel": _missing_kernel, "lvm": _missing_lvm}


def required() -> bool:
    """Whether a missing oracle is a failure."""
    return os.environ.get("THINPOOL_REQUIRE_ORACLES", "0") not in ("", "0")


def give_up(reason: str) -> NoReturn:
    """End the running test because an oracle is missing: skip it, or fail it where oracles are required."""
    if required():
        pytest.fail(f"{reason}; THINPOOL_REQUIRE_ORACLES is set", pytrace=False)
    pytest.skip(reason)
