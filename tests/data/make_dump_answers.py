#!/usr/bin/env python3
"""Record what the reference's thin_dump writes in its other formats: dumps.txt, a SHA-256 for each dump.

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
    (HERE / "dumps.txt").write_text("".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
