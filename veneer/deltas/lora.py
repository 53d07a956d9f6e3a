"""LoRA and rank-stabilised LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import PeftMap, method
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform


@method(
    "lora",
    axis="delta",
    paper="arXiv:2106.09685",
    system=0,
    gives=("pair", "components", "linear", "foldable", "frozen-base"),
)
class LoRA(Delta):
    """A low-rank change beside a frozen weight.

    y = xWᵀ + b + s·drop(x)AᵀBᵀ, so ΔW = s·BA with s = α/r (Hu et al. 2021, eq. 3).

    ======  =========  =========  ==============================
    tensor  shape      trained    start
    ======  =========  =========  ==============================
    A       (r, in)    yes        U(−1/√in, 1/√in)
    B       (out, r)   yes        0
    ======  =========  =========  ==============================

    Defaults: r = 8 as in the paper's RoBERTa runs, α = r (scale 1). At a convolution A is a convolution with the base's
    kernel, stride and padding to r channels and B a 1×1 one; at an embedding A is looked up by row. The official
    embedding starts from A = 0 and B ~ N(0, 1); here every layer starts the same way.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0

    peft = PeftMap(
        "LORA",
        fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        keys={"A": "lora_A", "B": "lora_B"},
    )

    def slots(self) -> Iterable[Slot]:
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), kaiming_uniform)
        yield Slot("B", "factor_b", (self.site.out_features, self.rank))

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank

    def pair(self) -> Pair:
        return Pair(self.gated(self.A), self.B, self.scale)

    def parameter_count(self) -> int:
        """r·(in + out), and r for gates."""
        gates = 0 if self.gate is None else self.rank
        return self.rank * (self.site.in_features + self.site.out_features) + gates


@method(
    "rslora",
    axis="delta",
    paper="arXiv:2312.03732",
    system=0,
    gives=("pair", "components", "linear", "foldable", "frozen-base"),
)
class RsLoRA(LoRA):
    """LoRA whose scale keeps the update's size as the rank grows: s = α/√r (Kalajdzievski 2023).

    Tensors and start are LoRA's. Sensible for r ≥ 32 with α held constant.
    """

    peft = PeftMap("LORA", fields=LoRA.peft.fields, keys=LoRA.peft.keys, config={"use_rslora": True})

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank**0.5
