"""LoKr: the Kronecker product of a small and a low-rank matrix."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from veneer.core.delta import Delta, LoRAForm, Slot
from veneer.core.registry import PeftMap, method
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform, zeros


@method("lokr", axis="delta", paper="arXiv:2309.14859", system=0, gives=("linear", "foldable", "frozen-base"))
class LoKr(Delta):
    """A change of high rank from few numbers: blocks that repeat one matrix at different strengths.

    ΔW = s·(w1 ⊗ w2) with out = o1·o2, in = i1·i2 near their square roots and s = α/r (LyCORIS: Yeh et al. 2024, §3).
    With x as an i1 × i2 matrix X, ΔW·x is w1·X·w2ᵀ, read row by row.

    ======  =========  =========  ================  ========================
    tensor  shape      trained    start             with ``start="lycoris"``
    ======  =========  =========  ================  ========================
    w1      (o1, i1)   yes        0                 U(−1/√i1, 1/√i1)
    w2a     (o2, r)    yes        U(−1/√r, 1/√r)    the same
    w2b     (r, i2)    yes        U(−1/√i2, 1/√i2)  0
    ======  =========  =========  ================  ========================

    For r ≥ max(o2, i2)/2 there is one w2 (o2, i2) instead, and with ``decompose_both`` and r < max(o1, i1)/2 w1 is
    w1a·w1b, w1a starting at 0. Defaults: r = 8, α = r, as in PEFT; LyCORIS sets s = 1 where both factors are whole.

    Both published codes form ΔW in every forward. Here X is multiplied by w2b, w1 and w2a in turn, and backward does it
    again from x, which is all that is kept. At a convolution the kernel belongs to i2, at an embedding a word is the
    pair of its row and column; a grouped convolution forms ΔW. No Tucker form, rank or module dropout. PEFT 0.21 takes
    the product over the wrong axes at a Conv1d whose w2 is whole.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r of the second factor")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    decompose_both: Annotated[bool, At(doc="the first factor too is a product of rank r")] = False
    decompose_factor: Annotated[int, At(ge=-1, doc="largest first factor; −1: near the square root")] = -1
    start: Annotated[Literal["peft", "lycoris"], At(doc="which factor starts at 0")] = "peft"

    reasons = {"as_lora": "its rank is the product of the factors' ranks, which is W's unless r is small"}
    peft = PeftMap(
        "LOKR",
        fields={
            "rank": "r",
            "alpha": "alpha",
            "decompose_both": "decompose_both",
            "decompose_factor": "decompose_factor",
        },
        keys={
            "w1": "lokr_w1",
            "w1a": "lokr_w1_a",
            "w1b": "lokr_w1_b",
            "w2": "lokr_w2",
            "w2a": "lokr_w2_a",
            "w2b": "lokr_w2_b",
        },
    )

    def slots(self) -> Iterable[Slot]:
        (o1, o2), (i1, i2) = self._shape()
        channels, r, ours = i2 // self._kernel(), self.rank, self.start == "peft"
        if self.decompose_both and r < max(o1, i1) / 2:
            yield Slot("w1a", "core", (o1, r), zeros if ours else kaiming_uniform)
            yield Slot("w1b", "core", (r, i1), kaiming_uniform)
        else:
            yield Slot("w1", "core", (o1, i1), zeros if ours else kaiming_uniform)
        if r < max(o2, channels) / 2:
            yield Slot("w2a", "factor_b", (o2, r), kaiming_uniform)
            yield Slot("w2b", "factor_a", (r, i2), kaiming_uniform if ours else zeros)
        else:
            yield Slot("w2", "factor_a", (o2, i2), kaiming_uniform if ours else zeros)

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank

    def update(self, x: Tensor) -> Tensor:
        w1, *w2 = self.cast(x, *self._factors())
        forms = {"linear": self._linear, "conv": self._conv, "embedding": self._embedding}
        form = forms[self.site.kind] if self.site.factored() else self._dense
        return checkpoint(form, x, w1 * self.scale, *w2, use_reentrant=False, preserve_rng_state=False)

    def weight(self, W: Tensor | None = None) -> Tensor:
        w1, *w2 = self._factors()
        return self.scale * torch.kron(w1, w2[0] if len(w2) == 1 else w2[1] @ w2[0])

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        """A pair of rank r·min(o1, i1), where that is less than W's."""
        w1, *w2 = self._factors()
        if len(w2) == 1 or self.rank * min(w1.shape) >= min(self.site.out_features, self.site.in_features):
            return None
        w2b, w2a = w2
        one = torch.eye(min(w1.shape), dtype=w1.dtype, device=w1.device)
        if w1.shape[1] <= w1.shape[0]:
            return LoRAForm(torch.kron(one, w2b), torch.kron(w1, w2a), self.scale)
        return LoRAForm(torch.kron(w1, w2b), torch.kron(one, w2a), self.scale)

    def parameter_count(self) -> int:
        """o1·i1 + r·(o2 + i2); o2·i2 for a whole w2 and r·(o1 + i1) for a decomposed w1."""
        return sum(shape[0] * shape[1] for shape in (s.shape for s in self.slots()))

    def _shape(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((o1, o2), (i1, i2)); the kernel of a convolution is a part of i2."""
        kernel = self._kernel()
        i1, i2 = split(self.site.in_features // kernel, self.decompose_factor)
        return split(self.site.out_features, self.decompose_factor), (i1, i2 * kernel)

    def _kernel(self) -> int:
        return self.site.module.weight[0, 0].numel() if self.site.kind == "conv" else 1

    def _factors(self) -> tuple[Tensor, ...]:
        """w1 and what stands for w2 in the order in which it meets x: w2, or w2b and w2a."""
        w1 = self.w1 if hasattr(self, "w1") else self.w1a @ self.w1b
        return (w1, self.w2) if hasattr(self, "w2") else (w1, self.w2b, self.w2a)

    def _linear(self, x: Tensor, w1: Tensor, first: Tensor, *rest: Tensor) -> Tensor:
        return _across(F.linear(x.unflatten(-1, (w1.shape[1], -1)), first).transpose(-1, -2), w1, *rest)

    def _conv(self, x: Tensor, w1: Tensor, first: Tensor, *rest: Tensor) -> Tensor:
        channels = -1 - len(self.site.module.kernel_size)
        lead = x.shape[:channels]
        parts = x.unflatten(channels, (w1.shape[1], -1)).flatten(0, channels - 1)  # the i1 groups run as one batch
        h = self.site.project(parts, first).unflatten(0, (*lead, w1.shape[1]))
        return _across(h.movedim(len(lead), -1), w1, *rest).movedim(-1, channels)

    def _embedding(self, x: Tensor, w1: Tensor, first: Tensor, *rest: Tensor) -> Tensor:
        row, column = x // first.shape[1], x % first.shape[1]
        second = F.embedding(column, first.T)
        second = second if not rest else F.linear(second, *rest)
        return (F.embedding(row, w1.T)[..., :, None] * second[..., None, :]).flatten(-2)

    def _dense(self, x: Tensor, w1: Tensor, first: Tensor, *rest: Tensor) -> Tensor:
        return self.site.run(x, torch.kron(w1, rest[0] @ first if rest else first))


def _across(h: Tensor, w1: Tensor, *rest: Tensor) -> Tensor:
    """Mix the parts of ``h`` (…, q, i1) by w1 and lift q by what is left of w2: (…, o1·o2)."""
    h = F.linear(h, w1).transpose(-1, -2)
    return (F.linear(h, *rest) if rest else h).flatten(-2)


def split(n: int, factor: int = -1) -> tuple[int, int]:
    """n as a product (m, n/m): m is ``factor`` where that divides n, else the largest divisor up to it and to √n."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    limit = isqrt(n) if factor == -1 else max(1, min(isqrt(n), factor))
    m = next(d for d in range(limit, 0, -1) if n % d == 0)
    return m, n // m
