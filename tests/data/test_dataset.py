"""What a prepared dataset promises: counts, fingerprint, split, checks; and what a person is shown of it."""

import json

import pytest

from veneer.data import Batches, prepare, render_rows, summary
from veneer.errors import UserError

ROWS = [{"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "d e f"}]


def test_counts(words):
    made = prepare(ROWS, words)
    assert (len(made), made.tokens, made.trained, made.lengths.tolist()) == (2, 9, 6, [4, 5])
    assert made.rows == [0, 2]
    assert repr(made) == "Dataset(data, causal: 2 examples, 9 tokens of which 6 train, 1 rows dropped)"


def test_a_batch_holds_inputs_and_labels_and_its_rows_are_known_apart(words, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = prepare(tmp_path / "a.jsonl", words)
    assert set(made.batch([1, 0])) == {"input_ids", "attention_mask", "labels"}
    assert [place.rsplit("/")[-1] for place in made.where([1, 0])] == ["a.jsonl, line 3", "a.jsonl, line 1"]
    assert sorted(Batches(made, 1)) == [[0], [1]]


def test_the_fingerprint_changes_with_what_the_model_sees_and_nothing_else(words, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    first = prepare(ROWS, words).fingerprint
    assert len(first) == 64
    assert first == prepare(tmp_path / "a.jsonl", words).fingerprint
    changed = [
        prepare(ROWS[::-1], words),
        prepare(ROWS, words, template="Q: {prompt}"),
        prepare([{**row, "completion": "g"} for row in ROWS], words),
        prepare(ROWS[:1], words),
    ]
    assert len({first, *(made.fingerprint for made in changed)}) == 5


def test_the_split_is_a_partition_fixed_by_the_seed(words):
    made = prepare([{"text": "a " * (k + 2)} for k in range(100)], words)
    train, held = made.split(0.05, seed=3)
    assert (len(train), len(held)) == (95, 5)
    assert sorted(train.rows + held.rows) == list(range(100))
    assert held.rows == made.split(0.05, seed=3)[1].rows != made.split(0.05, seed=4)[1].rows
    assert [len(item["input_ids"]) for item in held] == [row + 3 for row in held.rows]
    assert len(made.split(0.5, at_most=7)[1]) == 7
    assert held.tokens + train.tokens == made.tokens


def test_what_cannot_be_split_is_refused(words):
    with pytest.raises(UserError, match="data has one row, so none can be held out"):
        prepare(ROWS[:1], words).split()
    with pytest.raises(UserError, match=r"held-out share is 1\.5"):
        prepare(ROWS, words).split(1.5)
    assert len(prepare(ROWS, words).split(0.99)[0]) == 1


def test_a_vocabulary_that_does_not_fit_is_named_by_row_and_id(words):
    made = prepare(ROWS, words)
    largest = max(max(item["input_ids"]) for item in made)
    made.check_vocabulary(largest + 1)
    with pytest.raises(
        UserError, match=rf"data\[2\] holds token id {largest} and the model's embedding has {largest} rows"
    ):
        made.check_vocabulary(largest)
    words.pad_token = "[/INST]"
    with pytest.raises(UserError, match="the tokenizer pads with id 26 and the model's embedding has 20 rows"):
        prepare(ROWS, words).check_vocabulary(20)


def test_a_tokenizers_own_bound_is_the_default_length(words):
    words.model_max_length = 9
    assert prepare([{"text": "a " * 20}], words).lengths.tolist() == [9]
    assert prepare([{"text": "a " * 20}], words, max_length=12).lengths.tolist() == [12]


def test_a_prepared_dataset_passes_through(words):
    made = prepare(ROWS, words)
    assert prepare(made, words) is made


def styles(text):
    return [(text.plain[span.start : span.end].strip(), span.style) for span in text.spans]


def test_what_trains_is_coloured(words, pairs):
    (first, second) = render_rows(prepare(ROWS, words), words, 5)
    assert styles(first) == [("data[0]", "cyan"), ("a b", "dim"), ("c <eos>", "bold green")]
    assert styles(second)[-1] == ("d e f <eos>", "bold green")
    assert len(render_rows(prepare(ROWS, words), words, 1)) == 1
    (cut,) = render_rows(prepare([{"prompt": "a " * 7, "completion": "b c"}], words, max_length=8), words)
    assert cut.plain.endswith("… cut at 8 tokens")
    (whole,) = render_rows(prepare([{"prompt": "naï", "completion": "é"}], pairs), pairs)
    assert styles(whole)[1:] == [("naï", "dim"), ("é<eos>", "bold green")]


def test_labels_are_shown_beside_their_texts(words, pairs):
    rows = [{"text": "a b", "label": "x"}, {"text": "c", "label": "y"}]
    assert render_rows(prepare(rows, words), words, 1)[0].plain == "data[0]  a b → x"
    rows = [{"text": "a b", "label": 0.5}]
    assert render_rows(prepare(rows, words), words)[0].plain == "data[0]  a b → 0.5"
    (text,) = render_rows(prepare(ROWS[:1], words, task="seq2seq"), words)
    assert text.plain == "data[0]  a b → c <eos>"
    rows = [{"tokens": ["ab", "4", "4"], "tags": ["X", "O", "O"]}]
    (text,) = render_rows(prepare(rows, pairs), pairs)
    assert text.plain == "data[0]  a[X] b 4[O] 4[O] "


def test_the_summary_is_json_and_names_what_was_dropped(words):
    found = summary(prepare(ROWS, words))
    assert json.loads(json.dumps(found)) == {
        "name": "data", "task": "causal", "rows": 3, "kept": 2, "tokens": 9, "trained": 6, "share_trained": 6 / 9,
        "longest": 5, "truncated": 0, "lengths": [[4, 1], [8, 1]], "labels": None,
        "dropped": [{"where": "data[1]", "reason": "the completion is empty"}],
    }  # fmt: skip
    rows = [{"text": "a", "label": label} for label in "xxy"]
    assert summary(prepare(rows, words))["labels"] == {"x": 2, "y": 1}
