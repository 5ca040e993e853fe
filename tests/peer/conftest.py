"""What there is nothing to compare with is left out, and not skipped: no oracle is missing."""

from __future__ import annotations

from tests.support import peers

collect_ignore = []
if not peers.is_available() or peers.peer_version().startswith("0."):
    # Packers came with 1.0; THINPOOL_PEER_DIR may name a build that has them.
    collect_ignore.append("test_live_packs.py")
