"""Replacing a metadata block in one step, against doing it count by count.

Two stores get the same calls, one of them with the step taken away; after each commit their devices are the same.  The
blocks lie in three bitmaps, and the cursor of the search passes from one to the next and around.
"""

from __future__ import annotations

import random
from unittest.mock import patch

from hypothesis import event, given
from hypothesis import strategies as st

from bufio.core import BUFFER_OVERHEAD_BYTES
from persistent_data.block_manager import Validator
from persistent_data.errors import NoFreeMetadataBlock
from persistent_data.layout import ENTRIES_PER_BITMAP
from persistent_data.space_map_metadata import MetadataSpaceMap
from tests.support.devices import SparseDevice
from tests.support.trees import BLOCK_SIZE, Store

KIND = Validator("test block", 0xABCD)
NR_BLOCKS = 2 * ENTRIES_PER_BITMAP + 100


class _Store:
    """One of the two stores, and its blocks: those of the last commit, and those of this transaction."""

    def __init__(self, *, in_one_step: bool, nr_taken: int, nr_freed: int, cache_blocks: int) -> None:
        self.in_one_step = in_one_step
        self.nr_replaced = 0
        self.device = SparseDevice(NR_BLOCKS * BLOCK_SIZE)
        self.store = Store.format(self.device, cache_bytes=cache_blocks * (BLOCK_SIZE + BUFFER_OVERHEAD_BYTES))
        self.blocks = [self.store.tm.new_block(KIND).block for _ in range(40)]
        # Of no use but to bring the cursor near the end of a bitmap, or to leave few blocks free.
        taken = [self.store.sm.new_block() for _ in range(nr_taken)]
        for block in random.Random(nr_taken).sample(taken, min(nr_freed, nr_taken)):
            self.store.sm.dec(block, block + 1)
        self.store.commit([])

    def do(self, action: str, which: int) -> None:
        """Make a call; *which* names a block by its place in the list."""
        tm = self.store.tm
        tm.bm.begin_operation()
        if action == "commit":
            self.store.commit([])
        elif action == "new":
            self.blocks.append(tm.new_block(KIND).block)
        elif action == "share":
            tm.inc(self.blocks[which])
        elif action == "drop":
            tm.dec(self.blocks.pop(which))
        else:
            with patch.object(MetadataSpaceMap, "replace", self.replace):
                self.blocks[which] = tm.shadow_block(self.blocks[which], KIND)[0].block

    def replace(self, block: int) -> int | None:
        """What the transaction manager calls first."""
        new = replace(self.store.sm, block) if self.in_one_step else None
        self.nr_replaced += new is not None
        return new


replace = MetadataSpaceMap.replace


@given(
    seed=st.integers(0, 1 << 32),
    nr_taken=st.sampled_from([0, ENTRIES_PER_BITMAP - 70, 2 * ENTRIES_PER_BITMAP - 70, 2 * ENTRIES_PER_BITMAP + 50]),
    nr_freed=st.sampled_from([0, 30, 60, 10_000]),
    cache_blocks=st.sampled_from([0, 20, 1000]),
)
def test_replacing_a_block_at_once_is_what_three_steps_do(
    seed: int, nr_taken: int, nr_freed: int, cache_blocks: int
) -> None:
    rnd = random.Random(seed)
    stores = [
        _Store(in_one_step=in_one_step, nr_taken=nr_taken, nr_freed=nr_freed, cache_blocks=cache_blocks)
        for in_one_step in (True, False)
    ]
    for _ in range(60):
        nr_blocks = len(stores[0].blocks)
        which = rnd.randrange(nr_blocks)
        action = rnd.choices(["shadow", "new", "share", "drop", "commit"], [60, 6, 3, 6, 3])[0]
        if action == "drop" and nr_blocks == 1:
            continue
        ended = 0
        for store in stores:
            try:
                store.do(action, which)
            except NoFreeMetadataBlock:
                ended += 1
        assert ended in (0, 2)
        if ended:
            event("out of metadata space")
            return
        assert stores[0].blocks == stores[1].blocks
        assert stores[0].store.sm.nr_free == stores[1].store.sm.nr_free
        assert stores[0].store.sm.root_blob() == stores[1].store.sm.root_blob()
        if action == "commit":
            assert stores[0].device.blocks == stores[1].device.blocks
    event(f"replaced {stores[0].nr_replaced // 10}0 times or more")
