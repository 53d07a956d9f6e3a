"""Evidence: what one calibration pass over real batches says about each site."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core import chance
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.models import architecture

NEEDS = {
    "input_svd": "an incremental principal component analysis of the inputs",
    "input_covariance": "the uncentred second moment of the inputs (in, in)",
    "weight_gradient": "the mean gradient of the loss at W (out, in)",
    "weight_gradient_sketch": "a linear sketch of that gradient, whose size grows with the rank alone",
    "weight_gradient_square": "the mean of the squared batch gradients at W (out, in)",
}


class SiteEvidence:
    """What was gathered at one site; an attribute that no method asked for is None."""

    def __init__(self) -> None:
        self.inputs: Any = None
        self.covariance: Tensor | None = None
        self.gradient: Tensor | None = None
        self.gradient_square: Tensor | None = None
        self.sketch: Any = None
        self.tokens = 0


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

    Padding (attention mask 0) is left out, and with ``labels_only`` the positions without a label too. Gradients are
    reduced site by site inside backward, from the layer's input and output gradient: no weight gets a ``.grad``.
    The model's mode, flags and gradients are as before afterwards. ``components`` is how many principal components or
    sketch dimensions are kept. Raises UserError for a need that does not exist or batches without a loss.
    """
    unknown = set(needs) - set(NEEDS)
    if unknown:
        raise ValueError(f"unknown evidence {sorted(unknown)}; there is {sorted(NEEDS)}")
    evidence = Evidence(sites)
    gradients = any(n.startswith("weight_gradient") for n in needs)
    by_module: dict[nn.Module, list[Site]] = {}
    for s in sites:
        by_module.setdefault(s.module, []).append(s)
    keep: list[Tensor | None] = [None]
    handles = [
        m.register_forward_hook(_watch(group, evidence, needs, keep, components, seed))
        for m, group in by_module.items()
    ]
    flags = {p: p.requires_grad for p in model.parameters()}
    training = {m: m.training for m in model.modules()}
    embedding = architecture.embedding(model)
    if gradients and embedding is not None:
        handles.append(embedding.register_forward_hook(lambda m, a, y: y.requires_grad_() if y.is_leaf else y))
    try:
        model.eval()
        model.requires_grad_(False)
        for batch in batches:
            keep[0] = _rows_kept(batch, labels_only)
            with torch.set_grad_enabled(gradients):
                out = _forward(model, batch, gradients)
                if gradients:
                    loss = getattr(out, "loss", None)
                    if loss is None:
                        raise UserError("the calibration batches give no loss: add labels to every batch")
                    loss.backward()
            evidence.batches += 1
    finally:
        for h in handles:
            h.remove()
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for m, mode in training.items():
            m.training = mode
    if not evidence.batches:
        raise UserError("calibration holds no batch; give at least one")
    for found in evidence.sites.values():
        for name in ("gradient", "gradient_square"):
            if getattr(found, name) is not None:
                setattr(found, name, getattr(found, name) / evidence.batches)
        if found.covariance is not None:
            found.covariance = found.covariance / max(1, found.tokens)
    return evidence


def _forward(model: nn.Module, batch: Any, gradients: bool) -> Any:
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        call = {k: _differentiable(v, gradients) for k, v in batch.items()}
        return model(**call)
    call = batch if isinstance(batch, list | tuple) else (batch,)
    return model(*(_differentiable(v, gradients) for v in call))


def _differentiable(value: Any, gradients: bool) -> Any:
    if gradients and isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _rows_kept(batch: Any, labels_only: bool) -> Tensor | None:
    """Which positions count (batch, tokens), or None for all."""
    if not hasattr(batch, "get"):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    mask = None if mask is None else mask.bool()
    if labels_only and labels is not None and labels.ndim == 2:
        scored = labels != -100
        mask = scored if mask is None else mask & scored
    return mask


def _watch(
    sites: list[Site], evidence: Evidence, needs: frozenset[str], keep: list[Tensor | None], components: int, seed: int
) -> Any:
    def forward(module: nn.Module, args: tuple, output: Any) -> None:
        x, y = args[0].detach(), output[0] if isinstance(output, tuple) else output
        rows, mask = _columns(sites[0], x), keep[0]
        kept = rows
        if mask is not None and x.ndim == 3 and mask.shape == x.shape[:2]:
            kept = rows[mask.reshape(-1).to(rows.device)]
        for site in sites:
            found = evidence[site]
            found.tokens += len(kept)
            if "input_covariance" in needs:
                square = kept.float().T @ kept.float()
                found.covariance = square if found.covariance is None else found.covariance.add_(square)
            if "input_svd" in needs:
                _add_inputs(found, kept, components, seed)
            if any(n.startswith("weight_gradient") for n in needs) and y.requires_grad:
                y.register_hook(
                    lambda g, site=site, rows=rows: _add_gradient(
                        evidence[site], site, rows, g, needs, components, seed
                    )
                )

    return forward


def _add_inputs(found: SiteEvidence, rows: Tensor, components: int, seed: int) -> None:
    from veneer.numerics.pca import IncrementalPCA

    if found.inputs is None:
        found.inputs = IncrementalPCA(min(components, rows.shape[1]))
    found.inputs.update(rows.float())


def _add_gradient(
    found: SiteEvidence, site: Site, rows: Tensor, g: Tensor, needs: frozenset[str], components: int, seed: int
) -> None:
    g = g.detach()
    if site.kind == "conv":
        g = g.flatten(2).transpose(1, 2)
    g = g.reshape(-1, g.shape[-1])
    g = g if site.rows is None else g[:, site.rows]
    if "weight_gradient_sketch" in needs:
        from veneer.numerics.sketch import GradientSketch

        if found.sketch is None:
            made = chance.generator(seed, site.path, "sketch")
            found.sketch = GradientSketch(site.out_features, site.in_features, components, made)
        found.sketch.add(g, rows)
    if "weight_gradient" in needs or "weight_gradient_square" in needs:
        full = (g.T @ rows.to(g.dtype)).float().cpu()
        if "weight_gradient" in needs:
            found.gradient = full if found.gradient is None else found.gradient.add_(full)
        if "weight_gradient_square" in needs:
            square = full.square()
            found.gradient_square = square if found.gradient_square is None else found.gradient_square.add_(square)


def _columns(site: Site, x: Tensor) -> Tensor:
    """The layer's input as rows (positions, in), so that the weight gradient is gᵀ·rows."""
    if site.kind == "embedding":
        return nn.functional.one_hot(x.reshape(-1), site.in_features).float()
    if site.kind == "conv":
        m = site.module
        if x.ndim == 3:
            x, kernel, pad, step, gap = (
                x[:, :, None],
                (1, *m.kernel_size),
                (0, *m.padding),
                (1, *m.stride),
                (1, *m.dilation),
            )
        else:
            kernel, pad, step, gap = m.kernel_size, m.padding, m.stride, m.dilation
        patches = nn.functional.unfold(x.float(), kernel, gap, pad, step)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return x.reshape(-1, x.shape[-1])
