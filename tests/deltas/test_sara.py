"""SaRA against its sheet's oracles (022)."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.deltas.sara import nuclear_subgradient, official_rate, quantile
from veneer.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

from breaks import goes_on_bit_for_bit, training

PLAIN = "sara+sara-progress(at=None, nuclear=0)"
LAYERS = {
    "linear": (lambda: nn.Linear(9, 7), lambda: torch.randn(4, 9)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), lambda: torch.randn(2, 4, 7, 7)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (4, 2))),
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 5))


def trained(recipe, steps=10, lr=0.05, model=None, observe=lambda adapter: None):
    """A small regression by AdamW with decay, hooks at their points."""
    model = mlp() if model is None else model
    adapter = veneer.attach(model, recipe)
    hook, x, goal = adapter.hooks[0], torch.randn(16, 9), torch.randn(16, 5)
    adapter.optimizer = torch.optim.AdamW(adapter.optimizer_groups(), lr=lr, weight_decay=0.1)
    hook.on_start(adapter, Schedule(steps, lr))
    for step in range(steps):
        hook.before_step(step)
        adapter.optimizer.zero_grad()
        (model(x) - goal).square().mean().backward()
        hook.after_backward(step)
        adapter.optimizer.step()
        hook.after_step(step)
        observe(adapter)
    return adapter


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_base_at_the_start_and_changes_the_small_entries_alone(kind):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y, W = layer(x), layer.weight.detach().clone()
    model, adapter, d = single(layer, "sara(threshold=0.05)")
    assert torch.equal(model(x), y)
    stirred(adapter)
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)
    assert torch.equal(layer.weight != W, W.abs() < 0.05) and adapter.parameter_count() == (W.abs() < 0.05).sum()
    folded = d.site.weight().flatten()[d.indices.long()]
    assert torch.equal(folded, d.w)
    adapter.unfold()
    assert torch.equal(layer.weight, W)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradient_is_the_weights_at_the_entries(kind):
    make, example = LAYERS[kind]
    model, adapter, d = single(make(), "sara(share=0.3)")
    stirred(adapter)
    x = example()
    W = d.fold(d.site.weight().detach(), None)[0].requires_grad_()
    x = x.requires_grad_() if x.is_floating_point() else x
    wanted = (x,) if x.is_floating_point() else ()
    G, *gx = gradients(d.site.run(x, W, d.site.bias()), W, *wanted)
    g, *mine = gradients(model(x), d.w, *wanted)
    assert torch.allclose(g, G.flatten()[d.indices.long()], atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, gx, strict=True))


def test_over_another_adapter_the_change_is_the_same():
    model, below, _ = single(nn.Linear(9, 7), "lora", rank=2, name="below")
    stirred(below)
    x = torch.randn(4, 9)
    y, beneath = model(x), model[0].weight + next(iter(below.deltas.values())).weight()
    adapter = veneer.attach(model, "sara(share=0.3)", sites="all", name="above")
    assert torch.equal(model(x), y)
    stirred(adapter)
    W, b = adapter.deltas["0"].fold(beneath, model[0].bias)
    assert torch.allclose(model(x), x @ W.T + b, atol=1e-5)


def test_one_threshold_leaves_a_share_of_all_weights_below_it():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(0.1)
    every = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).abs()
    adapter = veneer.attach(model, "sara(share=0.25)")
    first, second = adapter.deltas.values()
    assert adapter.parameter_count() == round(0.25 * len(every)) == (every < first.limit).sum()
    assert len(second.indices) > 4 * len(first.indices)
    own = veneer.attach(mlp(), "sara(share=0.25, scope='tensor')").deltas.values()
    assert [len(d.indices) for d in own] == [27, 15]
    assert quantile([torch.ones(3)], 1.0) == float("inf")


def test_a_layer_of_large_weights_trains_its_smallest_entry():
    model = mlp()
    with torch.no_grad():
        model[2].weight.add_(5)
    d = veneer.attach(model, "sara").deltas["2"]
    assert d.indices.tolist() == [int(model[2].weight.argmin())]


def test_with_every_entry_it_is_training_the_weight_by_adamw():
    layer, x, goal = nn.Linear(9, 5, bias=False), torch.randn(16, 9), torch.randn(16, 5)
    plain = copy.deepcopy(layer)
    model, adapter, d = single(layer, "sara(share=1.0)+sara-progress(at=None, nuclear=0)")
    ours, theirs = (torch.optim.AdamW(p, lr=0.01, weight_decay=0.1) for p in (adapter.parameters(), plain.parameters()))
    for _ in range(20):
        for net, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            (net(x) - goal).square().mean().backward()
            optimizer.step()
    assert torch.allclose(d.w.view(5, 9), plain.weight, atol=1e-5)


def test_it_is_full_adamw_with_the_other_entries_put_back():
    model, plain = mlp(), mlp()
    torch.manual_seed(1)
    adapter = trained(PLAIN.replace("sara+", "sara(share=0.3)+"), steps=20, model=model)
    limit, start = adapter.deltas["0"].limit, [plain[i].weight.detach().clone() for i in (0, 2)]
    optimizer = torch.optim.AdamW([plain[0].weight, plain[2].weight], lr=0.05, weight_decay=0.1)
    torch.manual_seed(1)
    x, goal = torch.randn(16, 9), torch.randn(16, 5)
    for _ in range(20):
        optimizer.zero_grad()
        (plain(x) - goal).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for p, W in zip((plain[0].weight, plain[2].weight), start):
                p.copy_(torch.where(W.abs() < limit, p, W))
    for d, p in zip(adapter.deltas.values(), (plain[0].weight, plain[2].weight)):
        assert torch.allclose(d.fold(d.site.weight(), None)[0], p, atol=1e-5)


def test_after_the_new_selection_only_entries_that_are_still_small_move():
    seen = []
    adapter = trained(
        "sara(share=0.5)+sara-progress(at=0.4, nuclear=0)",
        observe=lambda a: seen.append([d.w.detach().clone() for d in a.deltas.values()]),
    )
    for k, d in enumerate(adapter.deltas.values()):
        small = seen[3][k].abs() < d.limit
        assert small.any() and not small.all()
        assert torch.equal(seen[9][k][~small], seen[3][k][~small]) and (seen[9][k] != seen[3][k])[small].all()


def test_the_rate_follows_the_threshold_as_published():
    assert official_rate(1e-3) == pytest.approx(7.0469e-4, abs=1e-8)
    assert official_rate(2e-3) == pytest.approx(4.9659e-4, abs=1e-8)
    assert single(nn.Linear(40, 40), "sara(threshold=2e-3)").delta.usual_rate == official_rate(2e-3)
    assert single(nn.Linear(40, 40), "sara").delta.usual_rate is None


def test_the_nuclear_subgradient_is_the_sheets_oracle_4():
    P = torch.diag(torch.tensor([3.0, -2.0]))
    assert torch.allclose(nuclear_subgradient(P), torch.diag(torch.tensor([1.0, -1.0])), atol=1e-6)
    for shape in ((6, 9), (9, 6)):
        P = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(torch.linalg.svdvals(P).sum(), P)
        assert torch.allclose(nuclear_subgradient(P.detach()), slope, atol=1e-9)


def test_the_nuclear_term_is_added_at_the_entries_of_one_matrix_and_lowers_the_norm():
    recipe = "sara(share=0.9)+sara-progress(at=None, nuclear=0.5, smallest=4)"
    layer = linear(torch.randn(16, 12))
    _, adapter, d = single(layer, recipe)
    hook, norms = adapter.hooks[0], []
    for step in range(40):
        d.w.grad = torch.zeros_like(d.w)
        hook.after_backward(step)
        assert torch.allclose(d.w.grad, 0.5 * nuclear_subgradient(d.selected()).flatten()[d.indices.long()], atol=1e-6)
        put(d, w=d.w - 0.1 * d.w.grad)
        norms.append(float(torch.linalg.matrix_norm(d.selected().detach(), "nuc")))
    assert norms == sorted(norms, reverse=True) and norms[-1] < 0.9 * norms[0]
    _, small, e = single(linear(torch.randn(16, 12)), recipe.replace("smallest=4", "smallest=12"))
    e.w.grad = torch.zeros_like(e.w)
    small.hooks[0].after_backward(0)
    assert not e.w.grad.any()


def test_a_saved_adapter_comes_back_bit_for_bit_and_not_on_another_base(tmp_path):
    model = mlp()
    adapter = trained(PLAIN, steps=3, model=model)
    x = torch.randn(4, 9)
    y = model(x)
    adapter.save(tmp_path / "kept")
    fresh = mlp()
    veneer.load(fresh, tmp_path / "kept")
    assert torch.equal(fresh(x), y)
    other = mlp()
    with torch.no_grad():
        other[0].weight.mul_(2)
    with pytest.raises(UserError, match="another base"):
        veneer.load(other, tmp_path / "kept")
    with pytest.raises(UserError, match="has shape"):
        veneer.load(other, tmp_path / "kept", force=True)


def test_what_training_keeps_is_the_input_and_not_a_weight():
    model, adapter, _ = single(nn.Linear(64, 48), "sara")
    kept, x = [], torch.randn(8, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    own = {model[0].weight.data_ptr(), x.data_ptr()}
    assert max(t.numel() for t in kept if t.data_ptr() not in own) == adapter.parameter_count()


def test_a_resumed_run_holds_the_same_entries():
    make = lambda: training("sara(share=0.3)+sara-progress(at=0.25, smallest=8)", lr=1e-2)  # noqa: E731
    assert goes_on_bit_for_bit(make, before=4, after=2)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"no selected weight is below threshold=1e-09; the smallest is 1"):
        single(linear(torch.ones(3, 3)), "sara(threshold=1e-9)")
    with pytest.raises(UserError, match="for the form sara"):
        single(nn.Linear(9, 7), "lora+sara-progress", rank=2)
