"""LoRA-Pro: steps on A and B that move W along the nearest thing to its own gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.hook import Optim
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.solve import gram_inverse, sylvester_symmetric

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

Split = Literal["sylvester", "symmetry", "zero"]


def adjusted(
    A: Tensor, B: Tensor, grad_A: Tensor | None, grad_B: Tensor | None, scale: float, split: Split = "sylvester"
) -> tuple[Tensor | None, Tensor | None]:
    """(h_A, h_B), shaped as A (r, in) and B (out, r): their equivalent gradient is nearest to ∂L/∂W.

    The gradient of a frozen factor is None, and so is its h. Gram matrices and solves are in fp64; an inverse is ridged
    by 1e-8 of the mean eigenvalue, and that of 0 is 0, so that while B = 0 only B moves.
    """
    a, b = A.double(), B.double()
    inverse_A, inverse_B = gram_inverse(a @ a.mT), gram_inverse(b.mT @ b)
    if grad_A is None or grad_B is None:
        h_A = None if grad_A is None else (inverse_B @ grad_A.double() / scale**2).to(A.dtype)
        h_B = None if grad_B is None else (grad_B.double() @ inverse_A / scale**2).to(B.dtype)
        return h_A, h_B
    g_A, g_B = grad_A.double() / scale**2, grad_B.double() / scale**2
    h_A, shared = inverse_B @ g_A, inverse_B @ (b.mT @ g_B) @ inverse_A
    h_B = g_B @ inverse_A - b @ shared
    if split != "zero":
        X = -shared / 2 if split == "symmetry" else sylvester_symmetric(b.mT @ b, a @ a.mT, -h_A @ a.mT)
        h_A, h_B = h_A + X @ a, h_B - b @ X
    return h_A.to(A.dtype), h_B.to(B.dtype)


def equivalent(A: Tensor, B: Tensor, h_A: Tensor | None, h_B: Tensor | None, scale: float) -> Tensor:
    """g̃ = s·(B h_A + h_B A) (out, in): what a step on the factors is to W, to first order."""
    total = torch.zeros(B.shape[0], A.shape[1], dtype=A.dtype, device=A.device)
    for left, right in ((B, h_A), (h_B, A)):
        if left is not None and right is not None:
            total.addmm_(left, right, alpha=scale)
    return total


@method("lora-pro", axis="optim", paper="arXiv:2407.18242", system=26, wants=("pair",), defaults="lora")
class LoRAPro(Optim):
    """Plain LoRA whose steps imitate full fine-tuning (Wang et al. 2024).

    With g = ∂L/∂W never formed, g_A = s·Bᵀg and g_B = s·gAᵀ, the (h_A, h_B) that minimise ‖s·B h_A + s·h_B A − g‖_F are
    h_A = (BᵀB)⁻¹g_A/s² + XA and h_B = (I − P_B) g_B (AAᵀ)⁻¹/s² − BX, with P_B = B(BᵀB)⁻¹Bᵀ and any X (r, r). ``split``:
    the X nearest to LoRA's own step, BᵀBX + XAAᵀ = −(BᵀB)⁻¹g_A Aᵀ/s²; the ``symmetry`` of the shared part; or ``zero``.

    ``mode="full"``, the official one: e = g̃ with X = 0 feeds Adam's moments m, v **of the shape of W**, and the
    normalised step n takes the gradient's place in a second adjustment; A ← A − η·h_A, B ← B − η·h_B. So η is on the
    scale of full fine-tuning (official 2e-5 with r = 8, s = 2). ``mode="efficient"``: h stands for the gradient in the
    run's own AdamW; moments are LoRA's.

    ===========  ============  ==========================================================
    state        shape         where
    ===========  ============  ==========================================================
    m, v         (out·in,)     with B; full mode: as much as full fine-tuning of W keeps
    ===========  ============  ==========================================================

    Defaults: β = (0.9, 0.999), ε = 1e-8, official. The file is plain LoRA's. What is no plain pair (heads, biases) gets
    AdamW. Gates on the pairs are refused: they are no part of the identity.

    Differences from the official code: s is the layer's (there 2 for every layer), pairs are those of a layer (there
    neighbours in a list), the ridge of an inverse is relative, moments are fp32 and not bf16, decay is decoupled.
    The gradients are adjusted after clipping and after the mean over replicas.
    """

    mode: Annotated[Literal["full", "efficient"], At(doc="moments of W's shape, or of the factors'")] = "full"
    split: Annotated[Split, At(doc="how A and B share what both can do")] = "sylvester"
    beta1: Annotated[float, At(ge=0, lt=1, doc="decay of the first moment, full mode")] = 0.9
    beta2: Annotated[float, At(ge=0, lt=1, doc="decay of the second moment, full mode")] = 0.999
    eps: Annotated[float, At(gt=0, doc="added to the root of the second moment, full mode")] = 1e-8

    @property
    def usual_rate(self) -> float | None:
        """2e-5 in full mode, which steps like full fine-tuning."""
        return 2e-5 if self.mode == "full" else None

    def on_attach(self, adapter: Adapter) -> None:
        if not any(True for _ in adapter.pairs()):
            raise UserError(f"lora-pro adjusts plain pairs of factors, and gates leave none in {adapter.recipe}")

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        return WeightSpaceAdam(groups, self) if self.mode == "full" else None

    @torch.no_grad()
    def before_optimizer(self, step: int) -> None:
        """Efficient mode: put h in the gradients' place."""
        if self.mode == "full":
            return
        for _, A, B, scale in self.adapter.pairs():
            if A.grad is not None or B.grad is not None:
                A.grad, B.grad = adjusted(A, B, A.grad, B.grad, scale, self.split)


