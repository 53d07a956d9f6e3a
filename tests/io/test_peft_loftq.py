"""LoftQ from and to PEFT, 1e-5. Oracle: peft's own start, whose CUDA device is the CPU here, on bitsandbytes' nf4."""

import inspect
import json

import by_peft
import models
import pytest
import torch
from by_peft import loaded, run, saved, shake
from safetensors.torch import load_file

import veneer
from veneer.bases.nf4 import quantise_layer
from veneer.core.site import find_sites
from veneer.errors import UserError

Q = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch):
    """PEFT's function as it is but for the device that it computes on."""
    pytest.importorskip("bitsandbytes")
    from peft.tuners.lora import layer
    from peft.utils import loftq_utils

    source = inspect.getsource(loftq_utils.loftq_init)
    assert source.count('"xpu" if is_xpu_available() else "cuda"') == 1
    space = vars(loftq_utils) | {}
    exec(source.replace('"xpu" if is_xpu_available() else "cuda"', '"cpu"'), space)
    monkeypatch.setattr(layer, "loftq_init", space["loftq_init"])
    monkeypatch.setattr(by_peft, "make", make)


def make(kind, dtype=torch.float32):
    """Rows of whole blocks of 64: on others bitsandbytes 0.50's dequantiser for the CPU mixes up the maxima."""
    torch.manual_seed(0)
    model = models.llama(hidden_size=64, intermediate_size=128).to(dtype).eval()
    return models.make(kind)._replace(model=model)


def started(folder, targets, rounds, **config):
    import peft

    loftq = peft.LoftQConfig(loftq_iter=rounds)
    config = {"r": 4, "lora_alpha": 6} | config
    return saved(folder, "llama", target_modules=targets, init_lora_weights="loftq", loftq_config=loftq, **config)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("targets", [Q, ALL])
def test_reads_what_peft_wrote(rounds, targets, tmp_path):
    directory, wanted, _ = started(tmp_path, targets, rounds, rank_pattern={"v_proj": 2})
    here = make("llama")
    adapter = veneer.load(here.model, directory)
    assert ("only" in str(adapter.recipe)) == (targets == Q)
    torch.testing.assert_close(run(here.model, here.batch), wanted, rtol=1e-5, atol=1e-5)
    adapter.save(tmp_path / "own")
    again = make("llama")
    veneer.load(again.model, tmp_path / "own")
    assert torch.equal(run(again.model, here.batch), run(here.model, here.batch))


@pytest.mark.parametrize("rounds", [1, 3])
def test_peft_gives_our_outputs(rounds, tmp_path):
    here = make("llama")
    recipe = f"lora(rank=4, alpha=6)+nf4(double_quant=False)+loftq(iterations={rounds}, exact=True)"
    adapter = veneer.attach(here.model, recipe)
    shake(here.model)
    wanted = run(here.model, here.batch)
    adapter.export(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["loftq_config"] == {"loftq_bits": 4, "loftq_iter": rounds}
    torch.testing.assert_close(run(loaded(tmp_path / "out", "llama"), here.batch), wanted, rtol=1e-5, atol=1e-5)
    again = make("llama")
    veneer.load(again.model, tmp_path / "out")
    torch.testing.assert_close(run(again.model, here.batch), wanted, rtol=1e-5, atol=1e-5)


def test_what_stands_beside_another_storage_is_plain_lora_for_it(tmp_path):
    """The default stores the scales in 8 bits: PEFT's model here has the layers as bitsandbytes stores them so."""
    import bitsandbytes as bnb
    from peft import PeftModel

    here, theirs = make("llama"), make("llama")
    adapter = veneer.attach(here.model, "lora(rank=4, alpha=6)+loftq")
    shake(here.model)
    with pytest.warns(UserWarning, match="give PEFT that base, not the dense one"):
        adapter.export(tmp_path / "out")
    for site in find_sites(theirs.model, "linear"):
        codes, state = bnb.functional.quantize_4bit(site.weight(), quant_type="nf4", compress_statistics=True)
        site.write(bnb.functional.dequantize_4bit(codes, state))
    found = run(PeftModel.from_pretrained(theirs.model, str(tmp_path / "out")), here.batch)
    torch.testing.assert_close(found, run(here.model, here.batch), rtol=1e-5, atol=1e-5)
    assert all(".lora_" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_layers_that_are_stored_already_stay_so(tmp_path):
    directory, wanted, _ = started(tmp_path, Q, 1)
    here = make("llama")
    for path in (f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in Q):
        quantise_layer(here.model.get_submodule(path), 64, False, False)
    assert "nf4" not in str(veneer.load(here.model, directory).recipe)
    torch.testing.assert_close(run(here.model, here.batch), wanted, rtol=1e-5, atol=1e-5)


WRONG = {
    "lora+loftq(iterations=2)": "cannot derive the base that loftq",
    "lora+nf4(double_quant=False)+loftq(iterations=2)": "cannot derive the base that loftq",
}


@pytest.mark.parametrize("recipe", WRONG)
def test_a_base_that_peft_cannot_derive_is_refused(recipe, tmp_path):
    adapter = veneer.attach(make("llama").model, recipe, rank=4)
    with pytest.raises(UserError, match=WRONG[recipe]):
        adapter.export(tmp_path / "out")


def test_a_head_and_a_low_precision_are_refused(tmp_path):
    directory, _, _ = started(tmp_path / "a", [*Q, "lm_head"], 1)
    with pytest.raises(UserError, match="lm_head cannot be stored again"):
        veneer.load(make("llama").model, directory, force=True)
    directory, _, _ = started(tmp_path / "b", Q, 2)
    with pytest.raises(UserError, match="the same base in fp32 alone"):
        veneer.load(make("llama", torch.bfloat16).model, directory)
