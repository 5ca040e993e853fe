"""Pools in a real Linux kernel: boots User-Mode Linux on image files and tells what came of it.

:func:`run_kernel` runs a shell script there, :func:`run_steps` a list of pool operations (:class:`Steps`), which
is much faster per operation.  A boot costs two to three seconds.  Tests that call either are marked ``kernel``;
tests/conftest.py skips them where the Debian packages user-mode-linux, kmod and dmsetup are missing.
"""

import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.image import BLOCK, Image

UML = Path(__file__).with_name("uml")
RUNNER = UML / "kernel-run"
AGENT = UML / "agent.py"

#: The agent writes results here; enough for a boot on a busy machine, far below any test's patience.
DEADLINE = 240


class KernelRunError(AssertionError):
    """The guest kernel or the script in it failed; the message has what both said."""


@dataclass(frozen=True)
class KernelResult:
    """What a script said."""

    status: int
    stdout: str
    stderr: str
    dmesg: str


def run_kernel(
    script: str,
    *,
    meta: Path,
    data: Path,
    out: Path | None = None,
    check: bool = True,
    timeout: float = DEADLINE,
) -> KernelResult:
    """Run *script* (bash, with the functions of ``uml/guest.sh``) on the two images, which it may change.

    :param out: a directory that the script can write as ``$OUT``
    :raises KernelRunError: with *check*, when the script's exit status is not 0
    """
    with tempfile.TemporaryDirectory(prefix="kernel.") as scratch:
        dmesg = Path(scratch) / "dmesg"
        words: list[str | Path] = [sys.executable, RUNNER, "--meta", meta, "--data", data, "--dmesg", dmesg]
        words += ["--timeout", str(timeout)]
        if out is not None:
            words += ["--out", out]
        done = subprocess.run([*words, "-c", script], capture_output=True, text=True, timeout=timeout + 30, check=False)
        messages = dmesg.read_text(errors="replace") if dmesg.exists() else ""
    result = KernelResult(done.returncode, done.stdout, done.stderr, messages)
    if check and result.status != 0:
        said = "\n".join(line for line in messages.splitlines() if "device-mapper" in line)
        raise KernelRunError(f"status {result.status}\n{result.stdout}\n{result.stderr}\n{said}")
    return result


class Steps:
    """A list of steps for ``uml/agent.py``; every method adds one and names a method of its ``Agent``.

    Each method returns the index of its result in :attr:`StepResults.values`.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[str, dict[str, Any]]] = []

    def add(self, name: str, **arguments: Any) -> int:
        """Add a step; with ``may_fail=True`` its errno is a result, else the run ends there."""
        self.steps.append((name, arguments))
        return len(self.steps) - 1

    def pool_create(
        self, block: int, blocks: int, features: Iterable[str] = ("skip_block_zeroing",), **more: Any
    ) -> int:
        """Activate the pool over *blocks* data blocks of *block* sectors each."""
        return self.add("pool_create", block=block, blocks=blocks, features=list(features), **more)

    def pool_reload(
        self, block: int, blocks: int, features: Iterable[str] = ("skip_block_zeroing",), **more: Any
    ) -> int:
        """Suspend, load a table for *blocks* data blocks, resume: this is how a pool grows."""
        return self.add("pool_reload", block=block, blocks=blocks, features=list(features), **more)

    def message(self, text: str, **more: Any) -> int:
        """Send a message to the pool."""
        return self.add("message", text=text, **more)

    def write(self, dev: int, blocks: Iterable[int], seed: int, **more: Any) -> int:
        """Write a mark to each of *blocks*, in the order given."""
        return self.add("write", dev=dev, blocks=in_runs(blocks), seed=seed, **more)

    def marks(self, dev: int, blocks: Iterable[int]) -> int:
        """Read the mark of each of *blocks*."""
        return self.add("marks", dev=dev, blocks=in_runs(blocks))


def in_runs(numbers: Iterable[int]) -> list[list[int]]:
    """The numbers, in their order, as half-open ranges of ascending neighbours."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n:
            runs[-1][1] = n + 1
        else:
            runs.append([n, n + 1])
    return runs


