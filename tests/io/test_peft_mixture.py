"""X-LoRA from and to PEFT: its files give its logits here, ours give ours there. Oracle: the peft package, 1e-5."""

import json
import shutil
import warnings

import by_peft
import models
import pytest
import torch
import transformers
from by_peft import loaded, run, saved, shake
from safetensors.torch import load_file, save_file

import veneer
from veneer.errors import UserError

EXPERTS = {
    "llama": ({"r": 3, "target_modules": ["q_proj", "v_proj"]}, {"r": 4, "target_modules": ["q_proj", "up_proj"]}),
}
EXPERTS["phi3"] = ({"r": 3, "target_modules": ["qkv_proj"]}, {"r": 2, "target_modules": ["qkv_proj", "o_proj"]})
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROOT = "base_model.internal_xlora_classifier.layers"


def make(kind):
    """A case whose model keeps no cache, as PEFT wants it; Phi-3 is the one below ``model.`` with fused projections."""
    case = models.make("llama" if kind == "phi3" else kind)
    if kind == "phi3":
        sizes = case.model.config.to_dict() | {"model_type": "phi3", "pad_token_id": 0, "architectures": None}
        torch.manual_seed(0)
        case = case._replace(model=transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes)).eval())
    case.model.config.use_cache = False
    return case


@pytest.fixture(autouse=True)
def same_cases(monkeypatch):
    monkeypatch.setattr(by_peft, "make", make)


@pytest.fixture
def mixture(tmp_path):
    """Save an X-LoRA made by PEFT; returns (directory, PEFT's output)."""
    import peft

    def made(kind, **config):
        homes = {}
        for k, expert in enumerate(EXPERTS[kind]):
            homes[str(k)] = str(saved(tmp_path / str(k), kind, lora_alpha=5, **expert)[0])
        case = make(kind)
        width = case.model.config.hidden_size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=width, adapters=homes, **config)
            model = peft.get_peft_model(case.model, config)
            shake(model, 1.0)
            output = run(model, case.batch)
            model.save_pretrained(str(tmp_path / "mixture"))
        return tmp_path / "mixture", output

    return made


READ = {
    "by layer": ("llama", {"xlora_depth": 2, "xlora_size": 9, "layerwise_scalings": True}),
    "one for all layers": ("llama", {"xlora_depth": 1, "softmax_temperature": 0.5, "global_scaling_weight": 1.5}),
    "deep, without dropout": ("llama", {"xlora_depth": 3, "xlora_size": 5, "xlora_dropout_p": 0.0}),
    "the best, not normalised": ("llama", {"enable_softmax": False, "top_k_lora": 1}),
    "the best, normalised": ("llama", {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}),
    "normalised twice": ("llama", {"enable_softmax_topk": True}),
    "fused rows by layer": ("phi3", {"xlora_depth": 2, "xlora_size": 9, "layerwise_scalings": True}),
}


@pytest.mark.parametrize("case", READ)
def test_reads_what_peft_wrote(case, mixture):
    kind, config = READ[case]
    directory, wanted = mixture(kind, **config)
    here = make(kind)
    base = run(here.model, here.batch)
    adapter = veneer.load(here.model, directory)
    assert (wanted - base).abs().max() > 5e-3
    torch.testing.assert_close(run(here.model, here.batch), wanted, rtol=1e-5, atol=1e-5)
    assert list(veneer.adapters(here.model)) == ["default"]
    with adapter.disabled():
        assert torch.equal(run(here.model, here.batch), base)


WRITE = {
    "by layer": ("llama", "x-lora(adapters=['a', 'b'], depth=2, size=9)"),
    "one for all layers": ("llama", "x-lora(adapters=['a', 'b'], layerwise=False, temperature=0.5, strength=1.5)"),
    "deep, without dropout": ("llama", "x-lora(adapters=['a', 'b'], depth=3, size=5, dropout=0.0)"),
    "the best": ("llama", "x-lora(adapters=['a', 'b'], softmax=False, top_k=1)"),
    "the best, normalised": ("llama", "x-lora(adapters=['a', 'b'], softmax=False, softmax_top_k=True, top_k=2)"),
    "fused rows": ("phi3", "x-lora(adapters=['a', 'b'], layerwise=False)"),
}


