"""Adapters made by PEFT give PEFT's own outputs here. Oracle: the peft package, fp32, 1e-5."""

import pytest
import torch
from by_peft import run
from models import make

import veneer
from veneer.errors import UserError

Q, LINEAR = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
CASES = {
    "linear": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": Q}),
    "all-linear": ("llama", {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}),
    "a head": ("llama", {"r": 4, "target_modules": [*LINEAR, "lm_head"]}),
    "rsLoRA": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": Q, "use_rslora": True}),
    "DoRA": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_dora": True}),
    "DoRA with rsLoRA": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": Q, "use_dora": True, "use_rslora": True}),
    "rank and alpha patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": LINEAR,
            "rank_pattern": {r"layers\.0\..*_proj": 2, "v_proj": 3},
            "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 9, "v_proj": 1},
        },
    ),
    "patterns with rsLoRA": (
        "llama",
        {
            "r": 4,
            "target_modules": Q,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "a regular expression": ("llama", {"r": 4, "target_modules": r".*\.1\.self_attn\.(q|k)_proj"}),
    "some layers": ("llama", {"r": 4, "target_modules": Q, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "one layer": ("llama", {"r": 4, "target_modules": Q, "layers_to_transform": 0}),
    "excluded modules": ("llama", {"r": 4, "target_modules": LINEAR, "exclude_modules": r".*\.0\.mlp\..*"}),
    "an embedding": ("embedding", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]}),
    "an embedding with DoRA": ("embedding", {"r": 4, "target_modules": ["embed_tokens"], "use_dora": True}),
    "Conv1D": (
        "gpt2",
        {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "Conv1D with DoRA": (
        "gpt2",
        {"r": 4, "target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
    ),
    "convolutions": ("conv", {"r": 4, "lora_alpha": 6, "target_modules": ["conv1", "conv2", "line", "out"]}),
    "convolutions with DoRA": ("conv", {"r": 4, "target_modules": ["conv1", "conv2", "line"], "use_dora": True}),
    "a classifier": ("bert", {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "a classifier left alone": ("bert", {"r": 4, "target_modules": ["query", "value"]}),
    "saved norms": ("llama", {"r": 4, "target_modules": Q, "modules_to_save": ["input_layernorm", "lm_head"]}),
    "trained biases": ("bert", {"r": 4, "target_modules": ["query", "value"], "bias": "lora_only"}),
    "all biases": ("bert", {"r": 4, "target_modules": ["query", "value"], "bias": "all"}),
    "lora_bias": ("bert", {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], "lora_bias": True}),
    "lora_bias without a bias": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": Q, "lora_bias": True}),
    "lora_bias on convolutions": ("conv", {"r": 4, "lora_alpha": 6, "target_modules": ["conv2"], "lora_bias": True}),
    "PiSSA": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": Q, "init_lora_weights": "pissa"}),
    "PiSSA on Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc"], "init_lora_weights": "pissa"}),
    "PiSSA with DoRA": ("llama", {"r": 4, "target_modules": Q, "init_lora_weights": "pissa", "use_dora": True}),
    "OLoRA": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "init_lora_weights": "olora"}),
    "OLoRA on a square Conv1D": ("gpt2", {"r": 4, "target_modules": [r"attn.c_proj"], "init_lora_weights": "olora"}),
    "a Gaussian start": ("llama", {"r": 4, "target_modules": Q, "init_lora_weights": "gaussian"}),
    "VeRA": ("llama", {"form": "Vera", "r": 4, "target_modules": Q, "save_projection": False}),
    "RandLoRA": ("llama", {"form": "RandLora", "r": 4, "target_modules": Q, "save_projection": False}),
    "an EVA start": ("llama", {"r": 4, "target_modules": Q, "init_lora_weights": "eva"}),
    "an orthogonal start": ("llama", {"r": 4, "target_modules": Q, "init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("case", CASES)
def test_reads_what_peft_wrote(case, peft_directory):
    kind, config = CASES[case]
    directory, wanted, _ = peft_directory(kind, **config)
    here = make(kind)
    base = run(here.model, here.batch)
    adapter = veneer.load(here.model, directory)
    found = run(here.model, here.batch)
    assert (wanted - base).abs().max() > 5e-3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with adapter.disabled():
        assert torch.equal(run(here.model, here.batch), base)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_reads_what_peft_converted_to_plain_lora(start, peft_directory):
    directory, wanted, _ = peft_directory(
        "llama", r=4, lora_alpha=6, target_modules=Q, init_lora_weights=start, initial="convert"
    )
    here = make("llama")
    adapter = veneer.load(here.model, directory)
    torch.testing.assert_close(run(here.model, here.batch), wanted, rtol=1e-5, atol=1e-5)
    assert {d.rank for d in adapter.deltas.values()} == {8}


@pytest.mark.parametrize("start", ["pissa_niter_4", "olora"])
def test_a_start_that_was_saved_is_taken_as_it_was(start, peft_directory):
    from veneer.io.peft import read

    directory, wanted, _ = peft_directory("llama", r=4, target_modules=Q, init_lora_weights=start, initial=True)
    here = make("llama")
    read(here.model, directory, initial=directory.parent / "initial")
    torch.testing.assert_close(run(here.model, here.batch), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_a_start_from_data_reads_where_it_was_saved_and_is_refused_without(start, peft_directory):
    """PEFT cannot load such a directory by itself either."""
    from veneer.io.peft import read

    directory, wanted, _ = peft_directory("llama", r=4, target_modules=Q, init_lora_weights=start, initial=True)
    here = make("llama")
    with pytest.raises(UserError, match=rf"{start}.*initial="):
        veneer.load(here.model, directory)
    read(here.model, directory, initial=directory.parent / "initial")
    torch.testing.assert_close(run(here.model, here.batch), wanted, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_was_read_trains_on(peft_directory):
    directory, _, _ = peft_directory("llama", r=4, target_modules=Q, init_lora_weights="pissa")
    here = make("llama")
    adapter = veneer.load(here.model, directory)
    here.loss().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert {n.rpartition(".")[2] for n, _ in adapter.named_parameters()} == {"A", "B"}
