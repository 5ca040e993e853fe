"""Every cache script on every engine, kind of device, block size and several cache sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bufio import AsyncEngine, Bcache, Client, SyncEngine
from bufio.core import BUFFER_OVERHEAD_BYTES
from tests.support.bcache_script import BcacheMachine
from tests.support.cache_disks import CrashDisk, Disk, FaultyDisk, FileDisk, direct_is_refused
from tests.support.cache_model import pattern
from tests.support.cache_script import load
from tests.support.client_script import ClientMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bufio.engine import Engine
    from tests.support.cache_script import Script

    Pair = tuple[Disk, Disk]

SCRIPTS = Path(__file__).parent / "cache_scripts"
SECTOR_BYTES = 512
NR_BLOCKS = 24
CLIENT_BUFFERS = {512: (8, 16), 4096: (8, 11), 65536: (8,)}
"""Block sizes, with the room that caches have: the least that there is, and more, but never for the whole device."""
BCACHE_BLOCKS = {512: (1, 6), 4096: (1, 9), 65536: (6,)}
IMAGES = {
    size: tuple(pattern(f"initial {name} {size}", NR_BLOCKS * size) for name in ("a", "b")) for size in CLIENT_BUFFERS
}
IN_MEMORY: dict[str, Callable[[bytes], Disk]] = {"memory": Disk, "faulty": FaultyDisk, "crash": CrashDisk}
FAULTS = ("break_reads", "break_writes", "break_flush")


@pytest.fixture(scope="module", params=[SyncEngine, AsyncEngine])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine: Engine = request.param()
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["file", "direct", *IN_MEMORY])
def disks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Pair]]:
    """Two devices for each block size, all of one kind."""
    kind: str = request.param
    directory = tmp_path_factory.mktemp(kind)
    refusal = direct_is_refused(directory) if kind == "direct" else None
    if refusal is not None:
        pytest.skip(refusal)

    def make(name: str, image: bytes) -> Disk:
        return IN_MEMORY[kind](image) if kind in IN_MEMORY else FileDisk(image, directory / name, kind == "direct")

    made = {size: (make(f"a-{size}", first), make(f"b-{size}", second)) for size, (first, second) in IMAGES.items()}
    yield made
    for pair in made.values():
        for disk in pair:
            disk.close()


@pytest.mark.parametrize("script", load(SCRIPTS / "client", ClientMachine), ids=lambda script: script.name)
def test_client_does_what_the_script_says(script: Script, engine: Engine, disks: dict[int, Pair]) -> None:
    for size, (disk, _) in disks.items():
        for nr_buffers in CLIENT_BUFFERS[size]:
            cache_bytes = nr_buffers * (size + BUFFER_OVERHEAD_BYTES)
            device = disk.faulty if script.uses(*FAULTS) else disk.device
            try:
                client = Client(device, size, engine=engine, cache_bytes=cache_bytes)
                ClientMachine(client, disk, nr_buffers).run(script)
            finally:
                disk.put_back()


@pytest.mark.parametrize("script", load(SCRIPTS / "bcache", BcacheMachine), ids=lambda script: script.name)
def test_bcache_does_what_the_script_says(script: Script, engine: Engine, disks: dict[int, Pair]) -> None:
    for size, pair in disks.items():
        for nr_blocks in BCACHE_BLOCKS[size]:
            if nr_blocks < script.needs:
                continue
            named = {
                name: (d, d.faulty if script.uses(*FAULTS) else d.device) for name, d in zip("ab", pair, strict=True)
            }
            try:
                bcache = Bcache(size // SECTOR_BYTES, nr_blocks, engine=engine)
                BcacheMachine(bcache, size, named).run(script)
            finally:
                for disk in pair:
                    disk.put_back()
