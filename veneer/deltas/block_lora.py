"""Block-LoRA: several up-projections that share one down-projection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform


@method(
    "block-lora",
    axis="delta",
    paper="arXiv:2501.16720",
    system=20,
    gives=("pair", "linear", "foldable", "frozen-base"),
)
class BlockLoRA(Delta):
    """LoRA cut into n blocks along its rank, all with the same A: one head, n arms.

    ΔW = s·(B_1 + … + B_n)·A with A (r/n, in) and B_j (out, r/n), s = α/√r (Zhou et al. 2025).

    ======  =============  =========  ==================================================
    tensor  shape          trained    start
    ======  =============  =========  ==================================================
    A       (r/n, in)      yes        U(−1/√in, 1/√in)
    B       (out, r/n)     yes        0; it stands for every arm
    arms    (n, out, r/n)  yes        0; in place of B with ``materialise_arms``
    ======  =============  =========  ==================================================

    All arms start alike and get the same gradient, so under SGD, Adam or AdamW they stay alike for ever: the form is
    LoRA of rank r/n whose B moves n times as far at a step. One arm is stored here, n times it is in the product, and
    its gradient is that of one arm, so each optimiser moves it as it would the n, decay included. Only the norm by
    which gradients are clipped tells them apart, √n of B's part: ``materialise_arms`` trains n tensors.

    Defaults: r = 8 and n = 2 are ours, as the paper's could not be had; for CLIP r = 2, n = 2 with q, k and v of both
    encoders, dropout 0.25, rate 2e-4, decay 0.01. α = 1 over √r is the code of CLIP-LoRA, which the paper starts from;
    ``scale_rule="alpha_over_r"`` is its notation. r is nominal: compare with LoRA of rank r/n. PEFT's block-diagonal
    LoRA is something else; exported, this is plain LoRA of rank r/n.
    """

    rank: Annotated[int, At(ge=1, doc="nominal rank r, a multiple of the blocks")] = 8
    blocks: Annotated[int, At(ge=1, doc="n, arms that share A")] = 2
    alpha: Annotated[float, At(gt=0, doc="numerator of the scale s")] = 1.0
    scale_rule: Annotated[Literal["alpha_over_sqrt_r", "alpha_over_r"], At(doc="denominator of s")] = (
        "alpha_over_sqrt_r"
    )
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0
    materialise_arms: Annotated[bool, At(doc="store and train n arms in place of one for all")] = False

    def slots(self) -> Iterable[Slot]:
        if self.rank % self.blocks:
            raise UserError(
                f"block-lora: rank={self.rank} cannot be cut into blocks={self.blocks}; give a multiple of it as rank"
            )
        rank = self.rank // self.blocks
        yield Slot("A", "factor_a", (rank, self.site.in_features), kaiming_uniform)
        if self.materialise_arms:
            yield Slot("arms", "factor_b", (self.blocks, self.site.out_features, rank))
        else:
            yield Slot("B", "factor_b", (self.site.out_features, rank))

    def build(self) -> None:
        """The scale is of one arm: n·s."""
        nominal = self.rank if self.scale_rule == "alpha_over_r" else self.rank**0.5
        self.scale = self.blocks * self.alpha / nominal

    def fill(self, start: dict[str, Tensor]) -> None:
        if self.materialise_arms and "factor_b" in start:
            start = start | {"factor_b": start["factor_b"].expand(self.blocks, -1, -1)}
        super().fill(start)

    def pair(self) -> Pair:
        arm = self.arms.mean(0) if self.materialise_arms else _OfOneArm.apply(self.B, self.blocks)
        return Pair(self.A, arm, self.scale)

    def parameter_count(self) -> int:
        """(r/n)·(in + out); (r/n)·in + r·out with materialised arms."""
        rank = self.rank // self.blocks
        return rank * self.site.in_features + (self.rank if self.materialise_arms else rank) * self.site.out_features


class _OfOneArm(torch.autograd.Function):
    """B itself; in backward the n-th part of the gradient, which is what one of n arms gets."""

    @staticmethod
    def forward(ctx: Any, B: Tensor, n: int) -> Tensor:
        ctx.n = n
        return B.view_as(B)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.n, None
