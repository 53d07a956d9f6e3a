"""Optimisers of dense weights that step one tensor at a time, after the backward pass or inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from veneer.core.hook import Optim
from veneer.errors import UserError
from veneer.fields import At
from veneer.parts.whole_gradients import loss_of, refuse_sharded

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.core.hook import Schedule

UNPROJECTED = ("embed", "head", "norm", "bias")


class TensorSteps(Optim):
    """Matrices of layers get a rule of the method's own, all other tensors plain AdamW.

    The rule is the `TensorOptimizer` that ``stepper`` makes; groups with ``projected`` are those matrices.

    ``per_layer`` steps each tensor inside backward and frees its gradient, so that one gradient lives at a time: what
    needs them all at once is refused (accumulation, clipping by the global norm, several processes).
    """

    per_layer: Annotated[bool, At(doc="step inside backward, one gradient alive at a time")] = False

    handles = ()

    def stepper(self, groups: list[dict[str, Any]], names: dict[nn.Parameter, str]) -> TensorOptimizer:
        """The optimiser that knows the rule."""
        raise NotImplementedError

    def groups(self, adapter: Adapter) -> list[dict[str, Any]]:
        """The matrices that are projected, apart from what gets plain AdamW."""
        deltas = [d for d in adapter.deltas.values() if d.site.role not in UNPROJECTED]
        inside = {id(p) for d in deltas for p in d.parameters() if p.ndim >= 2}
        chosen = [(n, p) for n, p in adapter.named_parameters() if id(p) in inside]
        return [{"params": [p for _, p in chosen], "names": [n for n, _ in chosen], "projected": True}]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        names = {p: name for name, p in self.adapter.named_parameters()}
        refuse_sharded(self.name, names)
        return self.stepper(groups, names)

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        blocked = {
            "accumulation over micro-batches": schedule.accumulate > 1,
            "clipping by the norm of all gradients": schedule.clip is not None,
            "averaging gradients over processes": schedule.processes > 1,
        }
        wrong = next((what for what, hit in blocked.items() if hit), None)
        if self.per_layer and wrong:
            raise UserError(
                f"{self.name}(per_layer=True) frees each gradient inside backward, which leaves none for {wrong}; "
                f"give accumulate=1 and clip=None and one process, or per_layer=False"
            )

    def before_step(self, step: int) -> None:
        self._let_go()
        if self.per_layer:
            self.handles = tuple(
                p.register_post_accumulate_grad_hook(self._step_now) for p in self.adapter.parameters()
            )

    def after_backward(self, step: int) -> None:
        self._let_go()

    def _let_go(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = ()

    @torch.no_grad()
    def _step_now(self, p: nn.Parameter) -> None:
        """Inside backward: step one tensor and free its gradient."""
        if not torch.isfinite(p.grad).all():
            raise UserError(f"the gradient of {self.adapter.optimizer.names[p]} is not finite")
        group = next(g for g in self.adapter.optimizer.param_groups if any(p is q for q in g["params"]))
        self.adapter.optimizer.update(p, group)
        p.grad = None


class TensorOptimizer(torch.optim.Optimizer):
    """Steps tensor by tensor; ``method`` holds the hyper-parameters, ``names`` what each tensor is called."""

    def __init__(self, groups: list[dict[str, Any]], method: Any, names: dict[nn.Parameter, str]) -> None:
        usual = {"lr": 1e-3, "betas": (method.beta1, method.beta2), "eps": method.eps, "weight_decay": 0.0}
        super().__init__(groups, usual | {"projected": False})
        self.method, self.names = method, names

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every tensor that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    def update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        """Step one tensor by its gradient."""
        raise NotImplementedError


def adam_moments(state: dict[str, Any], R: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The moments m and v of R after this one, kept in ``state`` in fp32."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(R), torch.zeros_like(R)
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m.lerp_(R, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(R, R, value=1 - betas[1])
    return m, v
