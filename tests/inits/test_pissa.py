"""PiSSA against its sheet's oracles (099) and against PEFT."""

import copy

import pytest
import torch
from single import linear, single, stirred
from torch import nn
from torch.nn.functional import linear as product

import veneer
from veneer.errors import UserError

FORMS = ["lora", "rslora", "dora"]
LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(3, 8)),
    "conv": (lambda: nn.Conv2d(3, 6, 3, stride=2), lambda: torch.randn(2, 3, 7, 7)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (3, 4))),
}


@pytest.mark.parametrize("scale, size", [(1.0, 3.0**0.5), (2.0, 1.5**0.5)])
def test_the_sheets_closed_form(scale, size):
    _, _, delta = single(linear([[3.0, 0.0], [0.0, 1.0]]), "pissa", rank=1, alpha=scale)
    assert delta.scale == scale
    assert torch.allclose(delta.A.abs(), torch.tensor([[size, 0.0]]), atol=1e-6)
    assert torch.allclose(delta.B.abs(), torch.tensor([[size], [0.0]]), atol=1e-6)
    assert torch.allclose(delta.offset.weight(), torch.tensor([[-3.0, 0.0], [0.0, 0.0]]), atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_start_is_the_base_and_disabling_is_exact(form, kind):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    before, y = copy.deepcopy(layer), layer(x)
    model, adapter, delta = single(layer, f"{form}+pissa", rank=3, alpha=7.0)
    assert delta.B.abs().sum() > 0
    assert torch.allclose(model(x), y, atol=1e-5)
    stirred(adapter)
    with adapter.disabled():
        assert torch.equal(model(x), y)
    assert torch.equal(model[0].weight, before.weight)


def test_what_stays_has_the_remaining_singular_values():
    W = torch.randn(9, 12)
    _, _, delta = single(linear(W), "pissa(exact=True)", rank=4)
    left = torch.linalg.svdvals(W + delta.offset.weight())
    values = torch.linalg.svdvals(W)
    assert torch.allclose(left, torch.cat([values[4:], torch.zeros(4)]), atol=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_the_factors_are_balanced_and_the_product_does_not_depend_on_alpha(exact):
    W = torch.randn(40, 60) @ torch.diag(0.9 ** torch.arange(60.0))
    products = []
    for alpha in (2.0, 8.0):
        _, _, delta = single(linear(W), f"pissa(exact={exact})", rank=2, alpha=alpha)
        values = torch.diag(torch.linalg.svdvals(W)[:2] / delta.scale)
        assert torch.allclose(delta.B.T @ delta.B, values, atol=1e-4 * float(values.max()))
        assert torch.allclose(delta.A @ delta.A.T, values, atol=1e-4 * float(values.max()))
        products.append(delta.weight())
    assert torch.allclose(*products, atol=1e-5)


def test_at_full_rank_nothing_stays():
    W = torch.randn(5, 7)
    _, _, delta = single(linear(W), "pissa", rank=5)
    assert torch.allclose(delta.weight(), W, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_fold_and_the_rank_2r_pair_on_w_equal_running(form):
    layer, x = nn.Linear(8, 6), torch.randn(5, 8)
    model, adapter, delta = single(layer, f"{form}+pissa", rank=2, alpha=3.0)
    stirred(adapter)
    y = model(x)
    (A, B, s), (A0, B0, s0) = delta.pair(), delta.offset.pair()
    V = layer.weight + torch.cat([s * B, s0 * B0], 1) @ torch.cat([A, A0])
    W = V if form != "dora" else V * (delta.m / V.norm(dim=1))[:, None]
    assert torch.allclose(y, product(x, W, layer.bias), atol=1e-5)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_function_and_its_gradients_agree_with_peft(form):
    peft = pytest.importorskip("peft")
    layer, x = nn.Linear(8, 6), torch.randn(5, 8)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa",
        use_dora=form == "dora", use_rslora=form == "rslora",
    )  # fmt: skip
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    inner = theirs.base_model.model[0]
    A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    model, _, delta = single(layer, f"{form}+pissa(exact=True)", rank=2, alpha=6.0)
    assert torch.allclose(delta.B @ delta.A, B @ A, atol=1e-5)
    assert torch.allclose(layer.weight + delta.offset.weight(), inner.base_layer.weight, atol=1e-5)
    with torch.no_grad():  # the signs of singular vectors are free: take theirs, then move both alike
        delta.A.copy_(A), delta.B.copy_(B)
        for p, q in ((delta.A, A), (delta.B, B)):
            change = 0.3 * torch.randn(p.shape)
            p.add_(change), q.add_(change)
    assert torch.allclose(model(x), theirs(x), atol=1e-5)
    ours = torch.autograd.grad(model(x).square().sum(), (delta.A, delta.B))
    for g, h in zip(ours, torch.autograd.grad(theirs(x).square().sum(), (A, B))):
        assert torch.allclose(g, h, atol=1e-4)


def test_a_reloaded_adapter_needs_no_decomposition(tmp_path):
    layer, x = nn.Linear(8, 6), torch.randn(5, 8)
    model, adapter, _ = single(layer, "pissa", rank=2)
    stirred(adapter)
    y = model(x)
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)


def test_dropout_and_too_large_a_rank_are_refused():
    with pytest.raises(UserError, match="principal parts"):
        single(nn.Linear(8, 6), "pissa", rank=2, dropout=0.1)
    with pytest.raises(UserError, match="more than 0 has singular values, 6"):
        single(nn.Linear(8, 6), "pissa", rank=7)
