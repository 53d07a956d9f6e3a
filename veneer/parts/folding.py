"""Folding an adapter into the weights and out again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta, Written
from veneer.core.site import Site, stored
from veneer.errors import UserError
from veneer.models import architecture

Undo = dict[tuple[nn.Module, str], Tensor | None]


@contextmanager
def trained_in_place(adapter: Adapter) -> Iterator[None]:
    """With the base tensors that train holding their trained values, which is what lies beneath the other deltas."""
    tensors = [(d.base_tensor(), d.parameter()) for d in adapter.every().values() if isinstance(d, Written)]
    before = [p.data for p, _ in tensors]
    try:
        for p, value in tensors:
            p.data = value.detach().to(p.dtype)
        yield
    finally:
        for (p, _), old in zip(tensors, before):
            p.data = old


@torch.no_grad()
def folded_weights(adapter: Adapter) -> list[tuple[Site, Tensor, Tensor | None]]:
    """(site, W', b') in fp32 for each site, this adapter alone; raises UserError where a form cannot fold.

    At a parameter site W' is the tensor. Base tensors that train as they are come first, and the others lie on them.
    """
    new = [(d.site, d.parameter().detach().clone(), None) for d in adapter.every().values() if isinstance(d, Written)]
    with trained_in_place(adapter):
        new += [_folded(adapter, d) for d in adapter.deltas.values() if not isinstance(d, Written)]
    return new


def _folded(adapter: Adapter, d: Delta) -> tuple[Site, Tensor, Tensor | None]:
    if not d.folds:
        why = d.reasons.get("folds", "its change is not a matrix")
        raise UserError(f"{d.name} cannot fold into the weights: {why}; save or serve the adapter instead")
    if d.site.name is not None:
        p = d.site.weight()
        return d.site, d.weight(p) if p is None else p.float() + d.weight(p), None
    W, b = None if d.replaces and not adapter.keep_base else d.site.weight().float(), d.site.bias()
    b = b if b is None else b.float()
    for link in d.under():
        W, b = link.fold(W, b)
    return d.site, W, b


@torch.no_grad()
def fold(adapter: Adapter) -> Undo:
    """Put the change into the weights; returns what ``unfold`` needs to take it out, bit for bit.

    Raises UserError when a form cannot fold, a weight is stored quantised, or a tensor is tied to another layer's.
    """
    _check(adapter)
    undo: Undo = {}
    new = folded_weights(adapter)
    for site, _, _ in new:
        for name in (site.name,) if site.name is not None else ("weight", "bias"):
            p = site.module._parameters.get(name)
            undo.setdefault((site.module, name), None if p is None else p.detach().clone())
    for site, W, b in new:
        m = site.module
        if site.name is not None:
            _write(m, site.name, W)
            continue
        site.write(W)
        if b is not None:
            _write_bias(site, b)
    return undo


def unfold(undo: Undo) -> None:
    """Put the old weights back."""
    for (module, name), value in undo.items():
        if value is None:
            module._parameters[name] = None
        else:
            module._parameters[name].data = value


def untie(model: nn.Module) -> list[str]:
    """Give every layer that shares a weight tensor with another its own copy; returns the names of the new tensors."""
    made = []
    for group in architecture.tied(model):
        for name in group[1:]:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            old = module._parameters[attribute]
            module._parameters[attribute] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            made.append(name)
    if made and hasattr(model, "config"):
        for config in (model.config, architecture.text_config(model)):
            config.tie_word_embeddings = False
    return made


def _check(adapter: Adapter) -> None:
    added = [d for d in adapter.deltas.values() if not isinstance(d, Written)]
    for d in added:
        if d.site.kind == "linear" and stored(d.site.module):
            raise UserError(
                f"{d.site.path} is stored quantised and folding would round the change away; "
                "export(format='merged') writes dense weights instead"
            )
    for group in architecture.tied(adapter.model):
        hit = next((d for d in added if _touches(d, group)), None)
        if hit is not None:
            raise UserError(
                f"folding {hit.site.path} would change {' and '.join(group)}, which share one tensor; "
                "call veneer.untie(model) first"
            )


def _touches(delta: Delta, group: list[str]) -> bool:
    site = delta.site
    return (site.path if site.name is not None else f"{site.module_path}.weight") in group


def _write(module: nn.Module, name: str, value: Tensor) -> None:
    old = module._parameters.get(name)
    if old is not None:
        old.data = value.to(old.dtype)
        return
    dtype = next((p.dtype for p in module.parameters(recurse=False)), value.dtype)
    module._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)


def _write_bias(site: Site, b: Tensor) -> None:
    m = site.module
    if m._parameters.get("bias") is None:
        rows = m.weight.shape[1 if site.transposed else 0]
        _write(m, "bias", torch.zeros(rows, dtype=m.weight.dtype, device=m.weight.device))
    site.bias().copy_(b)
