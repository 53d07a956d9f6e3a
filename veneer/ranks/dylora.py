"""DyLoRA: every step trains a random prefix of the components, so that any rank can be used afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import torch

from veneer.core.hook import Hook, Ranks, Schedule
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import generator
from veneer.parts.components import components

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.core.delta import Delta

POINTS = ("after_backward", "before_optimizer", "after_step", "micro_step")


@method("dylora", axis="ranks", paper="arXiv:2210.07558", system=24, wants=("components",), defaults="lora")
class DyLoRA(Ranks):
    """Nested components: train once, serve any rank up to the form's r (Valipour et al. 2023).

    Each optimiser step draws n and runs ΔW = (α/n)·B_{:,1:n}·A_{1:n}, in all its micro-batches and at all sites; the
    components beyond n get no gradient. Between steps, in evaluation and in the file the adapter has all r. ``cut``
    keeps a prefix for good, with smaller tensors and the scale α/n, to be saved, folded, exported or served;
    ``at_rank`` runs a prefix for a while. Adds no tensor; A and B are the form's.

    Defaults: n uniform on 1 … r, one n for all sites, as the official code draws; r = 8 and α = 16 are its GLUE
    scripts'. ``frozen`` trains the last component of the prefix alone (the paper's second variant, which the official
    loop takes): slower, and worse at equal steps in the sheet's trial, so it is off. ``block`` moves n in steps, as
    "unit" and "block_size" do elsewhere; the frozen variant then trains the last block.

    n is a function of (seed, step), the same on every replica and in a resumed run; the official code draws from the
    global generator. The prefix is a multiplier r/n or 0 on each component, so a step costs what rank r costs. What α/n
    is follows from the form's own s = α/r, so with rslora it is α√r/n. A start that moves weight out of W is refused:
    a prefix would not put it back; so are optimiser methods that need A and B ungated in the step.
    """

    distribution: Annotated[Literal["uniform", "geometric"], At(doc="how n is drawn")] = "uniform"
    p: Annotated[float, At(gt=0, lt=1, doc="of the geometric one: P(n) ∝ (1 − p)ⁿ")] = 0.5
    ranks: Annotated[tuple[int, ...], At(doc="the n to draw from; all when empty")] = ()
    least: Annotated[int, At(ge=1, doc="the smallest n")] = 1
    block: Annotated[int, At(ge=1, doc="n goes in steps of this")] = 1
    per_module: Annotated[bool, At(doc="draw for every site by itself")] = False
    frozen: Annotated[bool, At(doc="train the last component of the prefix alone")] = False

    def on_attach(self, adapter: Adapter) -> None:
        self.rank = max(c.rank for c in components(adapter).values())
        odd = [n for n in self.ranks if not 1 <= n <= self.rank]
        if odd or not self.choices():
            raise UserError(f"dylora: no n to draw, or one of {list(self.ranks)} is not within 1 … {self.rank}")
        if any(d.offset is not None for d in adapter.deltas.values()):
            start = adapter.recipe.part("init")
            raise UserError(
                f"dylora runs prefixes of the components, and {start.method.name if start else 'the start'} needs all "
                "of them to put back what it moved out of W; leave it out, or take eva"
            )
        acting = [
            h for h in adapter.hooks if any(getattr(type(h), p, None) is not getattr(Hook, p, None) for p in POINTS)
        ]
        wanting = {p.method.name for p in adapter.recipe.on("optim") if "pair" in p.method.wants}
        refused = next((h.name for h in acting if h.name in wanting), None)
        if refused is not None:
            raise UserError(f"{refused} steps whole pairs A and B, and dylora runs a part of them; leave one out")

    def choices(self) -> list[int]:
        """The n that can be drawn; r is one of them."""
        if self.ranks:
            return sorted(self.ranks)
        return [n for n in range(self.rank, 0, -1) if n >= self.least and (n % self.block == 0 or n == self.rank)][::-1]

    def draw(self, step: int, path: str = "") -> int:
        """n of an optimiser step, of one site when each has its own."""
        choices = torch.tensor(self.choices())
        weights = torch.ones(len(choices)) if self.distribution == "uniform" else (1 - self.p) ** choices.float()
        of = (self.seed, "dylora", step, path) if path else (self.seed, "dylora", step)
        return int(choices[weights.multinomial(1, generator=generator(*of))])

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        _restore(adapter)

    def before_step(self, step: int) -> None:
        for path, d in self.adapter.deltas.items():
            _prefix(d, self.draw(step, path if self.per_module else ""))

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        if not self.frozen:
            return
        for path, c in components(self.adapter).items():
            n = min(c.rank, self.draw(step, path if self.per_module else ""))
            done = max((m for m in (0, *self.choices()) if m < n), default=0)
            for gradient in (c.A.grad, None if c.B.grad is None else c.B.grad.T):
                if gradient is not None:
                    gradient[:done] = 0

    def after_step(self, step: int) -> None:
        _restore(self.adapter)


def cut(adapter: Adapter, rank: int) -> Adapter:
    """Keep the first ``rank`` components of every site for good, at the scale that they were trained with.

    Of an adapter trained with ``dylora`` this is the adapter of that rank. Raises UserError for a rank that is not
    there; a site that has fewer components keeps what it has.
    """
    _check(adapter, rank)
    for c in components(adapter).values():
        whole = c.rank
        if rank < whole:
            c.prune(range(rank))
            c.delta.scale *= whole / rank
    return adapter


@contextmanager
def at_rank(adapter: Adapter, rank: int) -> Iterator[Adapter]:
    """Within it the adapter runs, and folds, with the first ``rank`` components; raises UserError as ``cut`` does."""
    _check(adapter, rank)
    for d in adapter.deltas.values():
        _prefix(d, rank)
    try:
        yield adapter
    finally:
        _restore(adapter)


def _check(adapter: Adapter, rank: int) -> None:
    parts = components(adapter)
    most = max(c.rank for c in parts.values())
    if not 1 <= rank <= most:
        raise UserError(
            f"the adapter {adapter.name!r} has rank {most}: any rank from 1 to {most} can be had, not {rank}"
        )
    if adapter.name in adapter.root.switch.folded:
        raise UserError(f"the adapter {adapter.name!r} is folded into the weights: unfold() it, then choose a rank")
    if any(isinstance(c.gate, torch.nn.Parameter) for c in parts.values()):
        raise UserError(f"{adapter.recipe} weights its components; a prefix of them is not an adapter of lower rank")


def _prefix(delta: Delta, rank: int) -> None:
    """Run the first ``rank`` components, times r/rank; the multiplier is not saved."""
    gate = torch.zeros(delta.rank, device=delta.site_device())
    gate[:rank] = max(1.0, delta.rank / rank)
    delta.gate = gate


def _restore(adapter: Adapter) -> None:
    for d in adapter.deltas.values():
        if not isinstance(d.gate, torch.nn.Parameter):
            d.set_gate(None)
