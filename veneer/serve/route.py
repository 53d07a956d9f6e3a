"""Adapters whose file is laid out as one that was read before: their bytes go straight to where pages want them.

What the numbers of a plain file mean follows from its header and its description. A `Route` keeps that: the next file
with both the same costs one read and one strided copy for each factor, over all layers at once.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from veneer.errors import UserError
from veneer.serve.layout import Layout, Place

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KEPT = 32_000_000
LONGEST = 100_000_000  # bytes of a header, as safetensors itself bounds them


class Names(NamedTuple):
    """The tensors of one layer's pair in a file; ``scale`` is a tensor's name there, or the number itself."""

    a: str
    b: str
    scale: str | float


class Strided(NamedTuple):
    """One factor in all layers: (layers, rows, columns) with equal steps from layer to layer, in the file's order."""

    dtype: torch.dtype
    start: int
    step: int
    shape: tuple[int, int]

    def of(self, payload: Tensor, layers: int) -> Tensor:
        """The factor as a view into a file's numbers."""
        numbers = payload[: payload.shape[0] // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        return numbers.as_strided((layers, *self.shape), (self.step, self.shape[1], 1), self.start)


class Scratch:
    """Memory that is used again, up to ``KEPT`` bytes of it: new pages cost more than what is done in them."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """At least ``size`` bytes, of any content."""
        with self._lock:
            fits = [t for t in self._free if t.shape[0] >= size]
            if fits:
                least = min(fits, key=len)
                self._free = [t for t in self._free if t is not least]
                return least
        return torch.empty(size, dtype=torch.uint8)

    def give(self, memory: Tensor) -> None:
        """It is free again; the longest unused goes where that is too much."""
        with self._lock:
            self._free.append(memory)
            while sum(map(len, self._free)) > KEPT:
                self._free.pop(0)


@dataclass(frozen=True)
class Packed:
    """An adapter's numbers as pages hold them, (pages, size) for each layer, and how they lie there."""

    layout: Layout
    layers: Sequence[Tensor]
    form: str
    rank: int
    error: float = 0.0
    done: Callable[[], None] = lambda: None  # to be called when the numbers have been copied

    @property
    def bytes(self) -> int:
        """Bytes of all layers."""
        return sum(t.numel() * t.element_size() for t in self.layers)


@dataclass(frozen=True)
class Route:
    """From the bytes of a file to pages; ``order`` says which layer stands at which place of the file."""

    layout: Layout
    form: str
    rank: int
    length: int
    order: tuple[int, ...]
    factors: Mapping[Place, tuple[Strided, Strided]]
    scales: Mapping[Place, np.ndarray]  # by the file's order: bytes where the scales stand, or the numbers

    @classmethod
    def of(
        cls, header: bytes, layout: Layout, form: str, rank: int, names: Mapping[Place, Mapping[int, Names]]
    ) -> Route | None:
        """The route of a file, from its header; None when its tensors do not follow each other evenly."""
        about = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        first = next(iter(names.values()))
        count, tensors = len(first), (t for own in names.values() for n in own.values() for t in n)
        if not {t for t in tensors if isinstance(t, str)} <= about.keys():
            return None
        order = tuple(sorted(range(count), key=lambda n: about[first[n].a]["data_offsets"][0]))
        factors, scales = {}, {}
        for place, own in names.items():
            pair = [_strided([about[getattr(own[n], key)] for n in order]) for key in ("a", "b")]
            if None in pair:
                return None
            factors[place] = (pair[0], pair[1])
            given = [own[n].scale for n in order]
            if all(isinstance(s, str) for s in given):
                if any(about[s]["dtype"] != "F64" or about[s]["shape"] for s in given):
                    return None
                scales[place] = np.array([about[s]["data_offsets"][0] for s in given], np.int64)
            else:
                scales[place] = np.array(given, np.float32)
        length = max(v["data_offsets"][1] for v in about.values())
        return cls(layout, form, rank, length, order, factors, scales)

    def pack(self, payload: Tensor, size: int, dtype: torch.dtype, path: Path, scratch: Scratch) -> Packed:
        """The numbers of a file (bytes,) as `Layout.pack` lays them; raises UserError when one is not finite."""
        count, layout = len(self.order), self.layout
        need = count * layout.pages(size) * size * dtype.itemsize
        taken = scratch.take(need)
        out = taken[:need].zero_().view(dtype).view(count, -1)
        for place, (a, b) in self.factors.items():
            layout.a_of(out, place).copy_(a.of(payload, count).transpose(1, 2))
            scales = self.scales[place]
            if scales.dtype == np.int64:
                scales = payload.numpy()[scales[:, None] + np.arange(8)].view(np.float64)[:, 0].astype(np.float32)
            B = b.of(payload, count).transpose(1, 2)
            if (scales != 1).any():
                B = B * torch.from_numpy(scales)[:, None, None]
            layout.b_of(out, place).copy_(B)
        if not finite(out):
            raise UserError(f"{path.parent} holds numbers that are not finite; train it again or fetch the file again")
        layers: list[Any] = [None] * count
        for n, numbers in zip(self.order, out.view(count, -1, size)):
            layers[n] = numbers
        return Packed(layout, layers, self.form, self.rank, done=partial(scratch.give, taken))


def header(file: BinaryIO) -> bytes | None:
    """The header of an open safetensors file, which stands behind it afterwards; None when it is none."""
    count, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    return file.read(count) if 0 < count <= min(LONGEST, size - 8) else None


def payload(file: BinaryIO, length: int, into: Tensor) -> bool:
    """Read what follows the header into (bytes,); False when it is not of this length."""
    if os.fstat(file.fileno()).st_size - file.tell() != length:
        return False
    return file.readinto(into[:length].numpy()) == length


def finite(numbers: Tensor) -> bool:
    """Whether no number is infinite or none."""
    low, high = numbers.aminmax()
    return bool(low.isfinite() & high.isfinite())


def _strided(tensors: Sequence[Mapping[str, Any]]) -> Strided | None:
    dtypes, shapes = {t["dtype"] for t in tensors}, {tuple(t["shape"]) for t in tensors}
    starts = np.array([t["data_offsets"][0] for t in tensors], np.int64)
    dtype, shape = DTYPES.get(dtypes.pop()), shapes.pop()
    steps = np.unique(np.diff(starts)) if len(starts) > 1 else np.zeros(1, np.int64)
    if dtypes or shapes or dtype is None or len(shape) != 2 or len(steps) > 1:
        return None
    size = dtype.itemsize
    if (starts % size).any() or (steps % size).any():
        return None
    return Strided(dtype, int(starts[0]) // size, int(steps[0]) // size, shape)
