"""The folder that the pages speak of: rows to train and test on, and the packaged model's name."""

import json

import pytest


@pytest.fixture
def workplace(word_model, colour_rows, tmp_path, monkeypatch):
    """The current folder, holding train.jsonl, test.jsonl and labels.jsonl; "smollm2-135m" is a small model."""
    from veneer.models import load

    monkeypatch.setattr(load, "packaged_path", lambda name: word_model)
    monkeypatch.chdir(tmp_path)
    labels = [{"text": f"say {word}", "label": "warm" if word == "red" else "cold"} for word in ("red", "blue")]
    for name, rows in (("train", colour_rows(24)), ("test", colour_rows(3)), ("labels", labels * 12)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path