def mixed(kind, recipe):
    case = make(kind)
    for name, rank, sites in (("a", 3, ["q", "v"]), ("b", 4, ["q", "up"])):
        veneer.attach(case.model, f"lora(rank={rank}, alpha=5)", sites=sites, name=name)
        shake(case.model)
    adapter = veneer.attach(case.model, recipe, name="mixture")
    shake(case.model, 1.0)
    return case, adapter


@pytest.mark.parametrize("case", WRITE)
def test_peft_gives_our_outputs(case, tmp_path):
    kind, recipe = WRITE[case]
    here, adapter = mixed(kind, recipe)
    wanted = run(here.model, here.batch)
    adapter.export(tmp_path / "out")
    torch.testing.assert_close(run(loaded(tmp_path / "out", kind), here.batch), wanted, rtol=1e-5, atol=1e-5)
    moved, again = shutil.move(tmp_path / "out", tmp_path / "moved"), make(kind)
    veneer.load(again.model, moved)
    torch.testing.assert_close(run(again.model, here.batch), wanted, rtol=1e-5, atol=1e-5)


def test_the_experts_of_a_mixture_are_plain_adapters(tmp_path):
    here, adapter = mixed("llama", "x-lora(adapters=['a', 'b'])")
    adapter.export(tmp_path / "out")
    adapter.detach()
    expert = veneer.adapters(here.model)["b"]
    again = make("llama")
    veneer.load(again.model, tmp_path / "out" / "1")
    veneer.adapters(here.model)["a"].detach()
    assert expert.name == "b"
    torch.testing.assert_close(run(again.model, here.batch), run(here.model, here.batch), rtol=1e-5, atol=1e-5)


def test_rows_of_a_fused_projection_that_are_weighed_apart_are_refused(tmp_path):
    _, adapter = mixed("phi3", "x-lora(adapters=['a', 'b'])")
    with pytest.raises(UserError, match=r"weighs all rows of .*qkv_proj alike"):
        adapter.export(tmp_path / "out")


def test_a_model_whose_layers_peft_would_not_find_is_refused(tmp_path):
    _, adapter = mixed("gpt2", "x-lora(adapters=['a', 'b'])")
    with pytest.raises(UserError, match=r"below model. alone, and transformer\.h"):
        adapter.export(tmp_path / "out")


def test_what_peft_lost_of_a_mixture_is_named(mixture, tmp_path):
    directory, _ = mixture("llama", xlora_depth=2, xlora_size=9)
    here = make("llama")
    (tmp_path / "0" / "adapter").rename(tmp_path / "away")
    with pytest.raises(UserError, match="PEFT's copy of an expert"):
        veneer.load(here.model, directory)
    shutil.rmtree(directory / "0")
    with pytest.raises(UserError, match="the expert '0' is neither at"):
        veneer.load(here.model, directory)
    (tmp_path / "away").rename(tmp_path / "0" / "adapter")
    with pytest.raises(UserError, match=r"has no .*layers\.0\.weight"):
        veneer.load(here.model, directory)
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | {"use_trainable_adapters": True}))
    with pytest.raises(UserError, match="trained the experts too"):
        veneer.load(here.model, directory)
    assert not veneer.adapters(here.model)


def test_a_classifier_of_another_size_is_named(mixture):
    directory, _ = mixture("llama")
    copy = load_file(directory / "0" / TENSORS)
    save_file({f"{ROOT}.0.weight": copy[f"{ROOT}.weight"][:1], f"{ROOT}.0.bias": copy[f"{ROOT}.bias"]},
              directory / TENSORS)  # fmt: skip
    with pytest.raises(UserError, match=r"has shape \(1, 32\), where 2 experts on 6 layers"):
        veneer.load(make("llama").model, directory)
