"""IncreLoRA: every site starts at rank one, and the sites that matter most grow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.context import Context
from veneer.core.delta import Delta, Pair, Slot
from veneer.core.hook import Ranks, Run, Schedule
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import normal
from veneer.numerics.weighted_blocks import Blocks, assemble
from veneer.parts.assembled import Together, kept_pair
from veneer.parts.change_scores import ChangeScores
from veneer.parts.trainability import add_parameters, remove_parameters

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

RESERVE = 1e-5  # e of components that learn a direction before they are switched on


@method(
    "increlora",
    axis="delta",
    paper="arXiv:2308.12043",
    system=61,
    gives=("linear", "foldable", "frozen-base"),
    defaults="increlora-ranks",
)
class IncreLoRA(Delta):
    """Weighted rank-one components in blocks that are added in mid-training (Zhang et al. 2023).

    ΔW = s·Σₖ Bₖ·diag(eₖ)·Aₖ over the blocks k, with s = α/(ρ + 1e-5) and ρ the number of active components: block 0 and
    the ``grown`` ones. With ``reserve`` one more block is there that is not active yet.

    ======  ===========  ===============  ================================
    tensor  shape        trained          start
    ======  ===========  ===============  ================================
    Aₖ      (n, in)      yes              N(0, 0.02²)
    eₖ      (n,)         not in reserve   0; of every later block 1e-5
    Bₖ      (out, n)     yes              N(0, 0.02²)
    ======  ===========  ===============  ================================

    n = 1 in block 0 and ``width`` in the others; ``IncreLoRARanks`` says when they come. Each block is tensors of its
    own, so that each is a parameter group with a clock of its own; folded and exported they are one pair of rank ρ.
    α = 16 as in the official scripts, where it is used as is. s falls as ρ grows (1 → 2 halves what was learned):
    ``divisor`` holds it fixed. Without a reserve (the official ``advance_learn`` off) a new block starts from e = 0.
    """

    start: Annotated[int, At(ge=1, doc="components of the first block")] = 1
    width: Annotated[int, At(ge=1, doc="components of every later block")] = 1
    grown: Annotated[int, At(ge=0, doc="later blocks that are active")] = 0
    reserve: Annotated[bool, At(doc="whether one more block waits")] = False
    alpha: Annotated[float, At(gt=0, doc="numerator of the scale")] = 16.0
    divisor: Annotated[float | None, At(gt=0, doc="denominator of the scale; ρ when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0

    together: Together | None = None  # of all sites, when one makes their pairs

    def slots(self) -> Iterable[Slot]:
        for k in range(self.grown + 1 + self.reserve):
            yield from self._block(k)

    def _block(self, k: int) -> Iterable[Slot]:
        n = self.width if k else self.start
        first = RESERVE if k and self.reserve else 0.0
        yield Slot(f"A{k}", "factor_a", (n, self.site.in_features), normal(0.02))
        yield Slot(f"e{k}", "diagonal", (n,), lambda shape, _: torch.full(shape, first), trained=k <= self.grown)
        yield Slot(f"B{k}", "factor_b", (self.site.out_features, n), normal(0.02))

    def build(self) -> None:
        self.scale = self.alpha / ((self.divisor or self.rank) + 1e-5)
        for name in [s.name for s in self.slots() if s.name in self._parameters]:  # in order, however they came
            self._parameters[name] = self._parameters.pop(name)

    @property
    def rank(self) -> int:
        """ρ, the number of active components."""
        return self.start + self.grown * self.width

    def _all(self, letter: str) -> list[Tensor]:
        return [getattr(self, f"{letter}{k}") for k in range(self.grown + 1 + self.reserve)]

    def blocks(self) -> Blocks:
        """Its blocks as they stand, the waiting one too."""
        return Blocks(self._all("A"), self._all("e"), self._all("B"), self.scale)

    def prepare(self, ctx: Context) -> None:
        if self.together is not None:
            self.together.prepare(ctx)

    def pair(self) -> Pair:
        """s·diag(e)·A and B of all blocks, at scale 1: those of the forward under way, or made for the moment."""
        return kept_pair(self, self.together) or Pair(*assemble([self.blocks()])[0][0], 1.0)

    def add_block(self, reserve: bool) -> dict[str, nn.Parameter]:
        """Activate the waiting block, or make an active one, and with ``reserve`` a waiting one; gives what is new."""
        had, self.reserve, self.grown = self.reserve, reserve, self.grown + 1
        fresh = self._activate(self.grown) if had else self._make(self.grown)
        fresh |= self._make(self.grown + 1) if reserve else {}
        self.build()
        return fresh

    def add_reserve(self) -> dict[str, nn.Parameter]:
        """Make the waiting block; gives its tensors that train."""
        self.reserve = True
        return self._make(self.grown + 1)

    def drop_reserve(self) -> list[nn.Parameter]:
        """Take the waiting block away; gives its tensors that trained."""
        names, self.reserve = [f"{n}{self.grown + 1}" for n in "AeB"], False
        gone = [self._parameters[n] for n in names if n in self._parameters]
        for n in names:
            self.rebuilt.discard(n)
            delattr(self, n)
        return gone

    def _make(self, k: int) -> dict[str, nn.Parameter]:
        for slot in self._block(k):
            self.set_tensor(slot.name, slot.start(slot.shape, self.generator(slot.name)), trained=slot.trained)
            if not slot.trained:
                self.rebuilt.add(slot.name)
        return {s.name: getattr(self, s.name) for s in self._block(k) if s.trained}

    def _activate(self, k: int) -> dict[str, nn.Parameter]:
        self.set_tensor(name := f"e{k}", getattr(self, name), trained=True)
        self.rebuilt.discard(name)
        return {name: getattr(self, name)}

    def match(self, state: dict[str, Tensor]) -> None:
        """Take the blocks that a saved state has: those with an e are active, one without waits."""
        grown = sum(n.startswith("e") and n[1:].isdigit() for n in state) - 1
        reserve = f"A{grown + 1}" in state
        while self.grown > grown or (self.reserve and not reserve):
            if not self.reserve:
                self.grown, self.reserve = self.grown - 1, True
            self.drop_reserve()
        while self.grown < grown:
            self.add_block(reserve)
        if reserve and not self.reserve:
            self.add_reserve()
        self.build()

    def parameter_count(self) -> int:
        """(ρ + reserve)·(in + out) + ρ."""
        waiting = self.width if self.reserve else 0
        return (self.rank + waiting) * (self.site.in_features + self.site.out_features) + self.rank


@method("increlora-ranks", axis="ranks", paper="arXiv:2308.12043", system=61, defaults="increlora")
class IncreLoRARanks(Ranks):
    """Give more rank to the sites that matter most, round by round, until the budget is spent (Zhang et al. 2023).

    At a scored step, with G = ∂L/∂ΔW of the batch: S = Σ|ΔW∘G|/√(out·in), Ī ← β₁Ī + (1−β₁)S, Ū ← β₂Ū + (1−β₂)|S − Ī|.
    After t₀ steps, every Δ steps, the ``top`` sites by Ī·Ū get d components more: their waiting ones are switched on,
    and others wait in their place. What a round makes is one parameter group, whose warm-up and decay start then and
    end with the run. The loss gets λ times the mean of ‖AAᵀ − I‖_F and ‖BᵀB − I‖_F over sites. When Σρ reaches R̄
    times the number of sites, and at the end, the waiting blocks are dropped.

    Defaults: R̄ = 8, d = R̄/2 (official for 2, 4, 6, 8), β₁ = β₂ = 0.85, λ = 0.1 (RTE 0.3). ``top``: a tenth of the
    sites (of 72 the scripts for R̄ = 8 take 3 to 22, in the middle 7), and more in a short run. t₀ and Δ: a tenth of
    the run, then rounds evenly up to six tenths of it; the scripts have 100/100 for small tasks, 1000/1000 for large.

    G costs as much as a third of the step, so ``scores`` steps between two rounds are scored, evenly, the one of the
    round last (official: every step; a number of at least Δ is that). It is made from activations and not kept; under
    accumulation the score is the mean over micro-batches (official: the last one), and over processes. Each round takes
    no more than fits the budget (official: ties and d > 1 overshoot, and then it never stops). A schedule that cannot
    finish in time is refused (official: printed). ``score="mean"`` divides by out·in as in the paper,
    ``scaling="fixed"`` holds s at α/R̄.
    """

    rank: Annotated[int, At(ge=1, doc="R̄, the mean rank to reach")] = 8
    block: Annotated[int | None, At(ge=1, doc="d, components a site gets at once; R̄/2 when None")] = None
    top: Annotated[int | None, At(ge=1, doc="sites that grow in a round; a tenth when None")] = None
    wait: Annotated[int | None, At(ge=0, doc="t₀, steps before the first round; a tenth when None")] = None
    interval: Annotated[int | None, At(ge=1, doc="Δ, steps between rounds; by the run when None")] = None
    scores: Annotated[int, At(ge=1, doc="scored steps between two rounds")] = 2
    beta1: Annotated[float, At(ge=0, lt=1, doc="decay of Ī, a score")] = 0.85
    beta2: Annotated[float, At(ge=0, lt=1, doc="decay of Ū, a score")] = 0.85
    orthogonality: Annotated[float, At(ge=0, doc="λ")] = 0.1
    advance: Annotated[bool, At(doc="let the next components learn a direction before they count")] = True
    own_clock: Annotated[bool, At(doc="warm-up and decay of a round start with it")] = True
    score: Annotated[Literal["sqrt", "mean"], At(doc="what S is divided by")] = "sqrt"
    scaling: Annotated[Literal["active", "fixed"], At(doc="s = α/ρ or α/R̄")] = "active"

    reads_outputs = False

    def on_attach(self, adapter: Adapter) -> None:
        other = next((d for d in adapter.deltas.values() if not isinstance(d, IncreLoRA)), None)
        if other is not None:
            raise UserError(f"increlora-ranks grows the form increlora, not {other.name}; write 'increlora'")
        self.sensitivity = dict.fromkeys(adapter.deltas, 0.0)
        self.uncertainty = dict.fromkeys(adapter.deltas, 0.0)
        self.listener = ChangeScores(self.score)
        self.together = Together(adapter, penalise=self.orthogonality > 0)
        for d in self.sites:
            d.width = self.block or max(1, self.rank // 2)
            d.divisor = float(self.rank) if self.scaling == "fixed" else d.divisor
            d.build()
        self._join()

    def _join(self) -> None:
        """Make the pairs of all sites at once, those of deltas that were built anew too."""
        for d in self.sites:
            d.together = self.together

    @property
    def sites(self) -> list[IncreLoRA]:
        """The deltas."""
        return list(self.adapter.deltas.values())

    @property
    def room(self) -> int:
        """How many blocks still fit the budget."""
        return max(0, sum(self.rank - d.rank for d in self.sites)) // self.sites[0].width

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self._plan_rounds(schedule.steps)
        self._join()
        self.before_step(0)
        idle = {path: d for path, d in adapter.deltas.items() if self.room and self.advance and not d.reserve}
        add_parameters(adapter, {f"{path}.{n}": p for path, d in idle.items() for n, p in d.add_reserve().items()})

    def before_step(self, step: int) -> None:
        """Listen to the layers in a step that is scored; elsewhere it would keep the fast forms away."""
        self.listener.let_go()
        if self.room and self._scored(step):
            self.listener.listen(self.sites)

    def _scored(self, step: int) -> bool:
        return step % self.every * self.scores % self.every < self.scores

    def _plan_rounds(self, steps: int) -> None:
        """When to grow, the same for a resumed run; raises UserError when that is not over before the end."""
        count, d = len(self.sites), self.sites[0]
        blocks = max(0, self.rank - d.start) * count // d.width
        self.most = min(count, self.top or max(1, count // 10, -(-4 * blocks // steps)))
        rounds = -(-blocks // self.most)
        self.first = steps // 10 if self.wait is None else self.wait
        self.every = self.interval or max(1, steps // (2 * max(1, rounds)))
        last = (self.first // self.every + rounds) * self.every
        if rounds and last >= steps:
            raise UserError(
                f"increlora: {rounds} rounds of {self.most} sites, one every {self.every} steps after {self.first}, "
                f"end at step {last} of {steps}; give more steps, a larger top or block, or a smaller interval"
            )

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        if not self.orthogonality:
            return None
        spread = self.together.take_spread()
        if spread is None:
            _, spread = assemble([d.blocks() for d in self.sites], penalise=True)
        return self.orthogonality * spread

    def before_optimizer(self, step: int) -> None:
        if not self.room or not self._scored(step):
            return
        for path, S in zip(self.adapter.deltas, self.listener.take(self.adapter.deltas)):
            I = self.sensitivity[path] = self.beta1 * self.sensitivity[path] + (1 - self.beta1) * S
            self.uncertainty[path] = self.beta2 * self.uncertainty[path] + (1 - self.beta2) * abs(S - I)
        if step > self.first and step % self.every == 0:
            self._grow(step)

    def _grow(self, step: int) -> None:
        importance, fresh = {path: I * self.uncertainty[path] for path, I in self.sensitivity.items()}, {}
        for path in sorted(importance, key=importance.get, reverse=True)[: min(self.most, self.room)]:
            new = self.adapter.deltas[path].add_block(reserve=self.advance)
            fresh |= {f"{path}.{n}": p for n, p in new.items()}
        add_parameters(self.adapter, fresh, start_step=step + 1 if self.own_clock else 0)
        if not self.room:
            self.on_end()

    def on_end(self) -> None:
        """The budget is spent, or the run over: stop watching and drop what waits."""
        self.listener.let_go()
        for d in self.sites:
            if d.reserve:
                remove_parameters(self.adapter, d.drop_reserve())

    def state_dict(self) -> dict[str, Any]:
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.sensitivity, self.uncertainty = dict(state["sensitivity"]), dict(state["uncertainty"])
