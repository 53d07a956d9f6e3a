"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import PeftMap, method
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform, normal, zeros


@method("loha", axis="delta", paper="arXiv:2108.06098", system=0, gives=("linear", "foldable", "frozen-base"))
class LoHa(Delta):
    """A change of rank up to r² from twice the tensors of LoRA.

    ΔW = s·(w1a·w1b) ∘ (w2a·w2b), s = α/r (FedPara: Hyeon-Woo et al. 2022, prop. 1; LyCORIS for adapters).

    ======  =========  =========  ====================  ========================
    tensor  shape      trained    start                 with ``start="lycoris"``
    ======  =========  =========  ====================  ========================
    w1a     (out, r)   yes        U(−1/√r, 1/√r)        N(0, 0.1²)
    w1b     (r, in)    yes        U(−1/√in, 1/√in)      N(0, 1)
    w2a     (out, r)   yes        U(−1/√r, 1/√r)        0
    w2b     (r, in)    yes        0                     N(0, 1)
    ======  =========  =========  ====================  ========================

    Defaults: r = 8, α = r and the start as PEFT's; LyCORIS has its own start and α = 1, so that good rates differ. At
    the first step one of the four tensors has a gradient.

    Both published codes form ΔW in every forward. Here it is a plain pair of rank r² in disguise: row (i, j) of A is
    w1b_i ∘ w2b_j and column (i, j) of B is w1a_i ∘ w2a_j, so that nothing of W's size is made where r²(in + out) ≤
    in·out. Above that ΔW is formed, and formed again in the backward pass. Convolutions are taken in the dense view,
    without LyCORIS's Tucker form; rank and module dropout are left out.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r of both products")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    start: Annotated[Literal["peft", "lycoris"], At(doc="which tensor starts at 0, and how far the others spread")] = (
        "peft"
    )

    peft = PeftMap(
        "LOHA",
        fields={"rank": "r", "alpha": "alpha"},
        keys={"w1a": "hada_w1_a", "w1b": "hada_w1_b", "w2a": "hada_w2_a", "w2b": "hada_w2_b"},
    )

    def slots(self) -> Iterable[Slot]:
        left, right = (self.site.out_features, self.rank), (self.rank, self.site.in_features)
        ours = self.start == "peft"
        yield Slot("w1a", "factor_b", left, kaiming_uniform if ours else normal(0.1))
        yield Slot("w1b", "factor_a", right, kaiming_uniform if ours else normal(1.0))
        yield Slot("w2a", "factor_b", left, kaiming_uniform if ours else zeros)
        yield Slot("w2b", "factor_a", right, zeros if ours else normal(1.0))

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank

    def pair(self) -> Pair | None:
        """The pair of rank r² that ΔW is, where it is smaller than ΔW."""
        out, inn = self.site.out_features, self.site.in_features
        if self.rank**2 * (inn + out) > inn * out:
            return None
        A = self.w1b[:, None, :] * self.w2b[None, :, :]
        B = self.w1a[:, :, None] * self.w2a[:, None, :]
        return Pair(A.flatten(0, 1), B.flatten(1), self.scale)

    def is_plain(self) -> bool:
        return self.pair() is not None

    def update(self, x: Tensor) -> Tensor:
        if self.pair() is not None:
            return super().update(x)

        def product(x: Tensor, *factors: Tensor) -> Tensor:
            return self.site.run(x, self._dense(*factors).to(self.compute_dtype(x)))

        factors = (self.w1a, self.w1b, self.w2a, self.w2b)
        return checkpoint(product, x, *factors, use_reentrant=False, preserve_rng_state=False)

    def weight(self, W: Tensor | None = None) -> Tensor:
        return self._dense(self.w1a, self.w1b, self.w2a, self.w2b)

    def parameter_count(self) -> int:
        """2r·(in + out)."""
        return 2 * self.rank * (self.site.in_features + self.site.out_features)

    def _dense(self, w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> Tensor:
        return self.scale * (w1a @ w1b) * (w2a @ w2b)
