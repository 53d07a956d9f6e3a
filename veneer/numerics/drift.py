"""How far a model's predictions moved, what a budget of drift allows, and an edit carried over to a larger model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def drift(logits: Tensor, reference: Tensor, mask: Tensor | None, reduction: str = "batch") -> Tensor:
    """Σ p₀·(log p₀ − log p) over the positions of ``mask`` (B, T), divided by B, or by their number, 0-dim in fp32."""
    keep = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask.bool()
    q, p = (t[keep].float().log_softmax(-1) for t in (logits, reference))
    return F.kl_div(q, p, log_target=True, reduction="sum") / (len(logits) if reduction == "batch" else len(q))


def last_within(losses: Sequence[float], budget: float) -> int:
    """The last index whose loss is below (1 + budget) times the first; 0, the first itself, where no other is."""
    return max((k for k, loss in enumerate(losses) if loss < losses[0] * (1 + budget)), default=0)


def ensemble(logits: Tensor, tuned: Tensor, before: Tensor, weight: float) -> Tensor:
    """Log-probabilities of a model with the edit of a smaller one of the same vocabulary, from logits (…, V) of each.

    log p ∝ logits + w·(log p_tuned − log p_before).
    """
    return (logits + weight * (tuned.log_softmax(-1) - before.log_softmax(-1))).log_softmax(-1)


def largest_weight(general_loss: Callable[[float], float], budget: float) -> float:
    """The largest w of 1.0, 0.9, … whose general loss is within the budget of that at 0; 0 where none is."""
    limit = general_loss(0.0) * (1 + budget)
    return next((k / 10 for k in range(10, 0, -1) if general_loss(k / 10) < limit), 0.0)
