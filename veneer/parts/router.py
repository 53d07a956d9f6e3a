"""Routers: small networks that decide, kept in fp32 whatever the model is cast to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Router(nn.Module):
    """A module whose tensors follow the model to a device but keep their type: decisions are taken in fp32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)
