"""Block rotations against their definitions in fp64."""

import pytest
import torch

from veneer.numerics.rotations import cayley, cayley_neumann, nearest_divisor, skew, turn


def test_the_skew_matrix_holds_its_upper_triangle_row_by_row():
    assert skew(torch.tensor([[1.0, 2.0, 3.0]]), 3).tolist() == [[[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]]


@pytest.mark.parametrize("size", [0.01, 1.0, 10.0])
def test_the_exact_rotation_is_orthogonal_whatever_its_size(size):
    S = skew(size * torch.randn(3, 28, generator=torch.Generator().manual_seed(0)).double(), 8)
    one = torch.eye(8).double()
    R = one + cayley(S)
    assert torch.allclose(R, (one - S) @ torch.linalg.inv(one + S), atol=1e-12)
    assert torch.allclose(R.mT @ R, one.expand(3, 8, 8), atol=1e-12)


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 8])
def test_the_series_turns_the_other_way_up_to_its_last_power(terms):
    S = skew(torch.tensor([[0.1]]).double(), 2)
    error = cayley_neumann(S, terms) - cayley(-S)
    assert error.abs().max() <= 2.1 * 0.1 ** (2 if terms == 2 else max(terms, 4) - 1)
    assert error.abs().max() >= 0.5 * 0.1 ** (2 if terms == 2 else max(terms, 4) - 1)


def test_turning_is_the_block_diagonal_product_for_any_leading_shape():
    x, D = torch.randn(4, 3, 12).double(), torch.randn(4, 3, 3).double()
    R = torch.eye(12).double() + torch.block_diag(*D)
    assert torch.allclose(turn(x, D), x @ R)
    assert torch.allclose(turn(x[0, 0], D), x[0, 0] @ R)


def test_a_small_turn_survives_half_precision():
    S = skew(torch.full((1, 1), 1e-3), 2)
    D, x = cayley(S), torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() @ (torch.eye(2) + D[0]).double()
    error = (turn(x, D.bfloat16()).double() - exact).norm() / exact.norm()
    assert error < 2**-8.5  # the rounding of the output


def test_the_nearest_divisor():
    assert [nearest_divisor(48, b) for b in (1, 5, 32, 36, 37, 100)] == [1, 4, 24, 24, 48, 48]
    assert nearest_divisor(48, 4, multiple=8) == 3 and nearest_divisor(9, 4, multiple=2) == 0
