"""Roles, blocks, heads and fused rows of common architectures, each against the model's own definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer.models import architecture as arch

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    )


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SMALL))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    )


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4))


def phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2))


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3)
        self.fc1, self.fc = nn.Linear(8, 6), nn.Linear(6, 3)


ROLES = {
    llama: {
        "model.embed_tokens": "embed",
        "model.layers.0.self_attn.q_proj": "q",
        "model.layers.1.self_attn.k_proj": "k",
        "model.layers.1.self_attn.v_proj": "v",
        "model.layers.1.self_attn.o_proj": "o",
        "model.layers.1.mlp.gate_proj": "gate",
        "model.layers.1.mlp.up_proj": "up",
        "model.layers.1.mlp.down_proj": "down",
        "model.layers.0.input_layernorm": "norm",
        "model.norm": "norm",
        "lm_head": "head",
        "model.layers.0": "other",
    },
    gpt2: {
        "transformer.wte": "embed",
        "transformer.wpe": "embed",
        "transformer.h.0.attn.c_attn": "other",
        "transformer.h.0.attn.c_proj": "o",
        "transformer.h.0.mlp.c_fc": "up",
        "transformer.h.0.mlp.c_proj": "down",
        "transformer.h.0.ln_1": "norm",
        "lm_head": "head",
    },
    bert: {
        "bert.embeddings.word_embeddings": "embed",
        "bert.encoder.layer.0.attention.self.query": "q",
        "bert.encoder.layer.0.attention.self.key": "k",
        "bert.encoder.layer.0.attention.self.value": "v",
        "bert.encoder.layer.0.attention.output.dense": "o",
        "bert.encoder.layer.0.intermediate.dense": "up",
        "bert.encoder.layer.0.output.dense": "down",
        "bert.encoder.layer.0.output.LayerNorm": "norm",
        "bert.pooler.dense": "other",
        "classifier": "head",
    },
    t5: {
        "shared": "embed",
        "encoder.block.0.layer.0.SelfAttention.q": "q",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "other",
        "decoder.block.1.layer.1.EncDecAttention.k": "k",
        "decoder.block.1.layer.1.EncDecAttention.v": "v",
        "decoder.block.1.layer.1.EncDecAttention.o": "o",
        "decoder.block.1.layer.2.DenseReluDense.wi_0": "gate",
        "decoder.block.1.layer.2.DenseReluDense.wi_1": "up",
        "decoder.block.1.layer.2.DenseReluDense.wo": "down",
        "encoder.final_layer_norm": "norm",
        "lm_head": "head",
    },
    vit: {
        "vit.embeddings.patch_embeddings.projection": "embed",
        "vit.layers.0.attention.q_proj": "q",
        "vit.layers.0.attention.o_proj": "o",
        "vit.layers.0.mlp.fc1": "up",
        "vit.layers.0.mlp.fc2": "down",
        "vit.layernorm": "norm",
        "classifier": "head",
    },
    phi3: {
        "model.layers.0.self_attn.qkv_proj": "other",
        "model.layers.0.self_attn.o_proj": "o",
        "model.layers.0.mlp.gate_up_proj": "other",
        "model.layers.0.mlp.down_proj": "down",
        "lm_head": "head",
    },
    CNN: {"conv1": "other", "conv2": "other", "norm": "norm", "fc1": "other", "fc": "head"},
}


@pytest.fixture(scope="module")
def models():
    return {build: build() for build in ROLES}


@pytest.mark.parametrize("build", ROLES, ids=lambda build: build.__name__)
def test_each_layer_has_its_role(build, models):
    model = models[build]
    assert {path: arch.role(path, model.get_submodule(path), model) for path in ROLES[build]} == ROLES[build]


def test_a_parameter_has_the_role_of_its_owner_and_a_bias_its_own(models):
    model = models[bert]
    dense, norm = model.bert.encoder.layer[0].output.dense, model.bert.encoder.layer[0].output.LayerNorm
    assert arch.role("bert.encoder.layer.0.output.dense.weight", dense, model) == "down"
    assert arch.role("bert.encoder.layer.0.output.dense.bias", dense, model) == "bias"
    assert arch.role("bert.encoder.layer.0.output.LayerNorm.weight", norm, model) == "norm"
    assert arch.role("bert.encoder.layer.0.output.LayerNorm.bias", norm, model) == "bias"
    assert arch.role("transformer.h.0.attn.c_attn[k]", models[gpt2].transformer.h[0].attn.c_attn, models[gpt2]) == "k"


def test_a_head_of_several_layers_is_head_throughout():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = RobertaForSequenceClassification(RobertaConfig(**SMALL, pad_token_id=1))
    assert arch.role("classifier.dense", model.classifier.dense, model) == "head"
    assert arch.role("classifier.out_proj", model.classifier.out_proj, model) == "head"


def test_the_head_of_a_sequential_classifier_is_its_last_layer():
    model = nn.Module()
    model.classifier = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3), nn.Dropout())
    assert arch.head(model) is model.classifier[2]
    assert arch.role("classifier.0", model.classifier[0], model) == "other"


def test_blocks_are_those_of_encoder_and_decoder(models):
    stacks = [f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in (0, 1)]
    assert [path for path, _ in arch.blocks(models[t5])] == stacks
    assert [path for path, _ in arch.blocks(models[vit])] == ["vit.layers.0", "vit.layers.1"]
    assert arch.blocks(models[llama])[1][1] is models[llama].model.layers[1]
    assert arch.blocks(models[CNN]) == []


def test_what_an_adapter_adds_is_not_seen():
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.veneer = nn.ModuleDict({"default": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])})
    model.veneer = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2))])
    assert [path for path, _ in arch.blocks(model)] == ["model.layers.0", "model.layers.1"]
    assert set(arch.mlp_modules(model)[0].layers) == {"gate", "up", "down"}


def test_block_index_is_of_the_first_list_on_the_path(models):
    assert arch.block_index("decoder.block.1.layer.2.DenseReluDense.wo") == 1
    assert arch.block_index("lm_head") is None
    sequential = nn.Sequential(nn.Linear(2, 2))
    assert arch.block_index("0", sequential) is None and arch.block_index("0") == 0
    assert arch.block_index("model.layers.1.mlp", models[llama]) == 1


def test_trunk_head_and_embedding(models):
    assert arch.trunk(models[llama]) is models[llama].model
    assert arch.trunk(models[t5]) is models[t5] and arch.trunk(models[CNN]) is models[CNN]
    assert arch.head(models[gpt2]) is models[gpt2].lm_head and arch.head(models[vit]) is models[vit].classifier
    assert arch.head(nn.Sequential(nn.Linear(2, 2))) is None
    assert arch.embedding(models[t5]) is models[t5].shared
    assert arch.embedding(models[vit]) is models[vit].vit.embeddings.patch_embeddings
    assert arch.embedding(models[CNN]) is None


def test_heads_and_their_width(models):
    counts = {b: (arch.heads(models[b], "q"), arch.heads(models[b], "k"), arch.head_dim(models[b])) for b in ROLES}
    assert counts == {
        llama: (4, 2, 8),
        gpt2: (4, 4, 8),
        bert: (4, 4, 8),
        t5: (4, 4, 16),
        vit: (4, 4, 8),
        phi3: (4, 2, 8),
        CNN: (None, None, None),
    }
    plain = nn.TransformerEncoderLayer(12, 3)
    assert (arch.heads(plain, "v"), arch.head_dim(plain)) == (3, 4)


def test_gpt2_rows_are_what_its_attention_splits(models):
    layer = models[gpt2].transformer.h[0].attn.c_attn
    x = torch.randn(2, 5, 32)
    rows = arch.fused_rows("transformer.h.0.attn.c_attn", layer, models[gpt2])
    dense = layer.weight.T
    for want, r in zip(layer(x).split(32, dim=2), "qkv"):  # GPT2Attention.forward
        torch.testing.assert_close(x @ dense[rows[r]].T + layer.bias[rows[r]], want)


def test_phi3_rows_follow_grouped_query_sizes(models):
    block = models[phi3].model.layers[0]
    assert arch.fused_rows("self_attn.qkv_proj", block.self_attn.qkv_proj, models[phi3]) == {
        "q": slice(0, 32),
        "k": slice(32, 48),
        "v": slice(48, 64),
    }
    rows = arch.fused_rows("mlp.gate_up_proj", block.mlp.gate_up_proj, models[phi3])
    x, W = torch.randn(3, 32), block.mlp.gate_up_proj.weight
    gated = torch.nn.functional.silu(x @ W[rows["gate"]].T) * (x @ W[rows["up"]].T)
    torch.testing.assert_close(block.mlp.down_proj(gated), block.mlp(x))


def test_a_projection_that_is_not_fused_or_interleaves_has_no_rows(models):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))
    attention = model.gpt_neox.layers[0].attention
    assert arch.fused_rows("attention.query_key_value", attention.query_key_value, model) is None
    assert set(arch.attention_modules(model)[0].layers) == {"qkv", "o"}
    assert arch.fused_rows("q_proj", models[llama].model.layers[0].self_attn.q_proj, models[llama]) is None


def test_mlp_modules_with_their_layers(models):
    def found(build):
        parts = arch.mlp_modules(models[build])
        return [(part.path, {r: layer.path for r, layer in part.layers.items()}) for part in parts]

    gated = ("gate", "up", "down")
    assert found(llama)[0] == ("model.layers.0.mlp", {r: f"model.layers.0.mlp.{r}_proj" for r in gated})
    assert [path for path, _ in found(t5)] == [
        f"{s}.block.{i}.layer.{1 + (s == 'decoder')}.DenseReluDense" for s in ("encoder", "decoder") for i in (0, 1)
    ]
    assert found(phi3)[1][1]["gate"] == "model.layers.1.mlp.gate_up_proj[gate]"
    assert found(gpt2)[0][1] == {"up": "transformer.h.0.mlp.c_fc", "down": "transformer.h.0.mlp.c_proj"}
    assert found(bert) == []  # its two halves lie on the block itself


def test_attention_modules_with_their_layers(models):
    paths = {b: [part.path for part in arch.attention_modules(models[b])] for b in ROLES}
    assert paths[bert] == ["bert.encoder.layer.0.attention", "bert.encoder.layer.1.attention"]
    assert paths[t5][2:4] == ["decoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention"]
    assert paths[CNN] == [] and len(paths[vit]) == len(paths[gpt2]) == 2
    attention = arch.attention_modules(models[phi3])[0]
    assert attention.module is models[phi3].model.layers[0].self_attn and attention.layers["v"].rows == slice(48, 64)


def test_tied_parameters_are_named_together(models):
    assert arch.tied(models[gpt2]) == [["transformer.wte.weight", "lm_head.weight"]]
    assert arch.tied(models[llama]) == []
    parts = torch.zeros(2, 3)
    model = nn.Module()
    model.a, model.b, model.c = nn.Parameter(parts[0]), nn.Parameter(parts[1]), nn.Parameter(parts[0])
    assert arch.tied(model) == [["a", "c"]]  # b lies in the same storage, at another address
