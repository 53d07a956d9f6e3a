"""Batches to try a job on: the data's own, or random ones of the shape that the task asks for."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.data import Batches, Dataset
from veneer.errors import UserError

AHEAD = 200  # batches of the data whose sizes are looked at
SIDE = 224  # pixels, where a model does not say how large its images are

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """Where the batches of a job come from.

    ``make(rows, count)`` gives so many batches of so many rows; ``usual`` and ``largest`` are the mean and the greatest
    ``size_of`` the job's own batches, ``row`` the mean size of a row.
    """

    make: Callable[[int, int], list[Batch]]
    usual: float
    largest: float
    row: float


def size_of(batch: Batch) -> float:
    """What a batch's cost grows with: its tokens, padding left out, or its rows where there are no tokens."""
    from veneer.train.tasks import tokens_of

    return float(tokens_of(batch))


def of_data(data: Dataset, rows: int, by_length: bool = False) -> Source:
    """Batches of a data set, in the order of a run with seed 0."""

    def make(rows: int, count: int) -> list[Batch]:
        batches = Batches(data.lengths, rows, by_length=by_length)
        return [data.batch(batches[k % len(batches)]) for k in range(count)]

    batches = Batches(data.lengths, rows, by_length=by_length)
    sizes = [float(data.lengths[batches[k]].sum()) for k in range(min(AHEAD, len(batches)))]
    return Source(make, statistics.fmean(sizes), max(sizes), float(data.lengths.mean()))


def at_random(model: nn.Module, task: str, rows: int, length: int) -> Source:
    """Random rows of ``length`` tokens, or random images, with labels as the task wants them.

    Raises:
        UserError: the task is none that batches can be made up for.
    """
    from veneer.models import embedding

    vocabulary = getattr(embedding(model), "num_embeddings", 0)
    if not vocabulary and task != "image-classification":
        raise UserError(f"{type(model).__name__} reads no tokens, so there is nothing to make up for it; give --data")

    def make(rows: int, count: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(0)
        return [_random(model, task, (rows, length), vocabulary, generator) for _ in range(count)]

    row = 1.0 if task == "image-classification" else float(length)
    return Source(make, rows * row, rows * row, row)


def _random(model: nn.Module, task: str, shape: tuple[int, int], vocabulary: int, generator: torch.Generator) -> Batch:
    config: Any = model.config

    def classes(*shape: int) -> Tensor:
        return torch.randint(0, max(1, getattr(config, "num_labels", 1)), shape, generator=generator)

    if task == "image-classification":
        side = getattr(config, "image_size", SIDE)
        high, wide = side if isinstance(side, list | tuple) else (side, side)
        size = (shape[0], getattr(config, "num_channels", 3), high, wide)
        return {"pixel_values": torch.rand(size, generator=generator), "labels": classes(shape[0])}
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "causal":  # the second half of each row is the answer
        labels = ids.clone()
        labels[:, : shape[1] // 2] = -100
    elif task == "seq2seq":
        labels = ids
    elif task == "regression":
        labels = torch.rand(shape[0], generator=generator)
    else:
        labels = classes(*shape) if task == "token-classification" else classes(shape[0])
    return batch | {"labels": labels}
