"""OFT against its sheet's numbers (000, oracle 11) and against PEFT."""

import copy

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn

import veneer
from veneer.errors import UserError

LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), lambda: torch.randn(3, 4, 12)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(2, 4, 7)),
}


@pytest.mark.parametrize("series", [True, False])
def test_the_sheets_closed_form(series):
    model, adapter, delta = at = single(linear(torch.eye(2)), f"oft(block_size=2, cayley_neumann={series})")
    put(delta, Q=[[0.1]])
    c, s = (0.9801, 0.1980) if series else (0.9801980, -0.1980198)
    assert torch.allclose(model(torch.eye(2)), torch.tensor([[c, s], [-s, c]]), atol=1e-6)
    R = model(torch.eye(2))
    off = (R.T @ R - torch.eye(2)).abs().max()
    assert (1.9e-4 < off < 2.1e-4) if series else off < 1e-7
    adapter.fold()
    assert torch.allclose(at.layer.weight, torch.tensor([[c, -s], [s, c]]), atol=1e-6)


FORMS = {
    "exact": ({"use_cayley_neumann": False}, "block_size=4"),
    "series": ({}, "block_size=4, cayley_neumann=True"),
    "shared": ({"block_share": True, "use_cayley_neumann": False}, "block_size=4, block_share=True"),
    "coft": ({"coft": True, "eps": 0.05, "use_cayley_neumann": False}, "block_size=4, coft=True, eps=0.05"),
    "three terms": ({"num_cayley_neumann_terms": 3}, "block_size=4, cayley_neumann=True, terms=3"),
    "by number": ({"r": 3, "oft_block_size": 0}, "cayley_neumann=True, blocks=3, block_size=0"),
    "adjusted": ({"oft_block_size": 5}, "cayley_neumann=True, block_size=5"),
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_agree_with_peft(form):
    peft = pytest.importorskip("peft")
    config, fields = FORMS[form]
    layer, x = nn.Linear(12, 7), torch.randn(3, 4, 12)
    config = peft.OFTConfig(**({"oft_block_size": 4, "target_modules": ["0"]} | config))
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    other = theirs.base_model.model[0].oft_R["default"].weight
    model, adapter, delta = single(layer, f"oft({fields})")
    stirred(adapter)
    with torch.no_grad():
        other.copy_(delta.Q)
    y, expected = model(x), theirs(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    if form != "coft":  # there PEFT overwrites the tensor, and the bound has no gradient
        (ours,), (g,) = gradients(y, delta.Q), gradients(expected, other)
        assert torch.allclose(ours, g, rtol=1e-4, atol=1e-5)


def test_a_convolution_is_what_peft_merges():
    peft = pytest.importorskip("peft")
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 7)
    config = peft.OFTConfig(oft_block_size=6, target_modules=["0"], use_cayley_neumann=False)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    model, adapter, delta = single(layer, "oft(block_size=6)")
    stirred(adapter)
    with torch.no_grad():
        theirs.base_model.model[0].oft_R["default"].weight.copy_(delta.Q)
    assert torch.allclose(model(x), theirs.merge_and_unload()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_norms_and_angles_of_rows_stay_and_the_fold_runs_alike(kind):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    W, y0 = layer.weight.detach().clone().flatten(1), layer(x)
    model, adapter, delta = at = single(layer, "oft(block_size=4)")
    assert torch.allclose(model(x), y0, atol=1e-6)
    stirred(adapter, 1.0)
    y = model(x)
    (y * torch.randn_like(y)).sum().backward()
    assert delta.Q.grad.abs().sum() > 0
    adapter.fold()
    folded = at.layer.weight.flatten(1)
    assert torch.allclose(model(x), y, atol=1e-5)
    assert (folded - W).abs().max() > 0.1
    assert torch.allclose(folded @ folded.T, W @ W.T, atol=1e-5)


def test_on_another_adapter_it_turns_what_lies_beneath():
    model, below, lora = at = single(nn.Linear(12, 7), "lora", rank=2, name="below")
    stirred(below)
    above = veneer.attach(model, "oft(block_size=4)", sites="all", name="above")
    stirred(above)
    (oft,) = above.deltas.values()
    x = torch.randn(3, 12)
    R = torch.eye(12) + torch.block_diag(*oft.rotation())
    W = at.layer.weight + lora.scale * lora.B @ lora.A
    assert torch.allclose(model(x), x @ R @ W.T + at.layer.bias, atol=1e-5)


def test_backward_keeps_the_input_and_the_blocks():
    model, adapter, _ = single(nn.Linear(64, 64), "oft(block_size=8)")
    stirred(adapter)
    x, kept = torch.randn(5, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    inputs = {x.untyped_storage().data_ptr(), model[0].weight.untyped_storage().data_ptr()}
    rest = [t for t in kept if t.untyped_storage().data_ptr() not in inputs]
    assert max(t.numel() for t in rest) <= 8 * 8 * 8


def test_no_size_at_all_is_refused():
    with pytest.raises(UserError, match="both 0"):
        single(nn.Linear(6, 5), "oft(block_size=0)")
