"""SST against its sheet's oracles (044)."""

import sys
from pathlib import Path

import pytest
import torch
from single import gradients, linear, single, stirred
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.deltas.sst import probabilities
from veneer.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

from breaks import goes_on_bit_for_bit, training

LAYERS = {
    "linear": (lambda: nn.Linear(9, 7), lambda: torch.randn(4, 9)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), lambda: torch.randn(4, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (4, 2))),
}


def started(recipe, layer=None, steps=12, rank=2, **options):
    """A layer under SST as training begins: the adapter with its optimiser, the delta and the hook."""
    _, adapter, d = single(nn.Linear(9, 7) if layer is None else layer, recipe, rank=rank, **options)
    adapter.optimizer = torch.optim.AdamW(adapter.optimizer_groups(), lr=1e-2, weight_decay=0.1)
    adapter.hooks[0].on_start(adapter, Schedule(steps, 1e-2))
    return adapter, d, adapter.hooks[0]


def stepped(adapter, hook, step, x):
    hook.before_step(step)
    adapter.optimizer.zero_grad()
    (adapter.model(x) - 1).square().mean().backward()
    adapter.optimizer.step()
    hook.after_step(step)


@pytest.mark.parametrize("kind", LAYERS)
def test_it_starts_at_the_base_and_folds(kind):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y = layer(x)
    model, adapter, d = single(layer, "sst", rank=2)
    assert torch.allclose(model(x), y, atol=1e-5)
    stirred(adapter)
    d.project()
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)


def test_probabilities_are_the_sheets_oracle_2():
    assert probabilities(torch.tensor([4.0, 2.0, 1.0, 1.0])).tolist() == [0.375, 0.25, 0.1875, 0.1875]
    assert probabilities(torch.zeros(4)).tolist() == [0.25] * 4


def test_visits_follow_the_probabilities():
    _, d, _ = started("sst", linear(torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))), rank=1)
    visits = torch.zeros(4)
    for index in range(600):
        d.draw(index)
        visits[d.active] += 1
    expected = 600 * probabilities(d.sigma.detach())
    assert ((visits - expected).square() / expected).sum() < 16.27  # χ² of 3 degrees at 0.1 %


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("gradient", ["plain", "enhanced"])
def test_gradients_are_the_formulas_in_the_weights_gradient(kind, gradient):
    make, example = LAYERS[kind]
    model, adapter, d = single(make(), f"sst(gradient='{gradient}')", rank=2)
    stirred(adapter)
    x = example()
    if x.is_floating_point():
        x.requires_grad_()
    W = d.fold(None, None)[0].detach().requires_grad_()
    wanted = (W, x) if x.is_floating_point() else (W,)
    (G, *gx) = gradients(d.site.run(x, W, d.site.bias()), *wanted)
    found = gradients(model(x), d.sigma, d.u, d.v, *wanted[1:])
    active, factor = d.active, d.sigma[d.active].detach() if gradient == "plain" else torch.ones(2)
    U, V = d.U.index_copy(1, active, d.u), d.Vh.index_copy(0, active, d.v)
    expected = ((U.T @ G @ V.T).diag(), factor * (G @ d.v.T), factor[:, None] * (d.u.T @ G), *gx)
    for mine, oracle in zip(found, expected, strict=True):
        assert torch.allclose(mine, oracle, atol=2e-4), (mine - oracle).abs().max()


def test_within_an_iteration_the_other_vectors_stand_still_and_the_constraints_hold():
    adapter, d, hook = started("sst+sst-rounds(steps=4)")
    x, before = torch.randn(8, 9), (d.U.clone(), d.Vh.clone(), d.active.clone())
    for step in range(4):
        stepped(adapter, hook, step, x)
        assert torch.allclose(d.u.norm(dim=0), torch.ones(2)) and torch.allclose(d.v.norm(dim=1), torch.ones(2))
        assert (d.sigma >= 0).all()
    assert torch.equal(d.U, before[0]) and torch.equal(d.Vh, before[1]) and torch.equal(d.active, before[2])
    assert len(d.active.unique()) == 2 and not torch.equal(d.u, d.U[:, d.active])


def test_optimiser_state_is_of_the_values_and_the_active_vectors_alone():
    adapter, d, hook = started("sst")
    stepped(adapter, hook, 0, torch.randn(8, 9))
    sizes = [v.numel() for s in adapter.optimizer.state.values() for k, v in s.items() if k == "exp_avg"]
    assert sum(sizes) == d.parameter_count() == adapter.parameter_count() == 7 + 2 * (9 + 7)
    assert all(g["weight_decay"] == 0 for g in adapter.optimizer.param_groups)


