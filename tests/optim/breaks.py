"""A run of the loop that is broken off and goes on in a fresh process's objects."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from small_runs import collated, encoded, llama

import veneer
from veneer.train import checkpoint
from veneer.train.feed import BatchFeed
from veneer.train.processes import Processes
from veneer.train.settings import Settings
from veneer.train.steps import Training
from veneer.train.tasks import Task


def training(
    recipe: str,
    *,
    lr: float = 1e-2,
    accumulate: int = 1,
    clip: float | None = 1.0,
    steps: int = 8,
    size: int = 4,
    blocks: int = 1,
    **own,
) -> Training:
    """A run on the tiny Llama, ``size`` rows a micro-batch, before its first step; ``own`` goes to ``attach``."""
    adapter = veneer.attach(llama(num_hidden_layers=blocks), recipe, **own)
    adapter.model.train()
    task = Task("causal")
    settings = Settings(steps=steps, accumulate=accumulate, clip=clip, warmup=0)
    made = Training(adapter, BatchFeed(collated(encoded(48), size), task), task, settings, Processes())
    made.begin_phase(lr)
    return made


def goes_on_bit_for_bit(make: Callable[[], Training], before: int = 2, after: int = 3, lr: float = 1e-2) -> bool:
    """Whether a run that is stored after ``before`` steps and taken up by fresh objects takes the same next steps."""
    unbroken = make()
    for _ in range(before):
        unbroken.take_step()
    skeleton, tensors = checkpoint.flatten(unbroken.state())
    stored = copy.deepcopy((skeleton, {k: v.clone() for k, v in tensors.items()}))
    expected = [unbroken.take_step() for _ in range(after)]
    resumed = make()
    resumed.load(checkpoint.unflatten(*stored), lr)
    found = [resumed.take_step() for _ in range(after)]
    return found == expected and torch.equal(resumed.adapter.vector(), unbroken.adapter.vector())
