"""LoHa against its sheet's numbers (000, oracle 9), PEFT and LyCORIS's start."""

import copy

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn

LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), lambda: torch.randn(3, 4, 12)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(2, 4, 7)),
    "embedding": (lambda: nn.Embedding(30, 12), lambda: torch.randint(0, 30, (3, 4))),
}
NAMES = ("w1a", "w1b", "w2a", "w2b")


def test_the_sheets_closed_form():
    model, _, delta = single(linear(torch.zeros(2, 2)), "loha", rank=1)
    put(delta, w1a=[[1], [2]], w1b=[[1, 1]], w2a=[[1], [1]], w2b=[[1, -1]])
    assert model(torch.eye(2)).T.tolist() == [[1, -1], [2, -2]]


@pytest.mark.parametrize("rank", [2, 5])  # a pair of rank 4, and ΔW itself
@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "embedding"])
def test_outputs_and_gradients_agree_with_peft(kind, rank):
    peft = pytest.importorskip("peft")
    make, example = LAYERS[kind]
    layer, x = make(), example()
    config = peft.LoHaConfig(r=rank, alpha=7, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    inner = theirs.base_model.model[0]
    model, adapter, delta = single(layer, "loha", rank=rank, alpha=7.0)
    stirred(adapter)
    own = [getattr(delta, n) for n in NAMES]
    others = [getattr(inner, f"hada_{n[:2]}_{n[2]}")["default"] for n in NAMES]
    with torch.no_grad():
        for p, q in zip(own, others):
            q.copy_(p)
    y, expected = model(x), theirs(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    for g, h in zip(gradients(y, *own), gradients(expected, *others)):
        assert torch.allclose(g, h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_start_is_the_base_and_the_fold_runs_alike(kind, rank):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y0 = layer(x)
    model, adapter, _ = single(layer, "loha", rank=rank)
    assert torch.equal(model(x), y0)
    stirred(adapter)
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)


def test_the_pair_of_rank_r_squared_is_the_change():
    _, adapter, delta = single(nn.Linear(40, 30), "loha", rank=3, alpha=5.0)
    stirred(adapter)
    A, B, scale, _ = delta.as_lora(None, None)
    assert A.shape == (9, 40) and B.shape == (30, 9)
    dense = delta.scale * (delta.w1a @ delta.w1b) * (delta.w2a @ delta.w2b)
    assert torch.allclose(scale * B @ A, dense, atol=1e-5)
    assert torch.linalg.matrix_rank(dense) == 9


@pytest.mark.parametrize("rank", [3, 20])
def test_nothing_but_the_input_is_kept(rank):
    model, adapter, delta = single(nn.Linear(64, 64), "loha", rank=rank)
    stirred(adapter)
    x, kept = torch.randn(5, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    known = {t.data_ptr() for t in (x, model[0].weight, *delta.parameters())}
    assert {t.data_ptr() for t in kept} <= known
    y.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("start, first", [("peft", "w2b"), ("lycoris", "w2a")])
def test_one_tensor_starts_at_zero_and_has_the_first_gradient(start, first):
    model, _, delta = single(nn.Linear(300, 200), f"loha(start={start!r})", rank=4)
    model(torch.randn(3, 300)).square().sum().backward()
    for name in NAMES:
        p = getattr(delta, name)
        assert (p.abs().max() == 0) == (name == first)
        assert (p.grad.abs().sum() > 0) == (name == first)
    if start == "lycoris":
        assert delta.w1a.std().item() == pytest.approx(0.1, rel=0.1)
        assert delta.w1b.std().item() == pytest.approx(1.0, rel=0.1)
    else:
        assert delta.w1a.abs().max().item() == pytest.approx(0.5, rel=0.01)
        assert delta.w1b.abs().max().item() == pytest.approx(300**-0.5, rel=0.01)
