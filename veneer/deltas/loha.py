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
    in·out. Above that ΔW is formed. Either way backward keeps x and forms the rest again. Convolutions are taken in the
    dense view, without LyCORIS's Tucker form; rank and module dropout are left out.
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
        return Pair(*_crossed(*self._factors()), self.scale) if self._thin() else None

    def update(self, x: Tensor) -> Tensor:
        form = self._dense
        if self._thin() and self.site.factored():
            form = self._looked_up if self.site.kind == "embedding" else self._crossed
        return checkpoint(form, x, *self._factors(), use_reentrant=False, preserve_rng_state=False)

    def weight(self, W: Tensor | None = None) -> Tensor:
        return self.scale * _product(*self._factors())

    def parameter_count(self) -> int:
        """2r·(in + out)."""
        return 2 * self.rank * (self.site.in_features + self.site.out_features)

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.w1a, self.w1b, self.w2a, self.w2b

    def _thin(self) -> bool:
        """Whether the pair of rank r² is smaller than ΔW."""
        out, inn = self.site.out_features, self.site.in_features
        return self.rank**2 * (inn + out) <= inn * out

    def _crossed(self, x: Tensor, *factors: Tensor) -> Tensor:
        A, B = _crossed(*factors)
        A, B = self.cast(x, A, B * self.scale)
        return self.site.lift(self.site.project(x, A), B)

    def _looked_up(self, x: Tensor, w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> Tensor:
        """At an embedding: the rows of A are crossed word by word."""
        h = self.site.project(x, w1b)[..., :, None] * self.site.project(x, w2b)[..., None, :]
        B = (w1a[:, :, None] * w2a[:, None, :]).flatten(1) * self.scale
        return self.site.lift(*self.cast(x, h.flatten(-2), B))

    def _dense(self, x: Tensor, *factors: Tensor) -> Tensor:
        return self.site.run(x, *self.cast(x, self.scale * _product(*factors)))


def _product(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> Tensor:
    """(w1a·w1b) ∘ (w2a·w2b), (out, in)."""
    return (w1a @ w1b) * (w2a @ w2b)


def _crossed(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> tuple[Tensor, Tensor]:
    """The same as A (r², in) and B (out, r²)."""
    A = w1b[:, None, :] * w2b[None, :, :]
    B = w1a[:, :, None] * w2a[:, None, :]
    return A.flatten(0, 1), B.flatten(1)
