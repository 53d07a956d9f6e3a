"""Prompts of several requests whose adapters lie alike, as one batched product instead of one product each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.serve.layout import Table
from veneer.serve.pool import PagePool
from veneer.serve.sizes import as_they_are

WASTE = 1.5  # the longest run over the shortest that may be filled up to it
SHORT = 64  # the longest run in a stack where few sizes are wanted: longer ones gain nothing by it


def kind(mix: Sequence[tuple[dict[str, Table], float]]) -> tuple | None:
    """What must be the same of runs in one stack; None for a mix that cannot be in one: a blend, a bias or a gain."""
    if len(mix) != 1 or mix[0][1] != 1:
        return None
    found: list[Any] = []
    for group, table in sorted(mix[0][0].items()):
        found.append((group, table.width))
        for p in table.parts:
            if p.bias is not None or p.gain is not None:
                return None
            found.append((p.start, p.stop, p.column, p.rank))
    return tuple(found)


def stacked(runs: Sequence[Any], few: bool = False) -> tuple[list[list[Any]], list[Any]]:
    """(stacks of at least two consecutive runs, the other runs); with ``few`` short runs by powers of two."""
    stacks: list[list[Any]] = []
    for run in runs:
        last = stacks[-1] if stacks else None
        alike = last is not None and last[-1].stop == run.start and (own := kind(run.mix)) is not None
        alike = alike and not (few and run.stop - run.start > SHORT)
        if alike and own == kind(last[0].mix) and _near(last, run):
            last.append(run)
        else:
            stacks.append([run])
    if few:
        stacks = [part for s in stacks for part in _powers(s)]
    return [s for s in stacks if len(s) > 1], [s[0] for s in stacks if len(s) == 1]


def _powers(stack: list[Any]) -> list[list[Any]]:
    found = []
    while stack:
        count = 1 << (len(stack).bit_length() - 1)
        found.append(stack[:count])
        stack = stack[count:]
    return found


def _near(stack: list[Any], run: Any) -> bool:
    lengths = [r.stop - r.start for r in (*stack, run)]
    return max(lengths) <= WASTE * min(lengths)


class Stack:
    """Consecutive runs with adapters of one layout; all are filled up to ``filled`` of the longest."""

    def __init__(
        self, pool: PagePool, chunk: int, runs: Sequence[Any], filled: Callable[[int], int] = as_they_are
    ) -> None:
        self.pool, self.chunk, self.count = pool, chunk, len(runs)
        self.start, self.stop = runs[0].start, runs[-1].stop
        lengths = np.array([r.stop - r.start for r in runs])
        most = filled(int(lengths.max()))
        self.rows = self.kept = None
        if (lengths != most).any():
            places = np.arange(most)[None]
            self.rows = self._ids((np.cumsum(lengths) - lengths)[:, None] + np.minimum(places, lengths[:, None] - 1))
            self.kept = self._ids(np.flatnonzero(places < lengths[:, None]))
        tables = [r.mix[0][0] for r in runs]
        self.groups = {group: self._joined([t[group] for t in tables]) for group in tables[0]}

    def add(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        """Add the change of ``group`` in ``layer`` to y (T, out) for x (T, in), all rows of the step, in place."""
        width, a, parts = self.groups[group]
        x, y = x[self.start : self.stop], y[self.start : self.stop]
        x = (x if self.rows is None else x.index_select(0, self.rows)).view(self.count, -1, x.shape[1])
        h = torch.bmm(x, self.pool.rows(width)[layer].index_select(0, a).view(self.count, -1, width))
        values = self.pool.rows(self.chunk)[layer]
        for first, last, column, rank, b in parts:
            B, own = values.index_select(0, b).view(self.count, rank, -1), h[:, :, column : column + rank]
            if self.kept is None:
                y[:, first:last].view(self.count, -1, last - first).baddbmm_(own, B)
            else:
                y[:, first:last].add_(torch.bmm(own, B).flatten(0, 1).index_select(0, self.kept))

    def _joined(self, tables: list[Table]) -> tuple[int, Tensor, list[tuple[int, int, int, int, Tensor]]]:
        parts = []
        for alike in zip(*(t.parts for t in tables)):
            p = alike[0]
            parts.append((p.start, p.stop, p.column, p.rank, self._ids(np.concatenate([q.b for q in alike]))))
        return tables[0].width, self._ids(np.concatenate([t.a for t in tables])), parts

    def _ids(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values.reshape(-1), dtype=np.int32)).to(self.pool.data[0].device)
