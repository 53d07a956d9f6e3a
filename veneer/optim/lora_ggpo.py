"""LoRA-GGPO and LoRA-MGPO: gradients taken at perturbed weights, so that the adapter ends in a flat region."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.core.context import current
from veneer.core.hook import Optim
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics import chance
from veneer.numerics.norms import row_norms, row_squares

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.core.delta import Delta
    from veneer.core.hook import Schedule


def equivalent_row_norms(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scale: float) -> Tensor:
    """‖ĝᵢ‖₂ of each row of ĝ = s·(B ∂A + ∂B A), (out,), without forming ĝ (out, in): ĝ = s·[B, ∂B][∂A; A]."""
    C, D = torch.cat([B, grad_B], 1), torch.cat([grad_A, A])
    return scale * ((C @ (D @ D.mT)) * C).sum(1).clamp_min(0).sqrt()


def noise_size(
    w: Tensor, n: Tensor, sigma: float, beta: float, inn: int, power: int = 2, cap: float | None = None
) -> Tensor:
    """τᵢ = (σ·wᵢ + β·nᵢ^power)/√out of each row, (out,), at most cap·wᵢ/√in."""
    tau = (sigma * w + beta * n**power) / len(w) ** 0.5
    return tau if cap is None else torch.minimum(tau, cap * w / inn**0.5)


@method("lora-ggpo", axis="optim", paper="arXiv:2502.14538", system=78, wants=("pair",), defaults="lora")
class LoRAGGPO(Optim):
    """Random dense noise on the merged weight, sized row by row by the weight and its gradient (2025).

    In training y = x(W + s·BA + E)ᵀ + b with Eᵢⱼ ~ N(0, τᵢ²), drawn for every forward, one E for all its tokens, and no
    gradient through E. After each backward τᵢ = (σ·wᵢ + β·nᵢ²)/√out with wᵢ = ‖(W + s·BA)ᵢ‖₂ and nᵢ the row norms of
    LoRA's equivalent gradient ĝ = s·(B ∂A + ∂B A), which stands in for ∂L/∂W.

    ======  =========  ==============================================
    state   shape      where
    ======  =========  ==============================================
    τ       (out,)     each site; none before the first step
    ======  =========  ==============================================

    Defaults: σ = 0.03, β = 0.01, of kohya-ss/sd-scripts, the implementation that could be read: the authors' code could
    not be had, and that the paper combines the terms just so is unverified. Nothing else trains; the file is LoRA's.
    Costs about a forward product more each way, and the drawing; E is drawn again in backward and never kept.

    Differences from kohya's: w is exact (``rows="mean"`` is its estimate √(w̄² + ‖(BA)ᵢ‖²), with its scale s put right);
    τ is at most a tenth of a typical entry of its row, since β·n² is not scale-free and diverged on losses with large
    gradients (``cap=None`` lifts that, ``power=1`` takes β·n). ``follow_rate`` shrinks τ with the learning rate. E is
    the same on every replica and when a block is recomputed.
    """

    sigma: Annotated[float, At(ge=0, doc="σ, share of the weight's row norm")] = 0.03
    beta: Annotated[float, At(ge=0, doc="β, share of the gradient's row norm")] = 0.01
    power: Annotated[Literal[2, 1], At(doc="of the gradient's row norm")] = 2
    cap: Annotated[float | None, At(gt=0, doc="largest τ over a typical entry wᵢ/√in")] = 0.1
    rows: Annotated[Literal["exact", "mean"], At(doc="how the weight's row norms are had")] = "exact"
    follow_rate: Annotated[bool, At(doc="multiply τ by the schedule's share of the peak rate")] = False

    def on_attach(self, adapter: Adapter) -> None:
        if not any(True for _ in adapter.pairs()):
            raise UserError(f"lora-ggpo sizes its noise by plain pairs of factors; {adapter.recipe} has none")
        self.tau: dict[str, Tensor] = {}
        self.next: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        self.share = 1.0

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.run = schedule

    def before_step(self, step: int) -> None:
        """Let the layers run with noise for the length of this step's forwards and backwards."""
        self._let_go()
        self.share = self.run.factor(step) if self.follow_rate else 1.0
        for path, tau in self.tau.items() if self.share and (self.sigma or self.beta) else ():
            d = self.adapter.deltas.get(path)
            if d is not None:
                self.handles.append(d.site.module.register_forward_hook(partial(self._perturb, d, tau)))

    def _perturb(self, delta: Delta, tau: Tensor, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        """The layer's output with x Eᵀ added."""
        if not module.training or self.adapter.name in self.adapter.root.switch.off:
            return y
        site, ctx, x = delta.site, current(), args[0]
        seed = chance.derived_seed(self.seed, site.path, "ggpo", 0 if ctx is None else ctx.draw)

        def drawn(x: Tensor) -> Tensor:
            noise = torch.randn(site.out_features, site.in_features, generator=torch.Generator().manual_seed(seed))
            E = noise.to(tau.device) * (self.share * tau)[:, None]
            return site.run(x, E.to(y.dtype))

        change = checkpoint(drawn, x, use_reentrant=False, preserve_rng_state=False)
        if site.rows is None:
            return y + change
        return y + nn.functional.pad(change, (site.rows.start, y.shape[-1] - site.rows.stop))

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Take the noise off, and size the next step's by the gradients as they are before clipping."""
        self._let_go()
        for path, d in self.adapter.deltas.items():
            A, B, s = d.pair() or (None, None, None)
            if isinstance(A, nn.Parameter) and A.grad is not None and B.grad is not None:
                n, w = equivalent_row_norms(A, B, A.grad, B.grad, s), self._weight_norms(d)
                self.next[path] = noise_size(w, n, self.sigma, self.beta, A.shape[1], self.power, self.cap)

    def before_optimizer(self, step: int) -> None:
        """The gradients were finite."""
        self.tau |= self.next

    def _weight_norms(self, delta: Delta) -> Tensor:
        """w (out,): of the merged weight, what a start moved out of it included."""
        path, (A, B, s) = delta.site.path, delta.pair()
        if path not in self.squares:
            self.squares[path] = row_squares(delta.site.weight())
        squares = self.squares[path]
        if self.rows == "mean":
            low = s * ((B @ (A @ A.mT)) * B).sum(1).clamp_min(0).sqrt()
            return (squares.sqrt().mean().square() + low.square()).sqrt()
        if delta.offset is not None:
            A0, B0, s0 = delta.offset.pair()
            A, B = torch.cat([A, A0]), torch.cat([B, B0 * (s0 / s)], dim=1)
        return row_norms(squares, delta.site.weight(), A, B, s)

    def _let_go(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def on_end(self) -> None:
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        return {"tau": dict(self.tau)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tau = dict(state.get("tau", {}))


@method("lora-mgpo", axis="optim", paper="arXiv:2502.14538", system=78, wants=("pair",), defaults="lora")
class LoRAMGPO(Optim):
    """Step from θ by the gradient at θ + ε, with ε along the optimiser's momentum (LoRA-MGPO, EMNLP Findings 2025).

    θ is all factors A, B together: ε_t = ρ·m_{t−1}/‖m_{t−1}‖₂/ḡ_{t−1}, with m the optimiser's own first moment and
    ḡ_t = β·ḡ_{t−1} + (1 − β)·‖∇_t‖₂. All micro-batches of a step see θ + ε; then θ is put back from a copy, bit for
    bit, and the optimiser moves it by ∇L(θ + ε). No second backward; one vector more, within the step.

    Defaults: ρ = 0.05, β = 0.9, of the paper for classifiers (rate 1e-4); for text it has ρ = 0.01 and β = 0.8, with
    Adam's own β₁ lowered alike (rate 2e-5). Nothing else trains; the file is LoRA's.

    Ours: ε = 0 and ḡ = ‖∇‖ at the first step; the radius ρ/ḡ is at most ``largest``, for gradients that nearly vanish.
    ε points up the loss, as in SAM. The norms are of averaged, unclipped gradients, so equal on every replica.
    """

    rho: Annotated[float, At(ge=0, doc="ρ, the radius times the mean gradient norm")] = 0.05
    beta: Annotated[float, At(ge=0, lt=1, doc="β, decay of the mean gradient norm")] = 0.9
    largest: Annotated[float, At(gt=0, doc="bound on the radius ρ/ḡ")] = 1.0

    def on_attach(self, adapter: Adapter) -> None:
        if not any(True for _ in adapter.pairs()):
            raise UserError(f"lora-mgpo moves plain pairs of factors; {adapter.recipe} has none")
        self.mean: float | None = None
        self.norm = 0.0
        self.kept: list[tuple[nn.Parameter, Tensor]] = []

    def _factors(self) -> list[nn.Parameter]:
        return [p for _, A, B, _ in self.adapter.pairs() for p in (A, B) if p.requires_grad]

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """θ ← θ + ε."""
        if not self.rho or not self.mean:
            return
        params = self._factors()
        moments = [self.adapter.optimizer.state[p].get("exp_avg") for p in params]
        if any(m is None or m.shape != p.shape for m, p in zip(moments, params)):
            kind = type(self.adapter.optimizer).__name__
            raise UserError(f"lora-mgpo follows the first moment of each factor, and {kind} keeps none; use AdamW")
        norm = torch.stack(torch._foreach_norm(moments)).norm()
        radius = min(self.rho / self.mean, self.largest)
        self.kept = [(p, p.detach().clone()) for p in params]
        for p, m in zip(params, moments):
            p.add_(m * (radius / norm.clamp_min(1e-30)))

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """θ as it was, bit for bit."""
        for p, value in self.kept:
            p.copy_(value)
        self.kept = []
        grads = [p.grad for p in self._factors() if p.grad is not None]
        self.norm = float(torch.stack(torch._foreach_norm(grads)).norm()) if grads else 0.0

    def before_optimizer(self, step: int) -> None:
        """The gradients were finite: their norm before clipping counts."""
        self.mean = self.norm if self.mean is None else self.beta * self.mean + (1 - self.beta) * self.norm

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state.get("mean")
