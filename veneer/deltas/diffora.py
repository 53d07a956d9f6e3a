"""DiffoRA: which layers deserve a pair of their own is learned; the others of a kind share one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.hook import Phase, Plan, Schedule
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import generator, kaiming_uniform
from veneer.parts.bilevel import Bilevel

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


def kind(site: Site) -> str:
    """What layers have in common that can share a pair: role and shape."""
    return f"{site.role}_{site.out_features}x{site.in_features}"


class SharedPairs(nn.Module):
    """One pair for each kind of layer, made when the first layer asks for it, which counts its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        self.owners: dict[str, str] = {}

    def open(self, site: Site, rank: int, seed: int, device: torch.device) -> None:
        """Make the pair of this site's kind if it is not there."""
        name = kind(site)
        if name not in self.owners:
            start = kaiming_uniform((rank, site.in_features), generator(seed, "diffora", name))
            self.A[name] = nn.Parameter(start.to(device))
            self.B[name] = nn.Parameter(torch.zeros(site.out_features, rank, device=device))
            self.owners[name] = site.path


@method(
    "diffora",
    axis="delta",
    paper="arXiv:2502.08905",
    system=23,
    gives=("pair", "linear", "foldable", "frozen-base"),
    defaults="diffora-ranks",
)
class DiffoRA(Delta):
    """A pair of the layer's own, or one that it shares with others of its kind (Jiang et al. 2025).

    y = xWᵀ + b + Γ̄·s·drop(x)AᵀBᵀ, so ΔW = Γ̄·s·BA with s = α/r. While ``diffora-ranks`` searches every layer has its own
    pair and a weight Γ̄ in (0, 1); afterwards Γ̄ = 1 and the layers that were not chosen use the shared pair.

    ======  =========  =========  ===================  ======================================
    tensor  shape      trained    start                whose
    ======  =========  =========  ===================  ======================================
    A       (r, in)    yes        U(−1/√in, 1/√in)     the layer's, or that of role and shape
    B       (out, r)   yes        0                    likewise
    ======  =========  =========  ===================  ======================================

    Defaults: r = 8, α = 2r. What exactly is shared is a choice of ours, the paper's text not being at hand: one pair
    for all layers left out that have the same role and shape. It stands once in the file and gets the sum of its users'
    gradients; folded and exported each user has its own copy. LoRA-Pro and the like move own pairs only. Starts that
    move part of W into the pair are refused, as Γ̄ would weigh that part too.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; twice the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0
    own: Annotated[bool, At(doc="whether this layer has a pair of its own")] = True
    weighting: Annotated[float, At(ge=0, doc="Γ̄ of this layer")] = 0.5

    live: Tensor | None = None  # Γ̄ with its gradient, while scores learn

    @classmethod
    def shared(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any], seed: int) -> SharedPairs:
        """No pair yet."""
        return SharedPairs()

    def slots(self) -> Iterable[Slot]:
        if self.own:
            yield Slot("A", "factor_a", (self.rank, self.site.in_features), kaiming_uniform)
            yield Slot("B", "factor_b", (self.site.out_features, self.rank))

    def build(self) -> None:
        self.scale = (2 * self.rank if self.alpha is None else self.alpha) / self.rank
        if not self.own:
            self.pool.open(self.site, self.rank, self.seed, self.site_device())

    def pair(self) -> Pair:
        if self.own:
            A = self.A if self.live is None else self.A * self.live
            return Pair(A, self.B, self.scale * (self.weighting if self.live is None else 1.0))
        A, B = self.pool.A[kind(self.site)], self.pool.B[kind(self.site)]
        return Pair(A.view_as(A), B.view_as(B), self.scale)  # views, so that no optimiser takes it for this layer's

    def freeze_offset(self) -> None:
        raise UserError("diffora weighs all of its pair, so a start that moves part of W there does not fit; leave it")

    def parameter_count(self) -> int:
        """r·(in + out) with an own pair and at the first user of a shared one, else 0."""
        if not self.own and self.pool.owners[kind(self.site)] != self.site.path:
            return 0
        return self.rank * (self.site.in_features + self.site.out_features)


def chosen(weights: dict[str, float], kinds: dict[str, str], ratio: float, scope: str = "kind") -> list[str]:
    """The sites with the largest Γ̄: ⌈ρN⌉ of all, or ⌈ρL⌉ of the L of each kind; the earlier one where equal."""
    groups: dict[str, list[str]] = {}
    for path in weights:
        groups.setdefault(kinds[path] if scope == "kind" else "", []).append(path)
    kept: set[str] = set()
    for members in groups.values():
        count = math.ceil(ratio * len(members) - 1e-9)
        kept.update(sorted(members, key=lambda p: -weights[p])[:count])
    return [p for p in weights if p in kept]


@method("diffora-ranks", axis="ranks", paper="arXiv:2502.08905", system=23, defaults="diffora")
class DiffoRARanks(Bilevel):
    """Learn the adaptation matrix Γ̄ by descent on held-out rows, round it, and train what it chose (Jiang et al. 2025).

    Search: Γ̄ = σ(a), one a per layer, from 0. Each step A and B take the gradient of one half of the rows, a that
    of the other half (Adam, β = (0.5, 0.999)), A and B being constants there; a stands still at first, B = 0 giving it
    no gradient anyway. Then the ⌈ρL⌉ layers of each kind with the largest Γ̄ keep a pair of their own, the others share
    one, and all of that trains on all rows with an optimiser of its own.

    Defaults: ρ = 0.5, the search is 0.4 of the run, a learns at 1e-2. The abstract has the idea, its relaxation,
    rounding and sharing; σ, the halves and all numbers are ours, in DARTS' habit. ``relax="columns"`` is L·softmax over
    the L layers of a kind. ``unrolled`` looks one step of the weights ahead (DARTS' second order, at four times the
    cost). ``reinit=False`` keeps what the search has trained. λ_min of the tangent kernel, the paper's argument, is a
    diagnostic here, not a rule: see ``tangent_grams``.

    The Γ̄ of layers of unequal shape do not compare well, as B can make up for it: ``scope="all"`` does so all the same.
    """

    ratio: Annotated[float, At(ge=0, le=1, doc="ρ, share of the layers with a pair of their own")] = 0.5
    scope: Annotated[Literal["kind", "all"], At(doc="choose within each role and shape, or among all layers")] = "kind"
    relax: Annotated[Literal["sigmoid", "columns"], At(doc="how Γ̄ follows from a")] = "sigmoid"
    reinit: Annotated[bool, At(doc="start the chosen pairs anew after the search")] = True

    def on_attach(self, adapter: Adapter) -> None:
        other = next((d for d in adapter.deltas.values() if not isinstance(d, DiffoRA)), None)
        if other is not None:
            raise UserError(f"diffora-ranks chooses among pairs of the form diffora, not {other.name}; write 'diffora'")
        super().on_attach(adapter)
        self.began: dict[str, Tensor] = {}
        if self.searching and all(d.weighting == 0.5 for d in adapter.deltas.values()):
            self.apply()

    def scores_of(self, adapter: Adapter) -> dict[str, Tensor]:
        """a from the Γ̄ that the sites have."""
        found = torch.tensor([d.weighting for d in adapter.deltas.values()])
        return {"a": found.logit() if self.relax == "sigmoid" else found.log() - found.log().mean()}

    def relaxed(self) -> Tensor:
        """Γ̄ of every site, in their order."""
        a = self.scores["a"]
        if self.relax == "sigmoid":
            return a.sigmoid()
        names = [kind(d.site) for d in self.adapter.deltas.values()]
        value = torch.empty_like(a)
        for name in dict.fromkeys(names):
            at = torch.tensor([i for i, n in enumerate(names) if n == name])
            value = value.index_put((at,), len(at) * a[at].softmax(0))
        return value

    def install(self, value: Tensor | None) -> None:
        for i, d in enumerate(self.adapter.deltas.values()):
            d.live = None if value is None else value[i].to(d.A.device)

    def apply(self) -> None:
        for d, value in zip(self.adapter.deltas.values(), self.relaxed().tolist()):
            d.weighting = value

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        super().on_start(adapter, schedule)
        if self.searching and self.reinit:
            pairs = ((path, n, getattr(d, n)) for path, d in adapter.deltas.items() for n in "AB")
            self.began = {f"{path}.{n}": t.detach().clone() for path, n, t in pairs}

    @torch.no_grad()
    def on_phase_end(self, phase: Phase) -> Plan | None:
        if phase.name != "search":
            return None
        deltas = self.adapter.deltas
        weights = {path: d.weighting for path, d in deltas.items()}
        keep = chosen(weights, {path: kind(d.site) for path, d in deltas.items()}, self.ratio, self.scope)
        for d in (deltas[path] for path in keep):
            for n, t in (("A", d.A), ("B", d.B)) if self.reinit else ():
                t.copy_(self.began[f"{d.site.path}.{n}"])
            if not self.reinit:
                d.B.mul_(d.weighting)
            d.weighting = 1.0
        self.began = {}
        return {path: {"own": False, "weighting": 1.0} for path in deltas if path not in keep}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"began": self.began} if self.began else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({k: v for k, v in state.items() if k != "began"})
        self.began = dict(state.get("began", {}))


def tangent_grams(adapter: Adapter, outputs: Callable[[], Tensor]) -> dict[str, Tensor]:
    """H of every own pair, (n, n): products of the gradients of n scalar outputs with respect to A and B, in fp64.

    ``outputs()`` runs the model and gives a tensor (n,), one number a sample. Σ Γ·H over a choice of layers is the
    kernel whose smallest eigenvalue the paper's bounds rest on; it is 0 for more samples than parameters.
    """
    f = outputs()
    own = {path: d for path, d in adapter.deltas.items() if d.own}
    rows: dict[str, list[Tensor]] = {path: [] for path in own}
    for value in f:
        found = torch.autograd.grad(value, [t for d in own.values() for t in (d.A, d.B)], retain_graph=True)
        for path, A, B in zip(own, found[::2], found[1::2]):
            rows[path].append(torch.cat([A.flatten(), B.flatten()]).double())
    stacked = {path: torch.stack(r) for path, r in rows.items()}
    return {path: J @ J.T for path, J in stacked.items()}
