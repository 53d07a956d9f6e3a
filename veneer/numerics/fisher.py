"""Products with the inverse of an empirical Fisher matrix F = λI + (1/m)·Σ gᵢgᵢᵀ, which is never formed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from veneer.errors import UserError

CHUNK = 1 << 22  # entries of a window that are alive in a wider type at once


class InverseFisher(Protocol):
    """What `obs_prune` needs of F⁻¹."""

    def mul(self, x: Tensor) -> Tensor:
        """F⁻¹x (d,)."""

    def diag(self) -> Tensor:
        """[F⁻¹]ᵢᵢ (d,)."""


class FisherInverse:
    """F⁻¹ of a sliding window of gradients, the rows of Γ (m, d), by Woodbury's identity.

    F⁻¹x = (x − Γᵀ(nλI + S)⁻¹Γx)/λ with S = ΓΓᵀ (m, m) kept up to date. S and its Cholesky factor are in fp64, products
    with Γ in fp32 at least. n = m, so that rows not filled yet count as zeros; with ``count_rows`` n is the number of
    rows filled. O(dm + m³) a push or product.
    """

    def __init__(
        self, gradients: Tensor, damping: float, gram: Tensor | None = None, pushed: int | None = None,
        count_rows: bool = False,
    ) -> None:  # fmt: skip
        """Take over Γ (m, d), whole unless ``pushed`` says how many gradients it has seen; ``push`` writes into it."""
        if not damping > 0:
            raise UserError(f"the damping of a Fisher matrix must be positive, not {damping:g}")
        self.window, self.damping, self.count_rows = gradients, damping, count_rows
        self.pushed = len(gradients) if pushed is None else pushed
        self.wide = torch.promote_types(gradients.dtype, torch.float32)
        if gram is None:
            gram = sum(part.double() @ part.double().mT for _, part in self._parts())
        self.gram = gram

    @classmethod
    def empty(cls, rows: int, width: int, damping: float, like: Tensor, count_rows: bool = False) -> FisherInverse:
        """A window of ``rows`` zeros of ``width``, of the type and on the device of ``like``."""
        gram = torch.zeros(rows, rows, dtype=torch.float64, device=like.device)
        return cls(like.new_zeros(rows, width), damping, gram, 0, count_rows)

    def push(self, g: Tensor) -> None:
        """Let g (d,) take the place of the oldest gradient."""
        i = self.pushed % len(self.window)
        self.window[i] = g
        self.gram[i] = self.gram[:, i] = self._times(self.window[i])
        self.pushed += 1

    def mul(self, x: Tensor) -> Tensor:
        """F⁻¹x (d,)."""
        c = torch.cholesky_solve(self._times(x)[:, None], self._factor())[:, 0]
        return (x - self._combined(c).to(x.dtype)) / self.damping

    def newest(self) -> Tensor:
        """F⁻¹g of the gradient pushed last, as n·Γᵀ(nλI + S)⁻¹e: without the cancellation of ``mul``."""
        e = torch.zeros(len(self.window), 1, dtype=torch.float64, device=self.gram.device)
        e[(self.pushed - 1) % len(self.window)] = self.rows
        return self._combined(torch.cholesky_solve(e, self._factor())[:, 0])

    def diag(self) -> Tensor:
        """[F⁻¹]ᵢᵢ (d,)."""
        L = self._factor()
        solved = [torch.linalg.solve_triangular(L, part.double(), upper=False) for _, part in self._parts()]
        return torch.cat([(1 - V.square().sum(0)) / self.damping for V in solved]).to(self.wide)

    def entry(self, i: int, j: int) -> float:
        """[F⁻¹]ᵢⱼ."""
        V = torch.linalg.solve_triangular(self._factor(), self.window[:, [i, j]].double(), upper=False)
        return float((float(i == j) - V[:, 0] @ V[:, 1]) / self.damping)

    @property
    def rows(self) -> int:
        """n, what the sum over gradients is divided by."""
        return min(self.pushed, len(self.window)) or 1 if self.count_rows else len(self.window)

    def _factor(self) -> Tensor:
        """L (m, m) with LLᵀ = nλI + S."""
        shift = self.rows * self.damping * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        return torch.linalg.cholesky(self.gram + shift)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Γ by columns, in a type that can be summed in."""
        width = self.window.shape[1]
        step = max(1, CHUNK // len(self.window))
        for a in range(0, width, step):
            yield slice(a, a + step), self.window[:, a : a + step].to(self.wide)

    def _times(self, x: Tensor) -> Tensor:
        """Γx (m,), fp64."""
        return torch.stack([(part @ x[at].to(self.wide)).double() for at, part in self._parts()]).sum(0)

    def _combined(self, c: Tensor) -> Tensor:
        """Γᵀc (d,)."""
        return torch.cat([part.mT @ c.to(self.wide) for _, part in self._parts()])


def recursion(gradients: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """H (…, m, b) and d (…, m) with F⁻¹x = x/λ − Σⱼ hⱼ(hⱼ·x)/dⱼ, for gradients (…, m, b); O(m²b).

    h₁ = g₁/λ; hᵢ = gᵢ/λ − Σ_{j<i} hⱼ(hⱼ·gᵢ)/dⱼ; dᵢ = m + gᵢ·hᵢ. Leading dimensions are blocks of their own.
    """
    m = gradients.shape[-2]
    H, d = gradients / damping, gradients.new_zeros(gradients.shape[:-1])
    for i in range(m):
        g = gradients[..., i, :, None]
        c = (H[..., :i, :] @ g)[..., 0] / d[..., :i]
        H[..., i, :] -= (c[..., None, :] @ H[..., :i, :])[..., 0, :]
        d[..., i] = m + (H[..., i, None, :] @ g)[..., 0, 0]
    return H, d


class BlockFisherInverse:
    """F⁻¹ of gradients (m, d), block by block of ``block`` entries (all in one when None), by the static recursion."""

    def __init__(self, gradients: Tensor, damping: float, block: int | None = 128) -> None:
        m, self.width = gradients.shape
        size = min(block or self.width, self.width)
        blocks = -(-self.width // size)
        padded = torch.nn.functional.pad(gradients, (0, blocks * size - self.width))
        self.damping = damping
        self.H, self.d = recursion(padded.view(m, blocks, size).transpose(0, 1), damping)

    def mul(self, x: Tensor) -> Tensor:
        """F⁻¹x (d,)."""
        blocks, _, size = self.H.shape
        X = torch.nn.functional.pad(x, (0, blocks * size - self.width)).view(blocks, size, 1)
        low = self.H.mT @ (self.H @ X / self.d[..., None])
        return (X / self.damping - low).flatten()[: self.width]

    def diag(self) -> Tensor:
        """[F⁻¹]ᵢᵢ (d,)."""
        return (1 / self.damping - (self.H.square() / self.d[..., None]).sum(1)).flatten()[: self.width]


def obs_prune(w: Tensor, inverse: InverseFisher, k: int) -> tuple[Tensor, Tensor]:
    """(w without k entries, which are kept): optimal brain surgeon, all k at once.

    Dropped are the smallest saliencies wᵢ²/(2[F⁻¹]ᵢᵢ) of w (d,); the others move by F⁻¹z, z = −wᵢ/[F⁻¹]ᵢᵢ on the
    dropped. Interactions among these are not seen: drop many in several rounds.
    """
    diagonal = inverse.diag()
    kept = torch.ones_like(w, dtype=torch.bool)
    kept[(w.square() / (2 * diagonal)).argsort(stable=True)[:k]] = False
    z = torch.where(kept, 0, -w / diagonal)
    return torch.where(kept, w + inverse.mul(z), 0), kept
