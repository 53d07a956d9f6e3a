"""The precision in which the frozen base computes; what trains stays in fp32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from veneer import kernels
from veneer.core.delta import Written
from veneer.errors import UserError
from veneer.train.shards import sharded

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def base_dtype(model: nn.Module) -> torch.dtype:
    """The type that most of the model's floating numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        if p.is_floating_point() and not p.requires_grad:
            counts[p.dtype] += p.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def choose(adapter: Adapter, wanted: str, device: torch.device, plain: bool) -> tuple[torch.dtype, str]:
    """The type the base is to compute in, and one sentence that says so and why.

    ``auto`` takes bf16 where the hardware multiplies it fast and fp32 elsewhere; it leaves the base as it is when
    tensors of the base train (they compute in the type they were attached in), when the base is sharded, or when the
    model is not one of transformers' (``plain`` is False).

    Raises:
        UserError: another type than the base's was asked for in such a case.
    """
    from veneer.models.precision import fast_bf16

    now = base_dtype(adapter.model)
    written = any(isinstance(d, Written) for d in adapter.every().values())
    spread = any(sharded(p) for p in adapter.model.parameters())
    fixed = (
        "tensors of the base train" if written
        else "the base is sharded" if spread
        else "it is not a transformers model" if not plain
        else ""
    )  # fmt: skip
    fast = fast_bf16(device)
    target = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": torch.bfloat16 if fast else torch.float32}[wanted]
    if fixed and target != now:
        if wanted != "auto":
            raise UserError(
                f"precision={wanted} was asked for, but the base computes in {WORDS.get(now, now)} and {fixed}: "
                f"load the model in {wanted} before attaching"
            )
        said = f"the base computes in {WORDS.get(now, now)} as it was given, since {fixed}"
        return now, said + _kernels(now, device)
    why = "" if wanted != "auto" else f": this {_place(device)} multiplies bf16 {'fast' if fast else 'no faster'}"
    return target, f"the base computes in {WORDS[target]}{why}; what trains stays in fp32" + _kernels(target, device)


def _kernels(dtype: torch.dtype, device: torch.device) -> str:
    """Whether the compiled kernels take part, where they could; it compiles them before the first step needs them."""
    return f"; {kernels.state()}" if dtype == torch.bfloat16 and device.type == "cpu" else ""


def _place(device: torch.device) -> str:
    return "processor" if device.type == "cpu" else f"{device.type} device"


@contextmanager
def computing(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Run the frozen floating weights in ``dtype``; afterwards they are the tensors they were, bit for bit.

    Buffers (rotary frequencies, masks) keep their type.
    """
    before: list[tuple[nn.Parameter, torch.Tensor]] = []
    for name, p in model.named_parameters():
        own = ".veneer." in f".{name}" or "veneer_shared" in name
        if not own and not p.requires_grad and p.is_floating_point() and p.dtype != dtype:
            before.append((p, p.data))
            p.data = p.data.to(dtype)
    try:
        yield
    finally:
        for p, data in before:
            p.data = data
