import pytest
import torch

from veneer.numerics.spectrum import distinct, energy_rank, frame, leave_out


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_the_frame_gives_the_matrix_back_and_its_leading_part(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = frame(W)
    torch.testing.assert_close((U * S) @ Vh, W)
    assert (Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) > 0).all()
    assert all(torch.equal(a, b) for a, b in zip(frame(W, 2), (U[:, :2], S[:2], Vh[:2])))


def test_the_frame_of_a_rounded_copy_in_another_order_of_sums_is_the_same_to_rounding():
    W = torch.randn(60, 60, generator=torch.Generator().manual_seed(1))
    turn = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    U, S, Vh = frame(W)
    P, T, Qh = frame(W[turn])  # the same problem, summed in another order
    torch.testing.assert_close(T, S)
    torch.testing.assert_close(P, U[turn], atol=1e-6, rtol=0)
    torch.testing.assert_close(Qh, Vh, atol=1e-6, rtol=0)


def test_equal_singular_values_are_seen():
    assert distinct(torch.tensor([3.0, 2.0, 1.0])) and distinct(torch.tensor([3.0]))
    assert not distinct(torch.tensor([3.0, 1.0, 1.0])) and not distinct(torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("share, k", [(0.0, 0), (0.5, 1), (4 / 7, 1), (0.6, 2), (0.8, 3), (0.9, 4), (1.0, 4)])
def test_the_energy_rule_counts_squares(share, k):
    assert energy_rank(torch.tensor([2.0, 1.0, 1.0, 1.0]), share) == k  # sheet 085, oracle 9: 4/7, 5/7, 6/7, 1


def test_values_of_zero_carry_no_energy():
    assert energy_rank(torch.tensor([2.0, 1.0, 0.0]), 1.0) == 2


def test_what_is_left_out_is_orthogonal_and_taken_once():
    g = torch.Generator().manual_seed(3)
    V = torch.linalg.qr(torch.randn(9, 3, generator=g)).Q
    rows = torch.randn(4, 9, generator=g)
    rest = leave_out(rows, V)
    torch.testing.assert_close(rest @ V, torch.zeros(4, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(leave_out(rest, V), rest, atol=1e-6, rtol=0)
    torch.testing.assert_close(rows - rest, rows @ V @ V.T, atol=1e-6, rtol=0)
    assert leave_out(rows, V[:, :0]) is rows
