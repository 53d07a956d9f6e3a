import pytest
import torch

from veneer.errors import UserError
from veneer.numerics import factored


def pair(rank, out=20, inputs=14, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, inputs, generator=g, dtype=dtype)
    return A, torch.randn(out, rank, generator=g, dtype=dtype)


def dense(p):
    return p[1] @ p[0]


def test_sums_differences_and_weighted_stacks_equal_the_dense_ones():
    p, q = pair(3), pair(5, seed=1)
    torch.testing.assert_close(dense(factored.add(p, q)), dense(p) + dense(q))
    torch.testing.assert_close(dense(factored.subtract(p, q)), dense(p) - dense(q))
    torch.testing.assert_close(dense(factored.stack([p, q], [0.5, -2.0])), 0.5 * dense(p) - 2 * dense(q))


def test_norm_inner_product_and_singular_values_equal_the_dense_ones():
    p, q = pair(3), pair(25, seed=1)
    torch.testing.assert_close(factored.frobenius_norm(*q), torch.linalg.matrix_norm(dense(q)))
    torch.testing.assert_close(factored.inner(*p, *q), (dense(p) * dense(q)).sum())
    torch.testing.assert_close(factored.singular_values(*p), torch.linalg.svdvals(dense(p))[:3])
    torch.testing.assert_close(factored.singular_values(*q), torch.linalg.svdvals(dense(q)))


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_recompression_to_a_rank_is_the_best_approximation_and_tells_its_error(rank):
    p = pair(10)
    A, B, error = factored.recompress(*p, rank=rank)
    S = torch.linalg.svdvals(dense(p))
    assert A.shape == (rank, 14) and B.shape == (20, rank)
    lost = torch.linalg.matrix_norm(dense(p) - B @ A)
    torch.testing.assert_close(lost, torch.linalg.vector_norm(S[rank:]))  # Eckart-Young
    assert error == pytest.approx(float(lost / torch.linalg.vector_norm(S)), rel=1e-9)
    torch.testing.assert_close(A @ A.mT, torch.diag(S[:rank]))
    torch.testing.assert_close(B.mT @ B, torch.diag(S[:rank]))


def test_recompression_drops_null_directions_only_when_nothing_else_is_asked():
    p = pair(4)
    A, B, error = factored.recompress(*factored.stack([p, p, pair(2, seed=7)]))
    assert A.shape[0] == 6 and error < 1e-12
    torch.testing.assert_close(B @ A, 2 * dense(p) + dense(pair(2, seed=7)))


def test_recompression_to_a_tolerance_takes_the_smallest_rank_that_keeps_it():
    p = pair(10)
    S = torch.linalg.svdvals(dense(p))[:10]
    A, _, error = factored.recompress(*p, tolerance=0.3)
    k = A.shape[0]
    tail = lambda n: float(torch.linalg.vector_norm(S[n:]) / torch.linalg.vector_norm(S))  # noqa: E731
    assert tail(k) <= 0.3 < tail(k - 1)
    assert error == pytest.approx(tail(k), rel=1e-9)
    assert factored.recompress(*p, rank=2, tolerance=0.0)[0].shape[0] == 2


def test_a_zero_product_keeps_one_zero_component_and_the_dtype_stays():
    A, B, error = factored.recompress(torch.randn(3, 8, dtype=torch.bfloat16), torch.zeros(5, 3, dtype=torch.bfloat16))
    assert A.shape == (1, 8) and A.dtype == B.dtype == torch.bfloat16
    assert error == 0.0 and not (B @ A).any()


def test_a_difference_of_near_equal_products_keeps_its_norm():
    A, B = pair(3)
    moved = factored.subtract((A, B), (A, B + 1e-6 * pair(3, seed=5)[1]))
    expected = torch.linalg.matrix_norm(dense(moved))
    torch.testing.assert_close(torch.linalg.vector_norm(factored.singular_values(*moved)), expected, rtol=1e-6, atol=0)


def test_sums_of_different_shapes_and_ranks_below_one_are_refused_in_a_sentence():
    with pytest.raises(UserError, match="one shape"):
        factored.add(pair(2), pair(2, out=21))
    with pytest.raises(UserError, match="one weight"):
        factored.stack([pair(2)], [1.0, 2.0])
    with pytest.raises(UserError, match="at least 1"):
        factored.recompress(*pair(2), rank=0)
    with pytest.raises(UserError, match="at least 0"):
        factored.recompress(*pair(2), tolerance=-0.1)
