"""How the factors of one adapter lie in pages, and the index tables by which the product finds them there.

The layers that share an input are one group (q, k and v; gate and up), and an adapter brings for each group any number
of pieces, each a pair A (r, in), B (rows, r) for a row range of the group's output. In a page's numbers come

- for each group all A of its pieces as one matrix (in, width), columns side by side, ``width`` the next power of two or
  divisor of ``chunk``: a row of it is one input's share of every h, so that ``h = Σ_i x_i · row_i`` is a weighted sum
  of rows;
- for each piece Bᵀ as rows of ``chunk`` numbers, ``B[c·chunk + k, j]`` at row ``j · chunks + c``, place k: so
  ``y = Σ_j h_j · row_j`` is a weighted sum of rows too;
- for each piece that has them, the change of the bias and the gain less one, in rows of ``chunk``.

Both sums gather straight from the pool, wherever its pages lie. Every layer of the model has the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ONE = -1  # the column of h that is always 1: a change of the bias is a row of B with that column


class Place(NamedTuple):
    """A row range of a group's output."""

    group: str
    start: int
    stop: int


@dataclass
class Piece:
    """The change of one row range in all layers, the scale within B: ``y = gain ∘ (xWᵀ) + b + (x Aᵀ) Bᵀ + bias``.

    A (layers, r, in), B (layers, rows, r), gain and bias (layers, rows) or None. With a gain, B and bias carry it.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.A.shape[1]


class Groups(NamedTuple):
    """What of a model's shape the layout needs: (in, out) of each group, and the row width of outputs."""

    sizes: Mapping[str, tuple[int, int]]
    chunk: int


