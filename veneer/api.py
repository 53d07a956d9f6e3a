"""The public Adapter: the core's, as a value, with folding, saving, exporting and other people's trainers."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.core import adapter as core
from veneer.core.delta import Delta
from veneer.core.hook import Plan
from veneer.errors import UserError
from veneer.parts import description, folding, state, trainability
from veneer.parts.attach import attach

if TYPE_CHECKING:
    from veneer.io.certificate import Certificate

__all__ = ["Adapter", "attach", "load"]


class Adapter(core.Adapter):
    """All deltas of one recipe on one model, to train, switch, fold, save and carry away."""

    _undo: folding.Undo | None = None

    # -- its state as a value

    def state(self) -> dict[str, Tensor]:
        """Everything a file must hold, by name; the tensors are the adapter's own."""
        return state.state(self)

    def load_state(self, values: dict[str, Tensor], strict: bool = True) -> None:
        """Take over a state; raises UserError for a tensor that is missing, left over or of the wrong shape."""
        state.load_state(self, values, strict)

    def layout(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the trained tensors in the order of ``vector``."""
        return state.layout(self)

    def vector(self) -> Tensor:
        """All trained tensors as one flat fp32 vector."""
        return state.vector(self)

    def set_vector(self, flat: Tensor) -> None:
        """Write a flat vector back; raises UserError when its length differs."""
        state.set_vector(self, flat)

    def using(self, values: dict[str, Tensor]):
        """A context in which the adapter has other values of its tensors."""
        return state.using(self, values)

    # -- on and off, in and out of the weights

    @contextmanager
    def disabled(self):
        """The model as it was before this adapter, bit for bit."""
        folded = self._undo is not None
        if folded:
            self.unfold()
        try:
            with super().disabled():
                yield
        finally:
            if folded:
                self.fold()

    def fold(self) -> None:
        """Put the change into the weights; ``unfold`` takes it out again, bit for bit."""
        if self._undo is not None:
            raise UserError(f"the adapter {self.name!r} is folded already")
        self._undo = folding.fold(self)
        self.root.switch.change(folded=self.root.switch.folded | {self.name})

    def unfold(self) -> None:
        """Take the change out of the weights again."""
        if self._undo is None:
            raise UserError(f"the adapter {self.name!r} is not folded")
        folding.unfold(self._undo)
        self._undo = None
        self.root.switch.change(folded=self.root.switch.folded - {self.name})

    def bake(self) -> nn.Module:
        """Fold for good and take the adapter off; returns the model."""
        if self._undo is None:
            self.fold()
        self._undo = None
        self.remove()
        return self.model

    def detach(self) -> nn.Module:
        """Take the adapter off: the model as it was, bit for bit (a converted base stays converted)."""
        if not self.keep_base:
            raise UserError(f"the adapter {self.name!r} was attached with keep_base=False: the base weights are gone")
        if self._undo is not None:
            self.unfold()
        self.remove()
        return self.model

    # -- training

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser, see ``parts.trainability``."""
        return trainability.optimizer_groups(self)

    def add_parameters(self, params: dict[str, nn.Parameter], start_step: int = 0, **settings: Any) -> None:
        """Let new tensors train in the run under way, as a group with its own clock."""
        trainability.add_parameters(self, params, start_step, **settings)

    def replace_parameter(
        self, delta: Delta, name: str, value: Tensor, keep: Iterable[int] | None = None, dim: int = 0
    ) -> nn.Parameter:
        """Put a tensor of another shape in a slot and carry the optimiser's state along."""
        return trainability.replace_parameter(self, delta, name, value, keep, dim)

    def advance(self) -> bool:
        """End the phase under way and take the next; False when it was the last."""
        return trainability.advance(self)

    def rebuild(self, plan: Plan) -> None:
        """Build the deltas at the planned sites anew; a site planned None is dropped."""
        trainability.rebuild(self, plan)

    def training_state(self) -> dict[str, Any]:
        """What a resumed run needs besides ``state`` and the optimiser."""
        return trainability.training_state(self)

    def load_training_state(self, values: dict[str, Any]) -> None:
        """Take over what ``training_state`` gave."""
        trainability.load_training_state(self, values)

    def trainer(self, trainer: type) -> type:
        """A subclass of transformers' Trainer, or of one of TRL's, that runs all of this adapter's hooks."""
        from veneer.train.trainer import trainer_class

        return trainer_class(self, trainer)

    # -- words and files

    def description(self) -> dict[str, Any]:
        """What the file says of this adapter, ready for JSON."""
        return description.description(self)

    def table(self) -> list[dict[str, Any]]:
        """One row per kind of site: role, form, shape, rank, sites, trained parameters."""
        return description.table(self)

    def __repr__(self) -> str:
        return description.words(self)

    def save(self, directory: str | Path) -> Path:
        """Write safetensors and ``recipe.json`` into ``directory``, whole or not at all; returns the directory."""
        from veneer.io.native import save

        return save(self, directory)

    def export(self, path: str | Path, format: str = "peft", **options: Any) -> Path | Certificate:
        """Write the adapter for other tools: ``peft``, ``peft-lora``, ``gguf`` or ``merged`` (the whole model, folded).

        ``peft-lora`` makes plain LoRA of any form that folds, within ``rank=`` or ``tolerance=``, and returns what the
        weights and the logits lost; the other formats return the path.
        """
        from veneer.io.export import export

        return export(self, path, format=format, **options)


def load(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str = "default",
    force: bool = False,
    initial: str | Path | None = None,
) -> Adapter:
    """Attach an adapter from disk: ours or a PEFT directory.

    ``force`` accepts another base; ``initial`` is the directory of the untrained adapter, for a PEFT directory whose
    start moved weight out of the base and cannot be made again.
    """
    from veneer.io.native import load as read

    return read(model, directory, name=name, force=force, initial=initial)
