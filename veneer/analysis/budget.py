"""Equal budgets: how many steps, and which rank, give every recipe the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from veneer.errors import UserError

KINDS = ("steps", "tokens", "seconds")
LARGEST = 4096  # rank tried when parameters are to be matched


@dataclass(frozen=True)
class Budget:
    """What every run may spend: optimiser ``steps``, useful ``tokens`` or ``seconds`` of training, one of them; and
    besides, with ``parameters``, as many trained numbers as that at most."""

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        given = [k for k in KINDS if getattr(self, k) is not None]
        if len(given) != 1:
            said = " and ".join(f"{k}={getattr(self, k)}" for k in given) or "none"
            raise UserError(f"a comparison has one budget, steps, tokens or seconds; {said} was given")
        for name in (*given, "parameters"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"the budget is {name}={value}; a number above 0 was expected")

    def __str__(self) -> str:
        kind = next(k for k in KINDS if getattr(self, k) is not None)
        text = f"{getattr(self, kind):,} {kind}"
        return text if self.parameters is None else f"{text}, at most {self.parameters:,} parameters"


def steps_for_tokens(tokens: int, per_batch: Callable[[int], int]) -> int:
    """The fewest steps whose batches hold ``tokens`` useful tokens; ``per_batch(k)`` are those of step k's batch.

    All recipes see the same batches, so one number serves them all.
    """
    seen = steps = 0
    while seen < tokens:
        seen += per_batch(steps)
        steps += 1
    return steps


def rank_within(count: Callable[[int], int], parameters: int) -> int:
    """The largest rank (1 … 4096) whose ``count(rank)`` trained numbers are at most ``parameters``.

    Raises:
        UserError: rank 1 has more already.
    """
    least = count(1)
    if least > parameters:
        raise UserError(f"rank 1 trains {least:,} numbers already and the budget is {parameters:,}; raise it")
    low, high = 1, 2
    while high <= LARGEST and count(high) <= parameters:
        low, high = high, 2 * high
    high = min(high, LARGEST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    return low


def takes_rank(recipe: Any) -> bool:
    """Whether a parsed recipe has a part with a rank that the recipe itself leaves open."""
    from veneer.fields import fields_of

    parts = [p for p in recipe.parts if "rank" in fields_of(p.method.cls)]
    return bool(parts) and not any("rank" in p.fields for p in parts)
