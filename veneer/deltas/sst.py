"""SST: train W through its singular value decomposition, all values and a few vectors at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.core.adapted import Base
from veneer.core.delta import Delta, LoRAForm, Slot
from veneer.core.hook import Optim, Schedule
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.svd import truncated_svd

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


@method(
    "sst",
    axis="delta",
    paper="arXiv:2405.15481",
    system=44,
    gives=("linear", "foldable", "frozen-base"),
    defaults="sst-rounds",
)
class SST(Delta):
    """UΣVᵀ in the place of W: every singular value trains, and r singular vectors at a time (Zhao et al. 2024).

    y = ((xV)∘σ)Uᵀ + b. Of the m = min(out, in) triplets an active set of r trains its vectors, as tensors of their own,
    so that gradients and optimiser state exist for those alone; ``sst-rounds`` says when another set takes over.
    Gradients of vectors are ENHANCED by default: with G = ∂L/∂W, u_i gets G·v_i and v_i gets Gᵀ·u_i, where the chain
    rule has the factor σ_i, which leaves directions of small σ_i where they are. G is never formed.

    =======  =========  =========  =====================================
    tensor   shape      trained    start
    =======  =========  =========  =====================================
    sigma    (m,)       yes        Σ of W
    u        (out, r)   yes        the active columns of U
    v        (r, in)    yes        the active rows of Vᵀ
    U        (out, m)   no         U; its active columns are not read
    Vh       (m, in)    no         Vᵀ; its active rows are not read
    active   (r,) int   no         drawn by ``probabilities`` of Σ
    =======  =========  =========  =====================================

    Defaults: r = 64 as for OPT and LLaMA in the paper, which trains from scratch at the rates of full training. The
    base is the start: W waits untouched, or goes with ``keep_base=False``.

    Two factors take up to twice the memory of W; what shrinks is gradients and optimiser state. The weight is a
    product of two thin ones only where m is small, so a forward costs up to twice the base's. No official code was to
    be had: the sheet's account of it is second-hand, and ``sst-rounds`` says what is ours. Biases stay the base's.
    """

    rank: Annotated[int, At(ge=0, doc="r, singular vectors that train at a time")] = 64
    gradient: Annotated[Literal["enhanced", "plain"], At(doc="of the vectors: without or with the factor σ")] = (
        "enhanced"
    )

    replaces = True
    reasons = {"as_lora": "the singular values alone change W at full rank"}

    def slots(self) -> Iterable[Slot]:
        out, inn = self.site.out_features, self.site.in_features
        r, m = self.count, min(out, inn)
        yield Slot("sigma", "diagonal", (m,))
        yield Slot("u", "factor_b", (out, r), trained=r > 0)
        yield Slot("v", "factor_a", (r, inn), trained=r > 0)
        yield Slot("U", "pool", (out, m), trained=False)
        yield Slot("Vh", "pool", (m, inn), trained=False)

    @property
    def count(self) -> int:
        """r, or m where the matrix is smaller."""
        return min(self.rank, self.site.out_features, self.site.in_features)

    def build(self) -> None:
        self.rebuilt -= {"U", "Vh"}
        self.register_buffer("active", torch.arange(self.count, device=self.site_device()))
        if not self.site.factored():
            raise UserError(f"sst: {self.site.path} is a grouped convolution, where U and V have no factored form")
        W = self.site.weight()
        if W.numel():  # a base that was dropped has nothing to start from
            self.decompose(W)
            self.draw(0)

    @torch.no_grad()
    def decompose(self, W: Tensor) -> None:
        """Take U, Σ and Vᵀ of W (out, in), in the place of what was there; ``draw`` then fills u and v."""
        U, S, Vh = truncated_svd(W, min(W.shape), exact=True)
        self.U.copy_(U)
        self.sigma.copy_(S)
        self.Vh.copy_(Vh)

    @torch.no_grad()
    def draw(self, index: int) -> None:
        """Make active the set that iteration ``index`` draws from Σ as it stands; ``store`` what was active before."""
        if self.count:
            p = probabilities(self.sigma.detach()).double().cpu()
            chosen = torch.multinomial(p, self.count, generator=self.generator("active", index)).sort().values
            self.active.copy_(chosen)
            self.u.copy_(self.U[:, self.active])
            self.v.copy_(self.Vh[self.active])

    @torch.no_grad()
    def store(self) -> None:
        """Put the active vectors back among the others."""
        self.U[:, self.active] = self.u.to(self.U.dtype)
        self.Vh[self.active] = self.v.to(self.Vh.dtype)

    @torch.no_grad()
    def project(self) -> None:
        """Onto the constraints: σ ≥ 0, active vectors of length 1."""
        self.sigma.clamp_(min=0)
        tiny = torch.finfo(torch.float32).tiny
        self.u.div_(self.u.norm(dim=0).clamp_min(tiny))
        self.v.div_(self.v.norm(dim=1, keepdim=True).clamp_min(tiny))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, b = self.update(x), self.site.bias()
        if b is None:
            return y
        ones = (1 for _ in self.site.module.kernel_size) if self.site.kind == "conv" else ()
        return y + b.to(y.dtype).view(-1, *ones)

    def update(self, x: Tensor) -> Tensor:
        """The whole product. At a convolution or embedding it is taken in pieces by autograd.

        The last two of them are zero, and carry the enhanced gradients of u and of v.
        """
        site, at = self.site, self.active
        if site.kind == "linear":
            own = (self.sigma, self.u, self.v, self.U, self.Vh, at, self.compute_dtype(x))
            return _Spectral.apply(x, *own, self.gradient == "enhanced")
        resting = self.sigma.index_fill(0, at, 0.0)
        U, Vh, u, v, resting, sigma = self.cast(x, self.U, self.Vh, self.u, self.v, resting, self.sigma[at])
        y = site.lift(site.project(x, Vh) * resting, U)
        if self.gradient == "plain":
            return y + site.lift(site.project(x, v) * sigma, u)
        still_u, still_v = u.detach(), v.detach()
        h = site.project(x, still_v)
        y = y + site.lift(h * sigma, still_u)
        return y + site.lift(h, u - still_u) + site.lift(site.project(x, v - still_v), still_u)

    def fold(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        resting = self.sigma.index_fill(0, self.active, 0.0)
        M = (self.U.float() * resting) @ self.Vh.float()
        return M + (self.u * self.sigma[self.active]) @ self.v, b

    def weight(self, W: Tensor | None = None) -> Tensor:
        return self.fold(None, None)[0] - (self.site.weight().float() if W is None else W)

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        return None

    def parameter_count(self) -> int:
        """m + r·(in + out), m = min(in, out)."""
        out, inn = self.site.out_features, self.site.in_features
        return min(out, inn) + self.count * (inn + out)


class _Spectral(torch.autograd.Function):
    """``((x Vhᵀ)∘σ) Uᵀ`` with the active vectors in their places. Backward keeps x, and makes the rest again."""

    @staticmethod
    def forward(ctx, x, sigma, u, v, U, Vh, active, dtype, enhanced):
        ctx.save_for_backward(x, sigma, u, v, U, Vh, active)
        ctx.facts = dtype, enhanced
        with torch.autocast(x.device.type, enabled=False):
            U, V = _placed(U, u, active, 1, dtype), _placed(Vh, v, active, 0, dtype)
            h = x.reshape(-1, x.shape[-1]).to(dtype) @ V.T
            return (h.mul_(sigma.to(dtype)) @ U.T).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, sigma, u, v, U, Vh, active = ctx.saved_tensors
        dtype, enhanced = ctx.facts
        with torch.autocast(x.device.type, enabled=False):
            U, V = _placed(U, u, active, 1, dtype), _placed(Vh, v, active, 0, dtype)
            rows, g = x.reshape(-1, x.shape[-1]).to(dtype), grad.reshape(-1, grad.shape[-1])
            h, back = rows @ V.T, g @ U
            grad_sigma = (h * back).sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(sigma.dtype)
            factor = 1.0 if enhanced else sigma[active]
            grad_u = (g.T @ h[:, active]).to(u.dtype) * factor
            grad_v = ((back[:, active].T @ rows).to(v.dtype).T * factor).T
            grad_x = (back.mul_(sigma.to(dtype)) @ V).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_sigma, grad_u, grad_v, None, None, None, None, None


def _placed(resting: Tensor, active: Tensor, at: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """A copy of all vectors in ``dtype``, with those that train in their places."""
    return resting.to(dtype, copy=True).index_copy_(dim, at, active.detach().to(dtype))


def probabilities(sigma: Tensor) -> Tensor:
    """p_i = ½·(1/m + σ_i/Σσ) of (m,) values ≥ 0; uniform where all are zero."""
    total, even = sigma.sum(), torch.full_like(sigma, 1 / len(sigma))
    return even if total == 0 else 0.5 * (even + sigma / total)


@method("sst-rounds", axis="optim", paper="arXiv:2405.15481", system=44, defaults="sst")
class SSTRounds(Optim):
    """Which singular vectors SST trains, and for how long (Zhao et al. 2024, as the sheet has it).

    An iteration is ``steps`` optimiser steps with one active set. At its start other vectors are drawn without
    replacement, by p_i = ½·(1/m + σ_i/Σσ), their moments start from zero, and all rates rise from nearly 0 over
    ``warmup`` steps. A round is ``iterations`` of them, after which W = UΣVᵀ is decomposed anew, for orthogonal vectors
    and true singular values; all moments then start from zero. After each step σ ← max(σ, 0) and active vectors are
    scaled to length 1, both in fp32. There is no weight decay on σ, u and v.

    Defaults: 200 steps with 20 of warm-up, and ⌈m/r⌉ iterations a round for the largest m, are from memory and
    unverified; in a run of less than ten iterations one is a tenth of it, with a tenth of that to warm up. That σ keeps
    its moments between rounds is ours. What is drawn depends on seed, site and iteration: the same on every replica.
    """

    steps: Annotated[int | None, At(ge=1, doc="T₃, steps of an iteration; 200 or a tenth of the run when None")] = None
    warmup: Annotated[int | None, At(ge=0, doc="steps of warm-up in each; a tenth when None")] = None
    iterations: Annotated[int | None, At(ge=1, doc="T₂, iterations of a round; ⌈m/r⌉ when None")] = None

    def on_attach(self, adapter: Adapter) -> None:
        sites = self.sites()
        if not sites:
            raise UserError(f"sst-rounds is for the form sst, which {adapter.recipe} does not hold")
        self.drawn, self.every = 0, self.steps or 200
        self.round = self.iterations or max(math.ceil(len(d.sigma) / max(1, d.count)) for d in sites)

    def sites(self) -> list[SST]:
        """The deltas it acts on."""
        return [d for d in self.adapter.members() if isinstance(d, SST)]

    def groups(self, adapter: Adapter) -> list[dict[str, Any]]:
        own = {id(p) for d in self.sites() for p in (d.sigma, d.u, d.v)}
        named = [(n, p) for n, p in adapter.named_parameters() if id(p) in own and p.numel()]
        return [
            {"params": [p for _, p in named], "names": [n for n, _ in named], "weight_decay": 0.0, "spectral": True}
        ]

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.every = self.steps or min(200, max(1, schedule.steps // 10))

    def rate(self, group: dict[str, Any], step: int) -> float:
        """The warm-up within an iteration."""
        warm = self.every // 10 if self.warmup is None else self.warmup
        return min(1.0, (step % self.every + 1) / (warm + 1)) if group.get("spectral") else 1.0

    def before_step(self, step: int) -> None:
        if step and step % self.every == 0:
            self.drawn += 1
            again = self.drawn % self.round == 0
            for d in self.sites():
                d.store()
                if again:
                    d.decompose(d.fold(None, None)[0])
                d.draw(self.drawn)
                self._forget((d.u, d.v, d.sigma) if again else (d.u, d.v))

    def _forget(self, params: Iterable[Tensor]) -> None:
        """Let the optimiser begin anew with these tensors."""
        if self.adapter.optimizer is not None:
            for p in params:
                self.adapter.optimizer.state.pop(p, None)

    def after_step(self, step: int) -> None:
        for d in self.sites():
            d.project()

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state.get("drawn", 0)
