"""Work through a pool that is larger than the cache, and report the peak of resident memory as JSON.

Run by :mod:`tools.bench.engine` in a process of its own::

    python -m tools.bench.memory POOL CACHE_BYTES

The work: iterate over all mappings of device 0, look up and overwrite blocks at random, commit.  Peaks are taken from
VmHWM, which starts anew with the program; ``ru_maxrss`` would include the process that started this one.
"""

from __future__ import annotations

import json
import random
import sys

from thinpool import PoolMetadata

NR_LOOKUPS = 50_000
NR_INSERTS = 20_000
COMMIT_EVERY = 1000


def peak_bytes() -> int:
    """The most memory that was ever resident in this process."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError("the kernel does not report VmHWM")


def main(argv: list[str]) -> int:
    """Do the work on the pool *argv*[0] with a cache of *argv*[1] bytes."""
    path, cache_bytes = argv[0], int(argv[1])
    peaks = {"imports": peak_bytes()}
    rnd = random.Random(1)
    with PoolMetadata.open(path, cache_bytes=cache_bytes) as pool, pool.open_thin_device(0) as device:
        nr_mappings = sum(run.length for run in device.mappings())
        peaks["iterate"] = peak_bytes()
        for _ in range(NR_LOOKUPS):
            device.find_block(rnd.randrange(nr_mappings))
        peaks["look up"] = peak_bytes()
        for number in range(NR_INSERTS):
            device.insert_block(rnd.randrange(nr_mappings), pool.alloc_data_block())
            if number % COMMIT_EVERY == COMMIT_EVERY - 1:
                pool.commit()
        peaks["insert"] = peak_bytes()
    json.dump({"nr_mappings": nr_mappings, "cache_bytes": cache_bytes, "peaks": peaks}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
