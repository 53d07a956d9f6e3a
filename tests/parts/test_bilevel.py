"""Two-level training: the split of rows, and the gradient through a step."""

import pytest
import torch
from torch import nn

from veneer.parts.bilevel import halves, hypergradient


def test_a_row_keeps_its_half_whatever_its_batch_and_padding():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 99, (40, 7), generator=g)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(40), "name": "x"}
    ours, held = halves(batch)
    assert sorted([*ours["labels"].tolist(), *held["labels"].tolist()]) == list(range(40))
    assert 10 < len(held["labels"]) < 30 and held["name"] == "x"
    padded = torch.cat([ids[3:9], torch.zeros(6, 4, dtype=torch.long)], 1)
    mask = (padded > 0).long()
    again = halves({"input_ids": padded, "attention_mask": mask, "labels": torch.arange(3, 9)})[1]
    mine = [] if again is None else again["labels"].tolist()
    assert mine == [i for i in held["labels"].tolist() if 3 <= i < 9]
    assert halves(batch, seed=1)[1]["labels"].tolist() != held["labels"].tolist()


def test_a_half_without_rows_is_none():
    x = torch.tensor([[1.0, 2.0]])
    parts = halves((x, torch.ones(1)))
    assert sum(p is None for p in parts) == 1
    (there,) = (p for p in parts if p is not None)
    assert torch.equal(there[0], x) and there[1].shape == (1,)


def test_the_gradient_through_a_step_is_that_of_unrolling_on_a_quadratic():
    torch.manual_seed(0)
    s, w = nn.Parameter(torch.randn(3).double()), nn.Parameter(torch.randn(3).double())
    M, N = (torch.randn(3, 3).double() for _ in range(2))

    def inner(weights, scores):
        return (M @ (weights * scores)).square().sum() + (weights * scores).sum()

    def outer(weights, scores):
        return (N @ weights - scores).square().sum()

    start = w.detach().clone()
    (found,) = hypergradient([s], [w], lambda: outer(w, s), lambda: inner(w, s), 0.05)
    assert torch.equal(w, start)
    (g,) = torch.autograd.grad(inner(w, s), w, create_graph=True)
    (wanted,) = torch.autograd.grad(outer(w - 0.05 * g, s), s)
    assert torch.allclose(found, wanted, rtol=1e-3)
    (first,) = hypergradient([s], [w], lambda: outer(w, s))
    assert not torch.allclose(first, wanted, rtol=1e-2)
    assert first.tolist() == pytest.approx((-2 * (N @ w - s)).tolist())
