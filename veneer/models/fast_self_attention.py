"""Self-attention from its input to its output, the four projections included, as one autograd function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.models.fast_attention import Heads, Turn, attend, attend_gradient
from veneer.models.fast_linear import TENSORS, facts, flat, in_order, input_of, keep_only, unflat, wanted
from veneer.models.packing import Packing
from veneer.numerics import lowrank
from veneer.numerics.lowrank import Branch, Factors


def self_attention(
    x: Tensor,
    branches: Sequence[Branch],
    turn: Turn,
    mask: Tensor | None,
    heads: Heads,
    packing: Packing | None = None,
) -> Tensor:
    """``o(attention(q(x), k(x), v(x)))`` for ``x (batch, time, in)``, or a packed row ``(1, W, in)``.

    Args:
        x: the input of the first three branches.
        branches: those of queries, keys, values and output.
        turn, mask, heads, packing: see `veneer.models.fast_attention.rotary_attention`.
    """
    return _SelfAttention.apply(x, *turn, mask, heads, packing, facts(branches), *flat(branches))


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, back, mask, heads, packing, facts, *tensors):
        branches = unflat(facts, tensors)
        outer, inner = Factors.of(branches[:3], x.dtype), Factors.of(branches[3:], x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        qkv = rows.new_empty(rows.shape[0], sum(heads.widths))
        _, hs, zs = lowrank.run(rows, branches[:3], outer, qkv.split(heads.widths, 1))
        out, kept = attend(qkv.view(*x.shape[:-1], -1), cos, sin, mask, heads, packing)
        (y,), (h,), (z,) = lowrank.run(out.view(-1, out.shape[-1]), branches[3:], inner)
        need = wanted(ctx.needs_input_grad[8:])
        hs, zs = keep_only([*hs, h], [n[2] for n in need]), keep_only([*zs, z], [n[3] for n in need])
        cast = (outer.A, *outer.B, inner.A, *inner.B)
        ctx.facts = heads, packing, facts
        mine = (input_of(x, need[:3]), input_of(out, need[3:]), cos, back, mask)
        ctx.save_for_backward(*mine, *tensors, *hs, *zs, *cast, *kept)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, out, cos, back, mask, *rest = ctx.saved_tensors
        heads, packing, facts = ctx.facts
        tensors, rest = rest[: 4 * TENSORS], rest[4 * TENSORS :]
        hs, zs, cast, kept = rest[:4], rest[4:8], rest[8:14], rest[14:]
        outer, inner = Factors(cast[0], tuple(cast[1:4])), Factors(cast[4], tuple(cast[5:]))
        branches, need = unflat(facts, tensors), wanted(ctx.needs_input_grad[8:])
        need_x = ctx.needs_input_grad[0]
        below = need_x or any(any(n) for n in need[:3])
        g, before = grad.reshape(-1, grad.shape[-1]), out.reshape(-1, out.shape[-1])
        g, last = lowrank.gradients(before, branches[3:], inner, [g], hs[3:], zs[3:], below, need[3:])
        if not below:
            return *[None] * 8, *[None] * (3 * TENSORS), *in_order(last)
        grads = attend_gradient(g.view(out.shape), kept, cos, back, mask, heads, packing)
        grads = grads.view(-1, grads.shape[-1]).split(heads.widths, 1)
        rows = x.reshape(-1, x.shape[-1])
        grad_x, first = lowrank.gradients(rows, branches[:3], outer, grads, hs[:3], zs[:3], need_x, need[:3])
        return (None if grad_x is None else grad_x.view(x.shape)), *[None] * 7, *in_order([*first, *last])
