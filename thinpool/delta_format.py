"""The comparison of two devices as text: the XML of thin_delta, terse or verbose, or one JSON object a line.

Source: docs/tools/thin_delta.md, "XML".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinpool.differences import DIFFERENT, KINDS, LEFT_ONLY, RIGHT_ONLY, SAME, Difference
from thinpool.pool_delta import Root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thinpool.bulk_text import BulkText, Template
    from thinpool.delta_batch import Columns
    from thinpool.ir import Superblock
    from thinpool.pool_delta import PoolDelta, Thin

_LINES_AT_A_TIME = 1024

_BEGIN, _LENGTH, _LEFT, _RIGHT = range(4)
"""Columns of numbers."""
_DATA_COLUMNS: dict[str, tuple[tuple[str, int], ...]] = {
    LEFT_ONLY: (("data_begin", _LEFT),),
    RIGHT_ONLY: (("data_begin", _RIGHT),),
    DIFFERENT: (("left_data_begin", _LEFT), ("right_data_begin", _RIGHT)),
    SAME: (("data_begin", _LEFT),),
}
"""The data blocks that a range speaks of: how each is called, and its column."""


def delta_text(
    delta: PoolDelta,
    *,
    same: bool = True,
    verbose: bool = False,
    json: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[bytes | memoryview]:
    """Iterate over the text about what *delta* finds, many lines at a time; a piece holds until the next is asked for.

    :param same: with what both sides map to the same data blocks
    :param verbose: with data blocks
    :param json: one JSON object a line in place of XML
    :param progress: see :meth:`thinpool.pool_delta.PoolDelta.differences`
    """
    yield (_json_head(delta) if json else _xml_head(delta)).encode()
    writer = _Writer(_json_templates(verbose) if json else _xml_templates(verbose), joined=not verbose)
    try:
        for found in delta.in_bulk(same=same, joined=not verbose, progress=progress):
            if not isinstance(found, Difference):
                yield writer.bulk(found)
                continue
            writer.add(found)
            if writer.nr_lines == _LINES_AT_A_TIME:
                yield writer.text()
    except Exception:
        writer.end()
        yield writer.text()
        raise
    writer.end()
    yield writer.text()
    if not json:
        closing = f"    </{KINDS[writer.last]}>\n" if verbose and writer.last else ""
        yield f"{closing}  </diff>\n</superblock>".encode()


def _xml_head(delta: PoolDelta) -> str:
    left, right = _name_xml("left", delta.left), _name_xml("right", delta.right)
    return f"{_superblock_tag(delta.superblock)}\n  <diff {left} {right}>\n"


def _superblock_tag(sb: Superblock) -> str:
    flags = ' flags="1"' if sb.needs_check else ""
    return (
        f'<superblock uuid="{sb.uuid}" time="{sb.time}" transaction="{sb.transaction}"{flags} '
        f'data_block_size="{sb.data_block_size}" nr_data_blocks="{sb.nr_data_blocks}">'
    )


def _name_xml(side: str, tree: Thin | Root) -> str:
    return f'{side}_root="{tree.block}"' if isinstance(tree, Root) else f'{side}="{tree.dev_id}"'


def _json_head(delta: PoolDelta) -> str:
    sb = delta.superblock
    return (
        f'{{"type": "superblock", "uuid": "{sb.uuid}", "time": {sb.time}, "transaction": {sb.transaction}, '
        f'"needs_check": {"true" if sb.needs_check else "false"}, "data_block_size": {sb.data_block_size}, '
        f'"nr_data_blocks": {sb.nr_data_blocks}}}\n'
        f'{{"type": "diff", {_name_json("left", delta.left)}, {_name_json("right", delta.right)}}}\n'
    )


def _name_json(side: str, tree: Thin | Root) -> str:
    return f'"{side}_root": {tree.block}' if isinstance(tree, Root) else f'"{side}": {tree.dev_id}'


# The text of a range depends on its kind, and in verbose XML on that of the one before it as well: there the template
# is that at kind + len(KINDS) * kind before.


def _xml_templates(verbose: bool) -> list[Template]:
    if not verbose:
        return [(f'    <{kind} begin="', _BEGIN, '" length="', _LENGTH, '"/>\n') for kind in KINDS]
    return [_verbose_xml(kind, before) for before in KINDS for kind in KINDS]


def _verbose_xml(kind: str, before: str) -> Template:
    """Return the template of a range; those of one kind are in one element."""
    opening = (f"    </{before}>\n" if before else "") + f"    <{kind}>\n" if kind != before else ""
    data = [part for name, column in _DATA_COLUMNS.get(kind, ()) for part in (f'" {name}="', column)]
    return (f'{opening}      <range begin="', _BEGIN, *data, '" length="', _LENGTH, '"/>\n')


def _json_templates(verbose: bool) -> list[Template]:
    templates: list[Template] = []
    for kind in KINDS:
        names = _DATA_COLUMNS.get(kind, ()) if verbose else ()
        data = [part for name, column in names for part in (f', "{name}": ', column)]
        templates.append((f'{{"type": "{kind}", "begin": ', _BEGIN, *data, ', "length": ', _LENGTH, "}\n"))
    return templates


class _Writer:
    """Turns ranges into lines, one by one or in bulk.

    :param joined: make ranges that come one by one as long as they are without regard to data blocks
    :ivar nr_lines: lines that :meth:`text` would return
    :ivar last: number of the kind of the last range that a line has been made of
    """

    def __init__(self, templates: list[Template], *, joined: bool) -> None:
        self._templates = templates
        self._in_groups = len(templates) > len(KINDS)
        self._nr_columns = 1 + max(part for template in templates for part in template if isinstance(part, int))
        self._joined = joined
        self._bulk_text: BulkText | None = None
        self._lines: list[str] = []
        self._waiting: Difference | None = None
        self.last = 0

    @property
    def nr_lines(self) -> int:
        return len(self._lines)

    def text(self) -> bytes:
        """Return the lines that have been made, and forget them."""
        text = "".join(self._lines).encode()
        self._lines.clear()
        return text

    def bulk(self, columns: Columns) -> memoryview:
        """Return lines for *columns*, which hold until the next call."""
        import numpy as np

        if self._bulk_text is None:
            from thinpool.bulk_text import BulkText

            self._bulk_text = BulkText(self._templates)
        which = columns.kinds
        if self._in_groups:
            which = which + np.uint8(len(KINDS)) * np.concatenate(([np.uint8(self.last)], which[:-1]))
        self.last = int(columns.kinds[-1])
        return self._bulk_text.lines(which, columns.numbers()[: self._nr_columns])

    def add(self, one: Difference) -> None:
        """Make a line of a range."""
        if not self._joined:
            self._write(one)
            return
        waiting = self._waiting
        if waiting is None or waiting.kind != one.kind or waiting.thin_begin + waiting.length != one.thin_begin:
            self.end()
            self._waiting = one
        else:
            self._waiting = waiting._replace(length=waiting.length + one.length)

    def end(self) -> None:
        """Make a line of the range that might have gone on."""
        if self._waiting is not None:
            self._write(self._waiting)
        self._waiting = None

    def _write(self, one: Difference) -> None:
        kind = KINDS.index(one.kind)
        numbers = (one.thin_begin, one.length, one.left_data_begin, one.right_data_begin)
        template = self._templates[kind + len(KINDS) * self.last if self._in_groups else kind]
        self._lines.append("".join(part if isinstance(part, str) else str(numbers[part]) for part in template))
        self.last = kind
