"""ALLoRA against the numbers of its sheet (045) and finite differences."""

import pytest
import torch
from torch import nn

import veneer
from veneer.optim.allora import ALLoRA, row_factor

A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0], [3.0]])


def test_the_factor_is_the_sheets():
    assert torch.allclose(row_factor(A, B, 4.0), torch.tensor([2.0, 0.379098]), atol=1e-6)


def test_the_gram_form_equals_the_explicit_product():
    a, b = torch.randn(3, 7), torch.randn(5, 3)
    explicit = ((b @ a).norm(dim=1) + 0.5).rsqrt()
    assert torch.allclose(row_factor(a, b, 2.0), explicit, atol=1e-5)


def test_gradients_are_the_sheets_oracle_3():
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    x = torch.ones(1, 2, requires_grad=True)
    ALLoRA(eta_squared=4.0).product(x, torch.zeros(2, 2), None, a, b, 1.0).sum().backward()
    assert torch.allclose(b.grad, torch.tensor([[6.0], [1.137294]]), atol=1e-5)
    assert torch.allclose(a.grad, torch.tensor([[1.137294, 1.137294]]), atol=1e-5)
    assert torch.allclose(x.grad, torch.tensor([[3.0, 6.0]]))


def test_the_gradient_of_b_is_loras_times_the_factor_row_by_row():
    a, b, x = torch.randn(2, 6), torch.randn(4, 2), torch.randn(5, 6)
    grads = []
    for hook in (ALLoRA(eta_squared=2.0), ALLoRA(mode="update")):
        p, q = a.clone().requires_grad_(), b.clone().requires_grad_()
        hook.product(x, torch.zeros(4, 6), None, p, q, 1.0).square().sum().backward()
        grads.append((p.grad, q.grad))
    (scaled_a, scaled_b), (plain_a, plain_b) = grads
    assert torch.allclose(scaled_b, row_factor(a, b, 2.0)[:, None] * plain_b, rtol=1e-4)
    ratio = scaled_a / plain_a
    assert ratio.std() > 1e-3  # not a multiple of LoRA's


def test_the_input_gradient_is_that_of_finite_differences():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    adapter = veneer.attach(model, "allora", rank=2, sites="linear")
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn_like(p))
    for d in adapter.deltas.values():
        d.double()
    torch.autograd.gradcheck(model, torch.randn(2, 5, dtype=torch.double, requires_grad=True))


def test_update_mode_scales_the_optimisers_step():
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    adapter = veneer.attach(model, "allora(mode='update', eta_squared=4.0)", rank=2, sites="linear")
    hook = adapter.hooks[0]
    (_, _a, b, _), *_ = adapter.pairs()
    hook.before_optimizer(0)
    with torch.no_grad():
        b.add_(1.0)
    hook.after_step(0)
    assert torch.allclose(b, torch.full_like(b, 2.0))  # c = η = 2 while BA = 0


@pytest.mark.parametrize("steps", [1])
def test_the_first_step_of_sgd_is_eta_times_loras(steps):
    changes = []
    for recipe in ("lora", "allora(eta_squared=4.0)"):
        model = nn.Sequential(nn.Linear(6, 4))
        nn.init.constant_(model[0].weight, 0.1)
        nn.init.zeros_(model[0].bias)
        adapter = veneer.attach(model, recipe, rank=2, sites="linear")
        torch.manual_seed(0)
        model(torch.randn(3, 6)).square().sum().backward()
        changes.append(adapter.parameters()[1].grad)
    assert torch.allclose(changes[1], 2 * changes[0], rtol=1e-5)
