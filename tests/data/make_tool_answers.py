#!/usr/bin/env python3
"""Record what the reference's thin_metadata_size and thin_metadata_pack give: metadata_size.txt, packs/NAME.pack.

    make_tool_answers.py DIRECTORY

DIRECTORY has the programs of thin-provisioning-tools 1.1.0.  Its packer leaves out blocks of some devices at random: a
pack is kept only if all that belongs in it is there, which for these sizes and two processors is always so.
"""

import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKED = ["block_1g", "metadata_snapshot", "mixed", "snapshot_chain", "transaction_id"]

UNITS = "bskmgtpeKMGTPE"
POOL = "-b 64k -s 1t -m 1000"
SIZES = [
    "-b 128 -s 2097152 -m 1",
    POOL,
    *(f"{POOL} -u {unit}{style}" for unit in UNITS for style in ("", " -n", " -n=short", " -n=long")),
    *(f"{POOL} --unit={unit}" for unit in ("byte", "sector", "kibibyte", "kilobyte", "KiB", "kB", "TiB", "TB")),
    *(f"{POOL} --numeric-only{style}" for style in ("", "=short", "=long")),
    # Limits of the data block size, and how it may be written.
    *(f"-b {size} -s 1t -m 1" for size in "0 64 127 128 129 256 384 2097152 2097153 2097280 4194304".split()),
    *(f"-b {size} -s 1t -m 1" for size in "65536b 128s 64k 64KiB 64kibibyte 1024K 1g 1GiB 1G".split()),
    # Pools that do not fill their last data block or leaf, the smallest and the largest.
    *(f"-b 128 -s {size} -m 0" for size in (0, 1, 127, 128, 129, 255, 16128, 16129, 16255, 16256, 32256)),
    *(f"-b 64k -s {size} -m 1" for size in ("15e", "8388608t", "31t", "31.5t", "32t")),
    *(f"-b 64k -s 1t -m {number}" for number in (0, 1, 4161600, 1 << 24)),
    # Rounding.
    *(f"-b 64k -s 64512k -m {number} -u m" for number in (1, 129, 246, 247, 248, 255, 260, 279, 311, 343, 375, 535)),
    "-b 735616 -s 2182064 -m 42995 -u g",
    "-b 411520 -s 7211373m -m 37527 -u g -n",
    # Usage.
    "-b 64k -s 1t",
    "-b 64k",
    "",
    f"{POOL} extra",
    f"{POOL} --bogus",
    f"{POOL} -u q",
    f"{POOL} -n=foo",
    *(f"-b {size} -s 1t -m 1" for size in ("abc", "k", "1.5m", "64kib", "16777216t", "99999999999999999999")),
    *(f"-b 64k -s 1t -m {number}" for number in ("abc", "-1", "18446744073709551616")),
]


def main(programs):
    with open(HERE / "metadata_size.txt", "w") as file:
        for line in SIZES:
            done = subprocess.run([programs / "thin_metadata_size", *line.split()], capture_output=True, text=True)
            file.write(f"== thin_metadata_size 1.1.0 {line}: exit status {done.returncode}\n")
            file.write(f"-- stdout\n{done.stdout}-- stderr\n{done.stderr}\n")
    (HERE / "packs").mkdir(exist_ok=True)
    for name in PACKED:
        with tempfile.NamedTemporaryFile() as image:
            image.write(lzma.decompress((HERE / f"{name}.img.xz").read_bytes()))
            image.flush()
            subprocess.run(
                [programs / "thin_metadata_pack", "-i", image.name, "-o", HERE / "packs" / f"{name}.pack"], check=True
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
