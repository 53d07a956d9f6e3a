"""X-LoRA as PEFT keeps it: a classifier at the root, and a plain LoRA directory for each expert.

PEFT runs the experts from the paths in ``adapters``, whose keys must count from 0, and weighs whole layers, so that the
row parts of a fused projection share their weights. PEFT 0.21.2 writes the copies of experts beside the root without
the tensors of some blocks, and the classifier's first layer into the copy of expert 0 alone, where it is found again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.site import all_sites
from veneer.errors import UserError
from veneer.fields import fields_of
from veneer.io.files import read_json, read_tensors, typed
from veneer.io.peft_config import BOOKKEEPING, CONFIG, TENSORS
from veneer.io.peft_targets import task
from veneer.io.plain import Factors, joined, whole_tensors
from veneer.mixtures.x_lora import XLoRA
from veneer.models import architecture
from veneer.models.fingerprint import base_fingerprint

KIND = "XLORA"
ROOT = "base_model.internal_xlora_classifier.layers."
FIELDS = {  # ours → PEFT's
    "depth": "xlora_depth",
    "size": "xlora_size",
    "dropout": "xlora_dropout_p",
    "layerwise": "layerwise_scalings",
    "softmax": "enable_softmax",
    "temperature": "softmax_temperature",
    "top_k": "top_k_lora",
    "softmax_top_k": "enable_softmax_topk",
    "strength": "global_scaling_weight",
}
_DEFAULTS = {"layerwise": False}  # of PEFT's fields, where they are not ours
_KNOWN = (
    BOOKKEEPING | set(FIELDS.values()) | {"adapters", "hidden_size", "scaling_pass_value", "use_trainable_adapters"}
)

Files = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]


def is_mixture(adapter: Adapter) -> bool:
    """Whether the adapter is an X-LoRA."""
    return any(isinstance(d, XLoRA) for d in adapter.deltas.values())


# -- reading -----------------------------------------------------------------------------------------------------------


def read(
    model: nn.Module, directory: Path, attach: Callable[[Path], Adapter]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(description, state) of an X-LoRA directory; ``attach`` reads one expert's directory onto the model."""
    path = directory / CONFIG
    raw = read_json(path)
    for field, value in raw.items():
        if field not in _KNOWN and value not in (None, False, [], {}, ""):
            raise UserError(f"{path}: {field}={value!r} is not supported with peft_type {KIND}")
    fields = _fields(raw, path)
    names = typed(raw, "adapters", (dict,), path)
    if not names:
        raise UserError(f"{path}: adapters is empty; an X-LoRA mixes at least one")
    experts = [_expert(attach, _home(directory, name, at)) for name, at in names.items()]
    order = [s for s in all_sites(model) if any(s.path in saying for saying, _ in experts)]
    known = fields | {"adapters": list(names)}
    state = {}
    sayings: dict[str, dict[str, Any]] = {}
    for site in order:
        said = [saying.get(site.path) for saying, _ in experts]
        sayings[site.path] = known | {"experts": said}
        for k, (_, tensors) in enumerate(experts):
            if said[k] is not None:
                at = f"{site.path}.mixed.{k}"
                state |= {f"{at}.{slot}": tensors[f"{site.path}.{slot}"] for slot in "AB"}
                state[f"{at}.s"] = tensors[f"{site.path}.scale"].float()
    layers = list(dict.fromkeys(s.module_path for s in order))
    rows = [layers.index(s.module_path) for s in order] if fields["layerwise"] else [0]
    state |= _classifier(model, directory, fields, len(names), len(layers), rows)
    inner = ", ".join(f"{k}={v!r}" for k, v in sorted(known.items()))
    description = {
        "recipe": f"x-lora({inner})",
        "seed": 0,
        "select": list(dict.fromkeys(s.path.rpartition(".")[2] for s in order)),
        "sites": [s.path for s in order],
        "fields": sayings,
        "train": [],
        "phase": 0,
        "base": base_fingerprint(model, without=[]),
    }
    return description, state


