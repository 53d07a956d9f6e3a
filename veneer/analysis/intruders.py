"""Intruder dimensions: large singular directions of a tuned weight that resemble none of the pretrained one.

Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv:2410.21228, system 50). Detection
follows the official code (left vectors, against all pretrained ones), shrinking the formula that PEFT's
``reduce_intruder_dimension`` computes: λ = 1 changes nothing, λ = 0 removes. The causal reading is contested: compare
with a uniform shrink to the same norm before you credit the removal of directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right", "both"]


@dataclass(frozen=True)
class Intruders:
    """Of one matrix: singular values ``S (k,)`` of the tuned weight, their ``similarity (k,)`` to the nearest
    pretrained direction, ``flags (k,)``, and the directions ``U (out, k)``, ``V (in, k)``."""

    S: Tensor
    similarity: Tensor
    flags: Tensor
    U: Tensor
    V: Tensor

    @property
    def count(self) -> int:
        """How many directions are intruders."""
        return int(self.flags.sum())

    @property
    def energy(self) -> float:
        """Their share of the squared singular values looked at; unlike the count it does not saturate."""
        return float((self.S[self.flags] ** 2).sum() / (self.S**2).sum().clamp_min(1e-30))


@torch.no_grad()
def intruders(W0: Tensor, W: Tensor, k: int = 10, epsilon: float = 0.5, side: Side = "left") -> Intruders:
    """The top ``k`` directions of ``W`` (out, in) with cosine below ``epsilon`` to every singular vector of ``W0``.

    A direction spread evenly over m pretrained vectors has similarity 1/√m: ε = 0.5 asks for more than four. In fp32.
    """
    U0, _, Vh0 = torch.linalg.svd(W0.float(), full_matrices=False)
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    U, S, V = U[:, :k], S[:k], Vh[:k].T
    left, right = (U.T @ U0).abs(), (V.T @ Vh0.T).abs()
    similarity = {"left": left, "right": right, "both": left * right}[side].amax(1)
    return Intruders(S, similarity, similarity < epsilon, U, V)


@torch.no_grad()
def shrunk(A: Tensor, B: Tensor, scale: float, found: Intruders, factor: float = 0.75) -> tuple[Tensor, Tensor]:
    """Factors (r + |I|, in) and (out, r + |I|) of the change with its intruders scaled by ``factor``; scale 1.

    ``W_λ = W + (λ − 1) Σ_I S_i u_i v_iᵀ``, exactly; `veneer.numerics.factored.recompress` brings it back to a rank.
    """
    chosen = found.flags
    U = found.U[:, chosen] * ((factor - 1.0) * found.S[chosen])
    return torch.cat([A.float(), found.V[:, chosen].T]), torch.cat([scale * B.float(), U], dim=1)


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = S.sum()
    if float(total) == 0.0:
        return 0.0
    p = (S / total).clamp_min(1e-30).double()
    return float(torch.exp(-(p * p.log()).sum()))


@torch.no_grad()
def overlap(first: Tensor, second: Tensor, rank: int) -> float:
    """‖U₁ᵀU₂‖²_F / rank of the leading ``rank`` left directions of two changes (out, in): 0 apart, 1 the same."""
    U1, U2 = (torch.linalg.svd(W.float(), full_matrices=False)[0][:, :rank] for W in (first, second))
    return float((U1.T @ U2).square().sum() / min(rank, U1.shape[1], U2.shape[1]))
