"""Adapters for vLLM: the rules of its reader, and that they compute what the adapter computes.

Oracles: the peft package on the written directory; the folded change; alpha/r for every layer, as SGLang reads it.
"""

import copy
import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import MODELS, trained

import veneer
from veneer.errors import UserError
from veneer.io.vllm import most, write

KNOWN = {"r", "lora_alpha", "target_modules", "bias", "modules_to_save"}
BOOKKEEPING = {"peft_type", "base_model_name_or_path", "task_type", "fan_in_fan_out"}
PAIR = re.compile(r"base_model\.model\.(.+)\.(?:lora_(A|B)\.weight|lora_embedding_(A|B))")
TOKENS = torch.randint(2, 89, (2, 9), generator=torch.Generator().manual_seed(0))


def obeyed(folder, model):
    """(config, pairs by layer) of a directory that keeps every rule, each asserted."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert {"r", "lora_alpha", "target_modules"} <= set(config) <= KNOWN | BOOKKEEPING
    assert config["bias"] == "none" and config["r"] == config["lora_alpha"] <= 512
    assert set(config.get("modules_to_save", ())) <= {"classifier", "score"}
    pairs = {}
    for key, tensor in tensors.items():
        if key.rpartition(".")[0].rpartition(".")[2] in config.get("modules_to_save", ()):
            continue
        path, which, embedded = PAIR.fullmatch(key).groups()
        pairs.setdefault(path, {})[which or embedded] = tensor
        if embedded == "A":
            assert tensor.shape[1] == model.get_submodule(path).num_embeddings
    assert all(set(p) == {"A", "B"} and len(p["A"]) == p["B"].shape[1] == config["r"] for p in pairs.values())
    return config, pairs


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("recipe", "rank", "options"),
    [
        ("lora(alpha=3)", 4, {}),
        ("rslora", 5, {}),
        ("lora+pissa", 4, {}),
        ("dora", 4, {"tolerance": 1e-4}),
        ("lokr", 2, {"tolerance": 1e-4}),
        ("lora", 4, {"rank": 3}),
    ],
)
def test_what_is_written_keeps_the_rules_and_computes_the_same(kind, recipe, rank, options, tmp_path):
    base = MODELS[kind]()
    own, adapter = trained(base, recipe, rank, "attention")
    found = write(adapter, tmp_path / "a", **options)
    config, pairs = obeyed(tmp_path / "a", base)
    assert set(pairs) == set(found.ranks) and config["r"] == max(found.ranks.values())

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a")).eval()
    lost = found.logits.relative
    gap = (logits(theirs) - logits(own)).norm() / logits(own).norm()
    assert gap < 2 * lost + 1e-5 and (options.get("rank") or lost < 1e-3)

    before = {n: p.clone() for n, p in base.named_parameters()}
    adapter.export(tmp_path / "m", "merged")
    merged = dict(type(base).from_pretrained(tmp_path / "m").named_parameters())
    path, pair = next(iter(pairs.items()))
    change = (merged[f"{path}.weight"] - before[f"{path}.weight"]).detach()
    change = change.T if kind == "gpt2" else change
    product = config["lora_alpha"] / config["r"] * pair["B"] @ pair["A"]
    assert (product - change).norm() <= (found.error * 3 + 1e-5) * change.norm()


def test_ranks_that_differ_are_filled_up_and_need_no_patterns(tmp_path):
    base = MODELS["llama"]()
    _, adapter = trained(base, "dora", 4, "linear")
    found = write(adapter, tmp_path / "a", tolerance=0.3)
    _, pairs = obeyed(tmp_path / "a", base)
    assert len(set(found.ranks.values())) > 1
    for path, rank in found.ranks.items():
        assert not pairs[path]["A"][rank:].any() and not pairs[path]["B"][:, rank:].any()


def test_embeddings_go_along(tmp_path):
    base = MODELS["llama"]()
    own, adapter = trained(base, "lora", 4, ["model.embed_tokens", "model.layers.0.self_attn.q_proj"])
    write(adapter, tmp_path / "a")
    assert set(obeyed(tmp_path / "a", base)[1]) == {"model.embed_tokens", "model.layers.0.self_attn.q_proj"}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(own), rtol=1e-4, atol=1e-4)


def test_a_classification_head_goes_along_by_its_name(tmp_path):
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(MODELS["llama"]().config).eval()
    adapter = veneer.attach(model, "lora", rank=4, sites="attention", train=["score.weight"])
    write(adapter, tmp_path / "a", batches=[])
    config, _ = obeyed(tmp_path / "a", model)
    assert config["modules_to_save"] == ["score"]
    assert torch.equal(load_file(tmp_path / "a" / "adapter_model.safetensors")["base_model.model.score.weight"],
                       model.score.weight.detach())  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "recipe", "options", "more", "said"),
    [
        ("llama", "dora", {}, {}, "give rank= or tolerance="),
        ("llama", "lora", {}, {"train": ["model.norm.weight"]}, "the whole tensor model.norm.weight"),
        ("gpt2", "bitfit", {}, {}, "changes no layer's weight"),
        ("gpt2", "dora", {"rank": 4}, {"train": ["lm_head.weight"]}, "whole tensor"),
    ],
)
def test_what_vllm_refuses_is_refused_here_and_leaves_nothing(kind, recipe, options, more, said, tmp_path):
    model = MODELS[kind]()
    adapter = veneer.attach(model, recipe, rank=4 if recipe != "bitfit" else None, **more)
    with pytest.raises(UserError, match=said):
        write(adapter, tmp_path / "a", **options)
    assert not list(tmp_path.iterdir())


def test_the_flag_is_the_least_that_holds_the_rank():
    assert [most(r) for r in (1, 2, 8, 17, 200, 512)] == [1, 8, 8, 32, 256, 512]


def test_the_command_writes_it_and_says_how_to_serve_it(tmp_path, capsys, monkeypatch):
    from veneer.cli import main

    base = MODELS["llama"]()
    base.save_pretrained(tmp_path / "base")
    trained(base, "dora", 4, "attention")[1].save(tmp_path / "mine")
    given = ["export", "--model", tmp_path / "base", "--adapter", tmp_path / "mine", "--for", "vllm", "--out"]

    def said(*options):
        with pytest.raises(SystemExit) as left:
            main.run([str(o) for o in (*given, *options)])
        return left.value.code, capsys.readouterr()

    code, out = said(tmp_path / "theirs", "--tolerance", "0.01")
    rank = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["r"]
    assert code == 0 and f"--max-lora-rank {most(rank)} --lora-modules theirs=" in out.out
    own = veneer.load_model
    monkeypatch.setattr(veneer, "load_model", lambda name, **more: own(tmp_path / "base", **more))
    given[2] = "a-name-of-ours"
    code, out = said(tmp_path / "again", "--tolerance", "0.01")
    assert code == 0 and f"vllm serve {tmp_path / 'base'} --enable-lora" in out.out
    code, out = said(tmp_path / "more", "--format", "gguf")
    assert code == 2 and "--format gguf was asked for" in out.err
