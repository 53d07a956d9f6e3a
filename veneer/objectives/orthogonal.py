"""Orthogonal factors: the rows of A and the columns of B are drawn towards an orthonormal set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from torch import Tensor

from veneer.core.hook import Objective, Run, Schedule
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.orthogonality import orthogonality

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.core.delta import Delta


@method("orthogonal", axis="objective", paper="arXiv:2303.10512", system="61b", defaults="lora")
class Orthogonal(Objective):
    """γ times the mean of ‖AAᵀ − I‖_F and ‖BᵀB − I‖_F over all trained factors (Zhang et al. 2023, eq. 4).

    With A (r, in) and B (out, r) as they are stored: gates and scales are left out. It makes the components of AdaLoRA
    or TriAdaptLoRA differ, so that dropping one says something; any form with factors can have it.

    γ = 0.5 is PEFT's default; the official scripts of AdaLoRA take 0.1 to 0.3. At a start of N(0, 0.02²) the term is
    near √r and outweighs the task's loss at first. It reads the weights alone.
    """

    weight: Annotated[float, At(ge=0, doc="γ")] = 0.5

    reads_outputs = False

    def on_attach(self, adapter: Adapter) -> None:
        self.roles: dict[Delta, list[tuple[str, str]]] = {}
        if not self.factors():
            raise UserError(f"orthogonal draws trained factors A and B together; {adapter.recipe} has none")

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.roles = {}

    def factors(self) -> list[Tensor]:
        """Every trained factor as (r, n); of a form that keeps them in pieces, put together."""
        found = []
        for d in self.adapter.members():
            if callable(getattr(d, "factors", None)):
                A, B = d.factors()
                found += [A, B.T]
                continue
            if d not in self.roles:
                self.roles[d] = [(s.role, s.name) for s in d.slots() if s.role in ("factor_a", "factor_b")]
            tensors = [(role, getattr(d, name)) for role, name in self.roles[d]]
            found += [t if role == "factor_a" else t.T for role, t in tensors if t.requires_grad]
        return found

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        factors = self.factors() if self.weight else []  # a rank method may have frozen them all
        return self.weight * orthogonality(factors) if factors else None
