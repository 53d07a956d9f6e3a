"""Products and elementwise steps in bf16 on the CPU by code that is compiled on the machine where it runs.

Where it cannot be (`state` says why), torch's own operations do the same work.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor, nn

from veneer.kernels import build

_PLAIN = (Tensor, nn.Parameter)
_MAKING = threading.Lock()

_library: ctypes.CDLL | None = None
_why: str | None = None  # it cannot be had; None: not asked for yet, "": it is there


def library() -> ctypes.CDLL | None:
    """The compiled library, made at the first call; None where it cannot be used."""
    global _library, _why
    if _why is None:
        with _MAKING:
            if _why is None:
                try:
                    _library, why = build.load(), ""
                except build.Missing as missing:
                    why = str(missing)
                _why = why
    return _library


def state() -> str:
    """Whether compiled kernels are used, and if not why and what helps: one sentence without its full stop."""
    library()
    return f"compiled kernels are not used: {_why}" if _why else "compiled kernels are used"


def usable(*tensors: Tensor) -> bool:
    """Whether compiled code may be given these tensors: there is some, and they are stored row by row on the CPU.

    False under torch.compile, where a mode watches torch's operations (a counter of them would miss compiled ones), and
    for tensors that only stand for numbers (meta, fake, functorch's).
    """
    if (_library if _why is not None else library()) is None or torch.compiler.is_compiling():
        return False
    for x in tensors:
        if type(x) not in _PLAIN or not x.is_cpu or x.layout is not torch.strided or (x.ndim and x.stride(-1) != 1):
            return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack())
