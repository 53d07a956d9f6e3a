"""Rotary position embedding and causal attention as batched products, with grouped queries.

Rows of one key–value group lie together, (time, query head) in turn, so that keys and values are never repeated; blocks
of rows stop at their own last column, so that most of the masked half is never computed. The probabilities are kept in
the compute precision while the sequence is short, and formed again in backward beyond.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KEPT = 512  # longest sequence whose probabilities are kept: (query heads × length / 2) numbers a token
BLOCK = 64  # fewest rows of a block; at most 8 blocks


def rotary_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, head_dim: int, scale: float
) -> Tensor:
    """Softmax attention over rotated queries and keys.

    Args:
        q: ``(batch, time, heads · head_dim)``; k, v: ``(batch, time, key-value heads · head_dim)``, as projected.
        cos, sin: ``(batch or 1, time, head_dim)``.
        mask: additive ``(batch or 1, 1, time, time)``, causal as well, or None for causal attention alone.
        scale: the factor on the scores.

    Returns:
        ``(batch, time, heads · head_dim)``.
    """
    return _RotaryAttention.apply(q, k, v, cos, sin, mask, head_dim, scale)


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


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x ∘ cos + rotate_half(x) ∘ sin``: x (batch, time, heads, head_dim), cos and sin broadcast to it."""
    out = torch.empty_like(x)
    (x1, x2), (c1, c2), (s1, s2), (o1, o2) = map(_halves, (x, cos, sin, out))
    torch.mul(x1, c1, out=o1).addcmul_(x2, s1, value=-1)
    torch.mul(x2, c2, out=o2).addcmul_(x1, s2)
    return out


def _rotate_back(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of `_rotate`'s ``x``."""
    out = torch.empty_like(g)
    (g1, g2), (c1, c2), (s1, s2), (o1, o2) = map(_halves, (g, cos, sin, out))
    torch.mul(g1, c1, out=o1).addcmul_(g2, s2)
    torch.mul(g2, c2, out=o2).addcmul_(g1, s1, value=-1)
    return out


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
    def forward(ctx, q, k, v, cos, sin, mask, head_dim, scale):
        batch, time, _ = q.shape
        groups = k.shape[-1] // head_dim
        turn = (cos[:, :, None], sin[:, :, None])
        q = _rotate(q.view(batch, time, -1, head_dim), *turn)
        K = _by_group(_rotate(k.view(batch, time, -1, head_dim), *turn), groups, head_dim)
        V = _by_group(v, groups, head_dim)
        out = q.new_empty(batch, time, q.shape[2] * head_dim)
        queries, kept = [], []
        for a, b in _blocks(time):
            Q = _by_group(q[:, a:b], groups, head_dim)
            P = _probabilities(Q, K, mask, a, b, scale)
            _by_time(torch.bmm(P, V[:, :b]), out[:, a:b])
            queries.append(Q)
            if time <= KEPT:
                kept.append(P)
        ctx.save_for_backward(K, V, cos, sin, mask, *queries, *kept)
        ctx.facts = groups, head_dim, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        K, V, cos, sin, mask, *kept = ctx.saved_tensors
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
        turn = (cos[:, :, None], sin[:, :, None])
        q = _rotate_back(q.view(batch, time, -1, head_dim), *turn)
        k = _rotate_back(k.view(batch, time, -1, head_dim), *turn)
        return q.flatten(2), k.flatten(2), v, None, None, None, None, None
