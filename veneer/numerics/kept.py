"""A value that follows from a few tensors, kept where no gradient is wanted until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Kept:
    """Calls a function of some tensors, but when nothing has changed since the last call without gradients.

    Decoding runs a layer once a token: what is assembled from trained factors should not be assembled again each time.
    Trained tensors are compared by value, as they may be written past autograd's count of versions; frozen ones, which
    are large, by storage and version, and where one of them trains after all nothing is kept. Copies and pickles start
    empty.
    """

    def __init__(self) -> None:
        self._seen: tuple[tuple[Tensor, ...], list[Any]] | None = None
        self._value: Any = None

    def __call__(self, make: Callable[[], Any], trained: Sequence[Tensor], frozen: Sequence[Tensor] = ()) -> Any:
        """``make()``, or what it gave before."""
        if torch.is_grad_enabled() or any(t.is_inference() or t.requires_grad for t in frozen):
            self._seen = self._value = None
            return make()
        places = [(t.data_ptr(), t._version, t.dtype) for t in frozen]
        if self._seen is None or places != self._seen[1] or not _equal(trained, self._seen[0]):
            self._value, self._seen = make(), (tuple(t.detach().clone() for t in trained), places)
        return self._value

    def __reduce__(self) -> tuple:
        return Kept, ()


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(some, others)
    )
