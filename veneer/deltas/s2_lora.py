"""S2-LoRA: one pair of factors for the whole network, and sparse coefficients for each matrix."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.context import Context
from veneer.core.delta import Delta, LoRAForm, Pair, Slot
from veneer.core.hook import Ranks, Schedule
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics import chance

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


@method(
    "s2-lora",
    axis="delta",
    paper="arXiv:2309.11756",
    system=107,
    gives=("linear", "foldable", "frozen-base"),
    defaults="s2-lora-ranks",
)
class S2LoRA(Delta):
    """Sparsely shared LoRA: all matrices share A and B, and each weighs their r components for itself.

    ΔW_i = s·B·diag(c_i)·A, y = xW_iᵀ + s·((drop(x)Aᵀ)∘c_i)Bᵀ, and the loss gets λ·Σ_i‖c_i‖₁ (Liu et al. 2024);
    s = α/r.

    ======  =========  =========  ===================================  ========================
    tensor  shape      trained    start                                with ``start="adalora"``
    ======  =========  =========  ===================================  ========================
    A       (r, in)    yes        U(−1/√in, 1/√in); one for a group    N(0, 0.02²)
    B       (out, r)   yes        0; likewise                          N(0, 0.02²)
    c       (r,)       yes        1                                    0
    ======  =========  =========  ===================================  ========================

    No official code; choices of ours where the paper is not to be had: r = 32, α = r, λ = 1e-3, rates 1e-3 for A and B
    and ten times that for c, without decay on c. What shares (the paper's MLPs are of other shapes than its attention):
    ``share="shape"`` one pair for each shape, ``"type"`` for each role and shape, ``"slice"`` one for all, of which a
    layer takes the leading rows and columns, as VeRA does.

    λ under AdamW brings coefficients near 0 and never to it. ``shrink`` gets them there: after every step
    c ← sign(c)·max(|c| − ε, 0) with ε such that an idle coefficient loses ``shrink`` in all (1 is its start; 1.5 is
    sensible), and in the last tenth of the run (``refit``) what is left trains on without ε and λ. Components with
    c = 0 are left out of what is exported, so that a layer's LoRA has the rank it found. A and B could grow against the
    penalty: ``normalise`` gives their rows and columns length 1 after each step and moves it into c.
    """

    rank: Annotated[int, At(ge=1, doc="components r that the layers share")] = 32
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0
    share: Annotated[Literal["shape", "type", "slice"], At(doc="which layers have A and B in common")] = "shape"
    start: Annotated[Literal["lora", "adalora"], At(doc="B = 0 and c = 1, or c = 0")] = "lora"
    penalty: Annotated[float, At(ge=0, doc="λ, weight of the L1 term in the loss")] = 1e-3
    shrink: Annotated[float, At(ge=0, doc="what the proximal steps take in all from an idle coefficient")] = 0.0
    refit: Annotated[float, At(ge=0, lt=1, doc="share of the run, at its end, without λ and ε; only with shrink")] = 0.1
    normalise: Annotated[bool, At(doc="keep rows of A and columns of B at length 1")] = False

    usual_rate = 1e-3
    layers = ("linear", "conv")
    reasons = {"layers": "a table of words has a shape of its own and would share with nothing"}

    @classmethod
    def shared(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any], seed: int) -> nn.Module:
        return Factors(sites, fields, seed).to(sites[0].weight().device)

    def slots(self) -> Iterable[Slot]:
        yield Slot("c", "diagonal", (self.rank,), chance.ones if self.start == "lora" else chance.zeros)

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank
        self.refitting = False

    def prepare(self, ctx: Context) -> None:
        """Add λ‖c‖₁ to the loss of a training pass."""
        if self.penalty and ctx.training and not self.refitting:
            ctx.add_loss("s2-lora", self.penalty * self.c.abs().sum())

    def pair(self) -> Pair:
        """A and B·diag(c)."""
        A, B = self._factors()
        return Pair(A, B * self.c, self.scale)

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm:
        """The components of which something is left; one of zeros where nothing is."""
        kept = self.c.detach().nonzero().flatten()
        kept = kept if len(kept) else kept.new_zeros(1)
        A, B, s = self.pair()
        return LoRAForm(A[kept], B[:, kept], s)

    def parameter_count(self) -> int:
        """r, and r·(in + out) for the group's factors, at its first layer."""
        name = self.pool.group[self.site.path]
        own = self.pool.A[name].numel() + self.pool.B[name].numel()
        return self.rank + (own if self.pool.first[name] == self.site.path else 0)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this layer's group."""
        name = self.pool.group[self.site.path]
        return self.pool.A[name][:, : self.site.in_features], self.pool.B[name][: self.site.out_features]


class Factors(nn.Module):
    """The shared pairs, one for each group of layers."""

    def __init__(self, sites: list[Site], fields: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        names = {
            "shape": lambda s: f"{s.out_features}x{s.in_features}",
            "type": lambda s: f"{s.role}_{s.out_features}x{s.in_features}",
            "slice": lambda s: "all",
        }
        self.group = {s.path: names[fields["share"]](s) for s in sites}
        self.first = {name: path for path, name in reversed(self.group.items())}
        ours = fields["start"] == "lora"
        first_a, first_b = (chance.kaiming_uniform, chance.zeros) if ours else (chance.normal(0.02),) * 2
        for name in self.first:
            members = [s for s in sites if self.group[s.path] == name]
            shape_a = fields["rank"], max(s.in_features for s in members)
            shape_b = max(s.out_features for s in members), fields["rank"]
            self.A[name] = nn.Parameter(first_a(shape_a, chance.generator(seed, "s2-lora", name, "A")))
            self.B[name] = nn.Parameter(first_b(shape_b, chance.generator(seed, "s2-lora", name, "B")))


def prox(c: Tensor, epsilon: float) -> Tensor:
    """The proximal map of ε·|·|: sign(c)·max(|c| − ε, 0)."""
    return c.sign() * (c.abs() - epsilon).clamp_min(0)


@method("s2-lora-ranks", axis="ranks", paper="arXiv:2309.11756", system=107, defaults="s2-lora")
class S2LoRARanks(Ranks):
    """What S2-LoRA does beside the gradient: c's own rate, proximal steps, refitting, lengths of A and B.

    It comes with ``s2-lora`` and has no fields: those of the form say what it does.
    """

    def on_attach(self, adapter: Adapter) -> None:
        self.members = list(adapter.members())
        other = next((d for d in self.members if not isinstance(d, S2LoRA)), None)
        if other is not None:
            raise UserError(f"s2-lora-ranks trains the coefficients of s2-lora, which {other.name} does not have")
        self.form = self.members[0]

    def groups(self, adapter: Adapter) -> list[dict[str, Any]]:
        """The coefficients apart: ten times the rate, without decay."""
        named = [(n, p) for n, p in adapter.named_parameters() if n.endswith(".c")]
        return [{"params": [p for _, p in named], "names": [n for n, _ in named], "rate": 10.0, "weight_decay": 0.0}]

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.steps = schedule.steps
        self.until = self.steps - int(self.form.refit * self.steps) if self.form.shrink else self.steps

    def before_step(self, step: int) -> None:
        for d in self.members:
            if step >= self.until and not d.refitting:
                d.alive = d.c.detach() != 0  # zeros stay zeros from here on, so a resumed run finds the same
            d.refitting = step >= self.until

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for d in self.members if self.form.shrink else ():
            d.c.copy_(d.c * d.alive if d.refitting else prox(d.c, self.form.shrink / self.until))
        if self.form.normalise:
            normalise(self.members)

    def on_end(self) -> None:
        for d in self.members:
            d.refitting = False
        if not any(self.counts()):
            warnings.warn("s2-lora: every coefficient is zero, so the adapter changes nothing", stacklevel=2)

    def counts(self) -> Iterator[int]:
        """‖c_i‖₀: the rank that each layer found."""
        return (int(d.c.count_nonzero()) for d in self.members)


@torch.no_grad()
def normalise(members: list[S2LoRA]) -> None:
    """Give the rows of A and the columns of B length 1 and move it into c; a pair with one of length 0 stays."""
    pool = members[0].pool
    for name, A in pool.A.items():
        B = pool.B[name]
        a, b = A.norm(dim=1), B.norm(dim=0)
        a, b = (torch.where(a * b > 0, n, 1.0) for n in (a, b))
        A.div_(a[:, None])
        B.div_(b)
        for d in members:
            if pool.group[d.site.path] == name:
                d.c.mul_(a * b)
