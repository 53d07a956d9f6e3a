"""Proof that a run did something: what was adapted, what moved, and what looks wrong, in sentences."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from veneer.core.delta import Delta, Written
from veneer.core.site import all_sites
from veneer.numerics import factored

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

UNEVEN = 50.0  # a block whose ΔW is so many times the median block's is named


@torch.no_grad()
def change_norm(delta: Delta) -> float | None:
    """‖ΔW‖ of one site, Frobenius: from the factors where the change is low-rank; None where it is not a matrix."""
    if isinstance(delta, Written):
        return float(delta.weight().norm())
    if not delta.folds:
        return None
    pairs = [link.pair() for link in delta.under()] if delta.is_plain() else [None]
    if all(pair is not None for pair in pairs):
        A, B = factored.stack([(p.A, p.B) for p in pairs], [p.scale for p in pairs])
        return float(factored.frobenius_norm(A, B))
    site = delta.site
    if site.name is not None:
        return float(delta.weight(site.weight()).float().norm())
    W, b = site.weight().float(), site.bias()
    b = before = None if b is None else b.float()
    new = W
    for link in delta.under():
        new, b = link.fold(new, b)
    square = (new - W).square().sum()
    if b is not None:
        square = square + (b if before is None else b - before).square().sum()
    return float(square.sqrt())


def coverage(adapter: Adapter) -> dict[str, Any]:
    """Sites matched and missed by role: among blocks, a role that is adapted in some and not in others is uneven."""
    adapted = {s.path for s in adapter.sites}
    kinds = {s.kind for s in adapter.sites}
    matched: dict[str, int] = {}
    missed: dict[str, list[str]] = {}
    for site in adapter.sites:
        matched[site.role] = matched.get(site.role, 0) + 1
    for site in all_sites(adapter.model):
        if site.path not in adapted and site.module_path not in adapted and site.kind in kinds:
            missed.setdefault(site.role, []).append(site.path)
    return {"matched": matched, "missed": {role: len(paths) for role, paths in missed.items()}}


def proof(adapter: Adapter, idle: list[str], held_out: dict[str, float | None]) -> dict[str, Any]:
    """The record's ``proof``: coverage, tensors without a gradient, tensors still zero, ‖ΔW‖ by block, warnings.

    Args:
        idle: names of trained tensors that never had a gradient other than zero.
        held_out: held-out loss ``before`` and ``after``; None where it was not measured.
    """
    zero = [n for n, p in adapter.named_parameters() if p.numel() and not bool(p.detach().any())]
    blocks: dict[str, float] = {}
    unmeasured: dict[str, str] = {}
    for delta in adapter.deltas.values():
        norm = change_norm(delta)
        if norm is None:
            unmeasured[delta.name] = delta.reasons.get("folds", "its change is not a matrix")
            continue
        key = "outside the blocks" if delta.site.block is None else str(delta.site.block)
        blocks[key] = (blocks.get(key, 0.0) ** 2 + norm**2) ** 0.5
    found = {
        **coverage(adapter),
        "never_had_gradient": idle,
        "still_zero": zero,
        "change_norm_by_block": blocks,
        "change_norm_unmeasured": unmeasured,
        "held_out": held_out,
    }
    return found | {"warnings": _warnings(found)}


def _warnings(found: dict[str, Any]) -> list[str]:
    words = []
    if idle := found["never_had_gradient"]:
        words.append(f"{_count(idle, 'trained tensor')} never had a gradient: {_some(idle)}")
    if zero := found["still_zero"]:
        words.append(f"{_count(zero, 'trained tensor')} still zero at the end: {_some(zero)}")
    uneven = {r: n for r, n in found["missed"].items() if r in found["matched"] and r != "other"}
    for role, number in uneven.items():
        words.append(f"{number} of {number + found['matched'][role]} sites of role {role} were not adapted")
    norms = {k: v for k, v in found["change_norm_by_block"].items() if k != "outside the blocks"}
    still = [k for k, v in norms.items() if v == 0.0]
    if still:
        words.append(f"ΔW is zero in {_count(still, 'block')}: {_some(still)}")
    middle = median(norms.values()) if norms else 0.0
    large = [k for k, v in norms.items() if middle > 0 and v > UNEVEN * middle]
    if large:
        words.append(f"ΔW of {_count(large, 'block')} is over {UNEVEN:g} times the median block's: {_some(large)}")
    before, after = found["held_out"].get("before"), found["held_out"].get("after")
    if before is not None and after is not None and not after < before:
        words.append(f"held-out loss did not fall: {before:.4f} before, {after:.4f} after")
    return words


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'s' if len(items) != 1 else ''}"


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (" …" if len(items) > 3 else "")
