"""Products by another library are the same products."""

import pytest
import torch

from veneer.numerics.products import product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n, m, k", [(300, 200, 16), (1, 5, 3), (16, 96, 130)])
def test_it_is_the_product_with_the_transpose(n, m, k, dtype):
    x, w = torch.randn(n, k, dtype=dtype), torch.randn(m, k, dtype=dtype)
    wanted = x.double() @ w.double().mT
    near = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps * float(wanted.abs().max())}
    assert torch.allclose(product(x, w).double(), wanted, **near)
    assert torch.allclose(product(x.mT.contiguous().mT, w.mT.contiguous().mT).double(), wanted, **near)
    assert product(x, w).dtype is dtype
