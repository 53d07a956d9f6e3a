"""Writing a form in PEFT's own kind of it, where PEFT has the kind: VeRA, RandLoRA, LoHa, LoKr, (IA)³, OFT, BOFT, MiSS.

The row parts of a fused projection become one layer again where that is exact: tensors along the outputs lie one below
the other, and what acts on the inputs must be the same in all parts (LoHa's differing factors stack to a larger rank).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta, Written
from veneer.core.registry import PeftMap
from veneer.core.site import Site, site_at
from veneer.fields import fields_of
from veneer.io.peft_kinds import KINDS, layer_class, lie
from veneer.io.peft_targets import pattern, whole_number
from veneer.io.peft_tensors import to_disk

Tensors = dict[str, Tensor]


class Unfit(Exception):
    """Why an adapter is not written in PEFT's kind of its form; plain LoRA may still do."""


def content(adapter: Adapter, mapped: PeftMap) -> tuple[dict[str, Any], Tensors, list[Site]]:
    """(the kind's own fields of the config, tensors by key, the layers) of an adapter with one form throughout.

    Raises Unfit.
    """
    layers: dict[str, list[Delta]] = {}
    for delta in adapter.deltas.values():
        if not isinstance(delta, Written):
            layers.setdefault(delta.site.module_path, []).append(delta)
    form = type(next(iter(layers.values()))[0])
    tensors: Tensors = {}
    sites = [site_at(adapter.model, path) for path in layers]
    ranks, alphas = {}, {}
    for site, parts in zip(sites, layers.values(), strict=True):
        _check(site, parts, mapped)
        dense, rank = _layer(site, parts, mapped, form.name)
        for name, value in dense.items():
            key, tensor = to_disk(site, name, value, getattr(parts[0], "on_input", False))
            tensors[key] = tensor
        if "rank" in mapped.fields:
            ranks[site.path] = rank
        if "alpha" in mapped.fields:
            alphas[site.path] = whole_number(parts[0].scale * rank)
    config = _fields(adapter, mapped, form, layers)
    for numbers, field, patterns in ((ranks, "rank", "rank_pattern"), (alphas, "alpha", "alpha_pattern")):
        if not numbers:
            continue
        config[mapped.fields[field]], own = pattern(numbers)
        if own and not KINDS[mapped.type].patterns:
            raise Unfit(f"PEFT's {mapped.type} has one {field} for all layers, this adapter has several")
        config |= {patterns: own} if own else {}
    return config, tensors, sites


def _check(site: Site, parts: list[Delta], mapped: PeftMap) -> None:
    cls, known = layer_class(site), KINDS[mapped.type].layers
    if cls not in known:
        raise Unfit(f"PEFT's {mapped.type} takes {', '.join(known)}, and {site.path} is a {cls}")
    if site.kind == "conv":
        m = site.module
        if m.groups > 1 or m.padding_mode != "zeros" or any(d != 1 for d in m.dilation):
            raise Unfit(f"PEFT's {mapped.type} leaves out groups, dilation and padding modes, which {site.path} has")
        if cls == "Conv1d" and hasattr(parts[0], "w2"):
            raise Unfit(f"PEFT's LoKr multiplies over the wrong axes at a Conv1d like {site.path}")
    if any(d.offset is not None or d.gate is not None for d in parts):
        raise Unfit(f"PEFT's {mapped.type} has no start that moves the base and no gates, as at {site.path}")


def _layer(site: Site, parts: list[Delta], mapped: PeftMap, form: str) -> tuple[Tensors, int]:
    """(tensors by PEFT's name in the dense view, rank) of one layer."""
    slots = {slot: name for slot, name in mapped.keys.items() if hasattr(parts[0], slot)}
    own = [{name: _value(d, slot, name, mapped) for slot, name in slots.items()} for d in parts]
    rank = getattr(parts[0], "rank", 0)
    if parts[0].site.rows is None:
        return own[0], rank
    if any(lie(name, form).whole for name in slots.values()):
        raise Unfit(f"PEFT's {mapped.type} has one change for all of {site.path}, of which this adapter changes parts")
    shared = [n for n in slots.values() if lie(n, form).rows is None or getattr(parts[0], "on_input", False)]
    alike = (
        all(torch.equal(other[n], own[0][n]) for other in own[1:] for n in shared) and len({d.scale for d in parts}) < 2
    )
    if not alike and mapped.type == "LOHA":
        return _stacked(site, parts, own)
    if not alike:
        raise Unfit(
            f"PEFT's {mapped.type} shares {shared[0]} among all rows of {site.path}; the parts here differ in it"
        )
    return {n: own[0][n] if n in shared else _joined(site, parts, own, n, form) for n in slots.values()}, rank


