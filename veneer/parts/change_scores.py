"""What a change of weights weighs in the loss, from the activations and gradients of its layer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.delta import Delta
from veneer.numerics.norms import importance_score


class ChangeScores:
    """S = Σ|ΔW∘∂L/∂ΔW| of plain pairs, over √(out·in) or, with ``mean``, over out·in.

    While it listens each backward pass adds to ``seen`` by site path. ∂L/∂ΔW (out, in) is made from what goes into the
    layer and the gradient of what comes out, in their precision, and not kept.
    """

    def __init__(self, score: str = "sqrt") -> None:
        self.score = score
        self.seen: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def listen(self, deltas: Iterable[Delta]) -> None:
        """Begin to watch the layers of these; the fast forms, which call no layer, stay away meanwhile."""
        self.handles = [d.site.module.register_forward_hook(partial(self._watch, d)) for d in deltas]

    def let_go(self) -> None:
        """Stop watching."""
        while self.handles:
            self.handles.pop().remove()

    def _watch(self, delta: Delta, module: nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            pair = delta.pair()
            x, A, B = delta.drop(args[0]).detach(), pair.A.detach(), pair.B.detach()
            output.register_hook(partial(self._note, delta, x, A, B, pair.scale))

    @torch.no_grad()
    def _note(self, delta: Delta, x: Tensor, A: Tensor, B: Tensor, scale: float, grad: Tensor) -> None:
        """In backward: add this micro-batch's S, whose gradient carries its weight in the batch."""
        g, path = delta.site.output_rows(grad), delta.site.path
        G = g.T @ delta.site.input_rows(x).to(g.dtype)
        self.seen[path] = self.seen.get(path, 0) + importance_score(B @ A, G, self.score) * scale

    def take(self, deltas: dict[str, Delta]) -> list[float]:
        """S of every site since the last time, 0 for one that had no gradient; the same on every replica."""
        unseen = torch.zeros((), device=next(iter(deltas.values())).site_device())
        S = torch.stack([self.seen.get(path, unseen) for path in deltas])
        self.seen = {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(S)
            S /= torch.distributed.get_world_size()
        return S.tolist()
