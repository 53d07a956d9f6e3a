"""Maestro against its sheet's oracles (041)."""

import sys
from pathlib import Path

import pytest
import torch
from single import linear, put, single, stirred
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.deltas.maestro import cut, norms
from veneer.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

from breaks import goes_on_bit_for_bit, training

LAYERS = {
    "linear": (lambda: nn.Linear(9, 7), (4, 9)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("replace", [False, True])
def test_it_starts_at_the_base_runs_its_factors_and_folds(kind, replace):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    y = layer(x)
    model, adapter, d = single(layer, f"maestro(replace={replace})")
    assert torch.allclose(model(x), y, atol=1e-5)
    stirred(adapter)
    expected = d.B @ d.A + (0 if replace else d.site.weight())
    assert torch.allclose(model(x), d.site.run(x, expected, layer.bias), atol=1e-5)
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)


@pytest.mark.parametrize("replace", [False, True])
def test_a_width_takes_the_leading_components_in_training_alone(replace):
    model, adapter, d = single(nn.Linear(9, 7), f"maestro(replace={replace}, rank=5)")
    stirred(adapter)
    x = torch.randn(4, 9)
    y = model.eval()(x)
    d.width = 2
    assert torch.equal(model(x), y)
    W = d.B[:, :2] @ d.A[:2] + (0 if replace else model[0].weight)
    assert torch.allclose(model.train()(x), x @ W.T + model[0].bias, atol=1e-5)


def test_norms_penalty_and_importance_are_the_sheets_oracle_3():
    _, adapter, d = single(linear(torch.eye(2)), "maestro+maestro-ranks(penalty=1)", rank=2)
    put(d, A=[[3, 0], [0, 1]], B=[[2, 0], [0, 1]])
    assert norms(d.A, 0).tolist() == pytest.approx([3.16228, 1.0], abs=1e-5)
    assert norms(d.B, 1).tolist() == pytest.approx([2.23607, 1.0], abs=1e-5)
    assert d.importance().tolist() == pytest.approx([7.07107, 1.0], abs=1e-5)
    assert adapter.hooks[0].loss(None, None, None).item() == pytest.approx(7.39835, abs=1e-5)
    assert norms(d.A, 0, hierarchical=False).tolist() == pytest.approx([3.0, 1.0], abs=1e-5)


def test_the_penalty_of_a_start_at_zero_has_a_gradient_that_is_a_number():
    _, adapter, d = single(nn.Linear(5, 4), "maestro", rank=3)
    adapter.hooks[0].loss(None, None, None).backward()
    assert torch.isfinite(d.A.grad).all() and not d.B.grad.any()


def test_learning_all_widths_recovers_the_singular_vectors_in_order():
    draw = torch.Generator().manual_seed(0)
    Q, R = (torch.linalg.qr(torch.randn(3, 3, generator=draw)).Q for _ in range(2))
    M = Q @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ R
    model, adapter, d = single(linear(torch.randn(3, 3, generator=draw)), "maestro(replace=True)")
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.1)
    for _ in range(300):
        losses = []
        for d.width in (1, 2, 3):
            losses.append((model(torch.eye(3)).T - M).square().sum())
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sizes = (d.A.norm(dim=1) * d.B.norm(dim=0)).tolist()
    assert loss.item() == pytest.approx(2.0, abs=1e-3) and sizes == pytest.approx([3.0, 2.0, 1.0], abs=1e-2)
    assert torch.allclose((nn.functional.normalize(d.B, dim=0).T @ Q).abs(), torch.eye(3), atol=2e-2)


def three():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))


def started(recipe, **options):
    adapter = veneer.attach(three(), recipe, **options)
    adapter.optimizer = torch.optim.AdamW(adapter.optimizer_groups(), lr=1e-2)
    adapter.hooks[0].on_start(adapter, Schedule(20, 1e-2))
    return adapter, adapter.hooks[0]


def test_a_pass_meets_every_layer_at_every_width_once():
    adapter, hook = started("maestro", rank=3)
    seen = []
    for step in range(12):
        hook.before_step(step)
        seen += [(path, d.width) for path, d in adapter.deltas.items() if d.width is not None]
        hook.after_backward(step)
        assert all(d.width is None for d in adapter.deltas.values())
    every = sorted((path, w) for path in ("0", "2") for w in (1, 2, 3))
    assert sorted(seen[:6]) == sorted(seen[6:]) == every and seen[:6] != seen[6:]


def test_across_layers_each_has_a_width_and_none_has_none():
    adapter, hook = started("maestro+maestro-ranks(sampler='across-layers')", rank=5)
    widths = set()
    for step in range(40):
        hook.before_step(step)
        widths.update((path, d.width) for path, d in adapter.deltas.items())
    assert widths == {(path, w) for path in ("0", "2") for w in range(1, 6)}
    adapter, hook = started("maestro+maestro-ranks(sampler='none')", rank=5)
    hook.before_step(0)
    assert all(d.width is None for d in adapter.deltas.values())


