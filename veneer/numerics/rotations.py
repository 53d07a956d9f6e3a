"""Block-diagonal rotations, held as D = R − I so that small ones keep their digits in half precision.

A stack of blocks D is (n, b, b) and stands for R = I + blockdiag(D), which acts on rows of n·b numbers.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def skew(entries: Tensor, size: int) -> Tensor:
    """The skew-symmetric (n, b, b) whose upper triangles hold ``entries`` (n, b(b − 1)/2) row by row, b = ``size``."""
    row, column = torch.triu_indices(size, size, 1, device=entries.device)
    upper = entries.new_zeros(entries.shape[0], size, size)
    upper[:, row, column] = entries
    return upper - upper.mT


def cayley(S: Tensor) -> Tensor:
    """R − I of the rotation R = (I − S)(I + S)⁻¹ for a skew-symmetric S (…, b, b): it is −2S(I + S)⁻¹."""
    one = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return torch.linalg.solve(one + S, -2 * S, left=False)


def cayley_neumann(S: Tensor, terms: int) -> Tensor:
    """R − I for (I + S)(I − S)⁻¹ cut after ``terms`` ≥ 2 terms: 2S, then 2S + 2S² + … with the last power once.

    The opposite turn of `cayley`, orthogonal up to about 2‖S‖^(terms − 1); the series diverges for ‖S‖ ≥ 1. As in PEFT,
    three terms are four.
    """
    last = 1 if terms == 2 else max(terms - 1, 3)
    with torch.autocast(S.device.type, enabled=False):
        power, total = S, 2 * S
        for k in range(2, last + 1):
            power = power @ S
            total = total + (power if k == last else 2 * power)
    return total


def turn(x: Tensor, D: Tensor) -> Tensor:
    """x·R for x (…, n·b) and D (n, b, b) of the same type. Backward keeps x as it came, and D."""
    rows = x.reshape(-1, D.shape[0], D.shape[1]).transpose(0, 1)
    return torch.baddbmm(rows, rows, D).transpose(0, 1).reshape(x.shape)


@cache
def nearest_divisor(n: int, wanted: int, multiple: int = 1) -> int:
    """The b nearest to ``wanted`` such that b·``multiple`` divides n, the smaller of two; 0 where there is none."""
    fitting = (b for b in range(1, n // multiple + 1) if n % (b * multiple) == 0)
    return min(fitting, key=lambda b: (abs(b - wanted), b), default=0)
