"""SLTrain: a low-rank matrix plus a sparse one on a fixed random support."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.core.adapted import Base
from veneer.core.delta import Delta, LoRAForm, Slot
from veneer.core.registry import PeftMap, method
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform, zeros


@method("sltrain", axis="delta", paper="arXiv:2406.02214", system=34, gives=("linear", "foldable", "frozen-base"))
class SLTrain(Delta):
    """A low-rank part for the head of the spectrum and random entries for its tail.

    M = s·BA, then M.flat[I] += v with I a random set of ⌊δ·out·in⌋ entries (Han et al. 2024, eq. 1). With
    ``replace=True`` M is the weight, as in the paper's pre-training; otherwise, a form of ours, y = x(W + M)ᵀ + b.

    =======  ===============  =========  ==========================================================
    tensor   shape            trained    start
    =======  ===============  =========  ==========================================================
    A        (r, in)          yes        U(−1/√in, 1/√in)
    B        (out, r)         yes        0
    v        (⌊δ·out·in⌋,)    yes        0, or U(−1/√in, 1/√in) with replace
    bias     (out,)           replace    U(−1/√out, 1/√out); only where the layer has one
    indices  as v, int        no         I, sorted
    =======  ===============  =========  ==========================================================

    Defaults are those of the official wrapper: r = 128, δ = 0.01 (0.03 in its runs), α = 32, s = α/r; its rate for
    pre-training is 3e-3. Embeddings, norms and head train densely beside it: name them with ``train=``.

    A linear layer has an autograd function that keeps x, A, B, v and I and makes M again in the backward pass, as the
    official code does in a compiled extension. Over a frozen W it is a product of its own: added to a bf16 W, small
    entries of M would be rounded away. Indices are 32-bit where they fit. The trained scale tanh(θ) and the optimiser
    that steps inside backward are left out.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r of the low-rank part")] = 128
    alpha: Annotated[float, At(gt=0, doc="numerator of the scale s = α/r")] = 32.0
    density: Annotated[float, At(gt=0, le=1, doc="δ, the share of entries in the sparse part")] = 0.01
    replace: Annotated[bool, At(doc="stand for W, for pre-training, in place of changing it")] = False

    peft = PeftMap(
        "SUPERTUNING",
        fields={"rank": "r", "alpha": "lora_alpha"},
        keys={
            "A": "supertuning_lora_A",
            "B": "supertuning_lora_B",
            "v": "supertuning_values",
            "indices": "supertuning_indices",
        },
    )
    reasons = {"as_lora": "the sparse part has full rank"}

    def slots(self) -> Iterable[Slot]:
        out, inn = self.site.out_features, self.site.in_features
        yield Slot("A", "factor_a", (self.rank, inn), kaiming_uniform)
        yield Slot("B", "factor_b", (out, self.rank))
        yield Slot("v", "sparse", (self._count(),), _within(inn**-0.5) if self.replace else zeros)
        if self.replace and self.site.bias() is not None:
            yield Slot("bias", "bias", (out,), _within(out**-0.5))

    def build(self) -> None:
        self.scale = self.alpha / self.rank
        self.replaces, self.starts_at_base = self.replace, not self.replace
        self.usual_rate = 3e-3 if self.replace else None
        entries = self.site.out_features * self.site.in_features
        chosen = torch.randperm(entries, generator=self.generator("support"))[: self._count()].sort().values
        chosen = chosen.to(torch.int32 if entries < 2**31 else torch.int64)
        self.register_buffer("indices", chosen.to(self.site_device()))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind == "linear":
            facts = self.scale, self.compute_dtype(x)
            y = _SparseLowRank.apply(x, self._own_bias(), self.A, self.B, self.v, self.indices, *facts)
        else:
            y = self.site.run(x, *self.cast(x, self._matrix()), self._own_bias())
        return y if self.replace else base.plus(x, y)

    def weight(self, W: Tensor | None = None) -> Tensor:
        M = self._matrix()
        return M if not self.replace else M - (self.site.weight().float() if W is None else W)

    def fold(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        M = self._matrix()
        return (M, self._own_bias()) if self.replace else (W + M, b)

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        return None

    def parameter_count(self) -> int:
        """r·(in + out) + ⌊δ·out·in⌋, and out for a bias that it brings."""
        out, inn = self.site.out_features, self.site.in_features
        return self.rank * (inn + out) + self._count() + (out if self._own_bias() is not None else 0)

    def _matrix(self) -> Tensor:
        """M (out, in) in fp32."""
        return _combined(self.A, self.B, self.v, self.indices, self.scale, torch.float32)

    def _own_bias(self) -> Tensor | None:
        return getattr(self, "bias", None)

    def _count(self) -> int:
        return max(1, int(self.density * self.site.out_features * self.site.in_features))


def _within(bound: float) -> Any:
    return lambda shape, g: torch.empty(shape).uniform_(-bound, bound, generator=g)


def _combined(A: Tensor, B: Tensor, v: Tensor, indices: Tensor, s: float, dtype: torch.dtype) -> Tensor:
    """M (out, in): s·BA with v added at the indices."""
    M = B.to(dtype) @ (s * A).to(dtype)
    M.view(-1).index_add_(0, indices, v.to(M.dtype))
    return M


class _SparseLowRank(torch.autograd.Function):
    """``xMᵀ + b``; M is made in the forward pass and again in the backward pass, and not kept between them."""

    @staticmethod
    def forward(ctx, x, b, A, B, v, indices, s, dtype):
        ctx.save_for_backward(x, A, B, v, indices)
        ctx.facts = s, dtype
        return F.linear(x.to(dtype), _combined(A, B, v, indices, s, dtype), None if b is None else b.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, A, B, v, indices = ctx.saved_tensors
        s, dtype = ctx.facts
        grad_x = (grad @ _combined(A, B, v, indices, s, dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        g = grad.reshape(-1, grad.shape[-1])
        grad_b = g.sum(0, dtype=A.dtype) if ctx.needs_input_grad[1] else None
        G = g.T @ x.reshape(-1, x.shape[-1]).to(dtype)
        grad_A = s * (B.to(dtype).T @ G).to(A.dtype)
        grad_B = (G @ (s * A).to(dtype).T).to(B.dtype)
        return grad_x, grad_b, grad_A, grad_B, G.view(-1).index_select(0, indices).to(v.dtype), None, None, None
