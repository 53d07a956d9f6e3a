"""The fused low-rank product: ``y = g ∘ (x Wᵀ + s (x Aᵀ) Bᵀ) + b`` as one autograd function.

Beside the base product it writes nothing of the size of ``x`` or ``y``: the low-rank part is added into the base
product, ``x`` is kept as it came (the tensor that the layer before made), and dropout is replayed from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.numerics import lowrank
from veneer.numerics.dropout import keep_mask
from veneer.numerics.lowrank import Branch, Factors

Weight = Tensor | Callable[[], Tensor] | None


def lowrank_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: int | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """A linear layer with a low-rank change: ``y = gain ∘ (x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ) + bias``.

    Args:
        x: ``(…, in)``.
        weight: ``W (out, in)``, or a function that gives it (quantised storage); such a function is called again in
            backward, so that no dense copy is kept. A weight that trains takes the plain expression instead. None
            leaves the low-rank part alone.
        bias: ``(out,)`` or None.
        A: ``(r, in)``, in fp32 or in the compute precision; its gradient has its own precision.
        B: ``(out, r)``, likewise.
        scale: ``s``, a number.
        dropout: share of ``x`` dropped before ``A``, in [0, 1); 0 outside training.
        seed: gives the mask; must be the same when the forward is run again (gradient checkpointing).
        gain: ``(out,)`` or None: a factor per row of ``W + s B A`` (DoRA's magnitude over norm).

    Returns:
        ``y (…, out)`` in the compute precision: that of ``x``, or autocast's.

    Raises:
        ValueError: dropout without a seed, or outside [0, 1).
        RuntimeError: when differentiated twice.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if dropout and seed is None:
        raise ValueError("dropout needs a seed, from which backward draws the same mask again")
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        return by_autograd(x, weight, bias, A, B, scale, dropout, seed, gain)
    given, stored = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    return _LowRankLinear.apply(x, given, bias, A, B, gain, stored, float(scale), dropout, seed)


def by_autograd(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: int | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """`lowrank_linear` from pieces of torch: for a weight that trains, and for gradients of gradients."""
    kept = x
    if dropout:
        kept = x * keep_mask(seed, (x[..., 0].numel(), x.shape[-1]), dropout, x.dtype, x.device).view(x.shape)
    dtype, W = compute_dtype(x), weight() if callable(weight) else weight
    y = F.linear(F.linear(kept, A.to(dtype)), (B * (scale / (1 - dropout))).to(dtype))
    y = y if W is None else F.linear(x, W) + y
    if gain is not None:
        y = y * gain.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision in which a product of ``x`` is taken here: autocast's where it is on, else that of ``x``."""
    if _autocast(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _as_given(x: Tensor) -> AbstractContextManager:
    """Within it the tensors' own precisions hold: they are cast by hand, once."""
    return torch.autocast(x.device.type, enabled=False) if _autocast(x) else nullcontext()


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, gain, stored, scale, dropout, seed):
        ctx.dtype, ctx.facts = compute_dtype(x), (stored, scale, dropout, seed)
        with _as_given(x):
            group = [_branch(ctx, weight, bias, A, B, gain)]
            (y,), (h,), (z,) = lowrank.run(_rows(x, ctx.dtype), group, Factors.of(group, ctx.dtype))
        need = ctx.needs_input_grad
        kept = x if need[3] else x.new_empty(()).expand(x.shape)  # without a gradient of A its shape is enough
        ctx.save_for_backward(kept, weight, bias, A, B, gain, h if need[4] else None, z if need[5] else None)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias, A, B, gain, h, z = ctx.saved_tensors
        need = ctx.needs_input_grad
        with _as_given(x):
            group = [_branch(ctx, weight, bias, A, B, gain)]
            grad_x, (found,) = lowrank.gradients(
                _rows(x, ctx.dtype),
                group,
                Factors.of(group, ctx.dtype),
                [grad_y.reshape(-1, grad_y.shape[-1])],
                [h],
                [z],
                need[0],
                [need[2:6]],
            )
        if grad_x is not None:
            grad_x = grad_x.view(x.shape).to(x.dtype)
        return grad_x, None, *found, None, None, None, None


def _branch(ctx, weight, bias, A, B, gain) -> Branch:
    stored, scale, dropout, seed = ctx.facts
    return Branch(stored if weight is None else weight, bias, A, B, scale, dropout, seed, gain)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as a matrix ``(N, in)`` in the compute precision: a view unless autocast changes the precision."""
    return x.reshape(-1, x.shape[-1]).to(dtype)
