"""Paired differences with their intervals, and the words they allow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.95
Outcome = Literal["better", "worse", "no difference", "one seed"]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with Student's interval and the two-sided p of a paired t test."""

    mean: float
    low: float
    high: float
    p: float
    pairs: int

    @property
    def claimed(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def difference(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Difference:
    """first − second, pair by pair; a single pair says nothing about chance and has an infinite interval."""
    values = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Difference(mean, -math.inf, math.inf, 1.0, len(values))
    from scipy.stats import t

    freedom, error = len(values) - 1, statistics.stdev(values) / math.sqrt(len(values))
    if error == 0.0:
        return Difference(mean, mean, mean, 1.0 if mean == 0.0 else 0.0, len(values))
    half = float(t.ppf((1 + level) / 2, freedom)) * error
    return Difference(mean, mean - half, mean + half, float(2 * t.sf(abs(mean) / error, freedom)), len(values))


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of a mean; infinite for a single value."""
    d = difference(values, [0.0] * len(values), level)
    return d.low, d.high


def adjusted(ps: Sequence[float]) -> list[float]:
    """Holm's adjustment of p values of several comparisons with one reference."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    found, running = [0.0] * len(ps), 0.0
    for place, i in enumerate(order):
        running = max(running, min(1.0, (len(ps) - place) * ps[i]))
        found[i] = running
    return found


def outcome(d: Difference, p: float, lower_is_better: bool = True) -> Outcome:
    """What a paired difference allows to be said; ``p`` is the adjusted one."""
    if d.pairs < 2:
        return "one seed"
    if not (d.claimed and p < 1 - LEVEL):
        return "no difference"
    return "better" if (d.mean < 0) == lower_is_better else "worse"


def verdict(name: str, reference: str, d: Difference, p: float, measure: str, lower_is_better: bool = True) -> str:
    """One plain sentence on ``name`` against ``reference``; ``p`` is the adjusted one."""
    said = outcome(d, p, lower_is_better)
    if said == "one seed":
        return f"{name} against {reference}: one seed says nothing about chance, so no difference can be claimed"
    span = f"{d.mean:+.3g} [{d.low:+.3g}, {d.high:+.3g}], p = {p:.2g} after Holm, {d.pairs} seeds"
    if said == "no difference":
        return f"{name} against {reference}: no difference in {measure} can be claimed ({span})"
    return f"{name} is {said} than {reference} in {measure} ({span})"
