import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import veneer
from veneer.bases.nf4 import NF4Linear, quantise_layer
from veneer.core.site import find_sites
from veneer.errors import UserError
from veneer.numerics import quantize
from veneer.numerics.fused import lowrank_linear
from veneer.parts.restore import attach_from
from veneer.parts.state import clone

OUT, IN = 48, 64


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.LlamaConfig(num_key_value_heads=2, vocab_size=61, max_position_embeddings=64, **sizes)
    return tf.LlamaForCausalLM(config).to(dtype).eval()


IDS = torch.arange(3, 17).view(2, 7)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def layer(out=OUT, inputs=IN, dtype=torch.float32, bias=True):
    torch.manual_seed(1)
    return nn.Linear(inputs, out, bias=bias, dtype=dtype)


def stored(**options):
    """A layer, its dense weight, and the layer in 4 bits."""
    dense = layer()
    W = dense.weight.detach().clone()
    quantise_layer(dense, **options)
    return dense, W


def round_trip(W, block_size=64):
    codes, absmax = quantize.quantise_blocks(W, quantize.nfmap(4), block_size)
    return quantize.dequantise_blocks(codes, absmax, quantize.nfmap(4), W.shape, block_size)


@pytest.mark.parametrize(
    "block_size, double_quant, expected", [(64, False, 0.0920), (64, True, 0.0920), (128, False, 0.0956)]
)
def test_the_error_on_gaussian_weights_is_that_of_the_sheet(block_size, double_quant, expected):
    # sheet 048b, oracle 2
    dense = layer(512, 512)
    nn.init.normal_(dense.weight)
    W = dense.weight.detach().clone()
    quantise_layer(dense, block_size, double_quant)
    assert float((dense.weight - W).norm() / W.norm()) == pytest.approx(expected, rel=0.015)


def test_codes_and_weights_equal_bitsandbytes_bit_for_bit():
    functional = pytest.importorskip("bitsandbytes.functional")
    quantised, W = stored(double_quant=False)
    packed, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    assert torch.equal(quantised.codes, packed.flatten())
    assert torch.equal(quantised.weight, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_input_gradient_are_those_of_the_dequantised_weight(dtype, bias):
    quantised = layer(dtype=dtype, bias=bias)
    quantise_layer(quantised)
    x = torch.randn(3, 5, IN, dtype=dtype, requires_grad=True)
    y = quantised(x)
    reference = F.linear(x, quantised.weight, quantised.bias)
    assert torch.equal(y, reference)
    g = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, g)
    (expected,) = torch.autograd.grad(reference, x, g)
    torch.testing.assert_close(ours, expected)


def test_a_bias_trains_beside_a_stored_weight():
    quantised, _ = stored()
    x = torch.randn(4, IN)
    quantised(x).sum().backward()
    torch.testing.assert_close(quantised.bias.grad, torch.full((OUT,), 4.0))
    assert [n for n, _ in quantised.named_parameters()] == ["bias"]


def test_nothing_of_the_weights_size_is_kept_for_backward():
    quantised, _ = stored()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        quantised(torch.randn(2, IN, requires_grad=True)).sum()
    assert sum(kept) == 0


def test_the_dense_weight_is_let_go_and_memory_is_four_bits_and_a_bit():
    dense = layer(512, 512, torch.bfloat16, bias=False)
    reference = weakref.ref(dense.weight)
    quantise_layer(dense)
    assert reference() is None
    held = sum(b.numel() * b.element_size() for b in dense.buffers())
    assert 8 * held / 512**2 == pytest.approx(4.127, abs=0.001)  # sheet 048b: bits a weight, nested


def test_casting_the_model_keeps_the_scales_in_fp32_and_changes_the_weights_type():
    quantised, _ = stored()
    before = {n: b.clone() for n, b in quantised.named_buffers()}
    exact = quantised.weight
    quantised.to(torch.bfloat16)
    assert quantised.weight.dtype == quantised.bias.dtype == torch.bfloat16
    assert all(torch.equal(b, before[n]) and b.dtype == before[n].dtype for n, b in quantised.named_buffers())
    assert torch.equal(quantised.weight, exact.bfloat16())
    assert torch.equal(quantised.float().weight, exact)


@pytest.mark.parametrize("double_quant", [True, False])
def test_state_comes_back_from_codes_and_from_a_dense_file(double_quant):
    quantised, W = stored(double_quant=double_quant)
    keys = {"codes", "bias"} | ({"absmax_codes", "absmax_scales", "absmax_offset"} if double_quant else {"absmax"})
    assert set(quantised.state_dict()) == keys
    other = layer()
    nn.init.zeros_(other.weight)
    quantise_layer(other, double_quant=double_quant)
    other.load_state_dict(quantised.state_dict())
    assert torch.equal(other.weight, quantised.weight)
    nn.init.zeros_(other.codes)
    other.load_state_dict({"weight": W, "bias": torch.zeros(OUT)})
    assert torch.equal(other.weight, quantised.weight)
    with pytest.raises(UserError, match="48×64"):
        other.load_state_dict({"weight": W.T, "bias": torch.zeros(OUT)})


