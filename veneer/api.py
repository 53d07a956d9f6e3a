"""The public Adapter: the core's, with saving, exporting and other people's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from veneer.core import adapter as core
from veneer.core.attach import attach

__all__ = ["Adapter", "attach", "load"]


class Adapter(core.Adapter):
    """All deltas of one recipe on one model, to train, switch, fold, save and carry away."""

    def save(self, directory: str | Path) -> Path:
        """Write safetensors and ``recipe.json`` into ``directory``, whole or not at all; returns the directory."""
        from veneer.io.native import save

        return save(self, directory)

    def export(self, path: str | Path, format: str = "peft", **options: Any) -> Path:
        """Write the adapter for other tools: ``peft``, ``gguf`` or ``merged`` (the whole model, folded)."""
        from veneer.io.export import export

        return export(self, path, format=format, **options)

    def trainer(self, trainer: type) -> type:
        """A subclass of transformers' Trainer, or of one of TRL's, that runs all of this adapter's hooks."""
        from veneer.train.trainer import trainer_class

        return trainer_class(self, trainer)


def load(model: nn.Module, directory: str | Path, *, name: str = "default", force: bool = False) -> Adapter:
    """Attach an adapter from disk: ours or a PEFT directory; ``force`` accepts another base."""
    from veneer.io.native import load as read

    return read(model, directory, name=name, force=force)
