"""Monarch: a product of two block-diagonal matrices with a permutation between, beside W or in its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor

from veneer.core.adapted import Base
from veneer.core.delta import Delta, LoRAForm, Pair, Slot
from veneer.core.registry import method
from veneer.fields import At
from veneer.numerics import monarch
from veneer.numerics.chance import kaiming_uniform, zeros

_THIN = 64  # inner widths up to this run faster as two thin dense products than as batches of small ones


@method("monarch", axis="delta", paper="arXiv:2204.00595", system=53, gives=("linear", "foldable", "frozen-base"))
class Monarch(Delta):
    """A change of rank ρN² from the parameters of a LoRA of rank ρN.

    M[σN + λ, κp + j] = Σ_i L2[λ, σ, κρ + i]·L1[κ, iN + λ, j] with N blocks of p = ⌈in/N⌉ inputs and of s = ⌈out/N⌉
    outputs; W′ = W + (α/ρN)·M, a form of ours, or W′ = M with ``replace`` (Dao et al. 2022, §3).

    ======  ============  =========  =======================  ==========================
    tensor  shape         trained    start                    start with ``replace``
    ======  ============  =========  =======================  ==========================
    L1      (N, ρN, p)    yes        U(−1/√p, 1/√p)           the projection of W, or so
    L2      (N, s, Nρ)    yes        0                        the projection, or uniform
    ======  ============  =========  =======================  ==========================

    Defaults: N = 4 as in the official layer, ρ = 1, scale 1. The paper's own regime is N near √in, where M is a fast
    transform: Fourier and Hadamard matrices are of this class with ρ = 1. The official layer has dense inner blocks,
    which is ρ = ⌈in/N⌉/N or ⌈out/N⌉/N, the smaller. Inputs that N does not divide are padded with zeros, outputs cut.

    ``replace`` with ``start="projection"`` (D2S) puts M at the nearest such matrix to W, slice by slice in closed form,
    to be fine-tuned; ``start="random"`` trains it from nothing. The bias of the layer stays. ``bake`` after some of the
    training gives a dense weight to go on with (S2D). Weight decay acts on the factors, which is not decay of M.

    N²ρ up to 64 is run, folded and exported as the pair of that rank which it also is, through the fused product;
    beyond that by batched products. Convolutions and embeddings take the pair, or M. The official kernel runs in fp16
    under autocast; here both ways keep the precision of x. Small blocks are slower than a dense product on a CPU.
    """

    rank: Annotated[int, At(ge=1, doc="ρ, rank of the part between two blocks")] = 1
    blocks: Annotated[int, At(ge=1, doc="N, blocks on either side")] = 4
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale α/ρN; ρN when None")] = None
    replace: Annotated[bool, At(doc="stand for W in place of changing it")] = False
    start: Annotated[Literal["projection", "random"], At(doc="with replace: from W, or from nothing")] = "projection"

    reasons = {"as_lora": "N²ρ is not below the rank of W, or M stands for W"}

    def slots(self) -> Iterable[Slot]:
        N, p, s = self.blocks, self._inputs(), self._outputs()
        yield Slot("L1", "core", (N, self.rank * N, p), kaiming_uniform)
        yield Slot("L2", "core", (N, s, N * self.rank), kaiming_uniform if self.replace else zeros)

    def build(self) -> None:
        whole = self.rank * self.blocks
        self.scale = 1.0 if self.replace or self.alpha is None else self.alpha / whole
        self.replaces, self.starts_at_base = self.replace, not self.replace
        if self.replace and self.start == "projection" and self.site.weight().numel():
            L1, L2 = monarch.project(self._padded(self.site.weight().float()), self.blocks, self.blocks, self.rank)
            self.set_tensor("L1", L1, trained=True)
            self.set_tensor("L2", L2, trained=True)

    def pair(self) -> Pair | None:
        """The pair of rank N²ρ, where that is thin and W stays."""
        return None if self.replace or self._width() > _THIN else Pair(*self._factors(), self.scale)

    def is_plain(self) -> bool:
        """Whether it runs as its pair; asking must not make it."""
        return not self.replace and self._width() <= _THIN

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self.replace:
            return super().forward(x, base)
        b = self.site.bias()
        if self.site.kind != "linear":
            return self.site.run(x, *self.cast(x, self._matrix()), b)
        y = self._multiplied(x)
        return y if b is None else y + b.to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        if self.is_plain():
            return super().update(x)
        return self._multiplied(x) if self.site.kind == "linear" else self.site.run(x, *self.cast(x, self._matrix()))

    def weight(self, W: Tensor | None = None) -> Tensor:
        M = self._matrix()
        return M if not self.replace else M - (self.site.weight().float() if W is None else W)

    def fold(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        M = self._matrix()
        return (M if self.replace else W + M), b

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        """The pair of rank N²ρ, where that is below the rank of W."""
        thin = self._width() < min(self.site.out_features, self.site.in_features)
        return LoRAForm(*self._factors(), self.scale) if thin and not self.replace else None

    def parameter_count(self) -> int:
        """ρN²·(p + s)."""
        return self._width() * (self._inputs() + self._outputs())

    def _width(self) -> int:
        """N²ρ, the numbers between the two factors."""
        return self.blocks**2 * self.rank

    def _inputs(self) -> int:
        """p, inputs of a block."""
        return -(-self.site.in_features // self.blocks)

    def _outputs(self) -> int:
        """s, outputs of a block."""
        return -(-self.site.out_features // self.blocks)

    def _padded(self, W: Tensor) -> Tensor:
        """W (out, in) with zeros up to whole blocks."""
        short = [self.blocks * self._inputs() - W.shape[1], self.blocks * self._outputs() - W.shape[0]]
        return F.pad(W, (0, short[0], 0, short[1]))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A (N²ρ, in) and B (out, N²ρ)."""
        A, B = monarch.factors(self.L1, self.L2)
        return A[:, : self.site.in_features], B[: self.site.out_features]

    def _matrix(self) -> Tensor:
        """The scaled M (out, in), in the type of the factors."""
        A, B = self._factors()
        return self.scale * (B @ A)

    def _multiplied(self, x: Tensor) -> Tensor:
        L1, L2 = self.cast(x, self.L1, self.scale * self.L2)
        short = self.blocks * self._inputs() - x.shape[-1]
        x = (F.pad(x, (0, short)) if short else x).to(L1.dtype)
        return monarch.multiply(x, L1, L2)[..., : self.site.out_features]
