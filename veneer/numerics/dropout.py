"""Dropout masks that a seed gives back: nothing is kept between forward and backward."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_STARTS = 1 << 20
_TABLE_SEED = 0x5EED


@functools.lru_cache(maxsize=16)
def _table(p: float, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(2**20, width)`` overlapping windows on a fixed ring of zeros (exactly a share ``p``) and ones."""
    # A table made inside inference mode could not take part in a later backward.
    with torch.inference_mode(False):
        order = torch.randperm(_STARTS, generator=torch.Generator().manual_seed(_TABLE_SEED))
        ring = torch.ones(_STARTS, dtype=dtype)
        ring[order[: round(p * _STARTS)]] = 0
        ring = torch.cat((ring, ring.repeat(-(-width // _STARTS))[:width])).to(device)
        return ring.as_strided((_STARTS, width), (1, 1))


def keep_mask(seed: int, shape: tuple[int, int], p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros with probability ``p`` and ones else, ``shape = (rows, width)``: the same for the same seed.

    Each row is a window of one fixed random ring, beginning at a place that the seed draws. So a mask costs one random
    number a row and one copy, about a fiftieth of drawing every element, and is the same on any device, in any
    precision and with any number of threads.
    """
    table, starts = windows(seed, shape, p, dtype, device)
    return table.index_select(0, starts)


def windows(
    seed: int, shape: tuple[int, int], p: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`keep_mask` without a copy: the table of windows ``(2**20, width)``, each beginning one number after the one
    before, and which of them is the mask of each row ``(rows,)``."""
    rows, width = shape
    starts = torch.randint(_STARTS, (rows,), generator=torch.Generator().manual_seed(seed))
    return _table(p, width, dtype, device), starts.to(device)
