"""Hydra: a parallel and a sequential low-rank head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.core.adapted import Base
from veneer.core.delta import Delta, LoRAForm, Slot
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform


@method("hydra", axis="delta", paper="arXiv:2309.06922", system=1, gives=("linear", "foldable", "frozen-base"))
class Hydra(Delta):
    """LoRA's branch on the layer's input and a second one on the frozen layer's output.

    z = xWᵀ + b, y = z + s·[(xA_pᵀ + a_p)B_pᵀ + c_p] + s·[(zA_sᵀ + a_s)B_sᵀ + c_s] (Kim et al. 2023, eq. 5).
    The sequential head sees z with its bias and without the parallel head's output. Both are linear, so they fold:
    W′ = (I + sB_sA_s)W + sB_pA_p, b′ = (I + sB_sA_s)b + s(B_pa_p + c_p + B_sa_s + c_s).

    =========  ==============  =========  ==========================
    tensor     shape           trained    start
    =========  ==============  =========  ==========================
    A_p        (r_p, in)       yes        U(−1/√in, 1/√in)
    B_p        (out, r_p)      yes        0
    A_s        (r_s, out)      yes        U(−1/√out, 1/√out)
    B_s        (out, r_s)      yes        0
    a_p, a_s   (r_p,), (r_s,)  biases     0
    c          (out,)          biases     0; it is c_p + c_s
    =========  ==============  =========  ==========================

    Defaults: s = 1 and no biases as in the official language experiments (RoBERTa: r_p = 4 and r_s = 8, on the second
    linear layer of each MLP); r_p = r_s = 4 here. Dropout acts on the r-dimensional middles, as in the official vision
    code.

    The official code has three implementations: one cannot run with the heads on, one folds into the wrong layer. The
    two output biases, of which only the sum acts, are one tensor here. At a convolution the sequential head is a 1×1
    convolution of the output; at an embedding the constant of the biases folds into every row.
    """

    rank: Annotated[int, At(ge=0, doc="r_p, inner dimension of the parallel head")] = 4
    sequential_rank: Annotated[int | None, At(ge=0, doc="r_s, of the sequential head; r_p when None")] = None
    scaling: Annotated[float, At(gt=0, doc="s, on both heads")] = 1.0
    biases: Annotated[bool, At(doc="trained biases in the middle and at the end of the heads")] = False
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on the middles, in training only")] = 0.0

    def slots(self) -> Iterable[Slot]:
        out, r_p, r_s = self.site.out_features, self.rank, self._second()
        yield Slot("A_p", "factor_a", (r_p, self.site.in_features), kaiming_uniform)
        yield Slot("B_p", "factor_b", (out, r_p))
        yield Slot("A_s", "factor_a", (r_s, out), kaiming_uniform)
        yield Slot("B_s", "factor_b", (out, r_s))
        if self.biases:
            yield Slot("a_p", "bias", (r_p,))
            yield Slot("a_s", "bias", (r_s,))
            yield Slot("c", "bias", (out,))

    def build(self) -> None:
        self.scale = self.scaling
        if not self.site.factored():
            raise UserError(f"hydra: {self.site.path} is a grouped convolution, where its heads have no factored form")

    def forward(self, x: Tensor, base: Base) -> Tensor:
        z = base(x)
        a_p, a_s = (self.a_p, self.a_s) if self.biases else (x.new_zeros(()), x.new_zeros(()))
        A_p, A_s, B, a_p, a_s = self.cast(x, self.A_p, self.A_s, self._both_B() * self.scale, a_p, a_s)
        parallel = self.site.project(x, A_p) + a_p
        sequential = F.linear(z if self._channel is None else z.movedim(self._channel, -1), A_s) + a_s
        y = z + self.site.lift(self.drop(torch.cat([parallel, sequential], -1)), B)
        if not self.biases:
            return y
        c = (self.c * self.scale).to(y.dtype)
        return y + (c if self._channel is None else c.view(-1, *(1 for _ in range(-1 - self._channel))))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B, _, change = self.as_lora(W, b)
        return W + B @ A, b if change is None else (change if b is None else b + change)

    def weight(self, W: Tensor | None = None) -> Tensor:
        A, B, _, _ = self.as_lora(self.site.weight().float() if W is None else W, None)
        return B @ A

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm:
        """A pair of rank r_p + r_s at scale 1, and the change of the bias; at an embedding that is one more row."""
        s = self.scale
        A, B = torch.cat([self.A_p, self.A_s @ W]), self._both_B() * s
        change = None if b is None else s * (self.B_s @ (self.A_s @ b))
        if self.biases:
            constant = s * (self.B_p @ self.a_p + self.B_s @ self.a_s + self.c)
            if self.site.kind == "embedding":
                return LoRAForm(torch.cat([A, A.new_ones(1, A.shape[1])]), torch.cat([B, constant[:, None]], 1), 1.0)
            change = constant if change is None else change + constant
        return LoRAForm(A, B, 1.0, change)

    def parameter_count(self) -> int:
        """r_p·(in + out) + 2·r_s·out, and r_p + r_s + out for biases."""
        out, r_p, r_s = self.site.out_features, self.rank, self._second()
        return r_p * (self.site.in_features + out) + 2 * r_s * out + (r_p + r_s + out if self.biases else 0)

    def _second(self) -> int:
        return self.rank if self.sequential_rank is None else self.sequential_rank

    def _both_B(self) -> Tensor:
        return torch.cat([self.B_p, self.B_s], dim=1)

    @property
    def _channel(self) -> int | None:
        """Where a convolution's output has its channels; None where they are last."""
        return -1 - len(self.site.module.kernel_size) if self.site.kind == "conv" else None
