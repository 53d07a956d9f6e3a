"""Rotary position embedding and causal attention as batched products, with grouped queries.

Rows of one key–value group lie together, (time, query head) in turn, so that keys and values are never repeated; blocks
of rows stop at their own last column, so that most of the masked half is never computed. The probabilities are kept in
the compute precision while the sequence is short, and formed again in backward beyond.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KEPT = 512  # longest sequence whose probabilities are kept: (query heads × length / 2) numbers a token
BLOCK = 64  # fewest rows of a block; at most 8 blocks


class Turn(NamedTuple):
    """The rotary embedding of all heads, ``(batch or 1, time, heads · head_dim)`` each, for vectors as projected.

    The rotated x is ``x ∘ cos + swap(x) ∘ sin``, where swap exchanges the halves of each head and ``sin`` carries the
    sign; ``back`` is ``swap(sin)``, by which the gradient is turned back.
    """

    cos: Tensor
    sin: Tensor
    back: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, heads: int) -> Turn:
        """From the model's ``cos`` and ``sin (batch or 1, time, head_dim)``."""
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        return cls(*(t.repeat(1, 1, heads) for t in (cos, signed, signed.roll(half, -1))))


def rotary_attention(
    q: Tensor, k: Tensor, v: Tensor, turn: Turn, mask: Tensor | None, head_dim: int, scale: float
) -> Tensor:
    """Softmax attention over rotated queries and keys.

    Args:
        q: ``(batch, time, heads · head_dim)``; k, v: ``(batch, time, key-value heads · head_dim)``, as projected.
        turn: the rotation, for at least as many heads as q has.
        mask: additive ``(batch or 1, 1, time, time)``, causal as well, or None for causal attention alone.
        scale: the factor on the scores.

    Returns:
        ``(batch, time, heads · head_dim)``.
    """
    return _RotaryAttention.apply(q, k, v, *turn, mask, head_dim, scale)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True: look) as one that is added: 0 or the lowest finite number, so that a row that may look
    nowhere stays a number."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    low = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, low)


def is_causal(mask: Tensor) -> bool:
    """Whether a mask (boolean, or additive) forbids every later column."""
    look = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return not look.triu(1).any()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """``x ∘ cos + swap(x) ∘ sin``: x (batch, time, heads · head_dim)."""
    width = x.shape[-1]
    swapped = x.view(*x.shape[:2], -1, head_dim).roll(head_dim // 2, -1).flatten(2)
    return torch.mul(x, cos[..., :width]).addcmul_(swapped, sin[..., :width])


def _by_group(x: Tensor, groups: int, head_dim: int) -> Tensor:
    """``(batch, time, heads · head_dim)`` as ``(batch · groups, time · heads per group, head_dim)``."""
    batch, time = x.shape[:2]
    return x.reshape(batch, time, groups, -1).transpose(1, 2).reshape(batch * groups, -1, head_dim)


def _by_time(x: Tensor, out: Tensor) -> None:
    """The inverse of `_by_group`, written into ``out (batch, time, heads · head_dim)``."""
    batch, time = out.shape[:2]
    x = x.view(batch, x.shape[0] // batch, time, -1).transpose(1, 2)
    out.view(x.shape).copy_(x)


def _blocks(time: int) -> list[tuple[int, int]]:
    size = max(BLOCK, -(-time // 8))
    return [(a, min(a + size, time)) for a in range(0, time, size)]


@functools.lru_cache(maxsize=8)
def _later(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity at the columns after each row's own: ``(size, 1, size)``."""
    with torch.inference_mode(False):
        return torch.full((size, size), -torch.inf, dtype=dtype, device=device).triu_(1)[:, None]


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, a: int, b: int, scale: float) -> Tensor:
    """Of the times a … b: ``(batch · groups, rows, b)`` from their ``q (batch · groups, rows, head_dim)``."""
    scores = torch.baddbmm(q.new_zeros(()), q, k[:, :b].transpose(1, 2), beta=0, alpha=scale)
    group = q.shape[1] // (b - a)
    if mask is None:
        scores.view(-1, b - a, group, b)[..., a:].add_(_later(b - a, q.dtype, q.device))
    else:
        scores.view(mask.shape[0], -1, b - a, group, b).add_(mask[:, :, a:b, None, :b])
    return scores.softmax(-1)


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin, back, mask, head_dim, scale):
        time = q.shape[1]
        groups = k.shape[-1] // head_dim
        q = _rotated(q, cos, sin, head_dim)
        K = _by_group(_rotated(k, cos, sin, head_dim), groups, head_dim)
        V = _by_group(v, groups, head_dim)
        out = torch.empty_like(q)
        queries, kept = [], []
        for a, b in _blocks(time):
            Q = _by_group(q[:, a:b], groups, head_dim)
            P = _probabilities(Q, K, mask, a, b, scale)
            _by_time(torch.bmm(P, V[:, :b]), out[:, a:b])
            queries.append(Q)
            if time <= KEPT:
                kept.append(P)
        ctx.save_for_backward(K, V, cos, back, mask, *queries, *kept)
        ctx.facts = groups, head_dim, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        K, V, cos, back, mask, *kept = ctx.saved_tensors
        groups, head_dim, scale = ctx.facts
        batch, time, _ = grad.shape
        blocks = _blocks(time)
        queries, kept = kept[: len(blocks)], kept[len(blocks) :]
        q, k, v = torch.empty_like(grad), *grad.new_empty(2, batch, time, groups * head_dim)
        dK, dV = torch.zeros_like(K), torch.zeros_like(V)
        for i, (a, b) in enumerate(blocks):
            Q, g = queries[i], _by_group(grad[:, a:b], groups, head_dim)
            P = kept[i] if kept else _probabilities(Q, K, mask, a, b, scale)
            dV[:, :b].baddbmm_(P.transpose(1, 2), g)
            dP = torch.bmm(g, V[:, :b].transpose(1, 2))
            dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
            _by_time(torch.baddbmm(Q.new_zeros(()), dS, K[:, :b], beta=0, alpha=scale), q[:, a:b])
            dK[:, :b].baddbmm_(dS.transpose(1, 2), Q, alpha=scale)
        _by_time(dK, k)
        _by_time(dV, v)
        q, k = _rotated(q, cos, back, head_dim), _rotated(k, cos, back, head_dim)
        return q, k, v, None, None, None, None, None, None
