"""Checkpoints: safetensors and JSON under a manifest of hashes, never a pickle."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from veneer.errors import UserError
from veneer.io import files
from veneer.train.folder import RunFolder

MANIFEST = "manifest.json"
FORMAT = 1


def flatten(tree: Any, where: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """A nested state as (JSON-able skeleton, tensors by name).

    Takes dicts, lists, tuples, tensors, numpy arrays and numbers, text, booleans and None; raises UserError, naming
    the place, for anything else.
    """
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node.detach()
            return {"tensor": path}
        if isinstance(node, numpy.ndarray):
            tensors[path] = torch.from_numpy(node.copy())
            return {"array": path}
        if isinstance(node, numpy.generic):
            return node.item()
        if isinstance(node, dict):
            return {"dict": [[visit(k, path), visit(v, f"{path}/{k}")] for k, v in node.items()]}
        if isinstance(node, tuple):
            return {"tuple": [visit(v, f"{path}/{i}") for i, v in enumerate(node)]}
        if isinstance(node, list):
            return [visit(v, f"{path}/{i}") for i, v in enumerate(node)]
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise UserError(f"{path} holds a {type(node).__name__}, which a checkpoint cannot hold: tensors and plain data")

    return visit(tree, where), tensors


def unflatten(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The nested state that ``flatten`` took apart."""

    def visit(node: Any) -> Any:
        if isinstance(node, list):
            return [visit(v) for v in node]
        if not isinstance(node, dict):
            return node
        ((kind, value),) = node.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "array":
            return tensors[value].numpy()
        if kind == "tuple":
            return tuple(visit(v) for v in value)
        return {visit(k): visit(v) for k, v in value}

    return visit(skeleton)


def write_state(path: Path, name: str, tree: Any) -> None:
    """``name.safetensors`` and ``name.json`` in the folder ``path``."""
    skeleton, tensors = flatten(tree, name)
    files.write_tensors(path / f"{name}.safetensors", tensors)
    (path / f"{name}.json").write_text(json.dumps(skeleton), encoding="utf-8")


def read_state(path: Path, name: str) -> Any:
    """What ``write_state`` wrote."""
    skeleton = json.loads((path / f"{name}.json").read_text(encoding="utf-8"))
    tensors = files.read_tensors(path / f"{name}.safetensors")
    for key, value in tensors.items():  # where memory begins, sums of products are taken in another order
        tensors[key] = value.clone()
    return unflatten(skeleton, tensors)


def random_state() -> dict[str, Any]:
    """The state of the global generators of torch, Python and numpy, and of every CUDA device."""
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the global generators where ``random_state`` found them."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    for device, value in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(value, device)


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, **facts: Any) -> None:
    """List every file of the folder with its size and sha256, and seal the list with its own hash."""
    listed = {
        str(p.relative_to(path)): {"bytes": p.stat().st_size, "sha256": files.sha256(p)}
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    content = {"format": FORMAT, "files": listed, **facts}
    (path / MANIFEST).write_text(json.dumps({**content, "seal": _seal(content)}, indent=1), encoding="utf-8")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None when it is whole."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        seal = content.pop("seal")
        listed = content["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} cannot be read"
    if seal != _seal(content):
        return f"{MANIFEST} was changed"
    if content["format"] != FORMAT:
        return f"it has format {content['format']}, and this version of Veneer reads {FORMAT}"
    for name, facts in listed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
        if files.sha256(file) != facts["sha256"]:
            return f"{name} does not match its hash"
    return None


def save(folder: RunFolder, step: int, parts: dict[str, Any], adapter: Any, keep: int | None) -> Path:
    """Write ``checkpoint-STEP`` whole or not at all, then drop all but the newest ``keep``.

    ``adapter/`` inside is a native adapter that ``veneer.load`` reads; ``parts`` are the named states beside it.
    """
    path = folder.path / f"checkpoint-{step}"
    if path.exists():  # a damaged one that was passed over, or the same step before an interruption
        folder.remove(path)
    with files.staged(path) as part:
        try:
            adapter.save(part / "adapter")
        except UserError as error:
            raise UserError(str(error).replace(str(part), str(path))) from error
        for name, tree in parts.items():
            write_state(part, name, tree)
        write_manifest(part, step=step)
    for old in folder.checkpoints()[keep:] if keep else []:
        folder.remove(old)
    return path


def newest(folder: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None, and a sentence for each damaged one that was passed over."""
    words = []
    for path in folder.checkpoints():
        wrong = damage(path)
        if wrong is None:
            return path, words
        words.append(f"{path} is damaged ({wrong}) and is passed over")
    return None, words
