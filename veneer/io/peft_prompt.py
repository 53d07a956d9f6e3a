"""Prompts and prefixes as PEFT keeps them: one tensor at the root of the file, and heads trained beside it.

A prompt is (n, d). A prefix is (n, 2L·d_kv): keys and values of layer 0, of layer 1 and so on; what a projection or
P-tuning's encoder gave is written out, so that reading needs neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core import build
from veneer.core import recipe as recipes
from veneer.core.adapter import Adapter
from veneer.core.context import Context
from veneer.core.delta import Delta
from veneer.core.registry import PeftMap
from veneer.core.site import Site, find_sites
from veneer.errors import UserError
from veneer.io.peft_config import CONFIG, Config
from veneer.io.peft_targets import task
from veneer.io.plain import whole_tensors
from veneer.models import architecture
from veneer.models.fingerprint import base_fingerprint
from veneer.parts.attach import trained_tensors
from veneer.parts.restore import attach_from

KEY = "prompt_embeddings"
ROOT = "base_model."


def read(model: nn.Module, config: Config, tensors: dict[str, Tensor], path: Path, name: str) -> Adapter:
    """Attach the prompt or prefix in a checked file; ``path`` is the file's, for errors."""
    values = tensors.get(KEY)
    if values is None:
        raise UserError(f"{path} has no {KEY}; the file is incomplete: save it again")
    if (config.raw.get("num_transformer_submodules") or 1) > 1:
        raise UserError(
            f"{config.path}: prompts of encoder–decoders are not read; num_transformer_submodules is above 1"
        )
    length = config.raw[config.map.fields["length"]]
    recipe = f"{config.method.name}(length={length}{_pooled(config)})"
    sites = build.places(model, parsed := recipes.parse(recipe), find_sites(model, "linear"))
    width = _width(sites, model)
    if tuple(values.shape) != (length, width):
        raise UserError(
            f"{path}: {KEY} has shape {tuple(values.shape)}, where {length} tokens in {CONFIG} and this model need "
            f"{(length, width)}: it was made for another model"
        )
    trained = trained_tensors(model, ())
    state = _own_state(sites, values.float()) | _heads(model, tensors, trained, path)
    description = {
        "recipe": str(parsed),
        "seed": 0,
        "select": "linear",
        "sites": [s.path for s in sites],
        "fields": {},
        "train": trained,
        "phase": 0,
        "base": base_fingerprint(model, without=trained),
    }
    return attach_from(model, description, state, name=name, force=True)


def _pooled(config: Config) -> str:
    """PEFT classifies by what comes out first, which is a soft token."""
    return ", pooled='prompt'" if config.method.name == "prompt" and config.raw.get("task_type") == "SEQ_CLS" else ""


def _width(sites: list[Site], model: nn.Module) -> int:
    layers = _layers(sites)
    return sum(2 * s.out_features for s in layers) if layers else architecture.embedding(model).weight.shape[1]


def _layers(sites: list[Site]) -> list[Site]:
    """The attentions of a prefix, in order; none of a prompt."""
    return [s for s in sites if s.heads and s.out_features]


def _own_state(sites: list[Site], values: Tensor) -> dict[str, Tensor]:
    layers = _layers(sites)
    if not layers:
        return {f"{sites[0].path}.P": values}
    names = [f"{s.path}.{slot}" for s in layers for slot in ("K", "V")]
    return {n: t.contiguous() for n, t in zip(names, values.split(layers[0].out_features, dim=1), strict=True)}


def _heads(model: nn.Module, tensors: dict[str, Tensor], trained: list[str], path: Path) -> dict[str, Tensor]:
    """A trained head, which PEFT writes under its own name below the root."""
    own, state = dict(model.named_parameters(remove_duplicate=False)), {}
    for key, value in tensors.items():
        if key == KEY:
            continue
        name = key.removeprefix(ROOT).removeprefix("model.") if key.removeprefix(ROOT) not in own else key[len(ROOT) :]
        if name not in trained or own[name].shape != value.shape:
            raise UserError(
                f"{path}: the tensor {key} {tuple(value.shape)} has no place in this {type(model).__name__}"
            )
        state[f"train:{name}"] = value.float()
    return {f"train:{n}": own[n].detach().float() for n in trained} | state


@torch.no_grad()
def content(adapter: Adapter, mapped: PeftMap) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an adapter that is a prompt or a prefix alone.

    Raises UserError for what PEFT runs otherwise or has no place for.
    """
    deltas = list(adapter.deltas.values())
    model, first = adapter.model, deltas[0]
    word = task(model)
    if word is None:
        raise UserError(f"PEFT puts prompts ahead by task, and {type(model).__name__} is a model of none that it knows")
    layers = _layers([d.site for d in deltas])
    values = _prefix(adapter, first, layers) if layers else _prompt(first, word)
    whole = whole_tensors(adapter)
    beyond = next((n for n in whole if n not in trained_tensors(model, ())), None)
    if beyond is not None:
        raise UserError(f"PEFT has no place for {beyond} beside a {first.name}; save it in Veneer's own format")
    count = architecture.heads(model, "k" if layers else "q")
    config = {
        "peft_type": mapped.type,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "task_type": word,
        "num_virtual_tokens": len(values),
        "token_dim": layers[0].out_features if layers else values.shape[1],
        "num_attention_heads": count,
        "num_layers": len(architecture.blocks(model)),
        "num_transformer_submodules": 1,
    }
    if layers:
        config |= {"prefix_projection": False, "encoder_hidden_size": layers[0].out_features}
    return config, {KEY: values} | {ROOT + n: t for n, t in whole.items()}


def _prompt(delta: Any, word: str) -> Tensor:
    if word == "SEQ_CLS" and delta.pooled != "prompt":
        raise UserError(
            "PEFT classifies by the first soft token, this adapter by the input's first: train with "
            "prompt(pooled='prompt') for PEFT, or save it in Veneer's own format"
        )
    return delta.P.detach().float()


def _prefix(adapter: Adapter, first: Delta, layers: list[Site]) -> Tensor:
    blocks = len(architecture.blocks(adapter.model))
    if len(layers) < blocks:
        raise UserError(f"PEFT has prefixes at all {blocks} blocks or none, this adapter at {len(layers)}")
    if not first.shift:
        raise UserError("PEFT moves positions by the prefix, which this adapter does not (shift=False)")
    if first.projection:
        ctx = Context()
        adapter.shared.prepare(ctx)
        K, V = ctx.kept[adapter.shared].unbind(1)
    else:
        attentions = [d for d in adapter.deltas.values() if d.at_attention]
        K, V = (torch.stack([getattr(d, slot) for d in attentions]) for slot in ("K", "V"))
    return torch.stack([K, V], 1).permute(2, 0, 1, 3).flatten(1).contiguous()
