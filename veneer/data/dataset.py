"""Rows made ready for training: examples, what became of every row, and the checks that come before long work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from veneer.data import images, tasks
from veneer.data.batching import scrambled
from veneer.data.collate import IGNORED, Collator
from veneer.data.columns import renamed
from veneer.data.read import read_rows
from veneer.data.tasks import Dropped, Settings
from veneer.errors import UserError

MAX_LENGTH = 1024  # tokens, where neither the user nor the tokenizer says less


@dataclass(eq=False, repr=False)
class Dataset(Sequence[dict[str, Any]]):
    """Examples of one task; ``dataset[i]`` is a dict of what the model takes, and ``labels``.

    Attributes:
        items: the examples as they are kept; images stay where they are until they are asked for.
        rows: number of the source's row, from 0, of every example.
        places: where that row stands: "train.jsonl, line 17".
        truncated: whether the row was longer than ``max_length``.
        dropped: rows that would train nothing, with the reason.
        label_names: names of the classes, or None.
        collate: examples → batch, padded on the right.
    """

    name: str
    task: str
    items: list[dict[str, Any]]
    rows: list[int]
    places: list[str]
    truncated: list[bool]
    dropped: list[Dropped]
    label_names: list[str] | None
    collate: Collator
    processor: Any
    max_length: int

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        item = self.items[index]
        if "image" not in item:
            return item
        image = images.open_image(item["image"], self.places[index])
        return {"pixel_values": images.pixels(image, self.processor), "labels": item["labels"]}

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name}, {self.task}: {len(self):,} examples, {self.tokens:,} tokens of which "
            f"{self.trained:,} train, {len(self.dropped):,} rows dropped)"
        )

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The batch of these examples: model inputs and labels, nothing else."""
        return self.collate([self[index] for index in indices])

    def where(self, indices: Sequence[int]) -> list[str]:
        """Where the rows of a batch stand, for messages."""
        return [self.places[index] for index in indices]

    @cached_property
    def lengths(self) -> np.ndarray:
        """(len,) tokens of every example, with those of the answer where it stands apart; 1 for an image."""
        keys = ("input_ids", "labels") if self.task == "seq2seq" else ("input_ids",)
        return np.array([sum(len(item.get(key, "1")) for key in keys) for item in self.items], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Tokens of all examples, without padding."""
        return int(self.lengths.sum())

    @cached_property
    def trained(self) -> int:
        """Labels that count in the loss: answer tokens for a language model, words, or rows."""
        return sum(
            sum(label != IGNORED for label in item["labels"]) if isinstance(item["labels"], list) else 1
            for item in self.items
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over task, label names and every example: equal exactly when the model would see the same."""
        digest = hashlib.sha256(json.dumps([self.task, self.label_names]).encode())
        for item, place in zip(self.items, self.places):
            for key in sorted(item):
                value = item[key]
                if key == "image":
                    content = images.content(value, place)
                else:
                    content = np.asarray(value, np.float64 if isinstance(value, float) else np.int64).tobytes()
                digest.update(f"{key} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def split(self, fraction: float = 0.05, at_most: int = 200, seed: int = 0) -> tuple[Dataset, Dataset]:
        """``(train, held_out)``: a share of the examples, at least one and at most ``at_most``, drawn by seed."""
        if not 0 < fraction < 1 or at_most < 1:
            raise UserError(
                f"the held-out share is {fraction} and at most {at_most} rows; expected 0 to 1 and 1 or more"
            )
        if len(self) < 2:
            raise UserError(f"{self.name} has one row, so none can be held out; give more rows or evaluation data")
        count = min(at_most, max(1, round(fraction * len(self))), len(self) - 1)
        order = np.argsort(scrambled(len(self), seed, 2), kind="stable")
        held, train = (np.sort(part).tolist() for part in (order[:count], order[count:]))
        return self.subset(train, self.dropped), self.subset(held, [])

    def subset(self, indices: Sequence[int], dropped: Sequence[Dropped] = ()) -> Dataset:
        """The dataset of these examples alone."""
        return replace(
            self,
            items=[self.items[index] for index in indices],
            rows=[self.rows[index] for index in indices],
            places=[self.places[index] for index in indices],
            truncated=[self.truncated[index] for index in indices],
            dropped=list(dropped),
        )

    def check_vocabulary(self, size: int) -> None:
        """Raises when a token id, or the padding id, has no row in an embedding of ``size`` rows."""
        if not self.items or "input_ids" not in self.items[0]:
            return
        keys = ("input_ids", "labels") if self.task == "seq2seq" else ("input_ids",)
        largest = [max(max(item[key]) for key in keys) for item in self.items]
        worst = int(np.argmax(largest))
        if largest[worst] >= size:
            raise UserError(
                f"{self.places[worst]} holds token id {largest[worst]} and the model's embedding has {size} rows; "
                "the tokenizer belongs to another model, or the embedding must be enlarged"
            )
        if self.collate.pad_id >= size:
            raise UserError(
                f"the tokenizer pads with id {self.collate.pad_id} and the model's embedding has {size} rows; "
                "set tokenizer.pad_token to a token that the model has"
            )


def prepare(
    source: Any,
    processor: Any,
    task: str = "auto",
    max_length: int | None = None,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    label_names: Sequence[str] | None = None,
    limit: int | None = None,
    multiple: int = 1,
) -> Dataset:
    """Reads a source and makes every row an example.

    Args:
        source: whatever ``read_rows`` takes; a ``Dataset`` is returned as it is.
        processor: the tokenizer, or an image processor for images.
        task: a key of ``tasks.TASKS``; "auto" sees it from the columns.
        max_length: rows are cut after so many tokens (≥ 8); by default 1,024, or less if the tokenizer says so.
        template: how a prompt is written (see ``formats.drafts``).
        columns: Veneer's column names → the data's.
        label_names: the training data's, for evaluation data; a label that is not among them is an error.
        limit: take the first so many rows.
        multiple: pad batches to a multiple of so many tokens.

    Raises:
        UserError: anything about the source, the columns, the labels or the template that cannot be used.
    """
    if isinstance(source, Dataset):
        return source
    if max_length is not None and max_length < 8:
        raise UserError(f"max_length is {max_length}; expected at least 8 tokens")
    known = getattr(processor, "model_max_length", None) or MAX_LENGTH
    most = max_length or min(MAX_LENGTH, known)
    rows = renamed(read_rows(source, limit), columns)
    mapped = frozenset(columns or ())
    task = tasks.detect(rows, mapped) if task == "auto" else task
    if template is not None and task not in ("causal", "seq2seq"):
        raise UserError(f"a template was given and the task is {task}, which has no prompt; leave it out")
    made = tasks.builder(task)(rows, Settings(processor, most, template, label_names, mapped))
    if not made.items:
        first = made.dropped[0]
        raise UserError(f"none of the {len(rows)} rows would train anything; {first.where}: {first.reason}")
    pads = [getattr(processor, name, None) for name in ("pad_token_id", "eos_token_id")]
    return Dataset(
        name=rows.name,
        task=task,
        items=made.items,
        rows=made.rows,
        places=[rows.where(row) for row in made.rows],
        truncated=made.truncated,
        dropped=made.dropped,
        label_names=made.label_names and list(made.label_names),
        collate=Collator(next((pad for pad in pads if pad is not None), 0), multiple),
        processor=processor,
        max_length=most,
    )
