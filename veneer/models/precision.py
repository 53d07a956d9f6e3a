"""Which precision a model computes in: bfloat16 where the hardware multiplies it fast, float32 elsewhere."""

from __future__ import annotations

import torch

from veneer.errors import UserError, nearest

PRECISIONS = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}

# Processor features, in torch's names, that multiply pairs of bfloat16 into float32 directly. Without one of them torch
# converts on the way and bf16 is slower than fp32.
_BF16_FEATURES = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")


def fast_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether ``device`` multiplies bfloat16 matrices faster than float32 ones.

    On a CPU it takes the instructions and torch's permission to use them (``ATEN_CPU_CAPABILITY`` may forbid AVX-512).
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    features = torch.cpu.get_capabilities()
    if features.get("architecture") == "x86_64" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return any(features.get(name) for name in _BF16_FEATURES)


def precision(dtype: torch.dtype | str | None, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype meant: itself, one of ``PRECISIONS`` by name, or for None and ``"auto"`` what ``device`` is fast at."""
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    if isinstance(dtype, str) and dtype in PRECISIONS:
        return PRECISIONS[dtype]
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    raise UserError(
        f"dtype is {dtype!r}; give torch.float32, torch.bfloat16, torch.float16, one of {', '.join(PRECISIONS)}, "
        f"or None for what the hardware does fast{nearest(str(dtype), PRECISIONS)}"
    )
