"""M-FAC: natural-gradient steps and optimal brain surgery by a Fisher matrix that is never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.hook import Optim, Schedule
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.fisher import BlockFisherInverse, FisherInverse, obs_prune
from veneer.parts.modes import in_mode
from veneer.parts.whole_gradients import loss_of, refuse_sharded

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@method("m-fac", axis="optim", paper="arXiv:2107.03356", system=71, defaults="lora")
class MFAC(Optim):
    """SGD preconditioned by the last m gradients (Frantar et al. 2021).

    u = F⁻¹g with F = λI + (1/m)·Σ gᵢgᵢᵀ over the last m steps' gradients, this one's included, in which decay is
    counted (g ← g + wd·w, not decoupled); with momentum v ← μv + (1 − μ)u; w ← w − η·v. As Γ (m, d) holds g,
    u = m·Γᵀ(mλI + S)⁻¹e with S = ΓΓᵀ: O(dm + m³) a step, the m × m part in fp64 by Cholesky, where the authors keep an
    LU without pivoting.

    ===========  ========  =========================================================================
    state        shape     where
    ===========  ========  =========================================================================
    Γ            (m, d)    the first tensor of each window, fp32 or bf16
    S            (m, m)    with it, fp64
    v            (d,)      with it, for μ > 0
    ===========  ========  =========================================================================

    Defaults: μ = 0, of the official code, which has m = 1024, λ = 1e-5 and η = 1e-3 for whole networks from gradients
    of 128 rows. Here η = 1e-2 is the usual rate, m = 64, since Γ is m times the adapter, and λ = 1e-3, since F shrinks
    with the batch and a factor whose gradients begin at 0 (A of LoRA) gets steps g/λ at first. ``count_rows`` divides
    by the gradients seen so far, where the official 1/m makes first steps up to m times longer. ``blocks`` gives each
    tensor or each site a window of its own. A window begins anew when a tensor of it comes, goes or changes its shape.

    Clipping gradients would change the curvature: they are taken as they were before it, and ``clip`` bounds ‖u‖
    instead. Gradients are means over the batch: λ is to be tuned with the batch size. The gradient that is stored is
    the mean over replicas. Pruning by the same curvature: `prune`.
    """

    window: Annotated[int, At(ge=1, doc="m, gradients that F is made of")] = 64
    damping: Annotated[float, At(gt=0, doc="λ")] = 1e-3
    momentum: Annotated[float, At(ge=0, lt=1, doc="μ, on u")] = 0.0
    clip: Annotated[float | None, At(gt=0, doc="largest ‖u‖₂ of a window")] = None
    blocks: Annotated[Literal["all", "site", "tensor"], At(doc="what shares a window")] = "all"
    count_rows: Annotated[bool, At(doc="divide by the gradients seen, while there are fewer than m")] = True
    dtype: Annotated[Literal["fp32", "bf16"], At(doc="of the gradients kept")] = "fp32"

    usual_rate = 1e-2

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        refuse_sharded(self.name, (p for group in groups for p in group["params"]))
        self.restored = 1.0
        return MFACSGD(groups, self)

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.limit, self.norm = schedule.clip, 0.0

    def after_backward(self, step: int) -> None:
        """The norm before clipping."""
        if self.limit is not None:
            self.norm = self._norm()

    def before_optimizer(self, step: int) -> None:
        """What clipping divided by."""
        clipped = self.limit is not None and self.norm > self.limit
        self.restored = self.norm / max(self._norm(), 1e-30) if clipped else 1.0

    def _norm(self) -> float:
        grads = [p.grad for group in self.adapter.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return float(torch.stack(torch._foreach_norm(grads)).norm()) if grads else 0.0


class MFACSGD(torch.optim.Optimizer):
    """The steps; ``method`` holds the hyper-parameters, groups their rates and decay."""

    def __init__(self, groups: list[dict[str, Any]], method: MFAC) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})
        self.method = method

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every window that has a gradient; tensors without one count as zeros in it."""
        loss = loss_of(closure)
        for members in self._windows().values():
            if any(p.grad is not None for p, _ in members):
                self._step(members)
        return loss

    def _windows(self) -> dict[str, list[tuple[nn.Parameter, dict[str, Any]]]]:
        """Tensors with their groups, by what shares a window."""
        names = {id(p): name for name, p in self.method.adapter.named_parameters()}
        found: dict[str, list[tuple[nn.Parameter, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                key = {"all": "", "site": names[id(p)].rpartition(".")[0], "tensor": names[id(p)]}[self.method.blocks]
                found.setdefault(key, []).append((p, group))
        return found

    def _step(self, members: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        hook, state = self.method, self.state[members[0][0]]
        g = torch.cat([self._gradient(p, group).flatten() for p, group in members])
        if "window" not in state or state["window"].shape[1] != len(g):
            state.clear()
            fresh = FisherInverse.empty(hook.window, len(g), hook.damping, g.to(TYPES[hook.dtype]))
            state.update(window=fresh.window, gram=fresh.gram, pushed=0)
        inverse = FisherInverse(state["window"], hook.damping, state["gram"], state["pushed"], hook.count_rows)
        inverse.push(g)
        state["pushed"] = inverse.pushed
        u = inverse.newest()
        if hook.clip is not None:
            u *= (hook.clip / u.norm().clamp_min(1e-30)).clamp_max(1.0)
        if hook.momentum:
            u = state.setdefault("momentum", torch.zeros_like(u)).lerp_(u, 1 - hook.momentum)
        for (p, group), piece in zip(members, u.split([p.numel() for p, _ in members])):
            p.sub_(piece.view_as(p), alpha=group["lr"])

    def _gradient(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        g = torch.zeros_like(p) if p.grad is None else p.grad * self.method.restored
        return g.add(p, alpha=group["weight_decay"])


def prune(
    model: nn.Module,
    params: Iterable[nn.Parameter],
    batches: Sequence[Any],
    sparsity: float,
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    damping: float = 1e-5,
    block: int | None = 128,
    rounds: int = 16,
) -> list[Tensor]:
    """Set a share of ``params`` to exactly 0 by optimal brain surgery, and move the others to make up for it.

    Serves for the tensors of an adapter and for those of a base alike. In each round, of every batch one mean gradient
    in eval mode, which make F in blocks of ``block`` consecutive entries (one for all when None); the share that is
    left falls geometrically. Defaults are the official ones but for m, which is ``len(batches)`` (there 64, the last of
    them left at zero by mistake). What was dropped in earlier rounds stays at 0 and is no part of F.

    Args:
        batches: mappings that ``model`` takes, with labels, unless ``loss`` says otherwise.
        sparsity: 0 ≤ s < 1, over all ``params`` together.
        loss: (model, batch) ↦ mean loss, 0-dim; the model's own ``loss`` when None.

    Returns:
        A mask of what is left for each tensor, True where it is kept. Gradients, modes and ``requires_grad`` are as
        before. Training on does not keep the zeros by itself.
    """
    params, loss = list(params), loss or (lambda m, batch: m(**batch).loss)
    if not 0 <= sparsity < 1:
        raise UserError(f"a sparsity is at least 0 and below 1, not {sparsity:g}")
    if not params or not batches:
        raise UserError("pruning needs tensors, and batches to take their gradients on; one of them is empty")
    sizes, wanted = [p.numel() for p in params], [p.requires_grad for p in params]
    kept = torch.ones(sum(sizes), dtype=torch.bool, device=params[0].device)
    try:
        for p in params:
            p.requires_grad_(True)
        for k in range(1, rounds + 1):
            with in_mode(model):
                rows = [_flat(torch.autograd.grad(loss(model, b), params, allow_unused=True), params) for b in batches]
            inverse = BlockFisherInverse(torch.stack(rows) * kept, damping, block)
            dropped = len(kept) - round(len(kept) * (1 - sparsity) ** (k / rounds))
            w = torch.cat([p.detach().flatten().double() for p in params])
            w, kept = obs_prune(w, inverse, dropped)
            with torch.no_grad():
                for p, piece in zip(params, w.split(sizes)):
                    p.copy_(piece.view_as(p))
    finally:
        for p, had in zip(params, wanted):
            p.requires_grad_(had)
    return [piece.view_as(p) for p, piece in zip(params, kept.split(sizes))]


def _flat(grads: Sequence[Tensor | None], params: Sequence[nn.Parameter]) -> Tensor:
    """One vector (d,), fp64."""
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for p, g in zip(params, grads)])
