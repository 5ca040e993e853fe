"""Run the distribution's thin-provisioning-tools: a second opinion on metadata that we wrote.

Tests that call this are marked ``peer``; tests/conftest.py skips them where the programs are missing.  The variable
THINPOOL_PEER_DIR names the directory of another build to compare with.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.support.oracles import MISSING, find_program, give_up

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Image",
    "PeerResult",
    "assert_accepted",
    "is_available",
    "peer_version",
    "run_peer",
    "run_thin_check",
    "run_thin_dump",
    "run_thin_restore",
]

Image = bytes | bytearray | memoryview | str | os.PathLike[str]
"""A metadata device: its bytes, or its path."""

_DEADLINE = 60  # seconds; the tools take less than one on anything the tests hand them


class PeerResult(NamedTuple):
    """What a program left behind.  ``stdout`` stays bytes, because a dump is compared byte for byte."""

    status: int
    stdout: bytes
    stderr: str


def is_available() -> bool:
    """Whether the reference tools are on this machine, for checks that are extra and skip nothing."""
    return MISSING["peer"]() is None


def run_peer(program: str, *arguments: str | os.PathLike[str]) -> PeerResult:
    """Run *program* of thin-provisioning-tools."""
    found = find_program(program, os.environ.get("THINPOOL_PEER_DIR"))
    if found is None:
        give_up(f"{program} is not installed")
    done = subprocess.run([found, *arguments], capture_output=True, timeout=_DEADLINE, check=False)
    return PeerResult(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


@cache
def peer_version() -> str:
    """The version of the tools, such as ``0.9.0``.  Its first number tells the C++ from the Rust implementation."""
    text = run_peer("thin_check", "-V").stdout.decode()
    match = re.search(r"\d+(\.\d+)+", text)
    assert match is not None, f"thin_check -V said {text!r}"
    return match[0]


@contextmanager
def _as_file(image: Image) -> Iterator[str]:
    if isinstance(image, bytes | bytearray | memoryview):
        with tempfile.NamedTemporaryFile(prefix="thinpool-", suffix=".img") as file:
            file.write(image)
            file.flush()
            yield file.name
    else:
        yield os.fspath(image)


def run_thin_check(image: Image, *options: str) -> PeerResult:
    """``thin_check`` of a path, or of the bytes of a metadata device."""
    with _as_file(image) as path:
        return run_peer("thin_check", *options, path)


def run_thin_dump(image: Image, *options: str) -> PeerResult:
    """``thin_dump`` of a path, or of the bytes of a metadata device; the XML is in ``stdout``."""
    with _as_file(image) as path:
        return run_peer("thin_dump", *options, path)


def run_thin_restore(xml: bytes, output: Path, size_bytes: int) -> PeerResult:
    """Make *output* a metadata device of *size_bytes* from *xml*.  Version 0.9.0 does not take ``<def>``."""
    with open(output, "wb") as file:
        file.truncate(size_bytes)
    with tempfile.NamedTemporaryFile(prefix="thinpool-", suffix=".xml") as file:
        file.write(xml)
        file.flush()
        return run_peer("thin_restore", "-i", file.name, "-o", output)


def assert_accepted(image: Image) -> None:
    """Fail, with everything it printed, unless ``thin_check`` finds nothing at all."""
    result = run_thin_check(image)
    assert result.status == 0, (
        f"thin_check {peer_version()} exits with {result.status}:\n{result.stdout.decode()}{result.stderr}"
    )
