"""PaCA against its sheet's oracles (092)."""

import copy

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn
from torch.nn.functional import linear as product

import veneer
from veneer.errors import UserError

STORES = ["delta", "columns"]


def test_the_sheets_closed_form():
    model, adapter, delta = at = single(linear([[1.0, 2, 3], [4, 5, 6]]), "paca(select='norm_max')", rank=1)
    assert delta.indices.tolist() == [2]
    put(delta, P=[[1.0], [-1.0]])
    assert model(torch.ones(1, 3)).tolist() == [[7.0, 14.0]]
    adapter.fold()
    assert at.layer.weight.tolist() == [[1, 2, 4], [4, 5, 5]]


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
@pytest.mark.parametrize("store", STORES)
def test_the_start_is_the_base_and_the_lora_form_equals_running(store, shape):
    model, adapter, delta = at = single(nn.Linear(8, 6), f"paca(store='{store}')", rank=3, alpha=6.0)
    x = torch.randn(shape)
    y = product(x, at.layer.weight, at.layer.bias)
    assert torch.allclose(model(x), y, atol=1e-6 if store == "columns" else 0)
    stirred(adapter)
    A, B, scale, change = delta.as_lora(at.layer.weight, at.layer.bias)
    assert change is None and A.sum() == 3 and A[range(3), delta.indices].eq(1).all()
    assert torch.allclose(model(x), product(x, at.layer.weight + scale * B @ A, at.layer.bias), atol=1e-5)


@pytest.mark.parametrize("store", STORES)
def test_the_gradient_is_s_times_the_columns_of_the_full_gradient(store):
    layer = nn.Linear(8, 6)
    plain = copy.deepcopy(layer)
    model, _, delta = single(layer, f"paca(store='{store}')", rank=3, alpha=6.0)
    x = torch.randn(5, 8, requires_grad=True)
    P, into = gradients(model(x), delta.P, x)
    W, base_into = gradients(plain(x), plain.weight, x)
    assert torch.allclose(P, 2.0 * W[:, delta.indices], atol=1e-5)
    assert torch.allclose(into, base_into, atol=1e-5)


@pytest.mark.parametrize("store", STORES)
def test_only_the_chosen_columns_change(store):
    model, adapter, delta = at = single(nn.Linear(8, 6), f"paca(store='{store}')", rank=3)
    before = at.layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
    adapter.fold()
    changed = (at.layer.weight != before).any(0)
    assert torch.equal(changed.nonzero().flatten(), delta.indices)
    assert torch.linalg.matrix_rank(at.layer.weight - before) == 3


def test_with_all_columns_it_is_full_fine_tuning():
    layer = nn.Linear(6, 5, bias=False)
    plain = copy.deepcopy(layer)
    model, adapter, _ = single(layer, "paca(store='columns')", rank=6)
    x = torch.randn(4, 6)
    for net, params in ((model, adapter.parameters()), (plain, [plain.weight])):
        optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(model(x), plain(x), atol=1e-5)


def test_a_forward_keeps_the_slice_of_the_input_alone():
    model, _, _ = at = single(nn.Linear(512, 64), "paca", rank=4)
    kept = []
    x = torch.randn(256, 512, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    own = {at.layer.weight.data_ptr()}
    sizes = [t.untyped_storage().nbytes() // 4 for t in kept if t.data_ptr() not in own]
    assert max(sizes) == 4 * 512 and 256 * 4 in sizes  # E_I, and the slice of x


def test_norms_choose_columns():
    W = torch.diag(torch.tensor([3.0, 1.0, 2.0, 5.0]))
    _, _, largest = single(linear(W), "paca(select='norm_max')", rank=2)
    _, _, smallest = single(linear(W), "paca(select='norm_min')", rank=2)
    assert largest.indices.tolist() == [0, 3] and smallest.indices.tolist() == [1, 2]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("groups", [1, 2])
def test_columns_of_a_convolution_are_entries_of_its_kernel(store, groups):
    layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups), torch.randn(2, 4, 7, 7)
    y0 = layer(x)
    model, adapter, delta = single(layer, f"paca(store='{store}')", rank=3)
    assert torch.allclose(model(x), y0, atol=1e-6)
    stirred(adapter)
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)
    assert delta.indices.max() < 4 // groups * 9


@pytest.mark.parametrize("store", STORES)
def test_it_rests_on_an_adapter_beneath(store):
    model, below, _ = single(nn.Linear(8, 6), "lora", rank=2, name="below")
    stirred(below)
    x = torch.randn(3, 8)
    y = model(x)
    veneer.attach(model, f"paca(store='{store}')", rank=3, sites="all", name="above")
    assert torch.allclose(model(x), y, atol=1e-6)


def test_more_columns_than_there_are_is_refused():
    with pytest.raises(UserError, match="more than 0 has columns, 8"):
        single(nn.Linear(8, 6), "paca", rank=9)
