"""``veneer inspect`` on a model, on adapters, and what it leaves behind."""

import json

import pytest
import torch

import veneer as library
from veneer.cli import main


def veneer(capsys, *arguments):
    """(exit status, standard output, standard error) of a command line, run in this process."""
    with pytest.raises(SystemExit) as stop:
        main.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module")
def adapters(word_model, tmp_path_factory):
    """Two adapters far from their starts, of different seeds."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        model, _ = library.load_model(str(word_model), dtype=torch.float32)
        adapter = library.attach(model, "lora", rank=2)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, p in adapter.named_parameters():
                p.normal_(generator=generator).mul_(2)
        adapter.save(folder / name)
    return folder / "one", folder / "two"


def test_a_model_has_sites_spectra_and_limits(word_model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("say the colour of sky " * 200)
    out, plots = tmp_path / "i.json", tmp_path / "plots"
    given = ["--spectra", "--limits", "--text", text, "--length", 32, "--out", out, "--plots", plots]
    status, shown, _ = veneer(capsys, "inspect", "--model", word_model, *given)
    assert status == 0
    assert "32 × 64" in shown and "stable" not in shown and "the transition is at scores of 1.7 to 6.9" in shown
    found = json.loads(out.read_text())
    assert {"sites", "spectra", "limits"} == set(found)
    assert [f["tokens"] for f in found["limits"]["lengths"]] == [8, 16, 32]
    assert {p.name for p in plots.iterdir()} == {"scores.png", "spectra.png"}


def test_two_adapters_are_compared_and_each_is_warned_of(word_model, adapters, tmp_path, capsys):
    out, plots = tmp_path / "i.json", tmp_path / "plots"
    status, shown, _ = veneer(capsys, "inspect", *adapters, "--model", word_model, "--out", out, "--plots", plots)
    assert status == 0 and "intruders among" in shown and "14 common sites: mean cosine" in shown
    assert "larger than the weight itself" in shown
    found = json.loads(out.read_text())
    assert set(found["adapters"]) == {str(a) for a in adapters} and len(found["compared"]) == 14
    assert {p.name for p in plots.iterdir()} == {f"{n}-{k}.png" for n in ("drift", "intruders") for k in (1, 2)}
    assert all((plots / p.name).read_bytes()[:4] == b"\x89PNG" for p in plots.iterdir())


def test_limits_of_an_adapter_say_what_it_moved(word_model, adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "text.txt").write_text("say the colour of sky " * 200)
    given = ["--limits", "--text", tmp_path / "text.txt", "--length", 16, "--out", tmp_path / "i.json"]
    status, shown, _ = veneer(capsys, "inspect", adapters[0], "--model", word_model, *given)
    assert status == 0 and "Δ of q, k, v" in shown
    (report,) = json.loads((tmp_path / "i.json").read_text())["adapters"].values()
    assert all(row["change"] != 0 and row["delta_v"] > 0 for row in report["limits"]["layers"])


def test_intruders_are_shrunk_into_an_adapter_that_loads(word_model, adapters, tmp_path, capsys):
    out = tmp_path / "shrunk"
    status, shown, _ = veneer(capsys, "inspect", adapters[0], "--model", word_model, "--shrink", 0, "--save", out)
    assert status == 0 and "has the same norm: compare with that" in shown
    model, _ = library.load_model(str(word_model), dtype=torch.float32)
    before = library.load(model, adapters[0], name="before")
    norm = sum(float(d.weight().detach().square().sum()) for d in before.deltas.values())
    before.detach()
    after = library.load(model, out)
    smaller = sum(float(d.weight().detach().square().sum()) for d in after.deltas.values())
    assert 0 < smaller < norm
    assert f"times {(smaller / norm) ** 0.5:.3f}" in shown


def test_a_shrunk_adapter_keeps_a_rank_that_is_asked_for(word_model, adapters, tmp_path, capsys):
    given = ["--shrink", 0.5, "--rank", 2, "--save", tmp_path / "shrunk"]
    status, shown, _ = veneer(capsys, "inspect", adapters[0], "--model", word_model, *given)
    assert status == 0 and "of ranks up to 2 (which cuts off" in shown
    assert json.loads((tmp_path / "shrunk" / "adapter_config.json").read_text())["r"] == 2


def test_factors_are_tried_on_held_out_rows_beside_their_control(word_model, adapters, colour_rows, tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "i.json"
    rows.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(6)))
    given = ["--sweep", rows, "--out", out, "--plots", tmp_path / "plots"]
    status, shown, error = veneer(capsys, "inspect", adapters[0], "--model", word_model, *given)
    assert status == 0, error
    assert "in brackets the whole change" in shown and (tmp_path / "plots" / "tried.png").is_file()
    found = json.loads(out.read_text())["tried"]
    assert [f["factor"] for f in found] == [1, 0.9, 0.75, 0.5, 0.25, 0] and found[0]["scores"] == found[0]["control"]
    model, _ = library.load_model(str(word_model), dtype=torch.float32)
    library.load(model, adapters[0])
    from veneer.analysis.loading import row_scorer

    _, tokenizer = library.load_model(str(word_model), dtype=torch.float32)
    assert found[0]["scores"]["held-out loss"] == pytest.approx(row_scorer(model, tokenizer, str(rows))(), rel=1e-4)
    assert found[-1]["scores"] != found[-1]["control"]


def test_another_base_is_refused_and_when_forced_warned_of(word_model, adapters, tmp_path, capsys):
    model, tokenizer = library.load_model(str(word_model), dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    status, _, error = veneer(capsys, "inspect", adapters[0], "--model", tmp_path / "other")
    assert status == 2 and "another base" in error
    status, shown, _ = veneer(capsys, "inspect", adapters[0], "--model", tmp_path / "other", "--force")
    assert status == 0 and "made on another base" in shown.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "there is no adapter folder nothing"),
        (["a", "b", "c"], "3 adapters were given"),
        (["ONE", "ONE"], "given twice"),
        (["ONE", "--spectra"], "for a model alone"),
        (["ONE", "--shrink", "0.5"], "go together"),
        (["ONE", "--shrink", "-0.5", "--save", "x"], "at least 0 was expected"),
        (["ONE", "--rank", "2"], "the two go together"),
        (["--sweep", "TMP"], "takes one adapter"),
        (["ONE", "--sweep", "nowhere.jsonl"], "nowhere.jsonl"),
        (["ONE", "--side", "middle"], "middle"),
        (["--shrink", "0.5", "--save", "x"], "takes one adapter"),
        (["ONE", "--shrink", "0.5", "--save", "TMP"], "exists already"),
        (["--plots", "TMP"], "nothing to draw"),
        (["--limits", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, word_model, adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [{"ONE": adapters[0], "TMP": tmp_path}.get(a, a) for a in arguments]
    status, _, err = veneer(capsys, "inspect", *given, "--model", word_model)
    assert status == 2 and words in err and err.count("\n") == 1
