"""fp32 adapters over a base in the precision the hardware is fast at; the base comes back bit for bit."""

import importlib

import pytest
import torch
from small_runs import llama

import veneer
from veneer.train.loop import fit
from veneer.train.precision import choose


@pytest.fixture(params=[True, False], ids=["fast bf16", "slow bf16"])
def fast(request, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("veneer.models.precision"), "fast_bf16", lambda device="cpu": request.param
    )
    return request.param


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_auto_takes_what_the_hardware_does_fast_and_says_so(rows, quick, fast, given):
    model = llama().to(given)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = veneer.attach(model, "lora", rank=4)
    seen, said = [], []

    class Listen:
        def __getattr__(self, name):
            return lambda *values: said.append(str(values))

    model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    fit(adapter, rows, **quick | {"precision": "auto", "display": Listen()})
    assert set(seen) == {torch.bfloat16 if fast else torch.float32}
    assert any(f"computes in {'bf16' if fast else 'fp32'}" in s for s in said)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_a_base_that_trains_keeps_its_precision_unless_told_otherwise(fast):
    adapter = veneer.attach(llama(), "full")
    dtype, words = choose(adapter, "auto", torch.device("cpu"), plain=True)
    assert dtype == torch.float32
    assert "as it was given" in words or not fast
    with pytest.raises(veneer.UserError, match="load the model in bf16 before attaching"):
        choose(adapter, "bf16", torch.device("cpu"), plain=True)


def test_bf16_learns_what_fp32_learns(rows, quick):
    losses = [
        fit(veneer.attach(llama(), "lora", rank=4), rows, **quick | {"precision": p, "steps": 30}).losses
        for p in ("fp32", "bf16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
