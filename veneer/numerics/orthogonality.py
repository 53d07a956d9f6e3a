"""How far factors are from having orthonormal rows."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def orthogonality(factors: list[Tensor]) -> Tensor:
    """The mean of ‖MMᵀ − I‖_F (not squared) over factors M (r, n); those of one shape are taken together.

    Its gradient in M is 2(MMᵀ − I)M over the norm and the number of factors, and 0 where the norm is.
    """
    return _Orthogonality.apply(*factors)


class _Orthogonality(Function):
    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> Tensor:
        alike: dict[tuple[torch.Size, bool], list[int]] = defaultdict(list)
        for number, M in enumerate(factors):
            alike[M.shape, M.is_contiguous()].append(number)
        norms, kept = [], []
        for (_, lies), same in alike.items():  # a transposed view is stacked as it lies in memory
            M = torch.stack([factors[n] if lies else factors[n].mT for n in same])
            M = M if lies else M.mT
            off = M @ M.mT
            off.diagonal(dim1=1, dim2=2).sub_(1)
            size = torch.linalg.vector_norm(off, dim=(1, 2), keepdim=True)
            kept += [M, torch.where(size > 0, off / size, 0.0)]
            norms.append(size.flatten())
        ctx.alike = list(alike.values())
        ctx.save_for_backward(*kept)
        return torch.cat(norms).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        found: dict[int, Tensor] = {}
        share = 2 * grad / sum(map(len, ctx.alike))
        for same, M, direction in zip(ctx.alike, ctx.saved_tensors[::2], ctx.saved_tensors[1::2]):
            found |= zip(same, (M.mT @ (direction * share)).mT)
        return tuple(found[n] for n in range(len(found)))
