"""What stands between a user and the wrong output file."""

from __future__ import annotations

import os
import stat
import sys

from persistent_data.layout import BLOCK_SIZE
from thinpool.pack import is_superblock

from ._cli import Failure

_QUESTION = "The destination appears to already contain metadata, are you sure? [y/n]: "


def status_of(path: str) -> os.stat_result | None:
    """Return the status of a file, None if there is none."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def refuse_same_file(one: int, status: os.stat_result | None, path: str) -> None:
    """Raise Failure if *path*, whose status is given, is the file that is open as *one*, or the same device."""
    if status is None:
        return
    other = os.fstat(one)
    same_device = stat.S_ISBLK(status.st_mode) and stat.S_ISBLK(other.st_mode) and status.st_rdev == other.st_rdev
    if same_device or os.path.samestat(status, other):
        raise Failure(f"'{path}' is both the input and the output")


def confirm(path: str, status: os.stat_result | None) -> None:
    """Ask, if *path* begins with a superblock of some kind, whether to overwrite it.

    :raises Failure: the answer is not yes
    """
    if status is None or not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        return
    with open(path, "rb") as file:
        block = file.read(BLOCK_SIZE)
    if len(block) < BLOCK_SIZE or not is_superblock(block):
        return
    if sys.stderr is not None:
        sys.stderr.write(_QUESTION)
        sys.stderr.flush()
    answer = sys.stdin.readline() if sys.stdin is not None else ""
    if answer.strip().lower() not in ("y", "yes"):
        raise Failure("Output file not overwritten")
