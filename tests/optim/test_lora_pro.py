"""LoRA-Pro against the numbers of its sheet (026), explicit projections and scipy."""

import pytest
import torch
from breaks import goes_on_bit_for_bit, training
from scipy.linalg import solve_sylvester
from small_runs import encoded, llama
from torch import nn

import veneer
from veneer.optim.lora_pro import adjusted

SPLITS = ("sylvester", "symmetry", "zero")


def pair(out=6, inn=5, r=2, dtype=torch.double):
    """A, B, the full gradient g and the factors' gradients for s = 2."""
    A, B, g = torch.randn(r, inn, dtype=dtype), torch.randn(out, r, dtype=dtype), torch.randn(out, inn, dtype=dtype)
    return A, B, g, 2 * B.mT @ g, 2 * g @ A.mT


def equivalent(A, B, h_A, h_B, scale):
    """What a step along (h_A, h_B) is to W, to first order."""
    parts = [left @ right for left, right in ((B, h_A), (h_B, A)) if left is not None and right is not None]
    return scale * sum(parts)


def projections(A, B):
    """P_B (out, out) and P_A (in, in)."""
    return B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A


@pytest.mark.parametrize("split", SPLITS)
def test_the_equivalent_gradient_is_the_projection_whatever_x(split):
    A, B, g, g_A, g_B = pair()
    P_B, P_A = projections(A, B)
    found = equivalent(A, B, *adjusted(A, B, g_A, g_B, 2.0, split), 2.0)
    assert torch.allclose(found, P_B @ g + g @ P_A - P_B @ g @ P_A, atol=1e-6)


def test_no_other_step_comes_nearer_to_the_gradient():
    A, B, g, g_A, g_B = pair()
    h_A, h_B = adjusted(A, B, g_A, g_B, 2.0)
    best = (equivalent(A, B, h_A, h_B, 2.0) - g).norm()
    assert best < (equivalent(A, B, g_A, g_B, 2.0) - g).norm()
    for _ in range(20):
        near = equivalent(A, B, h_A + 0.01 * torch.randn_like(A), h_B + 0.01 * torch.randn_like(B), 2.0)
        assert best <= (near - g).norm()


@pytest.mark.parametrize("split", SPLITS)
def test_the_step_descends_by_the_square_of_the_equivalent_gradient(split):
    A, B, _, g_A, g_B = pair()
    h_A, h_B = adjusted(A, B, g_A, g_B, 2.0, split)
    slope = (g_A * h_A).sum() + (g_B * h_B).sum()
    assert torch.allclose(slope, equivalent(A, B, h_A, h_B, 2.0).square().sum(), rtol=1e-6)


def test_the_numbers_are_the_sheets_oracle_4():
    A, B, g = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    g_A, g_B = 2 * B.mT @ g, 2 * g @ A.mT
    assert torch.equal(g_A, torch.tensor([[2.0, 6.0]])) and torch.equal(g_B, torch.tensor([[2.0], [12.0]]))
    h_A, h_B = adjusted(A, B, g_A, g_B, 2.0)
    assert torch.allclose(h_A, torch.tensor([[0.0, 0.25]]), atol=1e-6)
    assert torch.allclose(h_B, torch.tensor([[0.0], [0.5]]), atol=1e-6)
    found = equivalent(A, B, h_A, h_B, 2.0)
    assert torch.allclose(found, torch.tensor([[0.0, 0.5], [1.0, 2.5]]), atol=1e-6)
    assert (found - g).norm().item() == pytest.approx(1.581139, abs=1e-6)
    plain = equivalent(A, B, g_A, g_B, 2.0)
    assert torch.equal(plain, torch.tensor([[8.0, 20.0], [28.0, 60.0]]))
    assert (plain - g).norm().item() == pytest.approx(66.947741, abs=1e-5)
    zero, symmetric = (adjusted(A, B, g_A, g_B, 2.0, s)[0] for s in ("zero", "symmetry"))
    assert torch.allclose(symmetric - zero, -0.175 * A, atol=1e-6)


def test_x_is_scipys_solution_of_the_sylvester_equation():
    A, B, _, g_A, g_B = pair(9, 7, 4)
    C = -torch.linalg.inv(B.mT @ B) @ g_A @ A.mT / 4
    X = torch.from_numpy(solve_sylvester((B.mT @ B).numpy(), (A @ A.mT).numpy(), C.numpy()))
    h_A, h_B = adjusted(A, B, g_A, g_B, 2.0)
    zero_A, zero_B = adjusted(A, B, g_A, g_B, 2.0, "zero")
    assert torch.allclose(h_A, zero_A + X @ A, rtol=1e-5) and torch.allclose(h_B, zero_B - B @ X, rtol=1e-5)


def test_full_rank_factors_recover_the_gradient_itself():
    A, B, g, g_A, g_B = pair(4, 7, 4)
    assert torch.allclose(equivalent(A, B, *adjusted(A, B, g_A, g_B, 2.0), 2.0), g, atol=1e-6)


