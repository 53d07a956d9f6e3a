"""GaLore: full-parameter training whose Adam moments live in a low-rank subspace of the gradient."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.registry import method
from veneer.fields import At
from veneer.numerics import chance, quantize
from veneer.numerics.subspace import frame_of, project, project_back
from veneer.parts.tensor_steps import TensorOptimizer, TensorSteps

SMALL = 4096  # moments with fewer entries stay in fp32


@method("galore", axis="optim", paper="arXiv:2403.03507", system=32, wants=("dense-gradient",), defaults="full")
class GaLore(TensorSteps):
    """W itself trains, while Adam sees the gradient's leading r directions (Zhao et al. 2024).

    Every T steps V (in, r) becomes the leading right singular vectors of G = ∂L/∂W; then R = GV, Adam's normalised
    step N from the moments of R, and W ← W − η·α·NVᵀ with the bias corrections in η; then decay, W ← W − η·λ·W.
    Where out < in the left vectors U (out, r) serve: R = UᵀG. ``side`` turns that round, forces one, or takes both.

    =========  ================  ==============================================================
    state      shape             where
    =========  ================  ==============================================================
    V or U     (in|out, r)       each projected matrix, fp32
    m, v       (out, r)|(r, in)  each projected matrix
    m, v       as the tensor     plain AdamW: vectors, tables, heads and what ``train`` names
    =========  ================  ==============================================================

    Defaults: r = 128, T = 200, α = 0.25, ``std`` (the group settings of the official README and of transformers),
    β = (0.9, 0.999), ε = 1e-6 before bias correction, λ the run's. α multiplies the rate of projected matrices alone.
    RoBERTa on GLUE: r = 4, α = 4, T = 500, rate 3e-5.

    A refresh keeps the moments as they are, in the old basis (official); ``on_refresh="reset"`` starts them anew,
    ``"rotate"`` carries m over by VᵀV′ and v by its squares. ``svd="randomized"`` takes a tenth of the time at r = 128
    of 2048 × 2048, and less at smaller ranks. ``bits=8`` keeps m as int8 and √v as uint8 by blocks of 256, from 4096
    entries on, rounded at random so that small changes count on average.

    A convolution's kernel is taken as out × in·k·k. The official side rule looks at the shape of R, which fails for
    r ≥ min(out, in); here the side is remembered. Its Tucker projector for kernels does not run and is left out, and so
    is Adafactor.

    ``per_layer`` steps each tensor inside backward and frees its gradient, so that one gradient lives at a time: what
    needs them all at once is refused (accumulation, clipping by the global norm, several processes).
    """

    rank: Annotated[int, At(ge=1, doc="r; at most the shorter side counts")] = 128
    gap: Annotated[int, At(ge=1, doc="T, steps between two decompositions")] = 200
    scale: Annotated[float, At(gt=0, doc="α, on the step of projected matrices")] = 0.25
    side: Annotated[Literal["std", "reverse_std", "left", "right", "full"], At(doc="what is projected")] = "std"
    svd: Annotated[Literal["exact", "randomized"], At(doc="how the subspace is found")] = "exact"
    on_refresh: Annotated[Literal["keep", "reset", "rotate"], At(doc="what becomes of the moments")] = "keep"
    bits: Annotated[Literal[32, 8], At(doc="a number of the moments")] = 32
    beta1: Annotated[float, At(ge=0, lt=1, doc="decay of the first moment")] = 0.9
    beta2: Annotated[float, At(ge=0, lt=1, doc="decay of the second moment")] = 0.999
    eps: Annotated[float, At(gt=0, doc="added to the root of the second moment")] = 1e-6

    def stepper(self, groups: list[dict[str, Any]], names: dict[nn.Parameter, str]) -> TensorOptimizer:
        return GaLoreAdamW(groups, self, names)


class GaLoreAdamW(TensorOptimizer):
    """AdamW as the official code has it, in the subspace for groups with ``projected``."""

    def update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        """Step one tensor by its gradient."""
        state, hook, (beta1, beta2) = self.state[p], self.method, group["betas"]
        t = state.setdefault("step", 0)
        G = p.grad.flatten(1) if group["projected"] else p.grad
        if group["projected"] and t % hook.gap == 0:
            self._refresh(p, G, state)
        frame = {k: state[k] for k in ("left", "right") if k in state}
        R = project(G, frame)
        m, v = self._moments(state, R)
        m.lerp_(R, 1 - beta1)
        v.mul_(beta2).addcmul_(R, R, value=1 - beta2)
        N = project_back(m / (v.sqrt() + group["eps"]), frame).view_as(p)
        age = 1 + (t % hook.gap if frame and hook.on_refresh == "reset" else t)
        rate = group["lr"] * math.sqrt(1 - beta2**age) / (1 - beta1**age)
        p.sub_(N, alpha=rate * (hook.scale if group["projected"] else 1.0))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        self._keep(p, state, m, v)
        state["step"] = t + 1

    def _refresh(self, p: nn.Parameter, G: Tensor, state: dict[str, Any]) -> None:
        hook, t = self.method, state["step"]
        draw = chance.generator(hook.seed, self.names.get(p, ""), "galore subspace", t)
        new = frame_of(G, hook.rank, hook.side, hook.svd == "exact", draw)
        if t and hook.on_refresh == "rotate":
            turn = {k: state[k].mT @ new[k] for k in new}
            m, v = self._moments(state, project(G, new))
            self._keep(p, state, project(m, turn), project(v, {k: q.square() for k, q in turn.items()}))
        elif hook.on_refresh == "reset":
            state.pop("exp_avg", None)
        state.update(new)

    def _moments(self, state: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
        """m and v in fp32, zeros of that shape at first."""
        if "exp_avg" not in state:
            return torch.zeros_like(like), torch.zeros_like(like)
        if state["exp_avg"].dtype != torch.int8:
            return state["exp_avg"], state["exp_avg_sq"]
        return (
            quantize.dequantise_signed(state["exp_avg"], state["exp_avg_scale"], like.shape),
            quantize.dequantise_root(state["exp_avg_sq"], state["exp_avg_sq_scale"], like.shape),
        )

    def _keep(self, p: nn.Parameter, state: dict[str, Any], m: Tensor, v: Tensor) -> None:
        if self.method.bits == 32 or m.numel() < SMALL:
            state["exp_avg"], state["exp_avg_sq"] = m, v
            return
        draw = chance.generator(self.method.seed, self.names.get(p, ""), "galore rounding", state["step"])
        state["exp_avg"], state["exp_avg_scale"] = quantize.quantise_signed(m, generator=draw)
        state["exp_avg_sq"], state["exp_avg_sq_scale"] = quantize.quantise_root(v, generator=draw)
