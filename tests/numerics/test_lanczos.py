"""Lanczos on operators whose spectrum is known (sheet 069, oracles 1 and 2)."""

import pytest
import torch

from veneer.numerics.lanczos import lanczos, ritz

D = torch.arange(1.0, 51.0, dtype=torch.float64)


def found(steps, seed=0):
    v = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (*ritz(*lanczos(lambda x: D * x, v, steps)), v / v.norm())


def test_as_many_steps_as_dimensions_give_all_eigenvalues():
    assert torch.allclose(found(50)[0], D, atol=1e-8)


def test_a_few_steps_give_the_ends():
    theta, _, _ = found(20)
    assert theta[-1] == pytest.approx(50.0, rel=1e-3) and theta[0] == pytest.approx(1.0, abs=0.05)


def test_weights_sum_to_one_and_give_the_quadratic_form():
    theta, weights, v = found(7)
    assert weights.sum() == pytest.approx(1.0)
    assert weights @ theta == pytest.approx(float(v @ (D * v)))
    assert weights @ theta**3 == pytest.approx(float(v @ (D**3 * v)))


def test_an_exhausted_space_ends_the_recursion():
    P = torch.zeros(9, dtype=torch.float64)
    P[:2] = torch.tensor([3.0, -1.0])
    alphas, betas = lanczos(lambda x: P * x, torch.ones(9, dtype=torch.float64), 9)
    assert len(alphas) == 3 and len(betas) == 2
    assert torch.allclose(ritz(alphas, betas)[0], torch.tensor([-1.0, 0.0, 3.0], dtype=torch.float64), atol=1e-10)
