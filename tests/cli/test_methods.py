"""``veneer methods``: the filters agree with what the classes say and with what exports do; one method in full."""

import json
import re

import pytest

from veneer.cli import main
from veneer.core import registry
from veneer.report import catalogue

AXES = "|".join(registry.AXES)


def veneer(capsys, *arguments):
    """(exit status, standard output, standard error) of a command line, run in this process."""
    with pytest.raises(SystemExit) as stop:
        main.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def names(capsys, monkeypatch, *filters):
    """The methods that a filter lists."""
    monkeypatch.setenv("COLUMNS", "250")
    status, out, _ = veneer(capsys, "methods", *filters)
    assert status == 0
    listed = {line.split()[0] for line in out.splitlines()[1:-1] if re.match(rf"\S+ +({AXES}) ", line)}
    assert f"{len(listed)} methods" in out
    return listed


@pytest.mark.parametrize(
    ("filters", "among", "not_among"),
    [
        (["--axis", "init"], {"pissa", "eva"}, {"lora", "sora"}),
        (["--foldable"], {"lora", "dora", "full"}, {"adapter", "pissa"}),
        (["--not-foldable"], {"adapter"}, {"lora", "galore"}),
        (["--exportable", "peft"], {"lora", "dora", "ia3"}, {"mixlora"}),
        (["--exportable", "gguf"], {"lora", "dora"}, {"adapter", "pissa"}),
        (["--layer", "conv"], {"lora", "conv-lora"}, {"adapter", "lofit"}),
        (["--layer", "module"], {"lst", "adapter"}, {"lora"}),
        (["--memory", "dense"], {"full", "galore"}, {"lora"}),
        (["--memory", "quantised"], {"nf4"}, {"lora"}),
        (["--memory", "side"], {"lst"}, {"lora"}),
        (["--memory", "replaced"], {"sst"}, {"lora"}),
        (["--foldable", "--layer", "embedding", "--memory", "thin"], {"lora"}, {"full", "conv-lora"}),
    ],
)
def test_filters_list_what_answers_to_them(filters, among, not_among, capsys, monkeypatch):
    found = names(capsys, monkeypatch, *filters)
    assert among <= found and not not_among & found


def test_every_form_has_a_class_of_memory_and_a_place_to_lie():
    for method in registry.methods():
        if method.axis in catalogue.FORMS:
            assert catalogue.memory(method) in catalogue.MEMORY and method.cls.layers, method.name
    assert {catalogue.memory(m) for m in registry.methods()} == {"", *catalogue.MEMORY}


def test_one_method_is_described_in_full(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = veneer(capsys, "methods", "dora")
    assert status == 0
    for part in (
        "paper: arXiv:2402.09353",
        "layers: linear, conv, embedding",
        "folds: yes",
        "exports as: LORA of PEFT",
        "memory: thin",
        "written alone it is: dora",
        "tensor  shape",
        "dropout  0.0",
        "  init: ",
        "its claim: DoRA ends at a higher accuracy",
        "Not shown on",
    ):
        assert part in out, part


def test_a_claim_that_was_not_tried_is_said_to_be_so(capsys, monkeypatch, tmp_path):
    from veneer.cli import methods

    monkeypatch.setattr("veneer.report.pages.records", lambda folder, only="": [])
    assert methods._claims("lora") == ["its claim: not tried yet"]
    record = {"name": "sara-idle", "claim": "Idle rows help.", "verdict": "shown", "sentence": "Shown: yes."}
    monkeypatch.undo()
    (tmp_path / "022_sara-idle.json").write_text(json.dumps(record))
    from veneer.report import pages

    assert list(pages.claims_by_method(tmp_path, ["sara"], only="sara")) == ["sara"]
    assert pages.claims_by_method(tmp_path, ["sara"], only="lora") == {}


def test_parameters_are_counted_in_the_model_that_is_named(capsys, monkeypatch, word_model):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = veneer(capsys, "methods", "pissa", "--model", word_model, "--rank", 2, "--sites", "q_proj")
    assert status == 0
    assert f"2 sites, {2 * 2 * (32 + 32):,} of" in out and re.search(r"q +lora +32×32 +2 +2 +256", out)
    status, out, _ = veneer(capsys, "methods", "x-lora", "--model", word_model)
    assert status == 0 and "adapters" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lorra"], 'did you mean "lora"'),
        (["lora", "--axis", "init"], "leave one of the two out"),
        (["--model", "smollm2-135m"], "go with a method's name"),
        (["--axis", "deltas"], "there is no axis"),
        (["--memory", "huge"], "huge"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, capsys):
    status, _, err = veneer(capsys, "methods", *arguments)
    assert status == 2 and words in err and err.count("\n") == 1
