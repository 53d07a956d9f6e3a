"""What the runs of a comparison say: means, intervals, paired tests, and plain words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from veneer.analysis.paired import adjusted, difference, interval, verdict

MEASURES = {  # name → whether lower is better
    "held_out_loss": True,
    "exact": False,
    "edits": True,
    "accuracy": False,
    "macro_f1": False,
    "pearson": False,
    "spearman": False,
    "general_loss": True,
    "drift": True,
    "seconds": True,
    "peak_memory": True,
    "parameters": True,
}
TESTED = {
    "held_out_loss": "held-out loss",
    "exact": "exact answers",
    "accuracy": "accuracy",
    "pearson": "Pearson correlation",
    "general_loss": "loss on general text",
}


def summary(
    recipes: Sequence[str], finals: Sequence[dict[str, Any]], searched: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """``rows``, one a recipe (means, intervals, the rate, the search's cost), ``words``, what may be said, and
    ``claims``, those of them that a test backs, by measure.

    Differences are paired by seed, against the first recipe; Holm's adjustment over the recipes of one measure.
    """
    runs = {r: [f for f in finals if f["recipe"] == r] for r in recipes}
    rows = [_row(r, runs[r], [s for s in searched if s["recipe"] == r]) for r in recipes]
    words = [f"{r['recipe']}: {len(r['failed'])} of its runs failed ({r['failed'][0]})" for r in rows if r["failed"]]
    claims = {name: _tested(recipes, runs, measure, name) for measure, name in TESTED.items()}
    claims = {name: found for name, found in claims.items() if found}
    words += [sentence for found in claims.values() for sentence in found]
    return {
        "rows": rows,
        "words": words,
        "claims": claims,
        "runs": [{k: v for k, v in f.items() if k != "curve"} for f in finals],
    }


def _row(recipe: str, runs: Sequence[dict[str, Any]], searched: Sequence[dict[str, Any]]) -> dict[str, Any]:
    whole = [r for r in runs if "failed" not in r]
    row: dict[str, Any] = {
        "recipe": recipe,
        "seeds": len(whole),
        "failed": [r["failed"] for r in runs if "failed" in r],
    }
    for measure in MEASURES:
        values = [r[measure] for r in whole if r.get(measure) is not None]
        if values:
            low, high = interval(values)
            row[measure] = {"mean": statistics.fmean(values), "low": low, "high": high, "values": values}
    first = whole[0] if whole else runs[0]
    row |= {"rank": first["rank"], "lr": first.get("lr_used", first["lr"]), "steps": first.get("steps_done")}
    row["tokens"] = first.get("tokens")
    row["search"] = {"runs": len(searched), "seconds": sum(s.get("seconds_whole", 0.0) for s in searched)}
    return row


def _tested(recipes: Sequence[str], runs: dict[str, list[dict[str, Any]]], measure: str, name: str) -> list[str]:
    reference, *others = recipes
    by_seed = {r: {f["seed"]: f[measure] for f in runs[r] if f.get(measure) is not None} for r in recipes}
    found = []
    for other in others:
        seeds = sorted(set(by_seed[reference]) & set(by_seed[other]))
        if seeds:
            d = difference([by_seed[other][s] for s in seeds], [by_seed[reference][s] for s in seeds])
            found.append((other, d))
    ps = adjusted([d.p for _, d in found])
    return [verdict(other, reference, d, p, name, MEASURES[measure]) for (other, d), p in zip(found, ps)]
