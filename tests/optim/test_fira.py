"""Fira against the numbers of its sheet (042), and GaLore where the two are one."""

import math
from itertools import pairwise

import pytest
import torch
from breaks import goes_on_bit_for_bit, training
from small_runs import encoded, llama
from torch import nn

import veneer
from veneer.numerics.svd import fix_signs
from veneer.optim.fira import Fira, FiraAdamW, limit_growth, row_scales
from veneer.optim.galore import GaLore, GaLoreAdamW

G = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
FIRST = math.sqrt(1 - 0.999) / (1 - 0.9)  # the first step's bias corrections


def stepped(gradients, kind=Fira, optimiser=FiraAdamW, decay=0.0, projected=True, **fields):
    """A tensor from 0 after unit steps by the gradients, and its optimiser."""
    hook = kind(**{"rank": 1, "scale": 1.0} | fields)
    p = nn.Parameter(torch.zeros_like(gradients[0]))
    own = optimiser([{"params": [p], "lr": 1.0, "projected": projected, "weight_decay": decay}], hook, {p: "p"})
    for g in gradients:
        p.grad = g.clone()
        own.step()
    return p.detach(), own, own.state[p]


def test_the_first_step_is_the_sheets_oracle_4_and_galores_beside_it():
    assert torch.allclose(stepped([G])[0], -torch.tensor([[0.951066, 0.317022], [0.765348, 0.765348]]), atol=1e-6)
    galore = stepped([G], GaLore, GaLoreAdamW)[0]
    assert torch.allclose(galore, -torch.tensor([[0.923870, 0.382680], [0.923857, 0.382674]]), atol=1e-6)


def test_a_gradient_inside_the_subspace_takes_galores_step():
    inside = torch.randn(7, 2) @ torch.randn(2, 5)
    assert torch.allclose(
        stepped([inside], rank=2, scale=0.5)[0],
        stepped([inside], GaLore, GaLoreAdamW, rank=2, scale=0.5)[0],
        atol=1e-5,
    )


def test_at_full_rank_it_is_galore():
    gradients = list(torch.randn(4, 6, 4))
    ours, _, state = stepped(gradients, rank=4)
    assert torch.allclose(ours, stepped(gradients, GaLore, GaLoreAdamW, rank=4)[0], atol=1e-4)
    assert state["residual"] < 1e-4


def test_at_rank_one_it_starts_as_descent_with_scaled_rows():
    g = torch.randn(6, 4)
    p, _, state = stepped([g])
    R = g @ state["right"]
    phi = row_scales(0.1 * R / ((0.001 * R.square()).sqrt() + 1e-6), R, "right")
    assert torch.allclose(p, -FIRST * phi * g, atol=1e-5)


def test_scales_are_zero_where_the_subspace_sees_nothing_and_bounded_on_demand():
    N, R = torch.tensor([[1.0], [2.0], [4.0], [50.0]]), torch.tensor([[1.0], [0.0], [2.0], [1.0]])
    assert row_scales(N, R, "right").flatten().tolist() == pytest.approx([1.0, 0.0, 2.0, 50.0])
    assert row_scales(N, R, "right", cap=10.0).max() == pytest.approx(10.0)


def test_the_limiter_is_the_sheets_oracle_6_and_leaves_a_silent_start_alone():
    S, norm = limit_growth(torch.tensor([3.0, 0.0]), torch.tensor(2.0), 1.01)
    assert float(norm) == pytest.approx(2.02, abs=1e-6) and S.norm() == pytest.approx(2.02, abs=1e-6)
    assert limit_growth(torch.tensor([3.0]), torch.tensor(0.0), 1.01)[1] == 3.0
    assert limit_growth(torch.tensor([1.0]), torch.tensor(2.0), 1.01)[1] == 1.0


def test_the_residual_grows_by_at_most_gamma_a_step():
    gradients = [g * 3**i for i, g in enumerate(torch.randn(5, 6, 4))]
    norms = [stepped(gradients[: k + 1])[2]["residual"] for k in range(5)]
    assert all(b <= 1.01 * a * (1 + 1e-5) for a, b in pairwise(norms))
    limit = stepped(gradients)[1].seen["p"]["limit"]
    assert limit > 1.5