@dataclass(frozen=True)
class StepResults:
    """What the agent did."""

    values: list[Any]
    errnos: dict[int, int]
    """Step index -> errno, for steps that failed."""
    checkpoints: list[Image]
    """The metadata device at each checkpoint."""
    dmesg: str = field(repr=False)


def run_steps(steps: Steps, *, meta: Path, data: Path, cut: bool = False, timeout: float = DEADLINE) -> StepResults:
    """Boot a kernel on the two images and execute the steps.

    :param cut: the guest's power is cut after the last step; otherwise everything is deactivated in order
    :raises KernelRunError: a step failed that was not marked ``may_fail``, or the kernel died
    """
    with tempfile.TemporaryDirectory(prefix="steps.") as scratch:
        out = Path(scratch)
        (out / "steps.json").write_text(json.dumps(steps.steps))
        script = f'"$KR_PYTHON" -E -S -s {AGENT} "$OUT/steps.json" "$OUT"'
        # host_kill ends the guest from outside; what the agent reports is on the host's disk by then.
        done = run_kernel(
            script + (" && host_kill" if cut else ""), meta=meta, data=data, out=out, check=False, timeout=timeout
        )
        results_file = out / "results.json"
        results = json.loads(results_file.read_text()) if results_file.exists() else []
        if done.status != 0 or len(results) != len(steps.steps):
            failed = results[-1] if results else "no results"
            raise KernelRunError(f"status {done.status} after {len(results)} steps: {failed}\n{done.stderr}")
        checkpoints = list(read_trace((out / "trace").read_bytes()))
    return StepResults(
        values=[r.get("value") for r in results],
        errnos={i: r["errno"] for i, r in enumerate(results) if "errno" in r},
        checkpoints=checkpoints,
        dmesg=done.dmesg,
    )


def read_trace(trace: bytes) -> Iterator[Image]:
    """The device images that the agent's checkpoints describe, each the one before with some blocks replaced."""
    blocks: dict[int, bytes] = {}
    position = 0
    while position < len(trace):
        nr_blocks, nr_changed = struct.unpack_from("<QQ", trace, position)
        position += 16
        blocks = dict(blocks)
        for _ in range(nr_changed):
            (number,) = struct.unpack_from("<Q", trace, position)
            blocks[number] = trace[position + 8 : position + 8 + BLOCK]
            position += 8 + BLOCK
        yield Image(blocks, nr_blocks)


def make_sparse(path: Path, size_bytes: int) -> Path:
    """An image of zeros that takes no room."""
    with path.open("wb") as f:
        f.truncate(size_bytes)
    return path


def stamp(path: Path, block_sectors: int, blocks: Iterable[int]) -> None:
    """Write into each of the data blocks its own number, as the kernel's reads will show it."""
    pack = struct.Struct("<8sQQQ").pack
    rest = bytes(512 - 32)
    with path.open("r+b") as f:
        for n in blocks:
            f.seek(n * block_sectors * 512)
            f.write(pack(b"kr-stamp", n, n, n) + rest)


def marks_in(path: Path, block_sectors: int, blocks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(kind, number, seed) of each of the data blocks of an image, as the agent's ``marks`` tells them."""
    unpack = struct.Struct("<8sQQQ").unpack
    found = []
    with path.open("rb") as f:
        for n in blocks:
            f.seek(n * block_sectors * 512)
            magic, a, b, c = unpack(f.read(32))
            if magic == b"kr-stamp" and a == b == c:
                found.append((1, a, 0))
            elif magic == b"kr-wrote":
                found.append((2, c, a << 24 | b))
            else:
                found.append((0, 0, 0) if magic == bytes(8) else (3, 0, 0))
    return found
