"""SLTrain against its sheet's oracles (034)."""

import pytest
import torch
from single import gradients, put, single, stirred
from torch import nn
from torch.nn.functional import linear as product

import veneer
from veneer.deltas.sltrain import _SparseLowRank
from veneer.errors import UserError

FIELDS = "alpha=6.0, density=0.2"


def dense(d):
    """M by the formula."""
    M = d.scale * d.B @ d.A
    return M.flatten().index_add(0, d.indices, d.v).view(M.shape)


def test_the_weight_starts_as_a_sparse_matrix_on_a_fixed_support():
    model, adapter, d = single(nn.Linear(40, 30, bias=False), f"sltrain(replace=True, {FIELDS})", rank=4)
    count, I = int(0.2 * 40 * 30), d.indices.clone()
    assert len(I) == count == len(I.unique()) and torch.equal(I, I.sort().values) and I.dtype == torch.int32
    x = torch.randn(3, 40)
    assert torch.equal(dense(d).ne(0).flatten().nonzero().flatten(), I.long())
    assert d.v.abs().max() <= 40**-0.5
    assert torch.allclose(model(x), x @ dense(d).T, atol=1e-6)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(5):
        model(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(d.indices, I)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_running_is_the_formula_and_folds(replace, has_bias):
    layer, x = nn.Linear(8, 6, bias=has_bias), torch.randn(2, 3, 8)
    W, b = layer.weight.detach().clone(), layer.bias
    y0 = layer(x)
    model, adapter, d = single(layer, f"sltrain(replace={replace}, {FIELDS})", rank=2)
    assert torch.equal(model(x), y0) != replace
    stirred(adapter)
    y = model(x)
    expected = product(x, dense(d) + (0 if replace else W), getattr(d, "bias", None) if replace else b)
    assert torch.allclose(y, expected, atol=1e-5)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)
    adapter.detach()
    assert torch.equal(model(x), y0)


def test_the_backward_pass_is_that_of_the_dense_expression():
    make = {"dtype": torch.float64, "requires_grad": True}
    x, A, B, b = (torch.randn(*s, **make) for s in ((2, 3, 5), (2, 5), (4, 2), (4,)))
    I = torch.tensor([0, 3, 11, 19])
    v = torch.randn(4, **make)
    assert torch.autograd.gradcheck(lambda *t: _SparseLowRank.apply(*t, I, 1.5, torch.float64), (x, b, A, B, v))


def test_the_sparse_gradient_is_the_weights_gradient_at_the_indices():
    layer, x = nn.Linear(8, 6), torch.randn(3, 8)
    (G,) = gradients(layer(x), layer.weight)
    model, _, d = single(layer, f"sltrain({FIELDS})", rank=2)
    (g,) = gradients(model(x), d.v)
    assert torch.allclose(g, G.flatten()[d.indices], atol=1e-5)


def test_without_one_part_the_other_is_left():
    model, adapter, d = at = single(nn.Linear(8, 6), f"sltrain({FIELDS})", rank=2)
    stirred(adapter)
    put(d, v=torch.zeros_like(d.v))
    x = torch.randn(3, 8)
    W, b = at.layer.weight, at.layer.bias
    assert torch.allclose(model(x), product(x, W + d.scale * d.B @ d.A, b), atol=1e-5)
    put(d, B=torch.zeros_like(d.B), v=torch.ones_like(d.v))
    mask = torch.zeros(48).index_fill(0, d.indices.long(), 1.0).view(6, 8)
    assert torch.allclose(model(x), product(x, W + mask, b), atol=1e-5)


def test_a_sparse_part_of_three_percent_has_full_rank():
    _, _, d = single(nn.Linear(512, 512, bias=False), "sltrain(replace=True, density=0.03)", rank=4)
    assert torch.linalg.matrix_rank(dense(d)) == 512


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Conv2d(3, 5, 3, padding=1), torch.linspace(-1, 1, 150).view(2, 3, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.linspace(-1, 1, 200).view(2, 4, 5, 5)),
        (nn.Embedding(9, 4), torch.arange(6)),
    ],
    ids=["conv", "grouped", "embedding"],
)
def test_other_layers_fold_too(layer, x, replace):
    y0 = layer(x).detach()
    model, adapter, _ = single(layer, f"sltrain(replace={replace}, {FIELDS})", rank=2)
    stirred(adapter)
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)
    adapter.detach()
    assert torch.equal(layer(x), y0)


def test_small_entries_over_a_bf16_weight_are_not_rounded_away():
    layer = nn.Linear(64, 4, bias=False).to(torch.bfloat16)
    layer.weight.data.fill_(1.0)
    model, _, d = single(layer, "sltrain(density=1.0)", rank=1)
    positive = torch.arange(64) < 32
    put(d, v=torch.where(positive, 1e-3, 0.0).repeat(4))  # 1 + 1e-3 is 1 in bf16
    x = torch.where(positive, 1.0, -1.0).to(torch.bfloat16)[None]
    assert torch.allclose(model(x).float(), torch.full((1, 4), 0.032), rtol=1e-2)


def test_no_matrix_of_the_weights_size_is_kept_for_the_backward_pass():
    model, _, _ = single(nn.Linear(128, 96), "sltrain(replace=True)", rank=4)
    kept = []
    x = torch.randn(4, 128, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert max(t.numel() for t in kept) < 128 * 96 // 4


def test_the_base_can_be_dropped_and_the_fold_still_gives_a_whole_layer():
    layer, x = nn.Linear(8, 6), torch.randn(3, 8)
    model, adapter, _ = single(layer, f"sltrain(replace=True, {FIELDS})", rank=2, keep_base=False)
    assert layer.weight.numel() == 0
    stirred(adapter)
    y = model(x)
    with pytest.raises(UserError):
        adapter.detach()
    adapter.bake()
    assert type(layer) is nn.Linear and layer.weight.shape == (6, 8)
    assert torch.allclose(model(x), y, atol=1e-5)
    with pytest.raises(UserError, match="stands for W"):
        single(nn.Linear(8, 6), "sltrain", rank=2, keep_base=False)


@pytest.mark.parametrize(
    "shape, rank, density, count", [((2048, 2048), 512, 0.03, 2_222_981), ((576, 576), 64, 0.03, 83_681)]
)
def test_the_sheets_counts(shape, rank, density, count):
    _, adapter, d = single(nn.Linear(*shape, bias=False), f"sltrain(density={density}, replace=True)", rank=rank)
    assert adapter.parameter_count() == count == d.parameter_count()


def test_it_comes_back_from_disk(tmp_path):
    model, adapter, _ = single(nn.Linear(8, 6), f"sltrain(replace=True, {FIELDS})", rank=2)
    stirred(adapter)
    x = torch.randn(3, 8)
    y = model(x)
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)
