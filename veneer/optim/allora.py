"""ALLoRA: a learning rate for every row, large while the row of B·A is small."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.core.hook import Optim
from veneer.core.registry import method
from veneer.fields import At
from veneer.numerics.fused import lowrank_linear


def row_factor(A: Tensor, B: Tensor, eta_squared: float) -> Tensor:
    """cᵢ = 1/√(‖(BA)ᵢ‖₂ + 1/η²) for each row i, (out,) in fp32, without forming BA: ‖(BA)ᵢ‖² = bᵢ(AAᵀ)bᵢᵀ."""
    A, B = A.detach().float(), B.detach().float()
    squares = ((B @ (A @ A.mT)) * B).sum(1).clamp_min(0)
    return (squares.sqrt() + 1 / eta_squared).rsqrt()


@method("allora", axis="optim", paper="arXiv:2410.09692", system=45, wants=("pair",), defaults="lora")
class ALLoRA(Optim):
    """A row-wise learning rate in place of LoRA's dropout and scale (Huang & Balestriero 2024).

    With g the gradient at the product's output and c the factor of ``row_factor``: ĝ = g·diag(c), ∂B = s·ĝᵀ(xAᵀ),
    ∂A = s·(ĝB)ᵀx, and the gradient of x is not scaled. c is a constant in backward and live in every forward. So a
    row of B starts with η times LoRA's step, and slows as its row of BA grows. The value of the product is LoRA's; the
    paper has s = 1 and no dropout, which are ``lora``'s defaults here.

    Nothing else trains and nothing is stored. ``eta_squared`` = 1, from the paper's grid {1, 2, 4} (base rate 1e-4).

    Adam all but undoes a factor on a gradient, since it is invariant to a constant one: measured in the sheet, and the
    authors name no optimiser. ``mode="update"``, ours, leaves gradients alone and multiplies the optimiser's step on
    row i of B by cᵢ and its step on A by the mean of c. The authors' code could not be had; the formulas are of the
    paper.
    """

    eta_squared: Annotated[float, At(gt=0, doc="η²: the largest factor is η")] = 1.0
    mode: Annotated[Literal["gradient", "update"], At(doc="what c multiplies")] = "gradient"

    def product(
        self, x: Tensor, weight: Any, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, **dropout: Any
    ) -> Tensor:
        """``lowrank_linear``'s value, with the gradients of A and B taken from ĝ."""
        if self.mode == "update" or not torch.is_grad_enabled():
            return lowrank_linear(x, weight, bias, A, B, scale, **dropout)
        y = lowrank_linear(x, weight, bias, A.detach(), B.detach(), scale, **dropout)
        return _FactorGradients.apply(y, x.detach(), A, B, row_factor(A, B, self.eta_squared), scale)

    def before_optimizer(self, step: int) -> None:
        if self.mode == "update":
            self.before = [(A, B, A.detach().clone(), B.detach().clone()) for _, A, B, _ in self.adapter.pairs()]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.mode == "update":
            for A, B, old_A, old_B in self.before:
                c = row_factor(old_A, old_B, self.eta_squared)
                A.copy_(old_A + c.mean() * (A - old_A))
                B.copy_(old_B + c[:, None] * (B - old_B))


class _FactorGradients(torch.autograd.Function):
    """Passes y on; in backward gives A and B their gradients from the rows of g scaled by c."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, A, B, c)
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, c = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        rows = x.reshape(-1, x.shape[-1]).to(g.dtype)
        scaled = g * (ctx.scale * c).to(g.dtype)
        grad_B = (scaled.T @ (rows @ A.to(g.dtype).T)).to(B.dtype)
        grad_A = ((scaled @ B.to(g.dtype)).T @ rows).to(A.dtype)
        return grad, None, grad_A, grad_B, None, None
