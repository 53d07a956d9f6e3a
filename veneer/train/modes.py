"""What is switched for the length of a run or an evaluation, and put back afterwards."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn

from veneer.core.adapter import Adapter
from veneer.errors import UserError
from veneer.parts.modes import in_mode
from veneer.train import checkpoint


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators at ``seed`` for the length of a run, then as they were."""
    before = checkpoint.random_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        checkpoint.set_random_state(before)


_TRIM, _MAP = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
_HELD, _OWN = (2**31 - 4096, 2**30), (2**26, 2**25)  # bytes; the second pair is where glibc itself would end up


@contextmanager
def held_heap() -> Iterator[None]:
    """Memory that a step frees stays with the process for the next step, and goes back at the end.

    glibc gives large pieces back to the system each time, and the next step pays for every page again (7,000 to 17,000
    page faults a step of a 135M model, some 5 % of its time). Other C libraries are left alone.
    """
    mallopt = _of_heap("mallopt")
    if mallopt is None:
        yield
        return

    def bound(trim_at: int, map_at: int) -> None:
        mallopt(_TRIM, trim_at)
        mallopt(_MAP, map_at)

    bound(*_HELD)
    try:
        yield
    finally:
        bound(*_OWN)
        trim()


def trim() -> None:
    """Freed memory back to the system, where its C library keeps it otherwise."""
    given = _of_heap("malloc_trim")
    if given is not None:
        given(0)


def _of_heap(name: str) -> Any:
    """A function of the C library's heap; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Train mode, then back in the mode of every module."""
    with in_mode(model, training=True):
        keep_statistics(model)
        yield


def keep_statistics(model: nn.Module) -> None:
    """Batch norms in eval mode: their running statistics are the base's, and no adapter holds them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.eval()


@contextmanager
def alone(adapter: Adapter) -> Iterator[None]:
    """No gradient for the model's other adapters."""
    others = [a for a in adapter.root.adapters.values() if a is not adapter]
    mine = {id(p) for p in adapter.parameters()}
    held = [p for other in others for p in other.parameters() if id(p) not in mine]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Activations recomputed in backward for the length of a run."""
    word = (
        "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    )  # renamed in transformers 5
    if not hasattr(model, f"{word}_checkpointing_enable"):
        raise UserError(f"{type(model).__name__} has no gradient checkpointing: leave checkpointing out")
    if getattr(model, f"is_{word}_checkpointing", False):
        yield
        return
    getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{word}_checkpointing_disable")()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without gradients, then back in the mode of every module."""
    with in_mode(model), torch.no_grad():
        yield
