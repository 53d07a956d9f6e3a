"""Sharded tensors are refused, and a closure runs with gradients."""

import pytest
import torch

import veneer
from veneer.parts.whole_gradients import loss_of, refuse_sharded


class Sharded(torch.nn.Parameter):
    to_local = None  # what tells a sharded tensor from others


def test_a_tensor_in_shards_is_refused_by_the_methods_name():
    refuse_sharded("glad", [torch.ones(2)])
    with pytest.raises(veneer.UserError, match="glad works on whole gradients"):
        refuse_sharded("glad", [torch.ones(2), Sharded(torch.ones(2))])


@torch.no_grad()
def test_a_closure_runs_with_gradients_and_none_gives_none():
    assert loss_of(None) is None
    assert loss_of(torch.is_grad_enabled) is True
