"""Examples into one batch of tensors: padded on the right, holding model inputs and labels and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100  # a label that no loss counts


@dataclass(frozen=True)
class Collator:
    """``collator(examples) -> batch``.

    input_ids, attention_mask and token_type_ids become (B, T) int64; labels (B, T) int64 where they stand at tokens,
    (B,) int64 for classes, (B,) float32 for numbers; pixel_values (B, C, H, W) float32. T is the longest row's length
    rounded up to a multiple of ``multiple``.
    """

    pad_id: int = 0
    multiple: int = 1

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        if "input_ids" in examples[0]:
            longest = max(len(example["input_ids"]) for example in examples)
            width = -(-longest // self.multiple) * self.multiple
            batch["input_ids"] = _padded([example["input_ids"] for example in examples], width, self.pad_id)
            batch["attention_mask"] = _padded([[1] * len(example["input_ids"]) for example in examples], width, 0)
            if "token_type_ids" in examples[0]:
                batch["token_type_ids"] = _padded([example["token_type_ids"] for example in examples], width, 0)
        if "pixel_values" in examples[0]:
            batch["pixel_values"] = torch.stack([example["pixel_values"] for example in examples])
        labels = [example["labels"] for example in examples]
        if isinstance(labels[0], list):
            width = -(-max(map(len, labels)) // self.multiple) * self.multiple
            batch["labels"] = _padded(labels, width, IGNORED)
        else:
            batch["labels"] = torch.tensor(labels)
        return batch


def _padded(rows: list[list[int]], width: int, value: int) -> torch.Tensor:
    """(len(rows), width) int64."""
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)
