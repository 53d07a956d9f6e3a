"""What side networks save on MiniLM: bytes kept for the backward pass of 16 rows of 64 tokens, and a rule on them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.claims.harness import Results, Trial
from bench.claims.texts import Ratings
from bench.claims.verdicts import Finding, Rule


@dataclass(frozen=True)
class MiniLM(Ratings):
    """all-MiniLM-L6-v2 with a new head of six classes, stepped once and not judged: only its bytes are of interest."""

    shots: int = 16
    steps: int = 1

    @property
    def words(self) -> str:
        """The task in words."""
        return "MiniLM, bytes only"

    def validation(self, model: nn.Module, seed: int) -> float:
        """Nothing."""
        return 0.0

    def scores(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Nothing but what a claim adds."""
        return {"test": 0.0}


def kept_16x64(trial: Trial) -> float:
    """Bytes kept for backward by a training forward of 16 × 64 tokens, each storage once, the model's own left out."""
    model, found = trial.model, {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # a tensor that its own graph held would never go

    ids = torch.randint(model.config.vocab_size, (16, 64), generator=torch.Generator().manual_seed(0))
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if trial.task.fit.get("task") != "causal":
        batch["labels"] = torch.arange(16) % model.config.num_labels
    model.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(**batch)
    model.eval()
    del out
    return float(sum(found.values()))


def share(label: str, other: str, at_most: float) -> Rule:
    """At most this share of another contestant's kept bytes."""

    def rule(results: Results) -> Finding:
        mine, theirs = (statistics.fmean(results.values(name, "kept_16x64")) for name in (label, other))
        words = f"{label} keeps {mine / 1e6:.1f} MB, {mine / theirs:.3f} of {other}'s {theirs / 1e6:.1f} MB"
        return Finding(mine <= at_most * theirs, f"{words}; at most {at_most} was needed")

    return rule
