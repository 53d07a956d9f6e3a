"""What the fast forms of a block ask of its layers: is a single plain pair all that acts here?"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veneer.core.adapted import Adapted, Base
from veneer.core.delta import Delta


def plain(module: nn.Module) -> tuple[Any, Tensor | None, Tensor, Tensor, float, float, int | None] | None:
    """What the fused product of a layer needs when one plain pair acts on it: else None.

    Returns (weight or function, bias, A, B, scale, dropout probability, seed).
    """
    if not isinstance(module, Adapted):
        return None
    whole, rows, tensors = module.veneer_links()
    if len(whole) != 1 or rows or tensors or not isinstance(whole[0], Delta) or not whole[0].is_plain():
        return None
    delta = whole[0]
    base = Base(delta.site, module.veneer_own)
    if not base.fusable or delta.product is not type(delta).default_product:
        return None
    A, B, scale = delta.pair()
    p = delta.active_dropout()
    return base.source(), base.own_bias(), A, B, scale, p, delta.draw_seed() if p else None
