"""Gaussian LoRA against the oracles of its sheet (088) and draws of the weights themselves."""

import math
from types import SimpleNamespace

import pytest
import torch
from recipes import moved
from torch import nn

import veneer


def layer(log_variance: float = -20.0, noise: str = "output", size: float = 0.0):
    """A linear layer in a model, its delta, and the adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5)).train()
    adapter = veneer.attach(model, f"gaussian-lora(log_variance={log_variance}, noise='{noise}')", rank=3)
    if size:
        moved(adapter, size)
    return model, adapter.deltas["0"], adapter


def noises(model, d, x, count):
    """y − x(W + μ)ᵀ of ``count`` training passes (count, out)."""
    mean = x @ (d.site.weight() + d.weight()).T + d.site.bias()
    with torch.no_grad():
        return torch.cat([model(x) - mean for _ in range(count)])


def test_at_the_start_the_mean_is_the_base_and_the_noise_has_the_root_of_c():
    model, d, _ = layer()
    x = torch.randn(1, 12)
    assert torch.equal(model.eval()(x), d.site.module.veneer_own(x))
    found = noises(model.train(), d, x.expand(4000, 12), 1)
    assert found.std().item() == pytest.approx(4.54e-5 * x.norm().item(), rel=0.02)


@pytest.mark.parametrize("noise", ["output", "weight"])
def test_the_moments_are_those_of_the_posterior(noise):
    model, d, _ = layer(-2.0, noise, 0.5)
    x, count = torch.randn(1, 12), 40000
    found = noises(model, d, x.expand(count, 12), 1) if noise == "output" else noises(model, d, x, 4000)
    variance = (x * x) @ (-2 + d.B_v @ d.A_v).exp().T
    assert (variance.max() / variance.min()) > 1.5
    tolerance = 0.02 if noise == "output" else 0.08  # standard error √(2/n): 0.7 % and 2.2 %
    assert torch.allclose(found.var(0), variance[0], rtol=tolerance)
    assert (found.mean(0) / (variance[0] / len(found)).sqrt()).abs().max() < 4


def test_a_draw_of_the_weights_is_one_for_all_rows_and_one_of_the_outputs_is_not():
    x = torch.randn(1, 12).expand(2, 12)
    for noise, alike in (("weight", True), ("output", False)):
        found = noises(*layer(-2.0, noise)[:2], x, 1)
        assert torch.allclose(found[0], found[1], atol=1e-6) == alike


def test_the_gradient_of_the_noise_is_finite_differences_and_keeps_the_input_alone():
    _, d, _ = layer(-2.0, size=0.5)
    x = torch.randn(4, 12, requires_grad=True)
    arguments = [t.detach().double().requires_grad_() for t in (x, d.A_v, d.B_v)]

    def spread(x, A_v, B_v):  # in fp64, as the form takes the root in fp32
        return (x * x) @ (-2 + B_v @ A_v).exp().T

    grads = torch.autograd.grad(d._of_outputs(x, d.A_v, d.B_v, 7).square().sum(), (x, d.A_v, d.B_v))
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(7)).double()
    expected = torch.autograd.grad((z * spread(*arguments).sqrt()).square().sum(), arguments)
    assert all(torch.allclose(a, b.float(), rtol=1e-4, atol=1e-5) for a, b in zip(grads, expected))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        d(x, SimpleNamespace(plus=lambda x, change: change))
    assert torch.Size([5, 12]) not in kept  # neither v nor its logarithm


def test_recomputation_draws_the_same_noise_and_passes_differ():
    model, _, adapter = layer(0.0)
    x, draws = torch.randn(3, 12), adapter.root.draws
    first = model(x)
    second = model(x)
    adapter.root.draws = draws
    assert torch.equal(model(x), first) and not torch.equal(second, first)


def test_a_convolutions_noise_is_that_of_its_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, stride=2)).train()
    adapter = veneer.attach(model, "gaussian-lora(log_variance=-1.0, alpha=4.0)", rank=2, sites="conv")
    x, d = torch.randn(1, 2, 5, 5), adapter.deltas["0"]
    with torch.no_grad():
        mean = model.eval()(x)
        found = model.train()(x.expand(20000, 2, 5, 5)) - mean
    expected = 4 * math.exp(-1) * nn.functional.conv2d(x * x, torch.ones(3, 2, 3, 3), padding=1, stride=2)
    assert d.scale == 2 and torch.allclose(found.var(0), expected[0], rtol=0.05)


def test_the_folded_mean_is_the_forward_without_noise():
    model, _, adapter = layer(size=0.5)
    x = torch.randn(4, 12)
    mean = model.eval()(x)
    adapter.fold()
    assert torch.allclose(model.train()(x), mean, rtol=1e-5, atol=1e-6)
