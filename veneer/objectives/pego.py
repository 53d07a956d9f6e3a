"""PEGO: a group of LoRAs, orthogonal to the pre-trained weight and to one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.core.hook import Objective, Run
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

CHUNK = 1 << 22  # entries of a product that are alive at once


class ProductL1(torch.autograd.Function):
    """Σ|UV| of U (m, r) and V (r, n), with both gradients taken in the same pass over chunks of rows of UV."""

    @staticmethod
    def forward(ctx: Any, U: Tensor, V: Tensor) -> Tensor:
        total, dU, dV = U.new_zeros(()), torch.empty_like(U), torch.zeros_like(V)
        step = max(1, CHUNK // V.shape[1])
        for i in range(0, len(U), step):
            M = U[i : i + step] @ V
            total += M.abs().sum()
            M.sign_()
            dU[i : i + step] = M @ V.T
            dV += U[i : i + step].T @ M
        ctx.save_for_backward(dU, dV)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dU, dV = ctx.saved_tensors
        return grad * dU, grad * dV


def product_norm(U: Tensor, V: Tensor, norm: str) -> Tensor:
    """Σ|UV| (``l1``) or ‖UV‖²_F (``fro2``, without the product) of U (m, r) and V (r, n)."""
    return ProductL1.apply(U, V) if norm == "l1" else ((U.T @ U) * (V @ V.T)).sum()


def penalties(W: Tensor, A: list[Tensor], B: list[Tensor], norm: str = "l1") -> tuple[Tensor, Tensor]:
    """(Σ_k ‖W·D_kᵀ‖, Σ_{k<j} ‖D_k·D_jᵀ‖) of W (out, in) and D_k = B_k·A_k, A_k (r, in), B_k (out, r)."""
    preserve = sum(product_norm(W @ a.T, b.T, norm) for a, b in zip(A, B))
    diversify = W.new_zeros(())
    for j in range(len(A)):
        for k in range(j):
            diversify = diversify + product_norm(B[k] @ (A[k] @ A[j].T), B[j].T, norm)
    return preserve, diversify


@method("pego", axis="objective", paper="arXiv:2407.15085", system=116, wants=("pair",), defaults="lora")
class PEGO(Objective):
    """Preserve and diversify, for domains that training did not see (Hu et al. 2024).

    A LoRA of rank N·r is N LoRAs of rank r side by side, D_k = s·B_k·A_k: rows of A and columns of B in order. With
    entrywise L1 norms of out × out matrices, summed over the adapted weights W,

    L = L_task + λ·(Σ_k ‖W·D_kᵀ‖₁ + Σ_{k<j} ‖D_k·D_jᵀ‖₁).

    The checkpoint, folding and export are those of plain LoRA. Defaults: N = 4 (2 for PACS) and λ = 1e-3 as in the
    official script, for r = 4 (``rank=16`` here) on q and v of twelve blocks of width 768, where α = N·r. λ weighs a
    sum over out² entries: ``reduction="mean"`` divides by out², and wants another λ. ``norm="fro2"`` takes squared
    entries instead, and never forms an out × out matrix; with L1 it is formed in chunks of rows, in fp32, and not kept
    for backward. Both options are ours. Of a rank that N does not divide, the first slices have one component more; a
    site to which something else gave fewer ranks than N has a slice for each.

    Where W is square and of full rank, W·Dᵀ = 0 only for D = 0: the first term then shrinks the update most along
    the leading singular directions of W. At B = 0 neither term has a gradient. With a start that freezes an offset, the
    factors are taken as they stand, without it. Which domain a row came from is not used. The terms read weights alone:
    their cost does not grow with the batch.
    """

    slices: Annotated[int, At(ge=1, doc="N, LoRAs side by side")] = 4
    weight: Annotated[float, At(ge=0, doc="λ")] = 1e-3
    norm: Annotated[Literal["l1", "fro2"], At(doc="sum of magnitudes, or of squares")] = "l1"
    reduction: Annotated[Literal["sum", "mean"], At(doc="over the entries of one product")] = "sum"

    reads_outputs = False

    def on_attach(self, adapter: Adapter) -> None:
        ranks = [len(A) for _, A, _, _ in adapter.pairs()]
        if not ranks:
            raise UserError(f"pego slices the factors of plain pairs, as lora has; {adapter.recipe} has none")
        if max(ranks) < self.slices:
            raise UserError(
                f"pego: a rank of {max(ranks)} has no {self.slices} slices; give rank={self.slices} or more, or slices="
            )

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        if not self.weight:
            return None
        terms = []
        for site, A, B, scale in self.adapter.pairs():
            slices = min(self.slices, len(A))
            sliced = (scale * A).tensor_split(slices), B.tensor_split(slices, dim=1)
            found = sum(penalties(site.weight().detach().to(A.dtype), *sliced, self.norm))
            terms.append(found / B.shape[0] ** 2 if self.reduction == "mean" else found)
        return self.weight * torch.stack(terms).sum()
