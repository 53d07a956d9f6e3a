"""Each command on a small model made here: train, resume, evaluate, talk, export, look at data."""

import io
import json
import sys

import pytest

from veneer.cli import main

SETTINGS = ["--rank", 4, "--steps", 30, "--lr", "2e-2", "--save-every", 15]


@pytest.fixture(scope="module")
def model(word_model):
    """A small model, as a folder."""
    return word_model


@pytest.fixture(scope="module")
def data(colour_rows, tmp_path_factory):
    """Forty questions about three colours."""
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(40)))
    return path


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory):
    """(folder of a finished run, what the command printed)."""
    out, text = tmp_path_factory.mktemp("runs") / "first", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", text)
        status = veneer("train", "--model", model, "--data", data, "--out", out, *SETTINGS)
    assert status == 0
    return out, text.getvalue()


def veneer(*arguments):
    with pytest.raises(SystemExit) as stop:
        main.run([str(argument) for argument in arguments])
    return stop.value.code


def test_train_leaves_everything_in_the_run_folder(run):
    folder, text = run
    assert {"adapter", "run.json", "run.jsonl", "curves.png"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "run.json").read_text())["held_out"]["after"] < 0.5
    assert str(folder / "adapter") in text


def test_train_holds_out_a_share_and_says_so(run):
    assert "held out: 2 of 40 rows, drawn by seed 0" in run[1]


def test_train_shows_the_sites_it_adapts(run):
    assert all(role in run[1] for role in ("gate", "down", "32×64"))


def test_train_refuses_a_folder_that_holds_a_run(run, model, data, capsys):
    before = sorted(run[0].rglob("*"))
    assert veneer("train", "--model", model, "--data", data, "--out", run[0]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert sorted(run[0].rglob("*")) == before


def test_resuming_a_finished_run_does_nothing(run, model, data, capsys):
    before = (run[0] / "adapter" / "adapter.safetensors").read_bytes()
    again = ("train", "--model", model, "--data", data, "--out", run[0], "--resume")
    assert veneer(*again, *SETTINGS) == 0
    assert (run[0] / "adapter" / "adapter.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "lora+dorra"], 'did you mean "dora"'),
        (["--recipe", "lora", "--sites", "model.layers.7.*"], "model.layers.7.*"),
        (["--recipe", "lora(ranck=4)"], 'did you mean "rank"'),
        (["--rank", "0"], "rank=0"),
        (["--template", "no place"], "no place"),
        (["--eval-every", "0"], "eval_every=0"),
        (["--task", "image-classification"], "image-classification"),
    ],
)
def test_train_names_what_does_not_fit(options, words, model, data, tmp_path, capsys):
    assert veneer("train", "--model", model, "--data", data, "--out", tmp_path / "r", "--steps", 1, *options) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_eval_scores_with_and_without_the_adapter(run, model, data, capsys):
    assert veneer("eval", "--model", model, "--data", data, "--adapter", run[0] / "adapter") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("loss"))
    base, adapted, change = map(float, line.split()[1:])
    assert adapted < 0.5 < base and change == pytest.approx(adapted - base, abs=2e-4)


def test_chat_answers_lines_from_a_pipe_and_base_turns_the_adapter_off(run, model, capsys, monkeypatch):
    question = "say the colour of sky\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}/base\n{question}/base\n{question}/oops\n"))
    chat = ("chat", "--model", model, "--adapter", run[0] / "adapter", "--plain", "--max-new-tokens", 3)
    assert veneer(*chat) == 0
    first, off, base, on, last, oops = capsys.readouterr().out.splitlines()
    assert first.split() == last.split() == ["blue"]
    assert base.split() != ["blue"]
    assert "off" in off and "on" in on and "no command /oops" in oops


def test_data_shows_what_trains(model, data, capsys):
    assert veneer("data", "--model", model, "--data", data, "--rows", 2) == 0
    out = capsys.readouterr().out
    assert "line 1" in out and "line 2" in out and "line 3" not in out
    assert "40 of 40 train" in out and "280, 80 of them trained" in out


@pytest.mark.parametrize(("format", "file"), [("peft", "adapter_config.json"), ("merged", "tokenizer.json")])
def test_export_writes_what_other_tools_read(run, model, tmp_path, format, file):
    out = tmp_path / format
    assert veneer("export", "--model", model, "--adapter", run[0] / "adapter", "--format", format, "--out", out) == 0
    assert (out / file).is_file()


