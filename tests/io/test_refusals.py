"""What cannot be loaded is refused in one sentence that names it, and the model stays as it was."""

import json
import shutil

import pytest
import torch
from by_peft import run, saved
from models import make
from safetensors.torch import load_file, save_file

import veneer
from veneer.errors import UserError

TARGETS = ["q_proj", "embed_tokens"]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One good directory of each format, to be damaged in a copy."""
    folder = tmp_path_factory.mktemp("made")
    saved(folder / "peft", "llama", r=4, target_modules=TARGETS, modules_to_save=["lm_head"])
    case = make("llama")
    veneer.attach(case.model, "lora(rank=4)", train=["model.norm.weight"]).save(folder / "ours")
    return {"peft": folder / "peft" / "adapter", "ours": folder / "ours"}


def config(**changes):
    """Change fields of adapter_config.json; None as a value of ``drop`` removes."""

    def damage(d):
        path = d / "adapter_config.json"
        raw = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in raw.items() if v != "drop"}))

    return damage


def recipe(**changes):
    def damage(d):
        path = d / "recipe.json"
        raw = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in raw.items() if v != "drop"}))

    return damage


def tensors(change, name="adapter_model.safetensors"):
    def damage(d):
        content = load_file(d / name)
        change(content)
        save_file(content, d / name)

    return damage


def pickled(d):
    torch.save(load_file(d / "adapter_model.safetensors"), d / "adapter_model.bin")
    (d / "adapter_model.safetensors").unlink()


def cut(name, size=-10):
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[:size])


def text(name, content):
    return lambda d: (d / name).write_text(content)


def flipped(d):
    content = bytearray((d / "adapter.safetensors").read_bytes())
    content[-3] ^= 1
    (d / "adapter.safetensors").write_bytes(content)


def renamed(old, new):
    return tensors(lambda t: t.update({new: t.pop(old)}))


def trained_rows(indices):
    def damage(d):
        config(trainable_token_indices=indices)(d)
        rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 32)}
        tensors(lambda t: t.update(rows))(d)

    return damage


def emptied(d):
    for p in d.iterdir():
        p.unlink()


def nested(d):
    shutil.copytree(d, d.parent / "inner")
    emptied(d)
    shutil.move(d.parent / "inner", d / "inner")


PEFT = {
    "truncated tensors": (cut("adapter_model.safetensors"), "adapter_model.safetensors is cut short"),
    "a pickle": (pickled, r"adapter_model\.bin beside it is a pickle"),
    "no tensors": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "a config that is not JSON": (text("adapter_config.json", "{r: 4}"), "adapter_config.json, line 1"),
    "a config that is a list": (text("adapter_config.json", "[]"), "holds a list"),
    "no rank": (config(r="drop"), "has no field 'r'"),
    "rank as text": (config(r="four"), r"r is text \('four'\); a whole number"),
    "rank 0": (config(r=0), "r is 0; a number above 0"),
    "another rank": (config(r=8), r"lora_.* of .* has shape \(4, .*\).* need \(8, .*\)"),
    "alpha as text": (config(lora_alpha="big"), "lora_alpha is text"),
    "targets as a number": (config(target_modules=3), "target_modules is a whole number"),
    "no targets": (config(target_modules="drop"), "has no field 'target_modules'"),
    "a target that is a number": (config(target_modules=["q_proj", 3]), "target_modules is a whole number"),
    "a layer that is text": (config(layers_to_transform=["0"]), "layers_to_transform is text"),
    "a saved module that is none": (config(modules_to_save=["(lm_head"]), "is not a regular expression"),
    "no expression": (config(target_modules="(q_proj"), "is not a regular expression"),
    "a pattern that is none": (config(rank_pattern={"(q": 4}), "is not a regular expression"),
    "a pattern of text": (config(rank_pattern={"q_proj": "4"}), "q_proj is text"),
    "an unknown type": (config(peft_type="LOAR"), "peft_type 'LOAR' cannot be read"),
    "no type": (config(peft_type="drop"), "has no field 'peft_type'"),
    "a start not known": (config(init_lora_weights="pisa"), "init_lora_weights is 'pisa'.*did you mean"),
    "a lost start": (config(init_lora_weights="lora_ga"), "started by lora_ga.*initial="),
    "a start on embeddings": (config(init_lora_weights="pissa"), "is for linear layers, and model.embed_tokens"),
    "aLoRA": (config(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens=.* is not supported"),
    "replicated layers": (config(layer_replication=[[0, 2]]), "layer_replication=.* is not supported"),
    "trained tokens without rows": (config(trainable_token_indices=[1]), "has no rows for trainable_token_indices"),
    "trained tokens as text": (config(trainable_token_indices=["a"]), "trainable_token_indices is text"),
    "rows beyond the vocabulary": (trained_rows([61]), r"token 61 is beyond .*resize_token_embeddings\(62\)"),
    "rows of other tokens": (
        trained_rows([1, 2, 3]),
        r"trained rows of model.embed_tokens.weight have shape \(1, 32\)",
    ),
    "expert parameters": (config(target_parameters=["experts.up"]), "target_parameters=.* is not supported"),
    "a field of the future": (config(use_magic=True), "use_magic=True is not supported"),
    "an unknown bias": (config(bias="some"), "bias is 'some'"),
    "DoRA without magnitudes": (config(use_dora=True), "has no lora_magnitude_vector for"),
    "a target without tensors": (config(target_modules=[*TARGETS, "v_proj"]), "no tensors for .*v_proj"),
    "tensors without a target": (config(target_modules=["embed_tokens"]), "q_proj, which target_modules .* does not"),
    "an excluded module with tensors": (config(exclude_modules=["q_proj"]), "does not select"),
    "a saved module not in the file": (config(modules_to_save=["lm_head", "norm"]), "has no .*norm.weight"),
    "a saved module not in the model": (config(modules_to_save=["score"]), "names score, none of which"),
    "a missing factor": (tensors(lambda t: t.pop(KEY)), "has no lora_A.weight for model.layers.0.self_attn.q_proj"),
    "a layer the model lacks": (renamed(KEY, KEY.replace("layers.0", "layers.7")), "match nothing .*layers.7"),
    "a tensor of no kind": (tensors(lambda t: t.update(odd=torch.zeros(2))), "match nothing .*: odd"),
    "a wrong shape": (tensors(lambda t: t.update({KEY: torch.zeros(4, 31)})), r"shape \(4, 31\).* need \(4, 32\)"),
    "another base": (
        tensors(lambda t: t["base_model.model.model.embed_tokens.base_layer.weight"].mul_(1.5)),
        "made on another base: its copy of model.embed_tokens.weight",
    ),
    "another vocabulary": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(70, 32)})),
        r"vocabulary differs; call model.resize_token_embeddings\(70\)",
    ),
    "a base tensor nobody asked for": (
        tensors(lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)})),
        "model.norm.weight, which modules_to_save",
    ),
    "adapters in folders": (nested, "holds adapters in its folders inner"),
    "an empty folder": (emptied, "holds no adapter .*it holds nothing"),
}
OURS = {
    "truncated tensors": (cut("adapter.safetensors"), "adapter.safetensors is cut short"),
    "a flipped bit": (flipped, "checksum differs"),
    "no tensors": (lambda d: (d / "adapter.safetensors").unlink(), "adapter.safetensors is missing"),
    "no recipe": (lambda d: (d / "recipe.json").unlink(), "holds no adapter"),
    "a truncated recipe": (cut("recipe.json", 100), "recipe.json, line"),
    "a mistyped field": (recipe(seed="zero"), "seed is text"),
    "a missing field": (recipe(sites="drop"), "has no field 'sites'"),
    "a format of the future": (recipe(format=9), "is of format 9"),
    "a method not known": (recipe(recipe="loar(rank=4)"), "no method 'loar'; did you mean"),
    "another base": (recipe(base="0" * 32), "another base.*force=True"),
    "a site the model lacks": (
        recipe(sites=["model.layers.0.self_attn.z_proj"]),
        "site 'model.layers.0.self_attn.z_proj' that this model lacks; did you mean",
    ),
}


@pytest.mark.parametrize(
    ("kind", "case"), [("peft", c) for c in PEFT] + [("ours", c) for c in OURS], ids=lambda v: v.replace(" ", "_")
)
def test_is_refused_in_one_sentence_and_nothing_is_lost(kind, case, made, tmp_path):
    damage, words = (PEFT if kind == "peft" else OURS)[case]
    directory = tmp_path / "d"
    shutil.copytree(made[kind], directory)
    damage(directory)
    before = {p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    here = make("llama")
    wanted = run(here.model, here.batch)
    with pytest.raises(UserError, match=f"(?s){words}") as told:
        veneer.load(here.model, directory)
    assert "\n" not in str(told.value) and len(str(told.value)) < 600
    assert not veneer.adapters(here.model) and torch.equal(run(here.model, here.batch), wanted)
    assert {p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_the_undamaged_directory_loads(kind, made):
    veneer.load(make("llama").model, made[kind])


def test_another_base_loads_when_forced(made, tmp_path):
    shutil.copytree(made["peft"], tmp_path / "d")
    PEFT["another base"][0](tmp_path / "d")
    veneer.load(make("llama").model, tmp_path / "d", force=True)


def test_a_head_trained_apart_from_the_embedding_it_is_tied_to_asks_for_untie(made):
    case = make("llama")
    case.model.lm_head.weight = case.model.model.embed_tokens.weight
    with pytest.raises(UserError, match=r"lm_head.weight.*veneer.untie\(model\)"):
        veneer.load(case.model, made["peft"])
    veneer.untie(case.model)
    veneer.load(case.model, made["peft"])


def test_a_name_that_no_module_has_is_said(made, tmp_path):
    shutil.copytree(made["peft"], tmp_path / "d")
    config(target_modules=[*TARGETS, "w_pack"])(tmp_path / "d")
    with pytest.warns(UserWarning, match="names w_pack, which this model lacks"):
        veneer.load(make("llama").model, tmp_path / "d")
