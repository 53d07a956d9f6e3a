"""CoDyRA against the numbers of its sheet (072): the threshold's curve and map, pruning, a stream of tasks."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.ranks.dynamic_rank import soft_threshold, thresholds

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

from breaks import goes_on_bit_for_bit, training


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))


def task(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Twelve batches of inputs and of what a random linear map makes of them."""
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(8, 5, generator=g)
    return [(x, x @ M) for x in torch.randn(12, 16, 8, generator=g)]


def fitted(model: nn.Module, seed: int, recipe: str = "dynamic-rank(largest=0.08, levels=4)", **options):
    """An adapter that has learnt a task."""
    adapter = veneer.attach(model, recipe, rank=6, seed=seed, **options)
    loss = lambda m, b: (m(b[0]) - b[1]).square().mean()  # noqa: E731
    veneer.fit(adapter, task(seed), loss=loss, steps=24, lr=0.05, schedule="constant", warmup=0, display=False)
    return adapter


def test_the_curve_is_the_sheets_oracle_4():
    found = thresholds(500, 0.5, 0.005, 50)
    assert not any(found[:251])  # the threshold acts after the dense part
    for step, kappa in ((251, 1.02e-4), (300, 1.122e-3), (400, 3.163e-3), (490, 5e-3), (499, 5e-3)):
        assert found[step] == pytest.approx(kappa, rel=1e-3)


def test_the_maps_are_the_sheets_oracle_6():
    g = torch.tensor([0.5, -0.25, 0.1, -0.45])
    assert torch.allclose(soft_threshold(g, 0.2, "official"), torch.tensor([0.3, 0.0, 0.0, -0.25]))
    assert torch.allclose(soft_threshold(g, 0.2), torch.tensor([0.3, -0.05, 0.0, -0.25]))


def test_gates_learn_freely_and_then_fall():
    adapter = veneer.attach(mlp(), "dynamic-rank(largest=0.5, levels=2)", rank=6)
    hook = adapter.hooks[0]
    hook.on_start(adapter, Schedule(10))
    before = adapter.deltas["0"].gate.detach().clone()
    for step in range(6):
        hook.after_step(step)
    assert torch.equal(adapter.deltas["0"].gate, before)
    hook.after_step(6)
    assert torch.equal(adapter.deltas["0"].gate, soft_threshold(before, 0.5))
    assert [g.get("weight_decay") for g in adapter.optimizer_groups()] == [0.0, None]


def test_a_larger_threshold_keeps_less_and_none_keeps_all():
    kept = [
        sum(d.rank for d in fitted(mlp(), 1, f"dynamic-rank(largest={k}, levels=4)").deltas.values())
        for k in (0.0, 0.06, 0.12)
    ]
    assert kept[0] == 12 and kept[0] > kept[1] > kept[2] > 0


def test_the_end_is_plain_lora_and_changes_nothing(tmp_path):
    model, x = mlp(), torch.randn(4, 8)
    adapter = veneer.attach(model, "dynamic-rank", rank=4, alpha=8.0)
    adapter.optimizer = torch.optim.AdamW(adapter.optimizer_groups(), lr=1e-2)
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.B.normal_()
        adapter.deltas["0"].gate[[0, 2]] = 0
        adapter.deltas["2"].gate.zero_()
    before = model(x)
    adapter.hooks[0].on_end()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    d = adapter.deltas["0"]
    assert list(adapter.deltas) == ["0"] and d.A.shape == (2, 8) and d.scale == 2.0 and d.gate is None
    assert {id(p) for g in adapter.optimizer.param_groups for p in g["params"]} == {id(d.A), id(d.B)}
    adapter.save(tmp_path / "a")
    fresh = mlp()
    veneer.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(x), model(x))


def test_a_stream_of_tasks_is_a_sum_of_low_rank_changes():
    nested, merged, x = mlp(), mlp(), torch.randn(4, 8)
    start = merged[0].weight.detach().clone()
    adapters = []
    for seed in (1, 2):
        settled = {k: v.clone() for a in adapters for k, v in a.state().items()}
        before = nested(x)
        fresh = veneer.attach(nested, "dynamic-rank", rank=6, name="trial")
        assert torch.equal(nested(x), before)  # every task starts where the last one ended
        fresh.detach()
        adapters.append(fitted(nested, seed, name=f"task-{seed}"))
        assert all(torch.equal(v, settled[k]) for a in adapters[:-1] for k, v in a.state().items())
        fitted(merged, seed).bake()
        torch.testing.assert_close(merged(x), nested(x), rtol=1e-4, atol=1e-4)
    history = sum(a.deltas["0"].weight() for a in adapters)
    torch.testing.assert_close(merged[0].weight - start, history, rtol=1e-4, atol=1e-4)
    kept = sum(a.deltas["0"].rank for a in adapters)
    assert torch.linalg.matrix_rank(merged[0].weight - start, atol=1e-4) <= kept < 8


def test_a_task_that_keeps_nothing_is_said():
    adapter = veneer.attach(mlp(), "dynamic-rank", rank=2)
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.gate.zero_()
    with pytest.warns(UserWarning, match="no component is left"):
        adapter.hooks[0].on_end()


def test_beside_a_start_that_moves_weight_it_begins_and_ends_where_it_should():
    model, x = mlp(), torch.randn(4, 8)
    base = model(x)
    adapter = veneer.attach(model, "pissa+dynamic-rank", rank=2)
    torch.testing.assert_close(model(x), base, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        adapter.deltas["0"].gate.zero_()
    before = model(x)
    adapter.hooks[-1].on_end()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert [d.rank for d in adapter.deltas.values()] == [1, 2]


@pytest.mark.parametrize("before", [2, 6])
def test_a_resumed_run_goes_on_bit_for_bit(before):
    recipe = "dynamic-rank(largest=0.5, levels=2)"
    assert goes_on_bit_for_bit(lambda: training(recipe, accumulate=2, rank=4), before=before, after=2)
