import copy
import pickle

import pytest
import torch

from veneer.numerics.kept import Kept


@pytest.fixture
def setting():
    """A count of calls, two tensors, and a function of them that is kept."""
    calls, trained, frozen, kept = [], torch.ones(3), torch.full((3,), 2.0), Kept()

    def value():
        return kept(lambda: calls.append(1) or trained * frozen, [trained], [frozen])

    return calls, trained, frozen, value


def test_it_is_made_once_while_nothing_changes(setting):
    calls, _, _, value = setting
    with torch.no_grad():
        assert value() is value() and len(calls) == 1


def test_every_change_of_a_trained_tensor_is_seen_also_past_the_count_of_versions(setting):
    calls, trained, _, value = setting
    with torch.no_grad():
        value()
        trained.data[1] = 5.0
        assert value().tolist() == [2, 10, 2] and len(calls) == 2
        trained.mul_(2)
        assert value().tolist() == [4, 20, 4]


def test_writing_or_replacing_a_frozen_tensor_is_seen(setting):
    _, _, frozen, value = setting
    with torch.no_grad():
        value()
        frozen.add_(1)
        assert value().tolist() == [3, 3, 3]
        frozen.data = torch.zeros(3)
        assert value().tolist() == [0, 0, 0]


def test_with_gradients_it_is_made_each_time(setting):
    calls, trained, _, value = setting
    trained.requires_grad_()
    assert value().requires_grad and value() is not value() and len(calls) == 3


def test_copies_start_empty():
    kept = Kept()
    with torch.no_grad():
        kept(lambda: 1, [torch.ones(1)])
        for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
            assert twin(lambda: 2, [torch.ones(1)]) == 2


def test_nothing_is_kept_of_a_frozen_tensor_that_trains_after_all(setting):
    calls, _, frozen, value = setting
    frozen.requires_grad_()
    with torch.no_grad():
        value(), value()
    assert len(calls) == 2
