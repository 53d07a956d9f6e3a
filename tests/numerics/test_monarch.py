import pytest
import torch

from veneer.numerics.monarch import dense, factors, multiply, project


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SHAPES = {  # (k, q, p), (l, s, t)
    "square": ((4, 4, 4), (4, 4, 4)),
    "slices of rank 2": ((3, 8, 5), (4, 6, 6)),
    "few columns": ((2, 9, 7), (3, 4, 6)),
    "plain low rank": ((1, 3, 10), (1, 8, 3)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_product_is_that_of_the_definition_and_of_the_dense_matrix(name):
    (k, q, p), (l, s, t) = SHAPES[name]
    L1, L2, x = draw(k, q, p), draw(l, s, t, seed=1), draw(2, 3, k * p, seed=2)
    y = torch.zeros(2, 3, l * s, dtype=x.dtype)
    for at in [(a, b) for a in range(2) for b in range(3)]:
        u = torch.stack([L1[i] @ x[at][i * p : (i + 1) * p] for i in range(k)]).flatten()
        for lam in range(l):
            z = torch.stack([u[tau * l + lam] for tau in range(t)])
            for sigma in range(s):
                y[at][sigma * l + lam] = L2[lam, sigma] @ z
    torch.testing.assert_close(multiply(x, L1, L2), y)
    torch.testing.assert_close(x @ dense(L1, L2).T, y)
    A, B = factors(L1, L2)
    assert A.shape == (k * q, k * p) and (A != 0).sum() == L1.numel() and (B != 0).sum() == L2.numel()


def test_the_sheets_projection():
    """Sheet 053, oracle 4."""
    M = torch.arange(1.0, 17.0, dtype=torch.float64).view(4, 4)
    L1, L2 = project(M, 2, 2, 1)
    near = dense(L1, L2)
    expected = torch.tensor([1.43357, 1.61518, 3.33383, 3.69914], dtype=M.dtype)
    torch.testing.assert_close(near[0], expected, atol=1e-5, rtol=0)
    error = (M - near).square().sum()
    assert float(error) == pytest.approx(0.82364, abs=1e-5)
    assert float(error / M.square().sum()) == pytest.approx(0.00055, abs=1e-5)
    slices = M.view(2, 2, 2, 2).permute(2, 1, 0, 3)
    values = torch.linalg.svdvals(slices).view(4, 2)
    sheet = [[13.62554, 0.58713], [20.63613, 0.38767], [17.02290, 0.46996], [24.36991, 0.32827]]
    assert sorted(map(tuple, values.tolist())) == [pytest.approx(v, abs=1e-5) for v in sorted(map(tuple, sheet))]
    torch.testing.assert_close(values[:, 1].square().sum(), error)


@pytest.mark.parametrize("n, k", [(4, 2), (16, 4), (1024, 32)])
def test_projecting_a_monarch_matrix_gives_it_back(n, k):
    M = dense(draw(k, k, n // k, dtype=torch.float32), draw(k, n // k, k, seed=1, dtype=torch.float32))
    near = dense(*project(M, k, k, 1))
    assert torch.linalg.matrix_norm(near - M) < 1e-4 * torch.linalg.matrix_norm(M)


@pytest.mark.parametrize("n, k, l", [(16, 4, 4), (36, 6, 6), (15, 5, 3)])
def test_the_fourier_matrix_is_in_the_class_once_its_inputs_are_permuted(n, k, l):
    """Sheet 053, oracle 3: with the inputs taken k apart."""
    i = torch.arange(n, dtype=torch.float64)
    F = torch.exp(-2j * torch.pi * torch.outer(i, i) / n) / n**0.5
    order = torch.arange(n).view(n // k, k).T.flatten()
    M = F[:, order]
    assert (dense(*project(M, k, l, 1)) - M).abs().max() < 1e-10


def test_the_error_is_what_the_slices_lose_and_full_rank_loses_nothing():
    M = draw(12, 20)
    values = torch.linalg.svdvals(M.view(4, 3, 5, 4).permute(2, 1, 0, 3))
    for rank in (1, 2, 3):
        error = (M - dense(*project(M, 5, 3, rank))).square().sum()
        torch.testing.assert_close(error, values[..., rank:].square().sum())
    for rank in (4, 6):
        torch.testing.assert_close(dense(*project(M, 5, 3, rank)), M)


def test_identity_and_block_diagonal_matrices_are_in_the_class_and_a_stride_permutation_is_not():
    eye = torch.eye(16, dtype=torch.float64)
    for M in (eye, torch.block_diag(*draw(4, 4, 4))):
        torch.testing.assert_close(dense(*project(M, 4, 4, 1)), M)
    stride = eye[torch.arange(16).view(4, 4).T.flatten()]  # its slices are four identities and zeros
    assert float((dense(*project(stride, 4, 4, 1)) - stride).square().sum()) == pytest.approx(12)


def test_gradients_are_finite_differences():
    inputs = [t.requires_grad_() for t in (draw(3, 6), draw(2, 6, 3), draw(3, 2, 4))]
    assert torch.autograd.gradcheck(multiply, inputs)
