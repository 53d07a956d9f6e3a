"""A factored delta as rank-one components: a multiplier for each, grown and pruned for good."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta
from veneer.errors import UserError
from veneer.parts.trainability import remove_parameters, replace_parameter


class Components:
    """The components of one delta: ΔW = s·Σ gᵢ·bᵢaᵢᵀ with row aᵢ of ``factor_a`` and column bᵢ of ``factor_b``.

    ``grow`` and ``prune`` make other tensors and carry the optimiser's state along; the scale s stays.
    """

    def __init__(self, adapter: Adapter, delta: Delta) -> None:
        roles = {s.role: s.name for s in delta.slots()}
        if not {"factor_a", "factor_b"} <= set(roles):
            raise UserError(f"{delta.name} at {delta.site.path} has no factors to see as components")
        self.adapter, self.delta = adapter, delta
        self.a, self.b = roles["factor_a"], roles["factor_b"]

    @property
    def A(self) -> Tensor:
        """(r, in)."""
        return getattr(self.delta, self.a)

    @property
    def B(self) -> Tensor:
        """(out, r)."""
        return getattr(self.delta, self.b)

    @property
    def rank(self) -> int:
        """How many components there are."""
        return self.A.shape[0]

    @property
    def gate(self) -> nn.Parameter | None:
        """The multipliers (r,) in fp32, or None for ones."""
        return self.delta.gate

    def add_gate(self, start: Tensor) -> nn.Parameter:
        """Put a trained multiplier on each component; ``start`` has shape (r,)."""
        if start.shape != (self.rank,):
            raise ValueError(f"a gate of shape {tuple(start.shape)} on {self.rank} components")
        self.delta.set_gate(start.float())
        return self.delta.gate

    @torch.no_grad()
    def absorb_gate(self) -> None:
        """Multiply the gate into ``factor_a`` and take it off; the change stays the same."""
        gate = self.delta.gate
        if gate is not None:
            self.A.mul_(gate[:, None])
            remove_parameters(self.adapter, [gate])
            self.delta.set_gate(None)

    @torch.no_grad()
    def prune(self, keep: Iterable[int]) -> None:
        """Keep the components at these indices, in this order; the others are gone."""
        at = torch.as_tensor(list(keep), dtype=torch.long, device=self.A.device)
        self._replace({n: t.index_select(d, at) for n, t, d in self._tensors()}, at.tolist())

    @torch.no_grad()
    def grow(self, A: Tensor, B: Tensor, gate: Tensor | None = None) -> None:
        """Append components: A (n, in), B (out, n) and, where there are gates, their start (n,)."""
        more = {self.a: A, self.b: B}
        if self.gate is not None:
            more["gate"] = torch.ones(A.shape[0]) if gate is None else gate
        self._replace({n: torch.cat([t, more[n].to(t)], dim=d) for n, t, d in self._tensors()}, None)

    def _tensors(self) -> list[tuple[str, Tensor, int]]:
        own = [(self.a, self.A, 0), (self.b, self.B, 1)]
        return own if self.gate is None else [*own, ("gate", self.gate, 0)]

    def _replace(self, values: dict[str, Tensor], keep: list[int] | None) -> None:
        for name, old, dim in self._tensors():
            if isinstance(old, nn.Parameter):
                replace_parameter(self.adapter, self.delta, name, values[name], keep, dim)
            else:
                self.delta.set_tensor(name, values[name])
                self.delta.rebuilt.discard(name)
        self.delta.rank = self.rank


def components(adapter: Adapter) -> dict[str, Components]:
    """The components of every delta, by site path; raises UserError where a form has none."""
    return {path: Components(adapter, d) for path, d in adapter.deltas.items()}
