"""How alike the places of feature maps are: second-order statistics that do not depend on the number of channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ENTRIES = 2**22  # of an affinity matrix held at a time


def affinity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean |A_S − A_T| over images and entries, A = F̂ᵀF̂ (HW, HW) with F̂ the unit columns of a map (B, C, H, W).

    The channel counts may differ. Taken in fp32 at least; blind to positive factors per position and to a rotation of
    the channels. No A is ever whole: rows are worked off in pieces, and backward keeps the gradient (B, C, HW) alone.
    The teacher's map gets none. Raises RuntimeError when differentiated twice.
    """
    return _AffinityDistance.apply(_columns(student), _columns(teacher))


def _columns(features: Tensor) -> Tensor:
    """Unit columns (B, C, HW); a position where all is 0 stays 0."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return F.normalize(features.to(wide).flatten(2), dim=1, eps=1e-6)


class _AffinityDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, S: Tensor, T: Tensor) -> Tensor:
        images, _, places = S.shape
        total, slope = S.new_zeros(()), torch.zeros_like(S) if ctx.needs_input_grad[0] else None
        for rows in torch.arange(places, device=S.device).split(max(1, ENTRIES // (images * places))):
            D = S[..., rows].mT @ S - T[..., rows].mT @ T
            total += D.abs().sum()
            if slope is not None:
                slope[..., rows] = 2 * (S @ D.sign_().mT)  # D is symmetric: each entry counts by its row and its column
        ctx.entries = images * places**2
        ctx.save_for_backward(slope)
        return total / ctx.entries

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (slope,) = ctx.saved_tensors
        return None if slope is None else slope * (grad / ctx.entries), None
