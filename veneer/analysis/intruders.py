"""Intruder dimensions: large singular directions of a tuned weight that resemble none of the pretrained one.

Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv:2410.21228, system 50). Detection
follows the official code (left vectors, against all pretrained ones), shrinking the formula that PEFT's
``reduce_intruder_dimension`` computes: λ = 1 changes nothing, λ = 0 removes. The causal reading is contested: compare
with a uniform shrink to the same norm before you credit the removal of directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.errors import UserError
from veneer.numerics.factored import recompress
from veneer.numerics.svd import randomized_svd

if TYPE_CHECKING:
    from veneer.io.plain import Factors

Side = Literal["left", "right", "both"]
WORST_RATIO = 1e-5  # of singular values: below it a Gram matrix in fp64 keeps too few digits of the vectors
WHOLE = 1024  # short side up to which W is decomposed whole; of larger ones subspace iteration gives the leading part
NEAR = 0.01  # singular values of the base this near to each other have no directions of their own


@dataclass(frozen=True)
class Intruders:
    """Of one matrix: singular values ``S (k,)`` of the tuned weight, their ``similarity (k,)`` to the nearest
    pretrained direction and ``together (k,)`` to the nearest group of pretrained directions whose values lie within a
    hundredth of each other, ``flags (k,)``, the directions ``U (out, k)``, ``V (in, k)``, and the base's largest
    singular value ``top``."""

    S: Tensor
    similarity: Tensor
    together: Tensor
    flags: Tensor
    U: Tensor
    V: Tensor
    top: float

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
    U0, S0, Vh0 = _decomposed(W0)
    U, S, Vh = _leading(W, k)
    U, S, V = U[:, :k], S[:k], Vh[:k].T
    left, right = (U.T @ U0).abs(), (V.T @ Vh0.T).abs()
    close = {"left": left, "right": right, "both": left * right}[side]
    similarity = close.amax(1)
    return Intruders(S, similarity, _together(close, S0), similarity < epsilon, U, V, float(S0[0]))


def _together(close: Tensor, S0: Tensor) -> Tensor:
    """The largest norm of ``close (k, n)`` over the directions whose values ``S0 (n,)`` are near to one of them."""
    rising = S0.flip(0).contiguous()
    first = len(S0) - torch.searchsorted(rising, S0 * (1 + NEAR), right=True)
    last = len(S0) - torch.searchsorted(rising, S0 * (1 - NEAR))
    sums = torch.nn.functional.pad(close.double().square().cumsum(1), (1, 0))
    return (sums[:, last] - sums[:, first]).amax(1).clamp_min(0).sqrt().to(close)


def _leading(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """At least the leading ``k`` triplets, in fp32."""
    if min(W.shape) <= WHOLE:
        return _decomposed(W)
    return randomized_svd(W.float(), k, oversampling=16, iterations=8, generator=torch.Generator().manual_seed(0))


def _decomposed(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD in fp32, through the smaller Gram matrix in fp64 (half the time) where that keeps the digits."""
    tall = W.shape[0] > W.shape[1]
    wide = (W.T if tall else W).double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    S, U = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    if float(S[-1]) <= WORST_RATIO * float(S[0]):
        return torch.linalg.svd(W.float(), full_matrices=False)
    Vh = (U.T @ wide) / S[:, None]
    U, S, Vh = (x.float() for x in ((Vh.T, S, U.T) if tall else (U, S, Vh)))
    return U, S, Vh


@torch.no_grad()
def shrunk(A: Tensor, B: Tensor, scale: float, found: Intruders, factor: float = 0.75) -> tuple[Tensor, Tensor]:
    """Factors (r + |I|, in) and (out, r + |I|) of the change with its intruders scaled by ``factor``; scale 1.

    ``W_λ = W + (λ − 1) Σ_I S_i u_i v_iᵀ``, exactly; `veneer.numerics.factored.recompress` brings it back to a rank.
    """
    chosen = found.flags
    U = found.U[:, chosen] * ((factor - 1.0) * found.S[chosen])
    return torch.cat([A.float(), found.V[:, chosen].T]), torch.cat([scale * B.float(), U], dim=1)


@torch.no_grad()
def mitigated(
    adapter: Adapter,
    factor: float = 0.75,
    k: int = 10,
    epsilon: float = 0.5,
    side: Side = "left",
    rank: int | None = None,
) -> tuple[list[Factors], dict[str, Any]]:
    """The adapter's pairs with their intruders scaled by ``factor``, and what that did; the adapter stays as it is.

    A layer without intruders keeps its factors; the others' rank grows by their intruders, unless ``rank`` brings them
    back to as much by their SVD, which loses the rest. The facts are ``intruders``, ``layers`` that had some, ``rank``
    (the largest after), ``lost`` (the share of the squared changes that ``rank`` cut off), and ``uniform``: the one
    number that scales all changes to the same norm, which is the control that a gain has to beat.

    Raises:
        UserError: the change is no plain pair somewhere, or ``factor`` is below 0.
    """
    return scaled(detected(adapter, k, epsilon, side), factor, rank)


def detected(
    adapter: Adapter, k: int = 10, epsilon: float = 0.5, side: Side = "left"
) -> list[tuple[Factors, Intruders]]:
    """The adapter's change of each layer as a plain pair, and the layer's intruders."""
    from veneer.io.plain import plain_factors

    found = []
    for f in plain_factors(adapter, "an adapter with smaller intruders"):
        W0 = f.site.weight().float()
        found.append((f, intruders(W0, W0 + f.scale * (f.B @ f.A), k, epsilon, side)))
    return found


def scaled(
    found: Sequence[tuple[Factors, Intruders]], factor: float, rank: int | None = None
) -> tuple[list[Factors], dict[str, Any]]:
    """What `mitigated` gives, from what `detected` found."""
    from veneer.io.plain import Factors

    if factor < 0:
        raise UserError(f"intruders were to be scaled by {factor:g}; at least 0 was expected: 0 removes, 1 keeps them")
    made, count, layers, before, after, lost = [], 0, 0, 0.0, 0.0, 0.0
    for f, own in found:
        change = f.scale * (f.B @ f.A)
        before += float(change.square().sum())
        if own.count:
            A, B = shrunk(f.A, f.B, f.scale, own, factor)
            change = B @ A
            if rank is not None:
                A, B = recompress(A, B, rank)[:2]
                lost += float((change - B @ A).square().sum())
            extras = {n: v * f.scale if n == "lora_B.bias" else v for n, v in f.extras.items()}
            f, count, layers = Factors(f.site, A, B, 1.0, extras), count + own.count, layers + 1
        after += float(change.square().sum())
        made.append(f)
    facts = {"factor": factor, "intruders": count, "layers": layers, "rank": max(f.rank for f in made)}
    return made, facts | {"lost": lost / (after or 1.0), "uniform": (after / before) ** 0.5 if before else 1.0}


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
