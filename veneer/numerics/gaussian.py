"""Entrywise Gaussians over a matrix, mean and log-variance each a low-rank product: divergence and prior."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ENTRIES = 1 << 22  # of a matrix (out, in) that are alive at once
LOWEST, HIGHEST = -10.0, 18.0  # of log v/c

Slopes = tuple[Tensor, Tensor]


class Gaussian(NamedTuple):
    """N(μ, v) for every entry: μ = B·A, log v = log c + clamp(B_v·A_v, −10, 18); A, A_v (r, in), B, B_v (out, r)."""

    A: Tensor
    B: Tensor
    A_v: Tensor
    B_v: Tensor


def variance(A_v: Tensor, B_v: Tensor) -> Tensor:
    """v/c (out, in); 1 where B_v is 0."""
    return (B_v @ A_v).clamp(LOWEST, HIGHEST).exp()


@torch.no_grad()
def divergence(q: Gaussian, p: Gaussian, log_c: float) -> tuple[Tensor, Gaussian, Gaussian]:
    """KL(q‖p) = ½Σ[log(v_p/v_q) + (v_q + (μ_q − μ_p)²)/v_p − 1] in nats, 0-dim, with its gradients in q and in p.

    Taken in the factors' own precision (fp32 at least is wanted) over chunks of rows; no (out, in) matrix is whole.
    """

    def entries(mean: list[Tensor], log: list[Tensor]) -> tuple[Tensor, list[Slopes]]:
        (m, n), (lq, lp) = mean, log
        d, precision, ratio = m - n, (-log_c - lp).exp(), (lq - lp).exp()
        pull = d * precision
        value = (lp - lq + ratio + d * pull - 1).sum() / 2
        return value, [(pull, (ratio - 1) / 2), (-pull, (1 - ratio - d * pull) / 2)]

    value, (of_q, of_p) = _summed(entries, q, p)
    return value, of_q, of_p


@torch.no_grad()
def surprise(p: Gaussian, log_c: float, shape: float = 2.0, rate: float = 0.2) -> tuple[Tensor, Gaussian]:
    """−log of N(μ; 0, I)·Gamma(1/v; ``shape``, ``rate``·c) up to a constant, 0-dim, with its gradient.

    ½‖μ‖² + Σ[(shape − 1)·log(v/c) + rate·c/v].
    """

    def entries(mean: list[Tensor], log: list[Tensor]) -> tuple[Tensor, list[Slopes]]:
        (m,), (lv,) = mean, log
        inverse = rate * (-lv).exp()
        return (m.square() / 2 + (shape - 1) * lv + inverse).sum(), [(m, (shape - 1) - inverse)]

    value, (found,) = _summed(entries, p)
    return value, found


def _summed(
    entries: Callable[[list[Tensor], list[Tensor]], tuple[Tensor, list[Slopes]]], *of: Gaussian
) -> tuple[Tensor, list[Gaussian]]:
    """The sum over chunks of rows of what ``entries`` gives for means and log v/c, and the factors' gradients."""
    total, slopes = of[0].B.new_zeros(()), [Gaussian(*(torch.zeros_like(t) for t in g)) for g in of]
    step = max(1, ENTRIES // of[0].A.shape[1])
    for i in range(0, len(of[0].B), step):
        rows = slice(i, i + step)
        raw = [g.B_v[rows] @ g.A_v for g in of]
        value, found = entries([g.B[rows] @ g.A for g in of], [t.clamp(LOWEST, HIGHEST) for t in raw])
        total += value
        for g, slope, t, (mean, log) in zip(of, slopes, raw, found):
            log = log * ((t >= LOWEST) & (t <= HIGHEST))
            for A, B, dA, dB, d in ((g.A, g.B, slope.A, slope.B, mean), (g.A_v, g.B_v, slope.A_v, slope.B_v, log)):
                dB[rows] = d @ A.T
                dA += B[rows].T @ d
    return total, slopes