def test_the_equivalent_gradient_does_not_depend_on_how_the_product_is_factored():
    A, B, g, *_ = pair()
    R = torch.tensor([[2.0, 1.0], [0.5, -1.0]], dtype=torch.double)
    found, plain = [], []
    for a, b in ((A, B), (R @ A, B @ torch.linalg.inv(R))):
        grads = 2 * b.mT @ g, 2 * g @ a.mT
        found.append(equivalent(a, b, *adjusted(a, b, *grads, 2.0), 2.0))
        plain.append(equivalent(a, b, *grads, 2.0))
    assert torch.allclose(*found, atol=1e-6) and not torch.allclose(*plain, atol=1e-1)


def test_while_b_is_zero_only_b_moves_and_along_the_gradient_in_the_rows_of_a():
    A, _, g, *_ = pair()
    B = torch.zeros(6, 2, dtype=torch.double)
    h_A, h_B = adjusted(A, B, 2 * B.mT @ g, 2 * g @ A.mT, 2.0)
    assert not h_A.any()
    assert torch.allclose(2 * h_B @ A, g @ projections(A, B)[1], atol=1e-6)


def test_a_frozen_factor_leaves_the_best_step_of_the_other():
    A, B, g, g_A, g_B = pair()
    P_B, P_A = projections(A, B)
    assert torch.allclose(equivalent(A, B, *adjusted(A, B, None, g_B, 2.0), 2.0), g @ P_A, atol=1e-6)
    assert torch.allclose(equivalent(A, B, *adjusted(A, B, g_A, None, 2.0), 2.0), P_B @ g, atol=1e-6)


def test_a_full_step_at_full_rank_is_adams_step_on_w_up_to_second_order():
    model = nn.Sequential(nn.Linear(7, 4, bias=False))
    adapter = veneer.attach(model, "lora-pro", rank=4, alpha=8.0)
    (_, A, B, scale), *_ = adapter.pairs()
    nn.init.orthogonal_(B)  # far from singular, so that the ridge of the inverse does not show
    a, b, x, lr = A.detach().clone(), B.detach().clone(), torch.randn(9, 7), 1e-3
    W = nn.Parameter(model[0].weight.detach() + scale * b @ a)
    old = W.detach().clone()
    model(x).square().mean().backward()
    (x @ W.T).square().mean().backward()
    adapter.hooks[0].optimizer([{"params": [A, B], "lr": lr}]).step()
    torch.optim.Adam([W], lr=lr).step()
    second_order = scale * (B - b) @ (A - a)
    assert torch.allclose((scale * (B @ A - b @ a) - second_order) / lr, (W - old) / lr, atol=1e-3)


def test_tensors_that_are_no_pair_get_adamw():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    adapter = veneer.attach(model, "lora-pro", rank=2, sites=["0"], train=["1.bias"])
    bias = adapter.parameters()[-1]
    twin = nn.Parameter(bias.detach().clone())
    adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
    own = adapter.hooks[0].optimizer([{"params": adapter.parameters(), "lr": 0.1, "weight_decay": 0.0}])
    for _ in range(3):
        own.zero_grad()
        model(torch.ones(2, 5)).square().sum().backward()
        twin.grad = bias.grad.clone()
        own.step()
        adamw.step()
    assert torch.equal(bias, twin)


def test_the_efficient_mode_hands_the_adjusted_gradient_to_the_runs_optimiser():
    model = nn.Sequential(nn.Linear(5, 4))
    adapter = veneer.attach(model, "lora-pro(mode='efficient')", rank=2)
    (_, A, B, scale), *_ = adapter.pairs()
    nn.init.normal_(B)
    model(torch.ones(2, 5)).square().sum().backward()
    wanted = adjusted(A, B, A.grad.clone(), B.grad.clone(), scale)
    adapter.hooks[0].before_optimizer(0)
    assert adapter.hooks[0].optimizer([]) is None
    assert torch.equal(A.grad, wanted[0]) and torch.equal(B.grad, wanted[1])


def test_gates_are_refused():
    with pytest.raises(veneer.UserError, match="plain pairs"):
        veneer.attach(nn.Sequential(nn.Linear(5, 4)), "sora+lora-pro", rank=2)


@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_a_broken_run_goes_on_bit_for_bit(mode):
    assert goes_on_bit_for_bit(lambda: training(f"lora-pro(mode={mode!r})", accumulate=2, rank=2))


def test_accumulated_micro_batches_are_one_batch():
    runs = [training("lora-pro", rank=2, accumulate=n, size=8 // n) for n in (1, 4)]
    losses = [[run.take_step() for _ in range(4)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_fit_learns_with_it():
    adapter = veneer.attach(llama(num_hidden_layers=1), "lora-pro", rank=4, alpha=8.0)
    run = veneer.fit(adapter, encoded(48), steps=12, lr=1e-2, precision="fp32", display=False)
    assert sum(run.losses[-3:]) / 3 < sum(run.losses[:3]) / 3 - 0.1
