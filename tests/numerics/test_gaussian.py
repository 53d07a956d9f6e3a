"""The divergence and the prior against the sheet's number (088, oracle 3), torch.distributions and autograd."""

import math

import pytest
import torch
from torch.distributions import Gamma, Normal, kl_divergence

from veneer.numerics import gaussian
from veneer.numerics.gaussian import Gaussian, divergence, surprise, variance

LOG_C = -3.0


def drawn(seed: int, out: int = 5, width: int = 7, rank: int = 2) -> Gaussian:
    """Factors in fp64."""
    g = torch.Generator().manual_seed(seed)
    shapes = 2 * [(rank, width), (out, rank)]
    return Gaussian(*(torch.randn(s, generator=g, dtype=torch.double).requires_grad_() for s in shapes))


def dense(p: Gaussian) -> Normal:
    """The same by its definition."""
    return Normal(p.B @ p.A, ((LOG_C + (p.B_v @ p.A_v).clamp(-10, 18)) / 2).exp())


def test_the_number_of_oracle_3():
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    q = Gaussian(one, one, torch.full((1, 1), math.log(0.25)), one)
    assert divergence(q, Gaussian(one, zero, one, zero), 0.0)[0].item() == pytest.approx(0.818147, abs=1e-6)


def test_it_is_zero_at_equality_and_positive_elsewhere():
    q, p = drawn(0), drawn(1)
    assert divergence(q, q, LOG_C)[0] == 0 < divergence(q, p, LOG_C)[0]


@pytest.mark.parametrize("size", [1.0, 6.0])  # with the large one some entries are clamped
def test_value_and_gradients_are_those_of_the_definition(size, monkeypatch):
    monkeypatch.setattr(gaussian, "ENTRIES", 20)  # two rows at a time
    q, p = (g._replace(B_v=(size * g.B_v).detach().requires_grad_()) for g in (drawn(0), drawn(1)))
    value, of_q, of_p = divergence(q, p, LOG_C)
    expected = kl_divergence(dense(q), dense(p)).sum()
    assert torch.allclose(value, expected)
    for found, slope in zip((*of_q, *of_p), torch.autograd.grad(expected, (*q, *p))):
        assert torch.allclose(found, slope)


def test_the_prior_is_a_normal_and_a_gamma_up_to_a_constant():
    def by_definition(p):
        own = dense(p)
        rate = torch.tensor(0.2 * math.exp(LOG_C), dtype=torch.double)
        density = Gamma(torch.tensor(2.0, dtype=torch.double), rate).log_prob(1 / own.variance)
        return -(Normal(0.0, 1.0).log_prob(own.mean) + density).sum()

    p, other = drawn(0), drawn(1)
    (value, slopes), expected = surprise(p, LOG_C), by_definition(p)
    assert torch.allclose(value - surprise(other, LOG_C)[0], expected - by_definition(other))
    assert all(torch.allclose(a, b) for a, b in zip(slopes, torch.autograd.grad(expected, p)))


def test_the_variance_is_c_at_the_start():
    assert torch.equal(variance(torch.randn(2, 7), torch.zeros(5, 2)), torch.ones(5, 7))
