"""Principal components of rows that arrive in batches (Ross et al. 2008; as in EVA, arXiv:2410.07170)."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import UserError
from veneer.numerics.svd import fix_signs, randomized_svd


class IncrementalPCA:
    """Running principal component analysis of rows x ∈ R^d, mean-centred, that keeps m components.

    An update by N rows of mean x̄ takes the SVD of [diag(σ)·V ; X − x̄ ; √(n·N/(n + N))·(μ − x̄)], n and μ being the rows
    so far and their mean, and keeps the m leading right vectors. With m ≥ min(d, rows) this equals the analysis of all
    rows at once; with fewer, what earlier batches cut off is lost. Mean and variance follow Chan, Golub & LeVeque's
    update in fp64. Rows are held back until there are m of them, so short batches are safe.

    Args:
        components: m ≥ 1.
        exact: take exact SVDs; otherwise a block Krylov method with a fixed seed where it is cheaper.

    Attributes (before the first m rows have come: no components):
        components: (k, d) fp32, orthonormal rows, largest-magnitude entry positive; k = min(m, d, rows).
        singular_values: (k,) fp32, of the centred matrix of all rows.
        mean: (d,) fp64. count: the rows taken into the components.
        change: (k,) fp32, |cos| between each component and the one of the same index before the last update;
            0 where there was none.
    """

    def __init__(self, components: int, exact: bool = False) -> None:
        if components < 1:
            raise UserError(f"principal component analysis needs at least 1 component, not {components}")
        self.size, self.exact = components, exact
        self.count = 0
        self.mean: Tensor | None = None
        self._squares: Tensor | None = None  # (d,) fp64, Σ (x − μ)²
        self._waiting: list[Tensor] = []
        self.components = torch.empty(0, 0)
        self.singular_values = self.change = torch.empty(0)

    def update(self, X: Tensor) -> None:
        """Take in rows X: (N, d), any floating type, N ≥ 0; they are held back while fewer than m have come."""
        if X.ndim != 2 or (self.mean is not None and X.shape[1] != len(self.mean)):
            width = "d" if self.mean is None else len(self.mean)
            raise UserError(f"principal component analysis takes rows of shape (N, {width}), not {tuple(X.shape)}")
        if not len(X):
            return
        rows = torch.cat([*self._waiting, X.detach().float()])
        if self.count + len(rows) < min(self.size, X.shape[1]):
            self._waiting = [rows]
            return
        self._waiting = []
        self._absorb(rows)

    @property
    def variance(self) -> Tensor:
        """The variance of every coordinate (d,) fp64, unbiased (over count − 1)."""
        self._require_rows()
        return self._squares / max(1, self.count - 1)

    @property
    def explained_variance(self) -> Tensor:
        """The variance along every component (k,) fp64, unbiased."""
        self._require_rows()
        return self.singular_values.double().square() / max(1, self.count - 1)

    @property
    def explained_variance_ratio(self) -> Tensor:
        """σᵢ² over the total variance of all d coordinates times the rows, (k,) fp64; 0 for constant rows."""
        self._require_rows()
        total = self._squares.sum()
        ratio = self.singular_values.double().square() / total.clamp_min(torch.finfo(torch.float64).tiny)
        return torch.where(total > 0, ratio, torch.zeros_like(ratio))

    def _require_rows(self) -> None:
        if not self.count:
            held = sum(len(rows) for rows in self._waiting)
            raise UserError(
                f"principal component analysis of {self.size} components has only {held} rows: give more batches"
            )

    def _absorb(self, rows: Tensor) -> None:
        wide = rows.double()
        n, N = self.count, len(rows)
        batch_mean = wide.mean(0)
        centred = wide - batch_mean
        squares = centred.square().sum(0)
        parts = [centred.float()]
        if n:
            shift = self.mean - batch_mean
            weight = n * N / (n + N)
            parts = [self.singular_values[:, None] * self.components, *parts, (weight**0.5 * shift).float()[None]]
            self._squares = self._squares + squares + weight * shift.square()
            self.mean = (n * self.mean + N * batch_mean) / (n + N)
        else:
            self.mean, self._squares = batch_mean, squares
        self.count = n + N
        before = self.components
        stacked = torch.cat(parts)
        self.singular_values, self.components = self._leading(stacked)
        self.change = torch.zeros(len(self.components), device=rows.device)
        if n:
            k = min(len(before), len(self.components))
            self.change[:k] = (before[:k] * self.components[:k]).sum(1).abs()

    def _leading(self, M: Tensor) -> tuple[Tensor, Tensor]:
        k = min(self.size, M.shape[1], self.count)
        if not self.exact:
            _, S, Vh = randomized_svd(M, k)
            return S, Vh
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return S[:k], fix_signs(U[:, :k], Vh[:k])[1]
