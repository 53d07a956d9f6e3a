"""Monarch against its sheet's oracles (053)."""

import pytest
import torch
import torch.nn.functional as F
from single import linear, single, stirred
from torch import nn

import veneer
from veneer.numerics.monarch import dense, project

LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), lambda: torch.randn(3, 4, 24)),
    "padded": (lambda: nn.Linear(23, 14), lambda: torch.randn(4, 23)),
    "conv": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: torch.randn(2, 4, 7, 7)),
    "embedding": (lambda: nn.Embedding(30, 12), lambda: torch.randint(0, 30, (3, 4))),
}
FORMS = {"thin": "monarch(blocks=4)", "batched": "monarch(blocks=9)", "rank two": "monarch(blocks=2, rank=2)"}


def matrix(d):
    """s·M by the definition, entry by entry."""
    (N, _, p), s = d.L1.shape, d.L2.shape[1]
    M = torch.zeros(s * N, N * p)
    for lam in range(N):
        for kappa in range(N):
            for i in range(d.rank):
                outer = torch.outer(d.L2[lam, :, kappa * d.rank + i], d.L1[kappa, i * N + lam])
                M[lam::N, kappa * p : (kappa + 1) * p] += outer.detach()
    return d.scale * M[: d.site.out_features, : d.site.in_features]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_running_is_the_definition_from_the_base_on(kind, form):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y0 = layer(x)
    model, adapter, d = single(layer, FORMS[form], alpha=6.0)
    assert d.scale == 6 / (d.rank * d.blocks)
    assert torch.equal(model(x), y0)
    stirred(adapter)
    expected = d.site.run(x, d.site.weight() + matrix(d), d.site.bias())
    y = model(x)
    assert torch.allclose(y, expected, atol=1e-4) and not torch.allclose(y, y0, atol=1e-2)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_dense_matrix(form):
    model, adapter, d = single(nn.Linear(23, 14), FORMS[form])
    stirred(adapter)
    x, weights = torch.randn(5, 23), torch.randn(5, 14)
    own = (d.L1, d.L2)
    M = dense(*own)[:14, :23]
    ours = torch.autograd.grad((model(x) * weights).sum(), own)
    for g, h in zip(ours, torch.autograd.grad((x @ M.T * weights).sum(), own)):
        assert g.any() and torch.allclose(g, h, atol=1e-4)


def test_padding_is_explicit_zeros():
    model, adapter, d = single(linear(torch.zeros(14, 23)), "monarch(blocks=9)")
    stirred(adapter)
    x = torch.randn(5, 23)
    M = dense(d.L1, d.L2)
    assert M.shape == (18, 27)
    assert torch.allclose(model(x), (F.pad(x, (0, 4)) @ M.T)[:, :14], atol=1e-5)


def test_the_rank_and_the_count_beside_lora():
    _, adapter, d = single(nn.Linear(64, 48), "monarch")
    stirred(adapter)
    assert adapter.parameter_count() == d.parameter_count() == 4 * (64 + 48)
    assert torch.linalg.matrix_rank(d.weight()) == 16
    A, B, scale, _ = d.as_lora(None, None)
    assert A.shape == (16, 64) and torch.allclose(scale * B @ A, d.weight(), atol=1e-6)
    _, _, d = single(nn.Linear(64, 48), "monarch(blocks=8)")
    assert d.as_lora(None, None) is None


def test_one_block_is_lora():
    _, adapter, d = single(nn.Linear(9, 7), "monarch(blocks=1, rank=3)")
    stirred(adapter)
    assert torch.equal(d.weight(), d.L2[0] @ d.L1[0]) and d.L1[0].shape == (3, 9)


def test_in_place_of_w_it_starts_at_the_nearest_matrix():
    layer, x = nn.Linear(16, 16), torch.randn(4, 16)
    W, y0 = layer.weight.detach().clone(), layer(x)
    model, adapter, d = single(layer, "monarch(replace=True)")
    near = dense(*project(W, 4, 4, 1))
    assert torch.allclose(model(x), x @ near.T + layer.bias, atol=1e-5) and not torch.allclose(model(x), y0, atol=1e-2)
    assert d.parameter_count() == 2 * 16 * 4
    stirred(adapter)
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)
    adapter.detach()
    assert torch.equal(layer(x), y0)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_whole_rank_in_place_of_w_is_w(kind):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y0 = layer(x)
    model, _, _ = single(layer, "monarch(replace=True, blocks=2, rank=32)")
    assert torch.allclose(model(x), y0, atol=1e-5)


def test_the_base_can_be_dropped_and_the_adapter_loaded_again(tmp_path):
    layer, x = nn.Linear(16, 16), torch.randn(4, 16)
    W = layer.weight.detach().clone()
    model, adapter, _ = single(layer, "monarch(replace=True, start='random')", keep_base=False)
    assert layer.weight.numel() == 0
    y = model(x)
    assert y.std() > 0.01
    adapter.save(tmp_path / "kept")
    adapter.bake()
    assert torch.allclose(layer(x), y, atol=1e-5)
    with torch.no_grad():
        layer.weight.copy_(W)
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)


def test_a_hadamard_matrix_is_learned_exactly_where_no_low_rank_one_comes_near():
    H = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for _ in range(3):
        H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    H = H / 4
    model, _, d = single(linear(H), "monarch(replace=True)")
    assert torch.allclose(model(torch.eye(16)).T, H, atol=1e-6)
    assert d.parameter_count() == 128  # a pair of rank 4 has as many, and must lose 12 of 16 equal values
