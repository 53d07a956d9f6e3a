"""In bf16 the base and an additive change are summed before they are rounded."""

import pytest
import torch
from torch import nn

import veneer


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "sltrain", "gaussian-lora"])
def test_a_change_of_less_than_the_base_s_last_digit_survives(method):
    """The slope of what came out more on the exact change, over many outputs, is 1; 0 if the base is rounded first."""
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 64, generator=g) / 8)
        adapter = veneer.attach(model.eval(), method, sites="*0", seed=0)
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=g) * p.abs().mean().clamp_min(1e-3) * 0.05)
        x = (1 + torch.rand(16384, 64, generator=g)).bfloat16()
        with_change = model(x).double()
        with adapter.disabled():
            without = model(x).double()
        (delta,) = adapter.every().values()
        change = x.double() @ delta.weight().double().T
    assert float(change.norm() / without.norm()) < 2**-9
    slope = float(((with_change - without) * change).sum() / (change * change).sum())
    assert slope == pytest.approx(1, abs=0.25)
