"""TriAdaptLoRA: a small matrix between the factors, grown by triangular borders where it grows fastest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.hook import Ranks, Schedule
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import normal
from veneer.parts.trainability import add_parameters

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


@method(
    "triadaptlora",
    axis="delta",
    paper="arXiv:2501.08008",
    system=10,
    gives=("linear", "foldable", "frozen-base"),
    defaults="triadaptlora-ranks+orthogonal",
)
class TriAdaptLoRA(Delta):
    """ΔW = s·B·C·A with C in triangular blocks, so that growth leaves what is there untouched (Liang et al. 2025).

    Block j adds d_j components; with n_j = d_1 + … + d_j, L_j fills rows n_{j−1} … n_j and columns 0 … n_j of C, and
    U_j rows 0 … n_j and columns n_{j−1} … n_j. The block on the diagonal is the sum of both. s = α/(r + 1e-5).

    ======  ===========  =========  ==============
    tensor  shape        trained    start
    ======  ===========  =========  ==============
    A_j     (d_j, in)    yes        N(0, 0.02²)
    B_j     (out, d_j)   yes        N(0, 0.02²)
    L_j     (d_j, n_j)   yes        0
    U_j     (n_j, d_j)   yes        0
    ======  ===========  =========  ==============

    Here block 0 has ``start`` components and every later one ``width``; ``TriAdaptLoRARanks`` says when they come.
    Folded and exported it is one pair of rank r: C·A in the place of A.

    Read in a modified PEFT file that carries the paper's terms, taken for the authors'. As stored it starts B, L and U
    at 0, and then every gradient is 0: the start here is that of its fixed-rank sibling. α = 16 is used as it is, as in
    IncreLoRA's scripts, from which this descends. s falls as r grows (1 → 2 halves what was learned); ``divisor`` holds
    it fixed. L and U both train the diagonal block, which doubles its rate under plain SGD.
    """

    start: Annotated[int, At(ge=1, doc="components of the first block")] = 1
    width: Annotated[int, At(ge=1, doc="d, components of every later block")] = 1
    grown: Annotated[int, At(ge=0, doc="later blocks")] = 0
    alpha: Annotated[float, At(gt=0, doc="numerator of the scale")] = 16.0
    divisor: Annotated[float | None, At(gt=0, doc="denominator of the scale; r when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0

    def slots(self) -> Iterable[Slot]:
        for j in range(self.grown + 1):
            yield from self._block(j)

    def _block(self, j: int) -> Iterable[Slot]:
        d, n = self._size(j), self.start + j * self.width
        yield Slot(f"A{j}", "factor_a", (d, self.site.in_features), normal(0.02))
        yield Slot(f"B{j}", "factor_b", (self.site.out_features, d), normal(0.02))
        yield Slot(f"L{j}", "core", (d, n))
        yield Slot(f"U{j}", "core", (n, d))

    def _size(self, j: int) -> int:
        return self.width if j else self.start

    def build(self) -> None:
        self.scale = self.alpha / ((self.divisor or self.rank) + 1e-5)

    @property
    def rank(self) -> int:
        """r, the number of components."""
        return self.start + self.grown * self.width

    def core(self) -> Tensor:
        """C (r, r)."""
        C = self.L0 + self.U0
        for j in range(1, self.grown + 1):
            L, U, d = getattr(self, f"L{j}"), getattr(self, f"U{j}"), self._size(j)
            C = torch.cat([torch.cat([C, U[:-d]], dim=1), torch.cat([L[:, :-d], L[:, -d:] + U[-d:]], dim=1)])
        return C

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        blocks = range(self.grown + 1)
        A, B = ([getattr(self, f"{n}{j}") for j in blocks] for n in "AB")
        return torch.cat(A), torch.cat(B, dim=1)

    def pair(self) -> Pair:
        A, B = self.factors()
        return Pair(self.core() @ A, B, self.scale)

    def add_block(self) -> dict[str, nn.Parameter]:
        """One block more; gives its tensors. The change stays what it was, but for the scale."""
        self.grown += 1
        for slot in self._block(self.grown):
            self.set_tensor(slot.name, slot.start(slot.shape, self.generator(slot.name)), trained=True)
        self.build()
        return {s.name: getattr(self, s.name) for s in self._block(self.grown)}

    def match(self, state: dict[str, Tensor]) -> None:
        """Take as many blocks as a saved state has."""
        grown = sum(n.startswith("A") and n[1:].isdigit() for n in state) - 1
        while self.grown < grown:
            self.add_block()
        while self.grown > grown:
            for slot in list(self._block(self.grown)):
                delattr(self, slot.name)
            self.grown -= 1
        self.build()

    def parameter_count(self) -> int:
        """r·(in + out) + Σ_j 2·d_j·n_j."""
        cores = sum(2 * self._size(j) * (self.start + j * self.width) for j in range(self.grown + 1))
        return self.rank * (self.site.in_features + self.site.out_features) + cores


def how_many(left: int, progress: float, growth: str, sites: int) -> int:
    """k, the sites that grow: ⌊left·c⌋, or ⌊exp(c·ln left)⌋; at least one and at most all."""
    wanted = left * progress if growth == "linear" else math.exp(progress * math.log(max(1, left)))
    return min(max(int(wanted + 1e-9), 1), sites)


@method("triadaptlora-ranks", axis="ranks", paper="arXiv:2501.08008", system=10, defaults="triadaptlora")
class TriAdaptLoRARanks(Ranks):
    """Grow the sites whose ‖C‖_F/r rises fastest, until the budget is spent (Liang et al. 2025).

    At step t, with c = (t − t₀)/(T − t₀): when t > t₀ and t mod Δ = 0 every site is scored by what v = ‖C‖_F/r rose
    since the last time (gradients are not needed), and the k best get ``block`` components more: k = ⌊(b − Σr)·c⌋
    (``how_many``) with b = R̄ × sites. What is new is a parameter group of the run's own rate and clock; the state of
    the others stays. Growth stops at b; what would go beyond it is left out (the code lets ties overshoot).

    Defaults: R̄ = 8, d = R̄/2, k linear as in the code. t₀ and Δ are a tenth and a twentieth of the run, this
    implementation's choice (the code's 0 and 1 leave no time to tell sites apart). ``norm_by="blocks"`` divides ‖C‖_F
    by the number of blocks as the code does, ``scaling="fixed"`` holds s at α/R̄. The loss gets the mean of ‖AAᵀ − I‖_F
    and ‖BᵀB − I‖_F, γ = 0.5, by ``orthogonal``, which a recipe can give another weight.
    """

    rank: Annotated[int, At(ge=1, doc="R̄, the mean rank to reach")] = 8
    block: Annotated[int | None, At(ge=1, doc="d, components a site gets at once; R̄/2 when None")] = None
    wait: Annotated[int | None, At(ge=0, doc="t₀, before growth begins; a tenth when None", unit="steps")] = None
    interval: Annotated[int | None, At(ge=1, doc="Δ between rounds; a twentieth when None", unit="steps")] = None
    growth: Annotated[Literal["linear", "exponential"], At(doc="how k depends on what is left")] = "linear"
    norm_by: Annotated[Literal["rank", "blocks"], At(doc="what ‖C‖_F is divided by")] = "rank"
    scaling: Annotated[Literal["active", "fixed"], At(doc="s = α/r or α/R̄")] = "active"

    def on_attach(self, adapter: Adapter) -> None:
        other = next((d for d in adapter.deltas.values() if not isinstance(d, TriAdaptLoRA)), None)
        if other is not None:
            raise UserError(f"triadaptlora-ranks grows the form triadaptlora, not {other.name}; write 'triadaptlora'")
        for d in adapter.deltas.values():
            d.width = d.width if d.grown else self.block or max(1, self.rank // 2)
            d.divisor = float(self.rank) if self.scaling == "fixed" else d.divisor
            d.build()
        self.before = {path: self._size(d) for path, d in adapter.deltas.items()}

    @torch.no_grad()
    def _size(self, d: TriAdaptLoRA) -> float:
        return float(d.core().norm()) / (d.rank if self.norm_by == "rank" else d.grown + 1)

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.steps = schedule.steps
        self.first = schedule.steps // 10 if self.wait is None else self.wait
        self.every = self.interval or max(1, schedule.steps // 20)
        if self.room and self.first + 1 >= schedule.steps:
            raise UserError(f"triadaptlora: with wait={self.first} none of {schedule.steps} steps is left for growth")

    @property
    def room(self) -> int:
        """How many blocks still fit the budget."""
        deltas = self.adapter.deltas.values()
        left = self.rank * len(deltas) - sum(d.rank for d in deltas)
        return max(0, left) // next(iter(deltas)).width

    def before_optimizer(self, step: int) -> None:
        if not self.room or step <= self.first or step % self.every:
            return
        deltas = self.adapter.deltas
        now = {path: self._size(d) for path, d in deltas.items()}
        scores = {path: now[path] - self.before[path] for path in deltas}
        self.before = now
        left = self.rank * len(deltas) - sum(d.rank for d in deltas.values())
        k = how_many(left, (step - self.first) / (self.steps - self.first), self.growth, len(deltas))
        fresh = {}
        for path in sorted(scores, key=scores.get, reverse=True)[: min(k, self.room)]:
            fresh |= {f"{path}.{n}": p for n, p in deltas[path].add_block().items()}
        add_parameters(self.adapter, fresh)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = dict(state.get("before", self.before))
