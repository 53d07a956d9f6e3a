"""Which of several replicas answers a request: the adapter's own one, unless that has too much to do.

Rendezvous hashing gives every adapter an order of all replicas, of which only those that lead with a lost one change.
An adapter so is in few pools, and its requests find its factors and its prefixes there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def home(adapter: str, count: int) -> list[int]:
    """The replicas 0 … count − 1 in the order in which an adapter prefers them."""

    def weight(n: int) -> bytes:
        return hashlib.blake2b(f"{n}/{adapter}".encode(), digest_size=8).digest()

    return sorted(range(count), key=weight)


def adapter_of(model: object) -> str | None:
    """What a request's ``model`` is routed by: the name, of a blend the first of its names; None for no name."""
    if not isinstance(model, str):
        return None
    names = sorted(part.partition("*")[0].strip() for part in model.split("+"))
    return names[0] or None


def choose(adapter: str | None, loads: Sequence[int], spread: int = 8) -> int:
    """The replica for an adapter, given how many requests each has under way.

    The first in the adapter's order that has at most ``spread`` more than the least busy one; without an adapter (None,
    which is the base) the least busy one.
    """
    least = min(loads)
    if adapter is None:
        return loads.index(least)
    return next(n for n in home(adapter, len(loads)) if loads[n] <= least + spread)
