"""A tour of thinpool: check a pool, list it, snapshot a device, change the snapshot, commit, show what changed.

    python examples/tour.py                   on a copy of sample_pool.img.xz, which Linux 6.1 wrote
    python examples/tour.py METADATA ORIGIN   on a copy of an inactive pool's metadata, with a device to snapshot

Nothing but the copy is ever written, and it is removed in the end.
"""

from __future__ import annotations

import lzma
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bufio import FileDevice
from thinpool import PoolMetadata, delta
from thinpool.check import check_report
from thinpool.listing import format_table, list_devices

if TYPE_CHECKING:
    from thinpool import ThinDevice

SAMPLE = Path(__file__).with_name("sample_pool.img.xz")
SAMPLE_ORIGIN = 1
COLUMNS = ["DEV", "MAPPED", "EXCLUSIVE", "SHARED", "TRANSACTION", "CREATE_TIME", "SNAP_TIME"]


def say(text: str) -> None:
    """Print a paragraph, indented below its heading."""
    print("".join(f"    {line.rstrip()}\n" for line in text.splitlines()))


def check(path: Path) -> None:
    """Check every rule of the format and count every reference; stop the tour if anything is wrong."""
    with FileDevice(path, read_only=True) as device:
        report = check_report(device)
    say(str(report))
    if not report.ok:
        sys.exit("the tour needs a sound pool")


def list_pool(path: Path) -> None:
    """Show each device, and how much of what it maps nobody else does."""
    with FileDevice(path, read_only=True) as device:
        say(format_table(COLUMNS, list_devices(device, COLUMNS)))


def show_delta(left: ThinDevice, right: ThinDevice) -> None:
    """Show the thin blocks that two devices map to different data blocks, or only one of them maps."""
    heading = ("thin blocks", f"device {left.dev_id}", f"device {right.dev_id}")
    rows = [
        (f"[{d.thin_begin}..{d.thin_begin + d.length}]", where(d.left_data_begin), where(d.right_data_begin))
        for d in delta(left, right)
    ]
    say("\n".join(f"{blocks:<16}{one:>10}{other:>10}" for blocks, one, other in [heading, *rows]))


def where(data_block: int | None) -> str:
    """Word one side of a difference."""
    return "-" if data_block is None else f"at {data_block}"


def tour(path: Path, origin: int) -> None:
    """Walk through the steps on the pool at *path*, which is changed."""
    print("Check the pool")
    check(path)
    print("List its devices")
    list_pool(path)

    with PoolMetadata.open(path) as pool:
        snapshot = max(pool.devices(), default=-1) + 1
        free, free_metadata = pool.free_block_count, pool.free_metadata_block_count

        print(f"Take a snapshot of device {origin}: device {snapshot}")
        pool.create_snap(snapshot, origin)
        with pool.open_thin_device(snapshot) as device:
            end = (device.highest_mapped_block or 0) + 1
            first = device.find_mapped_range(0, end)
            say(
                f"{device.mapped_count} blocks mapped, {free - pool.free_block_count} data blocks used for it\n"
                f"first run: [{first.thin_begin}..{first.thin_end}] at data block {first.pool_begin}, shared: "
                f"{first.maybe_shared}"
            )

            print("Change the snapshot, as writes and a discard would")
            written = first.thin_begin
            device.insert_block(written, pool.alloc_data_block())
            found = device.find_block(written)
            runs = device.provision(end, 8)
            discarded = device.find_mapped_range(end // 2, end).thin_begin
            device.remove_range(discarded, discarded + 4)
            say(
                f"write to block {written}: sharing broken, now at data block {found.block}, shared: {found.shared}\n"
                f"provision [{end}..{end + 8}]: {', '.join(f'{run.length} at {run.data_begin}' for run in runs)}\n"
                f"discard [{discarded}..{discarded + 4}]: {device.mapped_count} blocks mapped"
            )

        print("Commit")
        pool.commit()
        say(
            f"{free - pool.free_block_count} data blocks and {free_metadata - pool.free_metadata_block_count} metadata "
            f"blocks taken, {pool.free_block_count} and {pool.free_metadata_block_count} free"
        )

        print(f"What changed between device {origin} and its snapshot")
        with pool.open_thin_device(origin) as left, pool.open_thin_device(snapshot) as right:
            show_delta(left, right)

    print("Check again, list again")
    check(path)
    list_pool(path)


def main(argv: list[str] | None = None) -> int:
    """Make the copy and start."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) not in (0, 2):
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="thinpool-tour-") as directory:
        copy = Path(directory) / "metadata.img"
        if arguments:
            shutil.copyfile(arguments[0], copy)
            tour(copy, int(arguments[1]))
        else:
            copy.write_bytes(lzma.decompress(SAMPLE.read_bytes()))
            tour(copy, SAMPLE_ORIGIN)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        sys.exit(f"tour: {error}")
