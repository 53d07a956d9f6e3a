"""Veneer's own directory: ``adapter.safetensors`` (the tensors) and ``recipe.json`` (what they are).

``recipe.json`` names the checksum of the tensors, is written last, and so is what makes a save count: a save that is
killed half way leaves the old pair readable.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.errors import UserError
from veneer.io.files import PICKLES, PREVIOUS, read_json, read_tensors, sha256, staged, typed, write_json, write_tensors
from veneer.io.peft_config import CONFIG
from veneer.parts.restore import attach_from

FORMAT = 1
RECIPE = "recipe.json"
TENSORS = "adapter.safetensors"
_FIELDS = {
    "format": (int,),
    "recipe": (str,),
    "seed": (int,),
    "select": (str, list),
    "sites": (list,),
    "fields": (dict,),
    "train": (list,),
    "phase": (int,),
    "base": (str,),
    "sha256": (str,),
}


def save(adapter: Adapter, directory: str | Path) -> Path:
    """Write the adapter into ``directory``, whole or not at all; other files there stay. Returns the directory."""
    directory = Path(directory)
    with staged(directory, last=(RECIPE,), keep=(TENSORS,)) as scratch:
        write_tensors(scratch / TENSORS, adapter.state())
        write_json(scratch / RECIPE, adapter.description() | {"sha256": sha256(scratch / TENSORS)})
    return directory


def load(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str = "default",
    force: bool = False,
    initial: str | Path | None = None,
) -> Adapter:
    """Attach the adapter in ``directory``, ours or PEFT's, to ``model``.

    Args:
        model: the base it was made on; another one is an error, unless ``force``.
        directory: as ``save`` or PEFT wrote it.
        name: of the adapter on this model.
        force: load on another base, or tensors that are not those the recipe was written with.
        initial: for PEFT directories only, see ``io.peft.read``.

    Raises:
        UserError: for a directory that holds no adapter, or a damaged one, or another base.
    """
    directory = Path(directory)
    if (directory / CONFIG).is_file():
        from veneer.io.peft import read

        return read(model, directory, name=name, force=force, initial=initial)
    if initial is not None:
        raise UserError(f"initial={str(initial)!r} is for PEFT directories; {directory} is not one")
    description, state = contents(directory, force=force)
    if not description.get("finished", True):
        warnings.warn(
            f"{directory} was saved in phase {description['phase'] + 1} of a recipe with further ones: "
            "adapter.advance() takes the next",
            stacklevel=2,
        )
    return attach_from(model, description, state, name=name, force=force)


def contents(directory: str | Path, *, force: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(description, state) of an adapter in our format, checked against each other but not against a model."""
    directory = Path(directory)
    _check_directory(directory)
    path = directory / RECIPE
    description = read_json(path)
    for field, kinds in _FIELDS.items():
        typed(description, field, kinds, path)
    if description["format"] > FORMAT:
        raise UserError(f"{path} is of format {description['format']}; this Veneer reads up to {FORMAT}: upgrade it")
    return description, read_tensors(_matching(directory, description["sha256"], force))


def _matching(directory: Path, checksum: str, force: bool) -> Path:
    """The tensor file that the recipe was written with: after a save that was killed half way, the one kept aside."""
    current, before = directory / TENSORS, directory / (TENSORS + PREVIOUS)
    if before.is_file() and sha256(before) == checksum:
        return before
    if current.is_file() and sha256(current) != checksum and not force:
        read_tensors(current)  # says so when the file is cut short or something else
        raise UserError(
            f"{current} is not the file that {directory / RECIPE} was written with (its checksum differs): it is "
            "damaged or was replaced; save the adapter again, or load with force=True if you changed it yourself"
        )
    return current


def _check_directory(directory: Path) -> None:
    if directory.is_file():
        raise UserError(f"{directory} is a file; give the adapter's directory, the one that holds {RECIPE} or {CONFIG}")
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}; give one that holds {RECIPE} or {CONFIG}")
    if (directory / RECIPE).is_file():
        return
    inner = sorted(p.parent.name for p in directory.glob("*/*") if p.name in (RECIPE, CONFIG))
    if inner:
        raise UserError(f"{directory} holds adapters in its folders {', '.join(inner[:6])}; give one of these")
    there = sorted(p.name for p in directory.iterdir())
    pickled = next((n for n in there if n.endswith(PICKLES)), None)
    if pickled:
        raise UserError(
            f"{directory} holds {pickled}, a pickle, which can run code when it is read, and is refused; give a "
            f"directory with {RECIPE} or {CONFIG} and safetensors"
        )
    raise UserError(
        f"{directory} holds no adapter ({RECIPE} or {CONFIG}); it holds {', '.join(there[:8]) or 'nothing'}"
    )
