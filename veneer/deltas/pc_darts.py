"""PC-DARTS: which layers get which small operator is learned by descent, on a part of the channels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from veneer.core.adapted import Base
from veneer.core.delta import Delta, LoRAForm, Pair, Slot
from veneer.core.hook import Phase, Plan
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.models.layers import dimensions
from veneer.numerics.chance import generator, kaiming_uniform
from veneer.numerics.channels import add_to_channels
from veneer.parts.bilevel import Bilevel

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

OPERATORS = ("none", "lora-2", "lora-8", "scale")


def rank_of(operator: str) -> int | None:
    """r of "lora-r"; None for "none" and "scale". Raises UserError for anything else."""
    if operator in ("none", "scale"):
        return None
    kind, _, number = operator.partition("-")
    if kind != "lora" or not number.isdigit() or int(number) < 1:
        raise UserError(f"pc-darts: {operator!r} is no operator; there are none, scale and lora-1, lora-2, …")
    return int(number)


def cost(operator: str, site: Site) -> int:
    """The numbers that an operator trains at a site."""
    r = rank_of(operator)
    return 0 if operator == "none" else site.out_features if r is None else r * (site.in_features + site.out_features)


@method(
    "pc-darts",
    axis="delta",
    paper="arXiv:1907.05737",
    system=121,
    gives=("foldable", "frozen-base", "linear"),
    defaults="pc-darts-search",
)
class PCDarts(Delta):
    """A weighted sum of operators on 1/K of the output channels, or the one that the search chose on all of them.

    Searching (Xu et al. 2020, on adapters): y = W x + b, then y[S] ← y[S] + Σ_o c_o·o(x) with ⌊out/K⌋ channels S that
    are drawn once. Operators: "none"; "lora-r", s·B_rA_rx; "scale", v∘y[S]. Afterwards one of the last two acts on all
    channels: y + s·BAx, or y ↦ (1 + v)∘y.

    ======  ============  =========  ==================
    tensor  shape         trained    start
    ======  ============  =========  ==================
    A_r     (r, in)       yes        U(−1/√in, 1/√in)
    B_r     (|S|, r)      yes        0
    v       (|S|,)        yes        0
    S       (|S|,) int    no         drawn from the seed
    ======  ============  =========  ==================

    Chosen, A_r and B_r are A and B, and |S| is out. Defaults: K = 4, ranks 2 and 8, s = α/r = 2 for every r, so that no
    operator starts ahead. ``weights`` are the c_o that ``pc-darts-search`` has come to; equal ones when None. The
    original moves channels about after each operator and has convolutions and poolings in the place of ours; the
    official "random" variant shuffles a local variable only, so its slice is the first channels as well.
    """

    operators: Annotated[tuple[str, ...], At(doc="what a layer may get: none, scale, lora-2, …")] = OPERATORS
    channels: Annotated[int, At(ge=1, doc="K, one in K output channels takes part in the search")] = 4
    scaling: Annotated[float, At(gt=0, doc="s = α/r of every low-rank operator")] = 2.0
    operator: Annotated[str | None, At(doc="the one chosen; None while searching")] = None
    weights: Annotated[tuple[float, ...] | None, At(doc="c, one an operator; equal ones when None")] = None

    reasons = {"as_lora": "the scale operator changes W in full rank"}
    live: Tensor | None = None  # c with its gradient, while scores learn

    def slots(self) -> Iterable[Slot]:
        if len(set(self.operators)) < len(self.operators) or not any(o != "none" for o in self.operators):
            raise UserError(f"pc-darts: operators={self.operators} must be different ones, and not 'none' alone")
        out, inn = self.site.out_features, self.site.in_features
        n = out if self.operator else max(1, out // self.channels)
        for name in self.acting():
            r, mark = rank_of(name), "" if self.operator else name.removeprefix("lora-")
            if r is None:
                yield Slot("v", "diagonal", (n,))
            else:
                yield Slot(f"A{mark}", "factor_a", (r, inn), kaiming_uniform)
                yield Slot(f"B{mark}", "factor_b", (n, r))

    def build(self) -> None:
        self.scale = self.scaling
        if self.operator is None:
            out = self.site.out_features
            S = torch.randperm(out, generator=self.generator("channels"))[: max(1, out // self.channels)].sort().values
            self.set_tensor("S", S)
            self.rebuilt.add("S")

    def acting(self) -> list[str]:
        """The operators that have tensors here."""
        return [self.operator] if self.operator else [o for o in self.operators if o != "none"]

    def weighted(self) -> dict[str, Any]:
        """c by operator."""
        c = self.weights or (1 / len(self.operators),) * len(self.operators)
        return dict(zip(self.operators, c if self.live is None else self.live))

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """A (R, in) and B (|S|, R) of all low-rank operators with their weights, or None where there is none."""
        c = self.weighted()
        found = [(getattr(self, f"A{n}") * c[o], getattr(self, f"B{n}")) for o in self.acting() if (n := rank_of(o))]
        return (torch.cat([A for A, _ in found]), torch.cat([B for _, B in found], 1)) if found else None

    def pair(self) -> Pair | None:
        return Pair(self.A, self.B, self.scale) if self.operator not in (None, "scale") else None

    def is_plain(self) -> bool:
        return self.pair() is not None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        if self.pair() is not None:
            return y + self.update(x)
        at = -1 - dimensions(self.site.module) if self.site.kind == "conv" else -1
        if self.operator == "scale":
            return y + y * self._along(self.v, at, y)
        added, both = 0, self.low_rank()
        if both is not None and self.site.factored():
            A, B = self.cast(x, *both)
            added = self.site.lift(self.site.project(x, A), B) * self.scale
        elif both is not None:
            added = self.site.run(x, self._spread(self.scale * both[1] @ both[0])).index_select(at, self.S)
        if "scale" in self.operators:
            added = added + y.index_select(at, self.S) * self._along(self.v * self.weighted()["scale"], at, y)
        return add_to_channels(y, added.to(y.dtype), self.S, at)

    def _along(self, v: Tensor, at: int, y: Tensor) -> Tensor:
        """A vector of channels as it meets y."""
        return v.to(y.dtype).view(-1, *(1 for _ in range(-1 - at)))

    def _spread(self, rows: Tensor) -> Tensor:
        """Rows (|S|, …) at their channels of (out, …), zeros elsewhere."""
        return rows.new_zeros(self.site.out_features, *rows.shape[1:]).index_copy(0, self.S, rows)

    def gains(self) -> Tensor:
        """c·v by channel (out,), 0 where nothing scales."""
        if self.operator == "scale":
            return self.v.float()
        if self.operator or "scale" not in self.operators:
            return torch.zeros(self.site.out_features, device=self.site_device())
        return self._spread(self.v.float() * self.weighted()["scale"])

    def weight(self, W: Tensor | None = None) -> Tensor:
        if self.pair() is not None:
            return super().weight(W)
        W = self.site.weight().float() if W is None else W
        both = self.low_rank() if self.operator is None else None
        change = self.gains()[:, None] * W
        return change if both is None else change + self._spread(self.scale * both[1].float() @ both[0].float())

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.weight(W), b if b is None else b * (1 + self.gains())

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        if self.pair() is not None or "scale" in self.acting():
            return super().as_lora(W, b)
        A, B = self.low_rank()
        return LoRAForm(A, self._spread(B), self.scale)

    def parameter_count(self) -> int:
        """Σ r·(in + |S|) + |S|, of the operators that act."""
        n = self.site.out_features if self.operator else max(1, self.site.out_features // self.channels)
        return sum(n if (r := rank_of(o)) is None else r * (self.site.in_features + n) for o in self.acting())


def edges(beta: Tensor, groups: list[str]) -> Tensor:
    """|g|·softmax(β) within each group: the weights of the sites, 1 for equal β."""
    value = torch.empty_like(beta)
    for name in dict.fromkeys(groups):
        at = torch.tensor([i for i, g in enumerate(groups) if g == name])
        value = value.index_put((at,), len(at) * beta[at].softmax(0))
    return value


def strengths(alpha: Tensor, beta: Tensor, groups: list[str]) -> Tensor:
    """softmax(β_g)_m·softmax(α_m)_o, (sites, operators)."""
    sizes = torch.tensor([groups.count(g) for g in groups])
    return (edges(beta, groups) / sizes)[:, None] * alpha.softmax(1)


def genotype(found: Tensor, operators: tuple[str, ...], groups: list[str], keep: float) -> dict[int, str]:
    """The operator of each site that stays: its strongest but "none", at the ⌈keep·|g|⌉ strongest sites of a group."""
    known = [i for i, o in enumerate(operators) if o != "none"]
    best, index = found[:, known].max(1)
    chosen: dict[int, str] = {}
    for name in dict.fromkeys(groups):
        members = [i for i, g in enumerate(groups) if g == name]
        count = max(1, math.ceil(keep * len(members) - 1e-9))
        for i in sorted(members, key=lambda i: -float(best[i]))[:count]:
            chosen[i] = operators[known[int(index[i])]]
    return chosen


def affordable(found: Tensor, operators: tuple[str, ...], sites: list[Site], budget: int) -> dict[int, str]:
    """The strongest operators that fit the budget together, one a site, in the order of strength."""
    chosen: dict[int, str] = {}
    for k in found.flatten().argsort(descending=True, stable=True).tolist():
        i, o = k // len(operators), operators[k % len(operators)]
        if o != "none" and i not in chosen and cost(o, sites[i]) <= budget:
            chosen[i] = o
            budget -= cost(o, sites[i])
    if not chosen:
        raise UserError(f"pc-darts: no operator fits budget={budget}; give a larger one")
    return chosen


@method("pc-darts-search", axis="ranks", paper="arXiv:1907.05737", system=121, defaults="pc-darts")
class PCDartsSearch(Bilevel):
    """Descend on relaxed choices of operator and place with held-out rows, then train the strongest (Xu et al. 2020).

    c_mo = |g|·softmax(β_g)_m·softmax(α_m)_o for layer m of group g and operator o; the second softmax, over layers, is
    the edge normalisation that steadies the choice of places. Operators learn from one half of the rows, (α, β) from
    the other (Adam, β = (0.5, 0.999)); they start at 1e-3·N(0, 1) and stand still for the first 0.3 of the search,
    while the operators catch up with those that have nothing to learn. Then each layer's best operator but "none" is
    taken at the ``keep`` strongest layers of each group, or those that ``budget`` parameters allow, operators in
    the order of strength, and trained anew on all channels with all rows.

    Defaults: rate 3e-2 for hundreds of steps (official 6e-4, for thousands), decay 1e-3, warm-up 0.3 as officially 15
    of 50 epochs; half of the layers of each role, where the original keeps two edges a node. The factor |g|, which
    leaves weights at 1 for equal β, is ours. ``unrolled`` is DARTS' second order. Both gradients of a step are taken
    at the same weights; the official script takes one after the other.
    """

    score_rate: Annotated[float, At(gt=0, doc="learning rate of α and β")] = 3e-2
    waiting: Annotated[float, At(ge=0, lt=1, doc="share of the search in which α and β stand still")] = 0.3
    among: Annotated[Literal["role", "all"], At(doc="which layers compete: those of a role, or all")] = "role"
    keep: Annotated[float, At(ge=0, le=1, doc="share of each group's layers that stay, at least one")] = 0.5
    budget: Annotated[int | None, At(ge=1, doc="parameters in all, in place of keep")] = None

    def on_attach(self, adapter: Adapter) -> None:
        other = next((d for d in adapter.deltas.values() if not isinstance(d, PCDarts)), None)
        if other is not None:
            raise UserError(f"pc-darts-search needs the form pc-darts, not {other.name}; write 'pc-darts'")
        super().on_attach(adapter)
        if self.searching and not any(d.weights for d in adapter.deltas.values()):
            self.apply()

    def scores_of(self, adapter: Adapter) -> dict[str, Tensor]:
        """α (M, |O|) and β (M,): small, or from the weights that a loaded adapter has."""
        every = list(adapter.deltas.values())
        if any(d.weights for d in every):
            c = torch.tensor([d.weights for d in every]).clamp_min(1e-12)
            return {"alpha": (c / c.sum(1, keepdim=True)).log(), "beta": c.sum(1).log()}
        g, shape = generator(self.seed, "pc-darts scores"), (len(every), len(every[0].operators))
        return {"alpha": 1e-3 * torch.randn(shape, generator=g), "beta": 1e-3 * torch.randn(shape[0], generator=g)}

    def group_names(self) -> list[str]:
        """The group of every site."""
        return [d.site.role if self.among == "role" else "" for d in self.adapter.deltas.values()]

    def relaxed(self) -> Tensor:
        """c (M, |O|)."""
        return edges(self.scores["beta"], self.group_names())[:, None] * self.scores["alpha"].softmax(1)

    def install(self, value: Tensor | None) -> None:
        for i, d in enumerate(self.adapter.deltas.values()):
            d.live = None if value is None else value[i].to(d.site_device())

    def apply(self) -> None:
        for d, c in zip(self.adapter.deltas.values(), self.relaxed().tolist()):
            d.weights = tuple(c)

    @torch.no_grad()
    def on_phase_end(self, phase: Phase) -> Plan | None:
        if phase.name != "search":
            return None
        every = list(self.adapter.deltas.values())
        names, operators = self.group_names(), every[0].operators
        found = strengths(self.scores["alpha"], self.scores["beta"], names)
        if self.budget:
            picked = affordable(found, operators, [d.site for d in every], self.budget)
        else:
            picked = genotype(found, operators, names, self.keep)
        return {
            d.site.path: {"operator": picked[i], "weights": None} if i in picked else None for i, d in enumerate(every)
        }
