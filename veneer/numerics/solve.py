"""Small solves that adapters need: Gram inverses, a symmetric Sylvester equation, the polar factor, Nyström.

Everything is computed in fp64 and comes back in the dtype of its first argument. Gram matrices are symmetric positive
semi-definite, (…, r, r); leading dimensions are a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import UserError


def gram_inverse(G: Tensor, relative: float = 1e-8) -> Tensor:
    """(G + δI)⁻¹ with δ = ``relative``·tr(G)/r, so that its strength follows the scale of G; zeros for G = 0.

    G: (…, r, r) symmetric positive semi-definite, best formed in fp64. With ``relative`` = 0 it is the pseudo-inverse:
    directions below fp64 rounding of the largest eigenvalue stay null.
    """
    values, vectors = torch.linalg.eigh(_symmetric(G))
    mean = values.mean(-1, keepdim=True).clamp_min(0)
    ridged = values.clamp_min(0) + relative * mean
    floor = values.shape[-1] * torch.finfo(values.dtype).eps * ridged.amax(-1, keepdim=True)
    inverse = torch.where(ridged > floor, 1 / ridged, torch.zeros_like(ridged))
    return ((vectors * inverse.unsqueeze(-2)) @ vectors.mT).to(G.dtype)


def gram_root(G: Tensor, power: float, relative: float = 0.0) -> Tensor:
    """(G + δI)^power of a symmetric positive semi-definite G: (…, r, r), δ = ``relative``·tr(G)/r.

    Null directions stay null for a negative power.
    """
    values, vectors = torch.linalg.eigh(_symmetric(G))
    ridged = values.clamp_min(0) + relative * values.mean(-1, keepdim=True).clamp_min(0)
    floor = values.shape[-1] * torch.finfo(values.dtype).eps * ridged.amax(-1, keepdim=True)
    raised = torch.where(ridged > floor, ridged.clamp_min(torch.finfo(ridged.dtype).tiny) ** power, 0.0)
    return ((vectors * raised.unsqueeze(-2)) @ vectors.mT).to(G.dtype)


def sylvester_symmetric(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """X: (…, m, n) with P·X + X·Q = C, for symmetric positive semi-definite P: (…, m, m) and Q: (…, n, n).

    With P = U·diag(a)·Uᵀ and Q = V·diag(b)·Vᵀ it is X = U[(UᵀCV)ᵢⱼ/(aᵢ + bⱼ)]Vᵀ. Where aᵢ + bⱼ vanishes (fp64 rounding
    of the largest) the entry is 0: the solution of least norm where there is one. Result in the dtype of C.
    """
    a, U = torch.linalg.eigh(_symmetric(P))
    b, V = torch.linalg.eigh(_symmetric(Q))
    sums = a.clamp_min(0).unsqueeze(-1) + b.clamp_min(0).unsqueeze(-2)
    floor = (a.shape[-1] + b.shape[-1]) * torch.finfo(sums.dtype).eps * sums.amax((-1, -2), keepdim=True)
    rotated = U.mT @ C.double() @ V
    solved = torch.where(sums > floor, rotated / sums.clamp_min(torch.finfo(sums.dtype).tiny), 0.0)
    return (U @ solved @ V.mT).to(C.dtype)


def polar_factor(M: Tensor) -> Tensor:
    """The nearest matrix to M: (…, m, n) with orthonormal columns (rows when m < n): U·Vᵀ of its SVD."""
    U, _, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return (U @ Vh).to(M.dtype)


def pseudo_inverse(M: Tensor, cutoff: float = 1e-12) -> Tensor:
    """M⁺: (…, n, m) of M: (…, m, n), singular values below ``cutoff`` times the largest taken as zero."""
    return torch.linalg.pinv(M.double(), rtol=cutoff).to(M.dtype)


def nystrom(W: Tensor, rows: Tensor, columns: Tensor, cutoff: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    """The Nyström factors of W: (out, in) for chosen rows and columns: W ≈ B·N·A.

    B = W[:, columns] (out, r), N = pinv(W[rows, columns]) (r, r'), A = W[rows, :] (r', in); exact when the corner has
    the rank of W. ``cutoff`` damps an ill-conditioned corner: singular values below that share of the largest are
    dropped. ``rows`` (r',) and ``columns`` (r,) are integer indices. Returns ``(B, N, A)``.
    """
    if not len(rows) or not len(columns):
        raise UserError("a Nyström approximation needs at least one row and one column")
    B, A = W[:, columns], W[rows]
    return B, pseudo_inverse(A[:, columns], cutoff), A


def _symmetric(G: Tensor) -> Tensor:
    wide = G.detach().double()
    return (wide + wide.mT) / 2
