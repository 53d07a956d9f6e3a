"""Rows and columns that stand for a whole matrix: the landmarks of a Nyström or CUR approximation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from veneer.errors import UserError
from veneer.numerics.svd import randomized_svd

Choice = Literal["first", "random", "leverage"]


def landmarks(W: Tensor, count: int, choice: Choice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` row and column indices of W (out, in), int64, each ascending.

    ``first`` takes the first ones, ``random`` any, and ``leverage`` those with the largest leverage scores, which are
    the squared row norms of the leading ``count`` singular vectors (Drineas, Mahoney & Muthukrishnan 2008). Raises
    UserError for more than W has of either.
    """
    if not 1 <= count <= min(W.shape):
        raise UserError(f"{count} landmark rows and columns of a matrix of {W.shape[0]} × {W.shape[1]}")
    if choice == "first":
        first = torch.arange(count, device=W.device)
        return first, first.clone()
    if choice == "random":
        return tuple(torch.randperm(n, generator=generator)[:count].sort().values.to(W.device) for n in W.shape)
    U, _, Vh = randomized_svd(W, count, generator=generator)
    scores = U.square().sum(1), Vh.square().sum(0)
    return tuple(s.topk(count).indices.sort().values for s in scores)
