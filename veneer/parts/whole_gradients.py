"""What optimisers with a rule of their own ask for: whole gradients, and the loss that a closure gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from veneer.errors import UserError


def refuse_sharded(name: str, tensors: Iterable[Tensor]) -> None:
    """Raise UserError where a tensor is held in shards: the rule of ``name`` needs each gradient whole."""
    if any(hasattr(t, "to_local") for t in tensors):
        raise UserError(f"{name} works on whole gradients, and these are sharded; train without FSDP")


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure of an optimiser's ``step`` gives, run with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
