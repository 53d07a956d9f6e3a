"""CoDyRA: learn freely, then let a rising threshold take the components that a task can do without."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from veneer.core.hook import Ranks, Schedule
from veneer.core.registry import method
from veneer.fields import At
from veneer.numerics.chance import generator
from veneer.parts.components import components
from veneer.parts.trainability import remove_parameters

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


def soft_threshold(gate: Tensor, kappa: float, operator: str = "paper") -> Tensor:
    """sign(g)·max(|g| − κ, 0); the official code also zeroes what is below κ after that, so all within 2κ."""
    left = gate.abs() - kappa
    return torch.where(left >= (0.0 if operator == "paper" else kappa), gate.sign() * left, torch.zeros_like(gate))


def thresholds(steps: int, dense: float, largest: float, levels: int) -> list[float]:
    """κ of every step: 0 while dense, then linspace(0, largest, levels), one further every ⌊(T − D)/levels⌋ steps."""
    start = int(dense * steps)
    every, index, found = max(1, (steps - start) // levels), 0, []
    grid = torch.linspace(0, largest, levels, dtype=torch.float64).tolist()
    for step in range(steps):
        if step >= start and step % every == 0:
            index = min(index + 1, levels - 1)
        found.append(grid[index] if step > start else 0.0)
    return found


@method("dynamic-rank", axis="ranks", paper="arXiv:2412.01004", system=72, wants=("components",), defaults="lora")
class DynamicRank(Ranks):
    """Gated components and a threshold that rises in the second part of the run (Lu et al. 2024, CoDyRA).

    ΔW = s·B·diag(g)·A with s = 1 in the paper. After each optimiser step i of the second part
    g ← sign(g)·max(|g| − κ_i, 0), κ_i rising from 0 to ``largest`` in ``levels`` equal steps (see ``thresholds``). When
    training ends, components with g = 0 are deleted, g is multiplied into A, and a site without components is taken
    off: the adapter is plain LoRA with as much rank at each site as the task asked for, so that the model stays near
    what it was.

    ======  =========  =========  =================================
    tensor  shape      trained    start
    ======  =========  =========  =================================
    g       (r,)       yes        N(0, 1), fp32, no weight decay
    A, B                          the form's, B = 0: starts at base
    ======  =========  =========  =================================

    Beside a start that moves weight out of W (PiSSA) gates start at 1, and a site keeps one closed component at least.

    A stream of tasks is one ``attach`` a task: over adapters of earlier tasks, which stand still (they nest, and
    W + ΣΔW is what a new one sees), or after ``bake``, which merges the last one into W. Each has fresh tensors, gates
    and moments, as the paper has.

    Defaults are the official runner's: r = 16 (give rank=16), κ up to 0.005 in 50 levels, half of the steps dense. Its
    optimiser is AdamW(0.9, 0.9999) at 5e-4 on a cosine, its sites all linear layers of both encoders. SoRA has one
    threshold from the first step on, this one learns freely first. ``operator="official"`` is the published code's map,
    whose dead zone is 2κ. Its loss over class texts, with those of earlier tasks masked, is the task's affair and not
    part of this method. A task that keeps nothing is said, and changes nothing, as there.
    """

    largest: Annotated[float, At(ge=0, doc="κ at the end")] = 0.005
    levels: Annotated[int, At(ge=2, doc="K, values that κ goes through")] = 50
    dense: Annotated[float, At(ge=0, lt=1, doc="share of the steps without a threshold")] = 0.5
    operator: Annotated[Literal["paper", "official"], At(doc="the map")] = "paper"

    def on_attach(self, adapter: Adapter) -> None:
        self.curve: list[float] = []
        for path, c in components(adapter).items():
            drawn = torch.randn(c.rank, generator=generator(self.seed, path, "dynamic-rank gate"))
            c.add_gate(drawn if c.delta.offset is None else torch.ones(c.rank))

    def _gates(self) -> dict[str, Tensor]:
        """The gates that there are, by site."""
        return {path: c.gate for path, c in components(self.adapter).items() if c.gate is not None}

    def groups(self, adapter: Adapter) -> list[dict[str, Any]]:
        """The gates apart: no weight decay, which would shrink them without ever reaching 0."""
        own = self._gates()
        return [{"params": [*own.values()], "names": [f"{p}.gate" for p in own], "weight_decay": 0.0}] if own else []

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.curve = thresholds(schedule.steps, self.dense, self.largest, self.levels)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        kappa = self.curve[min(step, len(self.curve) - 1)]
        for gate in self._gates().values() if kappa else ():
            gate.copy_(soft_threshold(gate, kappa, self.operator))

    def on_end(self) -> None:
        kept = {path: gate.nonzero().flatten().tolist() for path, gate in self._gates().items()}
        if kept and not any(kept.values()):
            warnings.warn(
                f"dynamic-rank: with κ up to {self.largest:g} no component is left, so the adapter changes nothing; "
                "give a smaller largest or a higher rate",
                stacklevel=2,
            )
            return
        parts, deltas = components(self.adapter), self.adapter.deltas
        for path, own in kept.items():
            parts[path].prune(own or [0])
            parts[path].absorb_gate()
        empty = [
            path for path, own in kept.items() if not own and deltas[path].is_plain() and deltas[path].offset is None
        ]
        remove_parameters(self.adapter, [p for path in empty for p in deltas[path].parameters()])
        self.adapter.rebuild(dict.fromkeys(empty))
