"""The folder for what can be made again: ``$VENEER_CACHE``, else ``~/.cache/veneer``."""

from __future__ import annotations

import os
from pathlib import Path


def folder(part: str) -> Path:
    """The place of one kind of things in the cache; it need not be there yet."""
    return Path(os.environ.get("VENEER_CACHE") or Path("~/.cache/veneer").expanduser()) / part
