"""BitFit: biases train and nothing else does."""

import copy

import pytest
import torch
import transformers as tf
from single import single, stirred
from torch import nn

import veneer
from veneer.errors import UserError


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("make", [lambda b: nn.Linear(6, 5, bias=b), lambda b: nn.Conv2d(3, 5, 3, bias=b)])
def test_the_output_moves_by_delta_and_folds_into_a_bias(make, has_bias):
    layer = make(has_bias)
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 7, 7)
    y = layer(x)
    model, adapter, delta = single(layer, "bitfit")
    assert torch.equal(model(x), y)
    assert adapter.parameter_count() == 5
    stirred(adapter)
    shift = delta.delta if y.ndim == 2 else delta.delta.view(5, 1, 1)
    assert torch.allclose(model(x), y + shift, atol=1e-6)
    adapter.fold()
    assert layer.bias is not None and torch.allclose(model(x), y + shift, atol=1e-6)
    adapter.detach()
    assert (layer.bias is not None) == has_bias and torch.equal(model(x), y)


def test_training_follows_plain_training_of_the_biases():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    plain = copy.deepcopy(model)
    adapter = veneer.attach(model, "bitfit", sites="all")
    x = torch.randn(5, 6)
    biases = [m.bias for m in plain if isinstance(m, nn.Linear)]
    for net, params in ((model, adapter.parameters()), (plain, biases)):
        optimizer = torch.optim.SGD(params, lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(model(x), plain(x), atol=1e-6)


def test_half_precision_layers_keep_their_type_and_small_steps_their_digits():
    model, _, delta = single(nn.Linear(6, 5, bias=False).to(torch.bfloat16), "bitfit")
    with torch.no_grad():
        for _ in range(8):
            delta.delta.add_(1e-6)
    assert delta.delta.dtype == torch.float32
    assert torch.allclose(delta.delta, torch.full((5,), 8e-6))
    assert model(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_without_a_bias_are_created_skipped_or_refused():
    def model():
        return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4))

    assert veneer.attach(model(), "bitfit", sites="all").parameter_count() == 9
    assert veneer.attach(model(), "bitfit(missing='skip')", sites="all").parameter_count() == 4
    with pytest.raises(UserError, match="0 has no bias; write bitfit"):
        veneer.attach(model(), "bitfit(missing='error')", sites="all")


def test_a_fused_projection_trains_its_bias_once_and_whole():
    config = tf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=61, bos_token_id=0, eos_token_id=0)
    model = tf.GPT2LMHeadModel(config)
    with pytest.raises(UserError, match="only 64 of its 96 rows"):
        veneer.attach(model, "bitfit", sites=["q", "v"])
    assert veneer.attach(model, "bitfit", sites="c_attn").parameter_count() == 96
