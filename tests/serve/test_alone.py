"""Small sums run on one thread, and whatever happens in them the number of threads is what it was."""

import pytest
import torch

from veneer.serve.alone import NUMBERS, alone


@pytest.fixture
def two():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_only_what_is_small_runs_alone(two):
    with alone(NUMBERS):
        assert torch.get_num_threads() == 1
    with alone(NUMBERS + 1):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 2


def test_threads_come_back_after_an_error(two):
    with pytest.raises(ZeroDivisionError), alone(1):
        torch.zeros(1)[0].div_(1 // 0)
    assert torch.get_num_threads() == 2


def test_a_loader_leaves_the_threads_of_others_alone(two):
    from veneer.serve.loader import Loader

    loader = Loader(None, 64, torch.float32)
    assert torch.get_num_threads() == 2
    loader.close()
