"""Maestro: factors whose components are ordered by what they do, so that their number is found in training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from veneer.core.adapted import Base
from veneer.core.delta import Delta, LoRAForm, Pair, Slot
from veneer.core.hook import Plan, Ranks, Run
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import generator, kaiming_uniform
from veneer.numerics.svd import truncated_svd
from veneer.parts.components import Components

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

TINY = 1e-12  # under the root, whose slope at 0 would be infinite


@method(
    "maestro",
    axis="delta",
    paper="arXiv:2308.14929",
    system=41,
    gives=("pair", "components", "linear", "foldable", "frozen-base"),
    defaults="maestro-ranks",
)
class Maestro(Delta):
    """A low-rank change of which every leading part is usable (Horváth et al. 2024, as a change of W a form of ours).

    y = xWᵀ + b + s·xA[:w]ᵀB[:, :w]ᵀ: in training a step may see the first w components only, see ``maestro-ranks``;
    otherwise all r. With ``replace=True``, the paper's own form, the product stands for W: y = xA[:w]ᵀB[:, :w]ᵀ + b.

    ======  =========  =========  ================  =========================
    tensor  shape      trained    start             start with replace
    ======  =========  =========  ================  =========================
    A       (r, in)    yes        U(−1/√in, 1/√in)  √Σ·Vᵀ of W = UΣVᵀ
    B       (out, r)   yes        0                 U·√Σ
    norm    ()         no         ‖W‖_F             ‖W‖_F
    ======  =========  =========  ================  =========================

    Defaults: r = 16 and s = 1 (α = r) at the start; s stays when components go. With ``replace``, r = min(out, in) and
    s = 1: up to twice W's parameters at first, and a smaller r starts from W's best approximation and not from W. The
    bias stays the base's; train it with ``train=``. As the product starts in the order of the singular values, so does
    a change under "maestro+pissa".
    """

    rank: Annotated[int | None, At(ge=0, doc="r; 16 when None, or min(out, in) with replace")] = None
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    replace: Annotated[bool, At(doc="stand for W in place of changing it")] = False

    reasons = {"as_lora": "the product stands for W, from which it differs at full rank"}

    def slots(self) -> Iterable[Slot]:
        if self.rank is None:
            self.rank = min(self.site.out_features, self.site.in_features) if self.replace else 16
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), kaiming_uniform)
        yield Slot("B", "factor_b", (self.site.out_features, self.rank))

    def build(self) -> None:
        self.width: int | None = None
        self.replaces = self.replace
        self.scale = 1.0 if self.replace or not self.rank or self.alpha is None else self.alpha / self.rank
        W = self.site.weight()
        self.register_buffer("norm", torch.linalg.vector_norm(W.detach(), dtype=torch.float32))
        if self.replace and W.numel():  # a base that was dropped has nothing to start from
            U, S, Vh = truncated_svd(W, max(1, self.rank), exact=True)
            self.set_tensor("A", (S.sqrt()[:, None] * Vh)[: self.rank], trained=True)
            self.set_tensor("B", (U * S.sqrt())[:, : self.rank], trained=True)
            self.starts_at_base = self.rank >= min(W.shape)

    def run(self, x: Tensor, base: Base, *args: Any, **kwargs: Any) -> Any:
        return self._instead(x) if self.replace else super().run(x, base, *args, **kwargs)

    def _instead(self, x: Tensor) -> Tensor:
        """The layer's output with the product for W."""
        (A, B), b = self.cast(x, *self.factors()), self.site.bias()
        if not self.site.factored():
            return self.site.run(x, B @ A, b)
        y = self.site.lift(self.site.project(x, A), B)
        if b is None:
            return y
        ones = (1 for _ in self.site.module.kernel_size) if self.site.kind == "conv" else ()
        return y + b.to(y.dtype).view(-1, *ones)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they act now: in training, a step may be given a width."""
        A = self.gated(self.A)
        return (A, self.B) if self.width is None or not self.training else (A[: self.width], self.B[:, : self.width])

    def pair(self) -> Pair | None:
        return None if self.replace else Pair(*self.factors(), self.scale)

    def weight(self, W: Tensor | None = None) -> Tensor:
        if not self.replace:
            return super().weight(W)
        return self.fold(None, None)[0] - (self.site.weight().float() if W is None else W)

    def fold(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.replace:
            return super().fold(W, b)
        A, B = self.factors()
        return B @ A, b

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        return None if self.replace else super().as_lora(W, b)

    def freeze_offset(self) -> None:
        if self.replace:
            raise UserError("maestro(replace=True) stands for W and takes no start that moves part of W; leave it out")
        super().freeze_offset()

    def parameter_count(self) -> int:
        """r·(in + out), r being what is left, and r for gates."""
        gates = 0 if self.gate is None else self.rank
        return self.rank * (self.site.in_features + self.site.out_features) + gates

    def importance(self, hierarchical: bool = True) -> Tensor:
        """imp_i = s·a_i·b_i (r,), by the norms of ``norms``."""
        a, b = norms(self.A, 0, hierarchical), norms(self.B, 1, hierarchical)
        return self.scale * a * b


def norms(M: Tensor, dim: int, hierarchical: bool = True) -> Tensor:
    """Of each component i along ``dim`` of a factor, (Σ_{j ≥ i} ‖M_j‖²)^½; without the hierarchy ‖M_i‖."""
    squares = M.square().sum(1 - dim)
    return ((squares.flip(0).cumsum(0).flip(0) if hierarchical else squares) + TINY).sqrt()


def cut(adapter: Adapter, share: float) -> dict[str, int]:
    """Keep ``share`` of all components, those that matter most, a leading part at each site; gives what is left.

    The trained adapter serves at every size; nothing is trained again (the paper's LoD-P).
    """
    found = [d for d in adapter.members() if isinstance(d, Maestro)]
    ranked = sorted((-v, k, i) for k, d in enumerate(found) for i, v in enumerate(d.importance().tolist()))
    kept = [k for _, k, _ in ranked[: round(share * len(ranked))]]
    for k, d in enumerate(found):
        Components(adapter, d).prune(range(kept.count(k)))
    return {d.site.path: d.rank for d in found}


@method("maestro-ranks", axis="ranks", paper="arXiv:2308.14929", system=41, defaults="maestro")
class MaestroRanks(Ranks):
    """Order Maestro's components by ordered dropout, and let a group lasso take the last away (Horváth et al. 2024).

    Each step one pair (layer, w) of a shuffled list of all pairs is next: that layer runs with its first w components,
    the others with all. To the loss is added λ·Ω, Ω = Σ_layers Σ_i (a_i + b_i), a_i = (Σ_{j ≥ i} ‖A_j‖²)^½ and b_i
    likewise of B's columns. After every epoch the components with s·a_i·b_i < ε·‖W‖_F go, always the last ones, and
    the optimiser's state with them; a site that has none left is taken off at the end.

    Defaults: λ = 1e-5 (the scripts have 1e-6, the paper's grid reaches 1e-3); ε = 1e-5 as in the official code, there
    absolute, here relative to W as its size must follow the weights'. ``sampler="across-layers"`` draws a width for
    each layer at every step, "none" leaves the order to Ω.

    Differences: widths are whole numbers (the official code multiplies fractions and comes out one too wide in places),
    dead components go at once (there they stay in memory and in Ω), roots have 1e-12 added, as the slope of Ω at B = 0
    is otherwise not a number. Its constant width ("pufferfish"), the second pass against soft targets and the
    recalibration of batch norms are left out. What is drawn depends on the seed alone: it is the same on every replica.
    """

    penalty: Annotated[float, At(ge=0, doc="λ")] = 1e-5
    threshold: Annotated[float, At(ge=0, doc="ε, over ‖W‖_F")] = 1e-5
    sampler: Annotated[Literal["per-layer", "across-layers", "none"], At(doc="which widths a step takes")] = "per-layer"
    hierarchical: Annotated[bool, At(doc="norms over component i and all after it")] = True

    reads_outputs = False

    def on_attach(self, adapter: Adapter) -> None:
        if not self.sites():
            raise UserError(f"maestro-ranks is for the form maestro, which {adapter.recipe} does not hold")
        self.round, self.at = 0, 0
        self.order: list[tuple[int, int]] | None = None

    def sites(self) -> list[Maestro]:
        """The deltas it acts on."""
        return [d for d in self.adapter.members() if isinstance(d, Maestro)]

    def before_step(self, step: int) -> None:
        sites = self.sites()
        if self.sampler == "across-layers":
            for d in (d for d in sites if d.rank):
                draw = generator(self.seed, d.site.path, "maestro width", step)
                d.width = int(torch.randint(1, d.rank + 1, (), generator=draw))
        elif self.sampler == "per-layer" and any(d.rank for d in sites):
            k, width = self._next(sites)
            sites[k].width = width

    def _next(self, sites: list[Maestro]) -> tuple[int, int]:
        """The next pair (index of a site, width) of the shuffled list; a new list when it is used up."""
        if self.order is not None and self.at == len(self.order):
            self.round, self.at, self.order = self.round + 1, 0, None
        if self.order is None:
            every = [(k, w) for k, d in enumerate(sites) for w in range(1, d.rank + 1)]
            draw = generator(self.seed, "maestro order", self.round)
            self.order = [every[i] for i in torch.randperm(len(every), generator=draw).tolist()]
        self.at += 1
        return self.order[self.at - 1]

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        if not self.penalty:
            return None
        every = [norms(M, dim, self.hierarchical).sum() for d in self.sites() for M, dim in ((d.A, 0), (d.B, 1))]
        return self.penalty * torch.stack(every).sum()

    def after_backward(self, step: int) -> None:
        for d in self.sites():
            d.width = None

    def on_epoch(self, epoch: int) -> None:
        self.shrink()

    @torch.no_grad()
    def shrink(self) -> None:
        """Let the components go that do next to nothing; a factor that has not moved yet is left alone."""
        for d in (d for d in self.sites() if d.B.any()):
            dead = d.importance(self.hierarchical) < self.threshold * d.norm
            alive = d.rank - int(dead.flip(0).int().cumprod(0).sum())
            if alive < d.rank:
                Components(self.adapter, d).prune(range(alive))
                self.round, self.at, self.order = self.round + 1, 0, None

    def on_end(self) -> None:
        self.shrink()
        empty: Plan = {p: None for p, d in self.adapter.deltas.items() if isinstance(d, Maestro) and not d.rank}
        empty = {} if any(d.replace for d in self.sites()) else empty
        if empty and len(empty) == len(self.adapter.deltas):
            warnings.warn("maestro: no component is left anywhere, so the adapter changes nothing", stacklevel=2)
        elif empty:
            self.adapter.rebuild(empty)

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.round, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.round, self.at, self.order = state.get("round", 0), state.get("at", 0), None
