"""A change of some channels of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_to_channels(y: Tensor, change: Tensor, chosen: Tensor, at: int) -> Tensor:
    """``y`` with ``change`` added to the ``chosen (c,)`` entries of its dimension ``at``; ``y`` is not written to.

    torch's ``index_add`` keeps the change for backward, for its shape alone; this keeps ``chosen``.
    """
    return _Added.apply(y, change, chosen, at)


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, change, chosen, at):
        ctx.save_for_backward(chosen)
        ctx.at = at
        return y.index_add(at, chosen, change)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (chosen,) = ctx.saved_tensors
        return grad, grad.index_select(ctx.at, chosen) if ctx.needs_input_grad[1] else None, None, None
