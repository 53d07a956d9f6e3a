"""Adapters written here load in PEFT and give our outputs. Oracle: the peft package, fp32, 1e-5."""

import json

import pytest
import torch
from by_peft import loaded, run, shake
from models import VOCABULARY, make
from safetensors.torch import load_file

import veneer
from veneer.core.hook import Schedule
from veneer.errors import UserError

CASES = {
    "linear": ("llama", "lora(rank=4, alpha=6)", "linear"),
    "some layers": ("llama", "lora(rank=4)", "model.layers.1.self_attn.*"),
    "everything": ("llama", "lora(rank=4, alpha=6)", "all"),
    "rsLoRA": ("llama", "rslora(rank=4, alpha=6)", "attention"),
    "DoRA": ("llama", "dora(rank=4, alpha=6)", "linear"),
    "DoRA on an embedding": ("embedding", "dora(rank=4)", "embedding"),
    "an embedding": ("embedding", "lora(rank=4)", "embedding"),
    "fused rows": ("gpt2", "lora(rank=4, alpha=6)", "linear"),
    "some fused rows": ("gpt2", "lora(rank=4, alpha=6)", ["q", "v"]),
    "some fused rows with DoRA": ("gpt2", "dora(rank=4, alpha=6)", ["q", "v", "up"]),
    "convolutions": ("conv", "lora(rank=4, alpha=6)", "all"),
    "convolutions with DoRA": ("conv", "dora(rank=4)", "conv"),
    "a classifier": ("bert", "lora(rank=4)", "attention"),
    "an image classifier": ("vit", "lora(rank=4)", "attention"),
    "an encoder and a decoder": ("t5", "lora(rank=4)", "attention"),
    "PiSSA": ("llama", "lora(rank=4, alpha=6)+pissa", "linear"),
    "PiSSA on fused rows": ("gpt2", "lora(rank=4, alpha=6)+pissa", "linear"),
    "PiSSA on DoRA": ("llama", "dora(rank=4, alpha=6)+pissa", "linear"),
    "PiSSA on DoRA on fused rows": ("gpt2", "dora(rank=4, alpha=6)+pissa", ["q", "v"]),
    "PiSSA beside a bias": ("bert", "lora-bias(rank=4, alpha=6)+pissa", "attention"),
    "OLoRA": ("llama", "lora(rank=4, alpha=6)+olora", "linear"),
    "LoRA-FA": ("llama", "lora-fa(rank=4, alpha=6)", "linear"),
    "an embedding's rank-stabilised pair": ("embedding", "rslora(rank=4)", "embedding"),
    "gates": ("llama", "lora(rank=4, alpha=6)+sora", "linear"),
    "lora_bias": ("bert", "lora-bias(rank=4, alpha=6)", "attention"),
    "lora_bias on fused rows": ("gpt2", "lora-bias(rank=4, alpha=6)", ["q", "down"]),
    "lora_bias on convolutions": ("conv", "lora-bias(rank=4)", "conv"),
}


def attached(kind, recipe, sites, **options):
    case = make(kind)
    adapter = veneer.attach(case.model, recipe, sites=sites, **options)
    shake(case.model, 1.0 if kind in ("bert", "vit") else 0.3)
    return case, adapter


def check(case, adapter, kind, directory):
    wanted = run(case.model, case.batch)
    assert (wanted - run(make(kind).model, case.batch)).abs().max() > 5e-3
    torch.testing.assert_close(run(loaded(directory, kind), case.batch), wanted, rtol=1e-5, atol=1e-5)
    again = make(kind)
    veneer.load(again.model, directory)
    torch.testing.assert_close(run(again.model, case.batch), wanted, rtol=1e-5, atol=1e-5)


STARTS = ("lora+eva", "lora+corda", "lora+corda(mode='kpm')", "lora+lora-ga", "dora+lora-ga", "adalora", "lora+pissa")


