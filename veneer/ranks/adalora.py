"""AdaLoRA: every site starts above the mean rank, and the least important components go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from veneer.core.hook import Plan, Ranks, Schedule
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.parts.components import components
from veneer.parts.trainability import remove_parameters

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

TOGETHER = 24  # tensors whose averages are taken at once, so that what lies between stays in the cache


def budget(step: int, start: int, target: int, wait: int, end: int) -> int:
    """The number of components at a step: ``start`` up to ``wait``, ``target`` from ``end`` on, a cubic between."""
    if step <= wait:
        return start
    if step >= end:
        return target
    return int((start - target) * (1 - (step - wait) / (end - wait)) ** 3 + target)


@method(
    "adalora",
    axis="ranks",
    paper="arXiv:2303.10512",
    system="61b",
    wants=("components",),
    defaults="lora+adalora-start+orthogonal",
    aliases=("adalora-ranks",),
)
class AdaLoRA(Ranks):
    """Give the rank to the components whose loss would change the loss most (Zhang et al. 2023).

    ΔW = s·B·diag(E)·A with s = α/r₀ for good, r₀ being the rank that every site starts with. After each optimiser step,
    for every number w of A, B and E with its gradient g: Ī ← β₁Ī + (1−β₁)|w·g|, Ū ← β₂Ū + (1−β₂)||w·g| − Ī|, and of a
    component k the importance is S_k = ĪŪ(E_k) + mean_j ĪŪ(A_kj) + mean_i ĪŪ(B_ik). Every Δ steps E is set to 0 where
    S is smallest over all sites, so that b(t) components are left (see ``budget``). A closed one can come back until
    step T − t_f; there the b = ``rank`` × sites best are kept and the others deleted, their optimiser state too, and
    training goes on with smaller tensors. At the end E is multiplied into A: what is left is LoRA of its own rank at
    each site, and a site without components is taken off.

    ======  =========  =========  =========================================
    tensor  shape      trained    start
    ======  =========  =========  =========================================
    E       (r,)       yes        0 by ``adalora-start``, 1 by another start
    A, B                          the start's
    ======  =========  =========  =========================================

    ``adalora`` alone is lora + adalora-start + adalora + orthogonal; what a recipe names itself stands in their place.

    Defaults: ``rank`` 8, r₀ = 1.5 × rank (PEFT's 8 and 12), β₁ = β₂ = 0.85, Δ = 1 (RTE; MNLI 100). t_i and t_f are a
    tenth and three tenths of the run, within the scripts' 8–15 % and 22–58 %; PEFT has 0 for both and never reaches
    its last step then. Agrees with PEFT's AdaLoRA step by step up to T − t_f, its first call being t = 0; s there has
    1e-5 added to r₀. Equal importance does not close more than b(t) says, and closing none is no error. PEFT keeps the
    closed components to the end (and their share of the orthogonal term). A form that does more than add its pair
    keeps one closed component where all should go.
    """

    rank: Annotated[int, At(ge=1, doc="mean rank at the end")] = 8
    initial: Annotated[int | None, At(ge=1, doc="r₀, rank of every site at the start; 1.5 × rank when None")] = None
    wait: Annotated[int | None, At(ge=0, doc="t_i, before closing begins; a tenth when None", unit="steps")] = None
    settle: Annotated[int | None, At(ge=0, doc="t_f, after it ends; three tenths when None", unit="steps")] = None
    interval: Annotated[int, At(ge=1, doc="Δ between closings", unit="steps")] = 1
    beta1: Annotated[float, At(ge=0, lt=1, doc="decay of Ī")] = 0.85
    beta2: Annotated[float, At(ge=0, lt=1, doc="decay of Ū")] = 0.85

    @property
    def start_rank(self) -> int:
        """r₀."""
        return -(-3 * self.rank // 2) if self.initial is None else self.initial

    def plan(self, sites: list[Site], evidence: Any, form: dict[str, Any]) -> Plan:
        """r₀ everywhere."""
        if self.start_rank < self.rank:
            raise UserError(f"adalora only prunes: initial={self.initial} is below rank={self.rank}; give more")
        return {s.path: {"rank": self.start_rank} for s in sites}

    def on_attach(self, adapter: Adapter) -> None:
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        self.settled, self.closed = False, []
        self.total = self.start_rank * len(adapter.deltas)
        self.target = self.rank * len(adapter.deltas)
        self.parts = components(adapter)
        for c in self.parts.values():
            if c.gate is None:
                c.add_gate(torch.ones(c.rank))

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.parts = components(adapter)
        self.first = schedule.steps // 10 if self.wait is None else self.wait
        self.end = schedule.steps - (3 * schedule.steps // 10 if self.settle is None else self.settle)
        if self.first >= self.end:
            raise UserError(
                f"adalora: {schedule.steps} steps leave none for pruning between wait={self.first} and the last "
                f"settle={schedule.steps - self.end}; give more steps or smaller numbers"
            )

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.settled:
            for path in self.closed:
                self.adapter.deltas[path].gate.zero_()
            return
        if step < self.end:
            self._observe()
        if step >= self.end:
            self._prune()
        elif step > self.first and step % self.interval == 0:
            self._close(self.total - budget(step, self.total, self.target, self.first, self.end))

    def _tensors(self) -> dict[str, Tensor]:
        """The trained tensors of all components, by name."""
        found = {}
        for path, c in self.parts.items():
            if c.gate is not None:
                found |= {f"{path}.A": c.A, f"{path}.B": c.B, f"{path}.E": c.gate}
        return found

    def _observe(self) -> None:
        """Take this step's |w·g| into both averages; a tensor without gradient counts 0."""
        tensors = self._tensors()
        if not self.sensitivity:
            self.sensitivity = {n: torch.zeros_like(t) for n, t in tensors.items()}
            self.uncertainty = {n: torch.zeros_like(t) for n, t in tensors.items()}
        names = list(tensors)
        for at in range(0, len(names), TOGETHER):
            own = names[at : at + TOGETHER]
            weights, mean, spread = (
                [values[n] for n in own] for values in (tensors, self.sensitivity, self.uncertainty)
            )
            now = torch._foreach_mul(weights, [torch.zeros_like(t) if t.grad is None else t.grad for t in weights])
            torch._foreach_abs_(now)
            torch._foreach_lerp_(mean, now, 1 - self.beta1)
            torch._foreach_sub_(now, mean)
            torch._foreach_abs_(now)
            torch._foreach_lerp_(spread, now, 1 - self.beta2)

    @torch.no_grad()
    def importance(self) -> dict[str, Tensor]:
        """S (r,) of every site; without averages (a state from before they were) the size of each component."""
        found = {}
        for path, c in self.parts.items():
            if c.gate is None:
                continue
            if not self.sensitivity:
                found[path] = c.gate.abs() * c.A.norm(dim=1) * c.B.norm(dim=0)
                continue
            A, B, E = ((self.sensitivity[f"{path}.{n}"], self.uncertainty[f"{path}.{n}"]) for n in "ABE")
            rows, columns = torch.linalg.vecdot(*A, dim=1), torch.linalg.vecdot(*B, dim=0)
            found[path] = (E[0] * E[1]).add_(rows, alpha=1 / c.A.shape[1]).add_(columns, alpha=1 / c.B.shape[0])
        return found

    @torch.no_grad()
    def _close(self, count: int) -> dict[str, list[int]]:
        """Set E to 0 at the ``count`` components that matter least; gives the others' indices by site."""
        scores = self.importance()
        order = torch.cat(list(scores.values())).argsort(stable=True)
        keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
        keep[order[: max(0, count)]] = False
        kept = {}
        for path, own in zip(scores, keep.split([len(s) for s in scores.values()])):
            self.adapter.deltas[path].gate.mul_(own)
            kept[path] = own.nonzero().flatten().tolist()
        return kept

    @torch.no_grad()
    def _prune(self) -> None:
        """Delete all but the best; a site that keeps none waits for the end with one closed component."""
        parts = self.parts
        kept = self._close(sum(c.rank for c in parts.values() if c.gate is not None) - self.target)
        self.closed = [path for path, own in kept.items() if not own]
        for path, own in kept.items():
            parts[path].prune(own or [0])
        self.sensitivity, self.uncertainty, self.settled = {}, {}, True

    @torch.no_grad()
    def on_end(self) -> None:
        parts = {path: c for path, c in self.parts.items() if c.gate is not None}
        if sum(c.rank for c in parts.values()) > self.target + len(self.closed):
            self._prune()
        for c in parts.values():
            c.absorb_gate()
        deltas = self.adapter.deltas
        empty = [path for path in self.closed if deltas[path].is_plain() and deltas[path].offset is None]
        remove_parameters(self.adapter, [p for path in empty for p in deltas[path].parameters()])
        self.adapter.rebuild(dict.fromkeys(empty))
        self.closed = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "sensitivity": self.sensitivity,
            "uncertainty": self.uncertainty,
            "settled": self.settled,
            "closed": self.closed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
