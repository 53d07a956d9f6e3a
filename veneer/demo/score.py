"""How well phonemes were predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

CAP = 3  # a word's edits count at most this often its length: one that rambles must not outweigh all others


class Score(NamedTuple):
    """Phoneme error rate (edits over phonemes, 0 is perfect, can exceed 1) and the share of words exactly right."""

    error_rate: float
    exact: float


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that turn ``a`` into ``b`` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def score(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> Score:
    """The score of (predicted, expected) phoneme sequences; no expected sequence is empty."""
    edits = phonemes = exact = words = 0
    for predicted, expected in pairs:
        edits += min(distance(predicted, expected), CAP * len(expected))
        phonemes += len(expected)
        exact += list(predicted) == list(expected)
        words += 1
    return Score(edits / phonemes, exact / words)
