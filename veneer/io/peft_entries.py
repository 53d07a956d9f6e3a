"""PEFT's kinds that change single entries of a layer: its biases (BEFT), few of its weights (SHiRA, Super-Tuning).

BEFT's vector is BitFit's. SHiRA, and Super-Tuning without a rank, are composable sparse fine-tuning after its choice of
entries; Super-Tuning with a rank (Supra) is SLTrain beside W. Written are BEFT and Super-Tuning.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta, Written
from veneer.core.site import Site, site_at
from veneer.errors import UserError, nearest
from veneer.io import peft_whole
from veneer.io.files import read_json, read_tensors, typed
from veneer.io.peft_config import BOOKKEEPING, CONFIG, PREFIX, TENSORS, selected
from veneer.io.peft_kinds import layer_class
from veneer.io.peft_targets import head
from veneer.models.fingerprint import base_fingerprint

Tensors = dict[str, Tensor]

# Kind → what its file holds for a layer, and fields of its config that are read or change nothing in what it computes.
HOLDS = {
    "BEFT": ("beft_bias",),
    "SHIRA": ("shira_weight", "shira_indices"),
    "SUPERTUNING": ("supertuning_values", "supertuning_indices"),
}
FACTORS = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")
_SELECTING = {"target_modules", "exclude_modules", "modules_to_save", "init_weights"}
_FIELDS = {
    "BEFT": _SELECTING,
    "SHIRA": _SELECTING | {"r", "mask_type", "random_seed"},
    "SUPERTUNING": _SELECTING
    | {"sparsity", "select_top", "save_precomputed_indices", "r", "lora_alpha", "lora_dropout"},
}
_WRITTEN = {"bitfit": "BEFT", "composable-sft": "SUPERTUNING", "sltrain": "SUPERTUNING"}


def read(model: nn.Module, directory: Path) -> tuple[dict[str, Any], Tensors]:
    """(description, state) of a directory of one of these kinds; raises UserError naming what does not fit."""
    path, file = directory / CONFIG, directory / TENSORS
    raw = read_json(path)
    kind = str(raw["peft_type"]).upper()
    for field, value in raw.items():
        if field not in _FIELDS[kind] | BOOKKEEPING and value not in (None, False, [], {}, ""):
            raise UserError(f"{path}: {field}={value!r} is not supported with peft_type {kind}")
    rank = typed(raw, "r", (int,), path, None) if kind == "SUPERTUNING" else None
    if rank is not None and rank < 1:
        raise UserError(f"{path}: r is {rank}; a number above 0 was expected")
    names = HOLDS[kind] + (FACTORS if rank else ())
    layers, whole = _sorted(model, read_tensors(file), names, raw, file)
    typed(raw, "target_modules", (list, str), path)
    wanted = selected(model, raw)
    if set(wanted) != layers.keys() or not layers:
        odd = next(iter(set(wanted) ^ layers.keys()), "any module")
        raise UserError(f"{file} and target_modules in {CONFIG} disagree about {odd}: the two do not belong together")
    for name in peft_whole.heads(model):
        whole.setdefault(*name)
    description = {
        "seed": 0,
        "select": list(layers),
        "sites": list(layers),
        "fields": {},
        "train": list(whole),
        "phase": 0,
        "base": base_fingerprint(model, without=list(whole)),
    }
    state = {f"train:{name}": value.detach().float() for name, value in whole.items()}
    sites = {p: site_at(model, p) for p in layers}
    for p, own in layers.items():
        _check(sites[p], own, names, kind, file)
    if kind == "BEFT":
        description |= {"recipe": "bitfit", "sites": [f"{p}.bias" for p in layers]}
        return description, state | {f"{p}.bias.delta": own["beft_bias"].float().flatten() for p, own in layers.items()}
    entries = {p: _entries(sites[p], own, kind, file) for p, own in layers.items()}
    for p, (at, values) in entries.items():
        order = at.sort()
        state |= {f"{p}.indices": order.values.int(), f"{p}.v": values.float()[order.indices]}
    if not rank:
        return description | {"recipe": "composable-sft", "phase": 1}, state
    if raw.get("lora_dropout"):
        given = f"lora_dropout={raw['lora_dropout']!r}"
        warnings.warn(f"{path}: {given} is not known to sltrain; it runs the same, and would train on without it",
                      stacklevel=3)  # fmt: skip
    alpha = typed(raw, "lora_alpha", (float,), path, None) or 2.0 * rank
    description["recipe"] = f"sltrain(rank={rank}, alpha={float(alpha)})"
    for p, (at, _) in entries.items():
        site = sites[p]
        description["fields"][p] = {"density": _share(len(at), site)}
        state |= {f"{p}.A": layers[p][FACTORS[0]].float(), f"{p}.B": layers[p][FACTORS[1]].float()}
    return description, state


def _share(count: int, site: Site) -> float:
    """A density of which a layer's share, rounded down, is ``count`` entries."""
    numel = site.out_features * site.in_features
    return min(1.0, (count + 0.5) / numel)


