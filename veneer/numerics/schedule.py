"""The learning rate over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """What only the run knows: the number of optimiser steps, the rate, the warm-up (steps) and the shape.

    Besides: micro-batches a step, the norm that gradients are clipped to, and the number of processes.
    """

    steps: int
    lr: float = 2e-4
    warmup: int = 0
    kind: Literal["linear", "cosine", "constant", "inverse-sqrt"] = "linear"
    floor: float = 0.0
    accumulate: int = 1
    clip: float | None = None
    processes: int = 1

    def factor(self, step: int, start: int = 0) -> float:
        """The share of ``lr`` at optimiser step ``step`` (from 0) for a group whose clock began at ``start``."""
        t, total = step - start, max(1, self.steps - start)
        if t < self.warmup:
            return (t + 1) / (self.warmup + 1)
        left = max(0.0, (total - t) / max(1, total - self.warmup))
        shape = {
            "linear": left,
            "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))),
            "constant": 1.0,
            "inverse-sqrt": math.sqrt((self.warmup + 1) / (t + 1)),
        }[self.kind]
        return self.floor + (1 - self.floor) * shape
