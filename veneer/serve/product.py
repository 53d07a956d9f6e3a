"""The low-rank product of a whole batch, every row with its own adapter, at any mixture of ranks.

Rows of a single token gather: ``h_i = Σ_k x_ik · A[k]`` and ``y_i += Σ_j h_ij · Bᵀ[j]`` are weighted sums of rows of
the pool (one ``embedding_bag`` each), which read every factor once, from wherever it lies, and copy none. Runs of many
tokens of one request (a prompt) take its factors out of the pool and multiply, those whose adapters lie alike all at
once (`stack`). A row without an adapter sums nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from veneer.serve.alone import alone
from veneer.serve.layout import ONE, Table
from veneer.serve.pool import PagePool
from veneer.serve.sizes import as_they_are
from veneer.serve.stack import Stack, stacked

RUN = 16  # fewest tokens of one request that are worth taking its factors out of the pool for

# What acts on a row: adapters' tables by group, each with its weight. Empty: the base alone.
Mix = tuple[tuple[dict[str, Table], float], ...]


class Run(NamedTuple):
    """Consecutive rows [start, stop) with one mix."""

    start: int
    stop: int
    mix: Mix


@dataclass
class Shrink:
    """Entries of one width: the rows of x, where their A lie, and the weights of a blend."""

    width: int
    rows: Tensor | None
    index: Tensor
    offsets: Tensor
    weight: Tensor | None


@dataclass
class GroupPlan:
    """What is summed for one group: over all layers the same."""

    shrinks: list[Shrink]
    take: Tensor  # for each row of B its place in the concatenated h
    index: Tensor
    offsets: Tensor
    ones: Tensor | None  # what follows h where a bias changes: 1, then the weights of blends
    gain: tuple[Tensor, Tensor, Tensor] | None  # index, offsets, weights
    numbers: int  # of the pool that are summed


class Plan:
    """The product of one step; ``heads`` are the mixes of the first rows, one each, ``runs`` those of the others.

    Runs are computed over ``filled`` many rows, those beside them too.
    """

    def __init__(
        self,
        pool: PagePool,
        chunk: int,
        heads: Sequence[Mix],
        runs: Iterable[Run] = (),
        filled: Callable[[int], int] = as_they_are,
    ) -> None:
        self.pool, self.chunk, self.count, self.filled = pool, chunk, len(heads), filled
        self.device, self.dtype = pool.data[0].device, pool.data[0].dtype
        groups = {group for mix in heads for tables, _ in mix for group in tables}
        self.groups = {group: self._group(group, heads) for group in groups}
        stacks, single = stacked([run for run in runs if run.mix], few=filled is not as_they_are)
        self.stacks = [Stack(pool, chunk, alike, filled) for alike in stacks]
        self.runs = [(run, _matrices(run.mix, self._ids)) for run in single]

    def add(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        """Add the change of ``group`` in ``layer`` to ``y`` (T, out), the base's output for ``x`` (T, in), in place."""
        plan = self.groups.get(group)
        if plan is not None:
            whole = self.count == x.shape[0]
            with alone(plan.numbers):
                self._sum(plan, layer, x if whole else x[: self.count], y if whole else y[: self.count])
        for stack in self.stacks:
            if group in stack.groups:
                stack.add(layer, group, x, y)
        for run, groups in self.runs:
            if group in groups:
                self._multiply(groups[group], layer, x, y, run.start, run.stop)

    def _sum(self, plan: GroupPlan, layer: int, x: Tensor, y: Tensor) -> None:
        values = self.pool.rows(self.chunk)[layer]
        if plan.gain is not None:
            index, offsets, weights = plan.gain
            gain = torch.embedding_bag(values, index, offsets, False, 0, False, weights)[0]
            y.addcmul_(y, gain.view(y.shape))
        parts = []
        for s in plan.shrinks:
            rows = x if s.rows is None else x.index_select(0, s.rows)
            source = self.pool.rows(s.width)[layer]
            h = torch.embedding_bag(source, s.index, s.offsets, False, 0, False, rows.reshape(-1))[0]
            parts.append((h if s.weight is None else h * s.weight).view(-1))
        if plan.ones is not None:
            parts.append(plan.ones)
        h = (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, plan.take)
        change = torch.embedding_bag(values, plan.index, plan.offsets, False, 0, False, h)[0]
        y.add_(change.view(y.shape))

    def _multiply(self, mix: list[Matrices], layer: int, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        values = self.pool.rows(self.chunk)[layer]
        many = self.filled(stop - start)
        first = max(0, min(start, x.shape[0] - many))
        own = slice(start - first, stop - first)
        x, y = x[first : first + many], y[start:stop]
        base = y.clone() if any(p.gain is not None for m in mix for p in m.parts) else y
        for m in mix:
            h = x @ self.pool.rows(m.width)[layer].index_select(0, m.a)
            h = h if m.weight == 1 else h * m.weight
            for p in m.parts:
                piece = y[:, p.start : p.stop]
                if p.gain is not None:
                    gain = values.index_select(0, p.gain).view(-1)
                    piece.addcmul_(base[:, p.start : p.stop], gain, value=m.weight)
                B = values.index_select(0, p.b).view(p.rank, -1)
                if many == stop - start:
                    piece.addmm_(h[:, p.column : p.column + p.rank], B)
                else:
                    piece.add_((h[:, p.column : p.column + p.rank] @ B)[own])
                if p.bias is not None:
                    piece.add_(values.index_select(0, p.bias).view(-1), alpha=m.weight)

    def _group(self, group: str, heads: Sequence[Mix]) -> GroupPlan:
        entries: dict[int, list[tuple[int, Table, float]]] = {}
        for row, mix in enumerate(heads):
            for tables, weight in mix:
                if group in tables:
                    entries.setdefault(tables[group].width, []).append((row, tables[group], weight))
        shrinks, at, place = [], 0, {}
        for width, found in sorted(entries.items()):
            rows = [row for row, _, _ in found]
            weights = [weight for _, _, weight in found]
            index = np.stack([table.a for _, table, _ in found])
            shrinks.append(
                Shrink(
                    width,
                    None if rows == list(range(self.count)) else self._ids(np.array(rows)),
                    self._ids(index.reshape(-1)),
                    self._ids(np.arange(len(found)) * index.shape[1]),
                    None if all(w == 1 for w in weights) else self._numbers(weights)[:, None],
                )
            )
            for row, table, weight in found:
                place.setdefault(row, []).append((at, table, weight))
                at += width
        return self._expand(shrinks, [place.get(row, []) for row in range(self.count)], at)

    def _expand(self, shrinks: list[Shrink], rows: list[list[tuple[int, Table, float]]], one: int) -> GroupPlan:
        """``one``: the place of the constant 1 in the concatenated h; blends have their weights there after it."""
        chunks = max(len(table.lengths) for row in rows for _, table, _ in row)
        ones = [1.0]
        biased = any((table.column == ONE).any() for row in rows for _, table, _ in row)
        empty = np.zeros(chunks, np.int64)
        index, take, lengths, gain, gain_weight, gain_lengths = [], [], [], [], [], []
        for row in rows:
            total, gains = empty, empty
            parts = []
            for at, table, weight in row:
                constant = one if weight == 1 else one + len(ones)
                if weight != 1:
                    ones.append(weight)
                parts.append((table.index, np.where(table.column == ONE, constant, table.column + at), table.lengths))
                total = total + table.lengths
                if len(table.gain):
                    gains = gains + table.gain_lengths
            merged = _interleave([(i, t) for i, t, _ in parts], [n for *_, n in parts])
            index.append(merged[0])
            take.append(merged[1])
            lengths.append(total)
            with_gain = [(t, w) for _, t, w in row if len(t.gain)]
            merged = _interleave(
                [(t.gain, np.full(len(t.gain), w)) for t, w in with_gain], [t.gain_lengths for t, _ in with_gain]
            )
            gain.append(merged[0])
            gain_weight.append(merged[1])
            gain_lengths.append(gains)
        found = None
        if any(len(g) for g in gain):
            found = (
                self._ids(np.concatenate(gain)),
                self._ids(_starts(gain_lengths)),
                self._numbers(np.concatenate(gain_weight)),
            )
        return GroupPlan(
            shrinks,
            self._ids(np.concatenate(take)),
            self._ids(np.concatenate(index)),
            self._ids(_starts(lengths)),
            self._numbers(ones) if biased else None,
            found,
            sum(s.index.numel() * s.width for s in shrinks) + sum(map(len, index)) * self.chunk,
        )

    def _ids(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(self.device)

    def _numbers(self, values: Sequence[float] | np.ndarray) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=self.dtype, device=self.device)


class Factor(NamedTuple):
    """One piece of a run: output rows, columns of h, and where its numbers lie."""

    start: int
    stop: int
    column: int
    rank: int
    b: Tensor
    bias: Tensor | None
    gain: Tensor | None


class Matrices(NamedTuple):
    """The factors of one adapter in a run."""

    width: int
    a: Tensor
    parts: list[Factor]
    weight: float


def _matrices(mix: Mix, ids) -> dict[str, list[Matrices]]:
    found: dict[str, list[Matrices]] = {}
    for tables, weight in mix:
        for group, table in tables.items():
            parts = [
                Factor(
                    p.start,
                    p.stop,
                    p.column,
                    p.rank,
                    ids(p.b),
                    None if p.bias is None else ids(p.bias),
                    None if p.gain is None else ids(p.gain),
                )
                for p in table.parts
            ]
            found.setdefault(group, []).append(Matrices(table.width, ids(table.a), parts, weight))
    return found


def _interleave(parts: list[tuple[np.ndarray, np.ndarray]], lengths: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Join the bags of several adapters on one row, chunk by chunk."""
    if not parts:
        return np.zeros(0, np.int32), np.zeros(0)
    if len(parts) == 1:
        return parts[0]
    bags = np.concatenate([np.repeat(np.arange(len(n)), n) for n in lengths])
    order = np.argsort(bags, kind="stable")
    return np.concatenate([p[0] for p in parts])[order], np.concatenate([p[1] for p in parts])[order]


def _starts(lengths: list[np.ndarray]) -> np.ndarray:
    flat = np.concatenate(lengths)
    return np.cumsum(flat) - flat
