"""What the runs of a comparison say: means, intervals, paired tests, and plain words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from veneer.analysis.paired import adjusted, difference, interval, outcome, verdict

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
BEFORE = {"held_out_loss": "held_out_before", "general_loss": "general_loss_base"}  # measure → what a run calls it


def summary(
    recipes: Sequence[str], finals: Sequence[dict[str, Any]], searched: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """``rows``, one a recipe (means, intervals, the rate, the search's cost), ``before``, what the first recipe's runs
    started from, ``tests``, by measure in which any two differ, a dict for each recipe but the first, ``words``, what
    may be said sentence by sentence, and ``short``, that in a few.

    Differences are paired by seed, against the first recipe; Holm's adjustment over the recipes of one measure.
    """
    runs = {r: [f for f in finals if f["recipe"] == r] for r in recipes}
    rows = [_row(r, runs[r], [s for s in searched if s["recipe"] == r]) for r in recipes]
    failed = [f"{r['recipe']}: {len(r['failed'])} of its runs failed ({r['failed'][0]})" for r in rows if r["failed"]]
    tests = {name: _tested(recipes, runs, measure, name) for measure, name in TESTED.items()}
    tests = {name: found for name, found in tests.items() if found}
    differ = {name: found for name, found in tests.items() if any(t["low"] or t["high"] for t in found)}
    first = next((f for f in runs[recipes[0]] if "failed" not in f), {})
    return {
        "rows": rows,
        "before": {measure: first[name] for measure, name in BEFORE.items() if first.get(name) is not None},
        "tests": differ,
        "words": failed + [test["sentence"] for found in differ.values() for test in found],
        "short": failed + [_short(name, found, rows) for name, found in tests.items()] + _cheapest(rows),
        "runs": [{k: v for k, v in f.items() if k not in ("curve", "versions", "hardware")} for f in finals],
    }


def _short(name: str, tests: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """What the tests of one measure come to, in one sentence."""
    reference, seeds = tests[0]["against"], max(test["pairs"] for test in tests)
    by = {said: [t["recipe"] for t in tests if t["outcome"] == said] for said in ("better", "worse")}
    claims = [f"{_listed(own)} {'is' if len(own) == 1 else 'are'} {said}" for said, own in by.items() if own]
    head = name[0].upper() + name[1:]
    if seeds < 2:
        return f"{head}: one seed says nothing about chance; no difference can be claimed."
    if claims:
        rest = sum(t["outcome"] in ("no difference", "one seed") for t in tests)
        also = f"; no difference can be claimed for {'the other' if rest == 1 else f'the other {rest}'}" if rest else ""
        return f"{head}: {' and '.join(claims)} than {reference}{also}."
    measure = next(m for m, words in TESTED.items() if words == name)
    known = [(row[measure]["mean"], row["recipe"]) for row in rows if measure in row]
    if len({mean for mean, _ in known}) == 1:
        return f"{head}: {known[0][0]:.4g} for all."
    mean, best = (min if MEASURES[measure] else max)(known)
    best = f"{reference}'s own" if best == reference else f"{best}'s"
    return (
        f"{head}: no difference from {reference} can be claimed; the best mean is {best}, {mean:.4g}, and with {seeds} "
        "seeds that may be chance."
    )


def _cheapest(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which recipe took least time and which least memory, where there are several."""
    known = [row for row in rows if "seconds" in row and "peak_memory" in row]
    if len(known) < 2:
        return []
    quick, small = (min(known, key=lambda row, m=m: row[m]["mean"]) for m in ("seconds", "peak_memory"))
    time, room = (
        f"{quick['seconds']['mean']:.0f} s a run",
        f"{small['peak_memory']['mean'] / 2**30:.2f} GiB at its peak",
    )
    if quick is small:
        return [f"Cheapest: {quick['recipe']}, with {time} and {room}."]
    return [f"Cheapest in time: {quick['recipe']}, {time}; in memory: {small['recipe']}, {room}."]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


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


def _tested(
    recipes: Sequence[str], runs: dict[str, list[dict[str, Any]]], measure: str, name: str
) -> list[dict[str, Any]]:
    reference, *others = recipes
    by_seed = {r: {f["seed"]: f[measure] for f in runs[r] if f.get(measure) is not None} for r in recipes}
    found = []
    for other in others:
        seeds = sorted(set(by_seed[reference]) & set(by_seed[other]))
        if seeds:
            d = difference([by_seed[other][s] for s in seeds], [by_seed[reference][s] for s in seeds])
            found.append((other, d))
    ps, lower = adjusted([d.p for _, d in found]), MEASURES[measure]
    return [
        {
            "recipe": other,
            "against": reference,
            **asdict(d),
            "p": p,
            "outcome": outcome(d, p, lower),
            "sentence": verdict(other, reference, d, p, name, lower),
        }
        for (other, d), p in zip(found, ps)
    ]
