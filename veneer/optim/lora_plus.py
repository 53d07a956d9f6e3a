"""LoRA+: a larger learning rate for B than for A."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta, Slot
from veneer.core.hook import Optim
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At


@method(
    "lora-plus",
    axis="optim",
    paper="arXiv:2402.12354",
    system=0,
    wants=("linear",),
    defaults="lora",
    aliases=("lora+",),
)
class LoRAPlus(Optim):
    """B learns λ times as fast as A, since in a wide layer one rate for both lets A hardly move the features.

    A ← A − η·g_A, B ← B − λη·g_B, with g what the optimiser makes of the gradients (Hayou et al. 2024, §4).

    The run's rate η is A's. Vectors of the form (DoRA's magnitudes, biases) go with B, as in the official code;
    whatever else trains keeps η, gates on the pair among it. A form that puts B together from pieces, which may come
    in mid-training, is refused, and so is one of which no B trains. Nothing is stored. Default: λ = 16 from the paper,
    best with η about half of LoRA's.

    Decay that is tied to the rate, as in AdamW, is λ times as strong on B too. PEFT gives factors at embeddings a rate
    of 1e-6; here they are pairs like others.
    """

    ratio: Annotated[float, At(ge=1, doc="λ, the rate of B over that of A")] = 16.0

    def on_attach(self, adapter: Adapter) -> None:
        pairs = [d.pair() for d in adapter.members()]
        if not any(isinstance(pair.B, nn.Parameter) for pair in pairs if pair is not None):
            raise UserError(f"lora-plus gives a factor B a rate of its own; in {adapter.recipe} none trains as it is")

    def groups(self, adapter: Adapter) -> list[dict[str, Any]]:
        fast = {id(t) for slot, t in _tensors(adapter) if slot.role == "factor_b" or len(slot.shape) == 1}
        chosen = {name: p for name, p in adapter.named_parameters() if id(p) in fast}
        return [{"params": list(chosen.values()), "names": list(chosen), "rate": self.ratio}]


def _tensors(adapter: Adapter) -> Iterator[tuple[Slot, Tensor]]:
    """Every slot of the deltas and of those within them, and the tensor in it."""
    for delta in adapter.deltas.values():
        for part in delta.modules():
            if isinstance(part, Delta):
                yield from ((slot, getattr(part, slot.name)) for slot in part.slots())
