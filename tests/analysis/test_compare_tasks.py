"""Comparisons of classifiers and regressions: their own scores, no forgetting, the same untrained head for all."""

import json

import numpy as np
import pytest
import torch

from veneer.analysis.budget import Budget
from veneer.analysis.compare import Comparison
from veneer.analysis.trials import SCORES, Setting
from veneer.cli import main

TEXTS = [("the sky", "up", 0.5), ("the grass", "down", 1.5), ("the rose", "down", 1.25)]
TAGS = {"the": "O", "sky": "THING", "grass": "THING", "rose": "THING", "of": "O"}
ROWS = {
    "classification": [{"text": text, "label": label} for text, label, _ in TEXTS * 20],
    "regression": [{"text": text, "label": number} for text, _, number in TEXTS * 20],
    "token-classification": [
        {"tokens": words.split(), "tags": [TAGS[w] for w in words.split()]}
        for words in ("the sky", "of the grass", "the rose of") * 20
    ],
}
LEARNED = {
    "classification": ("accuracy", 0.9),
    "regression": ("pearson", 0.9),
    "token-classification": ("accuracy", 0.9),
}


@pytest.mark.parametrize("task", ROWS)
def test_each_task_is_scored_by_its_own_scores_on_heads_that_start_alike(task, words_model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    setting = Setting(model=str(words_model), data=str(data), batch_size=8, eval_rows=12)
    made = Comparison(setting, ["lora", "ia3"], Budget(steps=25), seeds=(0, 1), search=0, lr=2e-2, out=tmp_path / "o")
    found = made.run()
    runs = [f for recipe in ("lora", "ia3") for f in made.finals_of(recipe)]
    assert len({f["held_out_before"] for f in runs}) == 1
    assert all(set(SCORES[task]) <= f.keys() and not {"drift", "general_loss"} & f.keys() for f in runs)
    name, least = LEARNED[task]
    assert found["rows"][0][name]["mean"] >= least
    assert found["facts"]["task"] == task and any("no" in note or "not" in note for note in found["notes"])
    assert any(name.split("_")[0] in sentence.lower() for sentence in found["short"])


def test_images_are_compared_from_a_folder(tmp_path, capsys):
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    base, chance = tmp_path / "vit", np.random.default_rng(0)
    ViTForImageClassification(config).save_pretrained(base)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(base)
    for kind, low in (("dark", 0), ("light", 160)):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(24):
            pixels = chance.integers(low, low + 90, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{i}.png")
    given = ["compare", "lora", "bitfit", "--model", base, "--data", tmp_path / "images", "--steps", 12, "--seeds", 2]
    given += ["--lr", "1e-2", "--eval-rows", 8, "--out", tmp_path / "out"]
    assert _status(given) == 0
    text = capsys.readouterr().out
    assert "accuracy" in text and "macro F1" in text and "Forgetting is not measured" in text
    assert "drift" not in text and "general text" not in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Forgetting is not measured" in page and "accuracy" in page
    assert _status(["plan", "lora", "--model", base, "--data", tmp_path / "images", "--batch-size", 4]) == 0
    assert "peak memory" in capsys.readouterr().out


def test_options_that_mean_nothing_for_a_task_are_refused(words_model, colours, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS["classification"]))
    given = ["compare", "lora", "--model", words_model, "--data", data, "--steps", 2, "--out", tmp_path / "o"]
    for extra, said in ((["--answers", 3], "--answers 3"), (["--general", colours[1]], "language head")):
        assert _status([*given, *extra]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert _status([*given, "--task", "poetry"]) == 2
    assert "poetry" in capsys.readouterr().err


def _status(arguments):
    with pytest.raises(SystemExit) as stop:
        main.run([str(a) for a in arguments])
    return stop.value.code
