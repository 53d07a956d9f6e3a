"""LISA: all weights in turn, a few blocks at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.parts.drawn_blocks import DrawnBlocks

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


@method("lisa", axis="optim", paper="arXiv:2403.17919", system=79, defaults="full(norms=True)")
class LISA(DrawnBlocks):
    """Train γ random blocks at a time, draw others every K steps, and keep state for those alone (Pan et al. 2024).

    Before step t with K | t: a set of γ blocks, uniform without replacement; they train, the other blocks are frozen,
    without gradient and without optimiser state; what lies outside the blocks (embedding, head, last norm, position
    tables) trains all the time. Adam starts each drawn block from zero moments.

    ==============  ==============  =======================================================
    tensor          shape           trained
    ==============  ==============  =======================================================
    in a block      the form's      while its block is drawn
    outside         the form's      always, or never with ``outside=False``
    ==============  ==============  =======================================================

    Defaults: γ = 2 (LMFlow's argument; its scripts 1, axolotl 4); K a fiftieth of the run (scripts 20; the paper takes
    the best number of draws for the problem). In short runs it wants LoRA's rate (5e-4) and not full fine-tuning's.

    Which tensors there are is the form's and the selection's. By themselves they are the paper's, all of the model;
    sites="linear" leaves embedding and head alone, which is cheaper and costs a little loss. Drawing blocks of another
    form, as in "lora+lisa", is legal and saves little. In a model without blocks each layer counts as one.

    Differences: the published callback keeps every state it ever made, so that memory grows to full fine-tuning's;
    here a block that leaves frees its own, and one that is drawn twice running starts anew as well. ``probs`` weighs
    the blocks; ``warmup`` raises all rates over the first steps of a period, which fresh moments like at high rates.
    What is drawn depends on seed and period alone, so it is the same on every replica and after a break.
    """

    probs: Annotated[tuple[float, ...] | None, At(doc="a weight for each block; uniform when None")] = None

    def on_attach(self, adapter: Adapter) -> None:
        super().on_attach(adapter)
        if self.probs is not None and (
            len(self.probs) != len(self.units) or sum(p > 0 for p in self.probs) < self.blocks
        ):
            raise UserError(
                f"lisa: probs must hold a weight for each of the {len(self.units)} blocks, "
                f"at least {self.blocks} of them above 0"
            )

    def weights(self) -> tuple[float, ...] | None:
        return self.probs
