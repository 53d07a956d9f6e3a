"""Kinds of PEFT beside LoRA: its files give its logits here, ours give ours there. Oracle: the peft package, 1e-5."""

import json

import pytest
import torch
from by_peft import loaded, run, saved, shake
from models import make
from safetensors.torch import load_file, save_file

import veneer
from veneer.errors import UserError

Q, MLP = ["q_proj", "v_proj"], ["q_proj", "v_proj", "down_proj", "up_proj"]
CONVS = ["conv1", "conv2", "line", "out"]
READ = {
    "VeRA": ("llama", {"form": "Vera", "r": 4, "target_modules": MLP, "projection_prng_key": 7}),
    "VeRA by its key": ("llama", {"form": "Vera", "r": 4, "target_modules": Q, "save_projection": False}),
    "VeRA on Conv1D": ("gpt2", {"form": "Vera", "r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "RandLoRA": ("llama", {"form": "RandLora", "r": 8, "randlora_alpha": 16, "target_modules": MLP}),
    "RandLoRA by its key": ("llama", {"form": "RandLora", "r": 8, "target_modules": Q, "save_projection": False}),
    "sparse RandLoRA": (
        "llama",
        {"form": "RandLora", "r": 8, "randlora_alpha": 16, "target_modules": Q, "sparse": True, "very_sparse": True},
    ),
    "LoHa": ("llama", {"form": "LoHa", "r": 3, "alpha": 4, "target_modules": MLP}),
    "LoHa with patterns": (
        "llama",
        {"form": "LoHa", "r": 3, "target_modules": Q, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    ),
    "LoHa on convolutions": ("conv", {"form": "LoHa", "r": 2, "target_modules": CONVS}),
    "LoHa with a core": ("conv", {"form": "LoHa", "r": 2, "target_modules": CONVS, "use_effective_conv2d": True}),
    "LoKr": ("llama", {"form": "LoKr", "r": 2, "alpha": 4, "target_modules": MLP}),
    "LoKr decomposed twice": (
        "llama",
        {"form": "LoKr", "r": 1, "target_modules": MLP, "decompose_both": True, "decompose_factor": 4},
    ),
    "LoKr with a whole factor": ("llama", {"form": "LoKr", "r": 30, "alpha": 4, "target_modules": Q}),
    "LoKr on convolutions": ("conv", {"form": "LoKr", "r": 2, "target_modules": ["conv1", "conv2", "out"]}),
    "IA3": ("llama", {"form": "IA3", "target_modules": MLP, "feedforward_modules": ["down_proj"]}),
    "IA3 by expressions": (
        "llama",
        {"form": "IA3", "target_modules": r".*\.(k|up)_proj", "feedforward_modules": r".*\.1\..*up_proj"},
    ),
    "IA3 on Conv1D": (
        "gpt2",
        {"form": "IA3", "target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    ),
    "IA3 on inputs of a fused projection": (
        "gpt2",
        {"form": "IA3", "target_modules": ["c_attn"], "feedforward_modules": ["c_attn"]},
    ),
    "IA3 on convolutions": (
        "conv",
        {"form": "IA3", "target_modules": ["conv1", "conv2", "out"], "feedforward_modules": ["conv2", "out"]},
    ),
    "OFT": ("llama", {"form": "OFT", "oft_block_size": 8, "target_modules": MLP}),
    "OFT by exact rotations": (
        "llama",
        {"form": "OFT", "r": 4, "oft_block_size": 0, "target_modules": MLP, "use_cayley_neumann": False},
    ),
    "OFT shared": ("llama", {"form": "OFT", "oft_block_size": 8, "target_modules": Q, "block_share": True}),
    "BOFT": ("llama", {"form": "BOFT", "boft_block_size": 8, "target_modules": MLP}),
    "BOFT on convolutions": ("conv", {"form": "BOFT", "boft_block_size": 3, "target_modules": ["conv1", "conv2"]}),
    "MiSS": ("llama", {"form": "Miss", "r": 4, "target_modules": MLP}),
    "MiSS by a rank that does not divide": ("llama", {"form": "Miss", "r": 5, "target_modules": MLP}),
    "MiSS repeated": ("llama", {"form": "Miss", "r": 4, "mini_r": 8, "target_modules": MLP, "init_weights": "mini"}),
    "MiSS on blocks": ("llama", {"form": "Miss", "r": 8, "target_modules": MLP, "init_weights": "bat"}),
    "AdaLoRA": ("llama", {"form": "AdaLora", "init_r": 4, "lora_alpha": 6, "target_modules": MLP, "total_step": 9}),
    "KaSA": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": MLP, "kasa_config": {"beta": 1e-3, "gamma": 2e-3}}),
    "BEFT": ("llama", {"form": "Beft", "target_modules": MLP}),
    "BEFT of a classifier": ("bert", {"form": "Beft", "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "SHiRA": ("llama", {"form": "Shira", "r": 2, "target_modules": MLP, "random_seed": 5}),
    "Super-Tuning": ("llama", {"form": "Supertuning", "sparsity": 0.95, "target_modules": MLP}),
    "Super-Tuning of small entries with a pair": (
        "llama",
        {"form": "Supertuning", "sparsity": 0.97, "select_top": False, "r": 3, "lora_alpha": 4, "target_modules": Q},
    ),
    "layer norms": ("llama", {"form": "LNTuning", "target_modules": ["input_layernorm", "norm"]}),
    "layer norms of a classifier": ("bert", {"form": "LNTuning", "target_modules": ["LayerNorm"]}),
    "tokens": ("llama", {"form": "TrainableTokens", "token_indices": [10, 59], "target_modules": ["embed_tokens"]}),
    "tokens beside LoRA": ("llama", {"r": 2, "target_modules": Q, "trainable_token_indices": [10, 59]}),
    "tokens by table": (
        "llama",
        {"r": 2, "target_modules": Q, "trainable_token_indices": {"embed_tokens": [10, 59], "lm_head": [4]}},
    ),
    "a saved head": ("llama", {"form": "LoHa", "r": 2, "target_modules": Q, "modules_to_save": ["lm_head"]}),
    "a classifier": ("bert", {"form": "Vera", "r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize("case", READ)
def test_reads_what_peft_wrote(case, peft_directory):
    kind, config = READ[case]
    directory, wanted, _ = peft_directory(kind, **config)
    here = make(kind)
    base = run(here.model, here.batch)
    adapter = veneer.load(here.model, directory)
    assert (wanted - base).abs().max() > 5e-3
    torch.testing.assert_close(run(here.model, here.batch), wanted, rtol=1e-5, atol=1e-5)
    with adapter.disabled():
        assert torch.equal(run(here.model, here.batch), base)


WRITE = {
    "VeRA": ("llama", "vera(rank=4)", "linear", "VERA"),
    "VeRA by a key": ("llama", "vera(rank=4, key=5)", "attention", "VERA"),
    "VeRA on fused rows, which differ": ("gpt2", "vera(rank=4)", ["q", "v"], "LORA"),
    "RandLoRA": ("llama", "randlora(rank=8, alpha=16)", "linear", "RANDLORA"),
    "LoHa": ("llama", "loha(rank=3, alpha=4)", "linear", "LOHA"),
    "LoHa on convolutions": ("conv", "loha(rank=2)", "all", "LOHA"),
    "LoKr": ("llama", "lokr(rank=2, alpha=4)", "linear", "LOKR"),
    "LoKr decomposed twice": ("llama", "lokr(rank=1, decompose_both=True, decompose_factor=4)", "linear", "LOKR"),
    "LoKr on convolutions": ("conv", "lokr(rank=2)", ["conv1", "conv2", "out"], "LOKR"),
    "IA3": ("llama", "ia3", ["k", "v", "down"], "IA3"),
    "IA3 on all layers of a kind of input": ("llama", "ia3(feedforward=('layers.0.mlp.up_proj',))", ["up"], "IA3"),
    "IA3 on fused rows": ("gpt2", "ia3", ["k", "v", "down"], "IA3"),
    "IA3 on convolutions": ("conv", "ia3(feedforward=('conv2',))", ["conv1", "conv2", "out"], "IA3"),
    "OFT": ("llama", "oft(block_size=8)", "linear", "OFT"),
    "OFT by number, as a series": ("llama", "oft(blocks=4, block_size=0, cayley_neumann=True)", "linear", "OFT"),
    "BOFT": ("llama", "boft(block_size=8)", "linear", "BOFT"),
    "BOFT on a convolution": ("conv", "boft(block_size=3)", ["conv1"], "BOFT"),
    "Bone": ("llama", "bone(rank=4)", "linear", "MISS"),
    "Bone with a scale": ("llama", "bone(rank=4, alpha=6)", "linear", "MISS"),
    "Bone on Conv1D, which PEFT's has not": ("gpt2", "bone(rank=4)", "linear", "LORA"),
    "MiSS repeated": ("llama", "miss-mini(rank=4, columns=8)", "linear", "MISS"),
    "BAT": ("llama", "bat(rank=8)", "linear", "MISS"),
    "KaSA": ("llama", "kasa(rank=3)", "linear", "LORA"),
    "full": ("llama", "full", ["v", "up"], "LN_TUNING"),
    "full with norms": ("bert", "full(norms=True)", ["value"], "LN_TUNING"),
    "biases": ("bert", "bitfit", "attention", "BEFT"),
    "biases that were none": ("llama", "bitfit", "attention", "LORA"),
    "biases of Conv1D": ("gpt2", "bitfit", "attention", "LN_TUNING"),
    "sparse entries": ("llama", "composable-sft(select='random', proportion=0.05)", "linear", "SUPERTUNING"),
    "sparse entries beside a pair": ("llama", "sltrain(rank=3, alpha=4, density=0.03)", "linear", "SUPERTUNING"),
    "a classifier": ("bert", "loha(rank=2)", "attention", "LOHA"),
}


@pytest.mark.parametrize("case", WRITE)
def test_peft_gives_our_outputs(case, tmp_path):
    kind, recipe, sites, type_ = WRITE[case]
    here = make(kind)
    adapter = veneer.attach(here.model, recipe, sites=sites)
    shake(here.model, 1.0 if kind == "bert" else 0.3)
    wanted = run(here.model, here.batch)
    adapter.export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == type_
    assert (wanted - run(make(kind).model, here.batch)).abs().max() > 5e-3
    torch.testing.assert_close(run(loaded(tmp_path / "out", kind), here.batch), wanted, rtol=1e-5, atol=1e-5)
    again = make(kind)
    veneer.load(again.model, tmp_path / "out")
    torch.testing.assert_close(run(again.model, here.batch), wanted, rtol=1e-5, atol=1e-5)


PROMPTED = {
    "a prompt": ("llama", "PromptTuning", "prompt(length=3)"),
    "a prompt of a classifier": ("bert", "PromptTuning", "prompt(length=3, pooled='prompt')"),
    "what P-tuning left": ("llama", "PromptEncoder", None),
    "what CPT left": ("llama", "CPT", None),
    "a cartridge": ("llama", "Cartridge", None),
    "a prefix": ("llama", "PrefixTuning", "prefix(length=3)"),
    "a prefix of GPT-2": ("gpt2", "PrefixTuning", "prefix(length=3)"),
    "a projected prefix": ("llama", "PrefixTuning", "prefix(length=3, projection=True, hidden=5)"),
}


@pytest.mark.parametrize("case", PROMPTED)
def test_prompts_and_prefixes_go_both_ways(case, tmp_path, peft_directory):
    kind, form, recipe = PROMPTED[case]
    options = {"encoder_hidden_size": 8} if form == "PromptEncoder" else {}
    options |= (
        {"cpt_token_ids": [5, 7, 9], "cpt_mask": [1] * 3, "cpt_tokens_type_mask": [1, 2, 3]} if form == "CPT" else {}
    )
    options |= {"opt_projection_epsilon": 9.0, "opt_projection_format_epsilon": 9.0} if form == "CPT" else {}
    options |= {"prefix_projection": True, "encoder_hidden_size": 5} if "projected" in case else {}
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    options |= {} if form == "CPT" else {"num_virtual_tokens": 3}
    directory, wanted, _ = peft_directory(kind, form=form, task_type=task, **options)
    here = make(kind)
    base = run(here.model, here.batch)
    adapter = veneer.load(here.model, directory)
    length = base.shape[1] if kind != "bert" else None
    wanted = wanted if length is None else wanted[:, -length:]
    assert (wanted - base).abs().max() > 5e-3
    torch.testing.assert_close(run(here.model, here.batch), wanted, rtol=1e-5, atol=1e-5)
    adapter.detach()
    if recipe is None:
        return
    adapter = veneer.attach(here.model, recipe)
    shake(here.model)
    adapter.export(tmp_path / "out")
    found, wanted = run(loaded(tmp_path / "out", kind), here.batch), run(here.model, here.batch)
    torch.testing.assert_close(found if length is None else found[:, -length:], wanted, rtol=1e-5, atol=1e-5)


def test_a_projection_that_the_key_does_not_give_is_refused(tmp_path, peft_directory):
    directory, _, _ = peft_directory("llama", form="Vera", r=4, target_modules=Q)
    content = load_file(directory / "adapter_model.safetensors")
    content["base_model.vera_A"][0, 0] += 1e-3
    save_file(content, directory / "adapter_model.safetensors")
    here = make("llama")
    with pytest.raises(UserError, match="vera_A is not what projection_prng_key"):
        veneer.load(here.model, directory)
    assert not veneer.adapters(here.model)


def test_pruned_ranks_of_adalora_are_read_from_its_masks(tmp_path):
    directory, _, _ = saved(tmp_path, "llama", form="AdaLora", init_r=4, target_modules=Q, total_step=9)
    config = json.loads((directory / "adapter_config.json").read_text())
    kept = {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True, False]}
    content = load_file(directory / "adapter_model.safetensors")
    at = "base_model.model.model.layers.0.self_attn.q_proj."
    content |= {at + n: content[at + n][[0, 2]].contiguous() for n in ("lora_A", "lora_E")}
    content[at + "lora_B"] = content[at + "lora_B"][:, [0, 2]].contiguous()
    gone = "base_model.model.model.layers.1.self_attn.v_proj."
    content |= {gone + n: content[gone + n][:0].contiguous() for n in ("lora_A", "lora_E")}
    content[gone + "lora_B"] = content[gone + "lora_B"][:, :0].contiguous()
    kept["model.layers.1.self_attn.v_proj.lora_E"] = [False] * 4
    save_file(content, directory / "adapter_model.safetensors")
    every = {f"model.layers.{i}.self_attn.{n}.lora_E": [True] * 4 for i in (0, 1) for n in Q} | kept
    (directory / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": every}))
    here = make("llama")
    veneer.load(here.model, directory)
    wanted = run(loaded(directory, "llama"), here.batch)
    torch.testing.assert_close(run(here.model, here.batch), wanted, rtol=1e-5, atol=1e-5)


def test_what_was_trained_with_other_regularisers_says_so(peft_directory):
    directory, wanted, _ = peft_directory("llama", form="LoHa", r=2, target_modules=Q, rank_dropout=0.1)
    here = make("llama")
    with pytest.warns(UserWarning, match="rank_dropout=0.1 is not known to loha"):
        veneer.load(here.model, directory)
    torch.testing.assert_close(run(here.model, here.batch), wanted, rtol=1e-5, atol=1e-5)


def test_entries_that_do_not_fit_are_refused_by_name(tmp_path):
    directory, _, _ = saved(tmp_path, "llama", form="Supertuning", sparsity=0.95, target_modules=Q)
    content = load_file(directory / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.q_proj.supertuning_indices"
    for changed, words in (
        (
            {k: v for k, v in content.items() if k != key},
            "no supertuning_indices for .*layers.1.*save_precomputed_indices",
        ),
        (content | {key: content[key] + 32 * 32}, "has no entry"),
        (content | {key: content[key][1:].clone()}, "do not go together"),
        ({k: v for k, v in content.items() if "layers.1.self_attn.q" not in k}, "disagree about model.layers.1"),
    ):
        save_file(changed, directory / "adapter_model.safetensors")
        here = make("llama")
        with pytest.raises(UserError, match=words):
            veneer.load(here.model, directory)
        assert not veneer.adapters(here.model)


def test_layers_with_other_counts_of_entries_share_pefts_one_sparsity(tmp_path):
    here = make("llama")
    adapter = veneer.attach(here.model, "composable-sft(select='random', entries=300)", sites="attention")
    shake(here.model)
    wanted = run(here.model, here.batch)
    counts = {p: len(d.v) for p, d in adapter.deltas.items()}
    assert len(set(counts.values())) > 1
    adapter.export(tmp_path / "out")
    content = load_file(tmp_path / "out" / "adapter_model.safetensors")
    written = {k: t for k, t in content.items() if k.endswith("values")}
    assert sum(int((t != 0).sum()) for t in written.values()) == 300
    torch.testing.assert_close(run(loaded(tmp_path / "out", "llama"), here.batch), wanted, rtol=1e-5, atol=1e-5)
