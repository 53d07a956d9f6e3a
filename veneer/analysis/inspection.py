"""What an adapter did to a model: drift, spectra, intruders, what a fold would lose in bf16, and what looks wrong."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from veneer.analysis.intruders import effective_rank, intruders, overlap
from veneer.core.adapter import Adapter
from veneer.errors import UserError
from veneer.parts.folding import folded_weights

SPIKE = 1.0  # ‖ΔW‖₂ over ‖W‖₂ from which a change is called exploding


@torch.no_grad()
def inspect(adapter: Adapter, k: int = 10, epsilon: float = 0.5) -> dict[str, Any]:
    """``sites`` (one dict each), ``blocks`` (means by transformer block), ``warnings`` (sentences), ``totals``.

    For each site: ``path``, ``role``, ``block``, ``shape``, ``norm`` (‖ΔW‖_F), ``drift`` (over ‖W‖_F), ``spike``
    (‖ΔW‖₂ over ‖W‖₂), ``effective_rank``, ``intruders``, ``energy``, ``fold_error`` (the share of ΔW that folding into
    the weight's own precision rounds away).

    Raises:
        UserError: nothing of the adapter folds, so there is no ΔW to look at.
    """
    rows = []
    for site, new, _ in folded_weights(adapter):
        if site.name is not None or site.kind not in ("linear", "conv", "embedding"):
            continue
        W0 = site.weight()
        rows.append(_row(site, W0.float(), new.float(), W0.dtype, k, epsilon))
    if not rows:
        raise UserError(f"{adapter.recipe} changes no weight matrix that could be looked at")
    return {
        "recipe": str(adapter.recipe),
        "parameters": adapter.parameter_count(),
        "sites": rows,
        "blocks": _blocks(rows),
        "warnings": _warnings(rows),
        "totals": _means(rows) | {"intruders": sum(r["intruders"] for r in rows), "looked_at": k * len(rows)},
    }


@torch.no_grad()
def compared(first: Adapter, second: Adapter, rank: int = 8) -> list[dict[str, Any]]:
    """Site by site where both adapters act: cosine of the changes and overlap of their leading ``rank`` directions."""
    changes = [
        {site.path: new.float() - site.weight().float() for site, new, _ in _matrices(a)} for a in (first, second)
    ]
    found = []
    for path in changes[0]:
        if path in changes[1]:
            a, b = changes[0][path], changes[1][path]
            cosine = float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))
            found.append({"path": path, "cosine": cosine, "overlap": overlap(a, b, rank)})
    if not found:
        raise UserError(f"{first.name} and {second.name} act on no common weight matrix")
    return found


def _matrices(adapter: Adapter) -> list[tuple[Any, Tensor, Any]]:
    return [row for row in folded_weights(adapter) if row[0].name is None and row[1].ndim == 2]


def _row(site: Any, W0: Tensor, W: Tensor, dtype: torch.dtype, k: int, epsilon: float) -> dict[str, Any]:
    change = W - W0
    S = torch.linalg.svdvals(change)
    found = intruders(W0, W, k, epsilon)
    norm, top = float(change.norm()), float(torch.linalg.matrix_norm(W0, 2))
    lost = float((W.to(dtype).float() - W0 - change).norm())
    return {
        "path": site.path,
        "role": site.role,
        "block": site.block,
        "shape": [site.out_features, site.in_features],
        "norm": norm,
        "drift": norm / max(float(W0.norm()), 1e-30),
        "spike": float(S[0]) / max(top, 1e-30),
        "effective_rank": effective_rank(S),
        "intruders": found.count,
        "energy": found.energy,
        "fold_error": lost / norm if norm else 0.0,
    }


MEANS = ("drift", "spike", "effective_rank", "energy", "fold_error")


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: sum(r[name] for r in rows) / len(rows) for name in MEANS}


def _blocks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for block in sorted({r["block"] for r in rows}, key=lambda b: -1 if b is None else b):
        mine = [r for r in rows if r["block"] == block]
        found.append(
            {"block": block, "sites": len(mine), **_means(mine), "intruders": sum(r["intruders"] for r in mine)}
        )
    return found


def _warnings(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    dead = [r["path"] for r in rows if r["norm"] == 0.0]
    broken = [r["path"] for r in rows if not math.isfinite(r["norm"])]
    spikes = [r["path"] for r in rows if r["spike"] > SPIKE]
    lost = [r for r in rows if r["fold_error"] > 0.5]
    if dead:
        found.append(f"{len(dead)} of {len(rows)} sites changed nothing ({_some(dead)})")
    if broken:
        found.append(f"{len(broken)} sites hold numbers that are not finite ({_some(broken)})")
    if spikes:
        found.append(f"at {len(spikes)} sites the change is larger than the weight itself ({_some(spikes)})")
    if lost:
        found.append(
            f"at {len(lost)} sites folding into the base's precision would round away over half of the change "
            f"({_some([r['path'] for r in lost])}): keep the adapter apart, or fold into fp32"
        )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
