"""Plain LoRA of every form that folds: the error said is the error made, and ranks are no larger than it needs.

Oracles: the dense change by folding, Eckart–Young by torch's SVD, the logits by the peft package.
"""

import json

import pytest
import torch
from by_peft import loaded, run, shake
from models import make
from recipes import attached, models_for, moved, name

import veneer
from veneer.core import registry
from veneer.errors import UserError
from veneer.parts.folding import folded_weights

FORMS = [(m, kind) for m in registry.methods("delta") for kind in models_for(m) if kind in ("llama", "gpt2", "cnn")]


def changes(model, adapter):
    """ΔW (out, in) of every whole layer that changes, in fp64."""
    out = {}
    for site, W, _ in folded_weights(adapter):
        path = site.module_path
        if site.name == "weight":
            change = (W - site.module.weight).detach().double()
            out[path] = change.T if type(site.module).__name__.endswith("Conv1D") else change
        elif site.name is None:
            whole = model.get_submodule(path).weight
            base = whole.T if site.transposed else whole.flatten(1)
            change = out.setdefault(path, torch.zeros_like(base, dtype=torch.float64))
            rows = slice(None) if site.rows is None else site.rows
            change[rows] = (W - site.weight()).detach().double()
    return out


@pytest.mark.parametrize(("method", "kind"), FORMS, ids=name)
def test_every_form_is_lowered_within_the_error_or_refused(method, kind, tmp_path):
    case, adapter = attached(method, kind)
    moved(adapter)
    batches = [{k: v for k, v in case.batch.items() if k != "labels"} if kind != "cnn" else case.batch]
    try:
        found = adapter.export(tmp_path / "out", "peft-lora", tolerance=0.05, batches=batches)
    except UserError as refusal:
        assert not method.cls.folds or "no layer's weight" in str(refusal) or "convolution" in str(refusal)
        assert not (tmp_path / "out").exists()
        return
    assert found.error <= 0.05 + 1e-6
    wanted = run(case.model, case.batch)
    z = run(loaded(tmp_path / "out", "conv" if kind == "cnn" else kind), case.batch)
    assert (z - wanted).norm() / wanted.norm() == pytest.approx(found.logits.relative, rel=0.02, abs=2e-6)
    assert (z - wanted).abs().max() == pytest.approx(found.logits.largest, rel=0.02, abs=2e-6)


