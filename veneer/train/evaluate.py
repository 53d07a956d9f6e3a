"""Held-out loss, task scores and answers, with adapters on or off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veneer.models import head
from veneer.train.modes import evaluating
from veneer.train.tasks import IGNORED, Task, moved

if TYPE_CHECKING:
    from veneer.train.feed import BatchFeed, RowFeed
    from veneer.train.processes import Processes

CLASSES = ("classification", "token-classification", "image-classification")


def scores(
    model: nn.Module,
    feed: RowFeed | BatchFeed,
    task: Task,
    processes: Processes,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """``loss``, the mean over all held-out units, and what the task is scored by.

    Classifiers: accuracy, macro_f1, matthews. Regression: pearson, spearman. Language models: perplexity.
    """
    from veneer.data import metrics

    total = units = 0.0
    references: list[Any] = []
    predictions: list[Any] = []
    scored = task.custom is None and task.name in (*CLASSES, "regression")
    with evaluating(model):
        for micro in feed.epoch(0):
            batch = moved(micro.batch, processes.device, dtype)
            loss, outputs = task.with_outputs(model, batch) if scored else (task.loss(model, batch), None)
            if not micro.units:
                continue
            total += float(loss) * micro.units
            units += micro.units
            if scored:
                labels, predicted = _answers(task.name, outputs.logits, batch["labels"])
                references += labels
                predictions += predicted
    total, units = processes.sum(total, units)
    found = {"loss": total / max(units, 1.0)}
    if task.custom is None and task.name in ("causal", "seq2seq"):
        found["perplexity"] = metrics.perplexity(found["loss"])
    if scored:
        references, predictions = processes.gather(references), processes.gather(predictions)
        names = ("pearson", "spearman") if task.name == "regression" else ("accuracy", "macro_f1", "matthews")
        found |= {name: getattr(metrics, name)(references, predictions) for name in names}
    return found


def _answers(task: str, logits: torch.Tensor, labels: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """Labels that count and the predictions for them."""
    if task == "regression":
        return labels.reshape(-1).tolist(), logits.float().reshape(-1).tolist()
    predicted = logits.argmax(-1)
    counted = labels != IGNORED
    return labels[counted].tolist(), predicted[counted].tolist()


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> list[str]:
    """The model's greedy answers to ``prompts``, in their order, without special tokens.

    Prompts of like length share a batch, padded on the left. Under ``adapter.disabled()`` the base answers.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts = [""] * len(prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    with evaluating(model), _whole_head_inputs(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids = [tokenizer(prompts[i])["input_ids"] for i in rows]
            width = max(map(len, ids))
            batch = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
            out = model.generate(
                input_ids=batch,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
            )
            prefix = 0 if getattr(model.config, "is_encoder_decoder", False) else width
            for i, row in zip(rows, out):
                texts[i] = tokenizer.decode(row[prefix:], skip_special_tokens=True)
    return texts


@contextmanager
def _whole_head_inputs(model: nn.Module) -> Iterator[None]:
    """The head's input made contiguous: torch copies a frozen head once per row for the slice that decoding takes."""
    top = head(model)
    if top is None:
        yield
        return
    handle = top.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def better(loss: float, best: float | None) -> bool:
    """Whether a held-out loss is a finite one below the best so far."""
    return math.isfinite(loss) and (best is None or loss < best)
