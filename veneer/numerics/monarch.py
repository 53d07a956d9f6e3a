"""Monarch matrices: products of two block-diagonal matrices with a fixed permutation between (arXiv:2204.00595, §3).

``L1: (k, q, p)`` are k blocks on in = k·p inputs, ``L2: (l, s, t)`` l blocks that give out = l·s outputs, k·q = l·t.
Inputs of a block are neighbours, outputs lie l apart: row σ·l + λ, column κ·p + j. With q = ρ·l the part of the matrix
with given κ and λ has rank ρ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(x: Tensor, L1: Tensor, L2: Tensor) -> Tensor:
    """``x Mᵀ``: x (…, k·p) → (…, l·s), by two batched products."""
    (k, _, p), (l, s, t) = L1.shape, L2.shape
    n = x[..., 0].numel()
    u = torch.bmm(x.reshape(n, k, p).transpose(0, 1), L1.mT)  # (k, n, q)
    z = u.transpose(0, 1).reshape(n, t, l).permute(2, 0, 1)  # the stride permutation: (l, n, t)
    w = torch.bmm(z, L2.mT)  # (l, n, s)
    return w.permute(1, 2, 0).reshape(*x.shape[:-1], l * s)


def factors(L1: Tensor, L2: Tensor) -> tuple[Tensor, Tensor]:
    """The same matrix as a pair B·A of inner width k·q: A (k·q, k·p), B (l·s, k·q), mostly zeros."""
    l, s, t = L2.shape
    B = torch.diag_embed(L2.permute(1, 2, 0))  # (s, t, l, l): both ends of a block's path carry the same λ
    return torch.block_diag(*L1), B.permute(0, 2, 1, 3).reshape(l * s, t * l)


def dense(L1: Tensor, L2: Tensor) -> Tensor:
    """M (l·s, k·p)."""
    A, B = factors(L1, L2)
    return B @ A


def project(M: Tensor, k: int, l: int, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest Monarch matrix in Frobenius norm: L1 (k, rank·l, p) and L2 (l, s, k·rank), real or complex.

    Each of the k·l slices of M (out, in), s × p, is cut to its leading ``rank`` singular triplets, which makes the
    squared error the sum of all squared singular values that are left out. k must divide in, and l out; a rank beyond
    min(s, p) is filled up with zeros.
    """
    out, inn = M.shape
    s, p = out // l, inn // k
    slices = M.reshape(s, l, k, p).permute(2, 1, 0, 3)  # (k, l, s, p)
    U, S, Vh = torch.linalg.svd(slices, full_matrices=False)
    r = min(rank, S.shape[-1])
    root = S[..., :r].sqrt()
    first, second = M.new_zeros(k, rank, l, p), M.new_zeros(l, s, k, rank)
    first[:, :r] = (root[..., None] * Vh[..., :r, :]).transpose(1, 2)
    second[..., :r] = (U[..., :r] * root[..., None, :]).permute(1, 2, 0, 3)
    return first.reshape(k, rank * l, p), second.reshape(l, s, k * rank)
