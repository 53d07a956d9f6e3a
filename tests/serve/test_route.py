"""A file laid out as one before it gives the very numbers that reading it in full gives, and is refused as it is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import trained

from veneer.errors import UserError
from veneer.serve.route import Route, Scratch, finite
from veneer.serve.source import Reader

SIZE = 256


@pytest.fixture
def routed(monkeypatch):
    """The folders that went by a route."""
    seen, pack = [], Route.pack

    def noted(self, payload, size, dtype, path, scratch):
        seen.append(path.parent.name)
        return pack(self, payload, size, dtype, path, scratch)

    monkeypatch.setattr(Route, "pack", noted)
    return seen


def written(base, folder, format, seed, recipe="lora"):
    _, adapter = trained(base, recipe, 4, "linear", seed)
    if format == "ours":
        adapter.save(folder)
    else:
        adapter.export(folder, format="peft")


def numbers(reader, folder):
    packed = reader.packed(folder, SIZE, torch.bfloat16)
    found = torch.stack(list(packed.layers)).clone()
    packed.done()
    return found


@pytest.mark.parametrize("format", ["ours", "peft"])
@pytest.mark.parametrize("recipe", ["lora", "rslora"])
def test_a_route_gives_what_reading_in_full_gives(base, trunk, tmp_path, routed, format, recipe):
    reader = Reader(trunk)
    for seed in (1, 2, 3):
        written(base, tmp_path / str(seed), format, seed, recipe)
        assert torch.equal(numbers(reader, tmp_path / str(seed)), numbers(Reader(trunk), tmp_path / str(seed)))
    assert routed == ["2", "3"]


def test_another_scale_is_another_route(base, trunk, tmp_path, routed):
    reader = Reader(trunk)
    for seed, alpha in ((1, 4), (2, 8), (3, 8)):
        written(base, tmp_path / str(seed), "peft", 7)
        about = tmp_path / str(seed) / "adapter_config.json"
        about.write_text(json.dumps(json.loads(about.read_text()) | {"lora_alpha": alpha, "alpha_pattern": {}}))
    one, two, again = (numbers(reader, tmp_path / str(seed)) for seed in (1, 2, 3))
    assert routed == ["3"] and torch.equal(two, again) and not torch.equal(one, two)


@pytest.mark.parametrize("recipe", ["dora", "lora+pissa"])
def test_what_is_no_single_pair_is_read_in_full(base, trunk, tmp_path, routed, recipe):
    reader = Reader(trunk)
    for seed in (1, 2):
        written(base, tmp_path / str(seed), "ours", seed, recipe)
        numbers(reader, tmp_path / str(seed))
    assert routed == []


def test_numbers_that_are_not_finite_are_refused_by_a_route_too(base, trunk, tmp_path, routed):
    reader = Reader(trunk)
    for name in ("good", "bad"):
        written(base, tmp_path / name, "peft", 1)
    file = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    numbers(reader, tmp_path / "good")
    with pytest.raises(UserError, match="not finite"):
        reader.packed(tmp_path / "bad", SIZE, torch.float32)
    assert routed == ["bad"]


def test_a_file_cut_short_is_refused(base, trunk, tmp_path, routed):
    reader = Reader(trunk)
    for name in ("good", "bad"):
        written(base, tmp_path / name, "peft", 1)
    file = tmp_path / "bad" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    numbers(reader, tmp_path / "good")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        reader.packed(tmp_path / "bad", SIZE, torch.float32)
    assert routed == []


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_number_anywhere_is_found(bad, dtype):
    x = torch.randn(1003).to(dtype)
    assert finite(x)
    for at in (0, 500, 1002):
        y = x.clone()
        y[at] = float(bad)
        assert not finite(y)


def test_scratch_is_used_again_and_bounded(monkeypatch):
    monkeypatch.setattr("veneer.serve.route.KEPT", 100)
    scratch = Scratch()
    first = scratch.take(60)
    scratch.give(first)
    assert scratch.take(50) is first and scratch.take(50) is not first
    small = scratch.take(45)
    for memory in (first, small):
        scratch.give(memory)
    assert scratch.take(40) is small and scratch.take(60) is not first
