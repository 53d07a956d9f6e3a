"""Products of fp32 matrices by whichever of the libraries in torch is fast."""

from __future__ import annotations

import torch
from torch import Tensor


def product(x: Tensor, w: Tensor) -> Tensor:
    """x·wᵀ (n, m) of x (n, k) and w (m, k), either of which may be a transposed view; no gradients.

    On a CPU, torch hands fp32 products to MKL, which on processors not its maker's takes about twice as long as oneDNN;
    the same sums in fp32, in another order.
    """
    if ONEDNN and x.device.type == "cpu" and x.dtype is w.dtype is torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return x @ w.mT


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
