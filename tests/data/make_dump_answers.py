#!/usr/bin/env python3
"""Record what the reference's thin_dump writes in its other formats, and what thin_ls says of the highest blocks:
dumps.txt, a SHA-256 for each output.  Those of thin_ls are of the cells with one blank between.

    make_dump_answers.py NEW OLD

NEW and OLD are directories with the programs of thin-provisioning-tools 1.1.0 and 0.9.0.
"""

import hashlib
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
HIGHEST = "DEV,HIGHEST_BLOCK,HIGHEST_SECTOR,HIGHEST_BYTE,HIGHEST_MAPPED"


def main(new, old):
    lines = []
    for path in sorted(HERE.glob("*.img.xz")):
        name = path.name.removesuffix(".img.xz")
        snapshots = [[]] + [["-m"]] * bool(list(HERE.glob(f"{name}.metasnap.xml*")))
        with tempfile.NamedTemporaryFile() as image:
            image.write(lzma.decompress(path.read_bytes()))
            image.flush()
            for version, programs, form in [("1.1.0", new, "human_readable"), ("0.9.0", old, "human_readable"), ("0.9.0", old, "xml")]:
                for snapshot in snapshots:
                    options = ["-f", form, *snapshot]
                    done = subprocess.run([programs / "thin_dump", *options, image.name], capture_output=True, check=True)
                    digest = hashlib.sha256(done.stdout).hexdigest()
                    lines.append(f"{digest} {version} {name} {' '.join(options)}\n")
            done = subprocess.run([new / "thin_ls", "-o", HIGHEST, image.name], capture_output=True, check=True)
            cells = b"".join(b" ".join(line.split()) + b"\n" for line in done.stdout.splitlines())
            lines.append(f"{hashlib.sha256(cells).hexdigest()} 1.1.0 {name} -o {HIGHEST}\n")
    (HERE / "dumps.txt").write_text("".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
