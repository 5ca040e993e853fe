#!/usr/bin/env python3
"""Record what the reference's readers make of every image, sound and damaged: answers.txt.

    make_answers.py OLD NEW

OLD has the programs of thin-provisioning-tools 0.9.0, NEW those of 1.1.0.  A line of answers.txt has an image, a command
line (the image goes last, OUTPUT stands for a temporary file), and for each version, newest first, the exit status and,
of what was printed on standard output, a quarter of the SHA-256; of thin_rmap also that of the lines sorted.  Of a
command that fails only the status is recorded, "-" where the version has no such program.
"""

import hashlib
import lzma
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
UNITS = ("BLOCKS", "SECTORS", "BYTES")
COLUMNS = [f"{part}_{unit}" for unit in UNITS for part in ("MAPPED", "EXCLUSIVE", "SHARED")]
COLUMNS = ["DEV", *COLUMNS, "MAPPED", "EXCLUSIVE", "SHARED", "TRANSACTION", "CREATE_TIME", "SNAP_TIME"]


def main(old, new):
    lines = []
    devices = {}
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "image"
        for directory in (HERE, HERE / "damaged"):
            sound = directory == HERE
            for packed in sorted(directory.glob("*.img.xz")):
                name = packed.name.removesuffix(".img.xz")
                content = lzma.decompress(packed.read_bytes())
                image.write_bytes(content)
                if sound:
                    listed = run(new, ["thin_ls", "--no-headers", "-o", "DEV"], image).stdout
                    (held,) = struct.unpack_from("<Q", content, 56)
                    (nr_data_blocks,) = struct.unpack_from("<Q", content, 64)
                    devices[name] = [int(word) for word in listed.split()], held, nr_data_blocks
                    base = name
                else:
                    base = made_from(directory / f"{name}.expected.txt")
                for command in dict.fromkeys(map(tuple, commands(*devices[base], sound))):
                    answers = "  ".join(answer(version, command, image) for version in (new, old))
                    lines.append(f"{name}: {' '.join(command)}: {answers}\n")
    (HERE / "answers.txt").write_text("".join(lines))


def made_from(expected):
    for line in expected.read_text().splitlines():
        if line.startswith("made from "):
            return line.split()[2]
    raise ValueError(expected)


def commands(devices, held, nr_data_blocks, sound):
    yield ["thin_check"]
    for option in ("--ignore-non-fatal-errors", "--skip-mappings", "--super-block-only"):
        yield ["thin_check", option]
    yield ["thin_metadata_pack", "-o", "OUTPUT", "-i"]
    yield ["thin_dump"]
    yield ["thin_dump", "--skip-mappings"]
    yield ["thin_ls"]
    yield ["thin_ls", "--no-headers", "-o", ",".join(COLUMNS)]
    yield ["thin_rmap", "--region", f"0..{nr_data_blocks}"]
    if sound:
        yield ["thin_dump", "-f", "human_readable"]
        yield ["thin_rmap", "--region", "7..8", "--region", f"{nr_data_blocks // 3}..{nr_data_blocks // 2}"]
    if devices:
        first, middle, last = devices[0], devices[len(devices) // 2], devices[-1]
        yield ["thin_dump", "--dev-id", str(middle)]
        yield ["thin_delta", "--thin1", str(first), "--thin2", str(last)]
        if sound:
            yield ["thin_delta", "--verbose", "--thin1", str(first), "--thin2", str(last)]
            yield ["thin_delta", "--thin1", str(middle), "--thin2", str(first)]
            yield ["thin_delta", "--verbose", "--thin1", str(middle), "--thin2", str(first)]
        if held:
            yield ["thin_delta", "-m", "--thin1", str(first), "--thin2", str(last)]
    if held:
        yield ["thin_dump", "-m"]
        yield ["thin_ls", "-m"]


def run(programs, command, image):
    command = [str(image.with_name(word)) if word == "OUTPUT" else word for word in command]
    return subprocess.run([programs / command[0], *command[1:], image], capture_output=True, timeout=60)


def answer(programs, command, image):
    if not (programs / command[0]).exists():
        return "-"
    done = run(programs, command, image)
    if done.returncode != 0:
        return str(done.returncode)
    hashes = [short_hash(done.stdout)]
    if command[0] == "thin_rmap":
        hashes.append(short_hash(b"".join(sorted(done.stdout.splitlines(keepends=True)))))
    return " ".join(["0", *hashes])


def short_hash(content):
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
