"""Landmark rows and columns."""

import pytest
import torch

from veneer.errors import UserError
from veneer.numerics.landmarks import landmarks


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("choice", ["first", "random", "leverage"])
def test_they_are_ascending_distinct_and_reproducible(choice):
    W = torch.randn(7, 9)
    rows, columns = landmarks(W, 4, choice, generator())
    for found, size in ((rows, 7), (columns, 9)):
        assert len(found) == 4 and (found.diff() > 0).all() and found.min() >= 0 and found.max() < size
    again = landmarks(W, 4, choice, generator())
    assert torch.equal(rows, again[0]) and torch.equal(columns, again[1])


def test_the_first_are_the_first_and_leverage_finds_what_matters():
    assert landmarks(torch.randn(5, 6), 2, "first", generator())[0].tolist() == [0, 1]
    W = torch.zeros(6, 8)
    W[4, 3], W[1, 7] = 5.0, 4.0
    rows, columns = landmarks(W, 2, "leverage", generator())
    assert rows.tolist() == [1, 4] and columns.tolist() == [3, 7]


def test_too_many_are_refused():
    with pytest.raises(UserError, match="8 landmark"):
        landmarks(torch.randn(7, 9), 8, "random", generator())
