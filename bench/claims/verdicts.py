"""Rules by which a claim is shown or not: each looks at the results and gives a finding with its numbers in words.

Differences are paired by seed (same base, same batches in the same order) and come with Student's 95 % interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

LEVEL = 0.95


class Results(Protocol):
    """What a rule may ask, see ``harness.Results``."""

    def values(self, label: str, measure: str = "test", rate: float | None = None) -> list[float]: ...


@dataclass(frozen=True)
class Finding:
    """Whether a rule holds (None: this size cannot tell), in words with the numbers."""

    holds: bool | None
    words: str


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with its interval."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{number(self.mean, '+')} [{number(self.low, '+')}, {number(self.high, '+')}]"


Rule = Callable[[Results], Finding]


def difference(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Difference:
    """Mean of first − second, pair by pair, and Student's interval; one pair alone has an infinite one."""
    values = tuple(a - b for a, b in zip(first, second, strict=True))
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Difference(mean, -math.inf, math.inf, values)
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Difference(mean, mean - half, mean + half, values)


def spread(values: Sequence[float]) -> str:
    """``0.873 ± 0.012``: mean and standard deviation over the seeds."""
    mean = statistics.fmean(values)
    return f"{number(mean)} ± {statistics.stdev(values):.2g}" if len(set(values)) > 1 else number(mean)


def number(value: float, sign: str = "") -> str:
    """Four significant digits, no exponent for large ones."""
    return f"{value:{sign},.0f}" if 1000 <= abs(value) < math.inf else f"{value:{sign}.4g}"


def above(first: str, second: str, by: float = 0.0, on: str = "test", rate: float | None = None) -> Rule:
    """The whole interval of first − second lies above ``by``; a negative ``by`` says "no worse by more than".

    ``on`` names the measure. ``rate`` compares at that learning rate in place of each contestant's best.
    """

    def rule(results: Results) -> Finding:
        return _compared(results, first, second, by, on, rate, upwards=True)

    return rule


def below(first: str, second: str, by: float = 0.0, on: str = "test", rate: float | None = None) -> Rule:
    """The whole interval of first − second lies below −``by``; a negative ``by`` says "no more by more than"."""

    def rule(results: Results) -> Finding:
        return _compared(results, first, second, by, on, rate, upwards=False)

    return rule


def level(first: str, second: str, margin: float, on: str = "test", rate: float | None = None) -> Rule:
    """The whole interval of first − second lies within ± ``margin``."""

    def rule(results: Results) -> Finding:
        found = difference(results.values(first, on, rate), results.values(second, on, rate))
        words = _words(results, first, second, on, rate, found)
        return Finding(-margin < found.low and found.high < margin, f"{words}; within ±{margin:g} was needed")

    return rule


def at_least(label: str, bound: float, on: str = "test", rate: float | None = None) -> Rule:
    """The measure is at least ``bound`` on every seed."""

    def rule(results: Results) -> Finding:
        values = results.values(label, on, rate)
        return Finding(min(values) >= bound, f"{on} of {label} is {spread(values)}; at least {bound:g} was needed")

    return rule


def at_most(label: str, bound: float, on: str = "test", rate: float | None = None) -> Rule:
    """The measure is at most ``bound`` on every seed."""

    def rule(results: Results) -> Finding:
        values = results.values(label, on, rate)
        return Finding(max(values) <= bound, f"{on} of {label} is {spread(values)}; at most {bound:g} was needed")

    return rule


def once_learned(label: str, chance: float, rule: Rule) -> Rule:
    """``rule``, where some run ends below the loss of guessing; where none does nothing can be told."""

    def judged(results: Results) -> Finding:
        losses = results.values(label)
        if min(losses) > chance:
            return Finding(None, f"{label} learn nothing here: test {spread(losses)}, chance {chance:.3g}")
        return rule(results)

    return judged


def every(*rules: Rule) -> Rule:
    """All rules hold; one that cannot tell makes the whole unable to, unless another fails."""

    def rule(results: Results) -> Finding:
        found = [r(results) for r in rules]
        holds = [f.holds for f in found]
        return Finding(False if False in holds else None if None in holds else True, "; ".join(f.words for f in found))

    return rule


def _compared(
    results: Results, first: str, second: str, by: float, on: str, rate: float | None, upwards: bool
) -> Finding:
    found = difference(results.values(first, on, rate), results.values(second, on, rate))
    holds = found.low > by if upwards else found.high < -by
    needed = f"above {by:g}" if upwards else f"below {-by + 0.0:g}"
    return Finding(holds, f"{_words(results, first, second, on, rate, found)}; {needed} was needed")


def _words(results: Results, first: str, second: str, on: str, rate: float | None, found: Difference) -> str:
    a, b = spread(results.values(first, on, rate)), spread(results.values(second, on, rate))
    where = "" if rate is None else f" at lr {rate:g}"
    return f"{on} of {first} {a} against {second} {b}{where}: difference {found}"
