"""Rotary position embedding and causal attention as batched products, with grouped queries.

Rows of one key–value group lie together, (time, query head) in turn, so that keys and values are never repeated; blocks
of rows stop at their own last column, so that most of the masked half is never computed. The probabilities are kept in
the compute precision while the sequence is short, and formed again in backward beyond. Queries, keys and values stand
side by side, as their projections write them: what is done to several of them is done once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import attention as compiled
from veneer.models.packing import Packing

KEPT = 512  # longest sequence whose probabilities are kept: (query heads × length / 2) numbers a token
BLOCK = 64  # fewest rows of a block; at most 8 blocks


class Heads(NamedTuple):
    """How many query heads and key–value groups there are, the size of one, and the factor on the scores."""

    queries: int
    groups: int
    size: int
    scale: float

    @property
    def widths(self) -> tuple[int, int, int]:
        """Numbers of a position's queries, keys and values."""
        return self.queries * self.size, self.groups * self.size, self.groups * self.size


class Turn(NamedTuple):
    """The rotary embedding of queries and keys, ``(batch or 1, time, heads · size)`` each, for vectors as projected.

    The rotated x is ``x ∘ cos + swap(x) ∘ sin``, where swap exchanges the halves of each head and ``sin`` carries the
    sign; ``back`` is ``swap(sin)``, by which the gradient is turned back.
    """

    cos: Tensor
    sin: Tensor
    back: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, heads: int) -> Turn:
        """From the model's ``cos`` and ``sin (batch or 1, time, size)``, for so many heads side by side."""
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        return cls(*(t.repeat(1, 1, heads) for t in (cos, signed, signed.roll(half, -1))))


def rotary_attention(
    qkv: Tensor, turn: Turn, mask: Tensor | None, heads: Heads, packing: Packing | None = None
) -> Tensor:
    """Softmax attention over rotated queries and keys.

    Args:
        qkv: queries, keys and values as projected, side by side: ``(batch, time, Σ heads.widths)``, or of a packed row
            ``(1, W, Σ heads.widths)``.
        turn: the rotation, for the heads of queries and keys together.
        mask: additive ``(batch or 1, 1, time, time)``, causal as well, or None for causal attention alone.
        heads: their numbers, size and scale.
        packing: of a packed row.

    Returns:
        ``(batch, time, heads.queries · heads.size)``, or packed as it came.
    """
    return _RotaryAttention.apply(qkv, *turn, mask, heads, packing)


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


def _swapped(x: Tensor, size: int) -> Tensor:
    """``x (batch, time, heads · size)`` with the halves of each head exchanged."""
    return x.unflatten(-1, (-1, size)).roll(size // 2, -1).flatten(2)


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


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, heads: Heads, packing: Packing | None
) -> tuple[Tensor, list[Tensor]]:
    """The attention of `rotary_attention`, without autograd, and what `attend_gradient` needs.

    That is its arguments, output and sums where compiled code attends, and heads and probabilities else.
    """
    if compiled.takes(qkv, mask, heads):
        out, sums = compiled.attend(qkv, cos, sin, heads, packing)
        return out, [qkv, out, sums, sin]
    qkv = qkv if packing is None else packing.rows(qkv)
    batch, time = qkv.shape[:2]
    width, group = heads.widths[:2]
    x = qkv[..., : width + group]
    x = torch.mul(x, cos).addcmul_(_swapped(x, heads.size), sin)
    K = _by_group(x[..., width:], heads.groups, heads.size)
    V = _by_group(qkv[..., width + group :], heads.groups, heads.size)
    out = qkv.new_empty(batch, time, width)
    queries, kept = [], []
    for a, b in _blocks(time):
        Q = _by_group(x[:, a:b, :width], heads.groups, heads.size)
        P = _probabilities(Q, K, mask, a, b, heads.scale)
        _by_time(torch.bmm(P, V[:, :b]), out[:, a:b])
        queries.append(Q)
        if time <= KEPT:
            kept.append(P)
    return (out if packing is None else packing.packed(out)), [K, V, *queries, *kept]


def attend_gradient(
    grad: Tensor,
    kept: Sequence[Tensor],
    cos: Tensor,
    back: Tensor,
    mask: Tensor | None,
    heads: Heads,
    packing: Packing | None,
) -> Tensor:
    """The gradient of `attend`'s queries, keys and values from that of its output, side by side."""
    if kept[0].shape[-1] == sum(heads.widths):  # compiled code kept the projections as they came
        qkv, out, sums, sin = kept
        return compiled.attend_gradient(grad, qkv, out, sums, cos, sin, back, heads, packing)
    K, V, *kept = kept
    grad = grad if packing is None else packing.packed_gradient(grad)
    batch, time, width = grad.shape
    group, scale = heads.widths[1], heads.scale
    blocks = _blocks(time)
    queries, kept = kept[: len(blocks)], kept[len(blocks) :]
    found = grad.new_empty(batch, time, sum(heads.widths))
    dK, dV = torch.zeros_like(K), torch.zeros_like(V)
    for i, (a, b) in enumerate(blocks):
        Q, g = queries[i], _by_group(grad[:, a:b], heads.groups, heads.size)
        P = kept[i] if kept else _probabilities(Q, K, mask, a, b, scale)
        dV[:, :b].baddbmm_(P.transpose(1, 2), g)
        dP = torch.bmm(g, V[:, :b].transpose(1, 2))
        dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
        _by_time(torch.baddbmm(Q.new_zeros(()), dS, K[:, :b], beta=0, alpha=scale), found[:, a:b, :width])
        dK[:, :b].baddbmm_(dS.transpose(1, 2), Q, alpha=scale)
    _by_time(dK, found[..., width : width + group])
    _by_time(dV, found[..., width + group :])
    x = found[..., : width + group]
    swapped = _swapped(x, heads.size)
    x.mul_(cos).addcmul_(swapped, back)
    return found if packing is None else packing.rows_gradient(found)


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, back, mask, heads, packing):
        out, kept = attend(qkv, cos, sin, mask, heads, packing)
        ctx.save_for_backward(cos, back, mask, *kept)
        ctx.facts = heads, packing
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, back, mask, *kept = ctx.saved_tensors
        return attend_gradient(grad, kept, cos, back, mask, *ctx.facts), None, None, None, None, None, None
