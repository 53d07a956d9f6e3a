"""Full fine-tuning against torch's own."""

import copy

import pytest
import torch
import transformers as tf
from single import stirred
from torch import nn

import veneer
from veneer.errors import UserError
from veneer.parts.restore import attach_from


def tied_llama(dtype=torch.float32):
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=61,
        tie_word_embeddings=True,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).to(dtype).eval()


IDS = torch.arange(12).view(2, 6)


def test_training_follows_plain_fine_tuning_step_by_step():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    plain = copy.deepcopy(model)
    adapter = veneer.attach(model, "full", sites="all")
    x, runs = torch.randn(5, 6), ((model, adapter.parameters()), (plain, list(plain.parameters())))
    for net, params in runs:
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(model(x), plain(x))
    assert adapter.parameter_count() == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("sites", ["embedding", "lm_head", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings_train_once_and_change_both_ends(sites, dtype):
    model = tied_llama(dtype)
    before = model.lm_head.weight.detach().clone()
    y = model(IDS).logits
    adapter = veneer.attach(model, "full", sites=sites)
    assert torch.equal(model(IDS).logits, y)
    shared = [n for n, _ in adapter.named_parameters() if "embed_tokens" in n or "lm_head" in n]
    assert len(shared) == 1
    assert adapter.parameter_count() == sum(r["parameters"] for r in adapter.table())
    stirred(adapter, 0.05)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        moved = model(IDS).logits
        twin = tied_llama(dtype)
        adapter.fold()
        twin.load_state_dict(model.state_dict())
        adapter.unfold()
        assert torch.equal(twin(IDS).logits, moved)
    with adapter.disabled():
        assert torch.equal(model(IDS).logits, y)
    state, description = adapter.state(), adapter.description()
    assert sum(v.shape == before.shape for v in state.values()) == 1
    adapter.detach()
    assert torch.equal(model.lm_head.weight, before) and model.lm_head.weight.dtype == dtype
    attach_from(model, description, state)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, moved)


def test_small_steps_survive_in_the_fp32_master_of_a_bf16_weight():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    model[0].weight.data.fill_(1.0)
    adapter = veneer.attach(model, "full", sites="all")
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(8):
            adapter.parameters()[0].add_(2**-10)  # below bf16's resolution at 1
    assert model(x).dtype == torch.bfloat16
    assert torch.equal(model(x), torch.full((1, 4), 4 * (1 + 2**-7), dtype=torch.bfloat16))


def test_a_part_of_a_fused_projection_is_refused():
    config = tf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=61, bos_token_id=0, eos_token_id=0)
    model = tf.GPT2LMHeadModel(config)
    with pytest.raises(UserError, match="only 32 of its 96 rows are selected"):
        veneer.attach(model, "full", sites="q")
    adapter = veneer.attach(model, "full", sites="c_attn")
    assert adapter.parameter_count() == 96 * 32 + 96


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_with_norms_and_all_layers_every_parameter_trains(kind):
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tied_llama() if kind == "llama" else tf.ViTModel(tf.ViTConfig(image_size=8, patch_size=4, **small))
    names = {n for n, _ in model.named_parameters()}
    adapter = veneer.attach(model, "full(norms=True)", sites="all")
    assert {n.removesuffix(".value") for n, _ in adapter.named_parameters()} == names
    norms = {n for n in names if "norm" in n}
    few = veneer.attach(model, "full(norms=True)", sites="q_proj" if kind == "llama" else "q", name="few")
    assert norms and norms <= {n.removesuffix(".value") for n, _ in few.named_parameters()} < names
