"""LoRA-Pro: steps on A and B that move W along the nearest thing to its own gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from veneer.core.hook import Optim
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.solve import gram_inverse, sylvester_symmetric

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

Split = Literal["sylvester", "symmetry", "zero"]


class Solves:
    """What the adjustments of pairs of one shape share: A (…, r, in) and B (…, out, r) in fp64, and Gram inverses.

    An inverse is ridged by 1e-8 of the mean eigenvalue, and that of 0 is 0, so that while B = 0 only B moves.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        self.dtype, self.scale = A.dtype, scale
        self.a, self.b = A.double(), B.double()
        self.gram_a, self.gram_b = self.a @ self.a.mT, self.b.mT @ self.b
        self.inverse_a, self.inverse_b = gram_inverse(self.gram_a), gram_inverse(self.gram_b)

    def adjusted(
        self, grad_A: Tensor | None, grad_B: Tensor | None, split: Split
    ) -> tuple[Tensor | None, Tensor | None]:
        """(h_A, h_B), shaped as A and B: their equivalent gradient is nearest to ∂L/∂W; of a frozen factor None."""
        g_A, g_B = (None if g is None else g.double() / self.scale**2 for g in (grad_A, grad_B))
        h_A = None if g_A is None else self.inverse_b @ g_A
        h_B = None if g_B is None else g_B @ self.inverse_a
        if h_A is not None and h_B is not None:
            shared = self.inverse_b @ (self.b.mT @ g_B) @ self.inverse_a
            X = 0
            if split == "symmetry":
                X = -shared / 2
            elif split == "sylvester":
                X = sylvester_symmetric(self.gram_b, self.gram_a, -h_A @ self.a.mT)
            h_B = h_B - self.b @ (shared + X)
            h_A = h_A if split == "zero" else h_A + X @ self.a
        return tuple(None if h is None else h.to(self.dtype) for h in (h_A, h_B))


def adjusted(
    A: Tensor, B: Tensor, grad_A: Tensor | None, grad_B: Tensor | None, scale: float, split: Split = "sylvester"
) -> tuple[Tensor | None, Tensor | None]:
    """(h_A, h_B) of one pair A (r, in), B (out, r), or of a stack of pairs."""
    return Solves(A, B, scale).adjusted(grad_A, grad_B, split)


def equivalent(
    A: Tensor, B: Tensor, h_A: Tensor | None, h_B: Tensor | None, scale: float, out: Tensor | None = None
) -> Tensor:
    """g̃ = s·(B h_A + h_B A) (out, in): what a step on the factors is to W, to first order; as one product."""
    both = [(left, right) for left, right in ((B, h_A), (h_B, A)) if left is not None and right is not None]
    lefts, rights = zip(*both)
    return torch.mm(torch.cat(lefts, 1).mul_(scale), torch.cat(rights), out=out)


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
        for pairs, scale in alike(self.adapter.pairs()):
            h_A, h_B = solves(pairs, scale).adjusted(*gradients(pairs), self.split)
            for n, (A, B) in enumerate(pairs):
                A.grad, B.grad = (None if h is None else h[n] for h in (h_A, h_B))


Pairs = list[tuple[nn.Parameter, nn.Parameter]]


def alike(pairs: Iterable[tuple[Any, nn.Parameter, nn.Parameter, float]]) -> Iterator[tuple[Pairs, float]]:
    """The pairs with a gradient that can be solved together, and their scale: of the same shapes, scale and factors
    that train."""
    found: dict[tuple, Pairs] = {}
    for _, A, B, scale in pairs:
        trains = A.grad is not None, B.grad is not None
        if any(trains):
            found.setdefault((A.shape, B.shape, A.device, scale, trains), []).append((A, B))
    for (*_, scale, _), same in found.items():
        yield same, scale


def solves(pairs: Pairs, scale: float) -> Solves:
    """Of some pairs that are alike."""
    return Solves(*(torch.stack(factors) for factors in zip(*pairs)), scale)


def gradients(pairs: Pairs) -> tuple[Tensor | None, Tensor | None]:
    """Those of A (n, r, in) and of B (n, out, r); None where they do not train."""
    stacks = [[p.grad for p in factors] for factors in zip(*pairs)]
    return tuple(None if None in grads else torch.stack(grads) for grads in stacks)


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
        for p in (p for _, *pair, _ in self.method.adapter.pairs() for p in pair):
            if p not in groups and p.grad is not None:
                taken.append((p, p.grad))
                p.grad = None  # another's to step
        for pairs, scale in alike(self.method.adapter.pairs()):
            self._step_pairs(pairs, scale, groups)
            taken += [(p, p.grad) for pair in pairs for p in pair if p.grad is not None]
        for p, _ in taken:
            p.grad = None
        super().step()
        for p, grad in taken:
            p.grad = grad
        return loss

    def _step_pairs(self, pairs: Pairs, scale: float, groups: dict[nn.Parameter, dict[str, Any]]) -> None:
        solved, grads = solves(pairs, scale), gradients(pairs)
        nearest = solved.adjusted(*grads, "zero")
        again = [None if g is None else torch.empty_like(g) for g in grads]
        out, inn = pairs[0][1].shape[0], pairs[0][0].shape[1]
        room = pairs[0][0].new_empty(2, out, inn)
        for n, (A, B) in enumerate(pairs):
            group, state = self._owned(A, B, out * inn, groups)
            e = equivalent(A, B, *(None if h is None else h[n] for h in nearest), scale, room[0])
            step = normalised(e, state, group, room[1])
            for stack, value in zip(again, ((B.mT, step), (step, A.mT))):
                if stack is not None:
                    torch.mm(*value, out=stack[n]).mul_(scale)
        for factors, moves in zip(zip(*pairs), solved.adjusted(*again, self.method.split)):
            for p, h in zip(factors, moves if moves is not None else ()):
                p.mul_(1 - groups[p]["lr"] * groups[p]["weight_decay"]).sub_(h, alpha=groups[p]["lr"])

    def _owned(self, A: nn.Parameter, B: nn.Parameter, size: int, groups: dict) -> tuple[dict[str, Any], dict]:
        """The group and the state of a pair, which are B's where it trains."""
        owner = B if B in groups and B.grad is not None else A
        state = self.state[owner]
        if not state:
            state["step"] = torch.zeros((), device=A.device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros(size, device=A.device) for _ in range(2))
        return groups[owner], state


def normalised(e: Tensor, state: dict[str, Tensor], group: dict[str, Any], out: Tensor) -> Tensor:
    """Adam's normalised step n for the gradient e (out, in), written to ``out``.

    It is where torch's own step takes a 0 at rate −1; that goes through the moments once.
    """
    beta1, beta2 = group["betas"]
    adam(
        [out.zero_().view(-1)],
        [e.view(-1)],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        fused=e.device.type in ("cpu", "cuda"),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=-1.0,
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )
    return out
