"""Causal self-attention in bf16 by compiled code, from the projections side by side to the heads' outputs.

Rows of a packed row are read where they stand: nothing is unpacked, and no padding is computed. Of the forward pass the
logarithms of the softmax' sums are kept, and the probabilities are formed again.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer import kernels

if TYPE_CHECKING:
    from veneer.models.fast_attention import Heads
    from veneer.models.packing import Packing

LITTLE = 1 << 10  # queries below which waking a second thread costs more than it saves
_ATTENTION = Struct("=15qd10q")  # Attention in attention.c


def takes(qkv: Tensor, mask: Tensor | None, heads: Heads) -> bool:
    """Whether compiled code attends here: in bf16, without a mask but causality, with an even head size."""
    return mask is None and qkv.dtype == torch.bfloat16 and heads.size % 2 == 0 and kernels.usable(qkv)


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """`veneer.models.fast_attention.attend`: the output, and the logarithms of the sums, (positions, queries)."""
    flat, rows = _flat(qkv), _rows(qkv, packing)
    out = torch.empty(flat.shape[0], heads.widths[0], dtype=torch.bfloat16)
    if packing is not None:
        out[len(packing.place) :] = 0
    sums = torch.empty(flat.shape[0], heads.queries)
    given = _packed(flat, rows, heads, (cos, sin, None), out, sums)
    _function("veneer_attention")(given, _threads(sums))
    return out.view(*qkv.shape[:-1], -1), sums


def attend_gradient(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    sums: Tensor,
    cos: Tensor,
    sin: Tensor,
    back: Tensor,
    heads: Heads,
    packing: Packing | None,
) -> Tensor:
    """The gradient of ``qkv`` from that of the output; ``back`` is ``sin`` with the halves of each head exchanged."""
    flat, rows = _flat(qkv), _rows(qkv, packing)
    found = torch.empty_like(flat, memory_format=torch.contiguous_format)
    agreements = None
    if packing is not None:
        found[len(packing.place) :] = 0
        agreements = torch.tensor(packing.agree, dtype=torch.long) if packing.agree else None
    aside = torch.empty(rows[0].numel(), 2 * heads.groups * heads.size)
    of_out = _flat(grad), found, aside, agreements
    given = _packed(flat, rows, heads, (cos, sin, back), _flat(out), sums, of_out)
    _function("veneer_attention_gradient")(given, _threads(sums))
    return found.view(qkv.shape)


def _flat(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _rows(qkv: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row where its positions stand (rows, time), how many there are, and how many an earlier row has."""
    if packing is not None:
        return packing.source, packing.lengths, packing.shared
    return _in_a_batch(*qkv.shape[:2])


@functools.lru_cache(maxsize=4)
def _in_a_batch(batch: int, time: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):
        return torch.arange(batch * time).view(batch, time), torch.full((batch,), time), torch.zeros(batch).long()


def _threads(sums: Tensor) -> int:
    return 1 if sums.numel() < LITTLE else torch.get_num_threads()


def _packed(
    qkv: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    heads: Heads,
    turn: tuple[Tensor, Tensor, Tensor | None],
    out: Tensor,
    sums: Tensor,
    back: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
) -> bytes:
    source, cos = rows[0], turn[0]
    if qkv.shape[1] != sum(heads.widths) or any(t is not None and t.shape[1] < source.shape[1] for t in turn):
        raise ValueError(
            f"attention of {source.shape[1]} times got {qkv.shape[1]} numbers each for {heads.widths}, and turns of "
            f"the shape {tuple(cos.shape)}"
        )
    grad, found, aside, agreements = back or (None, None, None, None)
    return _ATTENTION.pack(
        *_place(qkv),
        *(t.data_ptr() for t in rows),
        *source.shape,
        *(_place(t)[0] for t in turn),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        heads.groups,
        heads.queries // heads.groups,
        heads.size,
        heads.scale,
        *_place(out),
        _place(sums)[0],
        *_place(grad),
        *_place(found),
        _place(aside)[0],
        _place(agreements)[0],
        0 if agreements is None else len(agreements),
    )


def _place(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


@functools.cache
def _function(name: str) -> Callable[..., None]:
    found = getattr(kernels.library(), name)
    found.argtypes, found.restype = [ctypes.c_char_p, ctypes.c_int], None
    return found
