"""Evidence: what one calibration pass over real batches says about each site."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.site import Site
from veneer.errors import UserError
from veneer.models import architecture
from veneer.numerics import chance
from veneer.numerics.pca import IncrementalPCA
from veneer.numerics.sketch import GradientSketch

NEEDS = {
    "input_svd": "an incremental principal component analysis of the inputs",
    "input_covariance": "the uncentred second moment of the inputs (in, in)",
    "weight_gradient": "the mean gradient of the loss at W (out, in)",
    "weight_gradient_sketch": "a linear sketch of that gradient, whose size grows with the rank alone",
    "weight_gradient_square": "the mean of the squared batch gradients at W (out, in)",
}


@dataclass
class SiteEvidence:
    """What was gathered at one site; what no method asked for is None."""

    inputs: IncrementalPCA | None = None
    covariance: Tensor | None = None
    gradient: Tensor | None = None
    gradient_square: Tensor | None = None
    sketch: GradientSketch | None = None
    tokens: int = 0


class Evidence:
    """Evidence by site: ``evidence[site].covariance``."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = {s.path: SiteEvidence() for s in sites}
        self.batches = 0

    def __getitem__(self, site: Site) -> SiteEvidence:
        return self.sites[site.path]


def gather(
    model: nn.Module,
    sites: list[Site],
    batches: Iterable[Any],
    needs: frozenset[str],
    *,
    components: int = 16,
    labels_only: bool = False,
    seed: int = 0,
) -> Evidence:
    """Run the model as given over ``batches`` and gather what ``needs`` names at every site.

    Padding (attention mask 0) is left out of what is said of inputs, and with ``labels_only`` the positions without a
    label too. Gradients are reduced site by site inside backward, from the layer's input and output gradient: no weight
    gets a ``.grad``. The model's mode and flags are as before afterwards. ``components`` is how many principal
    components or sketch dimensions are kept. Raises UserError for batches that are missing or give no loss.
    """
    unknown = set(needs) - set(NEEDS)
    if unknown:
        raise ValueError(f"unknown evidence {sorted(unknown)}; there is {sorted(NEEDS)}")
    evidence = Evidence(sites)
    backward = any(n.startswith("weight_gradient") for n in needs)
    mask: list[Tensor | None] = [None]
    last: list[Any] = [None, None]
    watch = [_watch(s, evidence[s], needs, mask, last, components, seed) for s in sites]
    handles = []
    table = getattr(architecture.embedding(model), "weight", None)
    for m in model.modules() if backward and table is not None else ():
        if isinstance(m, nn.Embedding) and m.weight is table:  # encoder and decoder have one each
            handles.append(m.register_forward_hook(lambda m, a, y: y.requires_grad_() if y.is_leaf else y))
    handles += [s.module.register_forward_hook(w) for s, w in zip(sites, watch)]
    flags = {p: p.requires_grad for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval().requires_grad_(False)
        for batch in batches:
            mask[0] = counted(batch, labels_only)
            with torch.set_grad_enabled(backward):
                loss = getattr(call(model, batch, backward), "loss", None)
            if backward:
                if loss is None:
                    raise UserError("the calibration batches give no loss: add labels to every batch")
                loss.backward()
            evidence.batches += 1
    finally:
        for h in handles:
            h.remove()
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for m, mode in modes.items():
            m.training = mode
    if not evidence.batches:
        raise UserError("calibration holds no batch; give at least one")
    for found in evidence.sites.values():
        found.gradient = None if found.gradient is None else found.gradient / evidence.batches
        found.gradient_square = None if found.gradient_square is None else found.gradient_square / evidence.batches
        found.covariance = None if found.covariance is None else found.covariance / max(1, found.tokens)
    return evidence


def call(model: nn.Module, batch: Any, backward: bool) -> Any:
    def leaf(v: Any) -> Any:
        return v.detach().requires_grad_() if backward and isinstance(v, Tensor) and v.is_floating_point() else v

    if hasattr(batch, "items"):
        return model(**{k: leaf(v) for k, v in batch.items()})
    return model(*(leaf(v) for v in (batch if isinstance(batch, list | tuple) else (batch,))))


def counted(batch: Any, labels_only: bool) -> Tensor | None:
    """Which positions count (batch, tokens), or None for all."""
    if not hasattr(batch, "get"):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    mask = None if mask is None else mask.bool()
    if labels_only and labels is not None and labels.ndim == 2:
        mask = labels != -100 if mask is None else mask & (labels != -100)
    return mask


def _watch(
    site: Site, found: SiteEvidence, needs: frozenset[str], mask: list, last: list, components: int, seed: int
) -> Callable[..., None]:
    """A forward hook that gathers the layer's inputs and waits for its output's gradient.

    ``last`` is the input seen before and its site: siblings that read the same tensor share what is gathered of it.
    """

    def backward(rows: Tensor, grad: Tensor) -> None:
        g = site.output_rows(grad)
        if "weight_gradient_sketch" in needs:
            if found.sketch is None:
                made = chance.generator(seed, site.path, "sketch")
                found.sketch = GradientSketch(site.out_features, site.in_features, components, made)
            found.sketch.add(g, rows)
        if needs & {"weight_gradient", "weight_gradient_square"}:
            full = (g.T @ rows.to(g.dtype)).float().cpu()
            if "weight_gradient" in needs:
                found.gradient = full if found.gradient is None else found.gradient + full
            if "weight_gradient_square" in needs:
                square = full.square()
                found.gradient_square = square if found.gradient_square is None else found.gradient_square + square

    def forward(module: nn.Module, args: tuple, output: Tensor) -> None:
        x = args[0].detach()
        rows = site.input_rows(x)
        if output.requires_grad:
            output.register_hook(lambda grad: backward(rows, grad.detach()))
        if args[0] is last[0]:
            found.inputs, found.covariance, found.tokens = last[1].inputs, last[1].covariance, last[1].tokens
            return
        last[:] = args[0], found
        fits = mask[0] is not None and x.ndim >= 2 and mask[0].shape == x.shape[:2]
        kept = (rows[mask[0].reshape(-1)] if fits else rows).float()
        found.tokens += len(kept)
        if "input_covariance" in needs:
            square = kept.T @ kept
            found.covariance = square if found.covariance is None else found.covariance.add_(square)
        if "input_svd" in needs:
            found.inputs = found.inputs or IncrementalPCA(min(components, site.in_features))
            found.inputs.update(kept)

    return forward
