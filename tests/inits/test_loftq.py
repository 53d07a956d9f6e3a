"""LoftQ against its sheet's oracles (048b, 6) and against the algorithm on bitsandbytes' NF4."""

import pytest
import torch
import transformers as tf
from single import linear, single, stirred
from torch import nn

import veneer
from veneer.errors import UserError

SHAPE = (48, 64)
IDS = torch.arange(3, 17).view(2, 7)


def weight():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def error(W, at):
    return (W - at.delta.site.weight() - at.delta.weight()).norm() / W.norm()


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = tf.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=61, bos_token_id=0, eos_token_id=0)
    return tf.GPT2LMHeadModel(config).to(dtype).eval()


@pytest.mark.parametrize("alpha", [4.0, 32.0])
def test_each_round_comes_nearer_to_the_weight_whatever_alpha_is(alpha):
    W = weight()
    plain = single(linear(W), "lora+nf4", rank=4)
    errors = [float(error(W, plain))]
    for rounds in (1, 2, 5):
        errors.append(
            float(error(W, single(linear(W), f"loftq(iterations={rounds}, exact=True)", rank=4, alpha=alpha)))
        )
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.05 * errors[1]


def test_one_round_at_full_rank_loses_nothing_and_stores_the_plain_base():
    W = weight()
    plain, at = single(linear(W), "lora+nf4", rank=4), single(linear(W), "loftq", rank=48)
    assert torch.equal(at.layer.codes, plain.layer.codes)
    assert error(W, at) < 1e-6
    x = torch.randn(3, 64)
    assert torch.allclose(at.model(x), x @ W.T, atol=1e-4)


@pytest.mark.parametrize("rounds", [1, 3])
def test_base_and_factors_are_those_of_the_algorithm_on_bitsandbytes(rounds):
    functional = pytest.importorskip("bitsandbytes.functional")
    W = weight()
    L = torch.zeros(SHAPE)
    for _ in range(rounds):
        codes, state = functional.quantize_4bit(W - L, blocksize=64, quant_type="nf4")
        stored = functional.dequantize_4bit(codes, state)
        U, S, Vh = torch.linalg.svd(W - stored, full_matrices=False)
        L = (U[:, :4] * S[:4]) @ Vh[:4]
    at = single(linear(W), f"lora+nf4(double_quant=False)+loftq(iterations={rounds}, exact=True)", rank=4, alpha=12.0)
    assert torch.allclose(at.delta.site.weight(), stored, atol=1e-5)
    assert torch.allclose(at.delta.weight(), L, atol=1e-4)
    A, B = at.delta.A, at.delta.B
    assert torch.allclose(A @ A.T, B.T @ B, atol=1e-4)  # balanced


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_projection_and_its_parts_come_back_from_a_file(rounds, dtype, tmp_path):
    model = gpt2(dtype)
    W = model.transformer.h[0].attn.c_attn.weight.detach().float().T.clone()
    adapter = veneer.attach(model, f"loftq(iterations={rounds})", rank=4, alpha=8.0, sites="attention")
    q, k, v, _ = adapter.deltas.values()
    near = torch.cat([d.site.weight().float() + d.weight() for d in (q, k, v)])
    far = torch.cat([d.site.weight().float() for d in (q, k, v)])
    assert (W - near).norm() < 0.9 * (W - far).norm()
    stirred(adapter, 0.05)
    y = model(IDS).logits
    adapter.save(tmp_path / "kept")
    again = gpt2(dtype)
    veneer.load(again, tmp_path / "kept")
    assert torch.equal(again(IDS).logits, y)


def test_detaching_leaves_the_stored_base():
    model = gpt2()
    adapter = veneer.attach(model, "loftq(iterations=2)", rank=4)
    with adapter.disabled():
        base = model(IDS).logits
    assert not torch.allclose(model(IDS).logits, base, atol=1e-4)
    adapter.detach()
    assert torch.equal(model(IDS).logits, base)


def test_layers_that_stay_dense_start_as_they_do():
    model = gpt2()
    adapter = veneer.attach(model, "loftq", rank=4, sites="all")
    zeros = {path for path, d in adapter.deltas.items() if not d.B.any()}
    assert zeros == {p for p in adapter.deltas if p.endswith(("wte", "wpe", "lm_head"))}


def test_a_base_that_was_stored_before_and_too_large_a_rank_are_refused():
    layer = nn.Linear(64, 48)
    first = single(layer, "lora+nf4", rank=2)
    first.adapter.detach()
    with pytest.raises(UserError, match="0 was stored quantised before"):
        veneer.attach(first.model, "loftq", rank=2, sites="all")
    with pytest.raises(UserError, match="more than 0 has singular values, 48"):
        single(nn.Linear(64, 48), "loftq", rank=49)
