"""The gated MLP ``down(silu(gate(x)) · up(x))`` as one autograd function that keeps ``x``, gate and up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import elementwise
from veneer.models.fast_linear import TENSORS, facts, flat, in_order, input_of, keep_only, unflat, wanted
from veneer.numerics import lowrank
from veneer.numerics.lowrank import Branch, Factors


def gated_mlp(x: Tensor, gate: Branch, up: Branch, down: Branch) -> Tensor:
    """``down(silu(gate(x)) · up(x))`` for ``x (…, in)``: the product, which ``down`` takes in, is formed again in
    backward and never kept."""
    branches = (gate, up, down)
    return _GatedMLP.apply(x, facts(branches), *flat(branches))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``, keeping gate and up alone."""
    return _SwiGLU.apply(gate, up)


def _product(gate: Tensor, up: Tensor) -> Tensor:
    return elementwise.swiglu(gate, up) if elementwise.takes(gate, up) else F.silu(gate).mul_(up)


def _gradients(grad: Tensor, gate: Tensor, up: Tensor, over: bool) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, the first written over ``grad`` where that may be."""
    if elementwise.takes(grad, gate, up):
        return elementwise.swiglu_gradients(grad, gate, up, over)
    grad_up = F.silu(gate).mul_(grad)
    grad = grad.mul_(up) if over else grad * up
    return torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad), grad_up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return _gradients(grad, gate, up, over=False)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, facts, *tensors):
        branches = unflat(facts, tensors)
        rows = x.reshape(-1, x.shape[-1])
        outer, inner = Factors.of(branches[:2], x.dtype), Factors.of(branches[2:], x.dtype)
        (gate, up), hs, zs = lowrank.run(rows, branches[:2], outer)
        product = _product(gate, up)
        (y,), (h,), (z,) = lowrank.run(product, branches[2:], inner)
        need = wanted(ctx.needs_input_grad[2:])
        hs = keep_only([*hs, h], [n[2] for n in need])
        # Where there is a gain, what stood before it is kept in place of what came out.
        kept = [t if before is None else before for t, before in zip((gate, up), zs)]
        ctx.facts = facts
        cast = (outer.A, *outer.B, inner.A, *inner.B)
        ctx.save_for_backward(input_of(x, need[:2]), *kept, z if need[2][3] else None, *hs, *cast, *tensors)
        return y.view(x.shape[:-1] + y.shape[-1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *rest = ctx.saved_tensors
        kept, z, hs, cast, tensors = rest[:2], rest[2], rest[3:6], rest[6:11], rest[11:]
        assert len(tensors) == 3 * TENSORS
        outer, inner = Factors(cast[0], tuple(cast[1:3])), Factors(cast[3], tuple(cast[4:]))
        branches, need = unflat(ctx.facts, tensors), wanted(ctx.needs_input_grad[2:])
        zs = [None if b.gain is None else t for b, t in zip(branches, kept)]
        gate, up = (t if b.gain is None else _finished(t, b) for t, b in zip(kept, branches))
        product = _product(gate, up) if need[2][1] else gate  # else for its shape alone
        g = grad.reshape(-1, grad.shape[-1])
        back, last = lowrank.gradients(product, branches[2:], inner, [g], hs[2:], [z], True, need[2:])
        del product
        grads = _gradients(back, gate, up, over=True)
        del back, gate, up
        rows, need_x = x.reshape(-1, x.shape[-1]), ctx.needs_input_grad[0]
        grad_x, first = lowrank.gradients(rows, branches[:2], outer, grads, hs[:2], zs, need_x, need[:2])
        return (None if grad_x is None else grad_x.view(x.shape)), None, *in_order([*first, *last])


def _finished(z: Tensor, branch: Branch) -> Tensor:
    """The output of a branch from what stood before its gain."""
    y = lowrank.gained(z, branch.gain)
    return y if branch.bias is None else y.add_(branch.bias.to(y.dtype))
