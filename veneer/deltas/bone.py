"""Bone, also called MiSS, and its forms: one small matrix repeated over W, or multiplied with W's own blocks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.core.adapted import Base
from veneer.core.delta import Delta, LoRAForm, Pair, Slot
from veneer.core.registry import PeftMap, method
from veneer.errors import UserError
from veneer.fields import At

FIELDS = {"rank": "r", "dropout": "miss_dropout", "mini_r": "mini_r"}
KEYS = {"D": "miss_block"}


@method(
    "bone",
    axis="delta",
    paper="arXiv:2409.15371",
    system=105,
    gives=("linear", "foldable", "frozen-base"),
    aliases=("miss",),
)
class Bone(Delta):
    """One trained matrix: the input is summed over blocks of r entries, and D takes the sum to the output.

    y = xWᵀ + b + s·(drop(x)Tᵀ)D with T = [I_r I_r … I_r] (r, in), its last block cut where r does not divide the
    input: ΔW = s·DᵀT (Kang 2024; MiSS in its last version). It is a LoRA whose A is T and stays.

    ======  =========  =========  ======
    tensor  shape      trained    start
    ======  =========  =========  ======
    D       (r, out)   yes        0
    ======  =========  =========  ======

    Defaults: r = 64 as in PEFT, the official script and the last paper; s = 1 (no α in the paper; s = α/r where one is
    given). T has entries of 1, so the same rate goes further than LoRA's: 2e-5 in the paper at 7B.

    All inputs of equal index modulo r share their change, so the order of the input's features matters. The names: in
    the first version of the paper Bone is what is ``bat`` here; PEFT calls this form MiSS, and called it Bone before.
    Its directories are read for all three forms. T runs as a matrix in the fused product, as fast in bf16 as summing,
    and x is not kept for the backward pass. Where ``merge`` and ``unmerge`` round in PEFT, unfolding restores W bit for
    bit here.
    """

    rank: Annotated[int, At(ge=1, doc="length r of a block")] = 64
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0

    layers = ("linear", "conv")
    reasons = {"layers": "words of a vocabulary have no order in which every r-th could share a change"}
    peft = PeftMap("MISS", fields=FIELDS, keys=KEYS)

    def slots(self) -> Iterable[Slot]:
        yield Slot("D", "core", (self.rank, self.site.out_features))

    def build(self) -> None:
        if self.rank > self.site.in_features:
            raise UserError(
                f"{self.name}: rank={self.rank} is more than {self.site.path} has inputs, {self.site.in_features}"
            )
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank

    def pair(self) -> Pair:
        """T and Dᵀ."""
        return Pair(tiles(self.rank, self.site.in_features, self.D.device), self.D.T, self.scale)

    def parameter_count(self) -> int:
        """r·out."""
        return self.rank * self.site.out_features


@method("miss-mini", axis="delta", paper="arXiv:2409.15371", system=105, gives=("linear", "foldable", "frozen-base"))
class MiniMiSS(Bone):
    """Bone whose D is repeated along the output too: q columns in turn, so r·q numbers a layer.

    ΔW = s·[D D … D]ᵀT with D (r, q) for q that divides out (PEFT's ``"mini"``; not in the paper). The default q = 16 is
    a choice of ours; PEFT's is 1, which gives every output the same change.
    """

    columns: Annotated[int, At(ge=1, doc="q, columns of D; must divide the layer's outputs")] = 16

    peft = PeftMap(
        "MISS",
        fields={"rank": "r", "dropout": "miss_dropout", "columns": "mini_r"},
        keys=KEYS,
        config={"init_weights": "mini"},
    )

    def slots(self) -> Iterable[Slot]:
        if self.site.out_features % self.columns:
            raise UserError(
                f"miss-mini: columns={self.columns} does not divide the {self.site.out_features} outputs of "
                f"{self.site.path}; choose a number that divides those of every selected layer"
            )
        yield Slot("D", "core", (self.rank, self.columns))

    def pair(self) -> Pair:
        T, D, s = super().pair()
        return Pair(T, D.repeat(self.site.out_features // self.columns, 1), s)

    def parameter_count(self) -> int:
        """r·q."""
        return self.rank * self.columns


@method("bat", axis="delta", paper="arXiv:2409.15371", system=105, gives=("linear", "foldable", "frozen-base"))
class BAT(Delta):
    """Block affine transformation: each r × r block of W is multiplied by I + D_i and has D_i added.

    ΔW_ij = W_ij·D_i + D_i for the block in row i and column j (Kang 2024, first version; PEFT's ``"bat"``), of full
    rank although one D_i serves a whole row of blocks.

    ======  ==============  =========  ======
    tensor  shape           trained    start
    ======  ==============  =========  ======
    D       (out/r, r, r)   yes        0
    ======  ==============  =========  ======

    r must divide both sides of a layer. Default: r = 64, as PEFT. No dropout and no scale, as there.

    W is whatever lies beneath. The change has no factors that act on x, so ΔW is made anew in every forward and in
    every backward from W and D; kept are x and D. In fp32 it is made on top of W for one product, in bf16 it has a
    product of its own, for added to a bf16 W its small entries would be rounded away.
    """

    rank: Annotated[int, At(ge=1, doc="side r of a block; must divide both sides of W")] = 64

    layers = ("linear",)
    reasons = {"as_lora": "the change has W's rank", "layers": "the blocks are those of a linear layer's matrix"}
    peft = PeftMap("MISS", fields=FIELDS, keys=KEYS, config={"init_weights": "bat"})

    def slots(self) -> Iterable[Slot]:
        out, inn, r = self.site.out_features, self.site.in_features, self.rank
        if out % r or inn % r:
            raise UserError(
                f"bat: rank={r} must divide both sides of {self.site.path}, {out} × {inn}; "
                "choose a smaller one or leave the layer out with sites="
            )
        yield Slot("D", "core", (out // r, r, r))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        dtype = self.compute_dtype(x)
        if base.fusable and not base.links and dtype == torch.float32 and not self.site.weight().requires_grad:
            return _BlockAffine.apply(x, self.site.weight(), self.D, base.own_bias(), dtype, True)
        W = base.weight() if base.links else self.site.weight()
        return base(x) + _BlockAffine.apply(x, W.detach(), self.D, None, dtype, False)

    def weight(self, W: Tensor | None = None) -> Tensor:
        return changed(self.site.weight() if W is None else W, self.D)

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        return None

    def parameter_count(self) -> int:
        """r·out."""
        return self.rank * self.site.out_features


@lru_cache(maxsize=32)
def tiles(r: int, width: int, device: torch.device) -> Tensor:
    """T (r, width): the identity again and again, cut at the width."""
    with torch.inference_mode(False):  # made inside inference mode it could not take part in a later backward
        return torch.eye(r, device=device).repeat(1, -(-width // r))[:, :width].contiguous()


def changed(W: Tensor, D: Tensor, whole: bool = False) -> Tensor:
    """ΔW (out, in) in fp32 with ΔW_ij = W_ij·D_i + D_i, or W + ΔW when ``whole``."""
    blocks, D = _blocks(W.float(), D), D.float()
    change = blocks.baddbmm(blocks, D) if whole else blocks @ D
    change.unflatten(1, (D.shape[1], -1)).add_(D[:, :, None])
    return change.view(W.shape)


def _blocks(W: Tensor, D: Tensor) -> Tensor:
    """W (out, in) as (out/r, r·in/r, r): of block row i one row for each row of each of its blocks."""
    return W.contiguous().view(D.shape[0], -1, D.shape[1])


class _BlockAffine(torch.autograd.Function):
    """``x·ΔWᵀ``, or ``x(W + ΔW)ᵀ + b`` when ``whole``; ΔW is made in each pass and not kept between them."""

    @staticmethod
    def forward(ctx, x, W, D, b, dtype, whole):
        ctx.save_for_backward(x, W, D)
        ctx.facts = dtype, whole
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), changed(W, D, whole).to(dtype), None if b is None else b.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W, D = ctx.saved_tensors
        dtype, whole = ctx.facts
        with torch.autocast(x.device.type, enabled=False):
            grad_x = (grad @ changed(W, D, whole).to(dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
            g = grad.reshape(-1, grad.shape[-1])
            G = _blocks((g.T @ x.reshape(-1, x.shape[-1]).to(dtype)).float(), D)
            grad_D = _blocks(W.float(), D).mT @ G + G.unflatten(1, (D.shape[1], -1)).sum(2)
            grad_b = g.sum(0, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        return grad_x, None, grad_D.to(D.dtype), grad_b, None, None
