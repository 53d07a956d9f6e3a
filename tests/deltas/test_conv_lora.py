"""ConvLoRA against the numbers of its sheet (008) and against PEFT's convolution."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from single import gradients, put, single, stirred
from torch import nn

import veneer
from veneer.errors import UserError

LAYERS = {
    "3x3": lambda: nn.Conv2d(4, 5, 3, padding=1),
    "stride": lambda: nn.Conv2d(4, 5, 3, stride=2),
    "dilation": lambda: nn.Conv2d(4, 5, 3, dilation=2, padding=1),
    "oblong": lambda: nn.Conv2d(4, 5, (3, 2)),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "reflect": lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"),
}


def example() -> torch.Tensor:
    """Images of four channels."""
    return torch.randn(2, 4, 9, 8)


def test_the_view_is_the_sheets_oracle_3():
    at = single(nn.Conv2d(2, 1, 2), "conv-lora", rank=1, alpha=1.0)
    put(at.delta, A=[[1, 2, 3, 4], [5, 6, 7, 8]], B=[[1, 0], [0, 2]])
    kernel = at.delta.weight().view(1, 2, 2, 2)
    assert torch.equal(kernel[0], torch.tensor([[[1.0, 2], [3, 4]], [[10, 12], [14, 16]]]))


@pytest.mark.parametrize("form", ["loralib", "two_conv"])
@pytest.mark.parametrize("kind", LAYERS)
def test_running_is_one_convolution_with_the_changed_kernel(kind, form):
    layer = LAYERS[kind]()
    own, x = copy.deepcopy(layer), example()
    model, adapter, delta = at = single(layer, f"conv-lora(form='{form}')", rank=2)
    assert torch.equal(model(x), own(x))
    stirred(adapter)
    kernel = own.weight + delta.weight().view_as(own.weight)
    own.weight.data = kernel.detach()
    assert torch.allclose(model(x), own(x), atol=1e-5)
    adapter.fold()
    assert torch.allclose(at.layer.weight, kernel, atol=1e-6)
    assert delta.parameter_count() == adapter.parameter_count()


def test_the_flattened_change_is_the_row_of_blocks():
    _, adapter, d = single(nn.Conv2d(7, 20, 3), "conv-lora", rank=1)
    stirred(adapter)
    blocks = torch.cat([d.B[a::3] @ d.A for a in range(3)], dim=1)
    assert torch.allclose(d.weight(), d.scale * blocks, atol=1e-6)
    assert torch.linalg.matrix_rank(d.weight()) == 9  # r·k²


def test_sizes_are_the_sheets():
    sizes = {(26, 2): 936, (26, 8): 3744, (48, 8): 5328}
    for (out, rank), count in sizes.items():
        assert single(nn.Conv2d(26, out, 3), "conv-lora", rank=rank).adapter.parameter_count() == count


def test_a_kernel_of_one_is_lora():
    model, adapter, d = at = single(nn.Conv2d(4, 5, 1), "conv-lora", rank=2, alpha=3.0)
    stirred(adapter)
    x = example()
    W = at.layer.weight[..., 0, 0] + 1.5 * d.B @ d.A
    assert torch.allclose(model(x), F.conv2d(x, W[..., None, None], at.layer.bias), atol=1e-5)


def test_gradients_are_those_of_the_composed_kernel():
    model, adapter, d = at = single(LAYERS["stride"](), "conv-lora", rank=2)
    stirred(adapter)
    x = example()
    kernel = at.layer.weight + d.scale * (d.B @ d.A).view_as(at.layer.weight)
    expected = gradients(F.conv2d(x, kernel, at.layer.bias, stride=2), d.A, d.B)
    for ours, other in zip(gradients(model(x), d.A, d.B), expected):
        assert torch.allclose(ours, other, atol=1e-5)
    assert at.layer.weight.grad is None and not at.layer.weight.requires_grad


@pytest.mark.parametrize("out", [5, 40])  # below and above r·k²
def test_the_plain_form_is_the_same_change_in_peft(out, tmp_path):
    peft = pytest.importorskip("peft")
    layer = nn.Conv2d(4, out, 3, stride=2, padding=1)
    base, x = nn.Sequential(copy.deepcopy(layer)), example()
    model, adapter, d = single(layer, "conv-lora", rank=2)
    stirred(adapter)
    assert len(d.as_lora(None, None).A) == min(out, 18)
    adapter.export(tmp_path / "peft", format="peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    assert torch.allclose(theirs(x), model(x), atol=1e-5)


def test_two_convolutions_agree_with_peft():
    peft = pytest.importorskip("peft")
    layer, x = LAYERS["3x3"](), example()
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
    )
    model, adapter, d = single(layer, "conv-lora(form='two_conv')", rank=2, alpha=4.0)
    stirred(adapter)
    inner = theirs.base_model.model[0]
    inner.lora_A["default"].weight.data = d.A.detach().view(2, 4, 3, 3)
    inner.lora_B["default"].weight.data = d.B.detach().view(5, 2, 1, 1)
    assert torch.allclose(model(x), theirs(x), atol=1e-5)


def test_in_bf16_a_change_below_the_weights_resolution_still_counts():
    layer = nn.Conv2d(2, 1, 1, bias=False).to(torch.bfloat16)
    layer.weight.data.fill_(1.0)
    model, _, d = single(layer, "conv-lora", rank=1, alpha=1.0)
    put(d, A=[[2.0**-10, 0.0]], B=[[1.0]])
    x = torch.tensor([1.0, -1.0], dtype=torch.bfloat16).view(1, 2, 1, 1)
    assert model(x).item() == 2.0**-10  # 1 + 2⁻¹⁰ is 1 in bf16


def test_above_another_adapter_both_act():
    model, below, lora = at = single(LAYERS["3x3"](), "lora", rank=2, name="below")
    stirred(below)
    above = veneer.attach(model, "conv-lora", sites="conv", name="above", seed=3)
    stirred(above)
    (d,) = above.deltas.values()
    x = example()
    kernel = at.layer.weight + (lora.weight() + d.weight()).view_as(at.layer.weight)
    assert torch.allclose(model(x), F.conv2d(x, kernel, at.layer.bias, padding=1), atol=1e-5)


def test_layers_have_ranks_by_globs(tmp_path):
    def made():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        return nn.Sequential(OrderedDict(body=body, upsampler=nn.Conv2d(4, 8, 3)))

    model = made()
    adapter = veneer.attach(model, "conv-lora(rank=2, ranks=('upsampler*=8', '1=4', '*=3'))", sites="conv")
    stirred(adapter)
    found = {path: (d.rank, len(d.A) // 3, d.scale) for path, d in adapter.deltas.items()}
    assert found == {"body.0": (3, 3, 2.0), "body.1": (4, 4, 2.0), "upsampler": (8, 8, 2.0)}
    adapter.save(tmp_path / "kept")
    again = made()
    veneer.load(again, tmp_path / "kept")
    x = example()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(("ranks", "said"), [("'head=8',", "no selected convolution"), ("'body',", "a glob, = and")])
def test_ranks_that_fit_nothing_or_say_none_are_refused(ranks, said):
    with pytest.raises(UserError, match=said):
        veneer.attach(nn.Sequential(nn.Conv2d(4, 4, 3)), f"conv-lora(ranks=({ranks}))", sites="conv")
