"""Which adapter leaves the pool when pages run out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def least_recent(candidates: Sequence[Any], now: float) -> list[Any]:
    """The longest unused first."""
    return sorted(candidates, key=lambda e: e.used)


def least_worth(candidates: Sequence[Any], now: float) -> list[Any]:
    """First those that are least to read again: the longest idle over pages times the expected rate of use."""
    return sorted(candidates, key=lambda e: -(now - e.used + 1e-3) / (e.size * (e.rate + 1e-6)))


EVICTION = {"lru": least_recent, "cost": least_worth}
