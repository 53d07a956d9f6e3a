"""MoS: LoRA pairs put together from shared shards."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.context import Context, current
from veneer.core.delta import Delta, Pair
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics import chance


@method("mos", axis="delta", paper="arXiv:2410.00938", system=11, gives=("linear", "foldable", "frozen-base"))
class MoS(Delta):
    """Every layer's LoRA pair is put together from pools of shards that layers of one kind share.

    ΔW_j = s·B_jA_j; row t of A_j is [P_A[I_j(tl)] … P_A[I_j(tl+l−1)]], column t of B_j the same from P_B by indices of
    its own (Wang et al. 2024). The indices are drawn once: (r−p)·l distinct public rows, then p·l rows private to layer
    j, the same in A and B. Nothing is routed by the input. Pools serve the L layers of one role and shape.

    ==========  =================  =========  ======================================
    tensor      shape              trained    start
    ==========  =================  =========  ======================================
    P_A         (e·L·l, in/l)      yes        U(−1/√in, 1/√in)
    P_B         (e·L·l, out/l)     yes        0
    I_A, I_B    (L, r·l) int       no         drawn; saved with the adapter
    ==========  =================  =========  ======================================

    ``rank`` is e, the equivalent rank: LoRA of that rank costs as much. ``active`` is r, the rank a layer runs with, 4e
    when None or as much as the pools give, p + (e−p)·L. Defaults: e = 2, p = 1, l = 4 are choices of ours, α = 16 the
    official script's; s = α/r. A shared shard gets the sum of its uses' gradients: rates are lower than LoRA's.

    All pairs are put together once per forward of the model. The official code keeps indices as parameters, needs
    4-bit layers and saves the pairs. Where l does not divide the sides of a layer the next smaller number that does is
    taken. The random scaling, fixed at 1 in the released code, is left out.
    """

    rank: Annotated[int, At(ge=1, doc="e: LoRA of this rank has as many parameters")] = 2
    active: Annotated[int | None, At(ge=1, doc="r, the rank of a layer's pair; 4e when None, if the pools allow")] = (
        None
    )
    private: Annotated[int, At(ge=0, doc="p, how many of the r belong to one layer alone")] = 1
    shards: Annotated[int, At(ge=1, doc="l, pieces that a row of A or a column of B is made of")] = 4
    alpha: Annotated[float, At(gt=0, doc="numerator of the scale s = α/r")] = 16.0
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0

    @classmethod
    def shared(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any], seed: int) -> nn.Module:
        """One pool of shards for each role and shape."""
        return Pools(sites, fields, seed).to(sites[0].weight().device)

    def build(self) -> None:
        self.scale = self.alpha / self.pool.active(self.site)

    def pair(self) -> Pair:
        """A_j (r, in) and B_j (out, r): those of the forward under way, or made for the moment."""
        ctx = current()
        kept = None if ctx is None else ctx.kept.get(self.pool)
        group, j = self.pool.place[self.site.path]
        A, B = self.pool.pairs(group, slice(j, j + 1)) if kept is None else kept[group]
        at = 0 if kept is None else j
        return Pair(A[at], B[at], self.scale)

    def parameter_count(self) -> int:
        """e·(in + out): this layer's share of the pools."""
        return self.rank * (self.site.in_features + self.site.out_features)


class Pools(nn.Module):
    """The shards and indices of every group of layers of one role and shape."""

    def __init__(self, sites: list[Site], fields: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        self.sizes: dict[str, tuple[int, int, int]] = {}  # (r, in, out) of each group
        self.place: dict[str, tuple[str, int]] = {}  # group and number of each layer
        groups: dict[str, list[Site]] = {}
        for s in sites:
            groups.setdefault(f"{s.role}_{s.out_features}x{s.in_features}", []).append(s)
        for name, members in groups.items():
            self.place |= {s.path: (name, j) for j, s in enumerate(members)}
            self._draw(name, members, fields, chance.generator(seed, "mos", name))

    def _draw(self, name: str, members: list[Site], fields: dict[str, Any], g: torch.Generator) -> None:
        e, p, count = fields["rank"], fields["private"], len(members)
        out, inn = members[0].out_features, members[0].in_features
        pieces = max(d for d in range(1, fields["shards"] + 1) if math.gcd(out, inn) % d == 0)
        most = p + (e - p) * count
        r = min(4 * e, most) if fields["active"] is None else fields["active"]
        if p > e:
            raise UserError(f"mos: private={p} is more than rank={e}, the budget that it is taken from")
        if not p <= r <= most:
            raise UserError(
                f"mos: active={r} at the {count} layers of role {members[0].role} must lie between private={p} and "
                f"{most}, which is what pools of rank={e} give; change active, private or rank"
            )
        rows, public = e * count * pieces, (e - p) * count * pieces
        self.sizes[name] = r, inn, out
        self.A[name] = nn.Parameter(torch.empty(rows, inn // pieces).uniform_(-(inn**-0.5), inn**-0.5, generator=g))
        self.B[name] = nn.Parameter(torch.zeros(rows, out // pieces))
        drawn: dict[str, list[Tensor]] = {"A": [], "B": []}
        for own in torch.arange(public, rows).view(count, p * pieces):
            for side in drawn.values():
                side.append(torch.cat([torch.randperm(public, generator=g)[: (r - p) * pieces], own]))
        for side, indices in drawn.items():
            self.register_buffer(f"I_{side}_{name}", torch.stack(indices))

    def active(self, site: Site) -> int:
        """r at a layer."""
        return self.sizes[self.place[site.path][0]][0]

    def prepare(self, ctx: Context) -> None:
        """Put all pairs together for the forward pass that begins."""
        ctx.keep(self, {name: self.pairs(name) for name in self.sizes})

    def pairs(self, name: str, layers: slice = slice(None)) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A_j (r, in) and B_j (out, r) of these layers of a group."""
        r, inn, out = self.sizes[name]
        A = F.embedding(getattr(self, f"I_A_{name}")[layers], self.A[name]).view(-1, r, inn)
        B = F.embedding(getattr(self, f"I_B_{name}")[layers], self.B[name]).view(-1, r, out)
        return A.unbind(0), B.mT.unbind(0)
