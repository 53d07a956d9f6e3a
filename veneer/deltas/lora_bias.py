"""LoRA with a bias on B, as PEFT's ``lora_bias``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor

from veneer.core.delta import Delta, LoRAForm, Pair, Slot
from veneer.core.registry import PeftMap, method
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform


@method(
    "lora-bias",
    axis="delta",
    paper="arXiv:2106.09685",
    gives=("pair", "components", "linear", "foldable", "frozen-base"),
)
class LoRABias(Delta):
    """A low-rank change of the weight and a change of the bias under one scale.

    y = xWᵀ + b + s·(drop(x)AᵀBᵀ + c), so ΔW = s·BA and Δb = s·c with s = α/r. It is what PEFT's ``lora_bias`` computes,
    made for factors taken out of a fully fine-tuned model, whose biases moved too.

    ======  =========  =========  ==============================
    tensor  shape      trained    start
    ======  =========  =========  ==============================
    A       (r, in)    yes        U(−1/√in, 1/√in)
    B       (out, r)   yes        0
    bias    (out,)     yes        0   (c above)
    ======  =========  =========  ==============================

    Defaults: r = 8, α = r, as LoRA here. Folding gives a layer without a bias one.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0

    layers = ("linear", "conv")
    reasons = {"layers": "an embedding has no bias, and PEFT refuses lora_bias there"}
    peft = PeftMap(
        "LORA",
        fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        keys={"A": "lora_A", "B": "lora_B", "bias": "lora_B.bias"},
        config={"lora_bias": True},
    )

    def slots(self) -> Iterable[Slot]:
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), kaiming_uniform)
        yield Slot("B", "factor_b", (self.site.out_features, self.rank))
        yield Slot("bias", "bias", (self.site.out_features,))

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank

    def pair(self) -> Pair:
        """The pair beside the bias."""
        return Pair(self.gated(self.A), self.B, self.scale)

    def update(self, x: Tensor) -> Tensor:
        A, B, c = self.cast(x, *self.pair()[:2], self.bias)
        if not self.site.factored():
            return self.site.run(self.drop(x), B @ A, c) * self.scale
        h = self.site.project(self.drop(x), A)
        one = torch.ones_like(h[..., :1])  # c rides as one more component, whatever the layout of the output
        return self.site.lift(torch.cat([h, one], -1), torch.cat([B, c[:, None]], 1)) * self.scale

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self.scale * self.bias
        return W + self.weight(), change if b is None else b + change

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        return LoRAForm(*self.pair(), self.scale * self.bias)

    def parameter_count(self) -> int:
        """r·(in + out) + out, and r for gates."""
        gates = 0 if self.gate is None else self.rank
        return self.rank * (self.site.in_features + self.site.out_features) + self.site.out_features + gates
