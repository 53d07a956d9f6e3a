"""A model of one layer with an adapter on it: the smallest place where a form can be seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import veneer
from veneer.core.delta import Delta


class Single(NamedTuple):
    """A model of one layer, its adapter and the delta at the layer."""

    model: nn.Sequential
    adapter: veneer.Adapter
    delta: Delta

    @property
    def layer(self) -> nn.Module:
        """The layer."""
        return self.model[0]


def linear(W: Any, b: Any = None) -> nn.Linear:
    """A linear layer with this weight (out, in) and bias (out,)."""
    W = torch.as_tensor(W, dtype=torch.float32)
    layer = nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    layer.weight.data = W.clone()
    if b is not None:
        layer.bias.data = torch.as_tensor(b, dtype=torch.float32)
    return layer


def single(layer: nn.Module, recipe: str, **options: Any) -> Single:
    """Attach a recipe to a layer."""
    model = nn.Sequential(layer)
    adapter = veneer.attach(model, recipe, **({"sites": "all"} | options))
    return Single(model, adapter, next(iter(adapter.deltas.values())))


def stirred(adapter: veneer.Adapter, size: float = 0.3) -> None:
    """Move the trained tensors away from their start."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=g))


def put(delta: nn.Module, **tensors: Any) -> None:
    """Write tensors of a delta."""
    with torch.no_grad():
        for name, value in tensors.items():
            getattr(delta, name).copy_(torch.as_tensor(value, dtype=torch.float32))


def gradients(y: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a fixed random weighting of ``y``."""
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return torch.autograd.grad((y * g).sum(), tensors)
