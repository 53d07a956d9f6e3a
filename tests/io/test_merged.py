"""A merged model is a transformers directory that gives the adapted model's outputs. Oracle: transformers itself."""

import json

import pytest
import torch
import transformers as tf
from by_peft import run, shake
from models import VOCABULARY, make

import veneer
from veneer.errors import UserError

AUTO = {"bert": tf.AutoModelForSequenceClassification, "vit": tf.AutoModelForImageClassification}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def reload(kind, path):
    model, info = AUTO.get(kind, tf.AutoModelForCausalLM).from_pretrained(path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize(
    ("kind", "recipe", "sites"),
    [
        ("llama", "lora(rank=4)", "all"),
        ("llama", "dora(rank=4)+pissa", "linear"),
        ("embedding", "lora(rank=4)", "embedding"),
        ("gpt2", "lora(rank=4)", "linear"),
        ("gpt2", "dora(rank=4)", ["q", "up"]),
        ("bert", "lora(rank=4)", "linear"),
        ("bert", "lora-bias(rank=4)", "attention"),
        ("gpt2", "lora-bias(rank=4)", ["q", "down"]),
        ("vit", "lora(rank=4)", "conv"),
        ("llama", "lora(rank=4)+nf4", "linear"),
        ("gpt2", "lora(rank=4)+nf4", "linear"),
        ("llama", "full", "attention"),
    ],
)
def test_the_merged_model_gives_the_adapted_models_outputs(kind, recipe, sites, tmp_path):
    case = make(kind)
    adapter = veneer.attach(case.model, recipe, sites=sites)
    shake(case.model)
    wanted, before = run(case.model, case.batch), {k: v.clone() for k, v in case.model.state_dict().items()}
    adapter.export(tmp_path / "m", format="merged")
    torch.testing.assert_close(run(reload(kind, tmp_path / "m"), case.batch), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(case.model, case.batch), wanted)
    assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())


def tied_case():
    torch.manual_seed(0)
    case = make("llama")
    config = tf.LlamaConfig(num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=True, **SIZES)
    return case._replace(model=tf.LlamaForCausalLM(config).eval())


@pytest.mark.parametrize("sites", [["lm_head"], ["embed_tokens"]])
def test_a_change_at_one_end_of_a_tie_unties_the_written_model_only(sites, tmp_path):
    case = tied_case()
    adapter = veneer.attach(case.model, "lora(rank=4)", sites=sites)
    shake(case.model)
    wanted = run(case.model, case.batch)
    adapter.export(tmp_path / "m", format="merged")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(run(reload("llama", tmp_path / "m"), case.batch), wanted, rtol=1e-5, atol=1e-5)
    assert case.model.config.tie_word_embeddings
    assert case.model.lm_head.weight is case.model.model.embed_tokens.weight


def test_a_tie_that_no_fold_touches_stays(tmp_path):
    case = tied_case()
    adapter = veneer.attach(case.model, "lora(rank=4)", sites="linear", train=["model.embed_tokens.weight"])
    shake(case.model, 0.1)
    wanted = run(case.model, case.batch)
    adapter.export(tmp_path / "m", format="merged")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is True
    torch.testing.assert_close(run(reload("llama", tmp_path / "m"), case.batch), wanted, rtol=1e-5, atol=1e-5)


def test_a_tied_half_precision_tensor_that_trained_stays_one_tensor_of_its_type(tmp_path):
    case = tied_case()
    case.model.bfloat16()
    adapter = veneer.attach(case.model, "lora(rank=4)", train=["model.embed_tokens.weight"])
    shake(case.model, 0.1)
    adapter.export(tmp_path / "m", format="merged")
    again = reload("llama", tmp_path / "m")
    assert again.config.tie_word_embeddings and again.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, adapter.trained["model.embed_tokens.weight"].parameter().bfloat16())


@pytest.mark.parametrize("recipe", ["lora(rank=4)", "lora-bias(rank=4)"])
def test_a_trained_bias_beside_factors_is_kept(recipe, tmp_path):
    case = make("bert")
    adapter = veneer.attach(case.model, recipe, sites="attention", train=["*.query.bias", "*.dense.bias"])
    shake(case.model)
    adapter.export(tmp_path / "m", format="merged")
    wanted = run(case.model, case.batch)
    torch.testing.assert_close(run(reload("bert", tmp_path / "m"), case.batch), wanted, rtol=1e-5, atol=1e-5)


def test_a_folded_adapter_is_written_the_same_and_stays_folded(tmp_path):
    case = make("llama")
    adapter = veneer.attach(case.model, "dora(rank=4)")
    shake(case.model)
    adapter.export(tmp_path / "m", format="merged")
    adapter.fold()
    folded = run(case.model, case.batch)
    adapter.export(tmp_path / "f", format="merged")
    first, second = (tmp_path / d / "model.safetensors" for d in "mf")
    assert first.read_bytes() == second.read_bytes()
    assert torch.equal(run(case.model, case.batch), folded)


def test_weights_keep_the_type_of_the_base_or_take_the_one_asked_for(tmp_path):
    case = make("llama", torch.bfloat16)
    adapter = veneer.attach(case.model, "lora(rank=4)", train=["model.norm.weight"])
    shake(case.model)
    adapter.export(tmp_path / "m", format="merged")
    adapter.export(tmp_path / "f", format="merged", dtype=torch.float32)
    assert {p.dtype for p in reload("llama", tmp_path / "m").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reload("llama", tmp_path / "f").parameters()} == {torch.float32}


def test_a_merged_model_takes_the_place_of_another_and_leaves_other_files(tmp_path):
    case = make("llama")
    adapter = veneer.attach(case.model, "lora(rank=4)")
    adapter.export(tmp_path / "m", format="merged", max_shard_size="20KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    shake(case.model)
    adapter.export(tmp_path / "m", format="merged")
    assert [p.name for p in (tmp_path / "m").glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    wanted = run(case.model, case.batch)
    torch.testing.assert_close(run(reload("llama", tmp_path / "m"), case.batch), wanted, rtol=1e-5, atol=1e-5)


def test_a_bias_without_a_place_in_the_architecture_is_refused(tmp_path):
    case = make("llama")
    adapter = veneer.attach(case.model, "lora-bias(rank=4)", sites="attention")
    shake(case.model)
    with pytest.raises(UserError, match=r"folding made .*bias.* LlamaForCausalLM has no place"):
        adapter.export(tmp_path / "m", format="merged")
    assert not (tmp_path / "m").exists()


def test_a_plain_torch_model_has_no_directory_format(tmp_path):
    case = make("conv")
    adapter = veneer.attach(case.model, "lora(rank=4)", sites="conv")
    with pytest.raises(UserError, match=r"bake\(\)"):
        adapter.export(tmp_path / "m", format="merged")
