"""A progress line on stderr, for people who wait."""

from __future__ import annotations

import sys
from time import monotonic

_FIRST_SHOWN_AFTER = 1.0
_REDRAWN_AFTER = 0.5
_WIDTH = 40


class Progress:
    """A bar with a title that is shown once work has taken a second, if stderr is a terminal.

    Called with what is done and what there is to do, in any unit; as a context, it takes the bar away at the end.

    :param beside_output: the work writes to stdout meanwhile; if that is a terminal too, no bar is mixed with it
    :ivar stage: what is being done, shown behind the bar
    """

    def __init__(self, title: str, *, beside_output: bool = False) -> None:
        self._title = title
        self.stage = ""
        self._wanted = sys.stderr is not None and sys.stderr.isatty()
        if beside_output and sys.stdout is not None and sys.stdout.isatty():
            self._wanted = False
        self._next = monotonic() + _FIRST_SHOWN_AFTER
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        """Redraw the bar, if it is time."""
        if not self._wanted or monotonic() < self._next:
            return
        self._next = monotonic() + _REDRAWN_AFTER
        filled = _WIDTH * done // max(total, 1)
        bar = ("=" * filled + ">" * (filled < _WIDTH)).ljust(_WIDTH)
        stage = f", {self.stage}" if self.stage else ""
        self._draw(f"{self._title} [{bar}] {100 * done // max(total, 1)}%{stage}")

    def clear(self) -> None:
        """Make room for a line of another kind."""
        if self._shown:
            self._draw("")

    def _draw(self, line: str) -> None:
        try:
            sys.stderr.write("\r" + line.ljust(self._shown) + ("\r" if not line else ""))
            sys.stderr.flush()
        except (OSError, ValueError):
            self._wanted = False  # whoever watched has gone
        self._shown = len(line)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()
