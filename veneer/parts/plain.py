"""What the fast forms of a block ask of its layers: is the fused product all that acts here?"""

from __future__ import annotations

from torch import Tensor, nn

from veneer.core.adapted import Adapted, Base
from veneer.core.adapter import adapters
from veneer.core.delta import Delta
from veneer.numerics.fused import Weight


def plain(
    module: nn.Module,
) -> tuple[Weight, Tensor | None, Tensor, Tensor, float, float, int | None, Tensor | None] | None:
    """What the fused product of a layer needs when nothing else acts on it: else None.

    Returns (weight or function, bias, A, B, scale, dropout probability, seed, gain).
    """
    if not isinstance(module, Adapted):
        return None
    whole, rows, tensors = module.veneer_links()
    if not whole or rows or tensors or not isinstance(whole[-1], Delta):
        return None
    delta = whole[-1]
    base = Base(delta.site, module.veneer_own, whole[:-1])
    fused = delta.fused(base) if delta.product is type(delta).default_product else None
    if fused is None:
        return None
    A, B, scale, gain = fused
    p = delta.active_dropout()
    return base.source(), base.own_bias(), A, B, scale, p, delta.draw_seed() if p else None, gain


def positionwise(model: nn.Module) -> bool:
    """Whether every adapter on the model acts on one position at a time, so that rows may lie one after the other."""
    return all(
        a.recipe.part("side") is None
        and a.recipe.part("mixture") is None
        and not any(d.site.kind in ("module", "conv") for d in a.deltas.values())
        for a in adapters(model).values()
    )
