"""LoLDU against its sheet's oracles (002)."""

import pytest
import torch
from single import linear, put, single, stirred
from torch import nn

import veneer
from veneer.errors import UserError
from veneer.parts.state import clone

LAYERS = {
    "wide": (lambda: nn.Linear(9, 7), lambda: torch.randn(4, 9)),
    "tall": (lambda: nn.Linear(6, 8), lambda: torch.randn(4, 6)),
    "conv": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.randn(4, 3, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(4, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (4,))),
}


def test_the_sheets_closed_form():
    model, adapter, d = at = single(linear([[1.0, 2.0], [4.0, 6.0]]), "loldu", rank=1)
    assert d.order.tolist() == [1, 0] and d.D.tolist() == [4.0]
    assert d.L.T.tolist() == [[0.25, 1.0]] and d.U.tolist() == [[1.0, 1.5]]
    put(d, z=[1.0])  # the diagonal at 5
    assert model(torch.eye(2)).T.tolist() == [[1.25, 2.375], [5.0, 7.5]]
    adapter.fold()
    assert at.layer.weight.tolist() == [[1.25, 2.375], [5.0, 7.5]]


@pytest.mark.parametrize("kind", ["wide", "tall"])
def test_all_pivots_together_are_the_weight(kind):
    layer = LAYERS[kind][0]()
    _, adapter, d = single(layer, "loldu")
    assert adapter.parameter_count() == min(layer.weight.shape) == d.parameter_count()
    put(d, z=-d.D)
    assert torch.allclose(d.weight(), -layer.weight, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_running_is_the_changed_diagonal_and_its_gradient_the_projected_one(kind):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y0 = layer(x)
    model, adapter, d = single(layer, "loldu", rank=3, alpha=6.0)
    assert torch.equal(model(x), y0)
    stirred(adapter)
    W = d.site.weight().detach().requires_grad_()
    expected = d.site.run(x, W + 2.0 * d.L @ torch.diag(d.z.detach()) @ d.U, d.site.bias())
    y = model(x)
    assert torch.allclose(y, expected, atol=1e-4)
    weights = torch.randn_like(y)
    (G,) = torch.autograd.grad((expected * weights).sum(), W)
    (y * weights).sum().backward()
    assert torch.allclose(d.z.grad, torch.stack([2.0 * d.L[:, i] @ G @ d.U[i] for i in range(3)]), atol=1e-4, rtol=1e-4)


def test_one_number_changes_the_weight_by_a_matrix_of_rank_one():
    _, _, d = single(nn.Linear(9, 7), "loldu", rank=4)
    put(d, z=[0.0, 0.0, 0.1, 0.0])
    assert torch.linalg.matrix_rank(d.weight()) == 1
    A, B, scale, _ = d.as_lora(d.site.weight(), None)
    assert torch.allclose(scale * B @ A, 0.1 * torch.outer(d.L[:, 2], d.U[2]), atol=1e-6)


def test_the_scale_of_the_package_and_one_that_trains():
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    W, y0 = layer.weight.detach().clone(), layer(x)
    model, _, d = single(layer, "loldu(train_scale=True)", rank=4, alpha=1.0)
    assert d.scale == 0.25 and torch.equal(model(x), y0)
    put(d, z=torch.ones(4), gain=[1.5])
    residual = W - 0.25 * d.L @ torch.diag(d.D) @ d.U
    W1 = residual + 0.25 * 1.5 * d.L @ torch.diag(d.D + 1) @ d.U
    assert torch.allclose(model(x), x @ W1.T + layer.bias, atol=1e-5)
    assert d.parameter_count() == 5


@pytest.mark.parametrize("start", ["uniform", "normal", "constant", "ones", "zeros", "s_uniform", "s_normal"])
def test_other_starts_leave_the_base_by_what_they_set(start):
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    y0 = layer(x)
    model, _, d = single(layer, f"loldu(start={start!r})")
    assert not d.starts_at_base and not torch.allclose(model(x), y0, atol=1e-3)
    value, mean = d.D + d.z.detach(), d.D.mean()
    assert {
        "uniform": value.abs().max() <= mean.abs() / 2 + 1e-6,
        "constant": torch.allclose(value, mean.expand(7), atol=1e-6),
        "ones": torch.allclose(value, torch.ones(7), atol=1e-6),
        "zeros": torch.allclose(value, torch.zeros(7), atol=1e-6),
        "s_uniform": 0.1 < value.abs().max() <= 1 + 1e-6,
    }.get(start, value.std() > 0.1)


def test_the_largest_pivots_can_be_chosen():
    layer = nn.Linear(9, 7)
    _, adapter, d = single(layer, "loldu")
    D = d.D.clone()
    adapter.detach()
    _, _, d = single(layer, "loldu(pivots='magnitude')", rank=3)
    assert set(d.D.tolist()) == set(sorted(D.tolist(), key=abs)[-3:])


def test_the_file_holds_the_diagonal_and_the_order_and_wants_the_same_base(tmp_path):
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    model, adapter, _ = single(layer, "loldu", rank=4)
    stirred(adapter)
    y = model(x)
    assert {k: tuple(v.shape) for k, v in adapter.state().items()} == {"0.z": (4,), "0.order": (7,), "0.scale": ()}
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)
    other = nn.Sequential(nn.Linear(9, 7))
    with pytest.raises(UserError, match="another base"):
        veneer.load(other, tmp_path / "kept")


def test_factors_follow_the_order_of_the_file_where_pivoting_went_another_way():
    W = torch.randn(4, 6)
    _, adapter, d = single(linear(W), "loldu", rank=3)
    put(d, z=[0.3, -0.2, 0.1])
    state = clone(adapter.state())
    state["0.order"] = state["0.order"].roll(1)
    adapter.load_state(state)
    M = W[d.order.long()].double()
    assert torch.equal(d.order, state["0.order"])
    assert torch.allclose(d.D[1].double(), M[1, 1] - M[1, 0] * M[0, 1] / M[0, 0], atol=1e-5)
    L = torch.empty(4, 3).double()
    L[:, 0] = M[:, 0] / M[0, 0]
    assert torch.allclose(d.L[d.order.long(), 0].double(), L[:, 0], atol=1e-5)


def test_a_weight_of_low_rank_starts_at_the_base_with_finite_factors():
    W = torch.zeros(5, 6)
    W[:, :2] = torch.tensor([1.0, 2.0, -1.0, 3.0, 0.0])[:, None]
    model, adapter, _ = single(linear(W), "loldu")
    x = torch.randn(3, 6)
    assert torch.equal(model(x), x @ W.T)
    stirred(adapter)
    assert torch.isfinite(model(x)).all()


def test_the_input_is_not_kept():
    model, adapter, _ = single(nn.Linear(9, 7), "loldu", rank=2)
    stirred(adapter)
    x, kept = torch.randn(50, 9, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
