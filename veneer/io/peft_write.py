"""Writing PEFT directories: only fields that say something, so that older readers do not stumble over the others."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta, Written
from veneer.core.registry import PeftMap
from veneer.core.site import Site, site_at, type_named
from veneer.errors import UserError
from veneer.io import peft_entries, peft_loftq, peft_mixture, peft_own, peft_prompt, peft_whole
from veneer.io.files import staged, write_json, write_tensors
from veneer.io.peft_config import CONFIG, PREFIX, TENSORS, own_map
from veneer.io.peft_kinds import KINDS, PROMPTS
from veneer.io.peft_targets import HEADS, head, pattern, targets, whole_number
from veneer.io.peft_tensors import check_layer, to_disk
from veneer.io.plain import Factors, native_factors, plain_factors, whole_tensors

PLAIN = PeftMap("LORA", fields={"rank": "r", "alpha": "lora_alpha"}, keys={"A": "lora_A", "B": "lora_B"})
MERGED = 'export with format="merged" writes the folded model'


def write(adapter: Adapter, directory: str | Path) -> Path:
    """Write the adapter as a PEFT directory; returns it.

    A form that PEFT has is written as such, every other that is plain LoRA in effect as plain LoRA, with each site's
    scale in alpha, and one that trains whole tensors only as these.

    Raises:
        UserError: what PEFT cannot express, with the nearest offer.
    """
    directory = Path(directory)
    mixed = peft_mixture.is_mixture(adapter)
    files = peft_mixture.content(adapter, directory, lora) if mixed else {"": _content(adapter)}
    with staged(directory, last=(CONFIG,)) as scratch:
        for folder, (config, tensors) in files.items():
            (scratch / folder).mkdir(exist_ok=True)
            write_tensors(scratch / folder / TENSORS, tensors)
            write_json(scratch / folder / CONFIG, dict(sorted(config.items())))
    return directory


def _content(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) in the form's own kind, else as plain LoRA."""
    mapped = _own_map(adapter)
    if peft_entries.kind_of(adapter):
        config, tensors, sites, within = peft_entries.content(adapter)
        return config, tensors | _saved(adapter, sites, config, within)
    if not any(_factored(d) for d in adapter.deltas.values()):
        made = _made_biases(adapter)
        return lora(adapter, made) if made else peft_whole.content(adapter)
    if mapped is None or mapped.type == "LORA":
        return _plain(adapter, mapped)
    if mapped.type in PROMPTS:
        return peft_prompt.content(adapter, mapped)
    try:
        return _own(adapter, mapped)
    except peft_own.Unfit as why:
        try:
            return _plain(adapter, None)
        except UserError as refusal:
            raise UserError(f"{why}; and {refusal}") from None


def _made_biases(adapter: Adapter) -> list[Factors]:
    """Biases that the layers do not have, as ``lora_bias`` beside a pair of nothing."""
    made = []
    for delta in adapter.deltas.values():
        site = delta.site
        if site.name == "bias" and site.module._parameters.get("bias") is None:
            layer = site_at(adapter.model, site.module_path)
            nothing = torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, 1)
            made.append(Factors(layer, *nothing, 1.0, {"lora_B.bias": delta.weight(None).detach().float()}))
    return made


def _factored(delta: Delta) -> bool:
    """Whether the delta is more than the new value of one base tensor."""
    return not isinstance(delta, Written) and delta.site.name is None


def _own(adapter: Adapter, mapped: PeftMap) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A kind that PEFT has beside LoRA."""
    fields, tensors, sites = peft_own.content(adapter, mapped)
    config = head(adapter, mapped.type, sites) | fields
    if "feedforward_modules" in config:
        config["feedforward_modules"] = _short(
            adapter.model, config["feedforward_modules"], [s.path for s in sites], config["target_modules"]
        )
    return config, tensors | _saved(adapter, sites, config)


def _short(model: nn.Module, inputs: list[str], paths: list[str], chosen: list[str] | str) -> list[str] | str:
    """The modules that IA³ scales at their inputs, by names of ``target_modules`` where these tell them apart."""
    if not inputs:
        return []
    names = targets(model, inputs)
    alike = isinstance(names, list) and isinstance(chosen, list) and set(names) <= set(chosen)
    if alike and {p for p in paths if p.endswith(tuple(names))} == set(inputs):
        return names
    return "|".join(re.escape(p) for p in inputs)


def _plain(adapter: Adapter, mapped: PeftMap | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LoRA: in the own form that ``mapped`` describes, else plain."""
    if mapped is None:
        factors, mapped = plain_factors(adapter, "a PEFT adapter"), PLAIN
    else:
        factors = native_factors(adapter, mapped.keys, "a PEFT adapter")
    config, tensors = lora(adapter, factors, mapped)
    return config | peft_loftq.fields(adapter), tensors


