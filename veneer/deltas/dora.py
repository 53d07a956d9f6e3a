"""DoRA: weight-decomposed low-rank adaptation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor

from veneer.core.adapted import Base
from veneer.core.delta import Delta, Fused, LoRAForm, Pair, Slot
from veneer.core.registry import PeftMap, method
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform
from veneer.numerics.norms import row_norms, row_squares


@method(
    "dora",
    axis="delta",
    paper="arXiv:2402.09353",
    system=0,
    gives=("pair", "components", "magnitude", "linear", "foldable", "frozen-base"),
)
class DoRA(Delta):
    """A low-rank change of the direction of each row of W, and a trained length for each row.

    V = W + s·BA, n_i = ‖V_i‖ held constant in the backward pass (§4.3), W′ = diag(m/n)·V:
    y = (m/n)∘(xWᵀ + s·xAᵀBᵀ) + b with s = α/r (Liu et al. 2024, eq. 5). The bias is not scaled.

    ======  =========  =========  ==============================
    tensor  shape      trained    start
    ======  =========  =========  ==============================
    A       (r, in)    yes        U(−1/√in, 1/√in)
    B       (out, r)   yes        0
    m       (out,)     yes        ‖W_i‖₂ of each row
    ======  =========  =========  ==============================

    Defaults: r = 8, α = r, as LoRA here; the paper uses LoRA's own values or half the rank. With dropout the magnitude
    acts on the dropped input too, as in PEFT: y = xWᵀ + b + (m/n − 1)∘x̃Wᵀ + (m/n)∘s·x̃AᵀBᵀ with x̃ = drop(x), at the
    price of a second base product.

    W is whatever lies beneath, with other adapters and the offset of an init in it. The norms are taken in fp32 from
    Gram matrices, so V is not formed; PEFT forms it, in the compute type. Rows of zeros stay zeros and do not become
    NaN. At an embedding the rows are those of the dense view, one for each dimension, as in PEFT.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0

    reasons = {"as_lora": "the magnitudes scale whole rows of W, which no low-rank pair does"}
    peft = PeftMap(
        "LORA",
        fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        keys={"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"},
        config={"use_dora": True},
    )

    def slots(self) -> Iterable[Slot]:
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), kaiming_uniform)
        yield Slot("B", "factor_b", (self.site.out_features, self.rank))
        yield Slot("m", "magnitude", (self.site.out_features,), lambda *_: row_squares(self.beneath().weight()).sqrt())

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank
        self._squares: tuple[object, Tensor] | None = None

    def pair(self) -> Pair:
        """The pair inside the norm."""
        return Pair(self.gated(self.A), self.B, self.scale)

    def fused(self, base: Base) -> Fused | None:
        own = base.links in ((), (self.offset,))
        if not own or not base.fusable or self.active_dropout():
            return None
        pair = self.stacked(self.pair()) if base.links else self.pair()
        return Fused(*pair, gain=self._gain(base, *pair, own))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        own = base.links in ((), (self.offset,))
        gain = self._gain(base, *(self.stacked(self.pair()) if base.links and own else self.pair()), own)
        y, kept = base(x), self.drop(x)
        b = base.own_bias() if own else base.bias()
        z = y if kept is x else base(kept)
        z = z if b is None else z - self._rows(b).to(z.dtype)
        A, B = self.cast(x, *self.pair()[:2])
        u = self.site.lift(self.site.project(kept, A), B) if self.site.factored() else self.site.run(kept, B @ A)
        return y + self._rows(gain - 1).to(z.dtype) * z + self._rows(gain * self.scale).to(u.dtype) * u

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B, s = self.pair()
        V = W + s * (B @ A)
        n = row_squares(V).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return V * (self.m / n)[:, None], b

    def weight(self, W: Tensor | None = None) -> Tensor:
        W = self.site.weight().float() if W is None else W
        return self.fold(W, None)[0] - W

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        return None

    def parameter_count(self) -> int:
        """r·(in + out) + out, and r for gates."""
        gates = 0 if self.gate is None else self.rank
        return self.rank * (self.site.in_features + self.site.out_features) + self.site.out_features + gates

    def _gain(self, base: Base, A: Tensor, B: Tensor, s: float, own: bool) -> Tensor:
        """m/n (out,) in fp32."""
        return self.m / self._norms(base, A, B, s, own).clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def _norms(self, base: Base, A: Tensor, B: Tensor, s: float, own: bool) -> Tensor:
        """n (out,) in fp32. The part that W alone decides is kept while W is the same tensor, frozen and unwritten.

        Of a W that trains nothing is kept: a fused optimiser writes past autograd's count of versions, and what stands
        for W in a forward may lie where another once lay.
        """
        W = self.site.weight() if own else base.weight()
        written = any(d.site.name is not None for d in getattr(self.site.module, "veneer", {}).values())
        if not own or written or W.requires_grad:
            self._squares = None
            return row_norms(row_squares(W), W, A, B, s)
        state = (W.data_ptr(), 0 if W.is_inference() else W._version)
        if self._squares is None or self._squares[0] != state:
            self._squares = (state, row_squares(W))
        return row_norms(self._squares[1], W, A, B, s)

    def _rows(self, v: Tensor) -> Tensor:
        """A vector (out,) that broadcasts over the layer's output."""
        return v.view(-1, *(1 for _ in self.site.module.kernel_size)) if self.site.kind == "conv" else v