@pytest.mark.parametrize("recipe", STARTS)
def test_peft_gives_our_outputs_after_a_start_from_data(recipe, tmp_path):
    """What such a start moves out of the base goes with the pair: the base that PEFT has is the untouched one."""
    ids = torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    options = {"calibration": [{"input_ids": ids, "labels": ids}], "schedule": Schedule(steps=9, lr=1e-3)}
    case, adapter = attached("llama", recipe, "attention", rank=4, **options)
    adapter.export(tmp_path / "out")
    check(case, adapter, "llama", tmp_path / "out")


FORMATS = [
    (n, f) for n, (_, recipe, _) in CASES.items() for f in ("peft", "peft-lora") if f == "peft" or "dora" not in recipe
]


@pytest.mark.parametrize(("name", "form"), FORMATS)
def test_peft_gives_our_outputs(name, form, tmp_path):
    kind, recipe, sites = CASES[name]
    case, adapter = attached(kind, recipe, sites)
    adapter.export(tmp_path / "out", format=form)
    check(case, adapter, kind, tmp_path / "out")


@pytest.mark.parametrize("recipe", ["lora(rank=4, alpha=6)", "rslora(rank=4, alpha=6)", "dora(rank=4, alpha=6)"])
def test_ranks_and_scales_of_their_own_become_patterns(recipe, tmp_path):
    case, adapter = attached("llama", recipe, "linear")
    path = "model.layers.0.self_attn.q_proj"
    adapter.rebuild({path: {"rank": 2}, "model.layers.1.mlp.up_proj": {"alpha": 9.0}})
    shake(case.model)
    adapter.export(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {path: 2}
    check(case, adapter, "llama", tmp_path / "out")


def test_trained_base_tensors_become_modules_to_save(tmp_path):
    case, adapter = attached("llama", "lora(rank=4)", "attention", train=["model.norm.weight", "*.mlp.up_proj.weight"])
    adapter.export(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "model.norm" in config["modules_to_save"]
    check(case, adapter, "llama", tmp_path / "out")


def test_a_trained_bias_of_an_adapted_layer_is_saved_as_such(tmp_path):
    case, adapter = attached("bert", "lora(rank=4)", ["query"], train=["*.query.bias"])
    adapter.export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["bias"] == "lora_only"
    check(case, adapter, "bert", tmp_path / "out")


def test_only_fields_that_say_something_are_written(tmp_path):
    _, adapter = attached("llama", "lora(rank=4)", "linear")
    adapter.export(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == {
        "base_model_name_or_path": None,
        "lora_alpha": 4,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_keys_and_shapes_are_those_peft_writes(tmp_path, peft_directory):
    """Oracle: the file PEFT itself writes for the same config."""
    directory, _, _ = peft_directory("conv", r=4, target_modules=["conv1", "conv2", "line"], use_dora=True)
    _, adapter = attached("conv", "dora(rank=4)", "conv")
    adapter.export(tmp_path / "out")
    theirs, ours = (load_file(d / "adapter_model.safetensors") for d in (directory, tmp_path / "out"))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("kind", "recipe", "options", "words"),
    [
        ("llama", "dora", {"format": "peft-lora"}, "dora at .* is not plain LoRA; give rank"),
        ("llama", "lora", {"format": "pft"}, 'did you mean "peft"'),
        ("llama", "lora", {"format": "peft", "dtype": "f16"}, "has no option 'dtype'"),
    ],
)
def test_what_cannot_be_expressed_is_an_error_with_an_offer(kind, recipe, options, words, tmp_path):
    _, adapter = attached(kind, recipe, "attention")
    with pytest.raises(UserError, match=words):
        adapter.export(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_export_leaves_the_adapter_and_the_model_alone(tmp_path):
    case, adapter = attached("llama", "lora(rank=4)", "linear")
    before, state = run(case.model, case.batch), {k: v.clone() for k, v in adapter.state().items()}
    for form in ("peft", "peft-lora", "merged"):
        adapter.export(tmp_path / form, format=form)
    assert torch.equal(run(case.model, case.batch), before)
    assert all(torch.equal(state[k], v) for k, v in adapter.state().items())
