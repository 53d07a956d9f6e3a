"""The pairs of deltas that come in blocks, put together once in each forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.context import Context, current
from veneer.core.delta import Delta, Pair
from veneer.numerics.weighted_blocks import assemble

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


class Together:
    """Makes the pairs of all sites of an adapter at once; with ``penalise`` also how far they are from orthonormal.

    Deltas have ``blocks()`` and call ``prepare``. Where tensors are sharded or lie on several devices, and where a
    method goes backward through parts of the model by themselves, nothing is kept and each site makes its own pair.
    """

    def __init__(self, adapter: Adapter, penalise: bool) -> None:
        self.adapter, self.penalise = adapter, penalise
        self.spread: Tensor | None = None
        self.apart = any(hasattr(h, "micro_step") for h in adapter.hooks)

    def prepare(self, ctx: Context) -> None:
        """Put the pairs of the pass that begins together, once."""
        if self.apart or self in ctx.kept:
            return
        layers = {path: d.blocks() for path, d in self.adapter.deltas.items()}
        first = [x.A[0] for x in layers.values()]
        if any(t.device != first[0].device or hasattr(t, "to_local") for t in first):
            return
        learning = ctx.training and torch.is_grad_enabled()
        pairs, self.spread = assemble(list(layers.values()), self.penalise and learning)
        ctx.keep(self, {path: Pair(A, B, 1.0) for path, (A, B) in zip(layers, pairs)})

    def take_spread(self) -> Tensor | None:
        """The mean distance of the pass just made, once; None when there was none."""
        spread, self.spread = self.spread, None
        return spread

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"spread": None}


def kept_pair(delta: Delta, together: Together | None) -> Pair | None:
    """The pair of a delta in the forward pass under way, its scale within A; None where none is kept."""
    ctx = current()
    kept = None if ctx is None or together is None else ctx.kept.get(together)
    return None if kept is None else kept.get(delta.site.path)
