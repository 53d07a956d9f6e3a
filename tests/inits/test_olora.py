"""OLoRA against PEFT and the full decomposition."""

import copy

import pytest
import torch
from single import linear, single, stirred
from torch import nn

import veneer
from veneer.errors import UserError

LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(3, 8)),
    "conv": (lambda: nn.Conv2d(3, 6, 3, stride=2), lambda: torch.randn(2, 3, 7, 7)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (3, 4))),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", ["lora", "rslora", "dora"])
def test_the_start_is_the_base_and_disabling_is_exact(form, kind):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y = layer(x)
    model, adapter, delta = single(layer, f"{form}+olora", rank=3, alpha=7.0)
    assert delta.B.abs().sum() > 0
    assert torch.allclose(model(x), y, atol=1e-5)
    stirred(adapter)
    with adapter.disabled():
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_the_factors_are_the_leading_ones_of_the_full_decomposition(shape):
    W = torch.randn(*shape)
    _, _, delta = single(linear(W), "olora", rank=3)
    Q, R = torch.linalg.qr(W)
    assert torch.allclose(delta.B, Q[:, :3], atol=1e-5)
    assert torch.allclose(delta.A, R[:3], atol=1e-5)
    assert torch.allclose(delta.B.T @ delta.B, torch.eye(3), atol=1e-6)


def test_the_factors_the_frozen_rest_and_the_gradients_are_pefts():
    peft = pytest.importorskip("peft")
    layer, x = nn.Linear(8, 6), torch.randn(5, 8)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights="olora")
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    inner = theirs.base_model.model[0]
    A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    model, _, delta = single(layer, "olora", rank=2, alpha=6.0)
    assert torch.allclose(delta.A, A, atol=1e-5) and torch.allclose(delta.B, B, atol=1e-5)
    assert torch.allclose(layer.weight + delta.offset.weight(), inner.base_layer.weight, atol=1e-5)
    with torch.no_grad():
        for p, q in ((delta.A, A), (delta.B, B)):
            change = 0.3 * torch.randn(p.shape)
            p.add_(change), q.add_(change)
    assert torch.allclose(model(x), theirs(x), atol=1e-5)
    ours = torch.autograd.grad(model(x).square().sum(), (delta.A, delta.B))
    for g, h in zip(ours, torch.autograd.grad(theirs(x).square().sum(), (A, B))):
        assert torch.allclose(g, h, rtol=1e-4, atol=1e-4)


def test_a_directory_of_peft_started_so_loads_with_its_outputs(tmp_path):
    peft = pytest.importorskip("peft")
    layer, x = nn.Linear(8, 6), torch.randn(5, 8)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights="olora")
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    with torch.no_grad():
        theirs.base_model.model[0].lora_B["default"].weight.add_(0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = nn.Sequential(layer)
    veneer.load(model, tmp_path / "theirs")
    assert torch.allclose(model(x), theirs(x), atol=1e-5)


def test_dropout_and_too_large_a_rank_are_refused():
    with pytest.raises(UserError, match="parts of W"):
        single(nn.Linear(8, 6), "olora", rank=2, dropout=0.1)
    with pytest.raises(UserError, match="more than 0 has rows or columns, 6"):
        single(nn.Linear(8, 6), "olora", rank=7)


def test_layers_in_bf16_start_as_their_values_in_fp32_do_and_leave_no_copy():
    layers = [nn.Linear(9, 12), nn.Linear(12, 7)]
    model = nn.Sequential(*layers).to(torch.bfloat16)
    adapter = veneer.attach(model, "lora+olora", rank=3, alpha=3)
    for d, layer in zip(adapter.deltas.values(), layers, strict=True):
        W = layer.weight.detach().float()
        Q = torch.linalg.qr(W[:, :3]).Q
        assert torch.equal(d.B, Q) and torch.allclose(d.A, Q.T @ W, atol=1e-6)
    assert adapter.hooks[0].room is None
