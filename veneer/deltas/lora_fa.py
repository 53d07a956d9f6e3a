"""LoRA-FA: LoRA with a frozen A, and the gradient that makes up for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta, Pair, Slot
from veneer.core.hook import Optim
from veneer.core.registry import PeftMap, method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform
from veneer.numerics.solve import gram_inverse


@method(
    "lora-fa",
    axis="delta",
    paper="arXiv:2308.03303",
    system=0,
    gives=("pair", "components", "linear", "foldable", "frozen-base"),
)
class LoRAFA(Delta):
    """LoRA whose A stays at its random start: backward needs xAᵀ and not x.

    y = xWᵀ + b + s·drop(x)AᵀBᵀ with s = α/r, ΔW = s·BA in the row space of A (Zhang et al. 2023, eq. 3).

    ======  =========  =========  ==============================
    tensor  shape      trained    start
    ======  =========  =========  ==============================
    A       (r, in)    no         U(−1/√in, 1/√in), from the seed
    B       (out, r)   yes        0
    ======  =========  =========  ==============================

    Defaults are LoRA's: r = 8, α = r. The paper draws A ~ N(0, 1/r); the start here is the one of LoRA and of PEFT, so
    that the two compare. A is a seed and not in the file, but for a start (PiSSA, EVA) that filled it. In PEFT it is
    plain LoRA, whose file holds both factors.
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
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), kaiming_uniform, trained=False)
        yield Slot("B", "factor_b", (self.site.out_features, self.rank))

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank

    def pair(self) -> Pair:
        return Pair(self.gated(self.A), self.B, self.scale)

    def parameter_count(self) -> int:
        """r·out, and r for gates."""
        return self.rank * self.site.out_features + (0 if self.gate is None else self.rank)


@method("lora-fa-correction", axis="optim", paper="arXiv:2308.03303", system=0, defaults="lora-fa")
class LoRAFACorrection(Optim):
    """The gradient of B for which a step changes W most like full fine-tuning, A being frozen.

    g_B ← (1/s²)·g_B·(AAᵀ)⁻¹, before the optimiser. With G = ∂L/∂W, g_B is s·GAᵀ and becomes (1/s)·GAᵀ(AAᵀ)⁻¹, so a
    step of SGD changes W by −η times the projection of G on A's row space, whatever s and the size of A are.

    Nothing trains and nothing is stored. It is what PEFT's LoRA-FA optimiser does inside AdamW; there the product is
    taken in bf16 where the machine has it, and factors are told by the order of their names. Here the loop's own
    optimiser follows and the inverse is taken in fp64. Through Adam, which divides by the gradient's size, only the
    mixing of columns remains.
    """

    def on_attach(self, adapter: Adapter) -> None:
        trained = next((d.site.path for d in adapter.deltas.values() if d.pair() and d.pair().A.requires_grad), None)
        if trained is not None:
            raise UserError(f"lora-fa-correction is for a frozen A, and A trains at {trained}; put it beside lora-fa")

    @torch.no_grad()
    def before_optimizer(self, step: int) -> None:
        for delta in self.adapter.deltas.values():
            pair = delta.pair()
            if pair is not None and pair.B.grad is not None:
                A = pair.A.double()
                pair.B.grad.copy_(pair.B.grad.double() @ gram_inverse(A @ A.T) / pair.scale**2)
