"""What each block of a device has to hold, in its buffer and on the device: the oracle of the cache scripts.

It is told what was asked of a cache, never looks at the cache, and does not know how one works.  Where a cache is free
(a dirty block may be written at any time, a clean one may leave at any time) it keeps every content that is possible.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tests.support.cache_script import ScriptError, ScriptFailure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def pattern(seed: str, length: int) -> bytes:
    """Return bytes that depend on *seed* and have no period: no shifted, torn or foreign block looks like them."""
    return hashlib.shake_128(seed.encode()).digest(length)


class BlockModel:
    """One block.  ``shown`` is what a buffer of it may show, ``device`` what the device may hold, newest last."""

    __slots__ = ("device", "dirty", "shown", "undefined", "unmarked")

    def __init__(self, content: bytes) -> None:
        self.shown: tuple[bytes, ...] = (content,)
        self.device = [content]
        self.dirty = False
        self.undefined = False
        """Got without reading and not filled since: its buffer may show anything."""
        self.unmarked: list[tuple[int, int]] = []
        """Byte ranges changed and not marked dirty since."""

    def content(self) -> bytes:
        """Return what the buffer shows."""
        if self.undefined or len(self.shown) > 1:
            raise ScriptError("the content of the block is not known: it must be filled or read first")
        return self.shown[0]

    def written(self) -> None:
        """Note that the dirty content is on the device now."""
        if self.unmarked:
            raise ScriptError("a dirty block is written while it has changes that are not marked dirty")
        self.device = [self.content()]
        self.dirty = False

    def dropped(self) -> None:
        """Note that the buffer has left the cache: the next one shows what the device holds."""
        self.shown = tuple(dict.fromkeys(self.device))
        self.dirty = False
        self.undefined = False


class DeviceModel:
    """The blocks of one device.

    :param image: what the device holds at the beginning
    :param seed: makes the stamps of this device unlike those of another
    """

    def __init__(self, image: bytes, block_size: int, seed: str = "") -> None:
        self.block_size = block_size
        self._initial = image
        self._image = image
        self._offset = 0
        self._seed = seed
        self._blocks: dict[int, BlockModel] = {}
        self._named: dict[str, bytes] = {}
        self._serial = 0

    def __getitem__(self, block: int) -> BlockModel:
        found = self._blocks.get(block)
        if found is None:
            start = self._offset + block * self.block_size
            found = self._blocks[block] = BlockModel(self._image[start : start + self.block_size])
        return found

    # What a script does

    def stamp(self, block: int, begin: int, end: int, name: str | None) -> bytes:
        """Note that bytes ``[begin, end)`` of a held buffer are changed, and return what to put there.

        The content of the whole block is remembered as *name*.
        """
        if not 0 <= begin < end <= self.block_size:
            raise ScriptError(f"{begin} .. {end} is no range of bytes in a block of {self.block_size}")
        model = self[block]
        self._serial += 1
        fresh = pattern(f"{self._seed} {block} {self._serial}", end - begin)
        if end - begin == self.block_size:
            model.undefined = False
            content = fresh
        else:
            old = model.content()
            content = old[:begin] + fresh + old[end:]
        model.shown = (content,)
        model.unmarked.append((begin, end))
        if name is not None:
            self._named[name] = content
        return fresh

    def zeroed(self, block: int) -> None:
        """Note that a buffer of that block has zeroes now, and is dirty."""
        model = self[block]
        model.undefined = False
        model.shown = (bytes(self.block_size),)
        self.marked(block, 0, self.block_size)

    def changed(self, block: int, begin: int, data: bytes) -> None:
        """Note that somebody put *data* into a block at byte *begin*, and marked it dirty."""
        model = self[block]
        whole = len(data) == self.block_size
        old = bytes(self.block_size) if whole else model.content()
        model.undefined = False
        model.shown = (old[:begin] + data + old[begin + len(data) :],)
        self.marked(block, begin, begin + len(data))

    def marked(self, block: int, begin: int, end: int) -> None:
        """Note that a held buffer is marked dirty: from now on the device may hold its content."""
        model = self[block]
        model.device.append(model.content())
        model.dirty = True
        parts = ((part, (begin, end)) for part in model.unmarked)
        model.unmarked = [rest for part, mark in parts for rest in _without(part, mark)]

    def moved(self, source: int, target: int, others: bool) -> None:
        """Note a ``release_move``; *others* hold the source too and keep it."""
        old, new = self[source], self[target]
        content = old.content()
        if old.dirty:
            old.written()
        if others and old.unmarked:
            raise ScriptError("a block that others hold is moved with changes that are not marked dirty")
        old.unmarked = []
        new.undefined = False
        new.shown = (content,)
        if others:
            new.device = [content]
            new.dirty = False
        else:
            new.device.append(content)
            new.dirty = True
            old.dropped()

    def released(self, block: int) -> None:
        """Note that nobody holds a block any more."""
        model = self[block]
        if model.unmarked:
            raise ScriptError("a block is released with changes that are not marked dirty")
        if not (model.dirty or model.undefined):
            # What was discarded while it was held shows the old content for as long as it stays cached.
            model.shown = tuple(dict.fromkeys((*model.shown, *model.device)))

    def written(self, blocks: Iterable[int]) -> None:
        """Note that the dirty ones of *blocks* are on the device now."""
        for block in blocks:
            if self[block].dirty:
                self[block].written()

    def dropped(self, blocks: Iterable[int]) -> None:
        """Note that *blocks* have left the cache, without having been written."""
        for block in blocks:
            self[block].dropped()

    def touched(self) -> list[int]:
        """Return every block that anything was ever done to."""
        return list(self._blocks)

    def discarded(self, block: int, held: bool) -> None:
        """Note that the device was told to discard a block; it then reads as zeroes."""
        model = self[block]
        zeroes = bytes(self.block_size)
        model.device = [zeroes, *model.shown] if model.dirty else [zeroes]
        if not (model.dirty or held):
            model.dropped()

    def offset_changed(self, offset: int) -> None:
        """Note that block 0 begins at another byte of the device.  Nothing may be dirty."""
        image = bytearray(self._image)
        for block, model in self._blocks.items():
            if model.dirty or len(model.device) > 1:
                raise ScriptError(f"the offset changes while the device's content of block {block} is open")
            start = self._offset + block * self.block_size
            image[start : start + self.block_size] = model.device[0]
        self._image = bytes(image)
        self._blocks.clear()
        self._offset = offset

    # What the cache shows

    def named(self, name: str, block: int) -> bytes:
        """Return the content that scripts call *name*: a stamp's, ``initial`` or ``zeroes``."""
        if name == "initial":
            start = self._offset + block * self.block_size
            return self._initial[start : start + self.block_size]
        if name == "zeroes":
            return bytes(self.block_size)
        if name not in self._named:
            raise ScriptError(f"there is no stamp {name}")
        return self._named[name]

    def expect_shown(self, block: int, actual: bytes, wanted: bytes | None = None) -> None:
        """Check what a buffer of *block* shows, against the model and *wanted*; from now on it is known for certain."""
        model = self[block]
        if wanted is None and model.undefined:
            raise ScriptError("the content of the block is not known: it must be filled first")
        if not model.undefined:
            self._compare(block, actual, model.shown, "its buffer")
        if wanted is not None:
            self._compare(block, actual, [wanted], "its buffer")
        model.undefined = False
        model.shown = (actual,)
        if not model.dirty and actual in model.device:
            model.device = [actual]

    def expect_on_device(self, block: int, actual: bytes, wanted: bytes | None = None) -> None:
        """Check that the device holds something possible, and that it is *wanted*, or else the newest content."""
        possible = self[block].device
        self._compare(block, actual, possible, "the device")
        self._compare(block, actual, [possible[-1] if wanted is None else wanted], "the device")

    def expect_image(self, actual: bytes) -> None:
        """Check the whole device, with what is outside the blocks that were used."""
        untouched = 0
        for block, model in sorted(self._blocks.items()):
            start = self._offset + block * self.block_size
            self._compare(block, actual[start : start + self.block_size], model.device, "the device")
            self._compare_untouched(actual, untouched, start)
            untouched = start + self.block_size
        self._compare_untouched(actual, untouched, len(self._image))

    def _compare_untouched(self, actual: bytes, begin: int, end: int) -> None:
        # A comparison without copies: most of a device is untouched by most scripts.
        if not actual.startswith(memoryview(self._image)[begin:end], begin):
            raise ScriptFailure(f"bytes [{begin}..{end}] of the device have changed, though nobody wrote there")

    def _compare(self, block: int, actual: bytes, possible: Sequence[bytes], where: str) -> None:
        if actual in possible:
            return
        wanted = possible[0]
        first = next((at for at, (a, b) in enumerate(zip(actual, wanted, strict=True)) if a != b))
        found, expected = self._name_of(actual, block), self._name_of(wanted, block)
        raise ScriptFailure(f"block {block}: {where} has {found} where {expected} is expected, from byte {first} on")

    def _name_of(self, content: bytes, block: int) -> str:
        """Return what to call a content in a message."""
        names = (name for name in ("initial", "zeroes", *self._named) if self.named(name, block) == content)
        return next(names, "a content without a name")


def _without(part: tuple[int, int], taken: tuple[int, int]) -> list[tuple[int, int]]:
    """Return what is left of a range of bytes when another is taken out of it."""
    left, right = (part[0], min(part[1], taken[0])), (max(part[0], taken[1]), part[1])
    return [rest for rest in (left, right) if rest[0] < rest[1]]
