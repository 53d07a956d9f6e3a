"""The entries of largest magnitude over many tensors together."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(tensors: list[Tensor], count: int) -> list[Tensor]:
    """Flat positions of the ``count`` entries of largest magnitude over all tensors together, sorted, for each tensor.

    Of equal ones the first are taken; zeros never are, so there may be fewer.
    """
    bits = [t.detach().float().abs().contiguous().view(torch.int32).flatten() for t in tensors]  # ordered as the floats
    low, high = 1, 0x7F800001  # of the smallest positive number, and above infinity
    while high - low > 1:
        middle = (low + high) // 2
        enough = sum(int((b >= middle).sum()) for b in bits) >= count
        low, high = (middle, high) if enough else (low, middle)
    left = count - sum(int((b > low).sum()) for b in bits)
    found = []
    for b in bits:
        ties = (b == low).nonzero().flatten()[:left]
        left -= len(ties)
        found.append(torch.cat([(b > low).nonzero().flatten(), ties]).sort().values)
    return found
