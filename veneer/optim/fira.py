"""Fira: full-rank steps with low-rank optimiser state."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.registry import method
from veneer.fields import At
from veneer.numerics import chance
from veneer.numerics.subspace import frame_of, project, project_back
from veneer.parts.tensor_steps import TensorOptimizer, TensorSteps, adam_moments

TINY = 1e-8  # the official divisor guard
NONE = 1e-12  # a residual below this says nothing of how large the next one may be


def row_scales(N: Tensor, R: Tensor, side: str, cap: float | None = None) -> Tensor:
    """φ: how much Adam stretches each row (``right``: (m, 1)) or column (``left``: (1, n)) inside the subspace.

    N, R: (m, r) or (r, n), Adam's normalised step and the projected gradient; where R is 0, φ is 0. ``cap`` bounds φ by
    that many medians.
    """
    dim = 1 if side == "right" else 0
    inside = R.norm(dim=dim, keepdim=True)
    phi = (N.norm(dim=dim, keepdim=True) / (inside + TINY)).where(inside > 0, 0.0)
    return phi if cap is None else phi.clamp_max(cap * phi.median())


def limit_growth(S: Tensor, before: Tensor | None, growth: float) -> tuple[Tensor, Tensor]:
    """S scaled down to ‖S‖ ≤ γ·``before``, in place, and its norm; unlimited where there was nothing before."""
    norm = S.norm()
    if before is not None and before > NONE:
        factor = torch.clamp_min(norm / (before + TINY), growth) / growth
        S.div_(factor)
        norm = norm / factor
    return S, norm


@method("fira", axis="optim", paper="arXiv:2410.01623", system=42, wants=("dense-gradient",), defaults="full")
class Fira(TensorSteps):
    """GaLore that keeps the rest of the gradient, scaled row by row as Adam scales inside (Chen et al. 2024).

    P, R = GP and Adam's normalised step N = m/(√v + ε) of R are GaLore's. What lies outside the subspace goes along as
    S = φ ⊙ (G − RPᵀ) with φ_i = ‖N_i‖/‖R_i‖ for each of the long side's rows (columns where out < in), and grows by at
    most γ from step to step: S ← S/c with c = max(‖S‖/‖S_before‖, γ)/γ. Then W ← W − η·α·(NPᵀ + S), with Adam's bias
    corrections in η, and W ← W − η·λ·W.

    ============  ================  =======================================
    state         shape             where
    ============  ================  =======================================
    P             (in|out, r)       each projected matrix, fp32
    m, v          (out, r)|(r, in)  each projected matrix
    ‖S_before‖    ()                each projected matrix
    m, v          as the tensor     plain AdamW for what is not projected
    ============  ================  =======================================

    Defaults: r = 8, T = 200, α = 1, γ = 1.01, β = (0.9, 0.999), ε = 1e-6 before bias correction (the package's).
    Pre-training: r a quarter of the width, rate 0.01. LLaMA-7B on commonsense tasks: r = 32, rate 1e-4.

    Differences: α multiplies the step. The official code subtracts an α-scaled projection from G, so that its
    α = 0.25 is an interpolation, φ⊙G + α(NPᵀ − φ⊙RPᵀ), and the step keeps the full rate: ``scaling="official"``.
    A layer whose gradient was zero at first is not throttled to 1 % of growth a step: the limiter begins with the
    first residual there is. ``cap`` bounds φ by a multiple of its median (a row of R near zero makes φ huge).

    The optimiser's ``seen`` holds of each matrix's last step φ's mean and largest, ‖S‖/‖NPᵀ‖ and c.
    """

    rank: Annotated[int, At(ge=1, doc="r; at most the shorter side counts")] = 8
    gap: Annotated[int, At(ge=1, doc="T, steps between two decompositions")] = 200
    scale: Annotated[float, At(gt=0, doc="α")] = 1.0
    scaling: Annotated[Literal["step", "official"], At(doc="what α multiplies")] = "step"
    growth: Annotated[float, At(ge=1, doc="γ, the most that the residual's norm may grow by in a step")] = 1.01
    cap: Annotated[float | None, At(gt=0, doc="bound of φ in medians of φ; none when None")] = None
    side: Annotated[Literal["std", "reverse_std", "left", "right"], At(doc="what is projected")] = "std"
    svd: Annotated[Literal["exact", "randomized"], At(doc="how the subspace is found")] = "exact"
    beta1: Annotated[float, At(ge=0, lt=1, doc="decay of the first moment")] = 0.9
    beta2: Annotated[float, At(ge=0, lt=1, doc="decay of the second moment")] = 0.999
    eps: Annotated[float, At(gt=0, doc="added to the root of the second moment")] = 1e-6

    def stepper(self, groups: list[dict[str, Any]], names: dict[nn.Parameter, str]) -> TensorOptimizer:
        return FiraAdamW(groups, self, names)


class FiraAdamW(TensorOptimizer):
    """Fira's step for groups with ``projected``, AdamW with the decay after the step for the others."""

    def __init__(self, groups: list[dict[str, Any]], method: Fira, names: dict[nn.Parameter, str]) -> None:
        super().__init__(groups, method, names)
        self.seen: dict[str, dict[str, Tensor]] = {}

    def update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        """Step one tensor by its gradient."""
        state, betas = self.state[p], group["betas"]
        t = state["step"] = state.get("step", 0) + 1
        rate = group["lr"] * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        if group["projected"]:
            p.sub_(self._direction(p, state, group).view_as(p), alpha=rate)
        else:
            m, v = adam_moments(state, p.grad, betas)
            p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-rate)
        p.mul_(1 - group["lr"] * group["weight_decay"])

    def _direction(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """α·(back(N) + S), or the official combination."""
        hook, G, t = self.method, p.grad.flatten(1), state["step"]
        if (t - 1) % hook.gap == 0:
            draw = chance.generator(hook.seed, self.names[p], "fira subspace", t)
            state.update(frame_of(G, hook.rank, hook.side, hook.svd == "exact", draw))
        side = "left" if "left" in state else "right"
        frame = {side: state[side]}
        R = project(G, frame)
        m, v = adam_moments(state, R, group["betas"])
        N = m / (v.sqrt() + group["eps"])
        inner, outer = (hook.scale, 1.0) if hook.scaling == "official" else (1.0, hook.scale)
        back = project_back(N, frame).mul_(inner)
        phi = row_scales(N, R, side, hook.cap)
        S = (G - project_back(R, frame).mul_(inner)).mul_(phi)
        asked = S.norm()
        S, state["residual"] = limit_growth(S, state.get("residual"), hook.growth)
        outside, limit = state["residual"] / back.norm(), asked / state["residual"]
        self.seen[self.names[p]] = {"mean": phi.mean(), "largest": phi.max(), "outside": outside, "limit": limit}
        return back.add_(S).mul_(outer)
