"""Flexora: find the blocks worth adapting by their weight on a validation loss, then train those alone."""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from veneer.core.hook import Plan, Ranks
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.fused import by_autograd
from veneer.parts.attach import attach
from veneer.parts.attribution import loss_at
from veneer.parts.modes import in_mode

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


def weights(h: Tensor) -> Tensor:
    """w = n·softmax(h) (n,): all 1 at h = 0, and n together always."""
    return len(h) * h.softmax(0)


def selected(h: dict[int, float], keep: int | None = None) -> list[int]:
    """The blocks with h > 0, or the ``keep`` largest; all of them where none is above 0."""
    if keep is not None:
        return sorted(sorted(h, key=h.__getitem__, reverse=True)[:keep])
    return [i for i, value in h.items() if value > 0] or list(h)


class Search:
    """The two-level problem on a model with an adapter: θ are its tensors, h a number a block."""

    def __init__(self, adapter: Adapter, power: int = 1) -> None:
        self.adapter, self.model, self.power = adapter, adapter.model, power
        self.blocks = sorted({s.block for s in adapter.sites if s.block is not None})
        own = {id(p): n for n, p in self.model.named_parameters()}
        self.names = [own[id(p)] for p in adapter.parameters()]

    def weigh(self, h: Tensor) -> None:
        """Let every update of block i count w_i times (to ``power``), with h in the graph."""
        w = dict(zip(self.blocks, weights(h) ** self.power))
        for d in self.adapter.deltas.values():
            if d.site.block is not None:
                d.gate = w[d.site.block].expand(d.rank)

    def loss(self, theta: list[Tensor], h: Tensor, batch: Any) -> Tensor:
        """The model's loss with these tensors and weights."""
        self.weigh(h)
        return loss_at(self.model, dict(zip(self.names, theta)), batch)

    def unrolled(self, theta: list[Tensor], h: Tensor, batches: list[Any], lr: float) -> list[Tensor]:
        """θ after a step of gradient descent on each batch, as a function of h."""
        for batch in batches:
            found = torch.autograd.grad(self.loss(theta, h, batch), theta, create_graph=True)
            theta = [t - lr * g for t, g in zip(theta, found)]
        return theta

    def gradient(self, theta: list[Tensor], h: Tensor, batches: list[Any], retain: bool = False) -> Tensor:
        """The mean of ∂L/∂h over batches; through θ too where it depends on h."""
        total = torch.zeros_like(h)
        for left, batch in zip(range(len(batches) - 1, -1, -1), batches):
            total += torch.autograd.grad(self.loss(theta, h, batch), h, retain_graph=retain and left > 0)[0]
        return total / len(batches)


