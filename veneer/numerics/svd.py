"""Truncated singular value decompositions: exact, and by a randomised block Krylov method.

All of them return ``(U, S, Vh)`` with ``U: (…, m, k)``, ``S: (…, k)`` descending, ``Vh: (…, k, n)``, in fp32 (fp64 for
fp64 input), with one sign convention: the entry of largest magnitude in every right vector is positive.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from veneer.errors import UserError

# Ratios (of lengths; of squared singular values) below which Gram matrices cost digits that Householder's paths keep.
_CHOLESKY_RATIO = 1e-5
_GRAM_RATIO = 1e-5


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip the pairs (U[:, i], Vh[i]) so that the largest-magnitude entry of every row of Vh is positive.

    U: (…, m, k), Vh: (…, k, n). The product U·diag(S)·Vh is unchanged. Of equal magnitudes the first decides.
    """
    largest = Vh.gather(-1, Vh.abs().argmax(dim=-1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(Vh.dtype)
    return U * sign.transpose(-1, -2), Vh * sign


def truncated_svd(
    M: Tensor, rank: int, exact: bool = False, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``min(rank, m, n)`` singular triplets of M: (…, m, n), exact or by `randomized_svd`'s defaults."""
    if not exact:
        return randomized_svd(M, rank, generator=generator)
    U, S, Vh = torch.linalg.svd(_working(M), full_matrices=False)
    U, Vh = fix_signs(U[..., :rank], Vh[..., :rank, :])
    return U, S[..., :rank], Vh


def randomized_svd(
    M: Tensor,
    rank: int,
    oversampling: int = 8,
    iterations: int = 3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets from a block Krylov space (Musco & Musco 2015, arXiv:1504.05477).

    The space is spanned by Ω', (MMᵀ)Ω', …, (MMᵀ)^q Ω' with Ω' = MΩ, Ω Gaussian with ``rank + oversampling`` columns and
    q = ``iterations``. Every product with M serves twice, to extend the basis Q and as a block of QᵀM, so the cost is
    2(q + 1) products of M with a block, as in subspace iteration, for a much larger space. Where that space would fill
    the short side of M the exact decomposition is taken.

    A bf16 matrix on hardware that multiplies bf16 fast builds the space in bf16, whose rounding only perturbs the
    choice of subspace; the triplets then come from one product in fp32, and are as orthonormal as any.

    Args:
        M: (…, m, n), any floating type; equal shapes may be stacked.
        rank: triplets wanted, ≥ 1; at most min(m, n) are returned.
        oversampling: columns beyond the rank, ≥ 0.
        iterations: q ≥ 0.
        generator: CPU generator of Ω; None means a fresh one with seed 0, so that results are reproducible.
    """
    if rank < 1:
        raise UserError(f"a truncated SVD needs a rank of at least 1, not {rank}")
    m, n = M.shape[-2:]
    if m > n:
        V, S, Uh = randomized_svd(M.mT, rank, oversampling, iterations, generator)
        U, Vh = fix_signs(Uh.mT, V.mT)
        return U, S, Vh
    block = rank + oversampling
    if block * (iterations + 1) >= m:
        return truncated_svd(M, rank, exact=True)

    half = M.dtype == torch.bfloat16 and _multiplies_bf16_fast(M.device.type)
    M = M.detach() if half else _working(M)

    def times(matrix: Tensor, Q: Tensor) -> Tensor:
        return (matrix @ Q.to(matrix.dtype)).to(Q.dtype)

    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    dtype = torch.float32 if half else M.dtype
    omega = torch.randn(*M.shape[:-2], n, block, generator=generator, dtype=dtype).to(M.device)
    basis = orthonormal_columns(times(M, omega))
    newest = times(M.mT, basis)
    image = newest  # MᵀQ, a block a step
    for _ in range(iterations):
        fresh = extend_basis(basis, times(M, orthonormal_columns(newest)))
        newest = times(M.mT, fresh)
        basis = torch.cat([basis, fresh], dim=-1)
        image = torch.cat([image, newest], dim=-1)

    leading = _leading_right(image, rank)
    frame = basis @ leading
    core = frame.mT @ M.float() if half else (image @ leading).mT
    left, S, Vh = _svd_of_short(core)
    U, Vh = fix_signs(frame @ left, Vh)
    return U, S, Vh


def orthonormal_columns(Y: Tensor) -> Tensor:
    """Orthonormal basis (…, m, k) that contains the columns of Y: (…, m, k), k ≤ m.

    Cholesky QR with an fp64 Gram matrix, which is as good as Householder's for fp32 columns and several times faster;
    Householder's takes over for (nearly) dependent columns.
    """
    inverse = _inverse_cholesky(Y)
    return torch.linalg.qr(Y).Q if inverse is None else Y @ inverse


def extend_basis(basis: Tensor, Y: Tensor) -> Tensor:
    """Orthonormal (…, m, k) that is orthogonal to ``basis`` (…, m, b), and with it spans the columns of Y: (…, m, k).

    Where Y brings less than k new directions, arbitrary orthogonal ones stand in (k + b ≤ m is required).
    """
    rest = Y - basis @ (basis.mT @ Y)
    inverse = _inverse_cholesky(rest)
    if inverse is not None:
        rest = rest @ inverse
        rest = rest - basis @ (basis.mT @ rest)
        inverse = _inverse_cholesky(rest)
        if inverse is not None:
            return rest @ inverse
    return torch.linalg.qr(torch.cat([basis, Y], dim=-1)).Q[..., basis.shape[-1] :]


def subspace_error(estimate: Tensor, exact: Tensor) -> Tensor:
    """Distance of two subspaces, root mean square of the sines of the principal angles: 0 equal, 1 orthogonal.

    ``estimate``, ``exact``: (…, m, k) with orthonormal columns; returns (…). It is ‖(I − EEᵀ)X‖_F/√k. Directions of
    nearly equal singular values may be exchanged freely, so a flat spectrum shows large angles at a small loss: read it
    beside `excess_error`.
    """
    rest = exact - estimate @ (estimate.mT @ exact)
    return torch.linalg.matrix_norm(rest) / exact.shape[-1] ** 0.5


def excess_error(M: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> float:
    """‖M − U·diag(S)·Vh‖_F over the least error that any matrix of that rank can have (Eckart–Young), less one.

    M: (m, n). Costs an exact SVD. A matrix of no more than that rank has no such ratio: 0.0 when it is met to rounding
    error, infinity otherwise.
    """
    M = _working(M)
    error = torch.linalg.matrix_norm(M - (U * S) @ Vh)
    least = torch.linalg.vector_norm(torch.linalg.svdvals(M)[S.shape[-1] :])
    rounding = 1e-5 * torch.linalg.matrix_norm(M)
    if least <= rounding:
        return 0.0 if error <= rounding else float("inf")
    return float(error / least - 1)


def _working(M: Tensor) -> Tensor:
    return M.detach() if M.dtype == torch.float64 else M.detach().float()


@cache
def _multiplies_bf16_fast(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if device_type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def _inverse_cholesky(Y: Tensor) -> Tensor | None:
    """R⁻¹ of Y = QR for fp32 columns; None where they are too close to dependent for it, and for fp64."""
    if Y.dtype == torch.float64:
        return None
    wide = Y.double()
    lower, info = torch.linalg.cholesky_ex(wide.mT @ wide)
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    if bool((info != 0).any()) or bool((diagonal.amin(-1) <= _CHOLESKY_RATIO * diagonal.amax(-1)).any()):
        return None
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return inverse.mT.to(Y.dtype)


def _leading_right(X: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors of X: (…, n, k) as columns (…, k, rank), by XᵀX where its spectrum allows."""
    squares, vectors = torch.linalg.eigh((X.mT @ X).double())
    if bool((squares[..., -rank] <= _GRAM_RATIO * squares[..., -1]).any()):
        return torch.linalg.svd(X, full_matrices=False).Vh[..., :rank, :].mT
    return vectors[..., -rank:].to(X.dtype)


def _svd_of_short(B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact SVD of B: (…, k, n) with k ≪ n, from the fp64 eigenvectors of BBᵀ where its spectrum allows that."""
    wide = B.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    if B.dtype == torch.float64 or bool((squares[..., 0] <= _GRAM_RATIO * squares[..., -1]).any()):
        return torch.linalg.svd(B, full_matrices=False)
    left = vectors.flip(-1).to(B.dtype)
    S = squares.flip(-1).sqrt().to(B.dtype)
    return left, S, (left.mT @ B) / S.unsqueeze(-1)