def _value(delta: Delta, slot: str, name: str, mapped: PeftMap) -> Tensor:
    value = getattr(delta, slot).detach().float()
    return value * delta.scale if name == "miss_block" and "alpha" not in mapped.fields else value


def _joined(site: Site, parts: list[Delta], own: list[Tensors], name: str, form: str) -> Tensor:
    """One tensor of the whole layer from those of its row parts."""
    how = lie(name, form)
    assert how.rows is not None, "a tensor is joined along the outputs"
    missing = site.out_features - sum(d.site.out_features for d in parts)
    if missing and how.rest is None:
        raise Unfit(f"PEFT changes all rows of {site.path} at once, of which this adapter leaves out {missing}")
    shape = list(own[0][name].shape)
    shape[how.rows] = site.out_features
    whole = own[0][name].new_full(shape, how.rest or 0.0)
    for d, tensors in zip(parts, own, strict=True):
        whole.narrow(how.rows, d.site.rows.start, d.site.out_features).copy_(tensors[name])
    return whole


def _stacked(site: Site, parts: list[Delta], own: list[Tensors]) -> tuple[Tensors, int]:
    """LoHa of the parts' ranks together: each part's rows use the components that are its own."""
    scale = parts[0].scale
    out: Tensors = {}
    for left, right in (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")):
        out[right] = torch.cat([t[right] for t in own])
        out[left] = own[0][left].new_zeros(site.out_features, len(out[right]))
        at = 0
        for d, t in zip(parts, own, strict=True):
            factor = d.scale / scale if left == "hada_w1_a" else 1.0
            out[left][d.site.rows, at : at + d.rank] = t[left] * factor
            at += d.rank
    return out, len(out["hada_w1_b"])


def _fields(adapter: Adapter, mapped: PeftMap, form: type[Delta], layers: dict[str, list[Delta]]) -> dict[str, Any]:
    """The method's fields by PEFT's names, which must be the same at every layer, and the map's constants."""
    every = [d for parts in layers.values() for d in parts]
    config: dict[str, Any] = dict(mapped.config)
    for field, theirs in mapped.fields.items():
        if field in ("rank", "alpha") or field not in fields_of(form):
            continue
        values = {_plain(getattr(d, field)) for d in every}
        if field == "key":
            config[theirs] = adapter.seed if values == {None} else values.pop()
        elif field == "feedforward":
            config[theirs] = [path for path, parts in layers.items() if parts[0].on_input]
        elif len(values) > 1:
            raise Unfit(f"PEFT's {mapped.type} has one {theirs} for all layers, this adapter has several")
        elif (value := values.pop()) != _default(form, field) or field in _ALWAYS:
            config[theirs] = value
    if mapped.type in ("OFT", "BOFT"):
        _one_size(config, every, mapped)
    if any(layer_class(d.site) == "Conv1D" for d in every) and KINDS[mapped.type].fan:
        config["fan_in_fan_out"] = True
    return config


# Fields whose default here is not PEFT's, or without which PEFT refuses the config.
_ALWAYS = ("cayley_neumann", "block_size", "blocks", "columns", "decompose_factor")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _default(form: type[Delta], field: str) -> Any:
    return fields_of(form)[field].default


def _one_size(config: dict[str, Any], deltas: Iterable[Delta], mapped: PeftMap) -> None:
    """PEFT takes the size of blocks or their number, and does not look for the nearest size that divides in BOFT."""
    size, number = mapped.fields["block_size"], mapped.fields["blocks"]
    if config.get(number):
        config[size] = 0
    sizes = {d._blocks()[1] if hasattr(d, "_blocks") else 0 for d in deltas}
    if mapped.type == "BOFT":
        if len(sizes) > 1:
            raise Unfit("PEFT's BOFT has one size of blocks for all layers, this adapter has several")
        config[size], config[number] = sizes.pop(), 0
        if config.get("boft_n_butterfly_factor", 1) > 1:
            raise Unfit("PEFT's BOFT runs one butterfly factor without its CUDA kernel, this adapter has more")
