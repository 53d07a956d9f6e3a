"""What requests remember: their pages, the rows a step writes and reads, and attention over both.

A request's position ``p`` lies in its page ``p // tokens``. Pages whose tokens are all known may be shared by requests
that begin alike under the same adapter (`prefix`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.serve.alone import alone
from veneer.serve.pool import PagePool
from veneer.serve.sizes import as_they_are


@dataclass
class Piece:
    """What one sequence brings to a step: the tokens from position ``past`` on, and pages that hold all of it."""

    tokens: Sequence[int]
    past: int
    pages: Sequence[int]


@dataclass
class Stretch:
    """A part of a prompt in a step: its rows, what lies before it, and how its pages are read."""

    start: int
    stop: int
    past: int
    index: Tensor | None
    mask: Tensor | None


@dataclass
class Bucket:
    """Single tokens that attend together: their rows (None: the first), pages (n, most) and which places are hidden.

    ``keys`` are the pages' places as half pages; ``values`` and ``starts``, known once the heads are, say by head where
    each value lies in the pool seen as rows of one head.
    """

    rows: Tensor | None
    pages: np.ndarray
    keys: Tensor
    hidden: Tensor
    values: Tensor | None = None
    starts: Tensor | None = None


class Batch:
    """The rows of one step: single tokens first, one a sequence, then stretches of prompts.

    Args:
        singles: sequences with one token each.
        stretches: the others.
        asked: which rows need logits; None is all of them.
        filled: how many rows so many are filled up to; what is computed for the others is nobody's.
    """

    def __init__(
        self,
        pool: PagePool,
        singles: Sequence[Piece],
        stretches: Sequence[Piece] = (),
        asked: Sequence[int] | None = None,
        filled: Callable[[int], int] = as_they_are,
    ) -> None:
        self.pool, self.device = pool, pool.data[0].device
        pieces = [*singles, *stretches]
        lengths = [len(p.tokens) for p in pieces]
        positions = np.concatenate([np.arange(p.past, p.past + n) for p, n in zip(pieces, lengths)])
        self.count = sum(lengths)
        self.answers = self.count if asked is None else len(asked)
        more = np.zeros(filled(self.count) - self.count, dtype=np.int64)
        self.tokens = self._ids(np.concatenate([*(np.asarray(p.tokens) for p in pieces), more]))
        self.positions = self._ids(np.concatenate([positions, more]))
        self.writes = self._ids(self._rows(pieces, positions, lengths))
        self.asked = None
        if asked is not None or len(more):
            wanted = np.arange(self.count) if asked is None else np.asarray(asked)
            again = np.zeros(filled(self.answers) - self.answers, dtype=np.int64)
            self.asked = self._ids(np.concatenate([wanted, again]))
        self.singles = len(singles)
        self.buckets = [self._bucket(members) for members in _buckets(singles)]
        self.stretches, at = [], self.singles
        for p in stretches:
            self.stretches.append(self._stretch(p, at))
            at += len(p.tokens)

    def attend(self, heads: Tensor, blocks: Tensor, count: int, groups: int, scale: float) -> Tensor:
        """Attention of all rows, (T, count · head_dim), for ``heads`` (T, count + 2 · groups, head_dim)."""
        width = heads.shape[-1]
        out = heads.new_empty(heads.shape[0], count * width)
        out[self.count :] = 0
        for bucket in self.buckets:
            n = len(bucket.pages)
            q = heads[:n, :count] if bucket.rows is None else heads.index_select(0, bucket.rows)[:, :count]
            with alone(n * bucket.hidden.shape[-1] * groups * width):
                found = self._looked(bucket, q, blocks, groups, scale).reshape(n, -1)
            if bucket.rows is None:
                out[:n] = found
            else:
                out.index_copy_(0, bucket.rows, found)
        for s in self.stretches:
            q = heads[s.start : s.stop, :count].transpose(0, 1)[None]
            if s.index is None:
                own = heads[s.start : s.stop, count:].transpose(0, 1)[None]
                k, v = own[:, :groups], own[:, groups:]
            else:
                k, v = (t[:, :, : s.past + s.stop - s.start] for t in self._read(blocks, s.index, 1, groups, width))
            found = F.scaled_dot_product_attention(
                q, k, v, attn_mask=s.mask, is_causal=s.mask is None, scale=scale, enable_gqa=groups != count
            )
            out[s.start : s.stop] = found[0].transpose(0, 1).flatten(1)
        return out

    def _looked(self, bucket: Bucket, q: Tensor, blocks: Tensor, groups: int, scale: float) -> Tensor:
        """Attention of single tokens: scores in fp32, then each value is summed from where it lies."""
        n, count, width = q.shape
        if bucket.values is None:
            bucket.values, bucket.starts = self._values(bucket.pages, count, groups)
        k = torch.empty(n, groups, bucket.hidden.shape[-1], width, device=self.device)
        k.copy_(blocks.index_select(0, bucket.keys).view(n, -1, groups, width).transpose(1, 2))
        scores = torch.bmm(q.reshape(n * groups, -1, width).float(), k.flatten(0, 1).transpose(1, 2))
        shares = scores.view(n, count, -1).mul_(scale).add_(bucket.hidden).softmax(-1).to(q.dtype).view(-1)
        values = blocks.view(-1, width)
        return torch.embedding_bag(values, bucket.values, bucket.starts, False, 0, False, shares)[0]

    def _values(self, pages: np.ndarray, count: int, groups: int) -> tuple[Tensor, Tensor]:
        size = self.pool.tokens
        places = ((pages[:, :, None] * 2 + 1) * size + np.arange(size)).reshape(len(pages), 1, -1) * groups
        by_head = places + np.repeat(np.arange(groups), count // groups)[None, :, None]
        starts = np.arange(len(pages) * count) * places.shape[-1]
        return self._ids(by_head.reshape(-1)), self._ids(starts)

    def _read(self, blocks: Tensor, index: Tensor, rows: int, groups: int, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, groups, length, width) out of their pages."""
        read = blocks.index_select(0, index).view(2, rows, -1, groups, width)
        return read[0].transpose(1, 2), read[1].transpose(1, 2)

    def _rows(self, pieces: Sequence[Piece], positions: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
        """Where the keys and then the values of each row go, in the pool seen as cells."""
        size = self.pool.tokens
        pages = np.concatenate(
            [np.asarray(p.pages)[np.arange(p.past, p.past + n) // size] for p, n in zip(pieces, lengths)]
        )
        keys = pages * (2 * size) + positions % size
        return np.stack((keys, keys + size), 1).reshape(-1)

    def _bucket(self, members: tuple[list[int] | None, Sequence[Piece]]) -> Bucket:
        rows, pieces = members
        size = self.pool.tokens
        need = [p.past // size + 1 for p in pieces]
        most = max(need)
        table = np.empty((len(pieces), most), dtype=np.int64)
        for line, p, n in zip(table, pieces, need):
            line[:n], line[n:] = p.pages[:n], p.pages[0]
        past = torch.tensor([p.past for p in pieces], device=self.device)
        later = torch.arange(most * size, device=self.device)[None] > past[:, None]
        hidden = torch.zeros(later.shape, device=self.device).masked_fill_(later, float("-inf"))[:, None]
        return Bucket(None if rows is None else self._ids(np.asarray(rows)), table, self._ids(table * 2), hidden)

    def _stretch(self, piece: Piece, at: int) -> Stretch:
        stop = at + len(piece.tokens)
        if piece.past == 0:
            return Stretch(at, stop, 0, None, None)
        end, size = piece.past + len(piece.tokens), self.pool.tokens
        pages = np.asarray(piece.pages[: -(-end // size)])
        index = self._ids(np.concatenate((pages * 2, pages * 2 + 1)))
        rows = torch.arange(piece.past, end, device=self.device)
        mask = torch.arange(end, device=self.device)[None] <= rows[:, None]
        return Stretch(at, stop, piece.past, index, mask)

    def _ids(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64).reshape(-1)).to(self.device)


def _buckets(singles: Sequence[Piece]) -> list[tuple[list[int] | None, Sequence[Piece]]]:
    """The single tokens in at most two batches, so that one long request does not pad all the others."""
    if not singles:
        return []
    lengths = sorted(p.past + 1 for p in singles)
    n, longest = len(lengths), lengths[-1]
    best = min(range(1, n + 1), key=lambda i: i * lengths[i - 1] + (n - i) * longest)
    if best == n or best * lengths[best - 1] + (n - best) * longest > 0.7 * n * longest:
        return [(None, singles)]
    limit = lengths[best - 1]
    short = [i for i, p in enumerate(singles) if p.past + 1 <= limit]
    long = [i for i, p in enumerate(singles) if p.past + 1 > limit]
    return [(rows, [singles[i] for i in rows]) for rows in (short, long)]
