"""Comp-LoRA against its sheet's oracles (085)."""

import copy

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn

import veneer
from veneer.deltas.comp_lora import project_to_complement
from veneer.errors import UserError

LAYERS = {
    "linear": (lambda: nn.Linear(9, 7), lambda: torch.randn(4, 9)),
    "conv": (lambda: nn.Conv2d(3, 8, 3), lambda: torch.randn(4, 3, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: torch.randn(4, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (4,))),
}


def triplets(W, k):
    U, S, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].T


def test_the_sheets_closed_form():
    model, adapter, d = at = single(linear([[3.0, 0.0], [0.0, 1.0]]), "comp-lora(k=1)", rank=1)
    put(d, A=[[1.0, 2.0]], B=[[5.0], [7.0]])
    assert torch.allclose(d.weight(), torch.tensor([[0.0, 0.0], [0.0, 14.0]]), atol=1e-6)
    assert torch.allclose(model(torch.eye(2)).T, torch.tensor([[3.0, 0.0], [0.0, 15.0]]), atol=1e-6)
    adapter.fold()
    assert torch.allclose(at.layer.weight, torch.tensor([[3.0, 0.0], [0.0, 15.0]]), atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_protected_triplets_survive_and_all_ways_of_running_agree(kind):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y0 = layer(x)
    model, adapter, d = single(layer, "comp-lora(k=2)", rank=3, alpha=6.0)
    assert torch.allclose(model(x), y0, atol=1e-6)
    stirred(adapter)
    W = d.site.weight().detach()
    U, S, V = triplets(W, 2)
    W1 = W + d.weight()
    assert torch.allclose(W1 @ V, U * S, atol=1e-5) and torch.allclose(W1.T @ U, V * S, atol=1e-5)
    P, Q = torch.eye(len(U)) - U @ U.T, torch.eye(len(V)) - V @ V.T
    expected = d.site.run(x, W + 2 * P @ d.B @ d.A @ Q, d.site.bias())
    y = model(x)
    assert torch.allclose(y, expected, atol=1e-5)
    for g, h in zip(gradients(y, d.A, d.B), gradients(expected, d.A, d.B)):
        assert torch.allclose(g, h, atol=1e-4)
    A, B, scale, _ = d.as_lora(W, None)
    assert torch.allclose(d.site.run(x, W + scale * B @ A, d.site.bias()), y, atol=1e-5)


def test_inputs_in_the_protected_span_give_what_they_gave():
    layer = nn.Linear(9, 7)
    x = torch.randn(5, 3) @ triplets(layer.weight, 3)[2].T
    y0 = layer(x)
    model, adapter, _ = single(layer, "comp-lora(k=3)", rank=2)
    stirred(adapter, 1.0)
    assert torch.allclose(model(x), y0, atol=1e-5)
    z = torch.randn(5, 9)
    assert not torch.allclose(model(z), layer.weight.new_tensor(0) + z @ layer.weight.T + layer.bias, atol=1e-2)


def test_the_gradient_has_no_part_along_what_is_protected():
    model, adapter, d = single(nn.Linear(9, 7), "comp-lora(k=3)", rank=2)
    stirred(adapter)
    A, B = gradients(model(torch.randn(4, 9)), d.A, d.B)
    assert A.norm() > 0.1 and torch.allclose(A @ d.V, torch.zeros(2, 3), atol=1e-5)
    assert B.norm() > 0.1 and torch.allclose(d.U.T @ B, torch.zeros(3, 2), atol=1e-5)


def test_sides_protect_one_end_and_nothing_protected_is_lora():
    W = torch.randn(7, 9)
    U, _, V = triplets(W, 3)
    for side in ("in", "out"):
        _, adapter, d = single(linear(W), f"comp-lora(k=3, side={side!r})", rank=2)
        stirred(adapter)
        assert (d.weight() @ V).norm() < 1e-5 if side == "in" else (d.weight() @ V).norm() > 0.1
        assert (U.T @ d.weight()).norm() < 1e-5 if side == "out" else (U.T @ d.weight()).norm() > 0.1
    x = torch.randn(4, 9)
    outputs = []
    for recipe in ("lora", "comp-lora(energy=0.0)"):
        model, adapter, _ = single(linear(W), recipe, rank=2)
        stirred(adapter)
        outputs.append(model(x))
    assert torch.equal(*outputs)


def test_energy_chooses_the_directions_and_leaves_room_for_the_rank():
    W = torch.diag(torch.tensor([2.0, 1.0, 1.1, 0.9, 0.0, 0.0]))
    assert single(linear(W), "comp-lora(energy=0.8)", rank=2).delta.V.shape == (6, 3)
    assert single(linear(W), "comp-lora(energy=0.8)", rank=4).delta.V.shape == (6, 2)
    assert single(linear(W), "comp-lora(energy=0.8)", rank=8).delta.V.shape == (6, 0)


def regression(recipe, steps, make):
    """Train on a fixed regression; returns the model's output, the adapter and the delta."""
    g = torch.Generator().manual_seed(4)
    W, x, target = (torch.randn(*s, generator=g) for s in ((7, 9), (20, 9), (20, 7)))
    model, adapter, d = single(linear(W), recipe, rank=2)
    with torch.no_grad():
        d.B.add_(0.1 * torch.randn(7, 2, generator=g))  # away from 0, where A has no gradient
        if recipe.startswith("lora"):
            adapter.hooks[0].after_step(0)
    optimizer = make(adapter.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        for h in adapter.hooks:
            h.after_step(step)
    return model(x), adapter, d, W


def test_projecting_the_step_and_the_forward_move_alike_under_plain_descent_only():
    def sgd(params):
        return torch.optim.SGD(params, lr=0.1)

    def adam(params):
        return torch.optim.Adam(params, lr=0.05)

    ours, steps = "comp-lora(k=3)", "lora+comp-lora-steps(k=3)"
    assert torch.allclose(regression(ours, 20, sgd)[0], regression(steps, 20, sgd)[0], atol=1e-5)
    y, _, d, W = regression(steps, 20, adam)
    assert not torch.allclose(regression(ours, 20, adam)[0], y, atol=1e-3)
    U, _, V = triplets(W, 3)
    assert (d.weight() @ V).norm() < 1e-5 and (U.T @ d.weight()).norm() < 1e-5 and d.weight().norm() > 0.1


def test_a_finished_adapter_can_be_projected():
    W, x = torch.randn(7, 9), torch.randn(4, 9)
    model, adapter, d = single(linear(W), "lora", rank=2)
    stirred(adapter)
    U, _, V = triplets(W, 3)
    change = d.weight().detach()
    expected = change - U @ U.T @ change
    expected = expected - expected @ V @ V.T
    left = project_to_complement(adapter, k=3)
    assert torch.allclose(model(x), x @ (W + expected).T, atol=1e-5)
    assert left["0"] == pytest.approx(float(expected.square().sum() / change.square().sum()), rel=1e-4)


def test_the_weak_baseline_projects_a_once():
    W = torch.randn(7, 9)
    _, adapter, d = single(linear(W), "comp-lora(k=3, mode='start')", rank=2)
    V = triplets(W, 3)[2]
    assert d.A.norm() > 0.1 and (d.A @ V).norm() < 1e-5
    stirred(adapter)
    assert torch.equal(d.weight(), d.B @ d.A) and (d.weight() @ V).norm() > 0.1


def test_what_is_kept_without_gradients_follows_every_write():
    model, adapter, d = single(nn.Linear(9, 7), "comp-lora(k=2)", rank=2)
    x = torch.randn(4, 9)
    for _ in range(2):
        stirred(adapter)
        with torch.no_grad():
            kept = model(x)
            assert d.pair().A is d.pair().A
        assert torch.equal(kept, model(x).detach())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].veneer["default"].B.mul_(2.0)
        assert not torch.equal(twin(x), kept) and torch.equal(model(x), kept)


def test_a_start_in_the_protected_directions_is_refused_and_others_are_taken():
    layer = nn.Linear(9, 7)
    with pytest.raises(UserError, match="protected"):
        single(layer, "comp-lora(k=3)+pissa", rank=2)
    with pytest.raises(UserError, match="moved a part of W"):
        single(layer, "lora+pissa+comp-lora-steps", rank=2)
    x = torch.randn(40, 9)
    y0 = layer(x)
    model, _, d = single(layer, "comp-lora(k=3)+eva", rank=2, calibration=[{"input": x}])
    assert torch.allclose(model(x), y0, atol=1e-6) and not torch.allclose(d.A @ d.V, torch.zeros(1), atol=1e-2)


def test_components_can_be_gated_and_pruned():
    from veneer.parts.components import components

    model, adapter, d = single(nn.Linear(9, 7), "comp-lora(k=2)", rank=4)
    stirred(adapter)
    part = components(adapter)["0"]
    part.add_gate(torch.tensor([1.0, 0.0, 2.0, 0.0]))
    x = torch.randn(4, 9)
    y = model(x)
    part.prune([0, 2])
    assert d.parameter_count() == adapter.parameter_count() == 2 * (9 + 7) + 2
    assert torch.allclose(model(x), y, atol=1e-6)


def test_it_comes_back_from_its_file(tmp_path):
    model, adapter, _ = single(nn.Linear(9, 7), "comp-lora", rank=2)
    stirred(adapter)
    x = torch.randn(4, 9)
    y = model(x)
    assert set(adapter.state()) == {"0.A", "0.B", "0.scale"}
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)
