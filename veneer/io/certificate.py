"""Writing plain LoRA with its error: the directory is read back and its logits are held against the adapter's own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.io.files import staged, write_json, write_tensors
from veneer.io.lowering import Lowered, Row, lower
from veneer.io.peft_config import CONFIG, TENSORS
from veneer.io.peft_write import lora
from veneer.models import architecture

FILE = "certificate.json"
_NAME = "lowered"


@dataclass(frozen=True)
class LogitError:
    """How far the logits moved: over their own size, over what the adapter changes of them, and the largest move.

    ``relative`` is ‖z′ − z‖/‖z‖ and ``of_change`` ‖z′ − z‖/‖z − z_base‖ over all logits of the batches.
    """

    relative: float
    of_change: float
    largest: float
    tokens: str


@dataclass(frozen=True)
class Certificate(os.PathLike):
    """What was written, and what it lost. Usable as the path of the directory.

    ``error`` is ‖ΔW − ΔW′‖_F/‖ΔW‖_F over all layers; ``logits`` is None where no batch was run.
    """

    path: Path
    error: float
    logits: LogitError | None
    rows: tuple[Row, ...]

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def exact(self) -> bool:
        """Whether every layer's change was kept as it is."""
        return all(r.exact for r in self.rows)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer."""
        return {r.path: r.rank for r in self.rows}

    def __str__(self) -> str:
        ranks = sorted(self.ranks.values())
        spread = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
        how = "exact pairs" if self.exact else f"relative weight error {self.error:.3g}"
        lines = [f"{self.path}: plain LoRA at {len(ranks)} layers, {spread}, {how}"]
        if self.logits is None:
            lines.append("logit error not measured: give batches=")
        else:
            z = self.logits
            lines.append(
                f"logit error {z.relative:.3g} of the logits, {z.of_change:.3g} of what the adapter changes, at most "
                f"{z.largest:.3g} (on {z.tokens})"
            )
        return "\n".join(lines)


def write(
    adapter: Adapter,
    directory: str | Path,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> Certificate:
    """Write the adapter as plain LoRA in a PEFT directory, with ``certificate.json`` beside it.

    Args:
        adapter: what to write; see ``lowering.lower`` for what can be.
        directory: whole or not at all.
        rank: the largest rank of a layer. None: as many as ``tolerance`` needs, or those of exact pairs.
        tolerance: relative Frobenius error allowed over all layers, in [0, 1).
        batches: inputs that the model accepts, on which logits are compared; random tokens when None, none when empty.
        seed: of the random tokens.

    Raises:
        UserError: what cannot be lowered, or not within ``rank`` and ``tolerance``, with the nearest offer.
    """
    directory = Path(directory)
    lowered = lower(adapter, rank, tolerance)
    config, tensors = lora(adapter, lowered.factors, within=lowered.within)
    what = "random tokens" if batches is None else "the given batches"
    tried = _random(adapter.model, seed) if batches is None else list(batches)
    with staged(directory, last=(CONFIG,)) as scratch:
        write_tensors(scratch / TENSORS, tensors)
        write_json(scratch / CONFIG, dict(sorted(config.items())))
        logits = _logit_error(adapter, scratch, tried, what) if tried else None
        found = Certificate(directory, lowered.error, logits, tuple(lowered.rows))
        write_json(scratch / FILE, _content(found, lowered))
    return found


def _content(found: Certificate, lowered: Lowered) -> dict[str, Any]:
    return {
        "weight_error": found.error,
        "exact": found.exact,
        "logits": None if found.logits is None else asdict(found.logits),
        "layers": [asdict(r) for r in lowered.rows],
    }


@torch.no_grad()
def _logit_error(adapter: Adapter, directory: Path, batches: list[Mapping[str, Any]], what: str) -> LogitError:
    """Of the adapter that is read back from ``directory`` against ``adapter``."""
    from veneer.io.peft import read

    model = adapter.model
    sums, largest = [0.0, 0.0, 0.0], 0.0
    with _evaluating(model):
        for batch in batches:
            z = _logits(model, batch)
            with adapter.disabled():
                base = _logits(model, batch)
                twin = read(model, directory, name=_NAME, force=True)
                try:
                    moved = _logits(model, batch)
                finally:
                    twin.remove()
            gap = moved - z
            for i, t in enumerate((gap, z, z - base)):
                sums[i] += float(t.square().sum())
            largest = max(largest, float(gap.abs().max()))
    gap, own, change = (s**0.5 for s in sums)
    return LogitError(gap / own if own else 0.0, gap / change if change else 0.0, largest, what)


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    device = next(model.parameters()).device
    out = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    out = out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out[0]
    return out.double()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, module by module as it was afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _random(model: nn.Module, seed: int, rows: int = 4, length: int = 32) -> list[dict[str, Tensor]]:
    """A batch of random tokens for a model that takes tokens; none for others."""
    table, config = architecture.embedding(model), architecture.text_config(model)
    if not isinstance(table, nn.Embedding) or config is None:
        return []
    longest = getattr(config, "max_position_embeddings", None) or length
    g = torch.Generator().manual_seed(seed)
    shape = (rows, min(length, longest))
    batch = {"input_ids": torch.randint(0, table.num_embeddings, shape, generator=g)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = torch.randint(0, table.num_embeddings, shape, generator=g)
    elif getattr(model.config, "pad_token_id", None) is not None:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    return [batch]
