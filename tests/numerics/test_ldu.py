import pytest
import torch
from scipy.linalg import lu

from veneer.numerics.ldu import ldu


def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_the_factors_multiply_to_the_rows_in_order(shape):
    W = matrix(*shape)
    order, L, D, U = ldu(W)
    torch.testing.assert_close(L @ (D[:, None] * U), W[order])
    k = min(shape)
    assert torch.equal(L[:k].triu(), torch.eye(k)) and torch.equal(U[:, :k].tril(), torch.eye(k))
    assert L.abs().max() <= 1  # partial pivoting


def test_the_factors_are_scipys():
    W = matrix(6, 4)
    P, L, R = (torch.from_numpy(t).float() for t in lu(W.double().numpy()))
    order, ours, D, U = ldu(W)
    torch.testing.assert_close(ours, L)
    torch.testing.assert_close(D[:, None] * U, R)
    assert torch.equal(order, P.T.argmax(1))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_a_given_order_gives_the_same_factors_and_another_its_own(shape):
    W = matrix(*shape)
    first = ldu(W)
    for a, b in zip(ldu(W, first[0].int()), first):
        torch.testing.assert_close(a, b)
    other = torch.arange(shape[0])
    order, L, D, U = ldu(W, other)
    assert torch.equal(order, other)
    torch.testing.assert_close(L @ (D[:, None] * U), W, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "W", [(9 * matrix(6, 2)).round() @ (9 * matrix(2, 5, seed=1)).round(), torch.zeros(3, 4), torch.ones(4, 4)]
)
def test_pivots_of_zero_leave_finite_factors_with_unit_rows(W):
    _, L, D, U = ldu(W)
    assert torch.isfinite(L).all() and torch.isfinite(U).all()
    dead = D == 0
    assert int((~dead).sum()) == int(torch.linalg.matrix_rank(W))
    assert torch.equal(U[dead], torch.eye(*U.shape)[dead])
