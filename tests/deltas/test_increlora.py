"""IncreLoRA against the numbers of its sheet (061) and an explicit ΔW."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.numerics.norms import importance_score
from veneer.parts.restore import attach_from
from veneer.parts.state import clone, load_state

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

from breaks import goes_on_bit_for_bit, training
from growing import begun, stirred
from small_runs import encoded, llama

FAST = "increlora+increlora-ranks(rank=3, block=1, top=2, wait=0, interval=1)"


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))


def started(recipe=FAST, model=None, **options):
    return begun(mlp() if model is None else model, recipe, **options)


def test_it_starts_at_the_base_and_the_waiting_components_are_within_the_sheets_bound():
    model, x = mlp(), torch.randn(4, 8)
    base = model[0](x)
    adapter, _ = started(model=model)
    d = adapter.deltas["0"]
    bound = d.scale * 1e-5 * d.A1.norm() * d.B1.norm() * x.norm(dim=1, keepdim=True)
    change = (model[0](x) - base).abs()
    assert change.max() > 0 and (change <= bound + 1e-6).all()
    plain = mlp()
    started(FAST.replace("top", "advance=False, top"), plain)
    assert torch.equal(plain[0](x), base)


def test_the_score_is_the_sheets_oracle_2():
    change, G = torch.tensor([[1.0, -2.0], [0.0, 0.5]]), torch.tensor([[0.1, 0.2], [0.3, -0.4]])
    assert importance_score(change, G).item() == pytest.approx(0.35)
    assert importance_score(change, G, "mean").item() == pytest.approx(0.175)


def test_the_averages_are_the_sheets_oracle_3():
    _, hook = started(FAST.replace("wait=0", "wait=19"), steps=40)
    for S, smooth, spread in ((2.0, 0.3, 0.255), (1.0, 0.405, 0.306)):
        hook.listener.seen = {"0": torch.tensor(S)}
        hook.before_optimizer(0)
        assert hook.sensitivity["0"] == pytest.approx(smooth) and hook.uncertainty["0"] == pytest.approx(spread)
    assert hook.sensitivity["2"] == 0.0


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(6, 4), torch.randn(5, 6)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 5, 5)),
        (nn.Embedding(7, 4), torch.tensor([[1, 2, 2], [0, 6, 1]])),
    ],
    ids=["linear", "conv", "embedding"],
)
def test_the_gradient_made_from_activations_is_that_of_an_explicit_change(layer, x):
    model = nn.Sequential(layer)
    adapter, hook = started(model=model, sites="all")
    stirred(adapter)
    d = adapter.deltas["0"]
    model(x).square().sum().backward()
    change = d.weight().detach().requires_grad_()
    d.site.run(x, d.site.weight() + change, d.site.bias()).square().sum().backward()
    assert hook.listener.seen["0"].item() == pytest.approx(importance_score(change, change.grad).item(), rel=1e-4)


def test_scores_of_micro_batches_add_up_with_their_weights():
    model = mlp()
    adapter, hook = started(model=model)
    stirred(adapter)
    x, found = torch.randn(4, 8), []
    for part in (x[:2], x[2:]):
        hook.listener.seen = {}
        model(part).square().sum().backward()
        found.append(hook.listener.seen["0"].item())
    hook.listener.seen = {}
    for part in (x[:2], x[2:]):
        (0.5 * model(part).square().sum()).backward()
    assert hook.listener.seen["0"].item() == pytest.approx(sum(found) / 2, rel=1e-5)


def test_a_round_changes_the_function_by_the_scale_alone():
    model, x = mlp(), torch.randn(4, 8)
    base = model[0](x)
    adapter, hook = started(FAST.replace("top", "advance=False, top"), model)
    stirred(adapter)
    before = model[0](x) - base
    hook._grow(1)
    assert torch.allclose(model[0](x) - base, before * (1 + 1e-5) / (2 + 1e-5), atol=1e-5)
    fixed, _ = started(FAST.replace("top", "scaling='fixed', top"))
    assert fixed.deltas["0"].scale == pytest.approx(16 / 3, rel=1e-4)


def test_ranks_grow_where_the_importance_is_and_end_at_the_budget():
    adapter, hook = started(FAST.replace("top=2", "top=1").replace("rank=3", "rank=4"))
    totals = []
    for step in range(1, 9):
        hook.listener.seen = {"0": torch.tensor(0.1 * step), "2": torch.tensor(0.01 * step)}
        hook.before_optimizer(step)
        totals.append(sum(d.rank for d in adapter.deltas.values()))
    assert totals == [3, 4, 5, 6, 7, 8, 8, 8]
    assert [d.rank for d in adapter.deltas.values()] == [7, 1]
    assert not any(d.reserve for d in adapter.deltas.values()) and not hook.listener.handles
    assert adapter.parameter_count() == 7 * (8 + 12 + 1) + (12 + 5 + 1)


def test_a_round_that_does_not_fit_the_budget_whole_takes_what_fits():
    adapter, hook = started("increlora+increlora-ranks(rank=4, block=2, top=2, wait=0, interval=1)")
    hook.before_optimizer(1)
    assert [d.rank for d in adapter.deltas.values()] == [3, 3] and hook.room == 1
    hook.before_optimizer(2)
    assert sum(d.rank for d in adapter.deltas.values()) == 8 and hook.room == 0


def test_a_round_is_a_group_with_a_clock_of_its_own():
    adapter, hook = started(steps=20)
    names = [g.get("names") for g in adapter.optimizer.param_groups]
    hook.before_optimizer(5)
    group = adapter.optimizer.param_groups[-1]
    assert set(group["names"]) == {f"{site}.{n}" for site in "02" for n in ("e1", "A2", "B2")}
    assert [g.get("names") for g in adapter.optimizer.param_groups[:-1]] == names
    run = Schedule(20, 1.0, warmup=3)
    start = group["start_step"]
    assert run.factor(start - 1, start) == 0.0 and run.factor(start + 3, start) == 1.0
    assert run.factor(20, start) == 0.0


def test_what_waits_keeps_its_optimiser_state_when_it_is_switched_on():
    model = mlp()
    adapter, hook = started(model=model)
    model(torch.randn(4, 8)).square().sum().backward()
    adapter.optimizer.step()
    d = adapter.deltas["0"]
    moment = adapter.optimizer.state[d.A1]["exp_avg"].clone()
    assert not isinstance(d.e1, nn.Parameter)
    hook.before_optimizer(1)
    assert isinstance(d.e1, nn.Parameter) and d.e1.item() == pytest.approx(1e-5)
    assert torch.equal(adapter.optimizer.state[d.A1]["exp_avg"], moment)


def test_without_growth_it_is_lora_with_a_weight_a_component():
    x, model, plain = torch.randn(4, 8), mlp(), mlp()
    adapter = veneer.attach(model, "increlora+increlora-ranks(orthogonality=0.0)", rank=1)
    lora = veneer.attach(plain, "lora(alpha=16.0)", rank=1)
    stirred(adapter)
    with torch.no_grad():
        for d, twin in zip(adapter.deltas.values(), lora.deltas.values()):
            twin.A.copy_(d.e0[:, None] * d.A0)
            twin.B.copy_(d.B0)
    assert torch.allclose(model(x), plain(x), rtol=1e-4)
    assert adapter.hooks[0].loss(None, None, None) is None


def test_the_penalty_is_the_mean_distance_from_orthonormal():
    adapter = veneer.attach(mlp(), "increlora(start=2)", rank=2)
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.A0.zero_()
            d.B0.copy_(torch.eye(*d.B0.shape))
    assert adapter.hooks[0].loss(None, None, None).item() == pytest.approx(0.1 * 2**0.5 / 2)


def test_a_grown_adapter_saves_folds_and_comes_back():
    model, x = mlp(), torch.randn(4, 8)
    adapter, hook = started(model=model)
    for step in (1, 2):
        hook.listener.seen = {"2": torch.tensor(float(step))}
        hook.before_optimizer(step)
    stirred(adapter)
    hook.on_end()
    expected = model(x)
    fresh = mlp()
    again = attach_from(fresh, adapter.description(), clone(adapter.state()))
    assert torch.equal(fresh(x), expected)
    assert [d.rank for d in again.deltas.values()] == [d.rank for d in adapter.deltas.values()] == [3, 3]
    adapter.fold()
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_state_from_before_a_round_can_be_taken_again():
    model, x = mlp(), torch.randn(4, 8)
    adapter, hook = started(model=model)
    stirred(adapter)
    early, expected = clone(adapter.state()), model(x)
    hook.before_optimizer(1)
    stirred(adapter)
    late, expected_late = clone(adapter.state()), model(x)
    load_state(adapter, early)
    assert torch.equal(model(x), expected)
    load_state(adapter, late)
    assert torch.equal(model(x), expected_late)


def test_a_run_broken_off_in_mid_growth_goes_on_bit_for_bit():
    recipe = "increlora+increlora-ranks(rank=2, block=1, top=3, wait=0, interval=1)"
    assert goes_on_bit_for_bit(lambda: training(recipe, accumulate=2), before=3, after=3)


def test_other_forms_and_runs_too_short_are_refused():
    with pytest.raises(veneer.UserError, match="not lora"):
        veneer.attach(mlp(), "lora+increlora-ranks")
    with pytest.raises(veneer.UserError, match="end at step 40 of 20"):
        started("increlora+increlora-ranks(rank=3, block=1, top=1, wait=0, interval=10)", steps=20)


def test_fit_grows_to_the_budget_and_learns():
    adapter = veneer.attach(llama(num_hidden_layers=1), "increlora", rank=4)
    run = veneer.fit(adapter, encoded(48), steps=16, lr=2e-2, precision="fp32", display=False)
    ranks = [d.rank for d in adapter.deltas.values()]
    assert sum(ranks) <= 4 * 7 < sum(ranks) + 2 and not any(d.reserve for d in adapter.deltas.values())
    assert sum(run.losses[-3:]) / 3 < sum(run.losses[:3]) / 3 - 0.1


@pytest.fixture(scope="module")
def digits():
    """A digit classifier's data and its weights."""
    from sklearn.datasets import load_digits

    X, Y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    X = (X / 16).float()
    torch.manual_seed(1)
    sizes = [(64, 128), (128, 128), (128, 128), (128, 10)]
    net = nn.Sequential(*[m for s in sizes for m in (nn.Linear(*s), nn.ReLU())][:-1])
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        at = torch.randint(0, len(X), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X[at]), Y[at]).backward()
        optimizer.step()
    return net, X, Y


def test_rank_goes_to_the_first_layer_when_inputs_shift_and_to_the_last_when_labels_do(digits):
    net, X, Y = digits
    ranks = {}
    for shift in ("pixels", "labels"):
        model, g = copy.deepcopy(net), torch.Generator().manual_seed(1)
        x = X[:, torch.randperm(64, generator=g)] if shift == "pixels" else X
        y = torch.randperm(10, generator=g)[Y] if shift == "labels" else Y
        batches = [(x[at], y[at]) for at in torch.randint(0, len(X), (150, 64), generator=g)]
        recipe = "increlora+increlora-ranks(rank=3, block=1, top=1, wait=10, interval=10)"
        adapter = veneer.attach(model, recipe, sites="all")
        loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
        veneer.fit(adapter, batches, loss=loss, epochs=1, lr=5e-3, schedule="constant", display=False)
        ranks[shift] = [d.rank for d in adapter.deltas.values()]
    assert sum(ranks["pixels"]) == sum(ranks["labels"]) == 12
    assert ranks["pixels"][0] > ranks["labels"][0] and ranks["labels"][-1] > ranks["pixels"][-1]
    assert max(ranks["labels"]) == ranks["labels"][-1]
