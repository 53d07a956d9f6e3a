"""A GGUF LoRA file read back gives the adapter's change of each weight.

Oracles: gguf's own reader and tensor names, and transformers' reader of GGUF models for the rows of q and k.
"""

import gguf
import pytest
import torch
import transformers as tf
from by_peft import shake
from models import VOCABULARY, make
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

import veneer
from veneer.core.site import site_at
from veneer.errors import UserError
from veneer.io.gguf import interleave

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def attached(kind="llama", recipe="lora(rank=4, alpha=6)", sites="linear", model=None):
    case = make(kind)
    model = case.model if model is None else model
    adapter = veneer.attach(model, recipe, sites=sites)
    shake(model)
    return adapter


def changes(path):
    """(ΔW by GGUF tensor name, the reader): each product times alpha over that tensor's rank, as llama.cpp does it."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: torch.from_numpy(t.data.copy()).float() for t in reader.tensors}
    out = {}
    for name in {n.rpartition(".")[0] for n in tensors}:
        A, B = tensors[name + ".lora_a"], tensors[name + ".lora_b"]
        A = A.T if name == "token_embd.weight" else A
        out[name] = alpha / B.shape[1] * B @ A
    return out, reader


def folded(adapter, path):
    """ΔW of a whole layer, as the adapter folds it."""
    from veneer.parts.folding import folded_weights

    site = site_at(adapter.model, path)
    W = site.weight().float().clone()
    before = W.clone()
    for s, changed, _ in folded_weights(adapter):
        if s.module_path == path and s.name in (None, "weight"):
            W[slice(None) if s.rows is None else s.rows] = changed
    return W - before


def test_the_keys_are_those_llama_cpp_wants(tmp_path):
    adapter = attached()
    path = adapter.export(tmp_path / "a.gguf", format="gguf")
    _, reader = changes(path)
    found = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert found["general.type"] == "adapter"
    assert found["general.architecture"] == "llama"
    assert found["adapter.type"] == "lora"
    assert found["adapter.lora.alpha"] == 6.0


@pytest.mark.parametrize("recipe", ["dora(rank=4)", "randlora(rank=8, alpha=8)", "full"])
def test_any_form_that_folds_goes_in_within_an_error(recipe, tmp_path):
    adapter = attached(recipe=recipe, sites=["v", "up"])
    found, _ = changes(adapter.export(tmp_path / "a.gguf", format="gguf", tolerance=0.05))
    lost = total = 0.0
    for block in (0, 1):
        for path, name in (("self_attn.v_proj", "attn_v"), ("mlp.up_proj", "ffn_up")):
            change = folded(adapter, f"model.layers.{block}.{path}")
            lost += (found[f"blk.{block}.{name}.weight"] - change).square().sum()
            total += change.square().sum()
    assert 0 < (lost / total).sqrt() <= 0.05


@pytest.mark.parametrize("recipe", ["lora(rank=4, alpha=6)", "rslora(rank=4, alpha=6)", "lora(rank=4)+pissa"])
def test_reads_back_the_change_of_every_weight(recipe, tmp_path):
    adapter = attached(recipe=recipe)
    adapter.rebuild({"model.layers.0.mlp.up_proj": {"rank": 2, "alpha": 9.0}})
    shake(adapter.model)
    found, _ = changes(adapter.export(tmp_path / "a.gguf", format="gguf"))
    undo = LlamaTensorProcessor(config={"num_attention_heads": 4, "num_key_value_heads": 2})
    names = {"self_attn": "attn", "o_proj": "output", "mlp": "ffn"}
    assert len(found) == len(adapter.deltas)
    for path in adapter.deltas:
        _, _, block, part, layer = path.split(".")
        last = "output" if layer == "o_proj" else layer.removesuffix("_proj")
        change = found[f"blk.{block}.{names[part]}_{last}.weight"]
        if layer in ("q_proj", "k_proj"):
            heads, kept = (4, 4) if layer == "q_proj" else (4, 2)
            change = torch.from_numpy(undo._reverse_permute_weights(change.numpy(), heads, kept).copy())
        torch.testing.assert_close(change, folded(adapter, path), rtol=1e-5, atol=1e-5)


def test_fused_rows_are_written_as_the_whole_tensor(tmp_path):
    adapter = attached("gpt2", sites=["q", "v", "up"])
    found, reader = changes(adapter.export(tmp_path / "a.gguf", format="gguf"))
    assert reader.fields["general.architecture"].contents() == "gpt2"
    assert sorted(found) == [f"blk.{i}.{n}.weight" for i in range(2) for n in ("attn_qkv", "ffn_up")]
    torch.testing.assert_close(
        found["blk.1.attn_qkv.weight"], folded(adapter, "transformer.h.1.attn.c_attn"), rtol=1e-5, atol=1e-5
    )


def test_the_factors_of_the_token_embedding_lie_transposed(tmp_path):
    adapter = attached("embedding", sites="embedding")
    path = adapter.export(tmp_path / "a.gguf", format="gguf")
    found, reader = changes(path)
    shapes = {t.name: list(t.shape) for t in reader.tensors}
    assert shapes == {"token_embd.weight.lora_a": [4, VOCABULARY], "token_embd.weight.lora_b": [4, 32]}
    torch.testing.assert_close(found["token_embd.weight"], folded(adapter, "model.embed_tokens"), rtol=1e-5, atol=1e-5)


def test_rows_of_models_without_llamas_rotary_layout_stay(tmp_path):
    model = tf.Qwen2ForCausalLM(tf.Qwen2Config(num_key_value_heads=2, vocab_size=VOCABULARY, **SIZES))
    adapter = attached(model=model, sites="attention")
    found, reader = changes(adapter.export(tmp_path / "a.gguf", format="gguf"))
    assert reader.fields["general.architecture"].contents() == "qwen2"
    torch.testing.assert_close(
        found["blk.0.attn_q.weight"], folded(adapter, "model.layers.0.self_attn.q_proj"), rtol=1e-5, atol=1e-5
    )


def test_interleaving_takes_the_two_halves_of_a_head_in_turn():
    B = torch.arange(8.0)[:, None]
    assert interleave(B, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_half_precision_is_written_on_demand(tmp_path):
    adapter = attached()
    reader = gguf.GGUFReader(adapter.export(tmp_path / "a.gguf", format="gguf", dtype="f16"))
    assert {t.tensor_type.name for t in reader.tensors} == {"F16"}


def llama():
    return make("llama").model


def tied():
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=True, **SIZES)
    )


def neox():
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(vocab_size=VOCABULARY, **SIZES))


@pytest.mark.parametrize(
    ("make_model", "recipe", "sites", "train", "words"),
    [
        (tied, "lora", "all", (), "lm_head|embed_tokens.*shares its weight"),
        (neox, "lora", "mlp", (), "'gpt_neox' models is not written"),
        (lambda: make("llama").model, "dora", "attention", (), "not plain LoRA .* give rank= or tolerance= for the"),
        (
            lambda: make("llama").model,
            "lora",
            "attention",
            ["model.norm.weight"],
            "no whole tensors, but model.norm.weight",
        ),
        (lambda: make("llama").model, "lora-bias", "attention", (), "no bias changes"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_with_an_offer(make_model, recipe, sites, train, words, tmp_path):
    model = make_model()
    adapter = veneer.attach(model, recipe, sites=sites, train=train)
    shake(model)
    with pytest.raises(UserError, match=f"(?s){words}.*merged"):
        adapter.export(tmp_path / "a.gguf", format="gguf")
    assert not list(tmp_path.iterdir())
