"""The adapted model as a model of its own: a transformers directory with the change folded into the weights.

The model in memory is only read: the folded tensors are written beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.site import Site, site_at, stored
from veneer.errors import UserError
from veneer.io.files import staged
from veneer.io.plain import trained_in_place, whole_tensors
from veneer.models import architecture
from veneer.parts.folding import folded_weights

WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")  # what a transformers directory calls its weights


def write(
    adapter: Adapter,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write the base with this adapter folded in as a transformers directory; returns the directory.

    Args:
        adapter: every form in it must fold; others on the same model are left out.
        directory: where to; the weights of another model there are replaced.
        tokenizer: saved beside the model when given.
        dtype: type of the weights; the model's own when None.
        max_shard_size: of one weight file, as in ``save_pretrained``.

    Raises:
        UserError: for a form that cannot fold, or a change that the architecture has no place for.
    """
    model = adapter.model
    if not hasattr(model, "save_pretrained"):
        raise UserError(
            f"{type(model).__name__} is not a transformers model and has no directory format; adapter.bake() folds the "
            "change in for good, after which model.state_dict() is the merged model"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError("the base was quantised by transformers, which writes its own format only; load it unquantised")
    directory = Path(directory)
    blank = _blank(model)
    tensors = merged_tensors(adapter, blank)
    _check_places(blank, tensors)
    kept = dtype or _type(model)
    tensors = {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in tensors.items()}
    with staged(directory, last=("config.json",), replaces=WEIGHTS) as scratch, _config(model, tensors) as config:
        with _quiet():
            model.save_pretrained(scratch, state_dict=dict(tensors), max_shard_size=max_shard_size)
        config.dtype = kept
        config.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    return directory


def _blank(model: nn.Module) -> nn.Module:
    """The architecture as it is without adapters and storages, holding nothing."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


@torch.no_grad()
def merged_tensors(adapter: Adapter, blank: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with the adapter folded in; layers in another storage come out dense.

    Args:
        adapter: whose model is meant.
        blank: the same architecture, whose layers say how a weight is laid out.
    """
    with trained_in_place(adapter):
        out = _dense(adapter.model, blank)
        out |= whole_tensors(adapter)
        fresh: set[str] = set()
        for site, W, b in folded_weights(adapter):
            if site.name is None:
                layer = site_at(blank, site.module_path)
                _put(out, f"{site.module_path}.weight", layer, site.rows, _laid(layer, W), fresh)
                if b is not None:
                    _put(out, f"{site.module_path}.bias", layer, site.rows, b, fresh)
    return out


def _dense(model: nn.Module, blank: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, layers in another storage dense."""
    out = dict(model.state_dict())
    for path, module in architecture.named_modules(model):
        dequantise = stored(module)
        if dequantise is not None:
            for key in [k for k in out if k.startswith(f"{path}.") and k != f"{path}.bias"]:
                del out[key]
            out[f"{path}.weight"] = _laid(site_at(blank, path), dequantise(module).detach()).to(_type(model))
    return out


def _laid(layer: Site, W: Tensor) -> Tensor:
    """A dense (out, in) matrix in the layout of ``layer``."""
    if layer.kind == "conv":
        return W.reshape(layer.module.weight.shape)
    return W.T if layer.transposed else W


def _put(out: dict[str, Tensor], name: str, layer: Site, rows: slice | None, value: Tensor, fresh: set[str]) -> None:
    """Set a tensor of the state dict; of a row range of the dense view, in a copy of it that is made once."""
    dtype = out[name if name in out else f"{layer.path}.weight"].dtype
    if rows is None:
        out[name] = value.detach().to(dtype).contiguous()
        return
    if name not in fresh:
        fresh.add(name)
        out[name] = out[name].clone() if name in out else torch.zeros(layer.out_features, dtype=dtype)
    turned = value.ndim == 2 and layer.transposed
    out[name][(slice(None), rows) if turned else rows] = value.to(dtype)


def _type(model: nn.Module) -> torch.dtype:
    """The type of the base as a whole."""
    named = ((n, p) for n, p in model.named_parameters() if "veneer" not in n.split("."))
    return next((p.dtype for _, p in named if p.is_floating_point()), torch.float32)


@contextmanager
def _config(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[Any]:
    """Give the model a copy of its config for the length of the block, untied where the tensors are no longer one."""
    own = model.config
    config = copy.deepcopy(own)
    for group in architecture.tied(model):
        first = tensors[group[0]]
        if any(tensors[n].data_ptr() != first.data_ptr() and not torch.equal(tensors[n], first) for n in group[1:]):
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model.config = config
    try:
        yield config
    finally:
        model.config = own


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar over the weight files."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_places(blank: nn.Module, tensors: dict[str, Tensor]) -> None:
    """A bias that the fold made must have a place in the architecture, or loading would drop it without a word."""
    lost = sorted(tensors.keys() - blank.state_dict().keys())
    if lost:
        raise UserError(
            f"folding made {lost[0]}, for which {type(blank).__name__} has no place; bake() the adapter and keep "
            "the model in memory, or save the adapter itself"
        )