def test_the_step_does_not_see_the_gradients_size():
    gradients = list(torch.randn(4, 6, 4))
    small = stepped(gradients, eps=1e-14)[0]
    assert torch.allclose(small, stepped([50 * g for g in gradients], eps=1e-14)[0], rtol=1e-3, atol=1e-4)


def test_the_official_scaling_interpolates_as_the_sheets_oracle_8():
    ones = [stepped([G], scaling="official", scale=a)[0] for a in (0.25, 1.0)]
    assert torch.allclose(*ones, atol=1e-6)  # at rank 1 the first step does not depend on α
    g = torch.randn(6, 4)
    p, _, state = stepped([g], rank=2, scaling="official", scale=0.25)
    P = state["right"]
    R = g @ P
    N = 0.1 * R / ((0.001 * R.square()).sqrt() + 1e-6)
    phi = row_scales(N, R, "right")
    assert torch.allclose(p, -FIRST * (phi * g + 0.25 * (N - phi * R) @ P.T), atol=1e-5)


def test_wide_matrices_step_as_their_transposes():
    gradients = list(torch.randn(3, 4, 7))
    tall = stepped([g.T for g in gradients], rank=2)[0]
    assert torch.allclose(stepped(gradients, rank=2)[0], tall.T, atol=1e-4)


def test_state_is_the_formula():
    for shape in ((8, 4), (4, 8)):
        state = stepped([torch.randn(shape)], rank=2)[2]
        assert sum(v.numel() for k, v in state.items() if k != "step") == 4 * 2 + 2 * 8 * 2 + 1


@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_steps_are_those_of_the_fira_package(shape, alpha, monkeypatch):
    published = pytest.importorskip("fira.fira_adamw", reason="the fira package is not installed").AdamW
    svd = torch.linalg.svd

    def same_signs(M, full_matrices=True):  # an SVD's signs are free, and stale moments feel them after a refresh
        U, S, Vh = svd(M, full_matrices=full_matrices)
        return *fix_signs(U, Vh)[:1], S, fix_signs(U, Vh)[1]

    monkeypatch.setattr(torch.linalg, "svd", same_signs)
    gradients, p = list(torch.randn(5, *shape)), nn.Parameter(torch.zeros(shape))
    group = {"params": [p], "rank": 2, "update_proj_gap": 2, "alpha": alpha, "proj_type": "std"}
    theirs = published([group], lr=1.0, weight_decay=0.1, no_deprecation_warning=True)
    for g in gradients:
        p.grad = g.clone()
        theirs.step()
    ours = stepped(gradients, decay=0.1, rank=2, gap=2, scale=alpha, scaling="official")[0]
    assert torch.allclose(ours, p, atol=1e-4)


def test_what_is_not_projected_gets_galores_adamw():
    gradients = list(torch.randn(4, 5))
    ours, theirs = (stepped(gradients, k, o, 0.1, False)[0] for k, o in ((Fira, FiraAdamW), (GaLore, GaLoreAdamW)))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_per_layer_steps_give_the_same_weights_bit_for_bit():
    runs = [training(f"fira(per_layer={on}, gap=2)", rank=4, clip=None) for on in (False, True)]
    for run in runs:
        for _ in range(3):
            run.take_step()
    assert torch.equal(runs[0].adapter.vector(), runs[1].adapter.vector())


def test_a_broken_run_goes_on_bit_for_bit():
    assert goes_on_bit_for_bit(lambda: training("fira(gap=2, svd='randomized')", rank=4, accumulate=2))


def test_fit_learns_with_it():
    adapter = veneer.attach(llama(num_hidden_layers=1), "fira", rank=4)
    run = veneer.fit(adapter, encoded(48), steps=12, lr=1e-2, display=False)
    assert sum(run.losses[-3:]) / 3 < sum(run.losses[:3]) / 3 - 0.1
