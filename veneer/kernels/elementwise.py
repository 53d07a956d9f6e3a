"""RMSNorm and the gated activation on rows of bf16 by compiled code: each direction in one pass, rounded once."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from veneer import kernels

LITTLE = 1 << 15  # numbers below which waking a second thread costs more than it saves


def takes(*tensors: Tensor) -> bool:
    """Whether compiled code may be given these: all bf16, stored row by row on the CPU."""
    return all(x.dtype == torch.bfloat16 for x in tensors) and kernels.usable(*tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` of two tensors (…, n)."""
    _of_one_shape(gate, up)
    rows, others = _rows(gate), _rows(up)
    out = torch.empty(rows.shape, dtype=torch.bfloat16)
    _function("veneer_swiglu")(*_place(rows), *_place(others), *_place(out), *rows.shape, _threads(rows))
    return out.view(gate.shape)


def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor, over: bool = False) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up (…, n) from that of ``silu(gate) · up``; gate's is written over ``grad`` if so
    ordered."""
    _of_one_shape(grad, gate, up)
    rows, a, b = _rows(grad), _rows(gate), _rows(up)
    of_gate = rows if over else torch.empty(rows.shape, dtype=torch.bfloat16)
    of_up = torch.empty(rows.shape, dtype=torch.bfloat16)
    places = *_place(rows), *_place(a), *_place(b), *_place(of_gate), *_place(of_up)
    _function("veneer_swiglu_gradients")(*places, None, 0, *rows.shape, _threads(rows))
    return of_gate.view(grad.shape), of_up.view(grad.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x / √(mean x² + eps) · weight`` for ``x`` (N, n), and the inverse roots (N,) in fp32."""
    _of_one_width(x, weight)
    y, roots = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(x.shape[0])
    given = *_place(x), weight.data_ptr(), *_place(y), roots.data_ptr(), *x.shape, eps, _threads(x)
    _function("veneer_rms_norm")(*given)
    return y, roots


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, roots: Tensor) -> Tensor:
    """The gradient of ``rms_norm``'s ``x`` (N, n) from that of what it gave and its inverse roots (N,)."""
    _of_one_shape(grad, x)
    _of_one_width(x, weight)
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    given = *_place(grad), *_place(x), weight.data_ptr(), roots.data_ptr(), *_place(out), *x.shape, _threads(x)
    _function("veneer_rms_norm_gradient")(*given)
    return out


def _of_one_shape(*tensors: Tensor) -> None:
    if any(x.shape != tensors[0].shape for x in tensors):  # compiled code would read beyond the smaller
        raise ValueError(f"compiled code got shapes {[tuple(x.shape) for x in tensors]}; they must be the same")


def _of_one_width(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[1:]:
        raise ValueError(f"RMSNorm got a weight of shape {tuple(weight.shape)} for rows of {x.shape[1]} numbers")


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _place(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.stride(0)


def _threads(x: Tensor) -> int:
    return 1 if x.numel() < LITTLE else torch.get_num_threads()


@functools.cache
def _function(name: str) -> Callable[..., None]:
    found = getattr(kernels.library(), name)
    array, number, place = ctypes.c_void_p, ctypes.c_int64, [ctypes.c_void_p, ctypes.c_int64]
    given = {
        "veneer_swiglu": 3 * place,
        "veneer_swiglu_gradients": 6 * place,
        "veneer_rms_norm": [*place, array, *place, array],
        "veneer_rms_norm_gradient": [*place, *place, array, array, *place],
    }[name]
    eps = [ctypes.c_float] if name == "veneer_rms_norm" else []
    found.argtypes, found.restype = [*given, number, number, *eps, ctypes.c_int], None
    return found
