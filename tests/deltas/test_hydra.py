"""Hydra against its sheet's oracles (001)."""

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn
from torch.nn.functional import linear as product

import veneer

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 4, 6)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), lambda: torch.randn(2, 3, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), lambda: torch.randn(2, 3, 7)),
    "embedding": (lambda: nn.Embedding(11, 5, padding_idx=0), lambda: torch.randint(0, 11, (3, 4))),
}


def test_the_sheets_closed_form():
    model, adapter, delta = at = single(linear([[1.0, 2.0], [0.0, 1.0]], [1.0, 0.0]), "hydra", rank=1)
    put(delta, A_p=[[1, 0]], B_p=[[0], [1]], A_s=[[1, 1]], B_s=[[1], [0]])
    assert torch.equal(model(torch.ones(1, 2)), torch.tensor([[9.0, 2.0]]))
    A, B, scale, change = delta.as_lora(at.layer.weight, at.layer.bias)
    assert A.tolist() == [[1, 0], [1, 3]] and B.tolist() == [[0, 1], [1, 0]] and scale == 1
    assert change.tolist() == [1, 0]
    adapter.fold()
    assert at.layer.weight.tolist() == [[2, 5], [1, 1]] and at.layer.bias.tolist() == [2, 0]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_fold_and_the_plain_pair_equal_running(kind, biases):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y0 = layer(x)
    model, adapter, delta = single(layer, f"hydra(biases={biases}, sequential_rank=3, scaling=1.7)", rank=2)
    assert torch.equal(model(x), y0)
    stirred(adapter)
    y = model(x)
    W, b = delta.site.weight(), delta.site.bias()
    A, B, scale, change = delta.as_lora(W, b)
    extra = kind == "embedding" and biases
    assert A.shape[0] == 2 + 3 + extra
    pair = delta.site.run(x, W + scale * B @ A, b if change is None else b + change)
    assert torch.allclose(pair, y, atol=1e-5)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
def test_biases_fold_whether_or_not_the_layer_has_one(has_bias):
    model, adapter, _ = single(nn.Linear(6, 5, bias=has_bias), "hydra(biases=True)", rank=2)
    stirred(adapter)
    x = torch.randn(3, 6)
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)
    adapter.detach()
    assert (model[0].bias is not None) == has_bias


def test_the_sequential_head_sees_the_bias_and_not_the_parallel_head():
    model, adapter, d = at = single(nn.Linear(6, 5), "hydra", rank=2)
    stirred(adapter)
    x = torch.randn(3, 6)
    z = product(x, at.layer.weight, at.layer.bias)
    expected = z + x @ d.A_p.T @ d.B_p.T + z @ d.A_s.T @ d.B_s.T
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_without_one_head_it_is_lora_or_a_pure_sequential_adapter():
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    model, adapter, d = single(layer, "hydra(sequential_rank=0)", rank=2)
    stirred(adapter)
    assert torch.allclose(model(x), product(x, W + d.B_p @ d.A_p, b), atol=1e-6)
    adapter.detach()
    model, adapter, d = single(layer, "hydra(sequential_rank=2)", rank=0)
    stirred(adapter)
    z = product(x, W, b)
    assert torch.allclose(model(x), z + z @ d.A_s.T @ d.B_s.T, atol=1e-6)


def test_gradients_at_the_start():
    model, _, d = at = single(nn.Linear(6, 5), "hydra(scaling=2.0)", rank=2)
    x = torch.randn(3, 6)
    z = product(x, at.layer.weight, at.layer.bias)
    y = model(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    A_p, A_s, B_p, B_s = gradients(y, d.A_p, d.A_s, d.B_p, d.B_s)
    assert not A_p.any() and not A_s.any()
    assert torch.allclose(B_p, 2 * g.T @ (x @ d.A_p.T), atol=1e-5)
    assert torch.allclose(B_s, 2 * g.T @ (z @ d.A_s.T), atol=1e-5)


def test_the_rank_of_the_change_and_the_count_of_roberta_base():
    _, adapter, d = single(nn.Linear(20, 30), "hydra(sequential_rank=3)", rank=2)
    stirred(adapter)
    assert torch.linalg.matrix_rank(d.weight()) == 5
    _, adapter, d = single(nn.Linear(3072, 768), "hydra(sequential_rank=8)", rank=4)
    assert 12 * adapter.parameter_count() == 331_776 == 12 * d.parameter_count()


def test_dropout_draws_for_both_heads_and_only_in_training():
    model, adapter, d = single(nn.Linear(6, 5), "hydra", rank=64, dropout=0.5)
    stirred(adapter)
    x, seen = torch.randn(1, 6), []
    y = model(x)
    model.train()
    d.drop = lambda h: seen.append((h, type(d).drop(d, h))) or seen[-1][1]
    assert not torch.equal(model(x), y)
    ((h, kept),) = seen
    zeros = kept == 0
    assert h.shape[-1] == 128 and not torch.equal(zeros[..., :64], zeros[..., 64:])


def test_grouped_convolutions_are_refused():
    with pytest.raises(veneer.UserError, match="grouped convolution"):
        single(nn.Conv2d(4, 4, 3, groups=2), "hydra", rank=2)
