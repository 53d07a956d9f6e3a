"""NOLA against its sheet's oracles (046)."""

import pytest
import torch
from single import gradients, single, stirred
from torch import nn

import veneer
from veneer.deltas import nola
from veneer.deltas.nola import Basis


def basis_of(basis):
    """The matrices of a basis, one by one."""
    return torch.stack([basis.mixed(row) for row in torch.eye(basis.count)])


def of(delta, name="mix_a", shape=None):
    shape = (delta.rank, delta.site.in_features) if shape is None else shape
    seed = nola.derived_seed(delta.seed, delta.site.path, name)
    return Basis(seed, delta.bases, shape, delta.bases**-0.5)


def test_the_entries_are_even_between_the_bounds_and_not_correlated():
    entries = basis_of(Basis(5, 16, (32, 40), 0.5)).flatten(1)
    assert entries.abs().max() < 0.5 and abs(entries.mean()) < 0.01
    assert abs(entries.var() / (0.25 / 3) - 1) < 0.03
    assert (torch.corrcoef(entries).fill_diagonal_(0).abs() < 0.15).all()


def test_the_variance_of_a_mixture_is_the_sheets():
    mixed = Basis(3, 64, (64, 512), 64**-0.5).mixed(torch.ones(64))
    assert abs(mixed.var() * 3 - 1) < 0.02  # Σα²/(3k) with α = 1


def test_the_stream_is_fixed_for_good():
    entries = Basis(1, 2, (1, 3), 2.0**15).mixed(torch.tensor([0.0, 1.0])) - 0.5
    assert entries.tolist() == [[-30593.0, -27677.0, 15436.0]]


@pytest.mark.parametrize("chunk", [1, 40, 1 << 18])
def test_the_length_of_the_runs_changes_nothing(chunk, monkeypatch):
    whole = basis_of(Basis(5, 9, (3, 5), 1.0))
    monkeypatch.setattr(nola, "CHUNK", chunk)
    assert torch.equal(basis_of(Basis(5, 9, (3, 5), 1.0)), whole)


def test_at_the_start_only_the_weights_of_b_have_a_gradient():
    model, adapter, delta = single(nn.Linear(9, 7), "nola(bases=5)", rank=3)
    x = torch.randn(4, 9)
    with adapter.disabled():
        y = model(x)
    assert torch.equal(model(x), y)
    model(x).square().sum().backward()
    assert not delta.mix_a.grad.any() and delta.mix_b.grad.abs().sum() > 0


def test_the_gradients_are_inner_products_with_the_basis():
    model, adapter, delta = single(nn.Linear(9, 7), "nola(bases=5)", rank=3, alpha=6.0)
    stirred(adapter)
    x, W, b = torch.randn(4, 9), *model[0].parameters(recurse=False)
    A = delta.A0 + torch.einsum("k,kri->ri", delta.mix_a, basis_of(of(delta)))
    B = torch.einsum("k,kor->or", delta.mix_b, basis_of(of(delta, "mix_b", (7, 3))))
    expected = x @ (W + 2.0 * B @ A).T + b
    assert torch.allclose(model(x), expected, atol=1e-5)
    own = (delta.mix_a, delta.mix_b)
    for g, h in zip(gradients(model(x), *own), gradients(expected, *own)):
        assert torch.allclose(g, h, rtol=1e-5, atol=1e-5)


def test_the_factors_come_again_among_other_draws_and_the_global_state_stays():
    _, adapter, delta = single(nn.Linear(9, 7), "nola", rank=3)
    stirred(adapter)
    A, state = delta.pair().A.clone(), torch.random.get_rng_state()
    delta.kept.clear()
    assert torch.equal(delta.pair().A, A) and torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    delta.kept.clear()
    assert torch.equal(delta.pair().A, A)


@pytest.mark.parametrize("shape", [(20, 6), (7, 90)])
def test_two_k_numbers_train_whatever_the_layer(shape):
    _, adapter, delta = single(nn.Linear(*shape), "nola(bases=11)", rank=4)
    assert adapter.parameter_count() == delta.parameter_count() == 22


def test_with_enough_matrices_any_factor_can_be_mixed():
    basis = basis_of(Basis(2, 8, (1, 4), 8**-0.5)).flatten(1)
    wanted = torch.randn(4)
    weights = torch.linalg.lstsq(basis.T, wanted).solution
    assert torch.allclose(weights @ basis, wanted, atol=1e-5)


def test_one_pass_draws_once_a_factor_each_way_however_often_the_layer_runs(monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(6, 6)

        def forward(self, x):
            return self.line(self.line(x))

    model, drawn = Twice(), []
    adapter = veneer.attach(model, "nola(bases=3)", rank=2, sites="all")
    stirred(adapter)
    pieces = Basis._pieces
    monkeypatch.setattr(Basis, "_pieces", lambda self: drawn.append(self.shape) or pieces(self))
    loss = model(torch.randn(4, 6)).square().sum()
    assert drawn == [(2, 6), (6, 2)]
    loss.backward()
    assert sorted(drawn[2:]) == [(2, 6), (6, 2)]
    with torch.no_grad():
        model(torch.randn(4, 6))
    assert len(drawn) == 4


def test_no_basis_is_kept_for_backward():
    model, adapter, _ = single(nn.Linear(64, 48), "nola(bases=50)", rank=4)
    stirred(adapter)
    kept, x = [], torch.randn(16, 64, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    frozen = {model[0].weight.data_ptr(), model[0].bias.data_ptr(), x.data_ptr()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in frozen) <= 4 * (64 + 48) + 4 * 16


def test_the_file_holds_the_weights_alone(tmp_path):
    model, adapter, _ = single(nn.Linear(9, 7), "nola(bases=5)", rank=3)
    stirred(adapter)
    y, x = model(torch.ones(2, 9)), torch.ones(2, 9)
    assert sum(t.numel() for t in adapter.state().values() if t.ndim) == 10
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)


def test_the_vit_start_is_the_official_one_and_not_the_base():
    _, _, delta = single(nn.Linear(9, 7), "nola(bases=4, start='vit')", rank=3, alpha=1.0)
    A, B, scale = delta.pair()
    assert not delta.starts_at_base and scale == pytest.approx(1 / 3)
    assert delta.mix_a.tolist() == delta.mix_b.tolist() == [0.25] * 4
    assert 0 < A.abs().max() <= 27**-0.5 and 0 < B.abs().max() <= 21**-0.5


def test_a_layer_that_moves_to_another_type_keeps_its_weights_in_fp32():
    model, adapter, delta = single(nn.Linear(9, 7), "nola(bases=5)", rank=3)
    stirred(adapter)
    model.to(torch.bfloat16)
    y = model(torch.randn(3, 9, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and delta.mix_a.dtype == torch.float32