def test_without_penalty_and_sampling_it_is_training_the_product():
    adapter, hook = started("maestro(replace=True)+maestro-ranks(sampler='none', penalty=0)")
    model, x = adapter.model, torch.randn(16, 8)
    twin = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    biases = [model[0].bias, model[2].bias]
    theirs = torch.optim.AdamW(twin, lr=1e-2)
    for step in range(5):
        hook.before_step(step)
        for opt in (adapter.optimizer, theirs):
            opt.zero_grad()
        model(x).square().sum().backward()
        h = torch.relu(x @ twin[0].T @ twin[1].T + biases[0]) @ twin[2].T @ twin[3].T + biases[1]
        h.square().sum().backward()
        assert hook.loss(None, None, None) is None
        for opt in (adapter.optimizer, theirs):
            opt.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(adapter.parameters(), twin))


def test_components_that_do_nothing_go_from_the_end_with_their_state():
    adapter, hook = started("maestro+maestro-ranks(threshold=1e-3)", rank=4)
    model, x = adapter.model, torch.randn(3, 8)
    stirred(adapter)
    model(x).square().sum().backward()
    adapter.optimizer.step()
    first, second = adapter.deltas.values()
    moments = adapter.optimizer.state[first.B]["exp_avg"].clone()
    put(first, A=first.A * torch.tensor([1.0, 1e-9, 1.0, 1e-9])[:, None], B=first.B * torch.tensor([1, 1, 1, 1e-9]))
    y = model(x)
    hook.on_epoch(0)
    assert (first.rank, second.rank) == (3, 4) and first.A.shape == (3, 8) and first.scale == 1.0
    assert torch.equal(adapter.optimizer.state[first.B]["exp_avg"], moments[:, :3])
    assert torch.allclose(model(x), y, atol=1e-6)
    hook.before_step(0)
    assert {
        k: [w for j, w in hook.order if j == k] != [] and max(w for j, w in hook.order if j == k) for k in (0, 1)
    } == {
        0: 3,
        1: 4,
    }


@pytest.mark.parametrize("replace", [False, True])
def test_a_layer_without_components_gives_the_bias_or_the_base(replace):
    model, adapter, d = single(nn.Linear(9, 7), f"maestro(replace={replace}, rank=4)")
    hook = adapter.hooks[0]
    put(d, A=d.A * 1e-9, B=torch.full_like(d.B, 1e-9))
    hook.on_epoch(0)
    assert d.rank == 0 and adapter.parameter_count() == 0
    x = torch.randn(3, 9, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert torch.equal(
        y, model[0].bias.expand(3, 7) if replace else nn.functional.linear(x, model[0].weight, model[0].bias)
    )
    if replace:
        hook.on_end()
    else:
        with pytest.warns(UserWarning, match="no component is left"):
            hook.on_end()


def test_a_site_without_components_is_taken_off_at_the_end():
    adapter, hook = started("maestro", rank=2)
    stirred(adapter)
    put(adapter.deltas["0"], A=torch.zeros(2, 8))
    hook.on_end()
    assert list(adapter.deltas) == ["2"]


def test_cutting_keeps_the_components_that_matter_most():
    adapter, _ = started("maestro", rank=3)
    first, second = adapter.deltas.values()
    put(first, A=torch.eye(8)[:3], B=torch.eye(6)[:, :3] * torch.tensor([9.0, 8.0, 7.0]))
    put(second, A=torch.eye(6)[:3], B=torch.eye(5)[:, :3] * torch.tensor([3.0, 2.0, 1.0]))
    assert cut(adapter, 4 / 6) == {"0": 3, "2": 1}


def test_a_resumed_run_takes_the_same_widths():
    make = lambda: training("maestro+maestro-ranks(penalty=1e-3)", rank=2, lr=1e-2)  # noqa: E731
    assert goes_on_bit_for_bit(make)


def test_the_base_may_go_and_what_is_left_is_the_product():
    model = nn.Sequential(nn.Linear(9, 7))
    x = torch.randn(3, 9)
    y = model(x)
    adapter = veneer.attach(model, "maestro(replace=True)", sites="all", keep_base=False)
    assert model[0].weight.numel() == 0 and torch.allclose(model(x), y, atol=1e-5)
    assert torch.allclose(adapter.bake()(x), y, atol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="stands for W and takes no start"):
        single(nn.Linear(9, 7), "maestro(replace=True)+pissa", rank=4)
    with pytest.raises(UserError, match="for the form maestro"):
        single(nn.Linear(9, 7), "lora+maestro-ranks", rank=4)
