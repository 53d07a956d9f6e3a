"""Divergence, budget and ensemble against the oracles of sheet 089."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from veneer.numerics.drift import drift, ensemble, largest_weight, last_within


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_drift_is_torchs_divergence_per_row_with_padding_left_out():
    q, p = logits(0, 3, 4, 7), logits(1, 3, 4, 7)
    expected = kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert torch.allclose(drift(q, p, None), expected)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    q[1, 2:], q[2, 1:] = 50.0, -50.0  # what stands at padding does not count
    rows = [kl_div(q[i, :n].log_softmax(-1), p[i, :n].log_softmax(-1), log_target=True, reduction="sum")
            for i, n in enumerate((4, 2, 1))]  # fmt: skip
    assert torch.allclose(drift(q, p, mask), sum(rows) / 3)
    assert torch.allclose(drift(q, p, mask, "position"), sum(rows) / 7)


def test_equal_models_have_no_drift_and_no_gradient():
    q = logits(0, 2, 3, 7).requires_grad_()
    value = drift(q, q.detach(), None)
    value.backward()
    assert value == 0 and q.grad.abs().max() < 1e-7


@pytest.mark.parametrize("budget, index", [(1e-3, 1), (1e-4, 0), (1e-2, 2)])
def test_the_last_epoch_within_the_budget_is_oracle_6(budget, index):
    assert last_within([3.0, 3.002, 3.004], budget) == index


def test_a_later_epoch_counts_though_one_before_was_outside():
    assert last_within([3.0, 3.1, 3.001, 3.2], 1e-3) == 2


def test_an_ensemble_without_weight_or_without_a_change_is_the_model_itself():
    model, tuned, before = (logits(k, 2, 3, 7) for k in range(3))
    own = model.log_softmax(-1)
    assert torch.allclose(ensemble(model, tuned, before, 0.0), own, atol=1e-6)
    assert torch.allclose(ensemble(model, tuned, tuned, 0.7), own, atol=1e-6)
    moved = ensemble(model, tuned, before, 0.5).exp()
    assert torch.allclose(moved.sum(-1), torch.ones(2, 3)) and not torch.allclose(moved, own.exp(), atol=1e-3)


def test_the_weight_is_the_largest_tenth_within_the_budget():
    assert largest_weight(lambda w: 2.0 + 0.01 * w, 0.0031) == 0.6
    assert largest_weight(lambda w: 2.0 - w, 1e-3) == 1.0
    assert largest_weight(lambda w: 2.0 + math.copysign(1.0, w - 0.01), 1e-3) == 0.0
