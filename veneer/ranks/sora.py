"""SoRA: gates on LoRA's components, driven to zero by a proximal step, then pruned."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from veneer.core.hook import Phase, Plan, Ranks, Run, Schedule
from veneer.core.registry import method
from veneer.fields import At
from veneer.numerics.chance import generator
from veneer.parts.components import components

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


def prox(gate: Tensor, threshold: float, operator: str = "paper") -> Tensor:
    """The proximal map of threshold·|·|: shrink by the threshold, zero inside it (official code: inside twice it)."""
    zone = threshold if operator == "paper" else 2 * threshold
    return torch.where(gate.abs() >= zone, gate - gate.sign() * threshold, torch.zeros_like(gate))


@method("sora", axis="ranks", paper="arXiv:2311.11696", system=3, wants=("components",), defaults="lora")
class SoRA(Ranks):
    """Sparse low-rank adaptation: each site finds its rank below r (Ding et al. 2023).

    ΔW = s·B·diag(g)·A with s = α/r for good, also after pruning.

    ======  =========  =========  =================================
    tensor  shape      trained    start
    ======  =========  =========  =================================
    g       (r,)       yes        N(0, 1), fp32, no weight decay
    A, B                          the form's, B = 0: starts at base
    ======  =========  =========  =================================

    Beside a start that subtracts its own B₀A₀ (PiSSA), g starts from 1: only so is the start the base.

    After every optimiser step g ← sign(g)·max(|g| − ξ, 0), with ξ = ``threshold`` as it stands, not times the rate: the
    official script has 3e-4. When training ends, components with g = 0 are deleted, g is multiplied into A, and a site
    without components is taken off. ``penalty`` adds η·mean|g| to the loss (official: on top of the proximal step; here
    off). ``then`` are further thresholds, each trained on from the last (the paper's sparsifying schedule) with a rate
    schedule of its own: the official code kept one that had already reached 0, which prunes without recovery.
    ``operator="official"`` is the published code's map, whose dead zone is 2ξ.

    Adam moves a gate by at most about the rate, so a threshold at or above it kills every gate: a warning says so.
    """

    threshold: Annotated[float, At(ge=0, doc="ξ, absolute")] = 3e-4
    then: Annotated[tuple[float, ...], At(doc="further thresholds, one phase each")] = ()
    penalty: Annotated[float, At(ge=0, doc="η, weight of the L1 term")] = 0.0
    operator: Annotated[Literal["paper", "official"], At(doc="the proximal map")] = "paper"
    follow_rate: Annotated[bool, At(doc="multiply ξ by the schedule's share of the peak rate")] = False

    reads_outputs = False

    def on_attach(self, adapter: Adapter) -> None:
        self.parts = components(adapter)
        self.index = 0
        for path, c in self.parts.items():
            offset = c.delta.offset is not None
            c.add_gate(
                torch.ones(c.rank) if offset else torch.randn(c.rank, generator=generator(self.seed, path, "sora gate"))
            )

    def groups(self, adapter: Adapter) -> list[dict[str, Any]]:
        """The gates apart: no weight decay, which would shrink them without ever reaching 0."""
        gates = [(f"{path}.gate", c.gate) for path, c in self.parts.items() if c.gate is not None]
        return [{"params": [g for _, g in gates], "names": [n for n, _ in gates], "weight_decay": 0.0}] if gates else []

    def phases(self) -> list[Phase]:
        share = 1 / (1 + 0.3 * len(self.then))  # the script trains 50 epochs, then 15 a threshold
        return [Phase(f"ξ = {x:g}", share * (0.3 if i else 1.0)) for i, x in enumerate((self.threshold, *self.then))]

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.run = schedule
        if self.current() >= schedule.lr:
            warnings.warn(
                f"sora: the threshold {self.current():g} is not below the learning rate {schedule.lr:g}, "
                "so every gate will fall to zero",
                stacklevel=2,
            )

    def current(self) -> float:
        """The threshold of the phase under way."""
        return (self.threshold, *self.then)[self.index]

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        if not self.penalty:
            return None
        return self.penalty * torch.cat([c.gate for c in self.parts.values()]).abs().mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        share = self.run.factor(step) if self.follow_rate else 1.0
        gates = [c.gate for c in self.parts.values()]
        moved = prox(torch.cat(gates), share * self.current(), self.operator)
        torch._foreach_copy_(gates, list(moved.split([len(g) for g in gates])))

    def on_phase_end(self, phase: Phase) -> Plan | None:
        self.index = min(self.index + 1, len(self.then))
        return None

    def on_end(self) -> None:
        empty: Plan = {}
        for path, c in self.parts.items():
            keep = c.gate.nonzero().flatten().tolist()
            plain = c.delta.is_plain() and c.delta.offset is None
            if not keep and plain:
                empty[path] = None
                continue
            c.prune(keep or [0])
            c.absorb_gate()
        if len(empty) == len(self.parts):
            warnings.warn(
                "sora: every gate is zero, so nothing was pruned and the adapter changes nothing", stacklevel=2
            )
        elif empty:
            self.adapter.rebuild(empty)

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state.get("index", 0)
