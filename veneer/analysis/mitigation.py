"""What smaller intruders do to a task and to what was known before, beside the control: the whole change made smaller.

The table that says whether removing directions (system 50) does more than removing as much of everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from veneer.analysis.intruders import Side, detected, scaled
from veneer.core.adapter import Adapter
from veneer.errors import UserError

if TYPE_CHECKING:
    from veneer.io.plain import Factors

FACTORS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)

Scores = dict[str, float]


def tried(
    adapter: Adapter,
    evaluate: Callable[[], Scores],
    factors: Sequence[float] = FACTORS,
    k: int = 10,
    epsilon: float = 0.5,
    side: Side = "left",
) -> list[dict[str, Any]]:
    """For each factor the facts of `mitigated`, ``scores`` with its intruders scaled, and ``control``, those with the
    whole change scaled to the same norm; ``evaluate`` scores the model as it then is.

    Adapter and weights come back as they were. A factor of 1 is the adapter itself.

    Raises:
        UserError: the change is no plain pair somewhere, or it changes biases beside the weights.
    """
    seen = detected(adapter, k, epsilon, side)
    own = [f for f, _ in seen]
    if any(f.extras for f in own):
        raise UserError(f"{adapter.recipe} changes more than weights; scaled intruders are tried on weights alone")
    found = []
    for factor in factors:
        made, facts = scaled(seen, factor)
        with _instead(adapter, made, 1.0):
            scores = evaluate()
        with _instead(adapter, own, facts["uniform"]):
            found.append(facts | {"scores": scores, "control": evaluate()})
    return found


@contextmanager
def _instead(adapter: Adapter, factors: Sequence[Factors], scale: float) -> Iterator[None]:
    """The adapter off, and the changes of ``factors``, scaled, in the weights."""
    kept = []
    with adapter.disabled(), torch.no_grad():
        try:
            for f in factors:
                W = f.site.weight()
                kept.append((f.site, W.clone()))
                f.site.write(W + (scale * f.scale * (f.B @ f.A)).to(W.dtype))
            yield
        finally:
            for site, W in kept:
                site.write(W)
