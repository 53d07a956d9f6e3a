"""What a model scores on a data set: its loss, and the measures that people quote for the task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.data import Dataset

TOKENS = 2048  # of a batch, padding included: what bounds the logits in memory


def scores(model: Any, dataset: Dataset, batch_size: int = 8) -> dict[str, float]:
    """Scores by name, the model in eval mode and put back afterwards.

    ``loss`` is the mean over what trains: labelled tokens (nats) for a language model and for tagging, rows for classes
    and numbers. Besides: language models ``perplexity`` and ``token accuracy`` (the likeliest next token against the
    label); classifiers ``accuracy``, ``macro F1``, ``Matthews``; regression ``Pearson``, ``Spearman``.
    """
    import torch

    from veneer.data import Batches
    from veneer.train.tasks import Task, moved

    task = Task(dataset.task)
    most = None if "input_ids" not in dataset.items[0] else max(TOKENS, int(dataset.lengths.max()))
    total, units, references, predictions = 0.0, 0, [], []
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        for rows in Batches(dataset.lengths, batch_size, shuffle=False, max_tokens=most):
            batch = moved(dataset.batch(rows), device)
            loss, outputs = task.with_outputs(model, batch)
            count = task.units(batch)
            total, units = total + float(loss) * count, units + count
            expected, given = _pairs(dataset.task, outputs.logits, batch["labels"])
            references += expected.tolist()
            predictions += given.tolist()
    model.train(training)
    return {"loss": total / units} | _measures(dataset.task, total / units, references, predictions)


def _pairs(task: str, logits: Any, labels: Any) -> tuple[Any, Any]:
    """(references, predictions), each flat, positions without a label left out."""
    from veneer.data import IGNORED

    if task == "regression":
        return labels.reshape(-1).float(), logits.reshape(-1).float()
    if task == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    return labels[counted], logits[counted].argmax(-1)


def _measures(task: str, loss: float, references: list[Any], predictions: list[Any]) -> dict[str, float]:
    from veneer.data import metrics

    if task == "regression":
        return {
            "Pearson": metrics.pearson(references, predictions),
            "Spearman": metrics.spearman(references, predictions),
        }
    accuracy = metrics.accuracy(references, predictions)
    if task in ("causal", "seq2seq"):
        return {"perplexity": math.exp(min(loss, 700.0)), "token accuracy": accuracy}
    return {
        "accuracy": accuracy,
        "macro F1": metrics.macro_f1(references, predictions),
        "Matthews": metrics.matthews(references, predictions),
    }
