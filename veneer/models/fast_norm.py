"""RMSNorm that keeps its input as it came, and no fp32 copy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / √(mean x² + eps) · weight`` over the last dimension: ``x (…, n)``, ``weight (n,)``, sums in fp32."""
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    # Autograd's own backward of F.rms_norm is a chain of fp32 steps on the CPU, eight times as long as this one.
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        n = x.shape[-1]
        rows, g = x.reshape(-1, n), grad.reshape(-1, n)
        precise = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=precise)
        scale = (norms.square() / n + ctx.eps).rsqrt()
        # LayerNorm's kernel with the mean set to 0 gives r·(gw − mean(gw) − x̂·mean(gw·x̂)) in one pass with fp32 sums;
        # RMSNorm's gradient lacks the second term, so it is put back.
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            g, rows, [n], torch.zeros_like(scale), scale, weight.to(precise), None, [need_x, need_weight, False]
        )
        if need_x:
            grad_x.add_((g @ weight[:, None]).mul_(scale.to(g.dtype) / n))
            grad_x = grad_x.view(x.shape)
        return grad_x if need_x else None, grad_weight.to(weight.dtype) if need_weight else None, None
