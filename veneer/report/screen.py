"""The console that commands print to."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 132  # columns for a file or a pipe, whose reader does not wrap


def screen() -> Console:
    """Standard output: as wide as the terminal, or ``WIDE`` where it is none; numbers keep their colour plain."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else WIDE)
