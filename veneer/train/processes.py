"""The processes of a run and what they say to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.train.shards import sharded


class Processes:
    """The processes of the run, as accelerate or torchrun started them; one when nothing did."""

    def __init__(self) -> None:
        from accelerate import PartialState

        self.state = PartialState(cpu=not torch.accelerator.is_available())
        self.device: torch.device = self.state.device
        self.world, self.rank = self.state.num_processes, self.state.process_index
        self.main = self.state.is_main_process

    def sum(self, *values: float) -> list[float]:
        """Each value added over the processes, in fp64."""
        if self.world == 1:
            return [float(v) for v in values]
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(together)
        return together.tolist()

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        if self.world == 1:
            return values
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, values)
        return [v for part in parts for v in part]

    def from_main(self, value: Any) -> Any:
        """The main process's value."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Go on when all have come here."""
        self.state.wait_for_everyone()

    @torch.no_grad()
    def average_gradients(self, params: list[nn.Parameter]) -> None:
        """Replace the gradients of ``params`` by their mean over the processes, in one message a type.

        This stands in for DistributedDataParallel, whose buckets are laid out once: rank methods add, prune and replace
        tensors in mid-run, and a ``micro_step`` may run backward more than once. A tensor without a gradient here
        counts as zero where another process has one. Sharded parameters are left out: theirs are reduced already.
        """
        if self.world == 1:
            return
        plain = [p for p in params if p.requires_grad and not sharded(p)]
        had = torch.tensor([p.grad is not None for p in plain], dtype=torch.float32, device=self.device)
        torch.distributed.all_reduce(had)
        plain = [p for p, n in zip(plain, had.tolist()) if n]
        for dtype in sorted({p.dtype for p in plain}, key=str):
            group = [p for p in plain if p.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group])
            torch.distributed.all_reduce(flat)
            flat /= self.world
            for p, piece in zip(group, flat.split([p.numel() for p in group])):
                p.grad = piece.view_as(p)
