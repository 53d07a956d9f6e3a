"""Routers: small networks that decide, kept in fp32 whatever the model is cast to."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from veneer.core.adapter import root_of
from veneer.core.context import Context
from veneer.models import architecture
from veneer.parts.trunk import beside


class Router(nn.Module):
    """A module whose tensors follow the model to a device but keep their type: decisions are taken in fp32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)


@torch.no_grad()
def base_pass(ctx: Context) -> Tensor:
    """The trunk's last hidden state (…, tokens, d) in the pass under way, with every adapter off.

    When decoding, the base has a key-value cache of its own, which hangs on the call's.
    """
    model, _, args, kwargs = ctx.call
    trunk, switch = architecture.trunk(model), root_of(model).switch
    known = inspect.signature(trunk.forward).parameters
    call = {k: v for k, v in kwargs.items() if k in known and k != "labels"}
    if call.get("past_key_values") is not None:
        call["past_key_values"] = beside(call["past_key_values"], "the base's pass")
    with switch.without(*switch.names):
        out = trunk(*args, **call)
    return out if isinstance(out, Tensor) else out[0]
