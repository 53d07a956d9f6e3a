"""S²FT: train some attention heads and some channels of the MLP, as rows and columns of their matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.adapted import Base
from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics import chance
from veneer.numerics.fused import compute_dtype

ROLES = {"v": "v", "o": "o", "up": "u", "down": "d"}  # of sites → the ratio's name in the paper
ROWS = ("v", "up")


@method("s2ft", axis="delta", paper="arXiv:2412.06289", system=113, gives=("linear", "foldable", "frozen-base"))
class S2FT(Delta):
    """Structured sparse fine-tuning: whole heads and channels, drawn once over all blocks, train; nothing else does.

    A head is a run of rows of v's matrix and of columns of o's, a channel a row of up's and a column of down's
    (Yang et al. 2024, §3). At rows I: y[I] += xDᵀ; at columns J: y += x[J]Dᵀ.

    ========  ================================  =========  ==========================
    tensor    shape                             trained    start
    ========  ================================  =========  ==========================
    D         (n, in) at rows, (out, n) else    yes        0
    indices   (n,) int                          no         drawn; saved with the file
    ========  ================================  =========  ==========================

    Of all heads or channels of the model ⌊ratio · number⌋ are drawn, for each ratio apart, so that blocks get unequal
    numbers and some none. Defaults are the official ones for LLaMA-2-7B: o = 0.052, d = 0.02, none of v and u; for
    LLaMA-3-8B d = 0.03 alone. Rates are 2e-4 to 1e-3, without decay. ``select`` takes those of smallest or largest
    norm in that matrix instead; selection by activations or gradients is left out.

    The official code permutes the coupled matrices so that what trains is contiguous, which under grouped queries takes
    the wrong heads. Here rows and columns are gathered where they are: a head of o is a query head, one of v a
    key-value head, and no checkpoint is permuted. W is not written, so that adapters share a base, a base may be
    quantised, and bf16 swallows no step. Backward keeps x[J] alone at columns, and x at rows; the gradient is that of
    the slice, as in the paper's partial back-propagation.
    """

    v: Annotated[float, At(ge=0, le=1, doc="share of heads whose rows of v train")] = 0.0
    o: Annotated[float, At(ge=0, le=1, doc="share of heads whose columns of o train")] = 0.052
    u: Annotated[float, At(ge=0, le=1, doc="share of channels whose rows of up train")] = 0.0
    d: Annotated[float, At(ge=0, le=1, doc="share of channels whose columns of down train")] = 0.02
    select: Annotated[
        Literal["random", "norm_min", "norm_max"], At(doc="which units: at random, of smallest or largest norm")
    ] = "random"

    usual_rate = 1e-3
    layers = ("linear",)
    reasons = {"layers": "heads and channels belong to linear layers"}

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The v, o, up and down layers of which something trains."""
        groups = _groups([s for s in sites if s.kind in cls.layers])
        for role, group in groups.items():
            headless = next((s for s in group if role in ("v", "o") and not s.heads), None)
            if headless is not None and fields[ROLES[role]]:
                raise UserError(
                    f"s2ft: the model's config does not say how many heads {headless.path} has; set o=0, v=0"
                )
        kept = {id(s) for role, group in groups.items() if _number(role, group, fields) for s in group}
        if groups and not kept:
            units = ", ".join(f"{sum(_units(s) for s in g)} at {role}" for role, g in groups.items())
            raise UserError(f"s2ft: the ratios are too small for this selection, which has {units} to choose from")
        return [s for s in sites if id(s) in kept]

    @classmethod
    def shared(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any], seed: int) -> nn.Module:
        return Chosen(sites, fields, seed)

    def slots(self) -> Iterable[Slot]:
        n = len(self.pool.indices[self.site.path])
        if n:  # a layer of which nothing was drawn has no tensor
            rows = self.site.role in ROWS
            yield Slot("D", "sparse", (n, self.site.in_features) if rows else (self.site.out_features, n))

    def build(self) -> None:
        self.register_buffer("indices", self.pool.indices[self.site.path].to(self.site_device()))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not len(self.indices):
            return base(x)
        at_rows = self.site.role in ROWS
        W = base.source() if base.fusable and not base.links else None
        if W is not None and not getattr(W, "requires_grad", False):
            W, stored = (W, None) if isinstance(W, Tensor) else (None, W)
            return _Sliced.apply(x, W, stored, base.own_bias(), self.D, self.indices, at_rows)
        (D,) = self.cast(x, self.D)
        if at_rows:
            return base(x).index_add(-1, self.indices, F.linear(x, D))
        return base(x) + F.linear(x.index_select(-1, self.indices), D)

    def pair(self) -> Pair:
        """The slice and the one-hot rows or columns that put it in its place."""
        out, inn, I = self.site.out_features, self.site.in_features, self.indices
        if not len(I):
            return Pair(torch.zeros(1, inn, device=I.device), torch.zeros(out, 1, device=I.device), 1.0)
        if self.site.role in ROWS:
            return Pair(self.D, F.one_hot(I, out).T.to(self.D.dtype), 1.0)
        return Pair(F.one_hot(I, inn).to(self.D.dtype), self.D, 1.0)

    def parameter_count(self) -> int:
        """n·in at rows, n·out at columns."""
        return len(self.indices) * (self.site.in_features if self.site.role in ROWS else self.site.out_features)


