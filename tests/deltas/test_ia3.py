"""(IA)³ against its sheet's numbers (000, oracle 10) and against PEFT."""

import copy

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 4, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 7, 7)),
    "embedding": (lambda: nn.Embedding(11, 5), lambda: torch.randint(0, 11, (3, 4))),
}


@pytest.mark.parametrize(
    "recipe, expected", [("ia3", [[2, 4], [1.5, 2]]), ("ia3(feedforward=('0',))", [[2, 1], [6, 2]])]
)
def test_the_sheets_closed_form(recipe, expected):
    model, adapter, delta = at = single(linear([[1.0, 2.0], [3.0, 4.0]]), recipe)
    put(delta, l=[2.0, 0.5])
    assert model(torch.eye(2)).T.tolist() == expected
    adapter.fold()
    assert at.layer.weight.tolist() == expected


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_outputs_and_gradients_agree_with_peft(kind, on_input):
    peft = pytest.importorskip("peft")
    make, example = LAYERS[kind]
    layer, x = make(), example()
    names = ["0"] if on_input else []
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=names)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    other = theirs.base_model.model[0].ia3_l["default"]
    model, adapter, delta = single(layer, f"ia3(feedforward={tuple(names)})")
    stirred(adapter)
    with torch.no_grad():
        other.copy_(delta.l.view_as(other))
    y, expected = model(x), theirs(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    (ours,), (g,) = gradients(y, delta.l), gradients(expected, other)
    assert torch.allclose(ours, g.view_as(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_start_is_the_base_and_the_fold_runs_alike(kind, on_input):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y0 = layer(x)
    model, adapter, _ = single(layer, f"ia3(feedforward={('0',) if on_input else ()})")
    assert torch.equal(model(x), y0)
    stirred(adapter)
    y = model(x)
    assert not torch.allclose(y, y0, atol=1e-2)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)


def test_in_half_precision_the_scale_itself_is_not_rounded():
    layer = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    layer.weight.data = torch.eye(64, dtype=torch.bfloat16)
    model, _, delta = single(layer, "ia3")
    put(delta, l=torch.full((64,), 1 + 0.6 * 2**-7))  # bf16 would make it 1 + 2⁻⁷
    x = torch.randn(64, 64).to(torch.bfloat16)
    exact = x.double() * delta.l.double()
    assert ((model(x).double() - exact).abs() <= 2**-8 * 1.01 * exact.abs()).all()  # one rounding of the output
