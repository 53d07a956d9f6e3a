"""Stochastic Lanczos quadrature: the spectrum of a symmetric operator from its products with vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BREAKDOWN = 1e-8  # a remainder this small beside the first diagonal entry ends the recursion


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The tridiagonal matrix T of a symmetric operator in the Krylov space of a vector.

    Every new vector is orthogonalised against all before it, twice, so that no eigenvalue appears as a ghost copy.

    Args:
        product: v (n,) ↦ Hv (n,).
        start: (n,), any length but 0; it is normalised.
        steps: m ≥ 1; fewer where the Krylov space is exhausted.

    Returns:
        ``(alphas, betas)``: the diagonal (k,) and what stands beside it (k − 1,), k ≤ m, in the type of ``start``.
    """
    basis = [start / start.norm()]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    while True:
        w = product(basis[-1])
        alphas.append(w @ basis[-1])
        V = torch.stack(basis)
        for _ in range(2):
            w = w - V.mT @ (V @ w)
        beta = w.norm()
        if len(alphas) == min(steps, start.numel()) or beta <= BREAKDOWN * alphas[0].abs():
            return torch.stack(alphas), torch.stack(betas) if betas else start.new_empty(0)
        betas.append(beta)
        basis.append(w / beta)


def ritz(alphas: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values θ (k,) ascending and their quadrature weights ω (k,), which sum to 1.

    Σ ω_k·f(θ_k) is the mean of f over the spectrum as the start vector weighs it; exactly vᵀHv for f(θ) = θ. Averaged
    over Gaussian starts it is the spectral density.
    """
    T = torch.diag(alphas) + torch.diag(betas, 1) + torch.diag(betas, -1)
    theta, vectors = torch.linalg.eigh(T.double())
    return theta, vectors[0].square()
