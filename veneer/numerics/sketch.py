"""A linear sketch of a matrix that is only seen as a sum of products: its SVD in one pass and bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import UserError
from veneer.numerics.svd import fix_signs, orthonormal_columns, truncated_svd


class GradientSketch:
    """One-pass randomised SVD of G = Σ gᵀx ∈ R^{out×in} (Tropp, Yurtsever, Udell & Cevher 2017, arXiv:1609.00048).

    Holds Y = GΩ: (out, k) and W = ΨG: (l, in) with Gaussian Ω: (in, k), Ψ: (l, out), k = 2·rank + 1, l = 2k + 1; both
    are sums over the batches, G is never formed. With Q = orth(Y) it is G ≈ Q·(ΨQ)⁺W, whose SVD is that of a small
    matrix. Expected error at these sizes: ‖G − Ĝ‖_F² ≤ 4·Σ_{i>rank} σᵢ² before truncation; a G of rank ≤ k comes out
    exactly. Where the four matrices would take more than half of G's memory, G itself is summed: the result is exact.

    Args:
        out, inputs: the shape of G.
        rank: singular triplets that will be asked for, 1 ≤ rank ≤ min(out, inputs).
        generator: CPU generator of Ω and Ψ; None: a fresh one with seed 0.
    """

    def __init__(self, out: int, inputs: int, rank: int, generator: torch.Generator | None = None) -> None:
        if rank < 1:
            raise UserError(f"a gradient sketch needs a rank of at least 1, not {rank}")
        self.shape, self.rank = (out, inputs), rank
        k = 2 * rank + 1
        width = 2 * k + 1
        self.dense: Tensor | None = None
        if 2 * (k + width) * (out + inputs) > out * inputs:
            self.dense = torch.zeros(out, inputs)
            return
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.omega = torch.randn(inputs, k, generator=generator)
        self.psi = torch.randn(width, out, generator=generator)
        self.range = torch.zeros(out, k)
        self.corange = torch.zeros(width, inputs)

    def add(self, g: Tensor, x: Tensor) -> None:
        """G += gᵀx for g: (N, out), x: (N, in), in fp32, at O(N·rank·(out + in)) instead of O(N·out·in)."""
        if g.ndim != 2 or x.ndim != 2 or len(g) != len(x) or (g.shape[1], x.shape[1]) != self.shape:
            raise UserError(
                f"a gradient sketch of {self.shape[0]}×{self.shape[1]} takes g: (N, {self.shape[0]}) and "
                f"x: (N, {self.shape[1]}), not {tuple(g.shape)} and {tuple(x.shape)}"
            )
        g, x = g.detach().float(), x.detach().float()
        if self.dense is not None:
            self.dense = self.dense.to(x.device).addmm_(g.mT, x)
            return
        self._move(x.device)
        self.range.addmm_(g.mT, x @ self.omega)
        self.corange.addmm_(self.psi @ g.mT, x)

    def svd(self, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Leading triplets of G: U (out, r), S (r,), Vh (r, in); r = ``rank``, by default and at most the sketch's."""
        rank = self.rank if rank is None else rank
        if not 1 <= rank <= self.rank:
            raise UserError(f"this gradient sketch holds 1 to {self.rank} singular triplets, not {rank}")
        if self.dense is not None:
            return truncated_svd(self.dense, rank)
        Q = orthonormal_columns(self.range)
        core = torch.linalg.lstsq((self.psi @ Q).double(), self.corange.double()).solution.float()
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        U, Vh = fix_signs(Q @ U[:, :rank], Vh[:rank])
        return U, S[:rank], Vh

    @property
    def memory(self) -> int:
        """Bytes held."""
        held = [self.dense] if self.dense is not None else [self.omega, self.psi, self.range, self.corange]
        return sum(t.numel() * t.element_size() for t in held)

    def _move(self, device: torch.device) -> None:
        if self.range.device != device:
            for name in ("omega", "psi", "range", "corange"):
                setattr(self, name, getattr(self, name).to(device))
