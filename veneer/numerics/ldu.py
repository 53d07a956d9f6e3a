"""The pivoted factorisation of a matrix into lower, diagonal and upper parts."""

from __future__ import annotations

import torch
from torch import Tensor

_DEAD = 1e-8  # pivots below this share of the largest one are rounding


def ldu(W: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(order, L, D, U)`` with ``W[order] = L · diag(D) · U``, for any shape of W (out, in), k = min(out, in).

    L (out, k) has ones on its diagonal and zeros above, U (k, in) ones and zeros below, D (k,) the pivots, in fp32;
    order (out,) holds the rows of W as partial pivoting takes them, int64. Given an order, the rows are taken in it,
    which makes the factors a function of W alone, whatever library pivots; it must be one that pivoting could give.

    A pivot that is zero to rounding becomes 0 with a unit vector as its row of U; the product then lacks what stood to
    the right of that pivot.
    """
    M = W.detach().double()
    if order is None:
        packed, pivots, _ = torch.linalg.lu_factor_ex(M)
        order = _order(pivots, len(M)).to(W.device)
    else:
        packed = _eliminated(M[order.long()])
    k = min(M.shape)
    L = packed[:, :k].tril(-1)
    L.diagonal().fill_(1.0)
    U = packed[:k].triu()
    D = U.diagonal().clone()
    dead = D.abs() <= _DEAD * D.abs().max()
    U = torch.where(
        dead[:, None], torch.eye(*U.shape, dtype=U.dtype, device=U.device), U / D.masked_fill(dead, 1)[:, None]
    )
    return order.long(), L.float(), D.masked_fill(dead, 0.0).float(), U.float()


def _order(pivots: Tensor, rows: int) -> Tensor:
    """The row at each place after the exchanges ``pivots`` (k,), counted from 1."""
    order = list(range(rows))
    for i, p in enumerate(pivots.tolist()):
        order[i], order[p - 1] = order[p - 1], order[i]
    return torch.tensor(order)


def _eliminated(M: Tensor) -> Tensor:
    """L below the diagonal and U on and above it, without pivoting, in place."""
    for i in range(min(M.shape)):
        below = M[i + 1 :, i]
        if M[i, i] != 0:
            below /= M[i, i]
        M[i + 1 :, i + 1 :].addr_(below, M[i, i + 1 :], alpha=-1)
    return M
