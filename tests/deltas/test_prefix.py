"""Prefix tuning against a prefilled cache (sheet 000, oracle 13) and against PEFT."""

import pytest
import torch
import transformers as tf
from single import put, stirred
from torch import nn

import veneer
from veneer.errors import UserError

IDS = torch.arange(5, 17).view(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


def make(kind, attention="sdpa"):
    torch.manual_seed(0)
    own = {"attn_implementation": attention}
    if kind == "llama":
        config = tf.LlamaConfig(intermediate_size=48, num_key_value_heads=2, **SIZES, **own)
        return tf.LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(bos_token_id=0, eos_token_id=0, **SIZES, **own)).eval()
    return tf.BertForSequenceClassification(tf.BertConfig(intermediate_size=48, **SIZES, **own)).eval()


def attached(kind, fields="", attention="sdpa"):
    model = make(kind, attention)
    adapter = veneer.attach(model, f"prefix(length=4, {fields})".replace(", )", ")"))
    return model, adapter, [d for d in adapter.deltas.values() if d.at_attention]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [MASK, None], ids=["mask", "no mask"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_the_base_on_a_cache_that_holds_the_prefix(kind, mask, attention):
    model, adapter, deltas = attached(kind, "std=0.5", attention)
    assert adapter.parameter_count() == sum(p.numel() for d in deltas for p in (d.K, d.V))
    plain, cache = make(kind, attention), tf.DynamicCache()
    for i, d in enumerate(deltas):
        K, V = (t.view(4, d.site.heads, -1).transpose(0, 1).expand(2, -1, -1, -1) for t in (d.K, d.V))
        cache.update(K, V, i)
    longer = None if mask is None else torch.cat([torch.ones(2, 4).long(), mask], 1)
    expected = plain(IDS, attention_mask=longer, past_key_values=cache).logits
    y = model(IDS, attention_mask=mask).logits
    assert torch.allclose(y, expected, atol=1e-5)
    with adapter.disabled():
        assert not torch.allclose(model(IDS, attention_mask=mask).logits, y, atol=1e-3)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_outputs_and_gradients_agree_with_peft(kind, projection):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        task_type="SEQ_CLS" if kind == "bert" else "CAUSAL_LM", num_virtual_tokens=4, prefix_projection=projection,
        encoder_hidden_size=24,
    )  # fmt: skip
    theirs = peft.get_peft_model(make(kind), config).eval()
    model, adapter, deltas = attached(kind, f"std=0.5, projection={projection}, hidden=24")
    encoder = theirs.prompt_encoder["default"]
    if projection:
        pool = adapter.shared
        first, last = encoder.transform[0], encoder.transform[2]
        own = [pool.E, pool.W1, pool.b1, pool.W2, pool.b2]
        others = [encoder.embedding.weight, first.weight, first.bias, last.weight, last.bias]
        for p, q in zip(own, others):
            q.data.copy_(p.data)
        assert sum(d.parameter_count() for d in deltas) == sum(p.numel() for p in own)
    else:
        own, others = [t for d in deltas for t in (d.K, d.V)], [encoder.embedding.weight]
        others[0].data.copy_(torch.cat([t.data for t in own], 1))
    y, expected = (net(input_ids=IDS, attention_mask=MASK).logits for net in (model, theirs))
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), own)
    ours = ours if projection else [torch.cat(ours, 1)]
    for g, h in zip(ours, torch.autograd.grad((expected * weights).sum(), others)):
        assert torch.allclose(g, h, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generation_with_a_cache_is_generation_without_one(kind, padding):
    model, adapter, _ = attached(kind)
    stirred(adapter)
    mask = torch.ones_like(IDS)
    if padding == "left":
        mask[1, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **options))
    beams = model.generate(IDS, num_beams=3, use_cache=True, **options)
    assert torch.equal(beams, model.generate(IDS, num_beams=3, use_cache=False, **options))


def test_without_a_shift_positions_stay():
    model, adapter, deltas = attached("gpt2", "shift=False")
    assert len(adapter.deltas) == len(deltas)
    stirred(adapter)
    y = model(IDS).logits
    shifted, other, _ = attached("gpt2")
    other.load_state(adapter.state())
    wpe = shifted.transformer.wpe
    wpe.weight.data = wpe.weight.data.roll(4, 0)  # position 4 is where 0 was
    assert torch.allclose(shifted(IDS).logits, y, atol=1e-5)
    assert not torch.allclose(shifted(IDS, position_ids=torch.arange(1, 7)[None]).logits, y, atol=1e-3)


def test_a_selection_means_its_blocks():
    adapter = veneer.attach(make("llama"), "prefix(length=4)", sites=["layers.1.mlp.up_proj"])
    assert list(adapter.deltas) == ["model.layers.1.self_attn", "model"]


@pytest.mark.parametrize("fields", ["", "projection=True"])
def test_it_comes_back_from_its_file(fields, tmp_path):
    model, adapter, _ = attached("llama", fields)
    stirred(adapter)
    y = model(IDS).logits
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(IDS).logits, y)


@pytest.mark.parametrize("fields", ["", "projection=True"])
def test_gradients_survive_checkpointing(fields):
    grads = []
    for switch in (False, True):
        model, adapter, _ = attached("llama", fields)
        model.train()
        if switch:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        grads.append([p.grad for p in adapter.parameters()])
    assert all(g.abs().sum() > 0 and torch.allclose(g, h, atol=1e-6) for g, h in zip(*grads))


def test_other_models_and_attentions_are_refused():
    with pytest.raises(UserError, match="takes a key–value cache"):
        veneer.attach(nn.Sequential(nn.Linear(4, 4)), "prefix", sites="all")
    model = make("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="'sdpa' or 'eager', not 'flex_attention'"):
        veneer.attach(model, "prefix")


def test_it_stands_beside_lora_on_the_same_model():
    model, prefix, _ = attached("llama")
    lora = veneer.attach(model, "lora", name="second")
    stirred(prefix), stirred(lora)
    both = model(IDS).logits
    put(next(iter(lora.deltas.values())), B=torch.zeros(32, 8))
    assert not torch.allclose(model(IDS).logits, both, atol=1e-4)
