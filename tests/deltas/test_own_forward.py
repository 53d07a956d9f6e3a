"""Forms at convolutions that pad inside their own forward, as EfficientNet's and other ports from TensorFlow do."""

import pytest
import torch
import torch.nn.functional as F
from single import gradients, stirred
from torch import Tensor, nn

import veneer

FORMS = ["lora", "rslora", "dora", "loha", "lokr", "oft(block_size=3)", "boft(block_size=3)", "vera(rank=4)"]
FORMS += ["conv-lora", "conv-lora(form='two_conv')", "randlora", "ia3", "lora-xs(rank=2)", "lora-fa"]


class SamePadding(nn.Conv2d):
    """Output sides are the input's over the stride, rounded up; what is missing is padded, more of it at the end."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, k, s in zip(x.shape[-1:-3:-1], self.kernel_size[::-1], self.stride[::-1]):
            missing = max((-(-size // s) - 1) * s + k - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Net(nn.Module):
    """A strided, a depthwise and a pointwise convolution, as in an inverted bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = SamePadding(3, 6, 3, stride=2, bias=False)
        self.depth = SamePadding(6, 6, 3, groups=6)
        self.project = SamePadding(6, 5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu6(self.depth(F.relu6(self.expand(x)))))


@pytest.mark.parametrize("form", FORMS)
def test_a_form_starts_at_the_base_and_runs_as_it_folds(form):
    model, x = Net().eval(), torch.rand(2, 3, 9, 8)
    base = model(x)
    adapter = veneer.attach(model, form, sites="conv")
    assert torch.allclose(model(x), base, atol=1e-6)
    stirred(adapter, 0.1)
    running = model(x)
    assert not torch.allclose(running, base, atol=1e-4)
    adapter.fold()
    assert (model(x) - running).abs().max() <= 1e-5 * running.abs().max()
    adapter.detach()
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "dora"])  # whose norm is a constant, by design
def test_its_gradients_are_those_of_the_folded_weights(form):
    model, x = Net(), torch.rand(2, 3, 9, 8)
    adapter = veneer.attach(model, form, sites="conv")
    stirred(adapter, 0.1)
    wanted = adapter.parameters()
    found = gradients(model(x), *wanted)
    folded = {}
    for path, d in adapter.deltas.items():
        if d.site.name is None:
            W, b = d.fold(d.site.weight(), d.site.bias())
            folded |= {f"{path}.weight": W.view_as(d.site.module.weight), f"{path}.bias": b}
    with adapter.disabled():
        y = torch.func.functional_call(model, {n: t for n, t in folded.items() if t is not None}, (x,))
    for ours, other in zip(found, gradients(y, *wanted)):
        assert (ours - other).abs().max() <= 1e-5 * other.abs().max()
