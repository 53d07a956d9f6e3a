"""A batch of rows of unlike length as one row without padding, so that no layer computes on padding.

Linear layers, norms and embeddings look at one position at a time and take the packed row as it is; the fast attention
puts its projections back into rows, where causality alone keeps padding on the right unseen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = 0.02  # share of padding below which packing costs more than it saves


class Packing:
    """Where the positions of a packed row stand in its batch ``(B, T)``.

    ``index (N,)`` is each position's place in the flattened batch, ``first (B,)`` where each row begins in the packed
    one, ``longest`` the slice of the packed row that holds the longest of them. ``mask`` is what the model is given in
    place of an attention mask: by its being this very tensor the fast attention knows packed rows.
    """

    def __init__(self, lengths: Tensor, time: int) -> None:
        self.shape = (len(lengths), time)
        look = torch.arange(time, device=lengths.device) < lengths[:, None]
        self.index = look.flatten().nonzero()[:, 0]
        self.first = lengths.cumsum(0) - lengths
        at = int(lengths.argmax())
        self.longest = slice(int(self.first[at]), int(self.first[at] + lengths[at]))
        self.positions = (self.index % time)[None]
        self.place = self.index // time * int(lengths[at]) + self.positions[0]  # in the flattened (B, longest)
        self.mask = torch.zeros(1, 1, 1, 1, device=lengths.device)

    def inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs, packed."""
        packed = given["input_ids"].flatten()[self.index][None]
        return given | {"input_ids": packed, "position_ids": self.positions, "attention_mask": self.mask}

    def rows(self, x: Tensor) -> Tensor:
        """A packed ``(1, N, n)`` as ``(B, longest, n)``, zero where there is nothing."""
        return _Unpack.apply(x, self)

    def packed(self, x: Tensor) -> Tensor:
        """``(B, longest, n)`` as ``(1, N, n)``."""
        return _Pack.apply(x, self)

    def own_mask(self) -> Tensor:
        """``(1, 1, N, N)``, True where a position may look: for attention that does not know packed rows."""
        row = self.index // self.shape[1]
        place = torch.arange(len(row), device=row.device)
        return ((row[:, None] == row) & (place[:, None] >= place))[None, None]


def packing(inputs: dict[str, Any], labelled: Tensor, least: float = LEAST) -> Packing | None:
    """How to pack tokens with unlabelled padding on the right, and nothing beside their mask; None for other inputs.

    ``labelled (B, T)`` is True where there is a label.
    """
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if set(inputs) - {"input_ids", "attention_mask", "use_cache"} or tokens is None or mask is None or mask.ndim != 2:
        return None
    look = mask != 0
    lengths = look.sum(1)
    if bool((labelled & ~look).any()) or int(lengths.sum()) > (1 - least) * tokens.numel() or int(lengths.min()) == 0:
        return None
    on_the_right = torch.equal(look, torch.arange(look.shape[1], device=mask.device) < lengths[:, None])
    return Packing(lengths, tokens.shape[1]) if on_the_right else None


def _spread(x: Tensor, packing: Packing) -> Tensor:
    batch, time = packing.shape[0], packing.longest.stop - packing.longest.start
    out = x.new_zeros(batch * time, x.shape[-1]).index_copy_(0, packing.place, x.flatten(0, 1))
    return out.view(batch, time, -1)


def _gather(x: Tensor, packing: Packing) -> Tensor:
    return x.flatten(0, 1).index_select(0, packing.place)[None]


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packing):
        ctx.packing = packing
        return _spread(x, packing)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gather(grad, ctx.packing), None


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packing):
        ctx.packing = packing
        return _gather(x, packing)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _spread(grad, ctx.packing), None