def _sorted(
    model: nn.Module, tensors: Tensors, names: tuple[str, ...], raw: dict[str, Any], file: Path
) -> tuple[dict[str, Tensors], Tensors]:
    """(the tensors of each layer by name, base tensors that are saved whole)."""
    own = dict(model.named_parameters(remove_duplicate=False))
    layers: dict[str, Tensors] = {}
    whole: Tensors = {}
    saved = raw.get("modules_to_save") or []
    for key, value in tensors.items():
        bare = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        name = next((n for n in names if bare.endswith(f".{n}")), None)
        if name is not None:
            layers.setdefault(bare.removesuffix(f".{name}"), {})[name] = value
        elif bare in own and own[bare].shape == value.shape and any(bare.rpartition(".")[0].endswith(s) for s in saved):
            whole[bare] = value
        else:
            raise UserError(f"{file}: the tensor {key} {tuple(value.shape)} has no place here{nearest(bare, own)}")
    return layers, peft_whole.with_ties(model, whole, file)


def _check(site: Site, own: Tensors, names: tuple[str, ...], kind: str, file: Path) -> None:
    if layer_class(site) != "Linear":
        raise UserError(f"{file}: PEFT's {kind} takes Linear, and {site.path} is a {layer_class(site)}")
    missing = next((n for n in names if n not in own), None)
    if missing is not None:
        hint = " (PEFT leaves it out with save_precomputed_indices=False)" if missing.endswith("indices") else ""
        raise UserError(f"{file} has no {missing} for {site.path}{hint}; the file is incomplete: save it again")
    shapes = {"beft_bias": (1, site.out_features)}
    if kind == "SUPERTUNING" and len(names) > 2:
        r = own[FACTORS[0]].shape[0]
        shapes |= {FACTORS[0]: (r, site.in_features), FACTORS[1]: (site.out_features, r)}
    for name, shape in shapes.items():
        if name in own and tuple(own[name].shape) != shape:
            raise UserError(
                f"{file}: {name} of {site.path} has shape {tuple(own[name].shape)}, here it needs {shape}: it was made "
                "for another model"
            )


def _entries(site: Site, own: Tensors, kind: str, file: Path) -> tuple[Tensor, Tensor]:
    """(positions in W, row by row; what is added there)."""
    values, at = (own[n] for n in HOLDS[kind])
    if kind == "SHIRA" and at.ndim == 2:
        at = at[0].long() * site.in_features + at[1].long()
    at = at.long()
    if at.ndim != 1 or values.shape != at.shape or not len(at):
        raise UserError(f"{file}: the entries of {site.path} and their values do not go together: {tuple(at.shape)} "
                        f"and {tuple(values.shape)}")  # fmt: skip
    if at.min() < 0 or at.max() >= site.out_features * site.in_features:
        raise UserError(f"{file}: {site.path} has no entry {int(at.max())}: it was made for another model")
    return at, values


