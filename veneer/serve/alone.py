"""Small sums by one thread: where several share so little, waking them takes longer than the sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

NUMBERS = 2_000_000  # summed by one thread before others are awake


@contextmanager
def alone(numbers: int) -> Iterator[None]:
    """Use one thread for what is done inside if it reads no more than so many ``numbers``."""
    threads = torch.get_num_threads()
    if threads == 1 or numbers > NUMBERS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
