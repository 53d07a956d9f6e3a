"""The products of `veneer.numerics.lowrank` in bf16 by compiled code: each group of layers in one call.

The factors are scaled and rounded to bf16 as they are read, base and change are summed in fp32, and every output is
rounded once. Each group's base weights are read ahead from memory while the group before them in the same call is
multiplied.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from struct import Struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer import kernels

if TYPE_CHECKING:
    from veneer.numerics.lowrank import Branch

MOST = 8  # layers of a group: BRANCHES in linear.c
LITTLE = 1 << 21  # multiplications below which waking a second thread costs more than it saves
_BRANCH = Struct("=8qd12q")  # Branch in linear.c


def takes(branches: Sequence[Branch], dtype: torch.dtype) -> bool:
    """Whether the compiled code computes this group in both directions.

    It does in bf16 on the CPU, for even widths, weights stored row by row, and fp32 factors of which all see the same
    input.
    """
    if dtype != torch.bfloat16 or len(branches) > MOST or not kernels.usable():
        return False
    seen = None
    for b in branches:
        W = b.weight if isinstance(b.weight, Tensor) else None
        if W is not None and not (W.dtype == dtype and _even(W) and kernels.usable(W)):
            return False
        if b.A is None:
            if b.weight is None:
                return False
            continue
        course = (b.dropout, b.seed if b.dropout else None)
        if seen not in (None, course) or not b.A.dtype == b.B.dtype == torch.float32:
            return False
        if b.A.shape[1] % 2 or b.B.shape[0] % 2 or not kernels.usable(b.A, b.B):
            return False
        seen = course
    return True


def _even(W: Tensor) -> bool:
    return not (W.shape[0] % 2 or W.shape[1] % 2)


def run(
    rows: Tensor,
    branches: Sequence[Branch],
    windows: tuple[Tensor, Tensor] | None,
    into: Sequence[Tensor | None] | None,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """`veneer.numerics.lowrank.run` for a group that this `takes`; ``windows`` are those of its dropout, or None."""
    rows = _row_by_row(rows)
    count, width = rows.shape
    ys: list[Tensor] = []
    hs: list[Tensor | None] = []
    zs: list[Tensor | None] = []
    packed, alive, work = [], [], 0
    for b, y in zip(branches, into or [None] * len(branches)):
        W, out = _dense(b), b.width
        _check(b, W, width, out)
        y = rows.new_empty(count, out) if y is None else y
        z = rows.new_empty(count, out) if b.gain is not None else None
        h = None if b.A is None else rows.new_empty(count, b.A.shape[0] + b.A.shape[0] % 2)
        bias, gain = _fp32(b.bias), _fp32(b.gain)
        alive += W, bias, gain
        packed.append(_branch(b, W, out, bias, gain, y, z, h))
        ys.append(y)
        hs.append(None if h is None else h[:, : b.A.shape[0]])
        zs.append(z)
        work += count * width * out
    dropped = None if windows is None else rows.new_empty(count, width)
    given = *_place(rows), *_dropout(dropped, windows), count, width, _threads(work)
    _function("veneer_group")(b"".join(packed), len(packed), *given)
    return ys, hs, zs


def gradients(
    rows: Tensor,
    branches: Sequence[Branch],
    grads: Sequence[Tensor],
    hidden: Sequence[Tensor | None],
    windows: tuple[Tensor, Tensor] | None,
    need_rows: bool,
    needs: Sequence[tuple[bool, bool, bool, bool]],
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """The gradient of ``rows``, and those of each branch's A and B, for gradients ``grads`` of ``x Wᵀ + h Bᵀ``."""
    count, width = rows.shape
    seen = any(need[1] for need in needs)  # elsewhere rows may be a shape without numbers
    rows = _row_by_row(rows) if seen else rows
    dropped = rows.new_empty(count, width) if seen and windows is not None else None
    grad = grads[0].new_empty(count, width) if need_rows else None
    found: list[tuple[Tensor | None, Tensor | None]] = []
    packed, alive, work = [], [], 0
    for b, g, h, (_, need_A, need_B, _) in zip(branches, grads, hidden, needs):
        W, g = _dense(b) if need_rows else None, _row_by_row(g)
        _check(b, W, width, g.shape[1])
        need_A, need_B = need_A and b.A is not None, need_B and b.A is not None
        A = torch.empty(b.A.shape, dtype=torch.float32) if need_A else None
        B = torch.empty(b.B.shape, dtype=torch.float32) if need_B else None
        t = g.new_empty(count, b.A.shape[0] + b.A.shape[0] % 2) if b.A is not None and (need_A or need_rows) else None
        alive += W, g, t
        packed.append(_branch(b, W, g.shape[1], None, None, g, None, h, t, A, B))
        found.append((A, B))
        work += count * width * g.shape[1]
    given = *_place(rows), *_dropout(dropped, windows), count, width, *_place(grad), _threads(work)
    _function("veneer_group_gradients")(b"".join(packed), len(packed), *given)
    return grad, found


def _check(b: Branch, W: Tensor | None, width: int, out: int) -> None:
    """Compiled code would read beyond what does not fit."""
    rank = 0 if b.A is None else b.A.shape[0]
    fits = W is None or W.shape == (out, width)
    if not fits or (rank and not (b.A.shape == (rank, width) and b.B.shape == (out, rank))):
        shapes = [tuple(t.shape) for t in (W, b.A, b.B) if t is not None]
        raise ValueError(f"a linear layer from {width} to {out} numbers got W, A and B of the shapes {shapes}")


def _row_by_row(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _dense(b: Branch) -> Tensor | None:
    return None if b.weight is None else _row_by_row(b.dense(torch.bfloat16))


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _threads(work: int) -> int:
    return 1 if work < LITTLE else torch.get_num_threads()


def _place(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _dropout(dropped: Tensor | None, windows: tuple[Tensor, Tensor] | None) -> tuple[int, int, int]:
    table, starts = windows or (None, None)
    return _place(dropped)[0], _place(table)[0], _place(starts)[0]


def _branch(
    b: Branch,
    W: Tensor | None,
    out: int,
    bias: Tensor | None,
    gain: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    h: Tensor | None,
    t: Tensor | None = None,
    grad_A: Tensor | None = None,
    grad_B: Tensor | None = None,
) -> bytes:
    (A, A_stride), (B, B_stride) = _place(b.A), _place(b.B if b.A is not None else None)
    rank = 0 if b.A is None else b.A.shape[0]
    ends = _place(bias)[0], _place(gain)[0], *_place(y), *_place(z), *_place(h), *_place(t)
    return _BRANCH.pack(
        *_place(W), out, rank, A, B, A_stride, B_stride, b.factor, *ends, _place(grad_A)[0], _place(grad_B)[0]
    )


@functools.cache
def _function(name: str) -> Callable[..., None]:
    found = getattr(kernels.library(), name)
    place = [ctypes.c_void_p, ctypes.c_int64]
    dropout, shape = [ctypes.c_void_p] * 3, [ctypes.c_int64] * 2
    ends = [*place, ctypes.c_int] if name == "veneer_group_gradients" else [ctypes.c_int]
    found.argtypes = [ctypes.c_char_p, ctypes.c_int, *place, *dropout, *shape, *ends]
    found.restype = None
    return found
