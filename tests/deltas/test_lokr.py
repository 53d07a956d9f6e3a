"""LoKr against its sheet's numbers (000, oracle 9), PEFT and the dense Kronecker product."""

import copy

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn

from veneer.deltas.lokr import split

LAYERS = {
    "linear": (lambda: nn.Linear(48, 32), lambda: torch.randn(3, 4, 48)),
    "vector": (lambda: nn.Linear(48, 32), lambda: torch.randn(48)),
    "conv": (lambda: nn.Conv2d(12, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 12, 7, 6)),
    "image": (lambda: nn.Conv2d(12, 8, 3), lambda: torch.randn(12, 7, 6)),
    "grouped": (lambda: nn.Conv2d(12, 8, 3, groups=2), lambda: torch.randn(2, 12, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(12, 8, 3), lambda: torch.randn(2, 12, 7)),
    "embedding": (lambda: nn.Embedding(30, 12), lambda: torch.randint(0, 30, (3, 4))),
}
FORMS = {
    "low rank": (1, ""),
    "whole": (8, ""),
    "both": (1, "(decompose_both=True)"),
    "factor": (2, "(decompose_factor=4)"),
}


def attached(kind, form):
    make, example = LAYERS[kind]
    rank, fields = FORMS[form]
    layer, x = make(), example()
    model, adapter, delta = single(copy.deepcopy(layer), f"lokr{fields}", rank=rank, alpha=3.0)
    stirred(adapter)
    return layer, x, model, delta


def test_the_sheets_closed_form():
    model, _, delta = single(linear(torch.zeros(2, 2)), "lokr(decompose_factor=1)", rank=1)
    assert [s.name for s in delta.slots()] == ["w1", "w2"]  # both whole: 1×1 and 2×2
    put(delta, w1=[[2.0]], w2=[[1, 2], [3, 6]])
    assert model(torch.eye(2)).T.tolist() == [[2, 4], [6, 12]]
    delta.set_tensor("w1", torch.tensor([[1.0, 2.0]]), trained=True)  # o1·o2 = 1·2, i1·i2 = 2·1
    delta.set_tensor("w2", torch.tensor([[1.0], [3.0]]), trained=True)
    assert model(torch.eye(2)).T.tolist() == [[1, 2], [3, 6]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_running_is_the_dense_kronecker_product(kind, form):
    _, x, model, delta = attached(kind, form)
    w1 = delta.w1 if hasattr(delta, "w1") else delta.w1a @ delta.w1b
    w2 = delta.w2 if hasattr(delta, "w2") else delta.w2a @ delta.w2b
    W = delta.site.weight() + delta.scale * torch.kron(w1, w2)
    expected = delta.site.run(x, W, delta.site.bias())
    own = list(delta.parameters())
    y = model(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    for g, h in zip(gradients(y, *own), gradients(expected, *own)):
        assert torch.allclose(g, h, rtol=1e-4, atol=1e-4)


PAIRS = [(kind, form) for kind in ("linear", "conv", "grouped") for form in FORMS]
PAIRS += [("conv1d", "low rank"), ("conv1d", "both")]  # of a whole w2 PEFT 0.21.2 takes the wrong axes there


@pytest.mark.parametrize("kind, form", PAIRS)
def test_outputs_agree_with_peft(kind, form):
    peft = pytest.importorskip("peft")
    layer, x, model, delta = attached(kind, form)
    config = peft.LoKrConfig(
        r=delta.rank, alpha=3, target_modules=["0"], decompose_both=delta.decompose_both,
        decompose_factor=delta.decompose_factor,
    )  # fmt: skip
    theirs = peft.get_peft_model(nn.Sequential(layer), config)
    inner = theirs.base_model.model[0]
    for name, key in type(delta).peft.keys.items():
        assert hasattr(delta, name) == bool(getattr(inner, key))
        if hasattr(delta, name):
            other = getattr(inner, key)["default"]
            other.data.copy_(getattr(delta, name).detach().view_as(other))
    assert torch.allclose(model(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_dimensions_split_as_in_peft():
    peft = pytest.importorskip("peft.tuners.lokr.layer")
    assert split(576) == (24, 24) and split(192) == (12, 16) and split(1536) == (32, 48) and split(127) == (1, 127)
    assert all(split(n, f) == peft.factorization(n, f) for n in range(1, 200) for f in (-1, 1, 2, 3, 4, 6, 8, 13))


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_the_start_is_the_base_in_both_ways_and_the_fold_runs_alike(kind):
    make, example = LAYERS[kind]
    for start, zero in (("peft", "w1"), ("lycoris", "w2b")):
        layer, x = make(), example()
        y0 = layer(x)
        model, adapter, delta = single(layer, f"lokr(start={start!r})", rank=1)
        assert torch.equal(model(x), y0)
        assert [n for n, p in delta.named_parameters() if not p.any()] == [zero]
        stirred(adapter)
        y = model(x)
        adapter.fold()
        assert torch.allclose(model(x), y, atol=1e-5)


@pytest.mark.parametrize("sizes", [(64, 256), (256, 64)])
def test_the_plain_pair_has_the_rank_of_the_product(sizes):
    _, adapter, delta = single(nn.Linear(*sizes), "lokr", rank=2, alpha=3.0)
    stirred(adapter)
    A, B, scale, _ = delta.as_lora(None, None)
    assert A.shape[0] == 2 * 8
    assert torch.allclose(scale * B @ A, delta.weight(), atol=1e-5)


def test_nothing_but_the_input_is_kept():
    model, adapter, _ = single(nn.Linear(64, 64), "lokr", rank=3)
    stirred(adapter)
    x, kept = torch.randn(5, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    mine = {x.data_ptr(), model[0].weight.data_ptr()}
    assert max(t.numel() for t in kept if t.data_ptr() not in mine) <= 64
    y.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
