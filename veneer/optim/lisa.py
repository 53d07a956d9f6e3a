"""LISA: all weights in turn, a few blocks at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import nn

from veneer.core.hook import Optim
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.numerics import chance

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.core.hook import Schedule


def drawn(count: int, blocks: int, seed: int, period: int, probs: tuple[float, ...] | None = None) -> list[int]:
    """γ distinct ones of ``count`` blocks for a period, uniform or by ``probs``: a function of the seed alone."""
    g, most = chance.generator(seed, "lisa", period), min(blocks, count)
    if probs is None:
        return sorted(torch.randperm(count, generator=g)[:most].tolist())
    weights = torch.tensor(probs, dtype=torch.float64)
    return sorted(torch.multinomial(weights, most, generator=g).tolist()) if most else []


@method("lisa", axis="optim", paper="arXiv:2403.17919", system=79, defaults="full(norms=True)")
class LISA(Optim):
    """Train γ random blocks at a time, draw others every K steps, and keep state for those alone (Pan et al. 2024).

    Before step t with K | t: a set of γ blocks, uniform without replacement; they train, the other blocks are frozen,
    without gradient and without optimiser state; what lies outside the blocks (embedding, head, last norm, position
    tables) trains all the time. Adam starts each drawn block from zero moments.

    ==============  ==============  =======================================================
    tensor          shape           trained
    ==============  ==============  =======================================================
    in a block      the form's      while its block is drawn
    outside         the form's      always, or never with ``outside=False``
    ==============  ==============  =======================================================

    Defaults: γ = 2 (LMFlow's argument; its scripts 1, axolotl 4); K a fiftieth of the run (scripts 20; the paper takes
    the best number of draws for the problem). In short runs it wants LoRA's rate (5e-4) and not full fine-tuning's.

    Which tensors there are is the form's and the selection's. By themselves they are the paper's, all of the model;
    sites="linear" leaves embedding and head alone, which is cheaper and costs a little loss. Drawing blocks of another
    form, as in "lora+lisa", is legal and saves little. In a model without blocks each layer counts as one.

    Differences: the published callback keeps every state it ever made, so that memory grows to full fine-tuning's;
    here a block that leaves frees its own, and one that is drawn twice running starts anew as well. ``probs`` weighs
    the blocks; ``warmup`` raises all rates over the first steps of a period, which fresh moments like at high rates.
    What is drawn depends on seed and period alone, so it is the same on every replica and after a break.
    """

    blocks: Annotated[int, At(ge=0, doc="γ, blocks that train at a time")] = 2
    period: Annotated[int | None, At(ge=1, doc="K, steps between two draws; a fiftieth of the run when None")] = None
    outside: Annotated[bool, At(doc="whether what lies outside the blocks trains")] = True
    probs: Annotated[tuple[float, ...] | None, At(doc="a weight for each block; uniform when None")] = None
    warmup: Annotated[int, At(ge=0, doc="steps of warm-up after each draw")] = 0

    usual_sites = "all"

    def on_attach(self, adapter: Adapter) -> None:
        names = [path for path, _ in architecture.blocks(adapter.model)]
        every = adapter.every().values()
        owner = {d: next((n for n in names if d.site.path.startswith(f"{n}.")), None) for d in every}
        if not any(owner.values()):
            owner = {d: d.site.module_path for d in every}
            names = list(dict.fromkeys(owner.values()))
        self.units = [n for n in names if n in owner.values()]
        self.home: dict[str, int] = {}  # frozen tensors of blocks by name, and the optimiser's group they come back to
        self.every = self.period or 1
        if self.probs is not None and (
            len(self.probs) != len(self.units) or sum(p > 0 for p in self.probs) < self.blocks
        ):
            raise UserError(
                f"lisa: probs must hold a weight for each of the {len(self.units)} blocks, "
                f"at least {self.blocks} of them above 0"
            )
        if not self.outside:
            for d in (d for d, name in owner.items() if name is None):
                d.requires_grad_(False)

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.every = self.period or max(1, schedule.steps // 50)

    def rate(self, group: dict[str, Any], step: int) -> float:
        """The warm-up within a period."""
        return min(1.0, (step % self.every + 1) / (self.warmup + 1))

    def before_step(self, step: int) -> None:
        if step % self.every == 0:
            chosen = drawn(len(self.units), self.blocks, self.seed, step // self.every, self.probs)
            self._train([])
            self._train([self.units[i] for i in chosen])
            order = {p: i for i, p in enumerate(self.adapter.parameters())}
            for group in self._groups():  # sums over a group's gradients are then those of a run without draws
                group["params"].sort(key=lambda p: order.get(p, len(order)))

    def _train(self, units: list[str]) -> None:
        """Let the blocks of these names train, and freeze all others for the time being."""
        for name, p, unit in self._tensors():
            if unit in units and name in self.home:
                p.requires_grad_(True)
                self._groups()[self.home.pop(name)]["params"].append(p)
            elif unit not in units and p.requires_grad:
                self._freeze(name, p)

    def _tensors(self) -> list[tuple[str, nn.Parameter, str]]:
        """Name, tensor and block of all that trains in blocks, as it stands now."""
        found = []
        for path, d in self.adapter.every().items():
            unit = next((u for u in self.units if d.site.path.startswith(f"{u}.") or d.site.module_path == u), None)
            if unit is not None:
                found += [(f"{path}.{n}", p, unit) for n, p in d.named_parameters()]
        return found

    def _groups(self) -> list[dict[str, Any]]:
        return self.adapter.optimizer.param_groups

    def _freeze(self, name: str, p: nn.Parameter) -> None:
        """Out of gradients, of the optimiser's groups and of its state."""
        p.requires_grad_(False)
        p.grad = None
        self.home[name] = next(i for i, g in enumerate(self._groups()) if any(p is q for q in g["params"]))
        group = self._groups()[self.home[name]]
        group["params"] = [q for q in group["params"] if q is not p]
        self.adapter.optimizer.state.pop(p, None)

    def on_end(self) -> None:
        for name, p, _ in self._tensors():
            if self.home.pop(name, None) is not None:
                p.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        return {"home": dict(self.home)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, p, _ in self._tensors():
            if name in state.get("home", {}) and p.requires_grad:
                self._freeze(name, p)
        self.home = dict(state.get("home", {}))
