"""LoRA-GGPO and LoRA-MGPO against the numbers of their sheet (078)."""

import pytest
import torch
from breaks import goes_on_bit_for_bit, training
from small_runs import encoded, llama
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.optim.lora_ggpo import equivalent_row_norms, noise_size


def attached(recipe, layer=None, **options):
    """One layer, its adapter with factors that are not zero, and the hook, as training begins."""
    model = nn.Sequential(nn.Linear(6, 4) if layer is None else layer)
    adapter = veneer.attach(model, recipe, **{"rank": 2, "sites": "all"} | options)
    adapter.optimizer = torch.optim.AdamW(adapter.optimizer_groups(), lr=1e-2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    adapter.hooks[-1].on_start(adapter, Schedule(10, 1e-2))
    return model, adapter, adapter.hooks[-1]


def test_sizes_are_the_sheets_oracle_3():
    model, adapter, hook = attached("lora-ggpo", nn.Linear(2, 2, bias=False), rank=1)
    model[0].weight.data.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    d = adapter.deltas["0"]
    with torch.no_grad():
        d.A.copy_(torch.tensor([[1.0, 0.0]]))
        d.B.copy_(torch.tensor([[0.0], [1.0]]))
    n = torch.tensor([1.0, 2.0])
    w = hook._weight_norms(d)
    assert torch.allclose(w, torch.tensor([5.0, 1.0]))
    assert torch.allclose(noise_size(w, n, 0.03, 0.01, 2), torch.tensor([0.1131, 0.0495]), atol=5e-5)
    hook.rows = "mean"
    w = hook._weight_norms(d)
    assert torch.allclose(w, torch.tensor([2.5, 2.6926]), atol=5e-5)
    assert torch.allclose(noise_size(w, n, 0.03, 0.01, 2), torch.tensor([0.0601, 0.0854]), atol=5e-5)


def test_row_norms_need_no_dense_gradient():
    A, B, gA, gB = torch.randn(3, 7), torch.randn(5, 3), torch.randn(3, 7), torch.randn(5, 3)
    explicit = (2.0 * (B @ gA + gB @ A)).norm(dim=1)
    assert torch.allclose(equivalent_row_norms(A, B, gA, gB, 2.0), explicit, rtol=1e-5)


def test_the_cap_and_the_power_tame_large_gradients():
    w, n = torch.tensor([4.0, 4.0]), torch.tensor([0.0, 100.0])
    assert torch.allclose(noise_size(w, n, 0.03, 0.01, 16, cap=0.1), torch.tensor([0.12 / 2**0.5, 0.1]))
    assert torch.allclose(noise_size(w, n, 0.0, 0.01, 16, power=1), torch.tensor([0.0, 1 / 2**0.5]))


def test_the_weight_includes_what_a_start_moved_out_of_it():
    model, adapter, hook = attached("pissa+lora-ggpo")
    d = adapter.deltas["0"]
    merged = model[0].weight - d.offset.pair().B @ d.offset.pair().A * -d.offset.scale + d.weight()
    assert torch.allclose(hook._weight_norms(d), merged.norm(dim=1), rtol=1e-4)


def test_the_variance_of_the_output_is_the_sheets_oracle_4():
    model, _, hook = attached("lora-ggpo", nn.Linear(6, 40, bias=False))
    hook.tau = {"0": torch.full((40,), 0.2)}
    hook.before_step(0)
    x = torch.randn(1, 6)
    with torch.no_grad():
        y = torch.cat([model(x) for _ in range(500)])
    assert (y.var(dim=0).mean() / (x.norm() * 0.2).square()).item() == pytest.approx(1, abs=0.05)
    twice = model(torch.cat([x, x]))
    assert torch.allclose(twice[0], twice[1], atol=1e-5)  # tokens of one forward share the noise


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(6, 4), torch.randn(3, 6)),
        (nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5)),
        (nn.Embedding(7, 4), torch.tensor([[1, 2]])),
    ],
    ids=["linear", "conv", "embedding"],
)
def test_noise_is_there_within_a_step_in_training_mode_alone(layer, x):
    model, adapter, hook = attached("lora-ggpo", layer)
    plain = model(x)
    hook.tau = {"0": torch.full((4,), 0.2)}
    hook.before_step(0)
    assert not torch.allclose(model(x), plain, atol=1e-2)
    with adapter.disabled():
        base = model(x)
    assert torch.equal(model.eval()(x), plain)
    hook.after_backward(0)
    assert torch.equal(model.train()(x), plain)
    with adapter.disabled():
        assert torch.equal(model(x), base)


