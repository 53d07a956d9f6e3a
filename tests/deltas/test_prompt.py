"""Prompt tuning against the definition (sheet 000, oracle 13) and against PEFT."""

import copy

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


def make(kind):
    torch.manual_seed(0)
    if kind == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(intermediate_size=48, num_key_value_heads=2, **SIZES))
    elif kind == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(bos_token_id=0, eos_token_id=0, **SIZES))
    else:
        model = tf.BertForSequenceClassification(tf.BertConfig(intermediate_size=48, **SIZES))
    return model.eval()


def attached(kind, recipe="prompt(length=4)"):
    model = make(kind)
    adapter = veneer.attach(model, recipe)
    return model, adapter, next(iter(adapter.deltas.values()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_the_base_on_longer_embeddings(kind):
    model, adapter, delta = attached(kind)
    stirred(adapter)
    plain = make(kind)
    E = torch.cat([delta.P.expand(2, -1, -1), plain.get_input_embeddings()(IDS)], 1)
    mask = torch.cat([torch.ones(2, 4).long(), MASK], 1)
    expected = plain(inputs_embeds=E, attention_mask=mask).logits[:, 4:]
    out = model(IDS, attention_mask=MASK, labels=IDS)
    assert torch.allclose(out.logits, expected, atol=1e-5)
    assert out.logits.shape[1] == 6 and torch.isfinite(out.loss)
    given = plain.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=given, attention_mask=MASK).logits, out.logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_outputs_and_the_gradient_agree_with_peft(kind):
    peft = pytest.importorskip("peft")
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    theirs = peft.get_peft_model(make(kind), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4))
    model, _, delta = attached(kind, "prompt(length=4, pooled='prompt')")
    put(delta, P=torch.randn(4, 32))
    other = theirs.prompt_encoder["default"].embedding.weight
    other.data.copy_(delta.P)
    theirs.eval()
    y, expected = (net(input_ids=IDS, attention_mask=MASK).logits for net in (model, theirs))
    expected = expected if kind == "bert" else expected[:, 4:]
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(y)
    (ours,) = torch.autograd.grad((y * weights).sum(), delta.P)
    (g,) = torch.autograd.grad((expected * weights).sum(), other)
    assert torch.allclose(ours, g, rtol=1e-4, atol=1e-6)


def test_a_classifier_sees_the_first_token_of_the_input():
    model, _, delta = attached("bert")
    plain = make("bert")
    E = torch.cat([delta.P.expand(2, -1, -1), plain.get_input_embeddings()(IDS)], 1)
    h = plain.bert(inputs_embeds=E).last_hidden_state[:, 4:]
    assert torch.allclose(model(IDS).logits, plain.classifier(plain.bert.pooler(h)), atol=1e-5)


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


def test_given_positions_move_up():
    model, adapter, _ = attached("gpt2")
    stirred(adapter)
    at = torch.arange(6).expand(2, 6)
    assert torch.equal(model(IDS, position_ids=at).logits, model(IDS).logits)


def test_starts():
    table = make("llama").get_input_embeddings().weight
    P = attached("llama")[2].P
    assert all((table == row).all(1).any() for row in P) and len(P.unique(dim=0)) == 4
    assert torch.equal(attached("llama", "prompt(length=4, tokens=[7, 9, 8])")[2].P, table[[7, 9, 8, 7]])
    uniform, normal = (attached("llama", f"prompt(length=60, start={s!r})")[2].P for s in ("uniform", "normal"))
    assert uniform.abs().max().item() == pytest.approx(0.5, rel=0.01)
    assert normal.std().item() == pytest.approx(1, rel=0.1)
    with pytest.raises(UserError, match="token 61 is not in the vocabulary of 61"):
        attached("llama", "prompt(tokens=[61])")


def test_the_file_holds_the_prompt_alone(tmp_path):
    model, adapter, _ = attached("llama")
    stirred(adapter)
    y = model(IDS).logits
    assert [tuple(t.shape) for t in adapter.state().values()] == [(4, 32)]
    assert adapter.parameter_count() == 4 * 32
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(IDS).logits, y)


def test_it_stands_beside_lora_on_the_same_model():
    model, prompt, _ = attached("llama")
    lora = veneer.attach(model, "lora", name="second")
    stirred(prompt), stirred(lora)
    both = model(IDS).logits
    with lora.disabled():
        assert not torch.allclose(model(IDS).logits, both, atol=1e-3)
    with prompt.disabled():
        alone = copy.deepcopy(model)(IDS).logits
    assert not torch.allclose(alone, both, atol=1e-3)


def test_other_models_are_refused():
    with pytest.raises(UserError, match="is another kind of model"):
        veneer.attach(nn.Sequential(nn.Linear(4, 4)), "prompt", sites="all")
    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=61)
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vit = tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, **sizes))
    with pytest.raises(UserError, match="is another kind of model"):
        veneer.attach(vit, "prompt")
    with pytest.raises(UserError, match="encoder–decoders"):
        veneer.attach(t5, "prompt")
