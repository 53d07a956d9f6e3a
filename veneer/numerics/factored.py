"""Algebra of factored matrices B·A without forming them: sums, norms, inner products, recompression.

A pair ``(A, B)``, A: (r, in), B: (out, r), stands for the out × in matrix B·A; the ranks of pairs may differ.
Small Gram matrices and cores are computed in fp64, results come back in the dtype of the factors (norms in fp64).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from veneer.errors import UserError

FactorPair = tuple[Tensor, Tensor]


def stack(pairs: Iterable[FactorPair], weights: Sequence[float | Tensor] | None = None) -> FactorPair:
    """The weighted sum Σ wᵢ·BᵢAᵢ as one pair of rank Σ rᵢ: rows of A and columns of B side by side, w in B."""
    pairs = list(pairs)
    weights = [1.0] * len(pairs) if weights is None else list(weights)
    if not pairs or len(weights) != len(pairs):
        raise UserError(
            f"a sum needs one weight for each of at least one pair: {len(pairs)} pairs, {len(weights)} weights"
        )
    shapes = {(B.shape[0], A.shape[1]) for A, B in pairs}
    if len(shapes) > 1:
        raise UserError(f"pairs can be summed only when all stand for one shape (out, in), found {sorted(shapes)}")
    return (
        torch.cat([A for A, _ in pairs], dim=0),
        torch.cat([B * w for (_, B), w in zip(pairs, weights)], dim=1),
    )


def add(first: FactorPair, second: FactorPair) -> FactorPair:
    """B₁A₁ + B₂A₂ as a pair of rank r₁ + r₂."""
    return stack([first, second])


def subtract(first: FactorPair, second: FactorPair) -> FactorPair:
    """B₁A₁ − B₂A₂ as a pair of rank r₁ + r₂."""
    return stack([first, second], [1.0, -1.0])


def inner(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    """⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), the Frobenius inner product, a 0-dim fp64 tensor; O(r²(out + in))."""
    A1, B1, A2, B2 = (t.double() for t in (A1, B1, A2, B2))
    return ((B1.mT @ B2) * (A1 @ A2.mT)).sum()


def frobenius_norm(A: Tensor, B: Tensor) -> Tensor:
    """‖B·A‖_F from the two r × r Gram matrices, a 0-dim fp64 tensor.

    Terms that cancel (a stacked difference of two near-equal products) leave an error of about 1e-8 of the terms' size;
    `singular_values` has none of that.
    """
    return inner(A, B, A, B).clamp_min(0).sqrt()


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """The min(r, out, in) leading singular values of B·A, descending, fp64; the others are zero."""
    return torch.linalg.svdvals(_core(A, B)[1])


def recompress(
    A: Tensor, B: Tensor, rank: int | None = None, tolerance: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """The best lower-rank pair for B·A, by QR of both factors and an SVD of the small core (never out × in).

    Args:
        A, B: (r, in), (out, r).
        rank: ranks kept at most, ≥ 1; None: as many as there are.
        tolerance: relative Frobenius error allowed, ≥ 0: the smallest rank that keeps it is taken, within ``rank``.
            None: zero but for rounding, so that only null directions go.

    Returns:
        ``(A', B', error)``: balanced factors (A'A'ᵀ = B'ᵀB' = diag(σ)), A': (k, in), B': (out, k), k ≥ 1 (a zero
        product keeps one zero component), and ‖BA − B'A'‖_F/‖BA‖_F (0.0 for a zero product).
    """
    if rank is not None and rank < 1:
        raise UserError(f"recompress needs a rank of at least 1, not {rank}")
    if tolerance is not None and tolerance < 0:
        raise UserError(f"recompress needs a tolerance of at least 0, not {tolerance}")
    QB, core, QA = _core(A, B)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    total = torch.linalg.vector_norm(S)
    tails = S.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[k]: what is lost when k components are kept
    allowed = max(tolerance or 0.0, torch.finfo(S.dtype).eps * len(S)) * total
    keep = max(1, int((tails > allowed).sum()))
    keep = keep if rank is None else min(keep, rank)
    root = S[:keep].sqrt()
    small_A = (root[:, None] * Vh[:keep]) @ QA.mT
    small_B = QB @ (U[:, :keep] * root)
    error = float(tails[keep] / total) if keep < len(S) and total > 0 else 0.0
    return small_A.to(A.dtype), small_B.to(B.dtype), error


def _core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q_B: (out, p), core: (p, q), Q_A: (in, q) in fp64 with B·A = Q_B·core·Q_Aᵀ and orthonormal columns in both Q."""
    QB, RB = torch.linalg.qr(B.detach().double())
    QA, RA = torch.linalg.qr(A.detach().double().mT)
    return QB, RB @ RA.mT, QA
