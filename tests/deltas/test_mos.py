"""MoS against its sheet's oracles (011)."""

import pytest
import torch
from single import single, stirred
from torch import nn

import veneer
from veneer.errors import UserError


class Stack(nn.Module):
    """Square layers of one role, one after the other."""

    def __init__(self, layers=3, width=8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def stack(recipe="mos", layers=3, width=8, **options):
    model = Stack(layers, width)
    adapter = veneer.attach(model, recipe, sites="all", **options)
    (name,) = adapter.shared.sizes
    return model, adapter, adapter.shared, name


def test_the_sheets_layout_of_shards():
    _, _, delta = single(nn.Linear(6, 6), "mos(active=2, private=0, shards=2)", rank=6)
    pool, (name,) = delta.pool, delta.pool.sizes
    with torch.no_grad():
        pool.A[name].copy_(torch.arange(36.0).view(12, 3))
        pool.B[name].copy_(torch.arange(36.0).view(12, 3))
        for side in "AB":
            getattr(pool, f"I_{side}_{name}")[0] = torch.tensor([4, 1, 0, 5])
    rows = [[12.0, 13, 14, 3, 4, 5], [0.0, 1, 2, 15, 16, 17]]
    assert delta.pair().A.tolist() == rows and delta.pair().B.T.tolist() == rows


def test_it_starts_at_the_base_and_folds_exactly():
    model, adapter, _, _ = stack(rank=2)
    x = torch.randn(4, 8)
    with adapter.disabled():
        y0 = model(x)
    assert torch.equal(model(x), y0)
    stirred(adapter)
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)


@pytest.mark.parametrize("shards", [1, 4])
def test_with_everything_private_it_is_lora(shards):
    model, adapter, pool, name = stack(f"mos(private=2, shards={shards}, alpha=2.0)", rank=2)
    twin = Stack()
    twin.load_state_dict(model.state_dict())
    lora = veneer.attach(twin, "lora", rank=2, alpha=2.0, sites="all")
    stirred(adapter)
    for own, other in zip(adapter.deltas.values(), lora.deltas.values()):
        with torch.no_grad():
            other.A.copy_(own.pair().A), other.B.copy_(own.pair().B)
    x = torch.randn(4, 8)
    assert torch.allclose(model(x), twin(x), atol=1e-6)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    grads = torch.stack([d.A.grad for d in lora.deltas.values()])
    own = pool.A[name].grad[getattr(pool, f"I_A_{name}")].view_as(grads)
    assert torch.allclose(own, grads, atol=1e-4)


@pytest.mark.parametrize("fields", ["", "active=4", "active=3, shards=2, private=0"])
def test_the_count_depends_on_the_equivalent_rank_alone(fields):
    _, adapter, _, _ = stack(f"mos({fields})", rank=2)
    assert adapter.parameter_count() == 2 * 3 * (8 + 8) == sum(d.parameter_count() for d in adapter.deltas.values())


def test_public_rows_are_distinct_and_dissociated_and_private_rows_are_a_layers_own():
    _, _, pool, name = stack("mos(active=9)", layers=8, rank=2)
    A, B = (getattr(pool, f"I_{side}_{name}") for side in "AB")
    public = (2 - 1) * 8 * 4
    for j in range(8):
        for I in (A[j], B[j]):
            assert len(set(I.tolist())) == 9 * 4
            assert I[:-4].max() < public and I[-4:].tolist() == list(range(public + 4 * j, public + 4 * j + 4))
        assert not torch.equal(A[j][:-4], B[j][:-4])


def test_a_shards_gradient_is_the_sum_over_its_uses():
    model, adapter, pool, name = stack(rank=2)
    stirred(adapter)
    x = torch.randn(4, 8)
    model(x).square().sum().backward()
    I, n = getattr(pool, f"I_A_{name}"), len(pool.A[name])
    dense = pool.A[name].detach().clone().requires_grad_()
    h = x
    for d, rows in zip(adapter.deltas.values(), I):
        A = (nn.functional.one_hot(rows, n).float() @ dense).view(-1, 8)
        W = d.site.weight() + d.scale * d.pair().B.detach() @ A
        h = nn.functional.linear(h, W, d.site.bias())
    (expected,) = torch.autograd.grad(h.square().sum(), dense)
    assert torch.allclose(pool.A[name].grad, expected, atol=1e-3, rtol=1e-4)


def test_private_rows_get_no_gradient_from_another_layer():
    model, adapter, pool, name = stack(rank=2)
    stirred(adapter)
    model.layers[0](torch.randn(4, 8)).sum().backward()
    public = (2 - 1) * 3 * 4
    grad = pool.A[name].grad
    assert grad[public : public + 4].any() and not grad[public + 4 :].any()


def test_few_public_rows_are_never_used():
    _, _, pool, name = stack("mos(active=8)", layers=32, width=4, rank=2)
    public = (2 - 1) * 32 * 4
    unused = 1 - len({i for i in getattr(pool, f"I_A_{name}").flatten().tolist() if i < public}) / public
    assert unused < 4 * (1 - 7 * 4 / public) ** 32 + 2 / public


def test_pairs_are_put_together_once_a_forward():
    model, _, pool, _ = stack(rank=2)
    calls, own = [], pool.pairs
    pool.pairs = lambda *a: calls.append(a) or own(*a)
    model(torch.randn(4, 8)).sum().backward()
    assert len(calls) == 1


def test_indices_stay_whole_numbers_and_come_back_from_the_file(tmp_path):
    model, adapter, pool, name = stack(rank=2)
    stirred(adapter)
    x = torch.randn(4, 8)
    y, I = model(x), getattr(pool, f"I_A_{name}").clone()
    adapter.save(tmp_path / "kept")
    adapter.detach()
    again = veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)
    model.to(torch.bfloat16)
    assert torch.equal(getattr(again.shared, f"I_A_{name}"), I)


def test_layers_that_the_shards_do_not_divide_take_fewer():
    _, _, delta = single(nn.Linear(9, 6), "mos", rank=2)
    assert delta.pair().A.shape == (2, 9)  # one layer: nothing to share, r = e
    assert {p.shape[1] for p in delta.pool.parameters()} == {3, 2}


def test_budgets_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="active=8 at the 3 layers of role other must lie between private=1 and 4"):
        stack("mos(active=8)", rank=2)
    with pytest.raises(UserError, match="private=3 is more than rank=2"):
        stack("mos(private=3)", rank=2)
