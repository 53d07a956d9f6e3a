"""Cross entropy over bf16 logits, which become their gradients, by compiled code."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from veneer import kernels

LITTLE = 1 << 15  # numbers below which waking a second thread costs more than it saves


def takes(logits: Tensor) -> bool:
    """Whether compiled code may be given these logits: bf16, stored row by row on the CPU."""
    return logits.dtype == torch.bfloat16 and kernels.usable(logits)


def to_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of ``logits`` (n, vocabulary), which become ``softmax − onehot(targets)``; 0-dim in fp32.

    Raises:
        IndexError: a target is none of the vocabulary; the logits stay as they are.
    """
    count, width = logits.shape
    targets, losses = targets.to(torch.int64).contiguous(), torch.empty(count)
    threads = 1 if logits.numel() < LITTLE else torch.get_num_threads()
    given = logits.data_ptr(), logits.stride(0), targets.data_ptr(), losses.data_ptr(), count, width, threads
    done = _function()(*given)
    if done < count:
        raise IndexError(f"the target {targets[done].item()} is outside of a vocabulary of {width}")
    return losses.sum()


@functools.cache
def _function() -> Callable[..., int]:
    found = kernels.library().veneer_cross_entropy
    array, number = ctypes.c_void_p, ctypes.c_int64
    found.argtypes, found.restype = [array, number, array, array, number, number, ctypes.c_int], number
    return found
