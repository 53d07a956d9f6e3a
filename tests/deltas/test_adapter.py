"""Bottleneck adapters against their definition (sheet 000, oracle 14)."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from single import single, stirred
from torch import nn

import veneer
from veneer.errors import UserError

IDS = torch.arange(12).view(2, 6)


def llama():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=61
    )
    return tf.LlamaForCausalLM(config).eval()


def bert():
    config = tf.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61
    )
    return tf.BertForSequenceClassification(config).eval()


def branch(delta, h):
    return delta.scaling * F.linear(F.relu(F.linear(h, delta.D, delta.b_D)), delta.U, delta.b_U)


@pytest.mark.parametrize("placement, count", [("pfeiffer", 3), ("houlsby", 6), ("parallel", 3)])
def test_each_placement_adds_the_branch_where_it_says(placement, count):
    model, plain = llama(), llama()
    adapter = veneer.attach(model, f"adapter(placement={placement!r}, scaling=4.0)")
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    stirred(adapter)
    assert len(adapter.deltas) == count
    for path, d in adapter.deltas.items():
        beside = placement == "parallel"
        hook = lambda m, args, y, d=d, beside=beside: y + branch(d, args[0] if beside else y)  # noqa: E731
        plain.get_submodule(path).register_forward_hook(hook)
    moved = model(IDS).logits
    assert torch.allclose(moved, plain(IDS).logits, atol=1e-5)
    with adapter.disabled():
        assert not torch.allclose(model(IDS).logits, moved, atol=1e-2)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
def test_blocks_that_keep_their_mlp_apart_have_places_too(placement):
    adapter = veneer.attach(bert(), f"adapter(placement={placement!r})")
    ends = {path.split("layer.")[1][2:] for path in adapter.deltas}
    assert ends == {"output.dense"} | ({"attention.output.dense"} if placement == "houlsby" else set())


def test_a_selection_means_its_blocks():
    adapter = veneer.attach(llama(), "adapter(placement='houlsby')", sites=["layers.1.self_attn.q_proj"])
    assert list(adapter.deltas) == ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("bias", [True, False])
def test_without_a_non_linearity_it_folds_and_is_plain_lora(bias):
    layer, x = nn.Linear(6, 5, bias=bias), torch.randn(4, 6)
    model, adapter, delta = at = single(layer, "adapter(placement='layer', activation='identity', scaling=2.0)", rank=2)
    stirred(adapter)
    y = model(x)
    W, b = at.layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
    A, B, scale, change = delta.as_lora(W, b)
    assert torch.allclose(F.linear(x, W + scale * B @ A, change if b is None else b + change), y, atol=1e-5)
    adapter.fold()
    assert torch.allclose(at.layer.weight, (torch.eye(5) + 2 * delta.U @ delta.D) @ W, atol=1e-5)
    assert torch.allclose(model(x), y, atol=1e-5)


def test_the_count_is_the_sheets():
    _, _, delta = single(nn.Linear(4, 576), "adapter(placement='layer')", rank=8)
    assert delta.parameter_count() == 588_000 // 60 == sum(p.numel() for p in delta.parameters())
    _, _, delta = single(nn.Linear(4, 576), "adapter(placement='layer')")
    assert delta.D.shape == (36, 576)


@pytest.mark.parametrize("start, std, limit", [("bert", 0.02, None), ("houlsby", 0.0088, 0.02)])
def test_published_starts_are_off_the_base(start, std, limit):
    layer, x = nn.Linear(6, 300), torch.randn(4, 6)
    before = copy.deepcopy(layer)(x)
    model, _, delta = single(layer, f"adapter(placement='layer', start={start!r})", rank=50)
    assert not torch.equal(model(x), before)
    for p in (delta.D, delta.U):
        assert p.std().item() == pytest.approx(std, rel=0.05)
        assert limit is None or p.abs().max() <= limit


def test_a_selection_without_a_block_is_refused_with_an_offer():
    with pytest.raises(UserError, match="placement='layer'"):
        single(nn.Linear(6, 5), "adapter")
    with pytest.raises(UserError, match="in no block"):
        veneer.attach(bert(), "adapter(placement='parallel')")


def test_it_cannot_fold_with_a_non_linearity():
    _, adapter, _ = single(nn.Linear(6, 5), "adapter(placement='layer')")
    with pytest.raises(UserError, match="not linear"):
        adapter.fold()


def test_a_parallel_adapter_comes_back_from_its_file(tmp_path):
    model = llama()
    adapter = veneer.attach(model, "adapter(placement='parallel')", rank=3)
    stirred(adapter)
    y = model(IDS).logits
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(IDS).logits, y)
