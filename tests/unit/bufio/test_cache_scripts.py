"""Every cache script on every engine, kind of device, block size and several cache sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import bufio
from bufio import Client, SyncEngine
from bufio.core import BUFFER_OVERHEAD_BYTES
from tests.support.cache_disks import CrashDisk, Disk, FaultyDisk, FileDisk, direct_is_refused
from tests.support.cache_model import pattern
from tests.support.cache_script import load
from tests.support.client_script import ClientMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bufio.engine import Engine
    from tests.support.cache_script import Script

SCRIPTS = Path(__file__).parent / "cache_scripts"
NR_BLOCKS = 32
BUFFER_COUNTS = {512: (8, 24), 4096: (8, 11), 65536: (8, 24)}
"""Block sizes, with the room that caches have: the least that there is, and more, but never for the whole device."""
IMAGES = {size: pattern(f"initial {size}", NR_BLOCKS * size) for size in BUFFER_COUNTS}

ENGINES: list[Callable[[], Engine]] = [SyncEngine]
if hasattr(bufio, "AsyncEngine"):
    ENGINES.append(bufio.AsyncEngine)
SIMPLE = {"memory": Disk, "faulty": FaultyDisk, "crash": CrashDisk}
KINDS = ("file", "direct", "memory", "faulty", "crash")


@pytest.fixture(scope="module", params=KINDS)
def disks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Disk]]:
    """One device for each block size, of one kind."""
    made: dict[int, Disk] = {}
    for size, image in IMAGES.items():
        if request.param in SIMPLE:
            made[size] = SIMPLE[request.param](image)
            continue
        directory = tmp_path_factory.mktemp(f"{request.param}-{size}")
        refusal = direct_is_refused(directory) if request.param == "direct" else None
        if refusal is not None:
            pytest.skip(refusal)
        made[size] = FileDisk(image, directory, direct=request.param == "direct")
    yield made
    for disk in made.values():
        disk.close()


@pytest.mark.parametrize("engine_class", ENGINES)
@pytest.mark.parametrize("script", load(SCRIPTS / "client", ClientMachine), ids=lambda script: script.name)
def test_client_does_what_the_script_says(
    script: Script, engine_class: Callable[[], Engine], disks: dict[int, Disk]
) -> None:
    engine = engine_class()
    for size, disk in disks.items():
        for nr_buffers in BUFFER_COUNTS[size]:
            cache_bytes = nr_buffers * (size + BUFFER_OVERHEAD_BYTES)
            device = disk.faulty if script.uses("break_reads", "break_writes") else disk.device
            client = Client(device, size, engine=engine, cache_bytes=cache_bytes)
            try:
                ClientMachine(client, disk, nr_buffers).run(script)
            finally:
                disk.put_back()
