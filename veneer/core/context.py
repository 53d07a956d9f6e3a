"""What a forward pass of the whole model carries besides its input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

KEY = "veneer_context"
_current: ContextVar[Context | None] = ContextVar("veneer_context", default=None)


class Context:
    """One forward pass: row choices, masks, things computed once, auxiliary losses.

    ``mask`` is the call's attention mask, ``rows`` an adapter choice per row (−1: the base), ``tasks`` and ``users``
    ids per row, ``draw`` the number of this pass among the training passes, which seeds what a delta draws, and
    ``call`` the pass itself: (model, module, args, kwargs). After the pass it is closed: what a recomputed block
    appends then is ignored.
    """

    def __init__(self, *, training: bool = False, draw: int = 0, **facts: Any) -> None:
        self.training, self.draw = training, draw
        self.mask: Tensor | None = facts.pop("mask", None)
        self.rows: Tensor | None = facts.pop("rows", None)
        self.tasks: Tensor | None = facts.pop("tasks", None)
        self.users: Tensor | None = facts.pop("users", None)
        self.facts, self.call, self.closed = facts, None, False
        self.kept: dict[Any, Any] = {}
        self.losses: dict[str, list[Tensor]] = {}
        self.stats: dict[str, list[Any]] = {}

    def keep(self, key: Any, value: Any) -> Any:
        """Store what is computed once in this pass, for the blocks to read from ``kept``."""
        self.kept[key] = value
        return value

    def add_loss(self, name: str, value: Tensor) -> None:
        """Append an auxiliary loss; ignored while a block is recomputed for the backward pass."""
        if not self.closed:
            self.losses.setdefault(name, []).append(value)

    def add_stat(self, name: str, value: Any) -> None:
        """Append a statistic of this pass; ignored in recomputation."""
        if not self.closed:
            self.stats.setdefault(name, []).append(value)

    def total_loss(self) -> Tensor | None:
        """The sum of all auxiliary losses, or None when there is none."""
        values = [v for group in self.losses.values() for v in group]
        return torch.stack([v.float() for v in values]).sum() if values else None


def current() -> Context | None:
    """The context of the forward pass under way, or None outside of one."""
    return _current.get()


activate, deactivate = _current.set, _current.reset  # make a context the current one, and undo it


@contextmanager
def using(context: Context | None) -> Iterator[Context | None]:
    """Make ``context`` the current one."""
    token = activate(context)
    try:
        yield context
    finally:
        deactivate(token)