def test_export_as_plain_lora_says_what_was_lost(run, model, tmp_path, capsys):
    given = ["export", "--model", model, "--adapter", run[0] / "adapter", "--out", tmp_path / "plain"]
    assert veneer(*given, "--format", "peft-lora", "--tolerance", 0.1) == 0
    said = capsys.readouterr().out
    assert "relative weight error 0.0" in said and "logit error" in said
    assert (tmp_path / "plain" / "certificate.json").is_file()
    assert veneer(*given[:-1], tmp_path / "other", "--rank", 2) == 2
    assert "--rank is for --format peft-lora or gguf" in capsys.readouterr().err


def test_export_refuses_to_write_over_something(run, model, tmp_path, capsys):
    assert veneer("export", "--model", model, "--adapter", run[0] / "adapter", "--out", tmp_path) == 2
    assert "exists already" in capsys.readouterr().err


def test_flags_of_train_are_keywords_of_fit(model):
    from typer.main import get_command

    from veneer.fields import fields_of
    from veneer.train.settings import Settings

    flags = {parameter.name for parameter in get_command(main.app).commands["train"].params}
    assert set(fields_of(Settings)) <= flags


def test_a_classifier_gets_a_head_for_the_classes_of_the_data(model, tmp_path, capsys):
    data, out = tmp_path / "kinds.csv", tmp_path / "run"
    rows = [("the sky", "up"), ("the grass", "down"), ("the rose", "down")] * 10
    data.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    settings = ["--steps", 30, "--lr", "2e-2", "--save-every", 30]
    assert veneer("train", "--model", model, "--data", data, "--out", out, *settings) == 0
    assert json.loads((out / "run.json").read_text())["held_out"]["scores"]["accuracy"] == 1.0
    assert "head  base tensor" in capsys.readouterr().out


def test_plan_says_what_fits_and_refuses_what_does_not(model, capsys):
    assert veneer("plan", "lora", "full", "--model", model, "--length", 16, "--batch-size", 2) == 0
    assert "peak memory" in capsys.readouterr().out
    assert veneer("plan", "full", "--model", model, "--length", 16, "--memory", "1k") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["lorra"], 'did you mean "lora"'),
        (["lora(ranck=4)"], 'did you mean "rank"'),
        (["lora", "--memory", "lots"], "--memory lots"),
        (["lora", "--batch-size", "0"], "--batch-size"),
        (["lora", "--epochs", "0"], "epochs"),
        (["lora", "--sites", "nowhere"], "nowhere"),
        (["lora", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["lora", "--model", "nowhere"], "nowhere"),
        (["lora", "--task", "clasification"], "clasification"),
        (["lora", "--length", "64", "--data", "rows.jsonl"], "both given"),
        ([], "recipes"),
    ],
)
def test_plan_says_in_one_sentence_what_it_cannot_plan(options, words, model, capsys):
    assert veneer("plan", "--model", model, *options) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_classifier_is_scored_and_carried_with_the_classes_that_it_was_trained_on(model, tmp_path, capsys):
    words = {"red": "warm", "blue": "cold", "green": "plain"}
    rows = [json.dumps({"text": f"say {word}", "label": label}) for word, label in words.items()]
    (tmp_path / "train.jsonl").write_text("\n".join(rows * 4))
    (tmp_path / "one.jsonl").write_text(rows[0])
    settings = ("--out", tmp_path / "run", "--steps", 1, "--rank", 2)
    assert veneer("train", "--model", model, "--data", tmp_path / "train.jsonl", *settings) == 0
    adapter = ("--model", model, "--adapter", tmp_path / "run" / "adapter")
    assert veneer("eval", *adapter, "--data", tmp_path / "one.jsonl") == 0
    assert "1 rows of" in capsys.readouterr().out
    for format in ("merged", "peft"):
        assert veneer("export", *adapter, "--format", format, "--out", tmp_path / format) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"] == {
        "0": "cold", "1": "plain", "2": "warm"
    }  # fmt: skip
    assert veneer("export", "--model", model, "--adapter", tmp_path / "peft", "--out", tmp_path / "again") == 0
