"""RMSNorm that keeps its input as it came, and makes no fp32 copy of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import elementwise


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / √(mean x² + eps) · weight`` over the last dimension: ``x (…, n)``, ``weight (n,)``, sums in fp32."""
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    # On the CPU torch's own is a chain of fp32 steps in both directions; its backward takes five times as long as this.
    @staticmethod
    def forward(ctx, x, weight, eps):
        n = x.shape[-1]
        rows = x.reshape(-1, n)
        if elementwise.takes(rows, weight):
            y, root = elementwise.rms_norm(rows, weight, eps)
            ctx.save_for_backward(x, weight, root)
            return y.view(x.shape)
        precise = torch.promote_types(x.dtype, torch.float32)
        mean = torch.linalg.vector_norm(rows, dim=1, dtype=precise).square_().div_(n)
        # Rows as channels of a batch norm in eval mode: one pass that divides each by its own fp32 root.
        y = F.batch_norm(rows[None], torch.zeros_like(mean), mean, eps=eps)[0].mul_(weight)
        ctx.save_for_backward(x, weight, (mean + eps).rsqrt_())
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, root = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        n = x.shape[-1]
        rows, g = x.reshape(-1, n), grad.reshape(-1, n)
        scale = root[:, None]
        grad_x = grad_weight = None
        if need_weight:
            grad_weight = (g.to(root.dtype) * rows * scale).sum(0).to(weight.dtype)
        if need_x and elementwise.takes(g, rows, weight):
            grad_x = elementwise.rms_norm_gradient(g, rows, weight, root).view(x.shape)
        elif need_x:
            # LayerNorm's kernel with the mean set to 0 gives r·(gw − mean(gw) − x̂·mean(gw·x̂)) in one pass with fp32
            # sums; RMSNorm's gradient lacks the second term, so it is put back.
            grad_x = torch.ops.aten.native_layer_norm_backward(
                g, rows, [n], torch.zeros_like(scale), scale, weight.to(root.dtype), None, [True, False, False]
            )[0]
            grad_x.add_((g @ weight[:, None]).mul_(scale.to(g.dtype) / n))
            grad_x = grad_x.view(x.shape)
        return grad_x, grad_weight, None
