"""The frame of singular vectors of a matrix: the same on every machine, how much of it counts, what lies outside it."""

from __future__ import annotations

from torch import Tensor

from veneer.numerics.svd import truncated_svd

# Relative gap below which two singular vectors may be exchanged or turned by the rounding of a decomposition in fp64.
_CLEAR_GAP = 1e-8


def frame(W: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``(U, S, Vh)`` of W (out, in) in fp32: the ``rank`` leading triplets, all min(out, in) when None.

    Taken in fp64 with fixed signs, so that what was trained between the vectors can be saved without them: another
    library or number of threads finds the same ones to fp32 rounding, as long as their values are `distinct`.
    """
    U, S, Vh = truncated_svd(W.detach().double(), min(W.shape) if rank is None else rank, exact=True)
    return U.float(), S.float(), Vh.float()


def distinct(S: Tensor) -> bool:
    """Whether neighbours in S (k,), descending, lie far enough apart for their vectors to be determined."""
    return len(S) < 2 or bool(((S[:-1] - S[1:]).double() > _CLEAR_GAP * S[0].double()).all())


def energy_rank(S: Tensor, share: float) -> int:
    """The smallest k with Σ_{i ≤ k} σᵢ² ≥ share · Σ σᵢ², of all singular values S (m,); 0 for a share of 0.

    share lies in [0, 1]; 1 counts every value that is not zero.
    """
    energy = S.double().square().cumsum(0)
    reached = energy >= share * energy[-1] * (1 - 1e-12)
    return int(reached.int().argmax()) + 1 if share > 0 else 0


def leave_out(rows: Tensor, basis: Tensor) -> Tensor:
    """``rows − (rows V) Vᵀ``: rows (…, n) less their part in the span of orthonormal columns V (n, k)."""
    return rows - (rows @ basis) @ basis.mT if basis.shape[1] else rows
