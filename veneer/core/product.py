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

from veneer.numerics.dropout import keep_mask

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
        return _plain(x, weight, bias, A, B, scale, dropout, seed, gain)
    return _LowRankLinear.apply(x, weight, bias, A, B, gain, float(scale), dropout, seed)


def _plain(x, W, bias, A, B, scale, dropout, seed, gain):
    """The same value from differentiable pieces: for a weight that trains."""
    kept = x
    if dropout:
        kept = x * keep_mask(seed, (x[..., 0].numel(), x.shape[-1]), dropout, x.dtype, x.device).view(x.shape)
    dtype = compute_dtype(x)
    h = F.linear(kept, A.to(dtype))
    y = F.linear(x, W) + F.linear(h, (B * (scale / (1 - dropout))).to(dtype))
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
    def forward(ctx, x, weight, bias, A, B, gain, scale, dropout, seed):
        dtype = compute_dtype(x)
        factor = scale / (1.0 - dropout)
        with _as_given(x):
            rows = _rows(x, dtype)
            h = (rows * _mask(rows, dropout, seed) if dropout else rows) @ A.to(dtype).t()
            b, Bs, z = None if bias is None else bias.to(dtype), (B * factor).to(dtype), None
            if weight is None:
                y = h @ Bs.t()
            else:
                y = F.linear(rows, _dense(weight, dtype), b if gain is None else None).addmm_(h, Bs.t())
            if gain is not None:
                # z + z·(g − 1): in bf16 a gain near 1 would otherwise lose the digits in which it differs from 1.
                z, y = y, torch.addcmul(y, y, (gain - 1).to(dtype))
            if b is not None and (weight is None or gain is not None):
                y += b
        ctx.weight = None if isinstance(weight, Tensor) else weight
        ctx.alone = weight is None
        keep_h = ctx.needs_input_grad[4]
        keep_z = gain is not None and ctx.needs_input_grad[5]
        ctx.save_for_backward(
            x,
            weight if ctx.weight is None else None,
            A,
            B,
            h if keep_h else None,
            gain,
            z if keep_z else None,
        )
        ctx.dtype, ctx.factor, ctx.dropout, ctx.seed = dtype, factor, dropout, seed
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, A, B, h, gain, z = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B, need_gain = ctx.needs_input_grad[:6]
        dtype, factor = ctx.dtype, ctx.factor
        grad_x = grad_bias = grad_A = grad_B = grad_gain = None
        with _as_given(x):
            g = grad_y.reshape(-1, grad_y.shape[-1])
            if need_bias:
                grad_bias = g.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(ctx.bias_dtype)
            if gain is not None:
                if need_gain:
                    grad_gain = (g * z).sum(0, dtype=gain.dtype)
                g = torch.addcmul(g, g, (gain - 1).to(dtype))
            if need_B:
                grad_B = (g.t() @ h).to(B.dtype) * factor
            if need_A or need_x:
                gh = g @ (B * factor).to(dtype)
                mask = _mask(x.reshape(-1, x.shape[-1]), ctx.dropout, ctx.seed, dtype) if ctx.dropout else None
            if need_A:
                rows = _rows(x, dtype)
                grad_A = (gh.t() @ (rows if mask is None else rows * mask)).to(A.dtype)
            if need_x:
                grad_x = _grad_x(g, None if ctx.alone else _dense(ctx.weight or weight, dtype), gh, A.to(dtype), mask)
                grad_x = grad_x.view(x.shape).to(x.dtype)
        return grad_x, None, grad_bias, grad_A, grad_B, grad_gain, None, None, None


def _grad_x(g: Tensor, W: Tensor | None, gh: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """``g W + mask ∘ (gh A)``, the second part added into the first."""
    if W is None:
        return gh @ A if mask is None else (gh @ A).mul_(mask)
    grad = g @ W
    return grad.addmm_(gh, A) if mask is None else grad.addcmul_(gh @ A, mask)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as a matrix ``(N, in)`` in the compute precision: a view unless autocast changes the precision."""
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    W = weight if isinstance(weight, Tensor) else weight()
    return W.to(dtype)


def _mask(rows: Tensor, dropout: float, seed: int, dtype: torch.dtype | None = None) -> Tensor:
    return keep_mask(seed, tuple(rows.shape), dropout, dtype or rows.dtype, rows.device)
