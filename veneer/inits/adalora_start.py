"""AdaLoRA's start: both factors small and random, their weights zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.hook import Init
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.parts.components import components

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

STD = 0.02


@method(
    "adalora-start", axis="init", paper="arXiv:2303.10512", system="61b", wants=("components",), defaults="lora+adalora"
)
class AdaLoRAStart(Init):
    """The start of AdaLoRA's triplets, by which ΔW = s·B·diag(E)·A is 0 (Zhang et al. 2023).

    ======  =========  =========  ==============================
    tensor  shape      trained    start
    ======  =========  =========  ==============================
    A       (r, in)    yes        N(0, 0.02²)
    B       (out, r)   yes        N(0, 0.02²)
    E       (r,)       yes        0; kept as ``gate``
    ======  =========  =========  ==============================

    It puts the weights E on the components itself, and goes with ``adalora`` alone among the rank methods. With another
    start in its place (EVA, PiSSA …) E starts at 1 and the factors are that start's.
    """

    def start(self, site: Site, slots: list[Any], evidence: Any, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = {s.role: s.shape for s in slots}
        return {
            role: torch.empty(shapes[role]).normal_(0.0, STD, generator=generator) for role in ("factor_a", "factor_b")
        }

    def on_attach(self, adapter: Adapter) -> None:
        ranks = adapter.recipe.part("ranks")
        if ranks is None or ranks.method.name != "adalora":
            raise UserError("adalora-start goes with adalora, which prunes what it starts; write 'adalora'")
        for c in components(adapter).values():
            c.add_gate(torch.zeros(c.rank))