def test_gradients_of_a_loss_linear_in_the_output_do_not_feel_the_noise():
    model, adapter, hook = attached("lora-ggpo")
    x, found = torch.randn(3, 6), []
    for tau in ({}, {"0": torch.full((4,), 0.2)}):
        hook.tau = tau
        hook.before_step(0)
        found.append(torch.autograd.grad(model(x).sum(), adapter.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


def test_the_gradient_of_the_input_goes_through_the_noise():
    model, adapter, hook = attached("lora-ggpo")
    hook.tau = {"0": torch.full((4,), 0.5)}
    hook.before_step(0)
    x, change = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    adapter.root.draws = 3
    y = model(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    adapter.root.draws = 3  # the same draw again
    assert torch.allclose((model(x + change) - y).sum(), (grad * change).sum(), atol=1e-4)


def test_recomputed_blocks_see_the_noise_of_the_forward():
    model = llama(num_hidden_layers=1).train()
    adapter = veneer.attach(model, "lora-ggpo", rank=2)
    hook = adapter.hooks[-1]
    hook.on_start(adapter, Schedule(10))
    hook.tau = {path: torch.full((d.site.out_features,), 0.1) for path, d in adapter.deltas.items()}
    hook.before_step(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    ids, found = torch.arange(1, 9).view(1, 8), []
    for again in (False, True):
        adapter.root.draws = 3
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(input_ids=ids, labels=ids).loss
        found.append((loss, *torch.autograd.grad(loss, adapter.parameters())))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


@pytest.mark.parametrize("recipe", ["lora-ggpo(sigma=0.0, beta=0.0)", "lora-mgpo(rho=0.0)"])
def test_nothing_to_perturb_is_lora_bit_for_bit(recipe):
    runs = [training(r, rank=2) for r in (recipe, "lora")]
    assert [runs[0].take_step() for _ in range(3)] == [runs[1].take_step() for _ in range(3)]


def test_rates_steer_the_noise_where_asked():
    _, _, hook = attached("lora-ggpo(follow_rate=True)")
    hook.tau = {"0": torch.ones(4)}
    hook.before_step(5)
    assert hook.share == pytest.approx(0.5)


def quadratic(rho=0.05, **fields):
    """A pair A (1, 1), B (1, 1) as θ with a loss ½θᵀHθ; the adapter, the hook and H."""
    given = "".join(f", {k}={v}" for k, v in fields.items())
    _, adapter, hook = attached(f"lora-mgpo(rho={rho}{given})", nn.Linear(1, 1, bias=False), rank=1)
    return adapter, hook, torch.tensor([[2.0, 0.5], [0.5, 1.0]])


def backward(adapter, H):
    theta = torch.cat([p.flatten() for p in adapter.parameters()])
    (0.5 * theta @ H @ theta).backward()


def test_the_perturbation_is_the_sheets_oracle_6_and_is_taken_back_bit_for_bit():
    adapter, hook, _ = quadratic()
    A, B = adapter.parameters()
    before = [A.detach().clone(), B.detach().clone()]
    adapter.optimizer.state[A]["exp_avg"] = torch.tensor([[3.0]])
    adapter.optimizer.state[B]["exp_avg"] = torch.tensor([[4.0]])
    hook.mean = 2.0
    hook.before_step(1)
    assert (A - before[0]).item() == pytest.approx(0.015, abs=1e-6)
    assert (B - before[1]).item() == pytest.approx(0.02, abs=1e-6)
    hook.after_backward(1)
    assert torch.equal(A, before[0]) and torch.equal(B, before[1])


def test_the_radius_is_bounded():
    adapter, hook, _ = quadratic(largest=0.5)
    for p, m in zip(adapter.parameters(), (3.0, 4.0)):
        adapter.optimizer.state[p]["exp_avg"] = torch.tensor([[m]])
    before, hook.mean = adapter.vector(), 1e-6
    hook.before_step(1)
    assert (adapter.vector() - before).norm().item() == pytest.approx(0.5, rel=1e-5)


def test_on_a_quadratic_the_gradient_is_that_at_the_perturbed_point_and_theta_moves_by_the_optimiser_alone():
    adapter, hook, H = quadratic(rho=0.3)
    opt = adapter.optimizer
    for step in range(3):
        theta, mean = adapter.vector(), hook.mean
        m = torch.cat([opt.state[p]["exp_avg"].flatten() for p in adapter.parameters()]) if step else torch.ones(2)
        epsilon = 0.3 * m / m.norm() / mean if step else torch.zeros(2)
        opt.zero_grad()
        hook.before_step(step)
        backward(adapter, H)
        hook.after_backward(step)
        g = torch.cat([p.grad.flatten() for p in adapter.parameters()])
        assert torch.allclose(g, H @ theta + H @ epsilon, atol=1e-5)
        assert torch.equal(adapter.vector(), theta)
        hook.before_optimizer(step)
        expected = g.norm() if mean is None else 0.9 * mean + 0.1 * g.norm()
        assert hook.mean == pytest.approx(float(expected), rel=1e-5)
        opt.step()


def test_an_optimiser_without_a_first_moment_is_refused():
    adapter, hook, _ = quadratic()
    adapter.optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    hook.mean = 1.0
    with pytest.raises(veneer.UserError, match="SGD keeps none"):
        hook.before_step(1)


@pytest.mark.parametrize("name", ["lora-ggpo", "lora-mgpo"])
def test_gates_are_refused(name):
    with pytest.raises(veneer.UserError, match="plain pairs"):
        veneer.attach(nn.Sequential(nn.Linear(5, 4)), f"sora+{name}", rank=2)


@pytest.mark.parametrize("recipe", ["lora-ggpo(beta=0.1)", "lora-mgpo"])
def test_a_broken_run_goes_on_bit_for_bit(recipe):
    assert goes_on_bit_for_bit(lambda: training(recipe, accumulate=2, rank=2, dropout=0.1))


@pytest.mark.parametrize("recipe", ["lora-ggpo", "lora-mgpo"])
def test_fit_learns_with_it(recipe):
    adapter = veneer.attach(llama(num_hidden_layers=1), recipe, rank=4)
    run = veneer.fit(adapter, encoded(48), steps=12, lr=3e-2, precision="fp32", display=False)
    assert sum(run.losses[-3:]) / 3 < sum(run.losses[:3]) / 3 - 0.1
