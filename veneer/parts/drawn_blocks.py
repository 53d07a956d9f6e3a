"""Blocks that train by turns: drawn every few steps, the others frozen and without state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import nn

from veneer.core.hook import Optim
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


class DrawnBlocks(Optim):
    """Trains γ blocks at a time and what lies outside of them; derived classes weigh the draw.

    ``units`` are the names of what is drawn: the model's blocks, or its layers where it has none.
    """

    blocks: Annotated[int, At(ge=0, doc="γ, blocks that train at a time")] = 2
    period: Annotated[int | None, At(ge=1, doc="K, steps between two draws; a fiftieth of the run when None")] = None
    outside: Annotated[bool, At(doc="whether what lies outside the blocks trains")] = True
    warmup: Annotated[int, At(ge=0, doc="steps of warm-up after each draw")] = 0

    usual_sites = "all"

    def weights(self) -> tuple[float, ...] | None:
        """A weight for each unit, at least γ of them above 0; None draws uniformly."""
        return None

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
            chosen = drawn(len(self.units), self.blocks, self.seed, step // self.every, self.weights())
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
