"""VeRA: two trained vectors a matrix around random projections that all of them share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.adapted import Base
from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import PeftMap, method
from veneer.core.site import Site
from veneer.fields import At
from veneer.numerics import lowrank
from veneer.numerics.fused import compute_dtype


@method("vera", axis="delta", paper="arXiv:2310.11454", system=0, gives=("linear", "foldable", "frozen-base"))
class VeRA(Delta):
    """A frozen random pair for the whole model, which each layer scales by row and by component.

    y = xWᵀ + b + ((drop(x)Aᵀ)∘d)Bᵀ∘b, so ΔW = Λ_b·B·Λ_d·A (Kopiczko et al. 2024, eq. 2); no α.

    ======  ===========  =========  ====================================================
    tensor  shape        trained    start
    ======  ===========  =========  ====================================================
    A       (r, in*)     no         U(±√(6/in*)); one for all layers, from a key
    B       (out*, r)    no         U(±√(6/r)); likewise
    d       (r,)         yes        0.1
    b       (out,)       yes        0
    ======  ===========  =========  ====================================================

    in* and out* are the largest of the adapted layers; a layer takes the leading columns of A and rows of B, and a part
    of a fused projection the rows of B at its place in the whole. A and B are not in the file: ``key`` gives them
    again, with PEFT's own draws, so that PEFT needs the same key only. Another selection of layers may change in* or
    out*, and with them every value.

    Defaults: r = 256 and d = 0.1 from PEFT (the paper has r = 256 to 1024, rates ten times LoRA's and no decay).
    Backward keeps xAᵀ and nothing else, not even x; PEFT keeps x, both middles and the output.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r")] = 256
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0
    d_initial: Annotated[float, At(doc="start of d")] = 0.1
    key: Annotated[int | None, At(ge=0, doc="seed of A and B; the adapter's when None")] = None

    layers = ("linear", "conv")
    reasons = {"layers": "projections as wide as a vocabulary would outweigh the table they adapt"}
    peft = PeftMap(
        "VERA",
        fields={"rank": "r", "dropout": "vera_dropout", "d_initial": "d_initial", "key": "projection_prng_key"},
        keys={"b": "vera_lambda_b", "d": "vera_lambda_d"},
        config={"save_projection": False, "init_weights": True},
    )

    @classmethod
    def shared(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any], seed: int) -> Projections:
        key = seed if fields["key"] is None else fields["key"]
        width, height = max(s.in_features for s in sites), max(_rows(s).stop for s in sites)
        return Projections(key, fields["rank"], width, height).to(sites[0].weight().device)

    def slots(self) -> Iterable[Slot]:
        yield Slot("d", "diagonal", (self.rank,), lambda shape, _: torch.full(shape, self.d_initial))
        yield Slot("b", "diagonal", (self.site.out_features,))

    def pair(self) -> Pair:
        """A and Λ_b·B·Λ_d."""
        A, B = self._projections()
        return Pair(A, _scaled(B, self.b, self.d), 1.0)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind != "linear":
            return super().forward(x, base)
        p = self.active_dropout()
        own = (*self._projections(), self.b, self.d, p, self.draw_seed() if p else None)
        W = base.source() if base.fusable and not base.links else None
        if W is None or getattr(W, "requires_grad", False):
            return base(x) + _Projected.apply(x, None, None, None, *own)
        W, stored = (W, None) if isinstance(W, Tensor) else (None, W)
        return _Projected.apply(x, W, stored, base.own_bias(), *own)

    def parameter_count(self) -> int:
        """out + r."""
        return self.site.out_features + self.rank

    def _projections(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this layer."""
        return self.pool.A[:, : self.site.in_features], self.pool.B[_rows(self.site)]


class Projections(nn.Module):
    """The shared A (r, in*) and B (out*, r), drawn from a key as PEFT draws them; no file holds them."""

    def __init__(self, key: int, rank: int, width: int, height: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(key)
        for name, shape in (("A", (rank, width)), ("B", (height, rank))):
            bound = (6 / shape[1]) ** 0.5
            values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, values, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Projections:
        """Move, but keep the type: the values are what the key says, to the last digit."""
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)


def _rows(site: Site) -> slice:
    """The rows of the whole layer that the site stands for."""
    return slice(0, site.out_features) if site.rows is None else site.rows


def _scaled(B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """Λ_b·B·Λ_d, (out, r)."""
    return b[:, None] * B * d


class _Projected(torch.autograd.Function):
    """xWᵀ + bias + h·(Λ_b·B·Λ_d)ᵀ with h = drop(x)·Aᵀ (N, r), which is all that backward keeps; W may be missing."""

    @staticmethod
    def forward(ctx, x, W, stored, bias, A, B, b, d, dropout, seed):
        ctx.dtype, ctx.facts = compute_dtype(x), (stored, dropout, seed)
        with torch.autocast(x.device.type, enabled=False):
            group = _group(ctx, W, bias, A, B, b, d)
            rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            (y,), (h,), _ = lowrank.run(rows, group, lowrank.Factors.of(group, ctx.dtype))
        ctx.save_for_backward(x.new_empty(()).expand(x.shape), h, W, bias, A, B, b, d)  # of x its shape and type
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, h, W, bias, A, B, b, d = ctx.saved_tensors
        need = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            group = _group(ctx, W, bias, A, B, b, d)
            rows, g = x.reshape(-1, x.shape[-1]).to(ctx.dtype), grad.reshape(-1, grad.shape[-1])
            factors, wanted = lowrank.Factors.of(group, ctx.dtype), (need[3], False, True, False)
            grad_x, (found,) = lowrank.gradients(rows, group, factors, [g], [h], [None], need[0], [wanted])
            inner = found.B.mul_(B)
        grad_x = None if grad_x is None else grad_x.view(x.shape).to(x.dtype)
        return grad_x, None, None, found.bias, None, None, inner @ d, b @ inner, None, None


def _group(ctx, W, bias, A, B, b, d) -> list[lowrank.Branch]:
    stored, dropout, seed = ctx.facts
    return [lowrank.Branch(stored if W is None else W, bias, A, _scaled(B, b, d), 1.0, dropout, seed)]
