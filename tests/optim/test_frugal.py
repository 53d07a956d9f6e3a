"""FRUGAL against the numbers of its sheet (058), torch's AdamW and GaLore."""

import math

import pytest
import torch
from breaks import goes_on_bit_for_bit, training
from small_runs import encoded, llama
from torch import nn

import veneer
from veneer.optim.frugal import FRUGAL, FRUGALAdamW, active, combine, down
from veneer.optim.galore import GaLore, GaLoreAdamW

G = torch.tensor([[3.0, 1.0], [1.0, 1.0]])


def optimiser(p, lr=1.0, decay=0.0, projected=True, **fields):
    return FRUGALAdamW(
        [{"params": [p], "lr": lr, "projected": projected, "weight_decay": decay}], FRUGAL(**fields), {p: "p"}, []
    )


def stepped(start, gradients, **options):
    """A tensor after steps by the gradients, and its state."""
    p = nn.Parameter(start.clone())
    own = optimiser(p, **options)
    for g in gradients:
        p.grad = g.clone()
        own.step()
    return p.detach(), own.state[p]


@pytest.mark.parametrize("part", ["columns", "rows", "entries"])
def test_all_of_it_with_state_is_torchs_adamw(part):
    start, gradients = torch.randn(5, 4), torch.randn(4, 5, 4)
    p = nn.Parameter(start.clone())
    plain = torch.optim.AdamW([p], lr=0.1, weight_decay=0.2)
    for g in gradients:
        p.grad = g.clone()
        plain.step()
    ours = stepped(start, gradients, lr=0.1, decay=0.2, share=1.0, part=part)[0]
    assert torch.allclose(ours, p, atol=1e-6)
    assert torch.allclose(stepped(start, gradients, lr=0.1, decay=0.2, projected=False)[0], p, atol=1e-6)


@pytest.mark.parametrize("part", ["columns", "rows", "entries", "svd", "random"])
def test_nothing_with_state_is_the_sign_with_decoupled_decay_and_keeps_none(part):
    start, gradients = torch.randn(5, 4), torch.randn(3, 5, 4)
    p, state = stepped(start, gradients, lr=0.1, decay=0.2, share=0.0, part=part)
    expected = start.clone()
    for g in gradients:
        expected = expected * (1 - 0.02) - 0.1 * g.sign()
    assert torch.allclose(p, expected, atol=1e-6)
    assert sum(v.numel() for v in state.values() if isinstance(v, torch.Tensor)) == 0


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_the_subspace_alone_with_its_moments_kept_is_galore(shape):
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    ours = stepped(
        start, gradients, lr=0.01, share=0.4, part="svd", rule="none", reset=False, scale=0.25, gap=2, eps=1e-14
    )
    q = nn.Parameter(start.clone())
    galore = GaLoreAdamW(
        [{"params": [q], "lr": 0.01, "projected": True}], GaLore(rank=2, gap=2, scale=0.25, eps=1e-14), {q: "p"}
    )
    for g in gradients:
        q.grad = g.clone()
        galore.step()
    assert torch.allclose(ours[0], q, atol=1e-6)


def test_the_first_step_is_the_sheets_oracle_5():
    for scale, other in ((1.0, 1.0), (0.1, 0.1)):
        p, state = stepped(torch.zeros(2, 2), [G], share=0.5, free_scale=scale, eps=1e-14)
        expected = -torch.full((2, 2), other)
        expected[:, state["columns"]] = -1.0
        assert torch.allclose(p, expected, atol=1e-6)


@pytest.mark.parametrize("part", ["columns", "rows", "entries"])
def test_every_entry_moves_by_exactly_one_of_the_rules(part):
    g = torch.randn(8, 12)
    kept = {part: stepped(torch.zeros(8, 12), [g], part=part)[1][part]}
    inside = combine(down(g, kept), g, kept, torch.zeros_like)
    outside = combine(torch.zeros_like(down(g, kept)), g, kept, torch.clone)
    assert torch.equal(inside + outside, g) and not (inside * outside).any()
    assert torch.allclose(down(g, kept).square().sum() + outside.square().sum(), g.square().sum())
    assert int((inside != 0).sum()) == 8 * 12 // 4


def test_after_a_draw_the_first_step_has_the_rates_size_everywhere():
    gradients = torch.randn(4, 8, 12)
    before, after = (stepped(torch.zeros(8, 12), gradients[:k], gap=3, eps=1e-14)[0] for k in (3, 4))
    assert torch.allclose((after - before).abs(), torch.ones(8, 12), atol=1e-5)
    kept = stepped(torch.zeros(8, 12), gradients, gap=3, eps=1e-14, reset=False)[0]
    assert not torch.allclose((kept - before).abs(), torch.ones(8, 12), atol=1e-2)


