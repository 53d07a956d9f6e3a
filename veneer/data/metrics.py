"""Scores of predictions against references: pure functions of sequences and arrays.

A score that is undefined because one side is constant is 0.0, the value of knowing nothing, so that a run's record
stays plain JSON.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from veneer.errors import UserError


def accuracy(references: Sequence[Hashable], predictions: Sequence[Hashable]) -> float:
    """Share of predictions that equal their reference, in [0, 1]."""
    _paired(references, predictions)
    return sum(r == p for r, p in zip(references, predictions)) / len(references)


def exact_match(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Share of texts that are equal once runs of white space are one space and the ends are stripped, in [0, 1]."""
    return accuracy([" ".join(text.split()) for text in references], [" ".join(text.split()) for text in predictions])


def macro_f1(references: Sequence[int], predictions: Sequence[int]) -> float:
    """Mean over classes of F1 = 2·hits / (references + predictions of the class), in [0, 1]."""
    confusion = _confusion(references, predictions)
    return float(np.mean(2 * np.diag(confusion) / (confusion.sum(0) + confusion.sum(1))))


def matthews(references: Sequence[int], predictions: Sequence[int]) -> float:
    """Matthews correlation in [-1, 1], for any number of classes (Gorodkin 2004): the correlation of one-hot rows."""
    confusion = _confusion(references, predictions)
    rows, predicted, total = confusion.sum(1), confusion.sum(0), confusion.sum()
    spread = (total**2 - predicted @ predicted) * (total**2 - rows @ rows)
    return float((np.trace(confusion) * total - rows @ predicted) / math.sqrt(spread)) if spread > 0 else 0.0


def pearson(references: Sequence[float], predictions: Sequence[float]) -> float:
    """Linear correlation in [-1, 1]; 0.0 when either side is constant."""
    _paired(references, predictions)
    x, y = (np.asarray(side, np.float64) - np.mean(side, dtype=np.float64) for side in (references, predictions))
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / size if size > 0 else 0.0


def spearman(references: Sequence[float], predictions: Sequence[float]) -> float:
    """Rank correlation in [-1, 1]; equal values share the mean of their ranks."""
    _paired(references, predictions)
    return pearson(_ranks(references).tolist(), _ranks(predictions).tolist())


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other (Levenshtein).

    Bit-parallel (Myers 1999, in Hyyrö's form): one column of the table is two long integers, ``up`` and ``down``, whose
    bit i says that the cell of row i is one more, or one less, than the cell above it.
    """
    if not one:
        return len(other)
    where: dict[Hashable, int] = {}
    for row, symbol in enumerate(one):
        where[symbol] = where.get(symbol, 0) | 1 << row
    every, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    up, down, distance = every, 0, len(one)
    for symbol in other:
        same = where.get(symbol, 0)
        level = (((same & up) + up) ^ up) | same | down
        right_up = down | ~(level | up) & every
        right_down = up & level
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = right_up << 1 | 1
        up = (right_down << 1 | ~(level | right_up)) & every
        down = right_up & level & every
    return distance


def error_rate(
    references: Sequence[Sequence[Hashable]], hypotheses: Sequence[Sequence[Hashable]], cap: float = 3.0
) -> float:
    """Edits over reference length, summed over rows: word, character or phoneme error rate by what the items are.

    Args:
        references: what is right, one sequence a row (strings are sequences of characters).
        hypotheses: what was said.
        cap: a row counts at most ``cap`` times its reference's length, so that one endless answer counts little.

    Returns:
        a rate in [0, cap].
    """
    _paired(references, hypotheses)
    total = sum(len(reference) for reference in references)
    if total == 0:
        raise UserError("every reference is empty, so an error rate has no meaning; expected at least one item")
    return sum(min(edit_distance(r, h), cap * len(r)) for r, h in zip(references, hypotheses)) / total


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _paired(references: Sequence, predictions: Sequence) -> None:
    if len(references) != len(predictions) or len(references) == 0:
        raise UserError(
            f"{len(references)} references and {len(predictions)} predictions; expected equally many, at least one"
        )


def _confusion(references: Sequence[int], predictions: Sequence[int]) -> np.ndarray:
    """(classes seen, classes seen): references by predictions, counts."""
    _paired(references, predictions)
    _, codes = np.unique(np.concatenate([np.asarray(references), np.asarray(predictions)]), return_inverse=True)
    size, half = int(codes.max()) + 1, len(references)
    return np.bincount(codes[:half] * size + codes[half:], minlength=size * size).reshape(size, size).astype(np.float64)


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, codes, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[codes]