def lora(
    adapter: Adapter, factors: list[Factors], mapped: PeftMap = PLAIN, within: Iterable[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of PEFT's LoRA with these factors, and of the base tensors that change as a whole.

    ``within`` are base tensors whose change is in the factors.
    """
    tensors: dict[str, Tensor] = {}
    _even_bias(factors)
    for f in factors:
        check_layer(f.site)
        for name, value in ({"lora_A": f.A, "lora_B": f.B} | f.extras).items():
            key, tensor = to_disk(f.site, name, value)
            tensors[key] = tensor
    config = _config(adapter, factors, mapped)
    within = {*within, *(f"{f.path}.bias" for f in factors if f.site.bias() is None)}
    return config, tensors | _saved(adapter, [f.site for f in factors], config, within)


def _own_map(adapter: Adapter) -> PeftMap | None:
    """The map by which all deltas can be written in their own form, where there is one."""
    deltas = [d for d in adapter.deltas.values() if _factored(d)]
    maps = {type(d): own_map(type(d)) for d in deltas}
    mapped = next(iter(maps.values()), None)
    if len(maps) != 1 or mapped is None:
        return None
    usable = mapped.type in PROMPTS or mapped.type in KINDS
    return mapped if usable and (mapped.type != "LORA" or {"lora_A", "lora_B"} <= set(mapped.keys.values())) else None


def _even_bias(factors: list[Factors]) -> None:
    """``lora_bias`` is for all modules or none: give those without a bias change one of 0."""
    if not any("lora_B.bias" in f.extras for f in factors):
        return
    for f in factors:
        if f.site.kind == "embedding":
            raise UserError(
                f"PEFT has no lora_bias for embeddings, and {f.path} is one beside changed biases; {MERGED}"
            )
        f.extras.setdefault("lora_B.bias", f.B.new_zeros(f.site.out_features))


def _config(adapter: Adapter, factors: list[Factors], mapped: PeftMap) -> dict[str, Any]:
    config = head(adapter, "LORA", [f.site for f in factors])
    config |= {k: v for k, v in mapped.config.items() if k != "use_rslora"}
    if any("lora_B.bias" in f.extras for f in factors):
        config["lora_bias"] = True
    ranks = {f.path: f.rank for f in factors}
    root = bool(mapped.config.get("use_rslora")) and all(f.rank == factors[0].rank for f in factors)
    alphas = {f.path: whole_number(f.scale * (f.rank**0.5 if root else f.rank)) for f in factors}
    if root:
        config["use_rslora"] = True
    config["r"], ranks = pattern(ranks)
    config["lora_alpha"], alphas = pattern(alphas)
    config |= {k: v for k, v in (("rank_pattern", ranks), ("alpha_pattern", alphas)) if v}
    if any(type_named(f.site.module, "Conv1D") for f in factors):
        config["fan_in_fan_out"] = True
    return config


def _saved(
    adapter: Adapter, sites: list[Site], config: dict[str, Any], within: Container[str] = ()
) -> dict[str, Tensor]:
    """Whole tensors but those ``within`` the factors, and the fields that make PEFT load them, put into ``config``."""
    model = adapter.model
    whole = {name: value for name, value in whole_tensors(adapter).items() if name not in within}
    adapted = {s.path for s in sites}
    out: dict[str, Tensor] = {}
    names: list[str] = []
    for name, value in whole.items():
        owner, _, last = name.rpartition(".")
        if owner not in adapted:
            names.append(owner)
        elif last == "bias" and config["peft_type"] == "LORA":
            config["bias"] = "lora_only"
            out[f"{PREFIX}{owner}.base_layer.bias"] = value
        else:
            raise UserError(
                f"{name} trains as a whole beside factors on the same layer, which PEFT cannot hold; {MERGED}"
            )
    heads = HEADS.get(config["task_type"], ())
    names = list(dict.fromkeys(names))
    modules = [p for p, _ in model.named_modules(remove_duplicate=False) if "veneer" not in p.split(".")]
    for path in modules:
        if path and any(path.endswith(n) for n in (*names, *heads)):
            if path in adapted:
                raise UserError(
                    f"PEFT saves {path} as a whole, as its name ends like a saved module's, and it is adapted; {MERGED}"
                )
            for last, p in model.get_submodule(path).named_parameters(remove_duplicate=False):
                if "veneer" not in last.split("."):
                    out[f"{PREFIX}{path}.{last}"] = whole.get(f"{path}.{last}", p.detach())
    if names:
        config["modules_to_save"] = names
    return out
