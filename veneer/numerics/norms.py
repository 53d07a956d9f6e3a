"""Row norms of a weight with a low-rank change, without forming it, and other measures of matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def row_squares(W: Tensor) -> Tensor:
    """``‖W_i‖²`` of each row, ``(out,)``, summed in fp32 (fp64 for an fp64 weight) without an fp32 copy of ``W``."""
    return torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32)).square()


def row_norms(W_squares: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """``‖(W + s B A)_i‖₂`` of each row, ``(out,)`` in fp32 at least.

    By ``‖W_i‖² + 2 s ⟨(W Aᵀ)_i, B_i⟩ + s² B_i (A Aᵀ) B_iᵀ``: one thin product with ``W`` in its own precision, the rest
    in fp32. Where the change all but cancels a row the difference of squares has no digits left, and that row is
    formed and measured.

    Args:
        W_squares: ``‖W_i‖²``, ``(out,)``, from `row_squares`; constant while ``W`` is frozen, so kept by the caller.
        W: ``(out, in)``; A: ``(r, in)``; B: ``(out, r)``; s: the scale.
    """
    precise = torch.promote_types(A.dtype, torch.float32)
    A, B = A.to(precise), B.to(precise)
    cross = (W @ A.to(W.dtype).t()).to(precise)
    squares = W_squares + ((2 * s * cross + (s * s) * (B @ (A @ A.t()))) * B).sum(1)
    lost = squares < 1e-3 * W_squares
    if lost.any():
        rows = W[lost].to(precise) + s * (B[lost] @ A)
        squares = squares.index_put((lost,), rows.square().sum(1))
    return squares.clamp_min(0).sqrt()


def importance_score(change: Tensor, gradient: Tensor, score: str = "sqrt") -> Tensor:
    """S = Σ|ΔW∘G| over √(out·in), or over out·in for ``mean``; both (out, in)."""
    size = gradient.numel() if score == "mean" else gradient.numel() ** 0.5
    return (change * gradient).abs_().sum() / size
