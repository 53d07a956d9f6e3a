import pytest
import torch

from veneer.numerics.svd import (
    excess_error,
    extend_basis,
    fix_signs,
    orthonormal_columns,
    randomized_svd,
    subspace_error,
    truncated_svd,
)


def matrix(m, n, decay, seed=0, dtype=torch.float32):
    """Known singular values i^−decay, random singular vectors."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    S = torch.arange(1, k + 1, dtype=torch.float64) ** -decay
    return ((U * S) @ V.mT).to(dtype), S


@pytest.mark.parametrize("shape", [(192, 300), (300, 192), (200, 200)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-5), (torch.bfloat16, 5e-3)])
def test_randomized_svd_finds_the_leading_triplets_of_a_decaying_spectrum(shape, dtype, tolerance):
    M, S = matrix(*shape, decay=1.0, dtype=dtype)
    U, sigma, Vh = randomized_svd(M, 12)
    exact = torch.linalg.svd(M.double(), full_matrices=False)
    assert U.shape == (shape[0], 12) and Vh.shape == (12, shape[1])
    assert U.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sigma.double(), S[:12], rtol=tolerance, atol=0)
    assert subspace_error(U.double(), exact.U[:, :12]) < 10 * tolerance
    assert subspace_error(Vh.mT.double(), exact.Vh[:12].mT) < 10 * tolerance
    assert excess_error(M, U, sigma, Vh) < 1e-4


def test_randomized_svd_is_near_optimal_on_a_flat_spectrum_where_subspace_iteration_is_not():
    M, _ = matrix(256, 400, decay=0.2)
    U, S, Vh = randomized_svd(M, 8)
    peer = torch.svd_lowrank(M, q=8, niter=3)  # the same number of products
    assert excess_error(M, U, S, Vh) < 1.5e-3
    assert excess_error(M, U, S, Vh) < 0.3 * excess_error(M, peer[0], peer[1], peer[2].mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_singular_vectors_are_orthonormal_whatever_the_input_type(dtype):
    M, _ = matrix(200, 240, decay=0.5, dtype=dtype)
    U, _, Vh = randomized_svd(M, 16)
    identity = torch.eye(16, dtype=U.dtype)
    torch.testing.assert_close(U.mT @ U, identity, atol=5e-6, rtol=0)
    torch.testing.assert_close(Vh @ Vh.mT, identity, atol=5e-6, rtol=0)


@pytest.mark.parametrize("true_rank", [0, 3])
def test_matrices_of_lower_rank_than_asked_are_reproduced_with_orthonormal_vectors(true_rank):
    g = torch.Generator().manual_seed(1)
    M = torch.randn(150, true_rank, generator=g) @ torch.randn(true_rank, 180, generator=g)
    U, S, Vh = randomized_svd(M, 6)
    assert torch.linalg.matrix_norm((U * S) @ Vh - M) <= 1e-5 * torch.linalg.matrix_norm(M)
    torch.testing.assert_close(U.mT @ U, torch.eye(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(Vh @ Vh.mT, torch.eye(6), atol=1e-5, rtol=0)
    assert (S[true_rank:] < 1e-4).all()


def test_a_stack_of_matrices_gives_the_same_as_one_by_one_up_to_rounding():
    stack = torch.stack([matrix(120, 160, 1.0, seed=s)[0] for s in range(3)])
    U, S, Vh = randomized_svd(stack, 4)
    for i in range(3):
        u, s, vh = truncated_svd(stack[i], 4, exact=True)
        torch.testing.assert_close((U[i] * S[i]) @ Vh[i], (u * s) @ vh, atol=1e-4, rtol=0)


def test_the_exact_decomposition_stands_in_when_the_space_would_fill_the_matrix():
    M, _ = matrix(20, 30, decay=0.1)
    for got, expected in zip(randomized_svd(M, 6), truncated_svd(M, 6, exact=True)):
        assert torch.equal(got, expected)
    U, S, _ = truncated_svd(M, 50, exact=True)
    assert U.shape == (20, 20) and S.shape == (20,)


def test_results_are_reproducible_follow_the_generator_and_leave_the_global_state_alone():
    M, _ = matrix(120, 160, decay=0.3)
    before = torch.random.get_rng_state()
    first, again = randomized_svd(M, 4), randomized_svd(M, 4)
    other = randomized_svd(M, 4, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(before, torch.random.get_rng_state())


def test_signs_make_the_largest_entry_of_each_right_vector_positive_and_keep_the_product():
    M, _ = matrix(60, 40, decay=0.5)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    flipped_U, flipped = fix_signs(U, Vh)
    torch.testing.assert_close((flipped_U * S) @ flipped, M, atol=1e-5, rtol=0)
    assert (flipped.gather(1, flipped.abs().argmax(1, keepdim=True)) > 0).all()
    for _, V in (randomized_svd(M, 3)[::2], truncated_svd(M, 3, exact=True)[::2]):
        assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()


def test_bases_are_orthonormal_for_dependent_zero_and_badly_scaled_columns():
    g = torch.Generator().manual_seed(2)
    Y = torch.randn(50, 5, generator=g) * torch.tensor([1e6, 1.0, 1e-6, 1.0, 0.0])
    Y[:, 3] = Y[:, 1]
    Q = orthonormal_columns(Y)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(5), atol=1e-5, rtol=0)
    for more in (torch.randn(50, 4, generator=g), Y[:, :4], torch.zeros(50, 4)):
        both = torch.cat([Q, extend_basis(Q, more)], dim=1)
        torch.testing.assert_close(both.mT @ both, torch.eye(9), atol=1e-5, rtol=0)


def test_subspace_error_is_the_root_mean_square_sine_of_the_principal_angles():
    from scipy.linalg import subspace_angles

    g = torch.Generator().manual_seed(3)
    X, Y = (torch.linalg.qr(torch.randn(30, 4, generator=g, dtype=torch.float64)).Q for _ in range(2))
    expected = (torch.from_numpy(subspace_angles(X.numpy(), Y.numpy())).sin() ** 2).mean().sqrt()
    torch.testing.assert_close(subspace_error(X, Y), expected)
    assert subspace_error(X, X) < 1e-12
