"""Tools that are told to stop: see docs/reliability.md.

The signal comes at a random moment after the tool has opened its input; before that Python itself is starting, which
answers for itself.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from bufio import MemoryDevice
from persistent_data.damage import FATAL
from tests.support.fixtures import image
from tests.support.leaks import with_random_leaks
from tests.support.tools import ROOT, command, run_process
from thinpool.check import check_report

MOMENTS = 2
"""For each tool and signal."""
_PATIENCE = 30.0  # seconds


class Job(NamedTuple):
    """What a tool is to do; in *words*, capitals are files."""

    words: tuple[str, ...]
    input: str = "POOL"
    output: str | None = None


JOBS = [
    Job(("thin_check", "POOL")),
    Job(("thin_check", "--auto-repair", "LEAKY"), "LEAKY"),
    Job(("thin_delta", "--thin1", "0", "--thin2", "0", "--verbose", "POOL")),
    Job(("thin_dump", "POOL")),
    Job(("thin_dump", "-o", "NEW", "POOL"), output="NEW"),
    Job(("thin_ls", "POOL")),
    Job(("thin_rmap", "--region", "0..1000000000", "POOL")),
    Job(("thin_metadata_pack", "-i", "POOL", "-o", "NEW"), output="NEW"),
    Job(("thin_metadata_unpack", "-i", "PACK", "-o", "NEW"), "PACK", "NEW"),
    Job(("thin_metadata_unpack", "-f", "-i", "PACK", "-o", "OLD"), "PACK", "OLD"),
]


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the files of the jobs begin with."""
    directory = tmp_path_factory.mktemp("contents")
    pool = image("deep")
    (directory / "pool").write_bytes(pool)
    assert run_process("thin_metadata_pack", "-i", directory / "pool", "-o", directory / "pack").status == 0
    return {
        "POOL": pool,
        "LEAKY": with_random_leaks(pool, 1),
        "OLD": image("random"),
        "PACK": (directory / "pack").read_bytes(),
    }


class Ended(NamedTuple):
    """A run of a tool, and the files it has left by name."""

    status: int
    stdout: bytes
    stderr: str
    files: dict[str, bytes]
    seconds: float
    """From when its input was open."""


def run(job: Job, contents: dict[str, bytes], place: Path, number: int = 0, moment: float = 0.0) -> Ended:
    """Let a tool work in the new directory *place*, and send it a signal when its input has been open for a moment."""
    place.mkdir()
    for name in {*job.words} & contents.keys():
        (place / name).write_bytes(contents[name])
    words = [str(place / word) if word.isupper() else word for word in job.words]
    opened = str(place / job.input)
    with (
        (place.parent / "stdout").open("wb") as stdout,
        subprocess.Popen(command(words[0], *words[1:]), cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE) as tool,
    ):
        until = time.monotonic() + _PATIENCE
        while tool.poll() is None and not _has_open(tool.pid, opened):
            assert time.monotonic() < until
        began = time.monotonic()
        if number:
            time.sleep(moment)
            tool.send_signal(number)
        _, stderr = tool.communicate(timeout=_PATIENCE)
    seconds = time.monotonic() - began
    files = {path.name: path.read_bytes() for path in place.iterdir()}
    return Ended(tool.returncode, (place.parent / "stdout").read_bytes(), stderr.decode(), files, seconds)


def _has_open(pid: int, path: str) -> bool:
    directory = f"/proc/{pid}/fd"
    try:
        return any(os.readlink(f"{directory}/{fd}") == path for fd in os.listdir(directory))
    except OSError:
        return False  # it has ended, or closed one of them meanwhile


def is_damaged(content: bytes) -> bool:
    return any(finding.severity == FATAL for finding in check_report(MemoryDevice(content)).findings)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: " ".join(job.words))
def test_a_tool_that_is_told_to_stop(job: Job, contents: dict[str, bytes], tmp_path: Path) -> None:
    whole = run(job, contents, tmp_path / "whole")
    assert whole.status == 0
    dice = random.Random(str(job))
    for number in (signal.SIGINT, signal.SIGTERM):
        for at in range(MOMENTS):
            moment = dice.uniform(0, whole.seconds)
            ended = run(job, contents, tmp_path / f"{number}-{at}", number, moment)
            try:
                require(job, contents, whole, ended, number)
            except AssertionError as error:
                error.add_note(f"{number!r} {moment:.4f} s after the input was opened")
                raise


def require(job: Job, contents: dict[str, bytes], whole: Ended, ended: Ended, number: int) -> None:
    """Fail if there is something amiss with a tool that got a signal, against one that did not."""
    if ended.status == 0:
        assert (ended.stdout, ended.files) == (whole.stdout, whole.files), "success, and something is missing"
        return
    assert ended.status in (64, -number), ended
    said = [line for line in ended.stderr.splitlines() if line not in whole.stderr.splitlines()]
    assert said == (["interrupted"] if ended.status == 64 else [])
    assert whole.stdout.startswith(ended.stdout)
    for name, before in contents.items():
        if name in (job.words):
            left = ended.files.pop(name)
            if name == "LEAKY":
                assert not is_damaged(left)
            elif name == job.output:
                assert left in (before, whole.files[name]) or is_damaged(left), "what is not whole looks sound"
            else:
                assert left == before
    if job.words[0] == "thin_dump":
        assert whole.files.get("NEW", b"").startswith(ended.files.pop("NEW", b""))
    assert ended.files in ({}, {name: whole.files[name] for name in ended.files if name == job.output}), "left behind"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_tool_that_waits_for_its_reader(number: int) -> None:
    """thin_metadata_size has no input, and is done at once if it can write."""
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb", buffering=0) as pipe:
        os.set_blocking(writing, False)
        while pipe.write(bytes(4096)):
            pass
        os.set_blocking(writing, True)
        with subprocess.Popen(
            command("thin_metadata_size", "-b", "64k", "-s", "1t", "-m", "100"),
            cwd=ROOT,
            stdout=pipe,
            stderr=subprocess.PIPE,
        ) as tool:
            asleep = 0
            while asleep < 20:
                state = Path(f"/proc/{tool.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
                asleep = asleep + 1 if state == "S" else 0
                time.sleep(0.01)
            tool.send_signal(number)
            _, stderr = tool.communicate(timeout=_PATIENCE)
    assert (tool.returncode, stderr) == ((64, b"interrupted\n") if number == signal.SIGINT else (-number, b""))