class Chosen(nn.Module):
    """The rows or columns that train at each layer, drawn over all layers of one role together."""

    def __init__(self, sites: list[Site], fields: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.indices: dict[str, Tensor] = {}
        for role, group in _groups(sites).items():
            generator = chance.generator(seed, "s2ft", role)
            taken = _order(role, group, fields["select"], generator)[: _number(role, group, fields)].sort().values
            at = 0
            for site in group:
                mine = taken[(taken >= at) & (taken < at + _units(site))] - at
                width = _width(site)
                self.indices[site.path] = (mine[:, None] * width + torch.arange(width)).flatten()
                at += _units(site)


def _groups(sites: list[Site]) -> dict[str, list[Site]]:
    """The layers that have heads or channels, by role."""
    return {role: group for role in ROLES if (group := [s for s in sites if s.role == role])}


def _side(site: Site) -> int:
    return site.out_features if site.role in ROWS else site.in_features


def _units(site: Site) -> int:
    """How many heads or channels the layer has."""
    return (site.heads or 0) if site.role in ("v", "o") else _side(site)


def _width(site: Site) -> int:
    """Rows or columns of one unit."""
    return _side(site) // _units(site)


def _number(role: str, group: list[Site], fields: dict[str, Any]) -> int:
    """How many units of all these layers together train."""
    return int(fields[ROLES[role]] * sum(_units(s) for s in group) + 1e-9)


def _order(role: str, group: list[Site], select: str, generator: torch.Generator) -> Tensor:
    """The units of all these layers, counted through, best first."""
    if select == "random":
        return torch.randperm(sum(_units(s) for s in group), generator=generator)
    norms = []
    for s in group:
        W = s.weight().float() if role in ROWS else s.weight().float().T
        norms.append(W.reshape(_units(s), -1).norm(dim=1).cpu())
    return torch.cat(norms).argsort(descending=select == "norm_max", stable=True)


class _Sliced(torch.autograd.Function):
    """xWᵀ + b with the change of the rows or columns I added into it; at columns x[I] is kept and not x."""

    @staticmethod
    def forward(ctx, x, W, stored, bias, D, I, at_rows):
        ctx.dtype, ctx.facts = compute_dtype(x), (stored, at_rows, x.shape, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            rows, d = x.reshape(-1, x.shape[-1]).to(ctx.dtype), D.to(ctx.dtype)
            y = F.linear(rows, _dense(W, stored, ctx.dtype), None if bias is None else bias.to(ctx.dtype))
            kept = rows if at_rows else rows.index_select(1, I)
            if at_rows:
                y.index_add_(1, I, rows @ d.T)
            else:
                y.addmm_(kept, d.T)
        ctx.save_for_backward(x if at_rows else kept, W, D, I)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept, W, D, I = ctx.saved_tensors
        stored, at_rows, shape, dtype = ctx.facts
        grad_x = None
        with torch.autocast(grad.device.type, enabled=False):
            g, d = grad.reshape(-1, grad.shape[-1]), D.to(ctx.dtype)
            kept = kept.reshape(-1, kept.shape[-1]).to(ctx.dtype)
            if ctx.needs_input_grad[0]:
                grad_x = g @ _dense(W, stored, ctx.dtype)
            mine = g.index_select(1, I) if at_rows else g
            if grad_x is not None:
                grad_x = grad_x.addmm_(mine, d) if at_rows else grad_x.index_add_(1, I, mine @ d)
                grad_x = grad_x.view(shape).to(dtype)
            grad_D = (mine.T @ kept).to(D.dtype)
            grad_b = g.sum(0, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_b, grad_D, None, None


def _dense(W: Tensor | None, stored: Callable[[], Tensor] | None, dtype: torch.dtype) -> Tensor:
    return (stored() if W is None else W).to(dtype)
