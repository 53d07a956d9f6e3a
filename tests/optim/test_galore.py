"""GaLore against the numbers of its sheet (032) and the galore-torch package."""

import math
import weakref

import pytest
import torch
from breaks import goes_on_bit_for_bit, training
from small_runs import encoded, llama
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.numerics.svd import fix_signs
from veneer.optim.galore import GaLore, GaLoreAdamW, frame_of, project, project_back


def optimiser(p, lr=1.0, projected=True, seed=0, decay=0.0, **fields):
    """The method's optimiser on one tensor."""
    hook = GaLore(**{"rank": 1, "scale": 1.0} | fields)
    hook.seed = seed
    return GaLoreAdamW([{"params": [p], "lr": lr, "projected": projected, "weight_decay": decay}], hook, {p: "p"})


def steps(p, optimizer, gradients):
    """Take a step by each of the gradients."""
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_going_down_and_back_is_an_orthogonal_projection(side, shape):
    G = torch.randn(shape)
    frame = frame_of(G, 2, side)
    for P in frame.values():
        assert torch.allclose(P.mT @ P, torch.eye(2), atol=1e-5)
    once = project_back(project(G, frame), frame)
    assert torch.allclose(project_back(project(once, frame), frame), once, atol=1e-5)
    assert once.norm() <= G.norm()
    tail = torch.linalg.svdvals(G)[2:].square().sum()
    assert torch.allclose((G - once).square().sum(), tail, rtol=1e-4)


@pytest.mark.parametrize("shape, name, moments", [((8, 4), "right", (8, 2)), ((4, 8), "left", (2, 8))])
def test_the_shorter_side_is_projected_and_the_state_is_small(shape, name, moments):
    p = nn.Parameter(torch.randn(shape))
    own = optimiser(p, rank=2)
    steps(p, own, [torch.randn(shape)])
    assert own.state[p][name].shape == (4, 2)
    assert own.state[p]["exp_avg"].shape == own.state[p]["exp_avg_sq"].shape == moments


def test_the_first_step_is_the_sheets_oracle_4():
    p = nn.Parameter(torch.zeros(2, 2))
    steps(p, optimiser(p, lr=0.1, eps=1e-12), [torch.tensor([[3.0, 1.0], [1.0, 1.0]])])
    assert torch.allclose(p, -0.1 * torch.tensor([[0.923880, 0.382683]] * 2), atol=1e-6)


def test_the_first_step_on_a_diagonal_is_the_sheets_oracle_5():
    p = nn.Parameter(torch.zeros(2, 2))
    steps(p, optimiser(p, lr=0.1, scale=0.25, eps=1e-12), [torch.diag(torch.tensor([3.0, 1.0]))])
    assert torch.allclose(p, -0.025 * torch.tensor([[1.0, 0.0], [0.0, 0.0]]), atol=1e-7)


def test_between_refreshes_the_change_has_rank_r():
    p = nn.Parameter(torch.zeros(6, 9))
    own = optimiser(p, rank=2, gap=4)
    steps(p, own, torch.randn(4, 6, 9))
    assert torch.linalg.matrix_rank(p.detach(), rtol=1e-5) == 2
    steps(p, own, torch.randn(1, 6, 9))
    assert torch.linalg.matrix_rank(p.detach(), rtol=1e-5) == 4


def same_signs(M, full_matrices=True, svd=torch.linalg.svd):
    """An SVD's signs are free, and stale moments feel them after a refresh: give both sides the same."""
    U, S, Vh = svd(M, full_matrices=full_matrices)
    U, Vh = fix_signs(U, Vh)
    return U, S, Vh


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_steps_are_those_of_galore_torch(side, shape, monkeypatch):
    from galore_torch import GaLoreAdamW as Published

    monkeypatch.setattr(torch.linalg, "svd", same_signs)
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [theirs], "rank": 2, "update_proj_gap": 2, "scale": 0.25, "proj_type": side}
    published = Published([group], lr=0.01, weight_decay=0.1, no_deprecation_warning=True)
    steps(theirs, published, gradients)
    steps(ours, optimiser(ours, lr=0.01, rank=2, gap=2, scale=0.25, side=side, decay=0.1), gradients)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_tensors_that_are_not_projected_get_the_packages_adamw():
    from galore_torch import GaLoreAdamW as Published

    ours, theirs, gradients = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5)), torch.randn(4, 5)
    steps(theirs, Published([theirs], lr=0.01, no_deprecation_warning=True), gradients)
    steps(ours, optimiser(ours, lr=0.01, projected=False), gradients)
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_the_randomised_subspace_keeps_as_much_of_the_gradient():
    G = torch.randn(60, 10) @ torch.randn(10, 80) + 0.01 * torch.randn(60, 80)
    kept = [project(G, frame_of(G, 8, "std", exact)).norm() for exact in (True, False)]
    assert kept[1] > 0.999 * kept[0]


def test_a_refresh_may_start_the_moments_and_their_corrections_anew():
    p, fresh, g = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4, 3)), torch.randn(3, 4, 3)
    own = optimiser(p, gap=2, on_refresh="reset")
    steps(p, own, g[:2])
    before = p.detach().clone()
    steps(p, own, g[2:])
    steps(fresh, optimiser(fresh, gap=2), g[2:])
    assert torch.allclose(p - before, fresh, atol=1e-6)