@pytest.mark.parametrize(
    "recipe", ["dora(rank=4)", "randlora(rank=8, alpha=8)", "lokr(rank=2)", "full", "oft(block_size=8)"]
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_error_is_that_of_the_best_ranks_together(recipe, kind, tmp_path):
    case = make(kind)
    adapter = veneer.attach(case.model, recipe, sites=["q", "k", "v", "up", "down"])
    shake(case.model, 0.1)
    every = changes(case.model, adapter)
    found = adapter.export(tmp_path / "out", "peft-lora", tolerance=0.2)
    lost = total = 0.0
    for path, change in every.items():
        S = torch.linalg.svdvals(change)
        lost += S[found.ranks[path] :].square().sum()
        total += S.square().sum()
    assert found.error == pytest.approx(float((lost / total).sqrt()), rel=1e-3)
    assert found.error <= 0.2
    assert found.ranks.keys() == every.keys()
    # One component less anywhere would be too much: the ranks use the error up.
    least = min(
        float(torch.linalg.svdvals(change)[found.ranks[p] - 1].square())
        for p, change in every.items()
        if found.ranks[p] > 1
    )
    assert (lost + least) / total > 0.2**2


def test_components_go_by_what_they_cost(tmp_path):
    """Of two layers with equal spectra the wider one is cut first."""
    case = make("llama")
    adapter = veneer.attach(case.model, "full", sites=["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"])
    with torch.no_grad():
        for d in adapter.deltas.values():
            out, inn = d.base_tensor().shape
            U, V = (
                torch.linalg.qr(torch.randn(n, 8, generator=torch.Generator().manual_seed(n))).Q for n in (out, inn)
            )
            d.value.add_((U @ V.T) * 0.1)
    ranks = adapter.export(tmp_path / "out", "peft-lora", tolerance=0.4).ranks
    assert ranks["model.layers.0.self_attn.k_proj"] == 8
    assert ranks["model.layers.0.mlp.up_proj"] == 6  # 2 of 16 equal components are 0.125 of the square, 3 were 0.1875


@pytest.mark.parametrize(
    ("recipe", "rank"),
    [
        ("lora(rank=4, alpha=6)", 4),
        ("lora(rank=4)+pissa", 8),
        ("lora(rank=3)+olora", 6),
        ("loha(rank=1)", 1),
        ("kasa(rank=3)", 6),
        ("vera(rank=4)", 4),
        ("bone(rank=4)", 4),
    ],
)
def test_pairs_stay_exact_starts_included(recipe, rank, tmp_path):
    case = make("llama")
    adapter = veneer.attach(case.model, recipe)
    shake(case.model)
    found = adapter.export(tmp_path / "out", "peft-lora")
    assert found.exact and found.error == 0.0 and set(found.ranks.values()) == {rank}
    assert found.logits.relative < 1e-5
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    wanted = run(case.model, case.batch)
    torch.testing.assert_close(run(loaded(tmp_path / "out", "llama"), case.batch), wanted, rtol=1e-5, atol=1e-5)


def test_a_rank_compresses_pairs_to_the_nearest_ones(tmp_path):
    case = make("llama")
    adapter = veneer.attach(case.model, "lora(rank=6)+pissa")
    shake(case.model)
    every = changes(case.model, adapter)
    found = adapter.export(tmp_path / "out", "peft-lora", rank=3)
    spectra = [torch.linalg.svdvals(change).square() for change in every.values()]
    best = (sum(s[3:].sum() for s in spectra) / sum(s.sum() for s in spectra)).sqrt()
    assert set(found.ranks.values()) == {3} and not found.exact
    assert found.error == pytest.approx(float(best), rel=1e-4)


def test_both_say_when_they_do_not_go_together(tmp_path):
    case = make("llama")
    adapter = veneer.attach(case.model, "dora(rank=4)")
    shake(case.model)
    with pytest.raises(UserError, match=r"rank=1 leaves a relative error of 0\.\d+, more than tolerance=0.001"):
        adapter.export(tmp_path / "out", "peft-lora", rank=1, tolerance=1e-3)
    assert not (tmp_path / "out").exists()


def test_rows_of_a_fused_projection_share_one_factorisation(tmp_path):
    case = make("gpt2")
    adapter = veneer.attach(case.model, "dora(rank=2)", sites=["q", "k", "v"])
    shake(case.model)
    found = adapter.export(tmp_path / "out", "peft-lora", rank=5)
    assert set(found.ranks.values()) == {5} and len(found.ranks) == 2


def test_the_model_and_the_adapter_stay_as_they_are(tmp_path):
    case = make("llama")
    adapter = veneer.attach(case.model, "dora(rank=2)", train=["model.norm.weight"])
    shake(case.model)
    case.model.train()
    case.model.model.norm.eval()
    state = {k: v.clone() for k, v in adapter.state().items()}
    modes = [m.training for m in case.model.modules()]
    flags = {n: p.requires_grad for n, p in case.model.named_parameters()}
    adapter.export(tmp_path / "out", "peft-lora", tolerance=0.1)
    assert [m.training for m in case.model.modules()] == modes
    assert {n: p.requires_grad for n, p in case.model.named_parameters()} == flags
    assert all(torch.equal(state[k], v) for k, v in adapter.state().items())
    assert list(veneer.adapters(case.model)) == ["default"]


def test_the_certificate_is_a_path_and_a_file_and_reads_well(tmp_path):
    case = make("llama")
    adapter = veneer.attach(case.model, "dora(rank=2)")
    shake(case.model)
    found = adapter.export(tmp_path / "out", "peft-lora", tolerance=0.1)
    content = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert content["weight_error"] == found.error and len(content["layers"]) == len(found.rows)
    assert veneer.load(make("llama").model, found).parameter_count() > 0
    assert "relative weight error" in str(found) and "logit error" in str(found)
    silent = adapter.export(tmp_path / "silent", "peft-lora", tolerance=0.1, batches=())
    assert silent.logits is None and "not measured" in str(silent)


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("dora", {}, "dora at .* is not plain LoRA; give rank= or tolerance="),
        ("prompt(length=2)", {"rank": 2}, "changes a whole module"),
        ("adapter(placement='layer')", {"rank": 2}, "adapter cannot become plain LoRA: the bottleneck is not linear"),
        ("lora", {"rank": 0}, "rank=0 was given"),
        ("lora", {"tolerance": 1.5}, r"tolerance=1.5 was given; a relative error in \[0, 1\)"),
        ("bitfit", {"rank": 2}, "changes no layer's weight"),
    ],
)
def test_what_cannot_be_lowered_is_refused(recipe, options, words, tmp_path):
    case = make("llama")
    adapter = veneer.attach(case.model, recipe)
    with pytest.raises(UserError, match=words):
        adapter.export(tmp_path / "out", "peft-lora", **options)
    assert not (tmp_path / "out").exists()
