"""Row norms by Gram algebra against the norms of the dense sum."""

import pytest
import torch

from veneer.numerics.norms import row_norms, row_squares


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-3)])
def test_row_norms_are_those_of_the_dense_sum(dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(40, 64, generator=g, dtype=torch.float64).to(dtype)
    A, B = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 64), (40, 4)))
    A, B = (t if dtype is torch.float64 else t.float() for t in (A, B))
    dense = (W.double() + 0.3 * B.double() @ A.double()).norm(dim=1)
    norms = row_norms(row_squares(W), W, A, B, 0.3)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norms.double(), dense, rtol=tolerance, atol=0)


def test_a_row_that_the_change_cancels_keeps_its_digits():
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 32, generator=g), torch.randn(8, 3, generator=g)
    W = -(B @ A) * (1 + 1e-4)
    dense = (W.double() + B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(row_norms(row_squares(W), W, A, B, 1.0).double(), dense, rtol=1e-2, atol=0)
    assert row_norms(row_squares(W), W, A, torch.zeros_like(B), 1.0).sub(W.norm(dim=1)).abs().max() < 1e-6 * W.norm()