class WeightSpaceAdam(torch.optim.AdamW):
    """Adam whose moments of a pair live in W's space; AdamW for every other tensor."""

    def __init__(self, groups: list[dict[str, Any]], method: LoRAPro) -> None:
        super().__init__(groups, betas=(method.beta1, method.beta2), eps=method.eps, weight_decay=0.0)
        self.method = method

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the gradients stay as they were."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = {p: group for group in self.param_groups for p in group["params"]}
        taken: list[tuple[nn.Parameter, Tensor]] = []
        for _, A, B, scale in self.method.adapter.pairs():
            mine = [p for p in (A, B) if p in groups and p.grad is not None]
            if mine:
                self._step_pair(A, B, scale, groups)
                taken += [(p, p.grad) for p in mine]
        for p, _ in taken:
            p.grad = None
        super().step()
        for p, grad in taken:
            p.grad = grad
        return loss

    def _step_pair(self, A: nn.Parameter, B: nn.Parameter, scale: float, groups: dict[nn.Parameter, dict]) -> None:
        grads = [p.grad if p in groups else None for p in (A, B)]
        owner = B if B in groups else A
        state, (beta1, beta2), eps = self.state[owner], groups[owner]["betas"], groups[owner]["eps"]
        e = equivalent(A, B, *adjusted(A, B, *grads, scale, "zero"), scale)
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(e).view(-1), torch.zeros_like(e).view(-1)
        state["step"] += 1
        t, m, v = state["step"].item(), state["exp_avg"].view_as(e), state["exp_avg_sq"].view_as(e)
        m.lerp_(e, 1 - beta1)
        v.mul_(beta2).addcmul_(e, e, value=1 - beta2)
        n = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt_() + eps)
        again = [None if g is None else scale * p for g, p in zip(grads, (B.mT @ n, n @ A.mT))]
        for p, h in zip((A, B), adjusted(A, B, *again, scale, self.method.split)):
            if h is not None:
                p.mul_(1 - groups[p]["lr"] * groups[p]["weight_decay"]).sub_(h, alpha=groups[p]["lr"])
