"""The distance from orthonormal rows, and its gradient, against autograd's of the plain expression."""

import torch

from veneer.numerics.orthogonality import orthogonality


def plain(factors):
    return torch.stack([(M @ M.mT - torch.eye(len(M), dtype=M.dtype)).norm() for M in factors]).mean()


def test_value_and_gradient_are_those_of_the_plain_expression():
    made = [torch.randn(3, 7), torch.randn(3, 7), torch.randn(9, 3).T, torch.randn(9, 3).T, torch.randn(2, 7)]
    made = [M.double().requires_grad_() for M in made]
    wanted = torch.autograd.grad(plain(made), made)
    value = orthogonality(made)
    assert torch.allclose(value, plain(made))
    for found, own in zip(torch.autograd.grad(3 * value, made), wanted):
        assert torch.allclose(found, 3 * own)


def test_orthonormal_rows_have_no_gradient():
    M = torch.eye(3, 5).requires_grad_()
    value = orthogonality([M])
    assert value == 0 and not torch.autograd.grad(value, M)[0].any()
