"""KaSA against its sheet's oracles (091) and against PEFT's variant."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from single import gradients, linear, put, single, stirred
from torch import nn

import veneer
from veneer.errors import UserError
from veneer.parts.restore import attach_from
from veneer.parts.state import clone

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

from breaks import training

SHAPES = [(4, 6), (6, 4), (5, 5)]  # out, in


def truncated(W, r):
    """W without its r smallest singular directions, by an SVD."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    S[-r:] = 0
    return (U * S) @ Vh


def by_peft(W, alpha=4.0, r=2, beta=1e-4, gamma=1e-3):
    """PEFT's model of one layer with this weight."""
    import peft

    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, target_modules=["0"], kasa_config=peft.KasaConfig(beta=beta, gamma=gamma)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(nn.Sequential(linear(W, torch.zeros(len(W)))), config)


def copied(adapter, theirs):
    """PEFT's factors as ours, moved."""
    stirred(adapter, 1.0)
    d, layer = next(iter(adapter.deltas.values())), theirs.base_model.model[0]
    with torch.no_grad():
        for ours, other in ((d.A, layer.lora_A), (d.B, layer.lora_B)):
            other["default"].weight.copy_(ours)
        layer.lora_diag["default"].copy_(d.g)


@pytest.mark.parametrize("out, inn", SHAPES)
def test_running_and_the_regulariser_are_pefts(out, inn):
    W, x = torch.randn(out, inn), torch.randn(3, inn)
    theirs = by_peft(W)
    model, adapter, d = single(linear(W, torch.zeros(out)), "kasa", rank=2, alpha=4.0)
    copied(adapter, theirs)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    own = adapter.hooks[0].loss(None, None, None)
    torch.testing.assert_close(own, theirs.base_model._get_kasa_loss(), rtol=1e-5, atol=0)
    ours = torch.autograd.grad(model(x).square().sum() + own, (d.A, d.B, d.g))
    (theirs(x).square().sum() + theirs.base_model._get_kasa_loss()).backward()
    layer = theirs.base_model.model[0]
    others = (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"])
    for mine, other in zip(ours, others):
        torch.testing.assert_close(mine, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("out, inn", SHAPES)
def test_the_start_is_the_truncated_weight(out, inn):
    W, x = torch.randn(out, inn), torch.randn(3, inn)
    model, adapter, d = single(linear(W), "kasa", rank=2)
    assert torch.allclose(model(x), x @ truncated(W, 2).T, atol=1e-5)
    dropped = W - d.offset.fold(W, None)[0]
    assert torch.allclose(dropped.norm(), torch.linalg.svdvals(W)[-2:].norm(), atol=1e-5)
    assert torch.allclose(dropped.T @ (W - dropped), torch.zeros(inn, inn), atol=1e-5)
    with adapter.disabled():
        assert torch.equal(model(x), x @ W.T)
    adapter.fold()
    assert torch.linalg.matrix_rank(model[0].weight, rtol=1e-5) == min(out, inn) - 2


def test_the_tiny_fold_is_the_sheets_oracle_8():
    model, adapter, d = single(linear(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), "kasa", rank=1, alpha=2.0)
    assert torch.allclose(model(torch.eye(3)), torch.diag(torch.tensor([3.0, 2.0, 0.0])), atol=1e-6)
    put(d, A=[[0, 0, 1]], B=[[0], [0], [1]], g=[0.5])
    adapter.fold()
    assert torch.allclose(model[0].weight, torch.diag(torch.tensor([3.0, 2.0, 1.0])), atol=1e-6)


def test_only_b_has_a_gradient_at_the_start():
    model, _, d = single(nn.Linear(6, 5), "kasa", rank=2, alpha=6.0)
    x = torch.randn(4, 6)
    y = model(x)
    dA, dB, dg = gradients(y, d.A, d.B, d.g)
    delta = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    assert not dA.any() and not dg.any()
    assert torch.allclose(dB, d.scale * delta.T @ ((x @ d.A.T) * d.g), atol=1e-5)


def test_without_truncation_and_with_ones_it_is_lora():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    plain, _, lora = single(nn.Linear(6, 5), "lora", rank=2, alpha=6.0)
    plain[0].load_state_dict(layer.state_dict())
    model, _, d = single(layer, "kasa(truncate=False)", rank=2, alpha=6.0)
    assert torch.equal(model(x), plain(x)) and d.starts_at_base
    put(d, A=lora.A, B=torch.ones(5, 2), g=torch.ones(2))
    put(lora, B=torch.ones(5, 2))
    assert torch.equal(model(x), plain(x))


def test_large_gram_matrices_give_the_official_sum():
    _, adapter, d = single(nn.Linear(7, 5), "kasa+kasa-regulariser(beta=0, gram='large')", rank=2)
    stirred(adapter)
    expected = (d.A.T @ d.A - torch.eye(7)).norm() + (d.B @ d.B.T - torch.eye(5)).norm()
    torch.testing.assert_close(adapter.hooks[0].loss(None, None, None), 1e-3 * expected, rtol=1e-5, atol=0)


def test_a_mean_is_the_sum_over_the_number_of_layers_and_none_is_none():
    def value(fields):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        hook = veneer.attach(model, f"kasa+kasa-regulariser({fields})", rank=2, sites="all").hooks[0]
        return hook.loss(None, None, None)

    assert torch.allclose(value("reduction='mean'"), value("") / 2)
    assert value("beta=0, gamma=0") is None


def test_the_loop_adds_it_to_the_loss():
    plain = training("kasa+kasa-regulariser(beta=0, gamma=0)", rank=4).take_step()
    run = training("kasa", rank=4)
    term = run.adapter.hooks[0].loss(None, None, None).item()
    assert term > 0.01 and run.take_step() - plain == pytest.approx(term, rel=1e-4)


def test_orthonormal_factors_have_no_gradient_and_no_nan():
    _, adapter, d = single(nn.Linear(6, 5), "kasa", rank=2)
    put(d, A=torch.eye(6)[:2], B=torch.eye(5)[:, :2])
    adapter.hooks[0].loss(None, None, None).backward()
    assert not d.A.grad.any() and not d.B.grad.any() and d.g.grad.any()


def test_a_saved_adapter_truncates_once_however_often_it_is_loaded(tmp_path):
    model, adapter, _ = single(nn.Linear(8, 8), "kasa", rank=2)
    stirred(adapter)
    x = torch.randn(4, 8)
    y = model(x)
    adapter.save(tmp_path / "kept")
    for _ in range(2):
        adapter.detach()
        adapter = veneer.load(model, tmp_path / "kept")
        assert torch.equal(model(x), y)
    d = adapter.deltas["0"]
    assert torch.linalg.matrix_rank(d.offset.fold(model[0].weight, None)[0], rtol=1e-5) == 6


def test_a_state_without_the_dropped_directions_takes_them_from_w():
    model, adapter, _ = single(nn.Linear(8, 6), "kasa", rank=2)
    stirred(adapter)
    x = torch.randn(4, 8)
    y, description, state = model(x), adapter.description(), clone(adapter.state())
    adapter.detach()
    attach_from(model, description, {n: t for n, t in state.items() if "offset" not in n})
    assert torch.allclose(model(x), y, atol=1e-6)
    with pytest.raises(UserError, match=r"lacks 0\.offset\.A"):
        attach_from(model, description, {n: t for n, t in state.items() if "offset.A" not in n}, name="torn")


def test_too_large_a_rank_and_another_form_are_refused():
    with pytest.raises(UserError, match="would drop all 5 singular directions"):
        single(nn.Linear(8, 5), "kasa", rank=5)
    with pytest.raises(UserError, match="for the form kasa"):
        single(nn.Linear(8, 5), "lora+kasa-regulariser", rank=2)