def test_a_refresh_may_rotate_the_moments_into_the_new_basis():
    p, g = nn.Parameter(torch.zeros(6, 4)), torch.randn(6, 4)
    own = optimiser(p, rank=4, gap=1, on_refresh="rotate", beta2=0.0)
    steps(p, own, [g, torch.randn(6, 4)])
    second = p.grad
    m = project_back(own.state[p]["exp_avg"], {"right": own.state[p]["right"]})
    assert torch.allclose(m, 0.9 * 0.1 * g + 0.1 * second, atol=1e-6)  # at full rank nothing of m is lost


def test_eight_bit_moments_stay_within_a_step_of_the_exact_ones_and_are_small():
    shape, gradients = (80, 64), torch.randn(4, 80, 64)
    exact, eight = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    plain, own = optimiser(exact, rank=64), optimiser(eight, rank=64, bits=8)
    steps(exact, plain, gradients)
    steps(eight, own, gradients)
    state = own.state[eight]
    assert state["exp_avg"].dtype == torch.int8 and state["exp_avg_sq"].dtype == torch.uint8
    assert sum(state[k].numel() * state[k].element_size() for k in state if k.startswith("exp")) < 2.1 * 80 * 64
    m = own._moments(state, torch.empty(shape))[0]
    bound = 4 * plain.state[exact]["exp_avg"].abs().max() / 127  # rounded once a step, up or down
    assert (m - plain.state[exact]["exp_avg"]).abs().max() <= bound


def test_training_with_eight_bit_moments_ends_near_that_with_fp32():
    ends = []
    for bits in (32, 8):
        torch.manual_seed(3)
        p, A, x = nn.Parameter(torch.zeros(80, 64)), torch.randn(80, 64), torch.randn(256, 64)
        own = optimiser(p, rank=64, lr=0.02, bits=bits)
        for _ in range(100):
            loss = (x @ (p - A).T).square().mean()
            p.grad = torch.autograd.grad(loss, p)[0]
            own.step()
        ends.append(loss.item())
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


def linear_model():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))


def test_matrices_are_projected_and_biases_norms_tables_and_heads_are_not():
    adapter = veneer.attach(llama(num_hidden_layers=1), "galore", rank=4, sites="all", train="norm")
    (group,) = adapter.hooks[0].groups(adapter)
    assert len(group["params"]) == 7
    assert all(p.ndim == 2 and "embed" not in n and "lm_head" not in n for n, p in zip(group["names"], group["params"]))
    rest = adapter.optimizer_groups()[1]
    assert any("embed_tokens" in n for n in rest["names"]) and any("norm" in n for n in rest["names"])


def test_per_layer_steps_give_the_same_weights_bit_for_bit():
    runs = [training(f"galore(per_layer={on}, gap=2)", rank=4, clip=None) for on in (False, True)]
    for run in runs:
        for _ in range(3):
            run.take_step()
    assert torch.equal(runs[0].adapter.vector(), runs[1].adapter.vector())


@pytest.mark.parametrize(
    "recipe", ["galore(rank=4, {})", "galore(rank=4, bits=8, {})", "fira(rank=4, {})", "frugal({})"]
)
def test_with_per_layer_steps_one_gradient_lives_at_a_time(recipe):
    together, apart = (gradients_alive(recipe.format(f"per_layer={on}")) for on in (False, True))
    assert max(apart) == 1 and len(apart) == max(together) == 14


def gradients_alive(recipe):
    """How many gradients there are, seen by anyone, as each one arrives in a step."""
    run, seen, counts = training(recipe, clip=None, blocks=2), [], []

    def note(p):
        seen.append(weakref.ref(p.grad))
        counts.append(sum(ref() is not None for ref in seen))

    for p in run.adapter.parameters():
        p.register_post_accumulate_grad_hook(note)
    run.take_step()
    return counts


@pytest.mark.parametrize(
    "given, said", [({"accumulate": 2}, "accumulation"), ({"clip": 1.0}, "clipping"), ({"processes": 2}, "averaging")]
)
def test_per_layer_refuses_what_needs_all_gradients(given, said):
    adapter = veneer.attach(linear_model(), "galore(per_layer=True)", rank=2)
    with pytest.raises(veneer.UserError, match=said):
        adapter.hooks[0].on_start(adapter, Schedule(10, **given))


def test_per_layer_stops_at_a_gradient_that_is_not_finite_before_anything_moves():
    run = training("galore(per_layer=True)", rank=4, clip=None)
    before = run.adapter.vector()
    hook = run.adapter.hooks[0]
    hook.before_step(0)
    loss = run.task.loss(run.adapter.model, next(iter(run.feed.data))) * math.nan
    with pytest.raises(veneer.UserError, match="not finite"):
        loss.backward()
    assert torch.equal(run.adapter.vector(), before)


@pytest.mark.parametrize("fields", ["gap=2, svd='randomized'", "gap=2, bits=8, on_refresh='rotate'"])
def test_a_broken_run_goes_on_bit_for_bit(fields):
    assert goes_on_bit_for_bit(lambda: training(f"galore({fields})", rank=48, accumulate=2, train="embed_tokens"))


def test_fit_learns_with_it():
    adapter = veneer.attach(llama(num_hidden_layers=1), "galore(scale=1.0)", rank=8)
    run = veneer.fit(adapter, encoded(48), steps=12, lr=1e-2, display=False)
    assert sum(run.losses[-3:]) / 3 < sum(run.losses[:3]) / 3 - 0.1
