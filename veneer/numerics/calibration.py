"""How far a classifier's confidence is from how often it is right."""

from __future__ import annotations

import torch
from torch import Tensor


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Σ_b n_b/n · |accuracy(b) − confidence(b)| over bins of equal width of the largest probability, in [0, 1].

    ``probabilities`` (n, classes), each row summing to 1; ``labels`` (n,). A bin is open below and closed above, so a
    confidence of 1 is in the last (Guo et al. 2017, arXiv:1706.04599).
    """
    confidence, chosen = probabilities.double().max(1)
    right = (chosen == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.double, device=right.device).index_add_(0, place, right - confidence)
    return float(gaps.abs().sum() / len(labels))