def _fields(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Our fields from PEFT's config."""
    if raw.get("use_trainable_adapters"):
        raise UserError(
            f"{path}: use_trainable_adapters trained the experts too, of which PEFT keeps no whole copy and reads the "
            "originals again: nothing here could stand for what was trained"
        )
    out: dict[str, Any] = {}
    for ours, theirs in FIELDS.items():
        default = _DEFAULTS.get(ours, fields_of(XLoRA)[ours].default)
        kind = (int,) if ours in ("depth", "size", "top_k") else (float,)
        out[ours] = typed(raw, theirs, (bool,) if isinstance(default, bool) else kind, path, default)
    return out


def _home(directory: Path, name: str, at: Any) -> Path:
    """The directory of an expert: where the config says, or beside the root."""
    for place in (Path(str(at)), directory / str(at), directory / name):
        if (place / CONFIG).is_file():
            return place
    raise UserError(
        f"{directory / CONFIG}: the expert {name!r} is neither at {at} nor at {directory / name}; put its own "
        "directory at one of them"
    )


def _expert(attach: Callable[[Path], Adapter], home: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what the expert is at each site, its state) of one directory."""
    if any(key.startswith(ROOT) for key in read_tensors(home / TENSORS)):
        raise UserError(
            f"{home} is PEFT's copy of an expert beside an X-LoRA, which lacks the tensors of some blocks; put the "
            "adapter itself in its place"
        )
    adapter = attach(home)
    try:
        description, state = adapter.description(), {k: t.clone() for k, t in adapter.state().items()}
        forms = {path: d for path, d in adapter.deltas.items() if d.pair() is not None and d.offset is None}
        if len(forms) < len(adapter.deltas) or description["train"]:
            raise UserError(
                f"{home}: x-lora mixes plain low-rank adapters; this one has another form, a start that moved the "
                "base, or tensors that train as a whole"
            )
        return {path: {"form": d.name, "fields": d.field_values()} for path, d in forms.items()}, state
    finally:
        adapter.remove()


def _classifier(
    model: nn.Module, directory: Path, fields: dict[str, Any], experts: int, layers: int, rows: list[int]
) -> dict[str, Tensor]:
    """The classifier's tensors, the last layer's outputs dealt to our sites by ``rows``, the layer of each."""
    found, path = read_tensors(directory / TENSORS), directory / TENSORS
    width, size, depth = architecture.hidden_size(model), fields["size"], fields["depth"]
    outputs = (layers if fields["layerwise"] else 1) * experts
    sizes = [width, *[size] * (depth - 1), outputs]
    state, used = {}, set()
    for i in range(depth):
        at = i * (3 if fields["dropout"] else 2)
        for name, shape in (("weight", (sizes[i + 1], sizes[i])), ("bias", (sizes[i + 1],))):
            value = found.get(f"{ROOT}{at}.{name}")
            value = _strayed(directory, at, name) if value is None else value
            if value is None:
                raise UserError(f"{path} has no {ROOT}{at}.{name}; PEFT 0.21.2 leaves it out on saving: save it again")
            if tuple(value.shape) != shape:
                raise UserError(
                    f"{path}: {ROOT}{at}.{name} has shape {tuple(value.shape)}, where {experts} experts on {layers} "
                    f"layers of this model need {shape}: it was made for another model"
                )
            used.add(f"{ROOT}{at}.{name}")
            value = value.float()
            if i == depth - 1 and fields["layerwise"]:
                value = value.unflatten(0, (layers, experts))[rows].flatten(0, 1)
            state[f"shared.layers.{i}.{name}"] = value
    lost = next((key for key in found if key not in used), None)
    if lost is not None:
        raise UserError(f"{path}: the tensor {lost} has no place in an X-LoRA of depth {depth}")
    return state


def _strayed(directory: Path, index: int, name: str) -> Tensor | None:
    """A layer of the classifier whose number PEFT took for the name of an expert and cut out of its key."""
    copy = directory / str(index) / TENSORS
    return read_tensors(copy).get(f"{ROOT}{name}") if copy.is_file() else None


# -- writing -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def content(adapter: Adapter, directory: Path, lora: Callable[[Adapter, list[Factors]], Any]) -> Files:
    """(config, tensors) by folder within ``directory``: the root's ``""`` and each expert's number.

    ``lora`` gives those of plain LoRA with given factors. Raises UserError for what PEFT cannot mix.
    """
    first = next(iter(adapter.deltas.values()))
    beside = next(iter(whole_tensors(adapter)), None)
    if beside is not None:
        raise UserError(f"PEFT has no place for {beside} beside an X-LoRA; save it in Veneer's own format")
    if any(not isinstance(d, XLoRA) for d in adapter.deltas.values()):
        raise UserError("PEFT has no place for other forms beside an X-LoRA; save it in Veneer's own format")
    layers: dict[str, list[XLoRA]] = {}
    for delta in adapter.deltas.values():
        layers.setdefault(delta.site.module_path, []).append(delta)
    lost = next((path for path in layers if not path.startswith("model.") or path.startswith("model.model.")), None)
    if lost is not None:
        raise UserError(f"PEFT finds an X-LoRA's experts below model. alone, and {lost} lies elsewhere; save it in "
                        "Veneer's own format")  # fmt: skip
    files: Files = {"": (_config(adapter, first, directory), _layers(first, layers))}
    for k in range(len(first.adapters)):
        factors = [
            joined(adapter, path, [_factors(d, k) for d in parts if str(k) in d.mixed])
            for path, parts in layers.items()
            if any(str(k) in d.mixed for d in parts)
        ]
        if not factors:
            raise UserError(f"the expert {first.adapters[k]!r} changes no layer, which PEFT cannot read")
        files[str(k)] = lora(adapter, factors)
    return files


def _config(adapter: Adapter, first: XLoRA, directory: Path) -> dict[str, Any]:
    model = adapter.model
    return {
        "peft_type": KIND,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "task_type": task(model),
        "hidden_size": architecture.hidden_size(model),
        "adapters": {str(k): str(directory.absolute() / str(k)) for k in range(len(first.adapters))},
    } | {theirs: getattr(first, ours) for ours, theirs in FIELDS.items()}


def _factors(delta: XLoRA, k: int) -> Factors:
    expert = delta.mixed[str(k)]
    return Factors(delta.site, expert.A.detach().float(), expert.B.detach().float(), float(expert.s))


def _layers(first: XLoRA, layers: dict[str, list[XLoRA]]) -> dict[str, Tensor]:
    """The classifier's tensors, with one row of outputs for each whole layer."""
    out = {}
    inner = first.pool.layers
    for i, layer in enumerate(inner):
        at = i * (3 if first.dropout else 2)
        for name, value in layer.named_parameters():
            value = value.detach().float()
            if i == len(inner) - 1 and first.layerwise:
                value = _by_layer(value.unflatten(0, first.pool.shape), layers).flatten(0, 1)
            out[f"{ROOT}{at}.{name}"] = value
    return out


def _by_layer(outputs: Tensor, layers: dict[str, list[XLoRA]]) -> Tensor:
    for path, parts in layers.items():
        if any(not torch.equal(outputs[d.site.index], outputs[parts[0].site.index]) for d in parts[1:]):
            raise UserError(
                f"PEFT weighs all rows of {path} alike, this adapter its parts apart; train with layerwise=False for "
                "PEFT, or save it in Veneer's own format"
            )
    return outputs[[parts[0].site.index for parts in layers.values()]]