@method("flexora", axis="ranks", paper="arXiv:2408.10774", system=5, wants=("linear",), defaults="lora")
class Flexora(Ranks):
    """Choose whole transformer blocks by hyper-parameter optimisation, once, before training (Wei et al. 2024).

    min_h L_val(θ*(h), h) with θ*(h) = argmin_θ L_train(θ, h), where every block i has plain LoRA whose update counts
    w_i = n·softmax(h)_i times. From h = 0, in turn: a step of θ on a training batch with w held, a step of Adam on h by
    ∂L_val/∂h. The blocks with h_i > 0 stay; the search is thrown away, and the recipe's form starts afresh there with
    w = 1. Sites outside blocks stay. ``h`` holds what was found, by block.

    The search runs inside ``attach``, on the calibration batches: the first ones train, the last ``validation`` share
    is held out. Give it some dozens of batches with labels; training afterwards is as always, in any loop, and the file
    holds the form on the chosen blocks (PEFT: plain LoRA on those layers). n = 1 leaves nothing to choose.

    Defaults: the official code's h = 0, Adam at 0.01, 8 validation batches a step in eval mode, h > 0. Its search is
    one epoch of at most 5000 rows at 1e-4, validated on 200; steps = 100, lr = 3e-4 and half the batches are this
    implementation's choice. ``unroll=0`` is the official rule, which takes θ as constant in ∂L_val/∂h; with K > 0 θ
    takes K steps of plain gradient descent at ``lr`` in place of Adam's, and the gradient goes through them (the
    paper's unrolled differentiation; costs K graphs, and needs a larger rate). ``gate_power=3`` weighs as the official
    hooks do, which scale the inputs of dropout, A and B each. Adam's state is kept, where the official block switching
    clears it. Two seeds often disagree, and what is found is no cause: the sheet's trial never ranked a damaged layer
    first.
    """

    rank: Annotated[int, At(ge=1, doc="rank of the search's pairs")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of their scale; the rank when None")] = None
    steps: Annotated[int, At(ge=1, doc="of θ, and of h", unit="steps")] = 100
    lr: Annotated[float, At(gt=0, doc="rate of θ")] = 3e-4
    hyper_lr: Annotated[float, At(gt=0, doc="rate of h")] = 0.01
    batches: Annotated[int, At(ge=1, doc="validation batches a step of h")] = 8
    validation: Annotated[float, At(gt=0, lt=1, doc="share of the calibration batches held out")] = 0.5
    unroll: Annotated[int, At(ge=0, doc="K, steps of θ that ∂L/∂h goes through")] = 0
    keep: Annotated[int | None, At(ge=1, doc="blocks to keep; those with h > 0 when None")] = None
    gate_power: Annotated[Literal[1, 3], At(doc="the power of w")] = 1

    h: dict[int, float]

    def survey(self, model: nn.Module, sites: list[Site], batches: list[Any]) -> None:
        """Search; the model does not move."""
        within = [s for s in sites if s.kind in ("linear", "conv") and s.block is not None]
        if not within:
            raise UserError("flexora chooses among a model's blocks, and no selected layer lies in one")
        if len(batches) < 2:
            raise UserError("flexora holds out a part of the calibration batches: give two at least")
        held = min(len(batches) - 1, max(1, round(self.validation * len(batches))))
        paths = [s.path for s in within]
        adapter = attach(
            model, "lora", rank=self.rank, alpha=self.alpha, sites=paths, name="flexora-search", seed=self.seed
        )
        try:
            with in_mode(model):
                search = Search(adapter, self.gate_power)
                found = self._search(search, batches[:-held], batches[-held:])
            self.h = dict(zip(search.blocks, found.tolist()))
        finally:
            adapter.remove()

    def _search(self, search: Search, train: list[Any], held: list[Any]) -> Tensor:
        """h (n,) after all steps."""
        theta = search.adapter.parameters()
        h = torch.zeros(len(search.blocks), device=theta[0].device, requires_grad=True)
        inner = torch.optim.AdamW(theta, lr=self.lr, weight_decay=0.0)
        outer = torch.optim.Adam([h], lr=self.hyper_lr)
        training, validating = itertools.cycle(train), itertools.cycle(held)
        if self.unroll:
            for d in search.adapter.deltas.values():
                d.product = by_autograd
        for step in range(self.steps):
            ahead = list(itertools.islice(validating, self.batches))
            if self.unroll:
                with sdpa_kernel(SDPBackend.MATH):
                    new = search.unrolled(theta, h, list(itertools.islice(training, self.unroll)), self.lr)
                    h.grad = search.gradient(new, h, ahead, retain=True)
                with torch.no_grad():
                    for p, value in zip(theta, new):
                        p.copy_(value)
            else:
                found = torch.autograd.grad(search.loss(theta, h.detach(), next(training)), theta)
                for p, g in zip(theta, found):
                    p.grad = g
                inner.step()
                h.grad = search.gradient([p.detach() for p in theta], h, ahead)
            if not torch.isfinite(h.grad).all():
                raise UserError(f"flexora: the search diverged at step {step + 1}; give a smaller lr than {self.lr:g}")
            outer.step()
        return h.detach()

    def plan(self, sites: list[Site], evidence: Any, form: dict[str, Any]) -> Plan:
        """None for the sites of blocks that were not chosen."""
        chosen = selected(self.h, self.keep)
        if self.keep is None and len(self.h) > 1 and max(self.h.values()) <= 0:
            warnings.warn("flexora: the search raised no block above the others, so all are kept", stacklevel=2)
        return {s.path: None for s in sites if s.block is not None and s.block in self.h and s.block not in chosen}

    def state_dict(self) -> dict[str, Any]:
        return {"h": {str(i): value for i, value in getattr(self, "h", {}).items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.h = {int(i): value for i, value in state.get("h", {}).items()}
