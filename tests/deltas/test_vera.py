"""VeRA against its sheet's oracle (000, 7) and against PEFT."""

import copy

import pytest
import torch
import transformers as tf
from single import gradients, linear, put, single, stirred
from torch import nn

import veneer

LAYERS = {
    "linear": (lambda: nn.Linear(9, 7), lambda: torch.randn(4, 9)),
    "conv": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.randn(4, 3, 5, 5)),
}


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_the_sheets_closed_form():
    model, adapter, delta = at = single(linear(torch.ones(2, 2)), "vera", rank=1)
    adapter.shared.A.copy_(torch.tensor([[1.0, 2.0]])), adapter.shared.B.copy_(torch.tensor([[3.0], [4.0]]))
    put(delta, d=[2.0], b=[0.5, 1.0])
    expected = 1 + torch.tensor([[3.0, 6.0], [8.0, 16.0]])
    assert torch.equal(model(torch.eye(2)).T, expected)
    adapter.fold()
    assert torch.equal(at.layer.weight, expected)


def test_the_projections_outputs_and_gradients_are_pefts():
    peft = pytest.importorskip("peft")
    model, x = TwoLayers(), torch.randn(5, 6)
    config = peft.VeraConfig(r=4, target_modules=["first", "second"], projection_prng_key=17)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    adapter = veneer.attach(model, "vera(key=17)", rank=4, sites="all")
    assert torch.equal(adapter.shared.A, theirs.base_model.vera_A["default"])
    assert torch.equal(adapter.shared.B, theirs.base_model.vera_B["default"])
    stirred(adapter)
    own, others = [], []
    for path, d in adapter.deltas.items():
        inner = theirs.base_model.model.get_submodule(path)
        own += [d.b, d.d]
        others += [inner.vera_lambda_b["default"], inner.vera_lambda_d["default"]]
    with torch.no_grad():
        for p, q in zip(own, others):
            q.copy_(p)
    y, expected = model(x), theirs(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    for g, h in zip(gradients(y, *own), gradients(expected, *others)):
        assert torch.allclose(g, h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_running_is_the_dense_change(kind):
    make, example = LAYERS[kind]
    model, adapter, delta = single(make(), "vera", rank=4)
    stirred(adapter)
    x = example()
    pool, W = adapter.shared, delta.site.weight()
    change = delta.b[:, None] * pool.B * delta.d @ pool.A
    assert torch.allclose(model(x), delta.site.run(x, W + change, delta.site.bias()), atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_gradients_are_those_of_the_expression_and_the_middle_alone_is_kept(dropout):
    model, adapter, delta = single(nn.Linear(9, 7), "vera", rank=4, dropout=dropout)
    stirred(adapter)
    model.train()
    delta.draw_seed = lambda: 7
    pool, own = adapter.shared, (delta.b, delta.d)
    x, kept = torch.randn(5, 9, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    known = {t.data_ptr() for t in (x, *model[0].parameters(recurse=False), pool.A, pool.B, *own)}
    rest = [t for t in kept if t.data_ptr() not in known]
    assert sum(t.untyped_storage().nbytes() for t in rest) <= 4 * (5 * 4 + 1)  # h, and one number for x's shape
    plain = model[0].weight @ x[..., None]
    dropped = delta.drop(x)
    assert (dropped == 0).any() == (dropout > 0)
    expected = plain[..., 0] + model[0].bias + dropped @ pool.A.T * delta.d @ pool.B.T * delta.b
    assert torch.allclose(y, expected, atol=1e-5)
    for g, h in zip(gradients(y, x, *own), gradients(expected, x, *own)):
        assert torch.allclose(g, h, atol=1e-5)


def test_at_the_start_d_has_no_gradient_yet():
    model, adapter, delta = single(nn.Linear(9, 7), "vera", rank=4)
    model(torch.randn(3, 9)).square().sum().backward()
    assert adapter.parameter_count() == 7 + 4
    assert torch.equal(delta.d.grad, torch.zeros(4)) and delta.b.grad.abs().sum() > 0


def test_the_file_holds_two_vectors_a_layer_and_the_key_gives_the_rest(tmp_path):
    model, x = TwoLayers(), torch.randn(5, 6)
    adapter = veneer.attach(model, "vera", rank=4, sites="all", seed=3)
    stirred(adapter)
    y, A = model(x), adapter.shared.A.clone()
    assert sum(t.numel() for t in adapter.state().values() if t.ndim) == adapter.parameter_count() == 10 + 4 + 3 + 4
    adapter.save(tmp_path / "kept")
    adapter.detach()
    other = veneer.attach(model, "vera", rank=4, sites="all", seed=4)
    assert not torch.equal(other.shared.A, A)
    other.detach()
    again = veneer.load(model, tmp_path / "kept")
    assert torch.equal(again.shared.A, A)
    assert torch.equal(model(x), y)


def test_the_parts_of_a_fused_projection_take_their_own_rows_of_b():
    config = tf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=61, bos_token_id=0, eos_token_id=0)
    model = tf.GPT2LMHeadModel(config).eval()
    adapter = veneer.attach(model, "vera", rank=4, sites="c_attn")
    assert adapter.shared.B.shape == (96, 4)
    for d, start in zip(adapter.deltas.values(), (0, 32, 64)):
        put(d, b=torch.ones(32), d=torch.ones(4))
        assert torch.allclose(d.pair().B, adapter.shared.B[start : start + 32])
