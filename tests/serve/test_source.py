"""Reading adapters: ours and PEFT's, plain forms exactly, others lowered with the error stated, wrong ones refused."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import trained

from veneer.errors import UserError
from veneer.serve.cache import Batch, Piece
from veneer.serve.layout import Layout
from veneer.serve.product import Plan, Run
from veneer.serve.source import Reader
from veneer.serve.trunk import Trunk


def logits(trunk, found, tokens):
    pool = trunk.pool(1500, 4)
    layout = Layout.of(found.pieces, trunk.groups)
    pages = pool.alloc(layout.pages(pool.size))
    for layer, numbers in zip(pool.data, layout.pack(found.pieces, pool.size, trunk.dtype)):
        layer[pages] = numbers
    mix = ((layout.tables(pages, pool.size), 1.0),)
    batch = Batch(pool, [], [Piece(tokens, 0, pool.alloc(len(tokens) // 4 + 1))])
    return trunk.logits(batch, Plan(pool, trunk.groups.chunk, [], [Run(0, len(tokens), mix)]), pool)


TOKENS = [5, 17, 40, 3, 66, 23, 9]


@pytest.mark.parametrize(
    ("recipe", "rank", "sites"),
    [
        ("lora", 4, "linear"),
        ("lora+pissa", 4, "linear"),
        ("dora+pissa", 4, "attention"),
        ("dora", 8, "linear"),
        ("lokr", 4, "linear"),
        ("loha", 4, "linear"),
        ("vera", 8, "attention"),
        ("lora-xs", 4, "linear"),
        ("lora-bias", 4, "linear"),
        ("ia3", None, "linear"),
        ("oft", None, "attention"),
        ("bitfit", None, "linear"),
        ("full", None, "attention"),
    ],
)
def test_every_foldable_form_is_served_as_it_runs(base, trunk, tmp_path, recipe, rank, sites):
    own, adapter = trained(base, recipe, rank, sites)
    adapter.save(tmp_path / "a")
    found = Reader(trunk).read(tmp_path / "a")
    with torch.no_grad():
        want = own(torch.tensor([TOKENS])).logits[0]
    assert found.error == 0
    torch.testing.assert_close(logits(trunk, found, TOKENS), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("recipe", ["lora", "rslora", "dora"])
def test_a_peft_folder_is_read_as_ours_is(base, trunk, tmp_path, recipe):
    _, adapter = trained(base, recipe, 4, "linear")
    adapter.save(tmp_path / "ours")
    adapter.export(tmp_path / "peft", format="peft")
    ours, theirs = (Reader(trunk).read(tmp_path / name) for name in ("ours", "peft"))
    assert ours.form == theirs.form == recipe
    torch.testing.assert_close(logits(trunk, ours, TOKENS), logits(trunk, theirs, TOKENS), rtol=1e-5, atol=1e-5)


def test_a_form_cut_to_a_rank_states_its_error(base, trunk, tmp_path):
    own, adapter = trained(base, "full", None, "attention")
    adapter.save(tmp_path / "a")
    found = Reader(trunk, rank=8, tolerance=1.0).read(tmp_path / "a")
    lost = whole = 0.0
    other = dict(base.named_parameters())
    from veneer.api import load

    folded = load(copy.deepcopy(base), tmp_path / "a").bake()
    for name, p in folded.named_parameters():
        if (change := (p - other[name]).detach()).any():
            s = torch.linalg.svdvals(change)
            lost, whole = lost + float(s[8:].square().sum()), whole + float(s.square().sum())
    assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    with pytest.raises(UserError, match="no low-rank change"):
        Reader(trunk, rank=1, tolerance=0.1).read(tmp_path / "a")
    assert own is not None


def spoiled(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def rename(tensors):
    for key in list(tensors):
        tensors[key.replace("layers.0", "layers.7")] = tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({k: v[:, :5].contiguous() for k, v in t.items() if "lora_A" in k}), "another model"),
        (lambda t: t.update({k: v * float("nan") for k, v in t.items()}), "not finite"),
        (lambda t: [t.pop(k) for k in list(t) if "lora_B" in k], "no lora_B"),
        (rename, "layers.7"),
    ],
)
def test_a_damaged_folder_is_one_sentence(base, trunk, tmp_path, change, said):
    _, adapter = trained(base, "lora", 4, "linear")
    adapter.export(tmp_path / "a", format="peft")
    spoiled(tmp_path / "a", change)
    with pytest.raises(UserError, match=said):
        Reader(trunk).read(tmp_path / "a")


def test_an_adapter_of_another_base_is_refused(base, trunk, tmp_path):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1.0)
    _, adapter = trained(other, "lora", 4, "linear")
    adapter.save(tmp_path / "a")
    with pytest.raises(UserError, match="another base"):
        Reader(trunk).read(tmp_path / "a")


def test_pickles_are_refused(trunk, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]})
    )
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        Reader(trunk).read(tmp_path)


def test_another_architecture_is_refused():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match="gpt_neox"):
        Trunk(GPTNeoXForCausalLM(config))
