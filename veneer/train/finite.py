"""Where a loss or gradient that is not finite came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.errors import UserError

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


class NotFiniteError(UserError):
    """A loss or gradient that is not finite stopped the run."""


def culprit(adapter: Adapter, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]) -> str | None:
    """The site whose output, or else whose gradient, is the first that is not finite, in words; None if all are.

    Runs the batches again, forward and backward, with every site watched. Gradients of the parameters are dropped.
    """
    for name, p in adapter.named_parameters():
        if not torch.isfinite(p).all():
            return f"the weights of {name} are not finite already"
    return next((said for batch in batches if (said := _watched(adapter, batch, loss)) is not None), None)


def _watched(adapter: Adapter, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> str | None:
    found: dict[str, str] = {}

    def watch(path: str) -> Callable[[nn.Module, tuple, Any], None]:
        def after(module: nn.Module, args: tuple, out: Any) -> None:
            y = out[0] if isinstance(out, tuple) else out
            if not isinstance(y, Tensor) or not y.is_floating_point():
                return
            x = args[0] if args and isinstance(args[0], Tensor) else None
            if x is not None and x.is_floating_point() and not torch.isfinite(x).all():
                found.setdefault("forward", f"the input of {path} is not finite already")
            elif not torch.isfinite(y).all():
                found.setdefault("forward", f"the output of {path} is the first that is not finite")
            if y.requires_grad:
                y.register_hook(lambda g: check(path, g))

        return after

    def check(path: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            found.setdefault("backward", f"the gradient at the output of {path} is the first that is not finite")

    modules = {s.module_path: s.module for s in adapter.sites}
    handles = [m.register_forward_hook(watch(path)) for path, m in modules.items()]
    try:
        value = loss(adapter.model, batch)
        if "forward" in found:
            return found["forward"]
        if not torch.isfinite(value):
            return "the loss itself is not finite while the output of every site is"
        value.backward()
        if "backward" in found:
            return found["backward"]
        for name, p in adapter.named_parameters():
            if p.grad is not None and not torch.isfinite(p.grad).all():
                return f"the gradient of {name} is the first that is not finite"
        return None
    finally:
        for handle in handles:
            handle.remove()
        for p in adapter.parameters():
            p.grad = None