def test_copies_and_pickles_run_alike():
    quantised, _ = stored()
    x = torch.randn(2, IN)
    for twin in (copy.deepcopy(quantised), pickle.loads(pickle.dumps(quantised))):
        assert type(twin) is NF4Linear and torch.equal(twin(x), quantised(x))


def test_the_fused_product_takes_the_stored_weight():
    quantised, _ = stored()
    x = torch.randn(3, IN, requires_grad=True)
    A, B = (torch.randn(s, requires_grad=True) for s in ((4, IN), (OUT, 4)))
    y = lowrank_linear(x, lambda: quantised.weight, quantised.bias, A, B, 0.5)
    reference = F.linear(x, quantised.weight + 0.5 * B @ A, quantised.bias)
    torch.testing.assert_close(y, reference, atol=1e-5, rtol=1e-5)
    g = torch.randn_like(y)
    for ours, expected in zip(torch.autograd.grad(y, (x, A, B), g), torch.autograd.grad(reference, (x, A, B), g)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_qlora_converts_the_linear_layers_and_leaves_head_embedding_and_norms():
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    veneer.attach(model, "lora+nf4", rank=4)
    assert len(find_sites(model, "linear")) == 14
    for site in find_sites(model, "linear"):
        assert isinstance(site.module, NF4Linear)
        torch.testing.assert_close(site.weight(), round_trip(before[f"{site.path}.weight"]), rtol=0.03, atol=0.01)
    assert type(model.lm_head) is nn.Linear
    left = {n for n, _ in model.named_parameters() if ".veneer." not in n}
    assert left == {n for n in before if "proj" not in n}
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in left)


def test_qlora_starts_at_the_stored_base_and_trains_only_the_adapter():
    model = llama()
    adapter = veneer.attach(model, "lora+nf4(block_size=128,double_quant=False)", rank=4, sites="attention")
    assert model.model.layers[0].mlp.up_proj.block_size == 128  # the whole base, not only the adapted sites
    with adapter.disabled():
        base = logits(model)
    torch.testing.assert_close(logits(model), base)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for _, p in adapter.named_parameters()]
    assert any(p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for n, p in model.named_parameters() if ".veneer." not in n)
    with pytest.raises(UserError):
        adapter.fold()
    adapter.detach()
    assert isinstance(model.model.layers[0].self_attn.q_proj, NF4Linear) and torch.equal(logits(model), base)


def test_a_saved_adapter_brings_the_same_stored_base_back_from_dense_weights():
    first, second = llama(), llama()
    adapter = veneer.attach(first, "lora+nf4(block_size=32)", rank=4)
    with torch.no_grad():
        for i, (_, p) in enumerate(adapter.named_parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    attach_from(second, adapter.description(), clone(adapter.state()))
    assert second.model.layers[0].self_attn.q_proj.block_size == 32
    assert torch.equal(logits(second), logits(first))


def test_a_fused_projection_of_gpt2_is_converted_once_and_runs_as_out_by_in():
    torch.manual_seed(0)
    config = tf.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, n_positions=32, vocab_size=61, bos_token_id=0, eos_token_id=0
    )
    model = tf.GPT2LMHeadModel(config).eval()
    fused = model.transformer.h[0].attn.c_attn
    W, dense = fused.weight.detach().T.clone(), model.state_dict()
    before = logits(model)
    adapter = veneer.attach(model, "lora+nf4(double_quant=False)", rank=2)
    adapter.detach()
    assert isinstance(fused, NF4Linear) and (fused.out_features, fused.in_features) == (96, 32)
    assert torch.equal(fused.weight, round_trip(W))
    torch.testing.assert_close(logits(model), before, atol=0.2, rtol=0)
    expected = logits(model)
    nn.init.zeros_(fused.codes)
    model.load_state_dict(dense)  # a file of the base, weights as in × out
    assert torch.equal(logits(model), expected)


def test_conversion_under_an_adapter_and_of_weights_that_train_is_refused():
    model = llama()
    veneer.attach(model, "lora", rank=2, name="first")
    with pytest.raises(UserError, match="detach it first"):
        veneer.attach(model, "lora+nf4", rank=2, name="second")
    with pytest.raises(UserError, match="floating-point"):
        quantise_layer(nn.Linear(4, 4, device="meta"))


def test_autocast_runs_the_product_in_its_own_precision():
    quantised, _ = stored()
    x = torch.randn(2, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantised(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, quantised.weight.sum(0).expand_as(x), atol=0.05, rtol=0.02)
