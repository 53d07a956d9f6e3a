"""Our own directory: saved whole, loaded bit for bit, on the base it was made on."""

import json
import os

import pytest
import torch
from by_peft import run, shake
from models import make

import veneer
from veneer.errors import UserError

RECIPES = {
    "llama": ["lora(rank=4, alpha=6)", "dora(rank=4)+pissa", "lora(rank=4)+sora", "lora-bias(rank=4)"],
    "gpt2": ["rslora(rank=4)+pissa"],
    "bert": ["lora(rank=4)"],
    "conv": ["dora(rank=4)"],
}
SITES = {"conv": "conv"}


def attached(kind="llama", recipe="lora(rank=4)", **options):
    case = make(kind)
    adapter = veneer.attach(case.model, recipe, sites=SITES.get(kind, "linear"), **options)
    shake(case.model)
    return case, adapter


@pytest.mark.parametrize(("kind", "recipe"), [(k, r) for k, rs in RECIPES.items() for r in rs])
def test_what_was_saved_loads_to_the_same_outputs_bit_for_bit(kind, recipe, tmp_path):
    case, adapter = attached(kind, recipe)
    adapter.save(tmp_path / "a")
    fresh = make(kind)
    again = veneer.load(fresh.model, tmp_path / "a")
    assert torch.equal(run(fresh.model, case.batch), run(case.model, case.batch))
    assert str(again.recipe) == str(adapter.recipe)
    assert all(torch.equal(again.state()[k], v) for k, v in adapter.state().items())
    again.save(tmp_path / "b")
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter.safetensors"
    ).read_bytes()


def test_trained_base_tensors_are_saved_by_name(tmp_path):
    case, adapter = attached(train=["model.norm.weight"])
    adapter.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "recipe.json").read_text())["train"] == ["model.norm.weight"]
    fresh = make("llama")
    veneer.load(fresh.model, tmp_path / "a")
    assert torch.equal(run(fresh.model, case.batch), run(case.model, case.batch))


@pytest.mark.parametrize("recipe", ["full", "bitfit", "lora"])
def test_an_adapter_on_all_layers_loads_where_the_head_is_a_new_one(recipe, tmp_path):
    case, fresh = make("vit"), make("vit")
    adapter = veneer.attach(case.model, recipe, sites="all")
    shake(case.model)
    adapter.save(tmp_path / "a")
    with torch.no_grad():
        for p in fresh.model.classifier.parameters():
            p.normal_()
    veneer.load(fresh.model, tmp_path / "a")
    assert torch.equal(fresh.run(), case.run())


def test_a_classifiers_adapter_on_another_kind_of_model_is_told_its_task(tmp_path):
    attached("vit")[1].save(tmp_path / "a")
    with pytest.raises(UserError, match=r"classifier.weight, which this model lacks: .* 'image-classification'"):
        veneer.load(make("llama").model, tmp_path / "a")


def test_what_trains_whole_already_is_no_site():
    with pytest.raises(UserError, match=r"trains as it is already: .*; select other layers"):
        veneer.attach(make("vit").model, "bitfit", sites="classifier")


def test_an_adapter_loads_under_another_name_beside_itself(tmp_path):
    case, adapter = attached()
    adapter.save(tmp_path / "a")
    veneer.load(case.model, tmp_path / "a", name="second")
    with adapter.disabled():
        first = run(case.model, case.batch)
    fresh = make("llama")
    veneer.load(fresh.model, tmp_path / "a")
    assert torch.equal(first, run(fresh.model, case.batch))


def test_another_base_is_an_error_unless_forced(tmp_path):
    _, adapter = attached()
    adapter.save(tmp_path / "a")
    other = make("llama")
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(UserError, match=r"another base.*force=True"):
        veneer.load(other.model, tmp_path / "a")
    veneer.load(other.model, tmp_path / "a", force=True)


def test_saving_again_in_place_replaces_the_adapter_and_nothing_else(tmp_path):
    case, adapter = attached()
    adapter.save(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    shake(case.model)
    adapter.save(tmp_path / "a")
    fresh = make("llama")
    veneer.load(fresh.model, tmp_path / "a")
    assert torch.equal(run(fresh.model, case.batch), run(case.model, case.batch))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.safetensors", "notes.txt", "recipe.json"]


@pytest.mark.parametrize("died_at", [0, 1])
def test_a_save_killed_between_its_two_files_leaves_the_old_adapter(died_at, tmp_path, monkeypatch):
    case, adapter = attached()
    adapter.save(tmp_path / "a")
    wanted = run(case.model, case.batch)
    shake(case.model)
    replace, done = os.replace, []

    def die(a, b):
        if len(done) == died_at:
            raise KeyboardInterrupt
        done.append(b)
        replace(a, b)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        adapter.save(tmp_path / "a")
    monkeypatch.undo()
    fresh = make("llama")
    veneer.load(fresh.model, tmp_path / "a")
    assert torch.equal(run(fresh.model, case.batch), wanted)


def test_a_save_that_fails_leaves_the_old_adapter(tmp_path, monkeypatch):
    case, adapter = attached()
    adapter.save(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    shake(case.model)
    monkeypatch.setattr("veneer.io.native.write_json", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match=r"No space left.*untouched"):
        adapter.save(tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
