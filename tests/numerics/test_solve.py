import pytest
import torch

from veneer.errors import UserError
from veneer.numerics import solve


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(r, seed=0):
    X = draw(r, 2 * r, seed=seed)
    return X @ X.mT


def test_the_sylvester_solution_equals_scipys_and_leaves_no_residual():
    from scipy.linalg import solve_sylvester

    P, Q, C = gram(5), gram(3, seed=1), draw(5, 3, seed=2)
    X = solve.sylvester_symmetric(P, Q, C)
    torch.testing.assert_close(X, torch.from_numpy(solve_sylvester(P.numpy(), Q.numpy(), C.numpy())))
    assert torch.linalg.matrix_norm(P @ X + X @ Q - C) <= 1e-10 * torch.linalg.matrix_norm(C)


def test_the_sylvester_equation_of_lora_pro_by_hand():
    # sheet 026, oracle 4: BᵀB = 2, AAᵀ = 5, C = −(1/s²)(BᵀB)⁻¹ g_A Aᵀ = −1.75 with s = 2, g_A = (2, 6), A = (1, 2)
    C = -0.25 * 0.5 * torch.tensor([[2.0, 6.0]]) @ torch.tensor([[1.0], [2.0]])
    X = solve.sylvester_symmetric(torch.tensor([[2.0]]), torch.tensor([[5.0]]), C)
    torch.testing.assert_close(X, torch.tensor([[-0.25]]))


def test_singular_coefficients_give_the_solution_of_least_norm_and_zero_gives_zero():
    P, Q = torch.diag(draw(3).abs()), torch.diag(draw(3, seed=1).abs())
    P[0, 0] = Q[0, 0] = 0
    C = draw(3, 3, seed=2)
    C[0, 0] = 0
    X = solve.sylvester_symmetric(P, Q, C)
    torch.testing.assert_close(P @ X + X @ Q, C)
    assert X[0, 0] == 0
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert not solve.sylvester_symmetric(zero, zero, C).any()


def test_batches_solve_one_by_one_and_fp32_stays_fp32():
    P, Q, C = (
        torch.stack([f(s) for s in range(4)]).float()
        for f in (lambda s: gram(3, s), lambda s: gram(2, s + 9), lambda s: draw(3, 2, seed=s))
    )
    X = solve.sylvester_symmetric(P, Q, C)
    assert X.dtype == torch.float32
    for i in range(4):
        torch.testing.assert_close(X[i], solve.sylvester_symmetric(P[i], Q[i], C[i]))


def test_the_ridge_of_a_gram_inverse_follows_its_scale():
    G = gram(4)
    inverse = solve.gram_inverse(G, relative=1e-2)
    torch.testing.assert_close(inverse, torch.linalg.inv(G + 1e-2 * G.trace() / 4 * torch.eye(4, dtype=G.dtype)))
    torch.testing.assert_close(solve.gram_inverse(1e-12 * G, relative=1e-2), 1e12 * inverse)
    torch.testing.assert_close(solve.gram_inverse(G, relative=0.0), torch.linalg.inv(G))


def test_gram_inverses_of_singular_and_zero_matrices_are_finite():
    X = draw(4, 2)
    G = X @ X.mT
    torch.testing.assert_close(solve.gram_inverse(G, relative=0.0), torch.linalg.pinv(G, rtol=1e-12))
    assert torch.isfinite(solve.gram_inverse(G)).all()
    assert not solve.gram_inverse(torch.zeros(3, 3)).any()


def test_roots_of_a_gram_matrix_multiply_back_and_leave_null_directions_null():
    G = gram(4)
    half = solve.gram_root(G, 0.5)
    torch.testing.assert_close(half @ half, G)
    torch.testing.assert_close(solve.gram_root(G, -0.5) @ half, torch.eye(4, dtype=G.dtype))
    flat = solve.gram_root(torch.diag(torch.tensor([4.0, 0.0])), -0.5)
    torch.testing.assert_close(flat, torch.diag(torch.tensor([0.5, 0.0])))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_the_polar_factor_equals_scipys(shape):
    from scipy.linalg import polar

    M = draw(*shape)
    torch.testing.assert_close(solve.polar_factor(M), torch.from_numpy(polar(M.numpy())[0]))


def test_nystrom_is_exact_on_a_matrix_of_the_corners_rank_and_reproduces_the_chosen_rows_and_columns():
    # sheet 009, oracles 3, 4 and 11
    W = draw(9, 3) @ draw(3, 7, seed=1)
    rows, columns = torch.tensor([5, 0, 8]), torch.tensor([1, 6, 2])
    B, N, A = solve.nystrom(W, rows, columns, cutoff=1e-12)
    torch.testing.assert_close(B @ N @ A, W)
    full = draw(9, 7)
    B, N, A = solve.nystrom(full, rows, columns, cutoff=1e-12)
    approximation = B @ N @ A
    torch.testing.assert_close(approximation[rows], full[rows])
    torch.testing.assert_close(approximation[:, columns], full[:, columns])
    tiny = solve.nystrom(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([0]), torch.tensor([0]))
    torch.testing.assert_close(tiny[0] @ tiny[1] @ tiny[2], torch.tensor([[2.0, 1.0], [1.0, 0.5]]))
    with pytest.raises(UserError, match="at least one row"):
        solve.nystrom(full, rows[:0], columns)


def test_nystrom_damps_an_ill_conditioned_corner():
    W = torch.eye(4, dtype=torch.float64)
    W[1, 1] = 1e-6
    _, N, _ = solve.nystrom(W, torch.arange(2), torch.arange(2), cutoff=1e-3)
    torch.testing.assert_close(N, torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)))
