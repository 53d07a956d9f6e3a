"""What the rows became, for a person to look at: the tokens that train in colour, and the counts of the whole."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from veneer.data.collate import IGNORED
from veneer.data.dataset import Dataset

if TYPE_CHECKING:
    from rich.text import Text

TRAINED, GIVEN, NOTE = "bold green", "dim", "cyan"


def render_rows(dataset: Dataset, tokenizer: Any, n: int = 5) -> list[Text]:
    """The first ``n`` examples as the model sees them, what trains in colour.

    Tokens are decoded in runs, so that characters of several tokens stay whole; special tokens are shown.
    """
    return [_rendered(dataset, index, tokenizer) for index in range(min(n, len(dataset)))]


def _rendered(dataset: Dataset, index: int, tokenizer: Any) -> Text:
    from rich.text import Text

    item, text = dataset.items[index], Text()
    text.append(f"{dataset.places[index]}  ", NOTE)
    if "image" in item:
        text.append(item["image"] if isinstance(item["image"], str) else "image", GIVEN)
    elif isinstance(item["labels"], list) and dataset.task != "seq2seq":
        names = dataset.label_names if dataset.task == "token-classification" else None
        # Tokens of the same state are one run, but every tagged word is its own.
        states = [(label != IGNORED, k if names and label != IGNORED else -1) for k, label in enumerate(item["labels"])]
        for (trains, at), run in groupby(zip(item["input_ids"], states), key=lambda pair: pair[1]):
            part = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
            text.append(part, TRAINED if trains else GIVEN)
            if names:
                text.append(f"[{names[item['labels'][at]]}] " if trains else " ", NOTE)
    else:
        text.append(tokenizer.decode(item["input_ids"], clean_up_tokenization_spaces=False), GIVEN)
    if not isinstance(item["labels"], list):
        label = item["labels"]
        text.append(f" → {dataset.label_names[label] if dataset.label_names else label}", TRAINED)
    elif dataset.task == "seq2seq":
        text.append(f" → {tokenizer.decode(item['labels'], clean_up_tokenization_spaces=False)}", TRAINED)
    if dataset.truncated[index]:
        text.append(f" … cut at {dataset.max_length} tokens", NOTE)
    return text


def summary(dataset: Dataset) -> dict[str, Any]:
    """Counts of the whole, JSON-able.

    ``lengths`` is a histogram ``[(at most so many tokens, examples)]`` in powers of two; ``dropped`` names every row
    that was left out; ``labels`` counts classes, where there are any.
    """
    names = dataset.label_names
    classes = dict.fromkeys(names, 0) if names else None
    if names and classes:
        for item in dataset.items:
            for label in item["labels"] if isinstance(item["labels"], list) else [item["labels"]]:
                if label != IGNORED:
                    classes[names[label]] += 1
    return {
        "name": dataset.name,
        "task": dataset.task,
        "rows": len(dataset) + len(dataset.dropped),
        "kept": len(dataset),
        "tokens": dataset.tokens,
        "trained": dataset.trained,
        "share_trained": dataset.trained / dataset.tokens,
        "longest": int(dataset.lengths.max()),
        "truncated": sum(dataset.truncated),
        "lengths": _histogram(dataset.lengths),
        "dropped": [{"where": drop.where, "reason": drop.reason} for drop in dataset.dropped],
        "labels": classes,
    }


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    bounds = 2 ** np.ceil(np.log2(lengths)).astype(np.int64)
    values, counts = np.unique(bounds, return_counts=True)
    return [(int(value), int(count)) for value, count in zip(values, counts)]
