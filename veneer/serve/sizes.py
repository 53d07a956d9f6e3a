"""How many rows the products of a step have: few numbers, as the CPU's library keeps a compiled kernel for each.

A kernel is 0.7 MB or more and stays; with as many kernels as there are numbers of rows a server would grow for hours.
Its tiles have 16 rows, so that filling up to the next 16 costs nothing, and the last quarter of a long step little.
"""

from __future__ import annotations

import os

TILE = 16
KERNELS = "256"  # kept by the library at most, those of adapters' ranks too


def filled(rows: int) -> int:
    """The number of rows that ``rows`` are filled up to: a multiple of 16, above 64 in four steps an octave."""
    if rows <= 4 * TILE:
        return -(-rows // TILE) * TILE
    step = 1 << ((rows - 1).bit_length() - 3)
    return -(-rows // step) * step


def whole(rows: int) -> int:
    """The largest number, up to ``rows``, that need not be filled up; ``rows`` itself below 16."""
    if rows < TILE:
        return rows
    found = rows - rows % TILE
    while filled(found) != found:
        found -= TILE
    return found


def numbers(most: int) -> list[int]:
    """All that ``filled`` gives for up to ``most`` rows."""
    return sorted({filled(n) for n in range(1, most + 1)})


def as_they_are(rows: int) -> int:
    """No filling up: for libraries that compile nothing for a number of rows."""
    return rows


def keep_few() -> None:
    """Bound what the CPU's library keeps, unless the environment says how much; before its first product."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
    os.environ.setdefault("LRU_CACHE_CAPACITY", KERNELS)
