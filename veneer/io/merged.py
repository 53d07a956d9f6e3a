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
from veneer.io.plain import whole_tensors
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
    tensors = merged_tensors(adapter)
    kept = dtype or _dtype(adapter)
    tensors = {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in tensors.items()}
    with staged(directory, last=("config.json",), replaces=WEIGHTS) as scratch, _config(model, tensors) as config:
        _check_places(model, tensors)
        with _quiet():
            model.save_pretrained(scratch, state_dict=dict(tensors), max_shard_size=max_shard_size)
        config.dtype = kept
        config.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    return directory


@torch.no_grad()
def merged_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The model's state dict with the adapter folded in; layers in a quantised storage come out dense."""
    model = adapter.model
    out = dict(model.state_dict())
    for path, module in architecture.named_modules(model):
        dequantise = stored(module)
        if dequantise is not None:
            for key in [k for k in out if k.startswith(f"{path}.") and k != f"{path}.bias"]:
                del out[key]
            out[f"{path}.weight"] = dequantise(module).to(_dtype(adapter))
    fresh: set[str] = set()
    for site, W, b in folded_weights(adapter):
        if site.name is not None:
            continue
        whole = site_at(model, site.module_path)
        _put(out, f"{site.module_path}.weight", site, _laid(site, W), fresh, whole.weight().dtype)
        if b is not None:
            _put(out, f"{site.module_path}.bias", site, b, fresh, whole.weight().dtype, rows=whole.out_features)
    return out | whole_tensors(adapter)


def _laid(site: Site, W: Tensor) -> Tensor:
    """A dense (out, in) matrix in the layer's own layout; of a row range, those rows."""
    if site.kind == "conv":
        return W.reshape(site.module.weight.shape)
    return W.T if site.transposed else W


def _put(
    out: dict[str, Tensor], name: str, site: Site, value: Tensor, fresh: set[str], dtype: torch.dtype, rows: int = 0
) -> None:
    """Set a tensor of the state dict, or a row range of it (in a copy)."""
    if site.rows is None:
        out[name] = value.to(dtype).contiguous()
        return
    if name not in fresh:
        fresh.add(name)
        out[name] = out[name].clone() if name in out else torch.zeros(rows, dtype=dtype)
    part = out[name][:, site.rows] if out[name].ndim == 2 and site.transposed else out[name][site.rows]
    part.copy_(value)


def _dtype(adapter: Adapter) -> torch.dtype:
    """The type of the base's weights as they were before any of them was upcast to train."""
    home = {id(d.parameter()): d.home_dtype for d in adapter.trained.values()}
    types = (home.get(id(p), p.dtype) for p in adapter.model.parameters() if p.is_floating_point())
    return next(types, torch.float32)


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


def _check_places(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """A bias that the fold made must have a place in the architecture, or loading would drop it without a word."""
    with torch.device("meta"):
        expected = set(type(model)(model.config).state_dict())
    lost = sorted(n for n in tensors if n not in expected)
    if lost:
        raise UserError(
            f"folding made {lost[0]}, for which {type(model).__name__} has no place; bake() the adapter and keep "
            "the model in memory, or save the adapter itself"
        )
