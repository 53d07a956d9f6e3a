"""DoRA against its sheet's numbers (000, oracle 4) and against PEFT."""

import copy

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn
from torch.nn.functional import linear as product

import veneer

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 4, 6)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), lambda: torch.randn(2, 3, 7, 7)),
    "embedding": (lambda: nn.Embedding(11, 5), lambda: torch.randint(0, 11, (3, 4))),
}


def test_the_sheets_closed_form():
    model, adapter, delta = at = single(linear([[3.0, 4.0], [0.0, 1.0]]), "dora", rank=1)
    assert torch.equal(delta.m, torch.tensor([5.0, 1.0]))
    put(delta, A=[[0.0, 1.0]], B=[[3.0], [1.0]])
    expected = torch.tensor([[1.969597, 4.595725], [0.0, 1.0]])
    assert torch.allclose(model(torch.eye(2)).T, expected, atol=1e-6)
    adapter.fold()
    assert torch.allclose(at.layer.weight, expected, atol=1e-6)
    assert torch.allclose(at.layer.weight.norm(dim=1), delta.m)


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_agree_with_peft(kind):
    peft = pytest.importorskip("peft")
    make, example = LAYERS[kind]
    layer, x = make(), example()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    model, adapter, delta = single(layer, "dora", rank=2, alpha=6.0)
    stirred(adapter)
    inner = theirs.base_model.model[0]
    if kind == "embedding":
        A, B = inner.lora_embedding_A["default"], inner.lora_embedding_B["default"]
    else:
        A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    m = inner.lora_magnitude_vector["default"].weight
    own = (delta.A, delta.B, delta.m)
    with torch.no_grad():
        for target, value in zip((A, B, m), own):
            target.copy_(value.view_as(target))
    y, expected = model(x), theirs(x)
    assert torch.allclose(y, expected, atol=1e-5)
    for ours, other in zip(gradients(y, *own), gradients(expected, A, B, m)):
        assert torch.allclose(ours, other.view_as(ours), atol=2e-5)


def test_with_the_magnitude_at_the_norm_it_is_lora():
    model, adapter, delta = at = single(nn.Linear(6, 5), "dora", rank=2)
    stirred(adapter)
    V = at.layer.weight + delta.scale * delta.B @ delta.A
    put(delta, m=V.norm(dim=1))
    x = torch.randn(4, 6)
    assert torch.allclose(model(x), product(x, V, at.layer.bias), atol=1e-5)


def test_the_norm_is_a_constant_for_the_backward_pass():
    model, adapter, delta = at = single(nn.Linear(6, 5), "dora", rank=2)
    stirred(adapter)
    x, g = torch.randn(4, 6), torch.randn(4, 5)
    (model(x) * g).sum().backward()
    gain = delta.m / (at.layer.weight + delta.B @ delta.A).norm(dim=1)
    assert torch.allclose(delta.A.grad, (gain[:, None] * delta.B).T @ g.T @ x, atol=1e-5)


def test_dropout_acts_on_the_scaled_base_product_too():
    model, adapter, delta = at = single(nn.Linear(6, 5), "dora", rank=2, dropout=0.5)
    stirred(adapter)
    model.train()
    x, seen = torch.randn(4, 6), []
    delta.drop = lambda x: seen.append(type(delta).drop(delta, x)) or seen[-1]
    y = model(x)
    W, b, (dropped,) = at.layer.weight, at.layer.bias, seen
    assert (dropped == 0).any() and not (dropped == 0).all()
    gain = delta.m / (W + delta.B @ delta.A).norm(dim=1)
    expected = x @ W.T + b + (gain - 1) * (dropped @ W.T) + gain * (dropped @ delta.A.T @ delta.B.T)
    assert torch.allclose(y, expected, atol=1e-5)


def test_an_adapter_beneath_counts_as_the_weight():
    model, below, lora = at = single(nn.Linear(6, 5), "lora", rank=2, name="below")
    stirred(below)
    x = torch.randn(4, 6)
    before = model(x)
    above = veneer.attach(model, "dora", rank=2, sites="all", name="above", seed=3)
    assert torch.allclose(model(x), before, atol=1e-6)
    stirred(above)
    (dora,) = above.deltas.values()
    V = at.layer.weight + lora.B @ lora.A + dora.B @ dora.A
    expected = product(x, V * (dora.m / V.norm(dim=1))[:, None], at.layer.bias)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_norms_follow_a_base_weight_that_is_written():
    model, adapter, delta = at = single(nn.Linear(6, 5, bias=False), "dora", rank=2)
    stirred(adapter)
    x = torch.randn(4, 6)
    model(x)
    with torch.no_grad():
        at.layer.weight.mul_(3.0)
    V = at.layer.weight + delta.B @ delta.A
    assert torch.allclose(model(x), x @ (V * (delta.m / V.norm(dim=1))[:, None]).T, atol=1e-5)


def test_a_row_of_zeros_stays_finite():
    layer = nn.Linear(3, 2)
    layer.weight.data[0] = 0
    model, adapter, _ = single(layer, "dora", rank=1)
    y = model(torch.randn(4, 3))
    y.square().sum().backward()
    assert torch.allclose(y[:, 0], layer.bias[0].expand(4))
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_norms_follow_a_weight_that_trains(dtype, error):
    """A fused optimiser writes past autograd's count of versions."""
    torch.manual_seed(0)
    x, model = torch.randn(3, 6, dtype=dtype), nn.Sequential(nn.Linear(6, 5, dtype=dtype))
    adapter = veneer.attach(model, "dora", rank=2, train=["0.weight"])
    stirred(adapter)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.03, fused=True)
    for _ in range(2):
        model(x).float().square().sum().backward()
        optimiser.step()
    with torch.no_grad():
        model(x)
    optimiser.step()
    W = dict(adapter.named_parameters())["train:0.weight"].to(dtype).float()
    with torch.no_grad():
        W, b = adapter.deltas["0"].fold(W, model[0].bias.float())
        expected = product(x.float(), W, b)
        assert (model(x) - expected).norm() <= error * expected.norm()
