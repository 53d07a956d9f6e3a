"""What an adapter did to a model: drift, spectra, intruders, what a fold would lose in bf16, and what looks wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.analysis.intruders import Side, effective_rank, intruders, overlap
from veneer.core.adapter import Adapter
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.io.files import read_json
from veneer.parts.folding import folded_weights

SPIKE = 1.0  # ‖ΔW‖₂ over ‖W‖₂ from which a change is called exploding
SCALE = 64.0  # of a pair: four times what α = 256 at rank 16 gives
ROUNDING = 3e-7  # of ‖W‖₂: below it a singular value of W + ΔW − W is fp32's rounding
SPECTRUM = 16  # leading singular values of ΔW that a report keeps


@torch.no_grad()
def inspect(adapter: Adapter, k: int = 10, epsilon: float = 0.5, side: Side = "left") -> dict[str, Any]:
    """``sites`` (one dict each), ``blocks`` and ``roles`` (means by transformer block and by role), ``warnings``
    (sentences), ``totals``.

    For each site: ``path``, ``role``, ``block``, ``shape``, ``norm`` (‖ΔW‖_F), ``drift`` (over ‖W‖_F), ``spike``
    (‖ΔW‖₂ over ‖W‖₂), ``effective_rank`` and ``spectrum`` of ΔW; ``values``, ``similarity`` and ``together`` of the
    leading directions of W + ΔW (to the nearest of the base's, and to the nearest group of them with near-equal
    values), ``intruders``, ``grouped`` (those of them that lie in such a group) and ``energy``; ``fold_error``
    (‖bf16(W + ΔW) − bf16(W) − ΔW‖ over ‖ΔW‖, what folding into bf16 rounds away) and ``unmoved`` (the share of entries
    of W that such a fold leaves as they are).

    Raises:
        UserError: nothing of the adapter folds, so there is no ΔW to look at.
    """
    rows = []
    for site, new, _ in folded_weights(adapter):
        if site.name is not None or site.kind not in ("linear", "conv", "embedding"):
            continue
        W0 = site.weight()
        rows.append(_row(site, W0.float(), new.float(), k, epsilon, side))
    if not rows:
        raise UserError(f"{adapter.recipe} changes no weight matrix that could be looked at")
    return {
        "recipe": str(adapter.recipe),
        "parameters": adapter.parameter_count(),
        "epsilon": epsilon,
        "side": side,
        "sites": rows,
        "blocks": _by("block", rows),
        "roles": _by("role", rows),
        "warnings": _warnings(rows) + _factors(adapter),
        "totals": _means(rows) | _sums(rows) | {"looked_at": sum(len(r["values"]) for r in rows)},
    }


def another_base(adapter: Adapter, directory: str | Path) -> str | None:
    """A warning when the adapter's files name another base than the model it now lies on (loading was forced)."""
    record = Path(directory) / "recipe.json"
    made_on = read_json(record).get("base") if record.is_file() else None
    if made_on in (None, adapter.base):
        return None
    return f"it was made on another base ({made_on[:8]}…, this one is {adapter.base[:8]}…): trust no figure here"


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


def _row(site: Site, W0: Tensor, W: Tensor, k: int, epsilon: float, side: Side) -> dict[str, Any]:
    change = W - W0
    found = intruders(W0, W, k, epsilon, side)
    S = _singular_values(change, floor=ROUNDING * found.top)
    norm = float(change.norm())
    moved = W.bfloat16().float() - W0.bfloat16().float()
    return {
        "path": site.path,
        "role": site.role,
        "block": site.block,
        "shape": [site.out_features, site.in_features],
        "norm": norm,
        "drift": norm / max(float(W0.norm()), 1e-30),
        "spike": float(S[0]) / max(found.top, 1e-30),
        "effective_rank": effective_rank(S),
        "spectrum": S[:SPECTRUM].tolist(),
        "intruders": found.count,
        "energy": found.energy,
        "grouped": int((found.flags & (found.together >= epsilon)).sum()),
        "values": found.S.tolist(),
        "similarity": found.similarity.tolist(),
        "together": found.together.tolist(),
        "fold_error": float((moved - change).norm()) / norm if norm else 0.0,
        "unmoved": float((moved == 0).float().mean()),
    }


def _singular_values(W: Tensor, floor: float = 0.0) -> Tensor:
    """Descending, by the smaller Gram matrix in fp64; those up to ``floor`` count as 0."""
    wide = (W.T if W.shape[0] > W.shape[1] else W).double()
    if not bool(wide.isfinite().all()):
        return torch.full((len(wide),), torch.nan)
    S = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0).sqrt()
    return S.where(floor < S, 0.0)


@torch.no_grad()
def spectra(sites: list[Site]) -> list[dict[str, Any]]:
    """Of weights themselves, by block and role: ``top`` singular value, ``effective_rank``, the ``share`` of the full
    rank that is, and ``stable_rank`` ‖W‖²_F/‖W‖₂²; sites of one block and role are averaged."""
    groups: dict[tuple[int | None, str], list[tuple[float, float, float, float]]] = {}
    for site in (s for s in sites if s.kind in ("linear", "conv")):
        S = _singular_values(site.weight().float())
        rank = effective_rank(S)
        figures = (float(S[0]), rank, rank / len(S), float(S.square().sum() / S[0].square().clamp_min(1e-30)))
        groups.setdefault((site.block, site.role), []).append(figures)
    names = ("top", "effective_rank", "share", "stable_rank")
    return [
        {"block": block, "role": role, "sites": len(found)}
        | {name: sum(f[i] for f in found) / len(found) for i, name in enumerate(names)}
        for (block, role), found in groups.items()
    ]


MEANS = ("drift", "spike", "effective_rank", "energy", "fold_error", "unmoved")


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: sum(r[name] for r in rows) / len(rows) for name in MEANS}


def _sums(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(r[name] for r in rows) for name in ("intruders", "grouped")}


def _by(what: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of the rows that share ``what``."""
    found = []
    for value in sorted({r[what] for r in rows}, key=lambda v: (v is not None, v)):
        mine = [r for r in rows if r[what] == value]
        found.append({what: value, "sites": len(mine), **_means(mine), **_sums(mine)})
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
            f"at {len(lost)} sites folding into bf16 would round away over half of the change "
            f"({_some([r['path'] for r in lost])}): keep the adapter apart, or fold into fp32"
        )
    return found


def _factors(adapter: Adapter) -> list[str]:
    """What the tensors themselves show: factors that are zero, scales that no setting would ask for."""
    zero, scales = [], []
    for path, delta in adapter.deltas.items():
        zero += [f"{path}.{name}" for name, p in delta.named_parameters(recurse=False) if p.numel() and not p.any()]
        scale = float(delta.scale)
        scales += [] if math.isfinite(scale) and abs(scale) <= SCALE else [f"{path}: {scale:g}"]
    found = []
    if zero:
        found.append(f"{len(zero)} trained tensors are all zero ({_some(zero)}): nothing was learned there")
    if scales:
        found.append(f"{len(scales)} scales are larger than {SCALE:g} ({_some(scales)}); was alpha meant?")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
