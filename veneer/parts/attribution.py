"""Which parts of a change of weights matter for a task: gradients along the straight path between two networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer.errors import UserError

Loss = Callable[[Any, Any], Tensor]  # (outputs, batch) → 0-dim
Weights = Mapping[str, Tensor]


def own_loss(outputs: Any, batch: Any) -> Tensor:
    """The loss that the model gives itself, for batches with labels."""
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise UserError("the calibration batches give no loss: add labels to every batch")
    return loss


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's own floating parameters by name, adapters left out; a tied tensor comes once."""
    own = ((n, p) for n, p in model.named_parameters() if "veneer" not in n.split(".") and "veneer_shared" not in n)
    return {n: p.detach() for n, p in own if p.is_floating_point()}


def loss_at(model: nn.Module, weights: Weights, batch: Any, loss: Loss = own_loss) -> Tensor:
    """The loss of a batch with these weights in the place of the model's, which stays as it is."""
    if hasattr(batch, "items"):
        return loss(functional_call(model, dict(weights), (), dict(batch)), batch)
    args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    return loss(functional_call(model, dict(weights), args), batch)


def fine_tuned(model: nn.Module, batches: list[Any], steps: int, lr: float, loss: Loss = own_loss) -> dict[str, Tensor]:
    """All weights after ``steps`` of AdamW without decay over ``batches``, in fp32; the model itself does not move.

    The model should be in eval mode: buffers would be written otherwise. Raises UserError when the loss is not finite.
    """
    old = base_weights(model)
    new = {n: p.float().clone().requires_grad_() for n, p in old.items()}
    optimizer = torch.optim.AdamW(new.values(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        found = loss_at(model, {n: p.to(old[n].dtype) for n, p in new.items()}, batches[step % len(batches)], loss)
        if not torch.isfinite(found):
            raise UserError(f"the short full fine-tune diverged at step {step + 1}: give a smaller rate than {lr:g}")
        gradients = torch.autograd.grad(found, list(new.values()), allow_unused=True)  # other adapters get none
        for p, g in zip(new.values(), gradients):
            p.grad = g
        optimizer.step()
    return {n: p.detach() for n, p in new.items()}


def path_gradients(
    model: nn.Module, baseline: Weights, target: Weights, batch: Any, points: int = 100, loss: Loss = own_loss
) -> dict[str, Tensor]:
    """(θ̄ − θ) ∘ (1/N)·Σ_k ∂L(θ(a_k))/∂θ by name, θ(a) = a·θ̄ + (1 − a)·θ and a_k = k/N for k = 0 … N − 1.

    ``baseline`` is θ̄ and ``target`` θ, both in fp32; over all entries it sums to L(θ̄) − L(θ) as N grows (Sundararajan
    et al. 2017; on the weights: Xie et al. 2021). N = 1 is the gradient at the target alone.
    """
    dtypes = {n: p.dtype for n, p in base_weights(model).items()}
    total = {n: torch.zeros_like(p) for n, p in target.items()}
    for k in range(points):
        at = {n: torch.lerp(target[n], baseline[n], k / points).requires_grad_() for n in target}
        found = loss_at(model, {n: p.to(dtypes[n]) for n, p in at.items()}, batch, loss)
        gradients = torch.autograd.grad(found, list(at.values()), allow_unused=True)
        for name, g in zip(at, gradients):
            if g is not None:
                total[name] += g
    return {n: (baseline[n] - target[n]) * t / points for n, t in total.items()}


def contributions(
    model: nn.Module,
    baseline: Weights,
    target: Weights,
    batches: Iterable[Any],
    points: int = 100,
    loss: Loss = own_loss,
) -> dict[str, Tensor]:
    """The mean over batches of |`path_gradients`|: what each number's change did for the task (FAIG)."""
    total, count = {n: torch.zeros_like(p) for n, p in target.items()}, 0
    for batch in batches:
        for name, value in path_gradients(model, baseline, target, batch, points, loss).items():
            total[name] += value.abs()
        count += 1
    return {n: t / max(1, count) for n, t in total.items()}
