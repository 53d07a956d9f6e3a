"""BOFT against its sheet's oracle (000, 12) and against PEFT."""

import copy

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn

from veneer.errors import UserError

LAYERS = {
    "linear": (lambda: nn.Linear(16, 7), lambda: torch.randn(3, 4, 16)),
    "no bias": (lambda: nn.Linear(16, 7, bias=False), lambda: torch.randn(3, 4, 16)),
    "conv": (lambda: nn.Conv2d(4, 6, 2, stride=2), lambda: torch.randn(2, 4, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 2), lambda: torch.randn(2, 4, 7)),
}


class BlockDiagonal:
    """PEFT's CUDA kernel in plain torch, without which it runs one factor only."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*b) for b in blocks])]

    @staticmethod
    def backward(grad, blocks):
        size = blocks.shape[-1]
        parts = range(0, grad.shape[-1], size)
        return [torch.stack([torch.stack([g[i : i + size, i : i + size] for i in parts]) for g in grad])]


@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv"])
def test_outputs_and_gradients_agree_with_peft(kind, factors, monkeypatch):
    layers = pytest.importorskip("peft.tuners.boft.layer")
    import peft

    monkeypatch.setattr(layers, "get_fbd_cuda", lambda: BlockDiagonal)
    make, example = LAYERS[kind]
    layer, x = make(), example()
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    inner = theirs.base_model.model[0]
    others = inner.boft_R["default"], inner.boft_s["default"]
    model, adapter, delta = single(layer, f"boft(factors={factors})")
    stirred(adapter, 0.5)
    own = delta.X, delta.g
    with torch.no_grad():
        for p, q in zip(own, others):
            q.copy_(p.view_as(q))
    y, expected = model(x), theirs(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    for g, h in zip(gradients(y, *own), gradients(expected, *others)):
        assert torch.allclose(g, h.view_as(g), rtol=1e-4, atol=1e-4)


def test_one_factor_without_scale_is_ofts_exact_rotation():
    W = torch.randn(7, 16)
    model, _, delta = single(linear(W), "boft")
    X = torch.randn(1, 4, 4, 4)
    put(delta, X=X)
    S, one = (X[0] - X[0].mT) / 2, torch.eye(4)
    R = torch.block_diag(*((one - S) @ torch.linalg.inv(one + S)))
    assert torch.allclose(model(torch.eye(16)).T, W @ R.T, atol=1e-5)
    oft, _, other = single(linear(W), "oft(block_size=4)")
    put(other, Q=torch.stack([s[tuple(torch.triu_indices(4, 4, 1))] for s in S]))
    assert torch.allclose(oft(torch.eye(16)).T, W @ R.T, atol=1e-5)


@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_product_of_factors_is_orthogonal_and_the_fold_runs_alike(kind, factors):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    W, y0 = layer.weight.detach().clone().flatten(1), layer(x)
    model, adapter, delta = at = single(layer, f"boft(factors={factors})")
    assert torch.allclose(model(x), y0, atol=1e-6)
    stirred(adapter, 1.0)
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)
    rows = at.layer.weight.flatten(1) / delta.g[:, None]
    assert (rows - W).abs().max() > 0.1
    assert torch.allclose(rows @ rows.T, W @ W.T, atol=1e-5)


def test_with_enough_factors_every_input_reaches_every_other():
    model, adapter, _ = single(linear(torch.eye(16)), "boft(factors=3)")
    stirred(adapter)
    assert (model(torch.eye(16)).abs() > 1e-6).all()


def test_sizes_follow_the_layer_and_impossible_ones_are_refused():
    assert single(nn.Linear(27, 2), "boft").delta.X.shape == (1, 9, 3, 3)
    assert single(nn.Linear(24, 2), "boft(factors=2)").delta.X.shape == (2, 6, 4, 4)
    assert single(nn.Linear(24, 2), "boft(blocks=2)").delta.X.shape == (1, 2, 12, 12)
    with pytest.raises(UserError, match="9 inputs, which no even block size"):
        single(nn.Linear(9, 2), "boft(factors=2)")
    with pytest.raises(UserError, match="both 0"):
        single(nn.Linear(8, 2), "boft(block_size=0)")


def test_it_has_no_factors_to_be_drawn_together():
    with pytest.raises(UserError, match=r"orthogonal draws trained factors .* has none"):
        single(nn.Linear(8, 8), "boft(block_size=4)+orthogonal")
