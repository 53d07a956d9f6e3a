"""A penalty on what an adapter adds to queries, keys and values, which keeps attention scores where they were."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.context import Context, current
from veneer.core.delta import Delta
from veneer.core.hook import Objective, Schedule
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


@method("score-norm", axis="objective", paper="arXiv:2406.03136", system=15, wants=("pair",), defaults="lora")
class ScoreNorm(Objective):
    """Keep a model on the side of the threshold on which LoRA's gradient has fast approximations.

    Hu et al. (2024) prove that the gradient of a LoRA update of attention over L tokens can be approximated in nearly
    linear time while, of queries, keys and what the adapter adds to them, no entry exceeds some Γ = o(√ln L). Here
    that is asked of the adapter's part, at each adapted query, key and value projection:

    Γ^Δ = √β·max|s·X·AᵀBᵀ| (for values without √β),    Γ* = target·√ln L,    L = L_task + λ·Σ relu(Γ^Δ − Γ*)²

    with X (tokens, d) the layer's input, padding left out, taken as given: the gradient goes to A and B alone, through
    the one entry that is largest. β is the layer's own scale of scores. L is the longest row's number of tokens.
    ``way="project"`` adds no loss: after each step B is multiplied by min(1, Γ*/Γ^Δ), with Γ^Δ as the step's own
    passes saw it; the optimiser's state is left as it is.

    The paper gives the theorem; this penalty, the projection and every default are ours. A base whose scores lie above
    the threshold, as trained models' do, stays there: ``veneer inspect --limits`` tells. At B = 0 both do nothing.
    """

    weight: Annotated[float, At(ge=0, doc="λ")] = 0.1
    target: Annotated[float, At(gt=0, doc="largest Γ^Δ that is free, over √ln L")] = 0.5
    way: Annotated[Literal["penalise", "project"], At(doc="a term of the loss, or a rescaled B after each step")] = (
        "penalise"
    )

    reads_outputs = False

    def on_attach(self, adapter: Adapter) -> None:
        self.handles: list[Any] = []
        self.over: dict[int, Tensor] = {}
        if not self.places():
            raise UserError(
                f"score-norm bounds plain pairs on query, key and value projections; {adapter.recipe} has none there"
            )

    def places(self) -> list[Delta]:
        """The pairs on queries, keys and values."""
        paired = {site.path for site, *_ in self.adapter.pairs()}
        return [d for d in self.adapter.members() if d.site.role in ("q", "k", "v") and d.site.path in paired]

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.on_end()
        for n, d in enumerate(self.places()):
            self.handles.append(d.site.module.register_forward_pre_hook(partial(self._look, n, d)))

    def _look(self, number: int, delta: Delta, module: nn.Module, args: tuple) -> None:
        """Before a projection runs: how far the adapter's part of it goes."""
        ctx = current()
        watching = module.training and torch.is_grad_enabled()
        if ctx is None or not watching or self.adapter.name in self.adapter.root.switch.off:
            return
        size, free = self._size(delta, args[0], ctx)
        if self.way == "penalise":
            ctx.add_loss("score-norm", self.weight * (size - free).relu().square())
        elif not ctx.closed:
            over = size.detach() / free
            self.over[number] = torch.maximum(over, self.over.get(number, over))

    def _size(self, delta: Delta, x: Tensor, ctx: Context) -> tuple[Tensor, float]:
        """(Γ^Δ with a gradient to A and B, Γ*) on the input x (…, L, d)."""
        A, B, scale = delta.pair()
        x, tokens = _real(x.detach(), ctx)
        if delta.offset is not None:
            A0, B0, scale0 = delta.offset.pair()
            A, B = torch.cat([A, A0]), torch.cat([B, B0 * (scale0 / scale)], 1)
        with torch.no_grad():
            moved = (x @ A.T.to(x.dtype)) @ B.T.to(x.dtype)
            row, column = divmod(int(moved.abs().argmax()), moved.shape[-1])
        size = scale * (B[column] @ (A @ x[row].to(A.dtype))).abs()
        unit = _score_scale(self.adapter.model, delta.site) ** 0.5 if delta.site.role in "qk" else 1.0
        return unit * size, self.target * math.log(max(tokens, 2)) ** 0.5

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        seen, self.over = self.over, {}
        if not seen:
            return
        over = torch.stack([seen[n] for n in sorted(seen)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(over, torch.distributed.ReduceOp.MAX)
        places = self.places()
        for n, value in zip(sorted(seen), over.clamp_min(1.0)):
            places[n].pair().B.div_(value)

    def on_end(self) -> None:
        while self.handles:
            self.handles.pop().remove()
        self.over = {}


def _real(x: Tensor, ctx: Context) -> tuple[Tensor, int]:
    """The inputs of real tokens (N, d), and how many the longest row has."""
    if ctx.mask is not None and ctx.mask.shape == x.shape[:-1]:
        return x[ctx.mask.bool()], int(ctx.mask.sum(1).max())
    places = ctx.call[3].get("position_ids")  # of rows that are packed into one
    return x.flatten(0, -2), x.shape[-2] if places is None else int(places.max()) + 1


def _score_scale(model: nn.Module, site: Site) -> float:
    """β of the attention that a projection belongs to: what it says itself, or one over the root of a head's width."""
    own = getattr(model.get_submodule(site.module_path.rpartition(".")[0]), "scaling", None)
    return own if isinstance(own, float) else (site.out_features // (site.heads or 1)) ** -0.5
