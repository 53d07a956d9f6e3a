"""The guarantee that what is admitted never outgrows the pool: the peak over all future finishing times."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def peak(held: Sequence[int], left: Sequence[int], size: int = 1) -> int:
    """The most pages of ``size`` tokens that requests need at once, each growing by one token a step until it ends.

    ``held`` are tokens now, ``left`` those still to come. Right after the request with the i-th most to come has grown
    to its end, it and those with more to come are there: ``need = max_i Σ_{j ≤ i} ⌈(held_j + left_i) / size⌉``.
    """
    if not len(held):
        return 0
    held, left = np.asarray(held), np.asarray(left)
    order = np.argsort(-left, kind="stable")
    held, left = held[order], left[order]
    pages = -(-(held[None, :] + left[:, None]) // size)
    return int(np.tril(pages).sum(1).max())


@dataclass
class Room:
    """What there is room for.

    Args:
        capacity: units of the pool that requests and their adapters may take (cells, or pages).
        cost: units of the adapters of a request's blend, by name.
        size: tokens a unit.
        most: requests at once.
        prompts: prompt tokens that one admission may bring.
        ahead: tokens by which a new request is ahead of the others after its prompt: 1 where the others wait for it.
    """

    capacity: int
    cost: Callable[[Hashable], Iterable[tuple[Hashable, int]]]
    size: int = 1
    most: int = 1000
    prompts: int = 1 << 30
    ahead: int = 1

    def fits(self, running: Sequence[Any], new: Sequence[Any]) -> bool:
        """Whether the new requests can join the running ones and all can run to their limits."""
        if len(running) + len(new) > self.most:
            return False
        if len(new) > 1 and sum(len(r.prompt) for r in new) > self.prompts:
            return False
        adapters = dict(pair for r in (*running, *new) for pair in self.cost(r.adapter))
        held = [r.length for r in running] + [r.length + self.ahead for r in new]
        left = [r.left - 1 for r in running] + [r.left - 1 for r in new]
        return peak(held, left, self.size) < self.capacity - sum(adapters.values())
