"""Forms that grow while they train: an adapter as training begins, without the loop."""

import torch

import veneer
from veneer.core.hook import Schedule


def begun(model, recipe, steps=20, **options):
    """An adapter with its optimiser, as training begins; and the hook of the ranks."""
    adapter = veneer.attach(model, recipe, **options)
    adapter.optimizer = torch.optim.AdamW(adapter.optimizer_groups(), lr=1e-2)
    adapter.hooks[0].on_start(adapter, Schedule(steps, 1e-2))
    return adapter, adapter.hooks[0]


def stirred(adapter):
    """The trained tensors moved to where ΔW can be seen."""
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
