"""How well phonemes were predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from veneer.data.metrics import edit_distance

CAP = 3  # a word's edits count at most this often its length: one that rambles must not outweigh all others


class Score(NamedTuple):
    """Phoneme error rate (edits over phonemes, 0 is perfect, can exceed 1) and the share of words exactly right."""

    error_rate: float
    exact: float


def score(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> Score:
    """The score of (predicted, expected) phoneme sequences; no expected sequence is empty."""
    edits = phonemes = exact = words = 0
    for predicted, expected in pairs:
        edits += min(edit_distance(predicted, expected), CAP * len(expected))
        phonemes += len(expected)
        exact += list(predicted) == list(expected)
        words += 1
    return Score(edits / phonemes, exact / words)