# -- writing -----------------------------------------------------------------------------------------------------------


def kind_of(adapter: Adapter) -> str | None:
    """The kind that holds this adapter as it is, or None."""
    deltas = [d for d in adapter.deltas.values() if not isinstance(d, Written)]
    forms = {d.name for d in deltas}
    if len(forms) != 1 or (form := forms.pop()) not in _WRITTEN:
        return None
    fits = all(
        d.gate is None
        and d.offset is None
        and d.site.rows is None
        and layer_class(site_at(adapter.model, d.site.module_path)) == "Linear"
        for d in deltas
    )
    if form == "bitfit":  # PEFT warns of BEFT at a layer without a bias, which it cannot merge; LoRA's it can
        fits = fits and all(d.site.weight() is not None for d in deltas)
    if fits and form == "composable-sft":
        fits = any(d.v is not None for d in deltas) and all(_sparse(d) for d in deltas)
    if fits and form == "sltrain":
        fits = not any(d.replace for d in deltas) and len({(d.rank, d.scale) for d in deltas}) == 1
    return _WRITTEN[form] if fits else None


def _sparse(delta: Delta) -> bool:
    """Whether single entries of W are all that changes: no dense phase under way, no bias."""
    if delta.D is not None:
        return False
    numel = delta.site.out_features * delta.site.in_features
    return delta.v is None or not bool((delta.v[delta.indices.long() >= numel] != 0).any())


@torch.no_grad()
def content(adapter: Adapter) -> tuple[dict[str, Any], Tensors, list[Site], set[str]]:
    """(config, tensors, layers, base tensors that these stand for) of an adapter that `kind_of` gave a kind."""
    deltas = [d for d in adapter.deltas.values() if not isinstance(d, Written)]
    tensors: Tensors = {}
    if deltas[0].name == "bitfit":
        sites = [site_at(adapter.model, d.site.module_path) for d in deltas]
        for site, d in zip(sites, deltas, strict=True):
            tensors[f"{PREFIX}{site.path}.beft_bias"] = d.weight(None).detach().float()[None].clone()
        return head(adapter, "BEFT", sites), tensors, sites, {d.site.path for d in deltas}
    deltas = [d for d in deltas if d.v is not None]
    sites = [d.site for d in deltas]
    share = max(_share(len(d.v), d.site) for d in deltas)
    sparsity = max(0.0, 1 - share)
    for d in deltas:
        at, values = _padded(d, int(d.site.out_features * d.site.in_features * (1 - sparsity)))
        own = {"supertuning_values": values, "supertuning_indices": at}
        if d.name == "sltrain":
            own |= dict(zip(FACTORS, (d.A.detach().float(), d.B.detach().float()), strict=True))
        tensors |= {f"{PREFIX}{d.site.path}.{name}": value for name, value in own.items()}
    config = head(adapter, "SUPERTUNING", sites) | {"sparsity": sparsity, "save_precomputed_indices": True}
    if deltas[0].name == "sltrain":
        config |= {"r": deltas[0].rank, "lora_alpha": deltas[0].scale * deltas[0].rank}
    return config, tensors, sites, set()


def _padded(delta: Delta, count: int) -> tuple[Tensor, Tensor]:
    """``count`` positions and values: PEFT has one share of entries for all layers, the rest are zeros elsewhere."""
    numel = delta.site.out_features * delta.site.in_features
    at, values = delta.indices.detach().long(), delta.v.detach().float()
    at, values = at[at < numel], values[at < numel]
    free = torch.ones(numel, dtype=torch.bool, device=at.device).index_fill_(0, at, False)
    more = free.nonzero().flatten()[: count - len(at)]
    return torch.cat([at, more]).int(), torch.cat([values, values.new_zeros(len(more))])
