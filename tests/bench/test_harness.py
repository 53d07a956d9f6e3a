"""What the benches stand on: the order of runs, medians and ratios, targets, what lies in JSON, the job's own loss."""

import argparse
import json

import numpy as np
import pytest
import torch

from bench import harness, job
from bench.__main__ import BENCHES
from veneer.errors import UserError


def test_rounds_run_every_case_once_and_take_turns_to_begin():
    order = []
    samples = harness.alternate({name: lambda name=name: order.append(name) or len(order) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert samples == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_warm_up_rounds_run_and_are_not_kept():
    calls = []
    samples = harness.alternate({"a": lambda: calls.append(0) or len(calls)}, 2, warm_up=3)
    assert samples == {"a": [4, 5]}


def test_a_drift_that_slows_both_runs_of_a_round_leaves_the_ratio():
    drift = [1.0, 3.0, 7.0]
    assert harness.ratios([2.0 * d for d in drift], drift) == pytest.approx([2.0] * 3)
    with pytest.raises(ValueError):
        harness.ratios([1.0], [1.0, 2.0])


def test_a_figure_is_the_median_with_quartiles():
    values = [5.0, 1.0, 9.0, 2.0, 40.0, 3.0, 4.0]
    found = harness.figure("time", values, "s")
    assert (found.low, found.value, found.high) == tuple(np.percentile(values, [25, 50, 75]))
    assert found.runs == 7 and harness.figure("loss", 1.5).low == 1.5


@pytest.mark.parametrize(
    ("limits", "value", "met"),
    [
        ({"at_most": 0.65}, 0.65, True),
        ({"at_most": 0.65}, 0.66, False),
        ({"at_least": 5.0}, 5.0, True),
        ({"at_least": 5.0}, 4.99, False),
        ({}, 1.0, None),
    ],
)
def test_a_target_is_met_on_its_own_side(limits, value, met):
    assert harness.figure("x", value, **limits).met is met


def test_the_file_holds_the_samples_and_the_table_tells_a_miss(tmp_path, capsys):
    report = harness.Report([harness.figure("steps", [2.0, 4.0, 3.0], "×", at_least=5.0)], {"raw": [2.0, 4.0, 3.0]})
    found = harness.record("step", report, harness.machine(), began=0.0, quick=False)
    read = json.loads(harness.write("step", found, tmp_path).read_text(encoding="utf-8"))
    assert read["figures"][0]["met"] is False and read["samples"] == report.samples
    assert read["versions"]["torch"] == torch.__version__ and read["machine"]["threads"] == torch.get_num_threads()
    harness.show([read])
    table = capsys.readouterr().out
    assert all(words in table for words in ("steps", "3 ×", "2.5 – 3.5", "≥ 5", "no", torch.__version__))


def test_a_job_without_data_is_one_sentence_and_no_run(tmp_path, monkeypatch):
    missing = tmp_path / "absent-train.jsonl"
    monkeypatch.setenv(job.DATA, str(missing))
    with pytest.raises(UserError, match=f"there is no file {missing} to train on; .*--data or in {job.DATA}"):
        harness.fresh("bench.job", "--quick")


def test_held_out_rows_lie_beside_the_training_rows_unless_named(tmp_path):
    train, held = tmp_path / "e2e-train.jsonl", tmp_path / "e2e-test.jsonl"
    train.touch()
    asked = argparse.Namespace(data=str(train), held_out=None)
    with pytest.raises(UserError, match="--held-out"):
        job.data_files(asked)
    held.touch()
    assert job.data_files(asked) == (train, held)


def test_the_held_out_loss_is_the_models_own_over_all_labelled_tokens():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
    rows = []
    for length in (9, 4, 12):
        ids = torch.randint(1, 50, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss for r in rows]
    weights = [len(row["labels"]) - 3 for row in rows]
    expected = sum(w * float(loss) for w, loss in zip(weights, alone)) / sum(weights)
    assert job.held_out_loss(model, rows, pad=0, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_every_bench_is_a_module_that_can_be_run():
    missing = [name for name in BENCHES if not (harness.ROOT / "bench" / f"{name}.py").is_file()]
    assert missing == []
