"""How the batch size moves the largest usable learning rate: curvature inflated by the noise of the batch.

Model (arXiv:2006.09092): the Hessian of a batch is H + E, the bulk of E a semicircle of radius 2√(c/𝔟); 𝔟 is the
effective batch size and c = P·σ² what one sample's Hessian varies by. An eigenvalue λ of H that stands out of the bulk
appears as λ′ = λ + c/(𝔟λ), any other as the bulk's edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from veneer.errors import UserError

Kind = Literal["sgd", "adam"]
ROUNDS = 60  # of the fixed point for λ


def effective_batch(batch: float, rows: float = math.inf) -> float:
    """𝔟 = B/(1 − B/N): as B where the data are many, infinite where the batch is all of them."""
    if not 0 < batch <= rows:
        raise UserError(f"a batch of {batch:g} rows out of {rows:g}: it must hold at least one row and at most all")
    return math.inf if batch == rows else batch / (1 - batch / rows)


def inflated(curvature: float, noise: float, batch: float) -> float:
    """λ′(𝔟) ≥ λ: the largest eigenvalue that a batch shows, for λ ≥ 0, c ≥ 0 and 𝔟 > 0."""
    spread = noise / batch
    return curvature + spread / curvature if curvature > math.sqrt(spread) else 2 * math.sqrt(spread)


def stable_rate(curvature: float, kind: Kind = "sgd", damping: float = 0.0) -> float:
    """The largest stable rate at a measured λ′ > 0: 2/λ′ for SGD, 2(√λ′ + δ)/λ′ for Adam (a reconstruction)."""
    return 2 / curvature if kind == "sgd" else 2 * (math.sqrt(curvature) + damping) / curvature


def critical_batch(curvature: float, noise: float) -> float:
    """𝔟* = c/λ², where the inflation is 2: beyond it larger batches gain at most another factor of 2."""
    return noise / curvature**2


def scale_lr(
    lr: float,
    old: float,
    new: float,
    kind: Kind = "adam",
    rule: Literal["paper", "capped", "measured"] = "paper",
    curvature: float | None = None,
    noise: float | None = None,
) -> float:
    """The rate at batch size ``new`` that corresponds to ``lr`` at ``old``.

    ``paper``: lr·(new/old) for SGD, its root for Adam. ``measured``: λ′(old)/λ′(new), its root for Adam. ``capped``:
    the paper's factor, at most λ′(old)/λ. The last two need λ and c, ``curvature`` and ``noise`` (see `fit_noise`).
    Sizes are effective ones where the data are few.
    """
    ratio = new / old
    if rule != "paper":
        if curvature is None or noise is None:
            raise UserError(f"the {rule} rule needs the curvature and the noise of a probe; the paper's needs neither")
        before = inflated(curvature, noise, old)
        ratio = before / inflated(curvature, noise, new) if rule == "measured" else min(ratio, before / curvature)
    return lr * (ratio if kind == "sgd" else math.sqrt(ratio))


def fit_noise(found: Mapping[float, float]) -> tuple[float, float]:
    """λ and c from mean largest eigenvalues λ′ by effective batch size: at least two sizes.

    λ is that of the largest batch less its own inflation, c the least squares of 𝔟·λ·(λ′ − λ) over the others; the two
    are repeated to a fixed point. c is 0 where nothing is inflated.
    """
    if len(found) < 2:
        raise UserError(f"the noise shows in how the curvature falls with the batch: give two sizes, not {len(found)}")
    largest = max(found)
    curvature, noise = found[largest], 0.0
    for _ in range(ROUNDS):
        samples = [b * curvature * (top - curvature) for b, top in found.items() if b != largest]
        noise = max(0.0, sum(samples) / len(samples))
        spread = 0.0 if math.isinf(largest) else noise / largest
        root = found[largest] ** 2 - 4 * spread  # λ + s/λ = λ′ solved for its larger λ
        curvature = (found[largest] + math.sqrt(root)) / 2 if root > 0 else found[largest] / 2
    return curvature, noise