@dataclass(frozen=True)
class Layout:
    """Where everything of one adapter begins, in numbers from the start of its first page."""

    groups: Groups
    widths: Mapping[str, int]
    columns: Mapping[Place, tuple[int, int]]  # first column in its group's width, rank
    a: Mapping[str, int]
    b: Mapping[Place, int]
    bias: Mapping[Place, int]
    gain: Mapping[Place, int]
    numel: int

    @classmethod
    def of(cls, pieces: Mapping[Place, Piece], groups: Groups) -> Layout:
        """The layout of some pieces; wide rows first, so that no row straddles a page."""
        columns: dict[Place, tuple[int, int]] = {}
        filled: dict[str, int] = {}
        for place in sorted(pieces):
            at = filled.get(place.group, 0)
            columns[place] = (at, pieces[place].rank)
            filled[place.group] = at + pieces[place].rank
        widths = {group: _width(n, groups.chunk) for group, n in filled.items()}
        end, a = 0, {}
        for group in sorted(widths, key=lambda g: -widths[g]):
            a[group] = end + -end % widths[group]
            end = a[group] + groups.sizes[group][0] * widths[group]
        end += -end % groups.chunk
        starts: list[dict[Place, int]] = [{}, {}, {}]
        for place, piece in sorted(pieces.items()):
            rows = place.stop - place.start
            for found, size in zip(starts, (rows * piece.rank, *(0 if t is None else rows for t in _extras(piece)))):
                if size:
                    found[place], end = end, end + size
        return cls(groups, widths, columns, a, *starts, end)

    def pages(self, size: int) -> int:
        """Pages of ``size`` numbers that hold it."""
        return -(-self.numel // size)

    def pack(self, pieces: Mapping[Place, Piece], size: int, dtype: torch.dtype) -> Tensor:
        """The pieces as (layers, pages, size)."""
        layers = next(iter(pieces.values())).A.shape[0]
        out = self.blank(layers, size, dtype)
        for place, piece in pieces.items():
            rows = place.stop - place.start
            self.a_of(out, place).copy_(piece.A.transpose(1, 2))
            self.b_of(out, place).copy_(piece.B.transpose(1, 2))
            bias, gain = _extras(piece)
            if bias is not None:
                out[:, self.bias[place] : self.bias[place] + rows] = bias
            if gain is not None:
                out[:, self.gain[place] : self.gain[place] + rows] = gain - 1
        return out.view(layers, -1, size)

    def blank(self, layers: int, size: int, dtype: torch.dtype) -> Tensor:
        """Zeros (layers, pages · size) to lay pieces into."""
        return torch.zeros(layers, self.pages(size) * size, dtype=dtype)

    def a_of(self, packed: Tensor, place: Place) -> Tensor:
        """Where Aᵀ (layers, in, r) of a piece lies in (layers, numbers)."""
        inputs, width, (at, rank) = self.groups.sizes[place.group][0], self.widths[place.group], self.columns[place]
        begin = self.a[place.group]
        return packed[:, begin : begin + inputs * width].view(-1, inputs, width)[:, :, at : at + rank]

    def b_of(self, packed: Tensor, place: Place) -> Tensor:
        """Where Bᵀ (layers, r, rows) of a piece lies in (layers, numbers)."""
        rank, rows, begin = self.columns[place][1], place.stop - place.start, self.b[place]
        return packed[:, begin : begin + rows * rank].view(-1, rank, rows)

    def unpack(self, packed: Tensor) -> dict[Place, Piece]:
        """The pieces back from (layers, pages, size)."""
        flat, found = packed.flatten(1), {}
        for place in self.columns:
            rows = place.stop - place.start
            A, B = self.a_of(flat, place).transpose(1, 2), self.b_of(flat, place).transpose(1, 2)
            gain, bias = (flat[:, s[place] : s[place] + rows] if place in s else None for s in (self.gain, self.bias))
            found[place] = Piece(A, B, None if gain is None else gain + 1, bias)
        return found

    def tables(self, pages: Sequence[int], size: int) -> dict[str, Table]:
        """The tables by group for an adapter whose numbers lie in ``pages``."""
        base = np.asarray(pages, dtype=np.int64) * size
        return {group: self._table(group, base, size) for group in self.widths}

    def _table(self, group: str, base: np.ndarray, size: int) -> Table:
        inputs, outputs = self.groups.sizes[group]
        width, chunk = self.widths[group], self.groups.chunk

        def rows(begin: int, count: int, width: int) -> np.ndarray:
            numbers = begin + np.arange(count, dtype=np.int64) * width
            return ((base[numbers // size] + numbers % size) // width).astype(np.int32)

        table = Table(width, rows(self.a[group], inputs, width))
        index: list[list[np.ndarray]] = [[] for _ in range(outputs // chunk)]
        column: list[list[np.ndarray]] = [[] for _ in range(outputs // chunk)]
        gains: list[list[np.ndarray]] = [[] for _ in range(outputs // chunk)]
        for place, (at, rank) in self.columns.items():
            if place.group != group:
                continue
            first, chunks = place.start // chunk, (place.stop - place.start) // chunk
            b = rows(self.b[place], rank * chunks, chunk)
            part = Part(place.start, place.stop, at, rank, b)
            for c in range(chunks):
                index[first + c].append(b[c::chunks])
                column[first + c].append(np.arange(at, at + rank))
            if place in self.bias:
                part.bias = rows(self.bias[place], chunks, chunk)
                for c in range(chunks):
                    index[first + c].append(part.bias[c : c + 1])
                    column[first + c].append(np.array([ONE]))
            if place in self.gain:
                part.gain = rows(self.gain[place], chunks, chunk)
                for c in range(chunks):
                    gains[first + c].append(part.gain[c : c + 1])
            table.parts.append(part)
        table.index, table.lengths = _flat(index, np.int32)
        table.column, _ = _flat(column, np.int64)
        table.gain, table.gain_lengths = _flat(gains, np.int32)
        return table


@dataclass
class Part:
    """One piece: its output rows, its columns of h, and where its rows of ``chunk`` lie (``b``: rank major)."""

    start: int
    stop: int
    column: int
    rank: int
    b: np.ndarray
    bias: np.ndarray | None = None
    gain: np.ndarray | None = None


@dataclass
class Table:
    """Of one adapter and group: ``a`` (in,) rows of A in the pool seen as rows of ``width``; for each chunk of the
    output ``lengths`` rows of B in the pool seen as rows of ``chunk``, at ``index``, times the h of ``column``."""

    width: int
    a: np.ndarray
    index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    column: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    gain: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    gain_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    parts: list[Part] = field(default_factory=list)


def _width(columns: int, chunk: int) -> int:
    """The least width for so many columns of which rows fill pages: what divides a chunk, or a power of two, divides a
    page."""
    power = 1 << max(2, (columns - 1).bit_length())
    return next((w for w in range(max(4, columns), power) if chunk % w == 0), power)


def _extras(piece: Piece) -> tuple[Tensor | None, Tensor | None]:
    return piece.bias, piece.gain


def _flat(lists: list[list[np.ndarray]], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    flat = [a for inner in lists for a in inner]
    lengths = np.array([sum(len(a) for a in inner) for inner in lists], dtype=np.int64)
    return (np.concatenate(flat) if flat else np.zeros(0)).astype(dtype), lengths
