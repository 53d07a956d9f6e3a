"""StructuredLoRA, NLoRA's start and IntTune against their sheet's oracles (009)."""

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn
from torch.nn.functional import linear as product

import veneer
from veneer.errors import UserError

CORNER = [[2.0, 1.0], [1.0, 3.0]]
LAYERS = {
    "linear": (lambda: nn.Linear(9, 7), lambda: torch.randn(4, 9)),
    "conv": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.randn(4, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (4,))),
}


def change(delta):
    return delta.scale * delta.B @ delta.N @ delta.A


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("recipe", ["slora", "slora+nlora", "inttune"])
def test_running_is_the_dense_change_with_its_gradients(kind, recipe):
    make, example = LAYERS[kind]
    model, adapter, delta = single(make(), recipe, rank=2, alpha=5.0)
    stirred(adapter)
    x = example()
    W = delta.site.weight().detach() + (0 if delta.offset is None else delta.offset.weight())
    W.requires_grad_()
    expected = delta.site.run(x, W + change(delta).detach(), delta.site.bias())
    y = model(x)
    assert torch.allclose(y, expected, atol=1e-5)
    (G,) = gradients(expected, W)
    found = gradients(y, *adapter.parameters())
    assert torch.allclose(found[-2 if len(found) == 3 else 0], delta.scale * delta.B.T @ G @ delta.A.T, atol=1e-4)


def test_structured_lora_starts_at_the_base_where_only_b_moves():
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    y = layer(x)
    model, adapter, delta = single(layer, "slora", rank=3)
    assert torch.equal(model(x), y)
    grads = dict(zip("ANB", gradients(model(x), delta.A, delta.N, delta.B)))
    assert not grads["A"].any() and not grads["N"].any() and grads["B"].any()
    assert adapter.parameter_count() == 3 * (9 + 7) + 9


def test_the_identity_in_the_middle_is_lora():
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    model, _, delta = single(layer, "slora", rank=3, alpha=6.0)
    put(delta, N=torch.eye(3), B=torch.randn(7, 3))
    assert torch.allclose(model(x), product(x, layer.weight + 2 * delta.B @ delta.A, layer.bias), atol=1e-5)


@pytest.mark.parametrize("core, moved", [("block", [[8.0, 4.0], [4.0, 2.0]]), ("pinv", [[2.0, 1.0], [1.0, 0.5]])])
@pytest.mark.parametrize("recipe", ["nlora", "inttune"])
def test_the_sheets_two_by_two(core, moved, recipe):
    _, _, delta = single(linear(CORNER), f"{recipe}(core={core!r}, residual=False)", rank=1)
    assert torch.allclose(change(delta), torch.tensor(moved), atol=1e-5)


@pytest.mark.parametrize("choice", ["first", "random", "leverage"])
def test_the_pseudo_inverse_reproduces_the_chosen_rows_and_columns(choice):
    W = torch.randn(7, 9)
    _, _, delta = single(linear(W), f"inttune(core='pinv', choice={choice!r}, residual=False)", rank=3)
    found = change(delta)
    assert torch.allclose(found[delta.rows], W[delta.rows], atol=1e-3)
    assert torch.allclose(found[:, delta.columns], W[:, delta.columns], atol=1e-3)


def test_the_pseudo_inverse_is_exact_at_the_rank_of_w():
    W = torch.randn(7, 3) @ torch.randn(3, 9)
    _, _, delta = single(linear(W), "nlora(core='pinv')", rank=3)
    assert torch.allclose(change(delta), W, atol=1e-4)


@pytest.mark.parametrize("recipe", ["nlora", "inttune", "lora-xs+nlora"])
def test_the_residual_is_the_base_and_the_official_start_is_not(recipe):
    W, b, x = 0.3 * torch.randn(7, 9), torch.randn(7), torch.randn(4, 9)
    y = product(x, W, b)
    name = recipe.rpartition("+")[2]
    model, adapter, _ = single(linear(W, b), recipe, rank=3)
    assert torch.allclose(model(x), y, atol=1e-5)
    stirred(adapter)
    with adapter.disabled():
        assert torch.equal(model(x), y)
    official = single(linear(W, b), recipe.replace(name, f"{name}(residual=False)"), rank=3).model(x)
    corner = W[:, :3] @ W[:3, :3] @ W[:3]
    assert torch.allclose(official, product(x, W + corner, b), atol=1e-5)


def test_training_the_difference_is_training_the_core_with_the_residual():
    layer, x = linear(0.3 * torch.randn(7, 9)), torch.randn(20, 9)
    one, two = single(layer, "inttune", rank=3), single(linear(layer.weight.detach()), "lora-xs+nlora", rank=3)
    for at in (one, two):
        optimizer = torch.optim.AdamW(at.adapter.parameters(), lr=0.05, weight_decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            at.model(x).square().mean().backward()
            optimizer.step()
    assert torch.allclose(one.delta.weight(), two.delta.weight() + two.delta.offset.weight(), atol=1e-5)


def test_inttune_trains_the_core_alone_and_keeps_no_input():
    layer = nn.Linear(9, 7)
    before = layer.weight.detach().clone()
    model, adapter, delta = single(layer, "inttune", rank=3)
    assert [n for n, _ in adapter.named_parameters()] == ["0.N"] and adapter.parameter_count() == 9
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    model(torch.randn(4, 9)).square().sum().backward()
    optimizer.step()
    assert delta.N.any() and torch.equal(delta.A, before[:3]) and torch.equal(delta.B, before[:, :3])
    x, kept = torch.randn(50, 9, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}


@pytest.mark.parametrize("choice", ["random", "leverage"])
def test_the_file_of_inttune_holds_the_core_and_the_indices(choice, tmp_path):
    model, adapter, delta = single(nn.Linear(9, 7), f"inttune(choice={choice!r})", rank=3)
    stirred(adapter)
    x = torch.randn(4, 9)
    y = model(x)
    assert {"0.N", "0.rows", "0.columns"} <= set(adapter.state()) and not {"0.A", "0.B"} & set(adapter.state())
    put(delta, rows=[0, 1, 2])  # as if leverage had been decided otherwise on another machine
    delta._take(torch.tensor([1, 2, 5]), torch.tensor([0, 3, 4]))
    y = model(x)
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)


def test_the_count_of_a_large_model():
    layers = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
    layers |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    more = 0
    for out, inn in layers.values():
        site = type("S", (), {"out_features": out, "in_features": inn})
        form = type("F", (), {"rank": 128, "site": site})
        more += veneer.core.registry.find("slora").cls.parameter_count(form) - 128 * (out + inn)
    assert 32 * more == 3_670_016


def test_what_cannot_start_is_refused():
    with pytest.raises(UserError, match="drop parts of W"):
        single(nn.Linear(9, 7), "nlora", rank=2, dropout=0.1)
    for name in ("nlora", "inttune"):
        with pytest.raises(UserError, match="more than 0 has rows or columns, 7"):
            single(nn.Linear(9, 7), name, rank=8)