def test_an_iteration_takes_other_vectors_with_fresh_moments_and_the_same_function():
    adapter, d, hook = started("sst+sst-rounds(steps=3, iterations=9)")
    x = torch.randn(8, 9)
    for step in range(3):
        stepped(adapter, hook, step, x)
    y, active = adapter.model(x), d.active.clone()
    hook.before_step(3)
    assert not torch.equal(d.active, active) and torch.allclose(adapter.model(x), y, atol=1e-5)
    assert d.u not in adapter.optimizer.state and d.v not in adapter.optimizer.state
    assert adapter.optimizer.state[d.sigma]["step"] == 3
    assert [round(hook.rate({"spectral": True}, s), 3) for s in (0, 3)] == [1.0, 1.0]


def test_a_round_decomposes_anew_without_changing_the_function():
    adapter, d, hook = started("sst+sst-rounds(steps=2, iterations=1)")
    x = torch.randn(8, 9)
    for step in range(2):
        stepped(adapter, hook, step, x)
    d.store()
    y, gram = adapter.model(x), d.U.T @ d.U
    assert not torch.allclose(gram, torch.eye(7), atol=1e-3)
    hook.before_step(2)
    assert torch.allclose(adapter.model(x), y, atol=1e-5)
    assert torch.allclose(d.U.T @ d.U, torch.eye(7), atol=1e-5)
    assert torch.allclose(d.Vh @ d.Vh.T, torch.eye(7), atol=1e-5)
    assert torch.allclose(d.sigma, torch.linalg.svdvals(d.fold(None, None)[0]), atol=1e-5)
    assert not adapter.optimizer.state


def test_rates_rise_at_the_start_of_each_iteration():
    _, _, hook = started("sst+sst-rounds(steps=10, warmup=3)")
    assert [hook.rate({"spectral": True}, s) for s in (0, 1, 2, 3, 9, 10)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.25]
    assert hook.rate({}, 0) == 1.0
    _, _, hook = started("sst", steps=5000)
    assert hook.every == 200 and hook.rate({"spectral": True}, 0) == pytest.approx(1 / 21)


def test_a_normalised_step_gains_nothing_along_the_vector():
    _, d, _ = started("sst", rank=1)
    g, u = torch.randn(7), d.u.detach()[:, 0].clone()
    with torch.no_grad():
        d.u.sub_(1e-3 * g[:, None])
    d.project()
    expected = u - 1e-3 * (g - u * (u @ g))
    assert torch.allclose(d.u[:, 0], expected, atol=2e-5)


def test_with_no_vectors_the_values_alone_train_and_with_all_of_them_the_factorisation():
    adapter, d, hook = started("sst", rank=0)
    assert adapter.parameter_count() == 7
    stepped(adapter, hook, 0, torch.randn(8, 9))
    model, adapter, d = single(nn.Linear(9, 7, bias=False), "sst(gradient='plain')", rank=64)
    assert adapter.parameter_count() == 7 + 7 * (9 + 7)
    U, S, V = (t.detach().clone().requires_grad_() for t in (d.u, d.sigma, d.v))
    x = torch.randn(4, 9)
    for ours, theirs in zip(gradients(model(x), d.u, d.sigma, d.v), gradients(x @ V.T * S @ U.T, U, S, V)):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_base_may_go():
    model = nn.Sequential(nn.Linear(9, 7))
    x = torch.randn(3, 9)
    y = model(x)
    adapter = veneer.attach(model, "sst", rank=2, sites="all", keep_base=False)
    assert model[0].weight.numel() == 0 and torch.allclose(model(x), y, atol=1e-5)
    assert torch.allclose(adapter.bake()(x), y, atol=1e-5)


def test_a_resumed_run_draws_the_same_vectors():
    make = lambda: training("sst+sst-rounds(steps=2, iterations=2)", rank=2, lr=1e-2)  # noqa: E731
    assert goes_on_bit_for_bit(make, before=3, after=3)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="grouped convolution"):
        single(nn.Conv2d(4, 6, 3, groups=2), "sst", rank=2)
    with pytest.raises(UserError, match="for the form sst"):
        single(nn.Linear(9, 7), "lora+sst-rounds", rank=2)
