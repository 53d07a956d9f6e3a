"""Joint selection against sorting, and against the numbers of sheet 140."""

import pytest
import torch

from veneer.numerics.largest import largest


def test_the_sheets_selection():
    (one,) = largest([torch.tensor([0.5, -0.2, 0.9, 0.0, -0.7])], 2)
    assert one.tolist() == [2, 4]
    both = largest([torch.tensor([0.1, 0.8]), torch.tensor([0.5, 0.4])], 2)
    assert [b.tolist() for b in both] == [[1], [0]]


def test_ties_are_broken_in_order_and_zeros_are_never_chosen():
    both = largest([torch.tensor([0.0, -0.5, 0.5]), torch.tensor([0.5, 0.9])], 3)
    assert [b.tolist() for b in both] == [[1, 2], [1]]
    assert sum(len(b) for b in largest([torch.zeros(4), torch.tensor([0.0, 1e-30])], 3)) == 1


@pytest.mark.parametrize("count", [1, 37, 200])
def test_the_selection_is_that_of_sorting(count):
    tensors = [torch.randn(5, 20), torch.randn(100) * 3]
    flat = torch.cat([t.flatten() for t in tensors]).abs()
    chosen = torch.cat([largest(tensors, count)[0], largest(tensors, count)[1] + 100])
    assert torch.equal(chosen, flat.topk(count).indices.sort().values)