def test_the_sign_of_the_rest_reaches_into_the_subspace_as_in_the_sheets_oracle_7():
    _, state = stepped(torch.zeros(2, 2), [G], share=0.5, part="svd")
    P = state["right"]
    Q = G - G @ P @ P.T
    assert torch.allclose(Q, torch.tensor([[0.085786, -0.207107], [-0.207107, 0.5]]), atol=1e-6)
    assert torch.allclose((Q.sign() @ P).abs().flatten(), torch.tensor([0.541196, 0.541196]), atol=1e-6)


def test_a_column_has_state_in_a_quarter_of_the_periods():
    counts = torch.zeros(16)
    p = nn.Parameter(torch.zeros(2, 16))
    own = optimiser(p, gap=1)
    for _ in range(800):
        p.grad = torch.ones(2, 16)
        own.step()
        counts[own.state[p]["columns"]] += 1
    assert counts.sum() == 800 * 4
    assert ((counts - 200).abs() < 50).all()  # four standard deviations


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_units_take_turns_and_all_come_in_a_round(order):
    draws = [active(7, 0.3, order, k, seed=1) for k in range(8)]
    assert all(len(d) == 2 for d in draws)
    assert set().union(*draws[:4]) == set(range(7)) == set().union(*draws[4:])
    if order != "random":
        first = {0, 1} if order == "ascending" else {5, 6}
        assert draws[0] == first
    assert active(6, 2 / 3, "mirror", 0, 0) == {0, 1, 4, 5}


def states(run):
    return {n for n, p in run.adapter.named_parameters() if "exp_avg" in run.adapter.optimizer.state[p]}


@pytest.mark.parametrize("part, units", [("tensors", 14), ("blocks", 2)])
def test_only_active_units_keep_state_and_all_move(part, units):
    run = training(f"frugal(part='{part}', share=0.5, gap=1)", blocks=2)
    moving = {n: p.detach().clone() for n, p in run.adapter.named_parameters()}
    seen = []
    for _ in range(2):
        run.take_step()
        names = states(run)
        seen.append(names if part == "tensors" else {n.split(".")[2] for n in names})
        assert len(seen[-1]) == units // 2
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == units
    assert not any(torch.equal(p, moving[n]) for n, p in run.adapter.named_parameters())


def test_mirror_refuses_what_does_not_halve():
    with pytest.raises(veneer.UserError, match="do not halve"):
        training("frugal(part='tensors', order='mirror', share=0.5)", blocks=2)


def test_lion_and_momentum_keep_one_moment():
    start, g = torch.zeros(4, 3), torch.randn(2, 4, 3)
    lion, state = stepped(start, g, share=1.0, inner="lion", beta2=0.99)
    m = 0.01 * g[0]
    assert torch.allclose(lion, -g[0].sign() - (0.9 * m + 0.1 * g[1]).sign())
    assert "exp_avg_sq" not in state
    assert torch.allclose(stepped(start, g, share=1.0, inner="momentum")[0], -g[0] - (0.9 * g[0] + g[1]), atol=1e-6)


def test_state_is_the_formula():
    _, state = stepped(torch.zeros(8, 12), torch.randn(1, 8, 12))
    sizes = {k: v.numel() for k, v in state.items() if isinstance(v, torch.Tensor)}
    assert sizes == {"columns": 3, "exp_avg": 8 * 3, "exp_avg_sq": 8 * 3}
    _, state = stepped(torch.zeros(8, 12), torch.randn(1, 8, 12), part="random")
    assert math.prod(state["left"].shape) == 8 * 2 and state["exp_avg"].shape == (2, 12)


@pytest.mark.parametrize("part", ["columns", "svd", "blocks"])
def test_a_broken_run_goes_on_bit_for_bit(part):
    make = lambda: training(f"frugal(gap=2, part='{part}', share=0.5)", blocks=2, accumulate=2)  # noqa: E731
    assert goes_on_bit_for_bit(make)


def test_fit_learns_with_it():
    adapter = veneer.attach(llama(num_hidden_layers=1), "frugal")
    run = veneer.fit(adapter, encoded(48), steps=12, lr=3e-3, display=False)
    assert sum(run.losses[-3:]) / 3 < sum(run.losses[:3]) / 3 - 0.1
