"""What an attention module of transformers attends to, seen while it runs, whichever kernel computes it.

The module runs as it is, through an attention function that notes queries, keys, values and mask and hands on to the
one that the model was set to; probabilities are formed again from them, ahead of dropout, when they are asked for.
Modules that multiply by themselves and return their probabilities (BLIP's text model) are seen by what they return.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import UserError

NAME = "veneer_noted"  # of the attention function that notes
KNOWN = ("sdpa", "eager", None)


class Attention:
    """One call of an attention module.

    ``query`` (batch, heads, n_q, d_h); ``value`` (batch, heads, n_k, d_h), those of a key-value cache among them, and
    repeated where heads share them; ``probabilities`` (batch, heads, n_q, n_k) in fp32.
    """

    def __init__(self) -> None:
        self.query: Tensor | None = None
        self.value: Tensor | None = None
        self._form: Callable[[], Tensor] | None = None

    def note(self, query: Tensor, value: Tensor, form: Callable[[], Tensor]) -> None:
        """Take over what a call computes with."""
        self.query, self._form = query, form
        self.value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)

    def probabilities(self) -> Tensor:
        """The attention weights before dropout."""
        assert self._form is not None
        return self._form()


class _Watch:
    def __init__(self, own: dict[nn.Module, str | None]) -> None:
        self.own, self.seen = own, Attention()


_watch: ContextVar[_Watch | None] = ContextVar("veneer_attention", default=None)


@contextmanager
def watched(module: nn.Module, layers: dict[str, nn.Module]) -> Iterator[Attention]:
    """Within it the attention that runs inside of ``module`` is noted; ``layers`` are its inner layers by role.

    Raises UserError for a kernel that takes no mask apart (flash attention and the like).
    """
    _register()
    own: dict[nn.Module, Any] = {}
    for inner in module.modules():
        config = inner.__dict__.get("config")
        if hasattr(config, "_attn_implementation_internal"):
            if config._attn_implementation not in KNOWN:
                raise UserError(
                    f"the attention weights cannot be seen under attn_implementation={config._attn_implementation!r}; "
                    "load the model with attn_implementation='sdpa' or 'eager'"
                )
            own[inner] = config
    watch = _Watch({inner: config._attn_implementation for inner, config in own.items()})
    handles = _hooks(module, layers, watch.seen)
    token = _watch.set(watch)
    try:
        for inner, config in own.items():
            shadow = copy.copy(config)
            shadow.__dict__["_attn_implementation_internal"] = NAME
            inner.__dict__["config"] = shadow
        yield watch.seen
    finally:
        _watch.reset(token)
        for inner, config in own.items():
            inner.__dict__["config"] = config
        for h in handles:
            h.remove()


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _noting)


def _noting(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    watch = _watch.get()
    assert watch is not None
    name = watch.own[module]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(causal and name == "sdpa" and mask is None and query.shape[2] > 1)
    facts = {k: kwargs.get(k) for k in ("scaling", "position_bias", "softcap")}
    seen = query.shape[2] if causal else key.shape[2]  # an empty static cache behind it
    watch.seen.note(query, value[:, :, :seen], lambda: _weights(query, key[:, :, :seen], mask, causal, **facts))
    return _function(module, name)(module, query, key, value, mask, **kwargs)


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    position_bias: Tensor | None,
    softcap: float | None,
) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    low = torch.finfo(scores.dtype).min
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias[..., : key.shape[2]].float()
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), low)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else (scores + mask.float()).clamp_min(low)
    return scores.softmax(-1)


def _function(module: nn.Module, name: str | None) -> Callable[..., Any]:
    """The attention function that the model was set to."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in ("eager", None):
        return ALL_ATTENTION_FUNCTIONS[name]
    homes = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    return next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))


def _hooks(module: nn.Module, layers: dict[str, nn.Module], seen: Attention) -> list[Any]:
    """For modules that return their probabilities: the outputs of the projections, and of what holds them."""
    made: dict[str, Tensor] = {}
    owner = next((m for m in module.modules() if any(child is layers.get("v") for child in m.children())), None)
    if owner is None or not {"q", "v"} <= layers.keys() or layers["q"] is layers["v"]:
        return []

    def note(role: str) -> Callable[..., None]:
        return lambda m, a, y: made.__setitem__(role, y)

    def returned(m: nn.Module, a: tuple, output: Any) -> None:
        P = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if seen.query is not None or not isinstance(P, Tensor) or P.ndim != 4 or "v" not in made:
            return
        q, v = (made[r].unflatten(-1, (P.shape[1], -1)).transpose(1, 2) for r in ("q", "v"))
        if v.shape[2] != P.shape[3]:
            raise UserError(
                f"{type(module).__name__} keeps its values in a cache that cannot be seen; run it with use_cache=False"
            )
        seen.note(q, v, lambda: P.float())

    if owner is module:  # its output projection has run when it returns
        return []
    hooks = [layers[role].register_forward_hook(note(role)) for role in ("q", "v")]
    return [*hooks, owner.register_forward_hook(returned)]
