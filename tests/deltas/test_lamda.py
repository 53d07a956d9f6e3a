"""LaMDA against its sheet's oracles (027)."""

import sys
from pathlib import Path

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn

from veneer.core.hook import Schedule
from veneer.deltas.lamda import frozen_columns
from veneer.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

from breaks import goes_on_bit_for_bit, training

STARTS = ["spectral", "zero", "released"]


def columns_of(adapter):
    return adapter.deltas["0"].B.detach().clone()


def trained(recipe, steps=10, lr=0.05, observe=lambda adapter, step: None, **options):
    """A small regression by AdamW with decay, hooks at their points."""
    model, adapter, d = single(nn.Linear(9, 8), recipe, rank=4, **options)
    hook, x, goal = adapter.hooks[0], torch.randn(16, 9), torch.randn(16, 8)
    adapter.optimizer = torch.optim.AdamW(adapter.optimizer_groups(), lr=lr, weight_decay=0.1)
    hook.on_start(adapter, Schedule(steps, lr))
    for step in range(steps):
        hook.before_step(step)
        adapter.optimizer.zero_grad()
        (model(x) - goal).square().mean().backward()
        hook.after_backward(step)
        adapter.optimizer.step()
        hook.after_step(step)
        observe(adapter, step)
    return adapter, d


@pytest.mark.parametrize("start", STARTS)
def test_every_start_is_the_base_and_exports_at_rank_r(start):
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    y, W = layer(x), layer.weight.detach().clone()
    model, adapter, d = single(layer, f"lamda(start='{start}')", rank=3)
    assert torch.equal(model(x), y)
    stirred(adapter)
    y, form = model(x), d.as_lora(W, None)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5) and not torch.equal(layer.weight, W)
    assert form.A.shape == (3, 9) and torch.allclose(form.scale * form.B @ form.A, layer.weight - W, atol=1e-6)


def test_the_spectral_start_is_the_sheets_oracle_4():
    W = torch.tensor([[3.0, 0.0], [4.0, 5.0]])
    _, _, d = single(linear(W), "lamda", rank=1, alpha=2.0)
    assert (d.scale * d.S).item() == pytest.approx(6.708204, abs=1e-5)
    assert torch.allclose(d.scale * d.B @ d.S @ d.A, torch.tensor([[1.5, 1.5], [4.5, 4.5]]), atol=1e-5)
    put(d, S=[[0.0]])
    assert torch.allclose(W + d.weight(), torch.tensor([[1.5, -1.5], [-0.5, 0.5]]), atol=1e-5)


def test_the_number_of_frozen_columns_is_the_sheets_oracle_6():
    c = [frozen_columns(t, 100, 8, 0.3) for t in range(101)]
    assert [c[t] for t in (0, 10, 15, 29, 30, 100)] == [0, 2, 4, 7, 8, 8] and c == sorted(c)
    released = [frozen_columns(t, 100, 8, 0.3, "released") for t in range(100)]
    assert [released.index(i) for i in range(4)] == [0, 30, 60, 90] and max(released) == 3


def test_a_column_stands_still_from_its_step_on():
    values = []
    adapter, _ = trained("lamda+lamda-freezing(share=0.8)", observe=lambda a, s: values.append(columns_of(a)))
    for step in range(1, 10):
        columns = frozen_columns(step, 10, 4, 0.8)
        moved = (values[step] != values[step - 1]).any(0)
        assert moved.tolist() == [False] * columns + [True] * (4 - columns)
    assert adapter.optimizer.param_groups[0]["rate"] == 10.0


def test_a_is_what_it_was():
    before = []
    _, d = trained("lamda", observe=lambda a, s: before.append(a.deltas["0"].A.clone()))
    assert all(torch.equal(d.A, A) for A in before) and not d.A.requires_grad


def test_the_released_schedule_lets_the_optimiser_move_frozen_columns():
    values = []
    trained("lamda+lamda-freezing(rule='released')", observe=lambda a, s: values.append(columns_of(a)))
    assert all((values[9] != values[8]).any(0)) and frozen_columns(9, 10, 4, 0.3, "released") == 3


def test_when_all_is_frozen_the_state_is_gone_and_it_comes_back_at_the_end():
    counts = []
    adapter, d = trained("lamda", observe=lambda a, s: counts.append((a.parameter_count(), len(a.optimizer.state))))
    assert counts[2] == (16 + 32, 2) and counts[3:] == [(16, 1)] * 7
    assert d.parameter_count() == 16
    adapter.hooks[0].on_end()
    assert d.parameter_count() == adapter.parameter_count() == 16 + 32


def test_a_share_of_zero_trains_the_core_alone():
    start = []
    _, d = trained("lamda(start='zero')+lamda-freezing(share=0)", observe=lambda a, s: start.append(columns_of(a)))
    assert all(torch.equal(b, start[0]) for b in start) and d.S.any()


def test_the_zero_start_moves_the_core_alone():
    model, _, d = single(nn.Linear(9, 7), "lamda(start='zero')", rank=3, alpha=6.0)
    x = torch.randn(4, 9)
    y = model(x)
    dB, dS = gradients(y, d.B, d.S)
    G = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).T @ x
    assert not dB.any() and torch.allclose(dS, d.scale * d.B.T @ G @ d.A.T, atol=1e-4)


def test_it_is_lora_fa_where_the_core_is_the_identity():
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    model, _, d = single(layer, "lamda(start='released')", rank=3, alpha=6.0)
    put(d, S=torch.eye(3), B=torch.ones(7, 3))
    expected = layer.weight + 2.0 * torch.ones(7, 3) @ d.A
    assert torch.allclose(model(x), x @ expected.T + layer.bias, atol=1e-5)


@pytest.mark.parametrize("recipe, dropout", [("lamda", 0.0), ("lamda(start='zero')", 0.1)])
def test_the_input_is_not_kept(recipe, dropout):
    model, adapter, _ = single(nn.Linear(64, 7), recipe, rank=2, dropout=dropout)
    stirred(adapter)
    model.train()
    x, kept = torch.randn(50, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert max(t.untyped_storage().nbytes() // 4 for t in kept if t.data_ptr() != model[0].weight.data_ptr()) < 50 * 64


def test_a_run_goes_on_bit_for_bit_after_all_is_frozen():
    make = lambda: training("lamda+lamda-freezing(share=0.5)", rank=4, blocks=1, lr=1e-3)  # noqa: E731
    assert goes_on_bit_for_bit(make, before=5, after=2, lr=1e-3)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="more than 0 has singular values, 7"):
        single(nn.Linear(9, 7), "lamda", rank=8)
    with pytest.raises(UserError, match="drop principal parts"):
        single(nn.Linear(9, 7), "lamda", rank=2, dropout=0.1)
    with pytest.raises(UserError, match="for the form lamda"):
        single(nn.Linear(9, 7), "lora+lamda-freezing", rank=2)


def test_orthogonality_of_factors_that_are_all_frozen_is_no_term():
    _, d = trained("lamda+lamda-freezing(share=0)+orthogonal")
    assert d.S.requires_grad
