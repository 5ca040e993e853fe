"""``python -m tools thin_check ...``: run a tool by name."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from ._cli import EXIT_FAILURE, say

if TYPE_CHECKING:
    from collections.abc import Sequence

TOOLS = (
    "thin_check",
    "thin_delta",
    "thin_dump",
    "thin_ls",
    "thin_metadata_pack",
    "thin_metadata_size",
    "thin_metadata_unpack",
    "thin_rmap",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool that the first argument names with the others; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in TOOLS:
        status: int = import_module(f".{arguments[0]}", __package__).main(arguments[1:])
        return status
    if arguments:
        say("unrecognised command")
    say("Usage: <command> <args>\ncommands:\n" + "\n".join(f"  {name}" for name in TOOLS))
    return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
