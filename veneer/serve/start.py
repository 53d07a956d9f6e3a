"""From the command's settings to an engine: in this process, or in each replica's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.errors import UserError


@dataclass(frozen=True)
class Start:
    """What an engine is made of; plain values, so that a replica can make its own.

    Args:
        memory: of the pool, in GB.
        threads: cores to compute on; None leaves torch's choice.
        policy, deadline, eviction, batch, queue, chunk: as the command's options.
    """

    model: str
    dtype: str = "auto"
    memory: float = 1.0
    batch: int = 32
    queue: int = 256
    chunk: int = 256
    policy: str = "fair"
    deadline: float = 6.0
    eviction: str = "lru"
    threads: int | None = None

    def trunk(self) -> tuple[Any, int, Any]:
        """(base, pages of its pool, tokenizer); raises UserError for a model that cannot be served."""
        import torch

        from veneer.models import load_model
        from veneer.serve.check import pages_of
        from veneer.serve.sizes import keep_few
        from veneer.serve.trunk import Trunk

        keep_few()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        base, tokenizer = load_model(self.model, dtype=None if self.dtype == "auto" else getattr(torch, self.dtype))
        if tokenizer is None:
            raise UserError(f"{self.model} holds no tokenizer; put the tokenizer's files beside the model's weights")
        trunk = Trunk(base)
        return trunk, pages_of(trunk, int(self.memory * 1e9)), tokenizer

    def engine(self) -> tuple[Any, Any]:
        """(engine, tokenizer)."""
        from veneer.serve.engine import Engine, Limits
        from veneer.serve.policies.catalogue import POLICIES

        trunk, pages, tokenizer = self.trunk()
        chosen = POLICIES[self.policy](deadline=self.deadline) if self.policy == "abort" else POLICIES[self.policy]()
        limits = Limits(batch=self.batch, queue=self.queue, chunk=self.chunk)
        return Engine(trunk, pages, policy=chosen, limits=limits, eviction=self.eviction), tokenizer
