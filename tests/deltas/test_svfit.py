"""SVFit against its sheet's oracles (038)."""

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn

import veneer
from veneer.errors import UserError

LAYERS = {
    "wide": (lambda: nn.Linear(9, 7), lambda: torch.randn(4, 9)),
    "tall": (lambda: nn.Linear(6, 8), lambda: torch.randn(4, 6)),
    "conv": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.randn(4, 3, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(4, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (4,))),
}


def test_the_sheets_closed_form():
    _, adapter, d = at = single(linear([[3.0, 0.0], [4.0, 5.0]]), "svfit", rank=1)
    assert torch.allclose(d.S, torch.tensor([6.708204])) and adapter.parameter_count() == 1
    put(d, shift=d.S)  # λ = 2σ₁
    assert torch.allclose(d.weight(), torch.tensor([[1.5, 1.5], [4.5, 4.5]]))
    adapter.fold()
    assert torch.allclose(at.layer.weight, torch.tensor([[4.5, 1.5], [8.5, 9.5]]))


@pytest.mark.parametrize("kind", LAYERS)
def test_running_is_the_change_of_values_and_its_gradient_the_projected_one(kind):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y0 = layer(x)
    model, adapter, d = single(layer, "svfit", rank=3, alpha=6.0)
    assert torch.equal(model(x), y0)
    stirred(adapter)
    W = d.site.weight().detach().requires_grad_()
    expected = d.site.run(x, W + 2.0 * d.U @ torch.diag(d.shift.detach()) @ d.Vh, d.site.bias())
    y = model(x)
    assert torch.allclose(y, expected, atol=1e-5)
    weights = torch.randn_like(y)
    (G,) = torch.autograd.grad((expected * weights).sum(), W)
    (y * weights).sum().backward()
    seen = torch.stack([d.U[:, i] @ G @ d.Vh[i] for i in range(3)])
    assert torch.allclose(d.shift.grad, 2.0 * seen, atol=1e-4)
    assert d.share_seen(G) == pytest.approx(float(seen.square().sum() / G.square().sum()), rel=1e-5)


def test_singular_values_change_and_singular_vectors_stay():
    W = torch.randn(7, 9)
    _, adapter, d = single(linear(W), "svfit", rank=4)
    stirred(adapter)
    S = torch.linalg.svdvals(W)
    W1 = W + d.weight()
    expected = torch.cat([(S[:4] + d.shift).abs(), S[4:]]).sort(descending=True).values
    assert torch.allclose(torch.linalg.svdvals(W1), expected, atol=1e-5)
    core = d.U.T @ d.weight() @ d.Vh.T
    assert torch.allclose(core, torch.diag(d.shift), atol=1e-6)


@pytest.mark.parametrize("factor", [-1.0, 0.5])
def test_scaling_all_values_scales_the_weight(factor):
    W = torch.randn(7, 9)
    _, _, d = single(linear(W), "svfit")
    put(d, shift=factor * d.S)
    assert torch.allclose(d.weight(), factor * W, atol=1e-5)


def test_energy_chooses_how_many_train():
    W = torch.diag(torch.tensor([2.0, 1.0, 1.1, 0.9]))
    assert single(linear(W), "svfit(energy=0.8)").delta.parameter_count() == 3
    assert single(linear(W), "svfit(energy=0.8)", rank=2).delta.parameter_count() == 2
    assert single(linear(W), "svfit", rank=9).delta.parameter_count() == 4


def test_absolute_values_start_at_the_base_and_take_the_same_gradient():
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    y0 = layer(x)
    model, adapter, d = single(layer, "svfit(absolute=True)", rank=3)
    assert torch.equal(d.shift, d.S) and d.shift.data_ptr() != d.S.data_ptr()
    y = model(x)
    assert torch.allclose(y, y0, atol=1e-6)
    (g,) = gradients(y, d.shift)
    adapter.detach()
    model, _, d = single(layer, "svfit", rank=3)
    assert torch.allclose(gradients(model(x), d.shift)[0], g, atol=1e-6)


def test_values_held_above_zero_can_come_back():
    model, _, d = single(nn.Linear(9, 7), "svfit(nonnegative=True)", rank=3)
    put(d, shift=-2 * d.S)
    assert torch.allclose(d.U.T @ (d.site.weight() + d.weight()) @ d.Vh.T, torch.zeros(3, 3), atol=1e-6)
    model(torch.randn(4, 9)).sum().backward()
    assert d.shift.grad.abs().min() > 0


def test_with_all_values_it_trains_as_svft_plain():
    """SVFT with a diagonal M: y = xWᵀ + xV·M·Uᵀ, plain gradient descent on M (arXiv:2405.19597, eq. 2)."""
    layer, x = nn.Linear(9, 7, bias=False), torch.randn(20, 9)
    W, target = layer.weight.detach().clone(), torch.randn(20, 7)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    M = torch.zeros(7, requires_grad=True)
    model, adapter, _ = single(layer, "svfit")
    ours, theirs = torch.optim.SGD(adapter.parameters(), lr=0.1), torch.optim.SGD([M], lr=0.1)
    for _ in range(10):
        for optimizer, y in ((ours, model(x)), (theirs, x @ (W + U @ torch.diag(M) @ Vh).T)):
            optimizer.zero_grad()
            (y - target).square().mean().backward()
            optimizer.step()
    assert torch.allclose(model(x), x @ (W + U @ torch.diag(M) @ Vh).T, atol=1e-5)


@pytest.mark.parametrize("store", ["values", "vectors"])
def test_the_file_holds_the_values_and_wants_the_same_base(store, tmp_path):
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    model, adapter, _ = single(layer, f"svfit(store={store!r})", rank=4)
    stirred(adapter)
    y = model(x)
    assert ("0.U" in adapter.state()) == (store == "vectors")
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)
    with pytest.raises(UserError, match="another base"):
        veneer.load(nn.Sequential(nn.Linear(9, 7)), tmp_path / "kept")


def test_vectors_that_w_does_not_determine_are_in_the_file(tmp_path):
    layer, x = linear(torch.eye(5)), torch.randn(4, 5)
    model, adapter, d = single(layer, "svfit")
    Q = torch.linalg.qr(torch.randn(5, 5)).Q
    d.U.copy_(Q)
    d.Vh.copy_(Q.T)  # as good a decomposition of I as any, say another library's
    stirred(adapter)
    y = model(x)
    adapter.save(tmp_path / "kept")
    adapter.detach()
    _, adapter, d = single(layer, "svfit")
    assert not torch.allclose(d.U.abs(), Q.abs(), atol=0.1)
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)
