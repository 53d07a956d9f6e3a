"""What an adapter is in the terms of other tools: factors per whole layer, and whole tensors.

Other tools know layers, not row ranges of fused projections, and plain pairs, not stacks of them. Here the links at a
site become one pair (their updates add up, so their factors stack), and the row ranges of a layer become one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta, Written
from veneer.core.site import Site, site_at
from veneer.errors import UserError
from veneer.models import architecture
from veneer.parts.folding import trained_in_place


@dataclass
class Factors:
    """The change of one whole layer: ΔW = scale · B A in the dense view, and rows' extras by their PEFT names."""

    site: Site
    A: Tensor
    B: Tensor
    scale: float
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The layer's path."""
        return self.site.path

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.A.shape[0]


def plain_factors(adapter: Adapter, target: str, within: str = ' with format="peft-lora"') -> list[Factors]:
    """The adapter as plain LoRA, layer by layer; a change of the bias is the extra ``lora_B.bias`` (over the scale).

    Raises UserError, with the nearest offer, where the change is not plain LoRA; ``target`` says what it was for, and
    ``within`` where a rank or a tolerance is taken.
    """
    with trained_in_place(adapter):
        return _by_layer(adapter, lambda delta: _as_lora(delta, target, within), target)


def native_factors(adapter: Adapter, keys: dict[str, str], target: str) -> list[Factors]:
    """The adapter in its own form of LoRA: the factors, and what else ``keys`` maps, layer by layer."""

    def own(delta: Delta) -> Factors:
        A, B = (getattr(delta, next(s for s, n in keys.items() if n == name)) for name in ("lora_A", "lora_B"))
        A, B, scale = delta.gated(A.detach()).float(), B.detach().float(), delta.scale
        extras = {n: getattr(delta, s).detach() for s, n in keys.items() if n not in ("lora_A", "lora_B")}
        if delta.offset is not None:
            A, B, scale = stack([delta.offset.pair(), (A, B, scale)])
        return Factors(delta.site, A, B, scale, extras)

    with trained_in_place(adapter):
        return _by_layer(adapter, own, target)


def _as_lora(delta: Delta, target: str, within: str) -> Factors:
    found = exact(delta)
    if found is None:
        raise UserError(
            f"{delta.name} at {delta.site.path} is not plain LoRA and cannot be written as {target}; give rank= or "
            f'tolerance={within} for the nearest pair, or export with format="merged" the folded model'
        )
    return found


@torch.no_grad()
def exact(delta: Delta) -> Factors | None:
    """The change at one site as a plain pair, starts that moved the base included; None where it is none."""
    site = delta.site
    W, b = site.weight().float(), site.bias()
    start = b = b if b is None else b.float()
    pairs = []
    links = delta.under()
    for at, link in enumerate(links):
        form = link.as_lora(W, b) if isinstance(link, Delta) else link.pair()
        if form is None:
            return None
        pairs.append((form[0].detach().float(), form[1].detach().float(), form[2]))
        if at + 1 < len(links):
            W = W + form[2] * (pairs[-1][1] @ pairs[-1][0])
        b = _shifted(b, form[3] if len(form) > 3 else None)
    A, B, scale = stack(pairs)
    change = b if start is None or b is None else b - start
    changed = change is not None and bool(change.any())
    return Factors(site, A, B, scale, {"lora_B.bias": change / scale} if changed else {})


def _shifted(b: Tensor | None, change: Tensor | None) -> Tensor | None:
    if change is None:
        return b
    return change.detach().float() if b is None else b + change.detach().float()


def stack(pairs: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """One pair whose change is the sum of the pairs' changes, at the last scale that is not 0 (1 when all are)."""
    scale = next((s for _, _, s in reversed(pairs) if s), 1.0)
    A = torch.cat([a for a, _, _ in pairs])
    return A, torch.cat([b if s == scale else b * (s / scale) for _, b, s in pairs], dim=1), scale


def _by_layer(adapter: Adapter, form: Callable[[Delta], Factors], target: str) -> list[Factors]:
    return [joined(adapter, path, [form(d) for d in parts]) for path, parts in by_layer(adapter, target).items()]


def by_layer(adapter: Adapter, target: str) -> dict[str, list[Delta]]:
    """The deltas by layer, those on its row ranges together; refuses what is at no layer or has no factors."""
    layers: dict[str, list[Delta]] = {}
    for path, delta in adapter.deltas.items():
        if isinstance(delta, Written) or delta.site.name is not None:
            continue
        if delta.site.kind not in ("linear", "conv", "embedding"):
            raise UserError(
                f"{delta.name} at {path} changes a whole {delta.site.kind}, which {target} cannot hold; save it in "
                "Veneer's own format"
            )
        if not delta.site.factored():
            raise UserError(
                f'{path} is a grouped convolution, whose change has no factors; export with format="merged"'
            )
        layers.setdefault(delta.site.module_path, []).append(delta)
    return layers


def joined(adapter: Adapter, path: str, parts: list[Factors]) -> Factors:
    """The row ranges of one layer as one layer: factors that share A keep their rank, others stack."""
    if parts[0].site.rows is None:
        return parts[0]
    site = site_at(adapter.model, path)
    scale = next((p.scale for p in parts if p.scale), 1.0)
    shared = all(p.A.shape == parts[0].A.shape and torch.equal(p.A, parts[0].A) for p in parts)
    rank = parts[0].rank if shared else sum(p.rank for p in parts)
    B = parts[0].B.new_zeros(site.out_features, rank)
    at = 0
    for p in parts:
        B[p.site.rows, at : at + p.rank] = p.B if p.scale == scale else p.B * (p.scale / scale)
        at += 0 if shared else p.rank
    extras = {}
    for name in {n for p in parts for n in p.extras}:
        extras[name] = _rest(site, name)
        for p in parts:
            if name in p.extras:
                value = p.extras[name]
                extras[name][p.site.rows] = value * (p.scale / scale) if name == "lora_B.bias" else value
    return Factors(site, parts[0].A if shared else torch.cat([p.A for p in parts]), B, scale, extras)


def _rest(site: Site, name: str) -> Tensor:
    """What an extra is for the rows that no delta touches: the magnitude they have, or a bias change of 0."""
    if name == "lora_magnitude_vector":
        return site.weight().detach().float().norm(dim=1)
    return torch.zeros(site.out_features)


@torch.no_grad()
def whole_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The base tensors that the adapter changes as a whole, by all their names, with the values they have under it."""
    out: dict[str, Tensor] = {}
    for path, delta in adapter.every().items():
        if isinstance(delta, Written):
            out[path] = delta.parameter().detach().to(delta.base_tensor().dtype)
        elif delta.site.name is not None:
            p = delta.site.module._parameters.get(delta.site.name)
            change = delta.weight(p)
            out[path] = change if p is None else (p.float() + change).to(p.dtype)
    for group in architecture.tied(adapter.model):
        given = next((out[n] for n in group if n in out), None)
        if given is not None:
            out |= dict.fromkeys(group, given)
    return out
