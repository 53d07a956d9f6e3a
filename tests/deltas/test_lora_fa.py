"""LoRA-FA against its sheet's oracle (000, 5) and against PEFT."""

import copy

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn

import veneer
from veneer.errors import UserError


def test_a_stays_and_the_change_lies_in_its_row_space():
    model, adapter, delta = at = single(nn.Linear(12, 5), "lora-fa", rank=3, alpha=6.0)
    start = delta.A.clone()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(7, 12)).square().sum().backward()
        optimizer.step()
    assert torch.equal(delta.A, start)
    before = at.layer.weight.detach().clone()
    adapter.fold()
    change = at.layer.weight - before
    row_space = torch.linalg.pinv(start) @ start
    assert change.abs().max() > 0.1
    assert torch.allclose(change @ row_space, change, atol=1e-5)
    assert adapter.parameter_count() == 5 * 3


def test_the_correction_is_the_sheets():
    W, A, s = torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 0.0]]), 3.0
    model, adapter, delta = single(linear(W), "lora-fa-correction", rank=2, alpha=2 * s)
    put(delta, A=A)
    x, g = torch.randn(4, 3), torch.randn(4, 2)
    (model(x) * g).sum().backward()
    G = g.T @ x
    assert torch.allclose(delta.B.grad, s * G @ A.T, atol=1e-5)
    adapter.hooks[0].before_optimizer(0)
    step = s * delta.B.grad @ A  # the change of W for a step of SGD at rate 1
    assert torch.allclose(delta.B.grad, G @ A.T @ torch.linalg.inv(A @ A.T) / s, atol=1e-5)
    assert torch.allclose(step, G * torch.tensor([1.0, 1.0, 0.0]), atol=1e-5)  # A spans the first two coordinates


def test_the_corrected_step_of_adam_is_pefts(monkeypatch):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # the product in fp32
    layer, x = nn.Linear(6, 5), torch.randn(9, 6)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    optimizer = create_lorafa_optimizer(theirs, r=2, lora_alpha=6, lr=0.01)
    optimizer.param_groups[0]["eps"] = 0.0
    inner = theirs.base_model.model[0]
    model, adapter, delta = single(layer, "lora-fa-correction", rank=2, alpha=6.0)
    put(delta, A=inner.lora_A["default"].weight.detach())
    own = torch.optim.AdamW(adapter.parameters(), lr=0.01, eps=0.0, weight_decay=0.0)
    for _ in range(3):
        own.zero_grad(), optimizer.zero_grad()
        model(x).square().sum().backward(), theirs(x).square().sum().backward()
        adapter.hooks[0].before_optimizer(0)
        own.step(), optimizer.step()
    assert torch.allclose(delta.B, inner.lora_B["default"].weight, rtol=1e-4, atol=1e-6)
    assert torch.allclose(model(x), theirs(x), atol=1e-5)


def test_outputs_and_the_gradient_of_b_agree_with_pefts_lora():
    peft = pytest.importorskip("peft")
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    )
    A, B = (getattr(theirs.base_model.model[0], n)["default"].weight for n in ("lora_A", "lora_B"))
    model, adapter, delta = single(layer, "lora-fa", rank=2, alpha=6.0)
    stirred(adapter)
    with torch.no_grad():
        A.copy_(delta.A), B.copy_(delta.B)
    assert torch.allclose(model(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradients(model(x), delta.B)[0], gradients(theirs(x), B)[0], rtol=1e-5, atol=1e-6)


def test_the_file_holds_b_alone_and_a_start_that_fills_a_is_kept(tmp_path):
    for recipe, names in (("lora-fa", {"B", "scale"}), ("lora-fa+pissa", {"A", "B", "scale", "offset"})):
        model, adapter, _ = single(nn.Linear(6, 5), recipe, rank=2)
        stirred(adapter)
        x = torch.randn(3, 6)
        y = model(x)
        assert {key.split(".")[1] for key in adapter.state()} == names
        adapter.save(tmp_path / recipe)
        adapter.detach()
        veneer.load(model, tmp_path / recipe)
        assert torch.equal(model(x), y)


def test_a_correction_where_a_trains_is_refused():
    with pytest.raises(UserError, match="A trains at 0"):
        single(nn.Linear(6, 5), "lora+lora-fa-correction")


def test_the_input_is_not_kept():
    model, adapter, _ = single(nn.Linear(40, 30), "lora-fa", rank=2)
    stirred(adapter)
    x, kept = torch.randn(50, 40, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
    own = {p.data_ptr() for p in model[0].parameters(recurse=False)}
    assert sum(t.untyped_storage().nbytes() for t in kept if t.data_ptr() not in own) <= 4 * (50 * 2 + 2 * 70 + 1)
