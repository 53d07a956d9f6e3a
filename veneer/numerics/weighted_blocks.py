"""Factors that come in blocks with a weight a component, those of many layers put together at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Blocks(NamedTuple):
    """One layer's blocks: Aₖ (n, in), eₖ (n,), Bₖ (out, n), and the scale s of ΔW = s·Σₖ Bₖ·diag(eₖ)·Aₖ."""

    A: Sequence[Tensor]
    e: Sequence[Tensor]
    B: Sequence[Tensor]
    scale: float

    @property
    def widths(self) -> list[int]:
        """Components of each block."""
        return [len(e) for e in self.e]


def assemble(layers: Sequence[Blocks], penalise: bool = False) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """``s·diag(e)·A`` (r, in) and ``B`` (out, r) of every layer, blocks joined.

    With ``penalise`` also the mean over layers of ‖AAᵀ − I‖_F and ‖BᵀB − I‖_F (not squared), whose gradient is 0 where
    the norm is; else None. Layers of one shape are taken together, and all is one step of the graph: each tensor gets
    its gradient once, differentiable no further.
    """
    facts = [(len(layer.e), layer.scale) for layer in layers]
    *pairs, spread = _Assembly.apply(facts, penalise, *(t for x in layers for t in (*x.A, *x.e, *x.B)))
    return list(zip(pairs[::2], pairs[1::2])), spread


class _Assembly(Function):
    @staticmethod
    def forward(ctx: Any, facts: list[tuple[int, float]], penalise: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        layers = _layers(facts, tensors)
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, x in enumerate(layers):
            alike[x.A[0].shape[1], x.B[0].shape[0], tuple(x.widths), x.scale].append(i)
        made: list[Any] = [None] * (2 * len(layers))
        norms, kept, ctx.groups = [], [], []
        for (inn, out, widths, scale), same in alike.items():
            A = torch.cat([a for i in same for a in layers[i].A]).view(len(same), -1, inn)
            weights = torch.cat([e for i in same for e in layers[i].e]).view(len(same), -1, 1) * scale
            B = A.new_empty(len(same), out, A.shape[1])
            for i, place in zip(same, B.unbind(0)):
                torch.cat(layers[i].B, dim=1, out=place)
            weighted, off = A * weights, (None, None)
            if penalise:
                off = [_off(A @ A.mT, norms), _off(B.mT @ B, norms)]
            for i, *pair in zip(same, weighted.unbind(0), B.unbind(0)):
                made[2 * i : 2 * i + 2] = pair
            kept += [A, weights, B, *off]
            ctx.groups.append((same, widths, scale))
        ctx.facts = facts
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return *made, torch.cat(norms).mean() if penalise else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Any] = [None] * len(ctx.facts)
        share = None if grads[-1] is None else grads[-1] / len(ctx.facts)  # 2, the square's, over two norms a layer
        for number, (same, widths, scale) in enumerate(ctx.groups):
            A, weights, B, off_A, off_B = ctx.saved_tensors[5 * number : 5 * number + 5]
            of_A, of_B = (_stacked([grads[2 * i + side] for i in same], like) for side, like in enumerate((A, B)))
            of_e = torch.linalg.vecdot(of_A, A).mul_(scale)
            of_A.mul_(weights)
            if share is not None:
                of_A.baddbmm_(off_A * share, A)
                of_B.baddbmm_(B, off_B * share)
            parts = (*of_A.split(widths, 1), *of_e.split(widths, 1), *(b.contiguous() for b in of_B.split(widths, 2)))
            for i, *own in zip(same, *(block.unbind(0) for block in parts)):
                found[i] = own
        needed = (g if need else None for g, need in zip((g for x in found for g in x), ctx.needs_input_grad[2:]))
        return None, None, *needed


def _layers(facts: list[tuple[int, float]], tensors: Sequence[Tensor]) -> list[Blocks]:
    layers, at = [], 0
    for count, scale in facts:
        A, e, B = (tensors[at + side * count : at + (side + 1) * count] for side in range(3))
        layers.append(Blocks(A, e, B, scale))
        at += 3 * count
    return layers


def _off(gram: Tensor, norms: list[Tensor]) -> Tensor:
    """Gram matrices (n, r, r) less the identity, each over its norm, which joins ``norms``."""
    gram.diagonal(dim1=1, dim2=2).sub_(1)
    size = torch.linalg.vector_norm(gram, dim=(1, 2), keepdim=True)
    norms.append(size.flatten())
    return torch.where(size > 0, gram / size, 0.0)


def _stacked(grads: list[Tensor | None], like: Tensor) -> Tensor:
    """Gradients of several layers as one tensor shaped as ``like``; zeros where there is none."""
    if any(g is not None for g in grads):
        return torch.stack([like.new_zeros(like.shape[1:]) if g is None else g for g in grads])
    return torch.zeros_like(like)
