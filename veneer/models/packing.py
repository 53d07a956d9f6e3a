"""A batch of rows of unlike length as one row without padding, in which what rows begin with in common stands once.

Linear layers, norms and embeddings look at one position at a time and take the packed row as it is; the fast attention
puts its projections back into rows, where causality alone keeps padding on the right unseen. What a causal model makes
of a position depends on the tokens up to it, so that positions whose rows agree so far (a system prompt, a template's
first words, several answers to one question) are one and the same: they are computed once, and get the sum of the
gradients. What follows the last label of a row is seen by nothing that counts, and is left out with the padding.
Random dropout draws one mask for a shared position where rows apart would draw several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 0.02  # share of positions to be saved below which packing costs more than it saves
STEP = 16  # rows of a processor's matrix tile


def rounded(count: int) -> int:
    """``count`` up to the next of few sizes, at most a sixteenth above or ``STEP``.

    The processor's matrix library compiles and keeps its kernels for each size it meets: some 100 ms and 30 MB a new
    length of the batch for a model of 210 linear layers.
    """
    step = max(STEP, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


class Packing:
    """Where the positions of a packed row stand in its batch ``(B, T)``.

    ``index (W,)`` is each packed position's place in the flattened batch, ``source (B, longest)`` the packed position
    of every position of the rows (0 where a row has ended), ``place (N,)`` the way back, into the flattened rows.
    W and longest are `rounded`; what fills them up is seen by no position and gets no gradient.
    ``lengths (B,)`` are those of the rows; of them ``shared (B,)`` positions are an earlier row's, from the start on.
    ``agree`` holds (row, earlier row, tokens) for each row that begins like an earlier one. ``mask`` is what the model
    is given in place of an attention mask: by its being this very tensor the fast attention knows packed rows.
    """

    def __init__(self, lengths: Tensor, time: int, agree: Sequence[tuple[int, int, int]] = ()) -> None:
        longest, device = rounded(int(lengths.max())), lengths.device
        at = torch.arange(longest, device=device)
        own = at < lengths[:, None]
        for row, _, tokens in agree:
            own[row, :tokens] = False
        self.agree, self.lengths = tuple(agree), lengths
        self.shared = torch.zeros_like(lengths)
        for row, _, tokens in agree:
            self.shared[row] = tokens
        self.place = own.flatten().nonzero()[:, 0]
        self.source = torch.zeros(own.numel(), dtype=torch.long, device=device)
        self.source[self.place] = torch.arange(len(self.place), device=device)
        self.source = self.source.view(own.shape)
        for row, like, tokens in agree:
            self.source[row, :tokens] = self.source[like, :tokens]
        self.row, within = self.place // longest, self.place % longest
        self.fill = rounded(len(self.place)) - len(self.place)
        self.index = F.pad(self.row * time + within, (0, self.fill))
        self.positions = F.pad(within, (0, self.fill))[None]
        self.longest = self.source[int(lengths.argmax())]
        self.mask = torch.zeros(1, 1, 1, 1, device=device)

    def inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs, packed."""
        packed = given["input_ids"].flatten()[self.index][None]
        return given | {"input_ids": packed, "position_ids": self.positions, "attention_mask": self.mask}

    def rows(self, x: Tensor) -> Tensor:
        """A packed ``(1, W, n)`` as ``(B, longest, n)``; what stands after the end of a row means nothing."""
        return x[0].index_select(0, self.source.flatten()).view(*self.source.shape, -1)

    def rows_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of a packed row from that of `rows`, which is written over where positions are shared."""
        for row, like, tokens in reversed(self.agree):
            grad[like, :tokens].add_(grad[row, :tokens])
        return self.packed(grad)

    def packed(self, x: Tensor) -> Tensor:
        """``(B, longest, n)`` as ``(1, W, n)``, shared positions from the first row that has them, filled with 0."""
        count = len(self.place)
        out = x.new_empty(count + self.fill, x.shape[-1])
        torch.index_select(x.flatten(0, 1), 0, self.place, out=out[:count])
        out[count:] = 0
        return out[None]

    def packed_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of rows ``(B, longest, n)`` from that of `packed`."""
        out = grad.new_zeros(self.source.numel(), grad.shape[-1])
        return out.index_copy_(0, self.place, grad[0, : len(self.place)]).view(*self.source.shape, -1)

    def own_mask(self) -> Tensor:
        """``(1, 1, W, W)``, True where a position may look: for attention that does not know packed rows."""
        count, longest, device = len(self.place), self.source.shape[1], self.place.device
        may = torch.eye(count + self.fill, dtype=torch.bool, device=device)
        earlier = self.positions[0, :count, None] >= torch.arange(longest, device=device)
        who, which = earlier.nonzero(as_tuple=True)
        may[who, self.source[self.row[who], which]] = True
        return may[None, None]


def packing(inputs: dict[str, Any], labelled: Tensor, least: float = LEAST) -> Packing | None:
    """How to pack tokens with unlabelled padding on the right, and nothing beside their mask; None for other inputs.

    ``labelled (B, T)`` is True where there is a label.
    """
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if (
        set(inputs) - {"input_ids", "attention_mask", "use_cache"}
        or tokens is None
        or (mask is not None and mask.ndim != 2)
    ):
        return None
    look = torch.ones_like(labelled) if mask is None else mask != 0
    lengths = look.sum(1)
    on_the_right = torch.equal(look, torch.arange(look.shape[1], device=tokens.device) < lengths[:, None])
    if not on_the_right or int(lengths.min()) == 0 or bool((labelled & ~look).any()):
        return None
    lengths = _heeded(labelled, lengths)
    agree = _agreements(tokens, labelled, lengths)
    saved = look.numel() - int(lengths.sum()) + sum(count for *_, count in agree)
    return Packing(lengths, tokens.shape[1], agree) if saved >= least * tokens.numel() else None


def _heeded(labelled: Tensor, lengths: Tensor) -> Tensor:
    """How many positions of each row the loss depends on: those before the last label, at least one."""
    time = torch.arange(labelled.shape[1], device=labelled.device)
    return torch.where(labelled, time, 0).amax(1).clamp_min(1).minimum(lengths)


def _agreements(tokens: Tensor, labelled: Tensor, lengths: Tensor) -> list[tuple[int, int, int]]:
    """(row, earlier row, tokens): for each row the earlier one with which it agrees longest from the start on.

    Positions count that have no label after them in either row: those with one are each row's own.
    """
    free = torch.minimum(labelled[:, 1:].int().argmax(1), lengths - 1)
    free = torch.where(labelled[:, 1:].any(1), free, lengths - 1)
    found = []
    for row in range(1, len(tokens)):
        same = (tokens[:row] == tokens[row]).int().cumprod(1).sum(1)
        same = same.minimum(free[:row]).minimum(free[row])
        like = int(same.argmax())
        if int(same[like]) > 0:
            found.append((row, like, int(same[like])))
    return found
