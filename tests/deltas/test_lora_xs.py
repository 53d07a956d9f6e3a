"""LoRA-XS against its sheet's oracle (000, 6)."""

import pytest
import torch
from single import linear, put, single, stirred
from torch import nn

import veneer
from veneer.errors import UserError

LAYERS = {
    "linear": (lambda: nn.Linear(9, 7), lambda: torch.randn(4, 9)),
    "conv": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.randn(4, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (4,))),
}


def test_the_identity_doubles_the_leading_singular_values():
    W = torch.randn(7, 9)
    _, adapter, delta = at = single(linear(W), "lora-xs", rank=3, alpha=6.0)
    assert adapter.parameter_count() == 9
    put(delta, R=torch.eye(3) / delta.scale)
    adapter.fold()
    values, folded = torch.linalg.svdvals(W), torch.linalg.svdvals(at.layer.weight)
    assert torch.allclose(folded, torch.cat([2 * values[:3], values[3:]]).sort(descending=True).values, atol=1e-5)


def test_the_change_is_bounded_by_the_core_and_the_largest_singular_value():
    W = torch.randn(7, 9)
    _, adapter, delta = single(linear(W), "lora-xs", rank=3, alpha=6.0)
    stirred(adapter)
    spectral = torch.linalg.svdvals(delta.weight())[0]
    assert 0 < spectral <= delta.scale * torch.linalg.svdvals(delta.R)[0] * torch.linalg.svdvals(W)[0] * (1 + 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_running_is_the_dense_change_and_its_gradient_the_projected_one(kind):
    make, example = LAYERS[kind]
    model, adapter, delta = single(make(), "lora-xs", rank=2, alpha=5.0)
    stirred(adapter)
    x = example()
    W = delta.site.weight().detach().requires_grad_()
    change = delta.scale * delta.B @ delta.R.detach() @ delta.A
    expected = delta.site.run(x, W + change, delta.site.bias())
    y = model(x)
    assert torch.allclose(y, expected, atol=1e-5)
    weights = torch.randn_like(y)
    (G,) = torch.autograd.grad((expected * weights).sum(), W)
    (y * weights).sum().backward()
    assert torch.allclose(delta.R.grad, delta.scale * delta.B.T @ G @ delta.A.T, atol=1e-4)


def test_the_paper_starts_off_the_base_by_a_hair():
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    y = layer(x)
    model, _, delta = single(layer, "lora-xs(std=1e-5)", rank=3)
    assert delta.R.abs().max() > 0
    assert torch.allclose(model(x), y, atol=1e-4)


@pytest.mark.parametrize("store", ["factors", "core"])
def test_the_file_holds_the_factors_or_finds_them_in_w_again(store, tmp_path):
    model, adapter, _ = single(nn.Linear(9, 7), f"lora-xs(store={store!r})", rank=3)
    stirred(adapter)
    x = torch.randn(4, 9)
    y = model(x)
    assert ("0.A" in adapter.state()) == (store == "factors")
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)


def test_too_large_a_core_is_refused():
    with pytest.raises(UserError, match="more than 0 has singular values, 7"):
        single(nn.Linear(9, 7), "lora-xs", rank=8)


def test_the_input_is_not_kept():
    model, adapter, _ = single(nn.Linear(9, 7), "lora-xs", rank=2)
    stirred(adapter)
    x, kept = torch.randn(50, 9, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
