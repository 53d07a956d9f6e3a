"""What an adapter says of itself: the file's description and the table a person reads."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from veneer.core.adapter import Adapter

_TASKS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}


def description(adapter: Adapter) -> dict[str, Any]:
    """What the file says of an adapter, ready for JSON; ``restore`` builds it again from this and its state."""
    part = adapter.recipe.part("delta")
    given = {} if part is None else part.fields
    fields = {
        path: {k: v for k, v in d.field_values().items() if v != given.get(k, getattr(type(d), k))}
        for path, d in adapter.deltas.items()
    }
    return {
        "format": 1,
        "veneer": version("veneer"),
        "torch": torch.__version__,
        "recipe": str(adapter.recipe),
        "seed": adapter.seed,
        "select": adapter.select,
        "sites": list(adapter.deltas),
        "fields": {path: f for path, f in fields.items() if f},
        "train": list(adapter.trained),
        "phase": adapter.phase,
        "finished": adapter.phase == len(adapter.phases) - 1,
        "base": adapter.base,
        "parameters": adapter.parameter_count(),
    } | _purpose(adapter)


def _purpose(adapter: Adapter) -> dict[str, Any]:
    """The task of a base that is no decoder, and the names of its classes in their order: what loads it again."""
    config, kind = getattr(adapter.model, "config", None), type(adapter.model).__name__
    task = next((task for end, task in _TASKS.items() if kind.endswith(end)), None)
    if task is None:
        return {"task": "seq2seq"} if getattr(config, "is_encoder_decoder", False) else {}
    names = getattr(config, "id2label", None) or {}
    if task == "classification" and len(names) == 1:
        return {"task": "regression"}
    return {"task": task, "labels": [names[k] for k in sorted(names)]}


def table(adapter: Adapter) -> list[dict[str, Any]]:
    """One row per kind of site: role, form, shape, rank, number of sites, trained parameters."""
    rows: dict[tuple, dict[str, Any]] = {}
    for d in adapter.every().values():
        shape = f"{d.site.out_features}×{d.site.in_features}" if d.site.out_features else d.site.kind
        key = {"role": d.site.role, "form": d.name or "base tensor", "shape": shape, "rank": getattr(d, "rank", None)}
        row = rows.setdefault(tuple(key.values()), key | {"sites": 0, "parameters": 0})
        row["sites"] += 1
        row["parameters"] += d.parameter_count()
    return list(rows.values())


def words(adapter: Adapter) -> str:
    """The table as text, with the share of the model that trains and the adapter's bytes."""
    total = sum(p.numel() for p in adapter.model.parameters())
    own = adapter.parameter_count()
    lines = [f"{adapter.recipe} as {adapter.name!r}: {own:,} parameters train, {own / max(1, total):.2%} of {total:,}"]
    for r in table(adapter):
        rank = "" if r["rank"] is None else f"rank {r['rank']}"
        lines.append(
            f"  {r['role']:<6} {r['form']:<12} {r['shape']:>12}  {rank:<9}× {r['sites']:<4} {r['parameters']:>12,}"
        )
    lines.append(f"  {4 * own / 2**20:.1f} MiB of fp32")
    return "\n".join([*lines, *(f"  note: {n}" for n in adapter.recipe.notes)])
